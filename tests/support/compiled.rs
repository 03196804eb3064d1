//! Machine code of the test guests. The first host that compiles a guest saves it for the others:
//! a debug build compiles for seconds. Tests of the compiler have components of their own. Errors
//! may be ignored, as a host without machine code compiles.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::guests;

/// The components whose machine code is saved, by their names in the target folder.
const GUESTS: [&str; 4] = [
    "tests-guests",
    "tests-http-guest",
    "examples-ledger-api",
    "examples-ledger-totals",
];

/// Gives the saved machine code to a host that keeps its files in `data_dir`.
pub fn provide(data_dir: &Path) -> Result<()> {
    let folder = make_private(&data_dir.join("components"))?;
    link_all(&pool()?, &folder)
}

/// Saves machine code that a host made.
pub fn save(data_dir: &Path) -> Result<()> {
    link_all(&data_dir.join("components"), &pool()?)
}

fn pool() -> Result<PathBuf> {
    make_private(&guests::target_dir()?.join("compiled-guests"))
}

/// Links the machine code of the guests into a folder that may have it.
fn link_all(from: &Path, to: &Path) -> Result<()> {
    let digests = digests()?;
    for file in fs::read_dir(from).context("list machine code")? {
        let file = file.context("list machine code")?;
        let name = file.file_name().to_string_lossy().into_owned();
        let digest = name
            .strip_suffix(".cwasm")
            .and_then(|name| name.split('-').next());
        if !digest.is_some_and(|digest| digests.iter().any(|known| known == digest)) {
            continue;
        }
        match fs::hard_link(file.path(), to.join(&name)) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            // Folders for temporary files may be on another device.
            Err(_) => copy(&file.path(), &to.join(&name))?,
        }
    }
    Ok(())
}

/// Copies a file that others may read meanwhile.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("find the folder of machine code")?;
    let partial = tempfile::NamedTempFile::new_in(folder).context("copy machine code")?;
    fs::copy(from, partial.path()).context("copy machine code")?;
    partial.persist(to).context("copy machine code")?;
    Ok(())
}

/// The digests of the guests that are built.
fn digests() -> Result<Vec<String>> {
    let target = guests::target_dir()?;
    let built = GUESTS.map(|name| target.join(name).with_added_extension("wasm"));
    let wasm = built.iter().filter_map(|path| fs::read(path).ok());
    Ok(wasm.map(|wasm| hex::encode(Sha256::digest(wasm))).collect())
}

fn make_private(folder: &Path) -> Result<PathBuf> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("create {}", folder.display()))?;
    Ok(folder.to_owned())
}
