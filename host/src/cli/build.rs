//! `oncely build`: builds the components of a manifest, and checks all parts of a deployment that
//! need no host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::encode::read_component;
use super::term;
use crate::cli::cargo::{TOOLCHAIN_VARIABLE, Target, build_component};
use crate::component;
use crate::config::manifest::{Manifest, Source, Worker, WorkerEntry};
use crate::guest::check_kind;
use crate::ingress::check_routes;
use crate::model::hint::WithHint;
use crate::model::oci::{Digest, Reference};
use crate::model::signature::Signature;
use crate::registry::Artifact;

/// Build the components of a manifest without deploying them, and check them like a deployment.
#[derive(Debug, Args)]
pub struct Build {
    /// Build these manifests, or folders that contain an oncely.toml.
    #[arg(default_value = ".")]
    manifests: Vec<PathBuf>,
    #[command(flatten)]
    toolchain: ToolchainArg,
    #[command(flatten)]
    environment: EnvironmentArg,
}

/// The environment of a manifest.
#[derive(Debug, Clone, Args)]
pub struct EnvironmentArg {
    /// Merge the tables of [env.NAME] over the manifest.
    #[arg(long = "env", env = "ONCELY_ENV", value_name = "NAME")]
    environment: Option<String>,
}

impl EnvironmentArg {
    /// The name. An empty variable counts as unset.
    pub fn name(&self) -> Option<&str> {
        self.environment.as_deref().filter(|name| !name.is_empty())
    }
}

/// The toolchain that builds the crates of a manifest.
#[derive(Debug, Clone, Copy, Args)]
pub struct ToolchainArg {
    /// Build crates with this toolchain. Default: the best installed one.
    #[arg(long, env = TOOLCHAIN_VARIABLE, value_name = "NAME")]
    toolchain: Option<Target>,
}

impl Build {
    pub async fn run(self) -> Result<()> {
        for path in &self.manifests {
            let manifest = Manifest::load(path, self.environment.name())?;
            manifest.warnings().iter().for_each(term::warning);
            let mut before: Vec<&Worker> = Vec::new();
            for entry in &manifest.workers {
                let built = BuiltComponent::build(entry, self.toolchain).await?;
                component::check_code(&built.wasm).with_context(|| built.error_context(entry))?;
                entry.check_migrations()?;
                check_routes(&entry.worker, before.iter().copied())?;
                before.push(&entry.worker);
                term::data(built.path.display())?;
            }
        }
        Ok(())
    }
}

/// A component on this machine that the host has not checked yet.
pub struct BuiltComponent {
    pub path: PathBuf,
    pub wasm: Vec<u8>,
    /// The registry that it came from.
    artifact: Option<Artifact>,
}

impl BuiltComponent {
    /// Builds the component of a worker if the manifest has a build step, or pulls it from its
    /// registry, and checks its form, its handler and its imports. A core module with a handler is
    /// made a component.
    ///
    /// # Errors
    /// The build failed, or the component is not a valid worker.
    pub async fn build(entry: &WorkerEntry, with: ToolchainArg) -> Result<BuiltComponent> {
        let built = match &entry.source {
            Source::Oci(reference) => pull(entry, reference).await?,
            // A host in this process handles messages meanwhile.
            _ => tokio::task::block_in_place(|| build_here(entry, with))?,
        };
        let surface =
            component::inspect(&built.wasm).with_context(|| built.error_context(entry))?;
        check_kind(&entry.worker, surface.handler()?)?;
        Ok(built)
    }

    /// The reference of a component from a registry, with the digest of its manifest.
    pub fn reference(&self) -> Option<&Reference> {
        self.artifact.as_ref().map(|artifact| &artifact.reference)
    }

    /// The signature of the component: in its registry, or in the file next to it with the ending
    /// `.sig`; `None` if there is none.
    ///
    /// # Errors
    /// The registry fails, or the file cannot be read.
    pub async fn signature(&mut self) -> Result<Option<Signature>> {
        if let Some(artifact) = &mut self.artifact {
            return artifact.signature().await;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(".sig");
        let path = PathBuf::from(path);
        if !path.exists() {
            return Ok(None);
        }
        let signature = std::fs::read_to_string(&path);
        let signature = signature.with_context(|| format!("read {}", path.display()))?;
        Ok(Some(Signature::File { signature }))
    }

    /// The outermost message of an error about the component.
    pub fn error_context(&self, entry: &WorkerEntry) -> String {
        let source = match self.reference() {
            Some(reference) => reference.to_string(),
            None => self.path.display().to_string(),
        };
        format!(
            "the component of worker {}, {source}, cannot be deployed",
            entry.worker.name
        )
    }
}

/// Builds the component of a worker if the manifest has a build step, and reads it.
fn build_here(entry: &WorkerEntry, with: ToolchainArg) -> Result<BuiltComponent> {
    let path = build_or_locate(entry, with)?;
    Ok(BuiltComponent {
        wasm: read_component(&path)?,
        path,
        artifact: None,
    })
}

/// Pulls the component of a worker. A file from an earlier pull with the same digest is used again.
async fn pull(entry: &WorkerEntry, reference: &Reference) -> Result<BuiltComponent> {
    let name = &entry.worker.name;
    let context = || format!("pull the component of worker {name}");
    let mut artifact = Artifact::find(reference).await.with_context(context)?;
    let path = output_path(entry);
    let wasm = match std::fs::read(&path) {
        Ok(wasm) if Digest::of(&wasm) == *artifact.digest() => wasm,
        _ => {
            term::note(format!("pulling {name}: {}", artifact.reference));
            let wasm = artifact.pull().await.with_context(context)?;
            write(&path, &wasm).with_context(|| format!("write {}", path.display()))?;
            wasm
        }
    };
    Ok(BuiltComponent {
        path,
        wasm,
        artifact: Some(artifact),
    })
}

/// The file of a component that Oncely compiles or pulls.
fn output_path(entry: &WorkerEntry) -> PathBuf {
    let file = format!("{}.wasm", entry.worker.name);
    entry.folder.join("target").join("oncely").join(file)
}

/// Writes a file completely or not at all.
fn write(path: &Path, wasm: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let file = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(file.path(), wasm)?;
    file.persist(path)?;
    Ok(())
}

/// Builds the component of a worker if the manifest has a build step, and returns its path.
fn build_or_locate(entry: &WorkerEntry, with: ToolchainArg) -> Result<PathBuf> {
    let name = &entry.worker.name;
    match &entry.source {
        Source::Crate(folder) => {
            let out = output_path(entry);
            let mut progress = |line: &str| term::note(line);
            build_component(folder, &out, with.toolchain, &mut progress).with_context(|| {
                format!("build the crate of worker {name} in {}", folder.display())
            })?;
            Ok(out)
        }
        Source::Component { path, build } => {
            if let Some(command) = build {
                run_command(command, &entry.folder, name)?;
            }
            if !path.exists() {
                return Err(anyhow::anyhow!(
                    "the component of worker {name} does not exist at {}",
                    path.display()
                ))
                .hint(
                    "build it, or set the command that builds it in the manifest: build = \"...\"",
                );
            }
            Ok(path.clone())
        }
        Source::Oci(reference) => bail!("{reference} is pulled, not built"),
    }
}

fn run_command(command: &str, folder: &Path, worker: &str) -> Result<()> {
    term::note(format!("building {worker}: {command}"));
    let status = std::process::Command::new("sh")
        .args(["-c", command])
        .current_dir(folder)
        // Its output is progress, not data.
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("run `{command}`"))?;
    match status.code() {
        Some(0) => Ok(()),
        // The shell did not find a program.
        Some(127) => Err(anyhow::anyhow!("`{command}` failed with {status}"))
            .hint("see which tools are missing, and how to install them: oncely new --list"),
        _ => bail!("`{command}` failed with {status}"),
    }
}
