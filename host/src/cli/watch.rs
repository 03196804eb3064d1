//! Watches the sources of a manifest for `oncely dev`.
//!
//! The files are listed a few times per second. That works on every file system and in containers,
//! where notifications of changes often do not arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::config::manifest::{Manifest, Source};

/// How often the files are listed.
const INTERVAL: Duration = Duration::from_millis(250);

/// The most files that are watched for one manifest.
const FILES_MAX: usize = 20_000;

/// Folders that tools fill, besides hidden ones.
const GENERATED_FOLDERS: [&str; 4] = ["target", "node_modules", "__pycache__", "dist"];

/// The endings of files that builds, editors and hosts write.
const GENERATED_FILES: [&str; 8] = [
    ".wasm",
    "~",
    ".db",
    ".db-wal",
    ".db-shm",
    ".db-journal",
    ".log",
    "Cargo.lock",
];

fn is_generated(name: &str) -> bool {
    GENERATED_FILES.iter().any(|ending| name.ends_with(ending))
}

/// The time and the size of each file.
type Files = BTreeMap<PathBuf, (Option<SystemTime>, u64)>;

/// The files of one manifest: its folder, its crates, its migrations, and components without a
/// build.
pub struct Sources {
    places: Places,
    files: Files,
}

#[derive(Debug, Clone, Default)]
struct Places {
    folders: BTreeSet<PathBuf>,
    components: BTreeSet<PathBuf>,
}

impl Sources {
    /// Remembers the files as they are now.
    pub fn of(manifest: &Manifest) -> Self {
        let mut places = Places::default();
        for entry in &manifest.workers {
            places.folders.insert(entry.folder.clone());
            places.folders.extend(entry.migrations.clone());
            match &entry.source {
                Source::Crate(folder) => {
                    places.folders.insert(folder.clone());
                }
                Source::Component { path, build: None } => {
                    places.components.insert(path.clone());
                }
                Source::Component { .. } | Source::Oci(_) => {}
            }
        }
        let files = places.list();
        Sources { places, files }
    }

    /// Waits for a change, and until no more files change. Returns the changed files.
    ///
    /// # Errors
    /// The runtime ends.
    pub async fn changed(&mut self) -> Result<Vec<PathBuf>> {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let mut files = self.list().await?;
            if files == self.files {
                continue;
            }
            // An editor may write several files, or one file in several steps.
            loop {
                tokio::time::sleep(INTERVAL).await;
                let again = self.list().await?;
                if again == files {
                    break;
                }
                files = again;
            }
            let before = std::mem::replace(&mut self.files, files);
            let names: BTreeSet<&PathBuf> = self.files.keys().chain(before.keys()).collect();
            let changed: Vec<PathBuf> = names
                .into_iter()
                .filter(|path| self.files.get(*path) != before.get(*path))
                .cloned()
                .collect();
            if !changed.is_empty() {
                return Ok(changed);
            }
        }
    }

    async fn list(&self) -> Result<Files> {
        let places = self.places.clone();
        tokio::task::spawn_blocking(move || places.list())
            .await
            .context("list the watched files")
    }
}

impl Places {
    fn list(&self) -> Files {
        let mut files = list(&self.folders);
        let components = self.components.iter();
        files.extend(components.map(|path| (path.clone(), state_of(path))));
        files
    }
}

fn list(folders: &BTreeSet<PathBuf>) -> Files {
    let mut files = Files::new();
    let mut left: Vec<PathBuf> = folders.iter().cloned().collect();
    while let Some(folder) = left.pop() {
        // A folder that disappears meanwhile has no files.
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if name.starts_with('.') || files.len() >= FILES_MAX {
                continue;
            }
            if kind.is_dir() {
                if !GENERATED_FOLDERS.contains(&name.as_ref()) {
                    left.push(entry.path());
                }
            } else if !is_generated(&name) {
                files.insert(entry.path(), state_of(&entry.path()));
            }
        }
    }
    files
}

/// The time and the size of a file; a linked file counts as the file itself.
fn state_of(path: &Path) -> (Option<SystemTime>, u64) {
    std::fs::metadata(path).map_or((None, 0), |file| (file.modified().ok(), file.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_of_sources_are_noticed_and_builds_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("src/lib.rs", "one");
        let places = Places {
            folders: BTreeSet::from([folder.path().to_owned()]),
            components: BTreeSet::from([folder.path().join("built.wasm")]),
        };
        let mut sources = Sources {
            files: places.list(),
            places,
        };

        for generated in [
            "target/x",
            ".git/x",
            "a.wasm",
            "Cargo.lock",
            "__pycache__/a",
        ] {
            write(generated, "x");
        }
        let quiet = tokio::time::timeout(INTERVAL * 4, sources.changed()).await;
        assert!(quiet.is_err(), "{quiet:?}");

        write("src/lib.rs", "three");
        write("app.py", "x");
        let changed = sources.changed().await.unwrap();
        assert_eq!(
            changed,
            ["app.py", "src/lib.rs"].map(|name| folder.path().join(name))
        );
        std::fs::remove_file(folder.path().join("app.py")).unwrap();
        let changed = sources.changed().await.unwrap();
        assert_eq!(changed, [folder.path().join("app.py")]);
        write("built.wasm", "x");
        let changed = sources.changed().await.unwrap();
        assert_eq!(changed, [folder.path().join("built.wasm")]);
    }
}
