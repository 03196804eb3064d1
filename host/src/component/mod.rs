//! Static checks of a component before it is compiled: its file format, handler, imports and
//! compile cost.
//!
//! `oncely build` and every host run the same checks, so that a mistake is found where it was made.
//! Their time is proportional to the size of the component, and they read nothing but its bytes.

mod async_functions;
mod code;
mod debug_info;
mod file;
mod file_format;
mod surface;

pub use async_functions::is_async;
pub use code::check_code;
pub use debug_info::without_debug_sections;
pub use file::read;
pub use file_format::{describes_component, is_module_with_handler, module_world};
pub use surface::{Handler, Surface};

use anyhow::Result;

/// The maximum size of a component in bytes. Components in Python and JavaScript have 12 to 20 MB.
pub const SIZE_MAX: usize = 64 << 20;

/// Finds the handler and the imports of a component.
///
/// # Errors
/// The reason why a host cannot run these bytes.
pub fn inspect(wasm: &[u8]) -> Result<Surface> {
    file_format::check_file_format(wasm)?;
    let surface = Surface::parse(wasm)?;
    surface.check()?;
    Ok(surface)
}

/// A name from a component in backticks, truncated to a quotable length.
fn quoted(name: &str) -> String {
    const CHARS_MAX: usize = 100;
    match name.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("`{}…`", name.split_at(end).0),
        None => format!("`{name}`"),
    }
}

/// Names for a sentence: the first few, and the number of the others.
fn list(names: &[String]) -> String {
    const NAMES_MAX: usize = 8;
    if names.is_empty() {
        return "nothing".to_owned();
    }
    let first: Vec<String> = names
        .iter()
        .take(NAMES_MAX)
        .map(|name| quoted(name))
        .collect();
    match names.len().checked_sub(NAMES_MAX) {
        None | Some(0) => first.join(", "),
        Some(more) => format!("{} and {more} more", first.join(", ")),
    }
}

#[cfg(test)]
mod tests;
