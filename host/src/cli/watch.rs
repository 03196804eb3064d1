//! Watches the sources of a manifest for `oncely dev`.
//!
//! The files are listed a few times per second. That works on every file system and in containers,
//! where notifications of changes often do not arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use super::lock::resolved;
use super::test::CASES;
use crate::config::manifest::{Manifest, Source};
use crate::config::{Database, HostConfig};

/// How often the files are listed.
const INTERVAL: Duration = Duration::from_millis(100);

/// At most one part in this many of the time is spent with listing.
const LISTING_SHARE: u32 = 20;

/// The most files that are watched for one manifest.
const FILES_MAX: usize = 20_000;

/// The file that marks a folder as a cache, whatever its name: <https://bford.info/cachedir/>.
const CACHE_TAG: &str = "CACHEDIR.TAG";

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
    interval: Duration,
}

#[derive(Debug, Clone, Default)]
struct Places {
    folders: BTreeSet<PathBuf>,
    components: BTreeSet<PathBuf>,
    /// What the host writes: absolute, without links.
    ignored: BTreeSet<PathBuf>,
}

impl Sources {
    /// Remembers the files as they are now. What the host writes is ignored: its data folder, its
    /// database, and files beside it with longer names.
    pub fn of(manifest: &Manifest, config: &HostConfig) -> Self {
        let mut ignored = vec![config.data_dir.as_path()];
        if let Database::Sqlite(path) = &config.database {
            ignored.push(path);
        }
        let mut places = Places {
            ignored: ignored.into_iter().map(resolved).collect(),
            ..Places::default()
        };
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
        Sources::new(places)
    }

    fn new(places: Places) -> Self {
        Sources {
            files: places.list(),
            places,
            interval: INTERVAL,
        }
    }

    /// Waits for a change, and until no more files change. Returns the changed files.
    ///
    /// # Errors
    /// The runtime ends.
    pub async fn changed(&mut self) -> Result<Vec<PathBuf>> {
        loop {
            let mut files = self.list_later().await?;
            if files == self.files {
                continue;
            }
            // An editor may write several files, or one file in several steps.
            loop {
                let again = self.list_later().await?;
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

    /// Waits, and lists the files. Many files are listed less often.
    async fn list_later(&mut self) -> Result<Files> {
        tokio::time::sleep(self.interval).await;
        let places = self.places.clone();
        let began = Instant::now();
        let listed = tokio::task::spawn_blocking(move || places.list()).await;
        self.interval = INTERVAL.max(began.elapsed() * LISTING_SHARE);
        listed.context("list the watched files")
    }
}

impl Places {
    fn list(&self) -> Files {
        let mut files = self.list_folders();
        let components = self.components.iter();
        files.extend(components.map(|path| (path.clone(), state_of(path))));
        files
    }

    fn list_folders(&self) -> Files {
        let mut files = Files::new();
        let mut left: Vec<PathBuf> = self.folders.iter().cloned().collect();
        while let Some(folder) = left.pop() {
            if folder.join(CACHE_TAG).exists() {
                continue;
            }
            let real = resolved(&folder);
            // A folder that disappears meanwhile has no files.
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            for entry in entries {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if name.starts_with('.')
                    || files.len() >= FILES_MAX
                    || self.is_ignored(&real, &name)
                {
                    continue;
                }
                if kind.is_dir() {
                    // Cases are no part of the component.
                    if !GENERATED_FOLDERS.contains(&name.as_ref()) && name != CASES {
                        left.push(entry.path());
                    }
                } else if !is_generated(&name) {
                    files.insert(entry.path(), state_of(&entry.path()));
                }
            }
        }
        files
    }

    /// Whether the host writes this entry of a folder: `oncely.sqlite`, and also
    /// `oncely.sqlite-wal`.
    fn is_ignored(&self, folder: &Path, name: &str) -> bool {
        self.ignored.iter().any(|ignored| {
            let own = ignored.file_name().unwrap_or_default().to_string_lossy();
            let rest = name.strip_prefix(&*own);
            ignored.parent() == Some(folder)
                && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
        })
    }
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
        let mut sources = Sources::new(Places {
            folders: BTreeSet::from([folder.path().to_owned()]),
            components: BTreeSet::from([folder.path().join("built.wasm")]),
            ignored: ["data", "app.sqlite"]
                .map(|name| resolved(&folder.path().join(name)))
                .into(),
        });

        for generated in [
            "target/x",
            ".git/x",
            "a.wasm",
            "Cargo.lock",
            "__pycache__/a",
            "data/components/x",
            "app.sqlite",
            "app.sqlite-wal",
            "tests/orders.yaml",
            "built/CACHEDIR.TAG",
            "built/debug/x",
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
