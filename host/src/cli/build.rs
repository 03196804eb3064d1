//! `oncely build`: make the components of a manifest.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::term;
use crate::crate_build::{TARGET_VARIABLE, Target, build_component};
use crate::hint::WithHint;
use crate::manifest::{Manifest, Source, WorkerEntry};

/// Builds the components of a manifest without deploying them.
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
    #[arg(long, env = TARGET_VARIABLE, value_name = "NAME")]
    toolchain: Option<Target>,
}

impl Build {
    pub fn run(self) -> Result<()> {
        for path in &self.manifests {
            for entry in &Manifest::load(path)?.workers {
                let component = component_of(entry, self.toolchain)?;
                term::data(component.display())?;
            }
        }
        Ok(())
    }
}

/// Builds a worker's component where the manifest says how, and returns where it is.
pub fn component_of(entry: &WorkerEntry, with: ToolchainArg) -> Result<PathBuf> {
    let name = &entry.worker.name;
    match &entry.source {
        Source::Crate(folder) => {
            let out = entry.folder.join("target").join("oncely").join(format!("{name}.wasm"));
            let mut progress = |line: &str| term::note(line);
            build_component(folder, &out, with.toolchain, &mut progress)
                .with_context(|| format!("build the crate of worker {name} in {}", folder.display()))?;
            Ok(out)
        }
        Source::Component { path, build } => {
            if let Some(command) = build {
                run_command(command, &entry.folder, name)?;
            }
            if !path.exists() {
                return Err(anyhow::anyhow!("the component of worker {name} is not at {}", path.display()))
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
