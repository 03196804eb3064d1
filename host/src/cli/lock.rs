//! Locks that prevent two hosts from using the same folder or the same SQLite file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::time::Instant;

use crate::config::Database;
use crate::model::hint::WithHint;

/// How long a lock is retried: a killed process may still be exiting.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A lock, held until it is dropped or the process ends.
pub struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Lock {
    /// Locks a data folder.
    pub async fn folder(path: &Path) -> Result<Lock> {
        acquire(&path.join("lock"))
            .await
            .with_context(|| format!("use the data folder {}", path.display()))
            .hint("stop the host that runs there, or set another folder with --data-dir FOLDER")
    }

    /// Locks a database, if it is a file.
    pub async fn database(database: &Database) -> Result<Option<Lock>> {
        let Database::Sqlite(path) = database else {
            return Ok(None);
        };
        acquire(&resolved(path).with_added_extension("lock"))
            .await
            .map(Some)
            .with_context(|| format!("use the database {}", path.display()))
            .hint("stop the host that uses it, or use PostgreSQL, which several hosts can share")
    }
}

/// The path without symbolic links, as one file must have one lock. The file itself may be missing.
pub(super) fn resolved(path: &Path) -> PathBuf {
    let in_folder = || {
        let folder = match path.parent()? {
            folder if folder.as_os_str().is_empty() => Path::new("."),
            folder => folder,
        };
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    };
    let file = path.canonicalize().ok();
    file.or_else(in_folder).unwrap_or_else(|| path.to_owned())
}

async fn acquire(path: &Path) -> Result<Lock> {
    let context = || format!("lock {}", path.display());
    let opened = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path);
    let mut file = opened.with_context(context)?;
    let end = Instant::now() + LOCK_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                tokio::time::sleep(RETRY_INTERVAL).await
            }
            Err(TryLockError::WouldBlock) => {
                let owner = std::fs::read_to_string(path).unwrap_or_default();
                let owner = owner
                    .trim()
                    .parse::<u32>()
                    .map_or_else(|_| String::new(), |pid| format!(", process {pid},"));
                return Err(anyhow!("another host{owner} uses it"));
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(context),
        }
    }
    file.set_len(0).with_context(context)?;
    writeln!(file, "{}", std::process::id()).with_context(context)?;
    Ok(Lock(file))
}
