//! The wasmtime engine: pooled instances, epoch deadlines, and compiled components cached on disk.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use wasmtime::component::Component;
use wasmtime::{Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::code::{EngineKind, MEMORY_MAX, code_config, write_file};
use super::compile::{CompileError, Compiler, ComponentDigest};
use crate::component;
use crate::config::CompileSettings;
use crate::model::hint::WithHint;

/// How often running guests check their deadline.
pub const EPOCH_INTERVAL: Duration = Duration::from_millis(10);

/// Maximum number of guests that run at the same time in one host.
const INSTANCES_MAX: u32 = 256;

/// The engines with their cache folder of compiled components. Cheap to clone.
#[derive(Clone)]
pub struct GuestEngine {
    /// For components of WASI 0.2.
    engine: Engine,
    /// For components with async functions. It starts with the first of them, since its pool of
    /// instances takes as much address space as the other one.
    async_engine: Arc<Mutex<Option<Engine>>>,
    cache: PathBuf,
    /// The component that was loaded last. A deployment loads the same one several times.
    last: Arc<Mutex<Option<(PathBuf, Component)>>>,
    compiler: Compiler,
}

impl GuestEngine {
    /// Creates an engine that caches compiled components in `cache`, a folder that only this user
    /// can write to.
    ///
    /// # Errors
    /// The folder cannot be created or is writable for others, or the machine lacks the address
    /// space for the pool.
    pub fn new(cache: &Path, compile: CompileSettings) -> Result<Self> {
        make_private_folder(cache)?;
        Ok(GuestEngine {
            engine: start_engine(EngineKind::Sync)?,
            async_engine: Arc::default(),
            cache: cache.to_owned(),
            last: Arc::default(),
            compiler: Compiler::new(compile, cache),
        })
    }

    /// The engine of a kind. Starts it if it is the first of its kind.
    fn engine(&self, kind: EngineKind) -> Result<Engine> {
        if kind == EngineKind::Sync {
            return Ok(self.engine.clone());
        }
        let mut engine = self
            .async_engine
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = &*engine {
            return Ok(engine.clone());
        }
        Ok(engine.insert(start_engine(kind)?).clone())
    }

    /// Compiles an inspected component, or loads the machine code that an earlier run made for this
    /// engine. Compiling a large component takes seconds. Dropping the future stops the compiler.
    ///
    /// # Errors
    /// The component is refused, now or before, or the compiler failed.
    pub(super) async fn component(&self, wasm: &Bytes) -> Result<Component> {
        // Try the cache.
        let (engines, hashed) = (self.clone(), wasm.clone());
        let (engine, digest) = blocking(move || {
            let engine = engines.engine(EngineKind::of(&hashed)?)?;
            let digest: ComponentDigest = Sha256::digest(&hashed).into();
            Ok((engine, digest))
        })
        .await?;
        let path = self.cached_path(&engine, &digest);
        if let Some((last, component)) = &*self.last()
            && *last == path
        {
            return Ok(component.clone());
        }
        let component = self.compiled(wasm, engine, digest, &path).await?;
        *self.last() = Some((path, component.clone()));
        Ok(component)
    }

    fn last(&self) -> MutexGuard<'_, Option<(PathBuf, Component)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the machine code at `path`, or compiles the component and writes it there.
    async fn compiled(
        &self,
        wasm: &Bytes,
        engine: Engine,
        digest: ComponentDigest,
        path: &Path,
    ) -> Result<Component> {
        if let Some(component) = load_cached(&engine, path).await? {
            return Ok(component);
        }
        self.compiler.check_refusals(&digest)?;

        // Wait for the compiler.
        let permit = self.compiler.acquire().await?;
        // Another load may have compiled it in the meantime.
        if let Some(component) = load_cached(&engine, path).await? {
            return Ok(component);
        }
        self.compiler.check_refusals(&digest)?;

        // Compile.
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

        // Cache the machine code and load it.
        let path = path.to_owned();
        blocking(move || {
            if let Err(error) = write_compiled(&code, &path) {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "failed to cache the compiled component, the next start compiles it again"
                );
            }
            deserialize(&engine, &code)
                .context("the component does not fit into an instance of this host")
        })
        .await
    }

    /// Path of the cached machine code. The name depends on the bytes of the component and on the
    /// engine version and settings.
    fn cached_path(&self, engine: &Engine, digest: &ComponentDigest) -> PathBuf {
        let mut hasher = std::hash::DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        self.cache.join(format!(
            "{}-{:016x}.cwasm",
            hex::encode(digest),
            hasher.finish()
        ))
    }

    /// Deletes cached components that are not in `deployed` (SHA-256, lower-case hex) and are older
    /// than `min_age`. These come from uploads that were refused or never deployed. Returns the
    /// number of deleted files.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub async fn remove_compiled(
        &self,
        deployed: HashSet<String>,
        min_age: Duration,
    ) -> Result<usize> {
        let folder = self.cache.clone();
        blocking(move || remove_compiled(&folder, &deployed, min_age)).await
    }
}

async fn load_cached(engine: &Engine, path: &Path) -> Result<Option<Component>> {
    let (engine, path) = (engine.clone(), path.to_owned());
    blocking(move || Ok(load_compiled(&engine, &path))).await
}

/// Runs long work outside the async threads. A panic in it becomes an error.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("run a check of the component")?
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
            // The next cleanup retries a file that cannot be deleted now.
            removed += usize::from(std::fs::remove_file(entry.path()).is_ok());
        }
    }
    Ok(removed)
}

/// Loads a compiled component from disk. The file ends with the SHA-256 of its content. A torn or
/// damaged file is compiled again.
fn load_compiled(engine: &Engine, path: &Path) -> Option<Component> {
    let bytes = std::fs::read(path).ok()?;
    let (code, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Sha256::digest(code).as_slice() != sum {
        tracing::warn!(
            path = %path.display(),
            "compiled component damaged, compiling it again"
        );
        return None;
    }
    match deserialize(engine, code) {
        Ok(component) => Some(component),
        Err(error) => {
            tracing::warn!(
                path = %path.display(),
                error = format!("{error:#}"),
                "compiled component rejected, compiling it again"
            );
            None
        }
    }
}

/// Loads a component from the machine code of [`precompile`].
#[allow(unsafe_code)]
fn deserialize(engine: &Engine, code: &[u8]) -> Result<Component> {
    // SAFETY: `precompile` made these bytes from a component. They come from one of two places:
    // - The standard output of our own child process, which runs this same program.
    // - A folder that only this user can write to (checked in `GuestEngine::new`). The SHA-256 of
    //   the file was checked.
    // A process that can change either of them already runs as our own user. The engine checks that
    // the bytes were made for its version and its settings.
    unsafe { Component::deserialize(engine, code) }.map_err(anyhow::Error::from)
}

/// Writes a compiled component atomically.
fn write_compiled(code: &[u8], path: &Path) -> Result<()> {
    write_file(path, &[code, &Sha256::digest(code)])
}

/// Starts an engine with pooled instances whose guests check their deadlines.
fn start_engine(kind: EngineKind) -> Result<Engine> {
    let engine = pooled_engine(kind).context("start the WebAssembly engine")?;
    spawn_epoch_thread(&engine)?;
    Ok(engine)
}

fn pooled_engine(kind: EngineKind) -> Result<Engine> {
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
    let mut config = code_config(kind);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    Engine::new(&config).map_err(anyhow::Error::from)
}

/// Increments the epoch of the engine as long as the engine exists.
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

/// Creates `folder` with mode 0700, or checks that no other user can write to it. Its files are
/// loaded as native code.
fn make_private_folder(folder: &Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("create the folder {}", folder.display()))?;
    let mode = std::fs::metadata(folder)
        .with_context(|| format!("read the permissions of {}", folder.display()))?
        .permissions()
        .mode();
    if mode & 0o022 != 0 {
        return Err(anyhow!(
            "other users can write to {}, which holds compiled components that run as native code",
            folder.display()
        )
        .hint(format!("run: chmod 700 {}", folder.display())));
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
