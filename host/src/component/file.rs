//! Reading the file of a component.

use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::{SIZE_MAX, file_format};
use crate::model::hint::WithHint;

/// Reads the file of a component.
///
/// # Errors
/// A folder, a file of another kind, or one that is too large, which is not read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let metadata =
        std::fs::metadata(path).with_context(|| format!("read the component {shown}"))?;
    if metadata.is_dir() {
        return Err(anyhow!("{shown} is a folder, not a WebAssembly component")).hint(
            "name the .wasm file in it, \
             or set `crate` instead of `component` to compile a Rust crate",
        );
    }
    if !metadata.is_file() {
        return Err(anyhow!("{shown} is not a regular file"))
            .hint("name the .wasm file of the component");
    }
    if usize::try_from(metadata.len()).is_ok_and(|size| size > SIZE_MAX) {
        return Err(file_format::too_large(metadata.len()))
            .with_context(|| format!("read the component {shown}"));
    }
    std::fs::read(path).with_context(|| format!("read the component {shown}"))
}
