//! The wasmtime engine: pooled instances, epoch deadlines, and compiled components kept on disk.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use wasmtime::component::Component;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::compile::{CompileError, Compiler, ComponentDigest};
use crate::component;
use crate::config::CompileSettings;

/// How often running guests look at the clock.
pub const EPOCH_INTERVAL: Duration = Duration::from_millis(10);

/// How much memory one guest instance can be given at most, in bytes; a manifest's limit may be lower.
pub const MEMORY_MAX: usize = 512 << 20;

/// How many guests can run at the same time in one host.
const INSTANCES_MAX: u32 = 256;

/// An engine with its folder of compiled components. Cheap to clone.
#[derive(Clone)]
pub struct GuestEngine {
    engine: Engine,
    cache: PathBuf,
    compiler: Compiler,
}

impl GuestEngine {
    /// Makes an engine that keeps compiled components in `cache`, a folder only this user can enter.
    pub fn new(cache: &Path, compile: CompileSettings) -> Result<Self> {
        make_private_folder(cache)?;
        let engine = pooled_engine().context("start the WebAssembly engine")?;
        spawn_epoch_thread(&engine)?;
        Ok(GuestEngine {
            engine,
            cache: cache.to_owned(),
            compiler: Compiler::new(compile),
        })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Compiles a component that was inspected, or loads the machine code that an earlier run made for this very
    /// engine. Takes seconds for large components. When the future is dropped, compiling ends.
    pub(super) async fn component(&self, wasm: &Bytes) -> Result<Component> {
        let hashed = wasm.clone();
        let digest: ComponentDigest = blocking(move || Ok(Sha256::digest(&hashed).into())).await?;
        let path = self.cached_path(&digest);
        if let Some(component) = self.load_compiled(&path).await? {
            return Ok(component);
        }
        self.compiler.check_refusals(&digest)?;

        let permit = self.compiler.acquire().await?;
        // Another load may have compiled it meanwhile.
        if let Some(component) = self.load_compiled(&path).await? {
            return Ok(component);
        }
        self.compiler.check_refusals(&digest)?;
        let checked = wasm.clone();
        if let Err(error) = blocking(move || component::check_code(&checked)).await {
            return Err(self.compiler.refuse(digest, error));
        }
        let code = match self.compiler.compile(wasm).await {
            Ok(code) => code,
            Err(CompileError::Refused(error)) => return Err(self.compiler.refuse(digest, error)),
            Err(CompileError::Other(error)) => return Err(error),
        };
        drop(permit);

        let engine = self.engine.clone();
        blocking(move || {
            if let Err(error) = write_compiled(&code, &path) {
                tracing::warn!(
                    "compiled component not kept, so the next start compiles it again: {error:#}"
                );
            }
            deserialize(&engine, &code)
                .context("the component does not fit into an instance of this host")
        })
        .await
    }

    /// Named by the bytes of the component and everything of the engine that the machine code depends on.
    fn cached_path(&self, digest: &ComponentDigest) -> PathBuf {
        let mut hasher = std::hash::DefaultHasher::new();
        self.engine
            .precompile_compatibility_hash()
            .hash(&mut hasher);
        self.cache.join(format!(
            "{}-{:016x}.cwasm",
            hex::encode(digest),
            hasher.finish()
        ))
    }

    /// Removes compiled components that are not among these (SHA-256, lower-case hex) and were compiled longer ago than `min_age`:
    /// those of uploads that were refused or never deployed. Returns how many.
    pub async fn remove_compiled(
        &self,
        deployed: HashSet<String>,
        min_age: Duration,
    ) -> Result<usize> {
        let folder = self.cache.clone();
        blocking(move || remove_compiled(&folder, &deployed, min_age)).await
    }

    async fn load_compiled(&self, path: &Path) -> Result<Option<Component>> {
        let (engine, path) = (self.engine.clone(), path.to_owned());
        blocking(move || Ok(load_compiled(&engine, &path))).await
    }
}

/// Runs long work off the async threads. A panic in it is an error.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a check of the component ended with a panic")?
}

fn remove_compiled(folder: &Path, deployed: &HashSet<String>, min_age: Duration) -> Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry.with_context(|| format!("list {}", folder.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((digest, _)) = name
            .strip_suffix(".cwasm")
            .and_then(|name| name.split_once('-'))
        else {
            continue;
        };
        let age = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if !deployed.contains(digest) && age.is_some_and(|age| age > min_age) {
            // What cannot be removed now is tried again in an hour.
            removed += usize::from(std::fs::remove_file(entry.path()).is_ok());
        }
    }
    Ok(removed)
}

/// A compiled component from disk. The file ends with the SHA-256 of what stands before it: a torn or damaged
/// one is compiled again.
fn load_compiled(engine: &Engine, path: &Path) -> Option<Component> {
    let bytes = std::fs::read(path).ok()?;
    let (code, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Sha256::digest(code).as_slice() != sum {
        tracing::warn!(
            "compiled component {} is damaged; compiling it again",
            path.display()
        );
        return None;
    }
    match deserialize(engine, code) {
        Ok(component) => Some(component),
        Err(error) => {
            tracing::warn!(
                "compiled component {} cannot be used; compiling it again: {error:#}",
                path.display()
            );
            None
        }
    }
}

/// A component from the machine code that [`precompile`] made.
#[allow(unsafe_code)]
fn deserialize(engine: &Engine, code: &[u8]) -> Result<Component> {
    // SAFETY: the bytes are those that `precompile` made of a component. They come straight from this very program, run as
    // our own child, through its standard output, or whole (their sum was checked) from a folder that only this user can
    // write to (checked when the engine was made). A process that can change either runs as our own user. The engine checks that they were
    // made for its version and its settings.
    unsafe { Component::deserialize(engine, code) }.map_err(anyhow::Error::from)
}

/// Compiles a component in this very process, for engines like [`GuestEngine`]'s.
pub(super) fn precompile(wasm: &[u8]) -> Result<Vec<u8>> {
    let engine = Engine::new(&code_config())
        .map_err(anyhow::Error::from)
        .context("start the compiler")?;
    engine
        .precompile_component(wasm)
        .map_err(anyhow::Error::from)
}

/// Writes a compiled component whole or not at all.
fn write_compiled(code: &[u8], path: &Path) -> Result<()> {
    let sum = Sha256::digest(code);
    let folder = path.parent().context("find the cache folder")?;
    let mut file =
        tempfile::NamedTempFile::new_in(folder).context("make a file in the cache folder")?;
    file.write_all(code)
        .and_then(|()| file.write_all(&sum))
        .context("write the compiled component")?;
    file.persist(path)
        .context("put the compiled component in place")?;
    Ok(())
}

fn pooled_engine() -> Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES_MAX)
        .total_core_instances(4 * INSTANCES_MAX)
        .total_memories(INSTANCES_MAX)
        .total_tables(4 * INSTANCES_MAX)
        .total_stacks(INSTANCES_MAX)
        .max_memory_size(MEMORY_MAX)
        // Interpreters in a component need more than the defaults.
        .max_component_instance_size(10 << 20)
        .max_core_instance_size(10 << 20)
        .max_core_instances_per_component(32)
        .max_memories_per_component(16)
        .max_tables_per_component(32)
        .max_tables_per_module(4)
        .table_elements(100_000)
        .linear_memory_keep_resident(2 << 20)
        .table_keep_resident(512 << 10)
        .pagemap_scan(Enabled::Auto);
    let mut config = code_config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config).map_err(anyhow::Error::from)
}

/// Everything that machine code depends on: the same for the process that compiles and the host that runs.
fn code_config() -> Config {
    let mut config = Config::new();
    config
        .memory_init_cow(true)
        // A snapshot of an interpreter is about 12 MB of mostly data: map it, do not copy it for each message.
        .memory_guaranteed_dense_image_size(64 << 20)
        .memory_reservation(MEMORY_MAX as u64)
        .memory_guard_size(32 << 20)
        .epoch_interruption(true)
        .max_wasm_stack(512 << 10)
        .async_stack_size(2 << 20)
        .wasm_memory64(false)
        // Components composed of others copy from one's memory to the other's.
        .wasm_multi_memory(true)
        .concurrency_support(false);
    config
}

/// Advances the engine's epoch for as long as the engine lives.
fn spawn_epoch_thread(engine: &Engine) -> Result<()> {
    let weak = engine.weak();
    std::thread::Builder::new()
        .name("epoch".to_owned())
        .spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(EPOCH_INTERVAL);
            }
        })
        .context("start the epoch thread")?;
    Ok(())
}

/// Makes `folder` with mode 0700, or checks that nobody else can write to it: what lies there is native code.
fn make_private_folder(folder: &Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("make the folder {}", folder.display()))?;
    let mode = std::fs::metadata(folder)
        .with_context(|| format!("look at {}", folder.display()))?
        .permissions()
        .mode();
    if mode & 0o022 != 0 {
        bail!(
            "others can write to {}, which holds compiled components that run as native code; run: chmod 700 {}",
            folder.display(),
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remove_compiled_deletes_old_components_never_deployed() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "aa-1.cwasm",
            "aa-2.cwasm",
            "bb-1.cwasm",
            "other",
            "bb-1.cwasm.new",
        ] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let deployed = HashSet::from(["aa".to_owned()]);
        assert_eq!(
            remove_compiled(folder.path(), &deployed, Duration::from_secs(60)).unwrap(),
            0
        );
        assert_eq!(
            remove_compiled(folder.path(), &deployed, Duration::ZERO).unwrap(),
            1
        );
        assert!(
            !folder.path().join("bb-1.cwasm").exists() && folder.path().join("aa-2.cwasm").exists()
        );
    }
}
