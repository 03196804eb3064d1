//! Debug information of core modules.

use anyhow::{Context, Result};
use wasmparser::{Parser, Payload};

/// The beginning of the names of DWARF sections.
const DEBUG: &str = ".debug_";

/// A core module without its DWARF sections. Function names are kept.
///
/// # Errors
/// The module is malformed.
pub fn without_debug_sections(module: &[u8]) -> Result<Vec<u8>> {
    let mut kept = Vec::with_capacity(module.len());
    let mut end = 0;
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload.context("parse the core module")?;
        let range = match &payload {
            Payload::Version { range, .. } => range.clone(),
            _ => match payload.as_section() {
                Some((_, range)) => range,
                None => continue,
            },
        };
        // A section starts with its kind and its length, which its range does not include.
        let is_debug = matches!(&payload, Payload::CustomSection(section)
            if section.name().starts_with(DEBUG));
        if !is_debug {
            kept.extend_from_slice(module.get(end..range.end).unwrap_or_default());
        }
        end = range.end;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_sections_are_dropped_and_names_are_kept() {
        let text = |debug: &str| {
            let text = format!(
                r#"(module (@custom "a" "1") {debug} (func $named (export "f"))
                    (@custom "component-type:x" "2"))"#
            );
            wat::parse_str(text).unwrap()
        };
        let with = text(r#"(@custom ".debug_info" "3") (@custom ".debug_line" "4")"#);
        let without = without_debug_sections(&with).unwrap();
        assert_eq!(without, text(""));
        assert_eq!(without_debug_sections(&without).unwrap(), without);
    }
}
