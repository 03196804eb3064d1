//! The wasmtime engine: pooled instances, epoch deadlines, and compiled components kept on disk.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use wasmtime::component::Component;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

/// How often running guests look at the clock.
pub const EPOCH: Duration = Duration::from_millis(10);

/// A component may be this large, in bytes. Those of Python and JavaScript have 12 to 20 MB.
pub const COMPONENT_SIZE_MAX: usize = 64 << 20;

/// How much memory one guest instance can be given at most, in bytes; a manifest's limit may be lower.
pub const MEMORY_MAX: usize = 512 << 20;

/// How many guests can run at the same time in one host.
const INSTANCES: u32 = 256;

/// An engine with its folder of compiled components. Cheap to clone.
#[derive(Clone)]
pub struct GuestEngine {
    engine: Engine,
    cache: PathBuf,
}

impl GuestEngine {
    /// Makes an engine that keeps compiled components in `cache`, a folder only this user can enter.
    pub fn new(cache: &Path) -> Result<Self> {
        make_private_folder(cache)?;
        let engine = pooled_engine().context("start the WebAssembly engine")?;
        tick(&engine)?;
        Ok(GuestEngine { engine, cache: cache.to_owned() })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Compiles a component, or loads what an earlier run compiled for this very engine. Takes seconds for
    /// large components: call it where blocking is fine.
    pub(super) fn compile(&self, wasm: &[u8]) -> Result<Component> {
        if Engine::detect_precompiled(wasm).is_some() {
            bail!("this is a precompiled component, which would run as native code; give the .wasm file instead");
        }
        if wasm.len() > COMPONENT_SIZE_MAX {
            bail!("the component has {} bytes; at most {COMPONENT_SIZE_MAX} are allowed", wasm.len());
        }
        let path = self.cached_path(wasm);
        if let Some(component) = self.load_compiled(&path) {
            return Ok(component);
        }
        let component = Component::new(&self.engine, wasm)
            .map_err(anyhow::Error::from)
            .context("compile the component (is it a component, not a core module?)")?;
        if let Err(error) = keep_compiled(&component, &path) {
            tracing::warn!("compiled component not kept, so the next start compiles it again: {error:#}");
        }
        Ok(component)
    }

    /// Named by the bytes of the component and everything of the engine that the machine code depends on.
    fn cached_path(&self, wasm: &[u8]) -> PathBuf {
        let mut hasher = std::hash::DefaultHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        self.cache.join(format!("{}-{:016x}.cwasm", hex::encode(Sha256::digest(wasm)), hasher.finish()))
    }

    /// A compiled component from disk. The file ends with the SHA-256 of what stands before it: a torn or damaged
    /// one is compiled again.
    #[allow(unsafe_code)]
    fn load_compiled(&self, path: &Path) -> Option<Component> {
        let bytes = std::fs::read(path).ok()?;
        let (code, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Sha256::digest(code).as_slice() != sum {
            tracing::warn!("compiled component {} is damaged; compiling it again", path.display());
            return None;
        }
        // SAFETY: the bytes are those that `keep_compiled` wrote: they lie in a folder that only this user can
        // write to (checked when the engine was made), and they are whole. Whoever can write there runs as us.
        match unsafe { Component::deserialize(&self.engine, code) } {
            Ok(component) => Some(component),
            Err(error) => {
                tracing::warn!("compiled component {} cannot be used; compiling it again: {error:#}", path.display());
                None
            }
        }
    }
}

/// Writes a compiled component whole or not at all.
fn keep_compiled(component: &Component, path: &Path) -> Result<()> {
    let mut code = component.serialize().map_err(anyhow::Error::from).context("serialize the component")?;
    let sum = Sha256::digest(&code);
    code.extend_from_slice(&sum);
    let folder = path.parent().context("find the cache folder")?;
    let mut file = tempfile::NamedTempFile::new_in(folder).context("make a file in the cache folder")?;
    std::io::Write::write_all(&mut file, &code).context("write the compiled component")?;
    file.persist(path).context("put the compiled component in place")?;
    Ok(())
}

fn pooled_engine() -> Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES)
        .total_core_instances(4 * INSTANCES)
        .total_memories(INSTANCES)
        .total_tables(4 * INSTANCES)
        .total_stacks(INSTANCES)
        .max_memory_size(MEMORY_MAX)
        // Interpreters in a component need more than the defaults.
        .max_component_instance_size(10 << 20)
        .max_core_instance_size(10 << 20)
        .max_core_instances_per_component(32)
        .max_memories_per_component(4)
        .max_tables_per_component(32)
        .max_tables_per_module(4)
        .table_elements(100_000)
        .linear_memory_keep_resident(2 << 20)
        .table_keep_resident(512 << 10)
        .pagemap_scan(Enabled::Auto);
    let mut config = Config::new();
    config
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .memory_init_cow(true)
        // A snapshot of an interpreter is about 12 MB of mostly data: map it, do not copy it for each message.
        .memory_guaranteed_dense_image_size(64 << 20)
        .memory_reservation(MEMORY_MAX as u64)
        .memory_guard_size(32 << 20)
        .epoch_interruption(true)
        .max_wasm_stack(512 << 10)
        .async_stack_size(2 << 20)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        .concurrency_support(false);
    Engine::new(&config).map_err(anyhow::Error::from)
}

/// Advances the engine's epoch for as long as the engine lives.
fn tick(engine: &Engine) -> Result<()> {
    let weak = engine.weak();
    std::thread::Builder::new()
        .name("epoch".to_owned())
        .spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(EPOCH);
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
    let mode = std::fs::metadata(folder).with_context(|| format!("look at {}", folder.display()))?.permissions().mode();
    if mode & 0o022 != 0 {
        bail!(
            "others can write to {}, which holds compiled components that run as native code; run: chmod 700 {}",
            folder.display(),
            folder.display()
        );
    }
    Ok(())
}
