//! Turns a core module into a component, by the description that its bindings left in it.

use anyhow::{Context, Result};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wasmparser::{Parser, Payload};

/// The beginning of the names of DWARF sections.
const DEBUG: &str = ".debug_";

/// Wraps a core module into a component. Calls of WASI 0.1, which the libraries of C and Go make,
/// become calls of WASI 0.2. Debug information is dropped: components are stored in the database
/// and compiled by every host, so small ones are better. Function names are kept for traps.
///
/// # Errors
/// The module is malformed, or its exports do not match its description.
pub fn encode_component(module: &[u8]) -> Result<Vec<u8>> {
    wit_component::ComponentEncoder::default()
        .validate(true)
        .adapter(
            WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME,
            WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
        )?
        .module(&without_debug_sections(module)?)?
        .encode()
        .context("convert the core module into a component")
}

/// A core module without its DWARF sections.
fn without_debug_sections(module: &[u8]) -> Result<Vec<u8>> {
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
