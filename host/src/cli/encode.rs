//! Turns a core module into a component, by the description that its bindings left in it, or by
//! the name of its handler.

use std::path::Path;

use anyhow::{Context, Result};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_component::StringEncoding;
use wit_parser::Resolve;

use crate::component;

/// The interfaces of workers, each after those that it uses.
const WIT: [(&str, &str); 3] = [
    (
        "config.wit",
        include_str!("../../../wit/deps/config/config.wit"),
    ),
    (
        "logging.wit",
        include_str!("../../../wit/deps/logging/logging.wit"),
    ),
    ("worker.wit", include_str!("../../../wit/worker.wit")),
];

/// Reads the file of a component, or of a core module with a handler, as a component.
///
/// # Errors
/// The file cannot be read, or its core module cannot be wrapped.
pub fn read_component(path: &Path) -> Result<Vec<u8>> {
    let wasm = component::read(path)?;
    if !component::is_module_with_handler(&wasm) {
        return Ok(wasm);
    }
    encode_component(&wasm).with_context(|| format!("read the core module {}", path.display()))
}

/// Wraps a core module into a component. Calls of WASI 0.1, which the libraries of C and Go make,
/// become calls of WASI 0.2. Debug information is dropped: components are stored in the database
/// and compiled by every host, so small ones are better. Function names are kept for traps.
///
/// # Errors
/// The module is malformed, or its exports do not match its description.
pub fn encode_component(module: &[u8]) -> Result<Vec<u8>> {
    let mut module = component::without_debug_sections(module)?;
    if !component::describes_component(&module)
        && let Some(world) = component::module_world(&module)
    {
        describe(&mut module, world)?;
    }
    wit_component::ComponentEncoder::default()
        .validate(true)
        .adapter(
            WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME,
            WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
        )?
        .module(&module)?
        .encode()
        .context("convert it into a component")
}

/// Adds the description of a world to a core module. Linkers such as Go's cannot add it.
fn describe(module: &mut Vec<u8>, world: &str) -> Result<()> {
    let mut resolve = Resolve::default();
    let mut packages = Vec::new();
    for (name, text) in WIT {
        packages.push(
            resolve
                .push_str(name, text)
                .context("parse the WIT files")?,
        );
    }
    let world = resolve.select_world(&packages, Some(&format!("oncely:worker/{world}")))?;
    wit_component::embed_component_metadata(module, &resolve, world, StringEncoding::UTF8)
        .context("describe the interfaces of the core module")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_without_a_description_is_described_by_its_handler() {
        let module = |handler: &str| {
            let text = format!(
                r#"(module (memory (export "memory") 1)
                    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) unreachable)
                    (func (export "{handler}") (param i32 i32) (result i32) unreachable))"#
            );
            wat::parse_str(text).unwrap()
        };
        let batch = module("oncely:worker/batch-handler@0.1.0#handle-batch");
        let component = encode_component(&batch).unwrap();
        let surface = component::inspect(&component).unwrap();
        assert_eq!(surface.handler().unwrap(), component::Handler::Batch);
        assert_eq!(component::module_world(&module("run")), None);
    }
}
