//! The test guests' component, built once for each test process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};

/// The path of the component that holds every behaviour of `tests/guests`.
pub fn component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    built(&BUILT, "guests")
}

/// The path of the component of `tests/batch-guest`, which handles batches.
pub fn batch_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    built(&BUILT, "batch-guest")
}

/// The path of the component of `tests/http-guest`, which answers requests.
pub fn http_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    built(&BUILT, "http-guest")
}

type Built = OnceLock<std::result::Result<PathBuf, String>>;

fn built(once: &Built, name: &str) -> Result<PathBuf> {
    let built = once.get_or_init(|| build(name).map_err(|error| format!("{error:#}")));
    built.clone().map_err(anyhow::Error::msg)
}

fn build(name: &str) -> Result<PathBuf> {
    let out = target_dir()?.join(format!("{name}.wasm"));
    let mut last_lines = Vec::new();
    let crate_dir = repository().join("tests").join(name);
    oncely::crate_build::build_component(&crate_dir, &out, &mut |line| last_lines.push(line.to_owned()))
        .with_context(|| format!("build the crate {name}:\n{}", last_lines.join("\n")))?;
    Ok(out)
}

/// The top folder of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// The folder that holds the built binaries: tests run from `deps` below it.
pub fn target_dir() -> Result<PathBuf> {
    let test = std::env::current_exe().context("find the running program")?;
    let mut folder = test.parent().context("find its folder")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("find the target folder")?;
    }
    Ok(folder.to_owned())
}

/// The `oncely` program under test.
pub fn oncely() -> Result<PathBuf> {
    let path = target_dir()?.join("oncely");
    anyhow::ensure!(path.exists(), "{} is not there; run `cargo build` first (`make test` does)", path.display());
    Ok(path)
}
