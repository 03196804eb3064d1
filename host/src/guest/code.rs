//! Machine code of components: the settings it depends on, its compilation, and its files.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use wasmtime::{CacheStore, Config, Engine};

use crate::component;

/// Maximum memory of one guest instance, in bytes. The limit of a manifest may be lower.
pub(super) const MEMORY_MAX: usize = 512 << 20;

/// Compiles a component in this process, for engines like that of [`GuestEngine`], with the machine
/// code of functions that were compiled before.
///
/// # Errors
/// The component is not valid WebAssembly.
pub(super) fn precompile(wasm: &[u8], functions: Option<Arc<dyn CacheStore>>) -> Result<Vec<u8>> {
    let mut config = code_config(EngineKind::of(wasm)?);
    if let Some(functions) = functions {
        config
            .enable_incremental_compilation(functions)
            .map_err(anyhow::Error::from)
            .context("use functions that were compiled before")?;
    }
    let engine = Engine::new(&config)
        .map_err(anyhow::Error::from)
        .context("start the compiler")?;
    engine
        .precompile_component(wasm)
        .map_err(anyhow::Error::from)
}

/// The kinds of engines. A component runs in the cheapest one that supports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EngineKind {
    /// Without async functions, as in WASI 0.2.
    Sync,
    /// With the async functions, streams and futures of WASI 0.3.
    Async,
}

impl EngineKind {
    /// The kind that a component needs.
    ///
    /// # Errors
    /// The component is damaged.
    pub(super) fn of(wasm: &[u8]) -> Result<EngineKind> {
        Ok(match component::is_async(wasm)? {
            true => EngineKind::Async,
            false => EngineKind::Sync,
        })
    }
}

/// The settings that the machine code depends on. The compiler process and the host use the same.
pub(super) fn code_config(kind: EngineKind) -> Config {
    let mut config = Config::new();
    config
        .memory_init_cow(true)
        // A snapshot of an interpreter has about 12 MB, mostly data. It is mapped instead of copied
        // for each message.
        .memory_guaranteed_dense_image_size(64 << 20)
        .memory_reservation(MEMORY_MAX as u64)
        .memory_guard_size(32 << 20)
        .epoch_interruption(true)
        .max_wasm_stack(512 << 10)
        .async_stack_size(2 << 20)
        .wasm_memory64(false)
        // Composed components copy from one memory to another.
        .wasm_multi_memory(true)
        .concurrency_support(kind == EngineKind::Async);
    config
}

/// Writes a file of the cache folder, in parts. It replaces another one as a whole.
pub(super) fn write_file(path: &Path, parts: &[&[u8]]) -> Result<()> {
    let folder = path.parent().context("find the cache folder")?;
    let mut file =
        tempfile::NamedTempFile::new_in(folder).context("make a file in the cache folder")?;
    for part in parts {
        file.write_all(part).context("write machine code")?;
    }
    file.persist(path)
        .context("move machine code into the cache folder")?;
    Ok(())
}
