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
    pub fn run(self) -> Result<()> {
        for path in &self.manifests {
            let manifest = Manifest::load(path, self.environment.name())?;
            manifest.warnings().iter().for_each(term::warning);
            let mut before: Vec<&Worker> = Vec::new();
            for entry in &manifest.workers {
                let built = BuiltComponent::build(entry, self.toolchain)?;
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
}

impl BuiltComponent {
    /// Builds the component of a worker if the manifest has a build step, reads it, and checks its
    /// form, its handler and its imports. A core module with a handler is made a component.
    ///
    /// # Errors
    /// The build failed, or the component is not a valid worker.
    pub fn build(entry: &WorkerEntry, with: ToolchainArg) -> Result<BuiltComponent> {
        let path = build_or_locate(entry, with)?;
        let built = BuiltComponent {
            wasm: read_component(&path)?,
            path,
        };
        let surface =
            component::inspect(&built.wasm).with_context(|| built.error_context(entry))?;
        check_kind(&entry.worker, surface.handler()?)?;
        Ok(built)
    }

    /// The outermost message of an error about the component.
    pub fn error_context(&self, entry: &WorkerEntry) -> String {
        format!(
            "the component of worker {}, {}, cannot be deployed",
            entry.worker.name,
            self.path.display()
        )
    }
}

/// Builds the component of a worker if the manifest has a build step, and returns its path.
fn build_or_locate(entry: &WorkerEntry, with: ToolchainArg) -> Result<PathBuf> {
    let name = &entry.worker.name;
    match &entry.source {
        Source::Crate(folder) => {
            let out = entry
                .folder
                .join("target")
                .join("oncely")
                .join(format!("{name}.wasm"));
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
    if !status.success() {
        bail!("`{command}` failed with {status}");
    }
    Ok(())
}
