//! A component as its bytes show it, before anything is compiled: the form of the file, its handler, its imports, and
//! how much it asks of the compiler.
//!
//! `oncely build` and every host ask the same questions here, so that a mistake is found where it was made. All of this
//! takes time in proportion to the bytes, and reads nothing but them.

mod code;
mod file;
mod file_format;
mod surface;

pub use code::check_code;
pub use file::read;
pub use surface::{Handler, Surface};

use anyhow::Result;

/// A component may be this large, in bytes. Those of Python and JavaScript have 12 to 20 MB.
pub const SIZE_MAX: usize = 64 << 20;

/// Finds the handler and the imports of a component; an error says why these bytes are none that a host can run.
pub fn inspect(wasm: &[u8]) -> Result<Surface> {
    file_format::check_file_format(wasm)?;
    let surface = Surface::parse(wasm)?;
    surface.check()?;
    Ok(surface)
}

/// A name from a component, cut to a length that can be quoted.
fn quoted(name: &str) -> String {
    const CHARS_MAX: usize = 100;
    match name.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("`{}…`", name.split_at(end).0),
        None => format!("`{name}`"),
    }
}

/// Names in a sentence: the first few, and how many there are beside them.
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
