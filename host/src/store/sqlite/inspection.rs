//! The state of a SQLite file, whether or not a host uses it.

use std::path::Path;

use anyhow::Context as _;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};

use super::{Db, session};
use crate::store::inspection::{SqliteFacts, beside, platform};

/// The place in the header of a SQLite file that names the journal, and its value for a write-ahead
/// log.
const JOURNAL_PLACE: usize = 18;
const WRITE_AHEAD_LOG: u8 = 2;

/// Inspects a file. A missing file is no error: a host creates it.
///
/// # Errors
/// The file cannot be read, or is no database.
pub async fn inspect(path: &Path) -> anyhow::Result<SqliteFacts> {
    if !path.exists() {
        return Ok(SqliteFacts::default());
    }
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let wal_size = size(&beside(path, "-wal"));
    let has_wal = journal(path)
        .with_context(|| format!("read {}", path.display()))?
        .map(|journal| journal == WRITE_AHEAD_LOG);

    // Without a log the file is complete, and SQLite must not create other files beside it. The
    // index of the log exists while a host uses the file.
    let is_unused = wal_size == 0 && !beside(path, "-shm").exists();
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .immutable(is_unused)
        .busy_timeout(session::BUSY_TIMEOUT);
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .connect_lazy_with(options);
    let platform = platform(|| async { Ok(Db::SqliteReaders(pool.clone())) }).await;
    pool.close().await;
    Ok(SqliteFacts {
        exists: true,
        has_wal,
        wal_size,
        platform: platform.with_context(|| format!("read {}", path.display()))?,
    })
}

/// The number of the journal in the header; `None` for a file without content.
fn journal(path: &Path) -> std::io::Result<Option<u8>> {
    use std::io::Read as _;
    let mut header = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(JOURNAL_PLACE as u64 + 1)
        .read_to_end(&mut header)?;
    Ok(header.get(JOURNAL_PLACE).copied())
}
