//! `oncely build`: make the components of a manifest, and check all of a deployment that needs no host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::term;
use crate::cli::cargo::{TOOLCHAIN_VARIABLE, Target, build_component};
use crate::component;
use crate::config::manifest::{Manifest, Source, Worker, WorkerEntry};
use crate::guest::check_kind;
use crate::ingress::check_routes;
use crate::model::hint::WithHint;

/// Builds the components of a manifest without deploying them, and checks them as a deployment would.
#[derive(Debug, Args)]
pub struct Build {
    /// Manifests, or folders that hold an oncely.toml.
    #[arg(default_value = ".")]
    manifests: Vec<PathBuf>,
    #[command(flatten)]
    toolchain: ToolchainArg,
}

/// Which toolchain builds the crates of a manifest.
#[derive(Debug, Clone, Copy, Args)]
pub struct ToolchainArg {
    /// Build crates with this toolchain. Default: the best that is installed.
    #[arg(long, env = TOOLCHAIN_VARIABLE, value_name = "NAME")]
    toolchain: Option<Target>,
}

impl Build {
    pub fn run(self) -> Result<()> {
        for path in &self.manifests {
            let manifest = Manifest::load(path)?;
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

/// A component on this machine that a host would look at further.
pub struct BuiltComponent {
    pub path: PathBuf,
    pub wasm: Vec<u8>,
}

impl BuiltComponent {
    /// Builds a worker's component where the manifest says how, reads it, and checks its form, its handler and its imports.
    pub fn build(entry: &WorkerEntry, with: ToolchainArg) -> Result<BuiltComponent> {
        let path = build_or_locate(entry, with)?;
        let built = BuiltComponent {
            wasm: component::read(&path)?,
            path,
        };
        let surface =
            component::inspect(&built.wasm).with_context(|| built.error_context(entry))?;
        check_kind(&entry.worker, surface.handler()?)?;
        Ok(built)
    }

    /// The first sentence of an error about the component.
    pub fn error_context(&self, entry: &WorkerEntry) -> String {
        format!(
            "the component of worker {}, {}, cannot be deployed",
            entry.worker.name,
            self.path.display()
        )
    }
}

/// Builds a worker's component where the manifest says how, and returns where it is.
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
                    "the component of worker {name} is not at {}",
                    path.display()
                ))
                .hint("build it, or put the command that does into the manifest: build = \"...\"");
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
        // What it says is news, not data.
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("run `{command}`"))?;
    if !status.success() {
        bail!("`{command}` failed with {status}");
    }
    Ok(())
}
