//! SQLite: one host, one file.
//!
//! One connection writes, a transaction at a time. A few others only read.

pub(super) mod attempts;
mod authorizer;
pub(super) mod changes;
pub(super) mod dead_lettering;
pub(super) mod deployments;
pub(super) mod errors;
pub(super) mod guest_sql;
mod guest_values;
pub(super) mod inbox;
pub(super) mod inspection;
pub(super) mod outbox;
pub(super) mod requests;
mod retention;
pub(super) mod session;
pub(super) mod state;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use sqlx::sqlite::{SqlitePool, SqlitePoolOptions};

use self::guest_sql::Guests;
use self::session::{Session, Sessions};
use super::db::Db;
use super::error::Doing as _;
use super::migrations;
use super::{Result, RetentionPolicy, TakenOver, Tx};
use crate::model::output_ids::OutputIds;

const READERS: u32 = 4;

/// The number of read-only guest transactions that can run at the same time.
const GUEST_READERS: usize = 4;

/// Creates the file of a new database, with access for this user only. SQLite creates the files
/// beside it with the same rights.
fn create_private_file(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// A SQLite database in a file of its own.
pub struct SqliteStore {
    sessions: Sessions,
    /// For read-only guest transactions, in rotation.
    guest_readers: [Sessions; GUEST_READERS],
    next_reader: AtomicUsize,
    readers: SqlitePool,
    output_ids: Arc<OutputIds>,
    installation: String,
    has_filter: bool,
    /// Whether the leases of the previous host are yet to be released.
    needs_takeover: AtomicBool,
}

impl SqliteStore {
    /// Opens a database file, creates it if it is missing, and migrates its schema.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be created or opened, or if a migration fails.
    pub async fn open(path: &Path) -> anyhow::Result<Self> {
        // Create the file and migrate its schema.
        create_private_file(path).with_context(|| format!("create the file {}", path.display()))?;
        let sessions = Sessions::new(session::options(path));
        migrations::run(Db::Sqlite(sessions.begin().await?))
            .await
            .with_context(|| format!("migrate the SQLite schema: {}", path.display()))?;

        // Read the identity of the installation.
        let output_ids = migrations::output_ids(Db::Sqlite(sessions.begin().await?)).await?;
        let output_ids = Arc::new(output_ids);
        let installation = migrations::installation(Db::Sqlite(sessions.begin().await?)).await?;

        // Open the connections: one writes, the others only read.
        let sessions = sessions.with_output_ids(Arc::clone(&output_ids));
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .test_before_acquire(false)
            .connect_lazy_with(session::options(path).read_only(true));
        let guest_readers = std::array::from_fn(|_| Sessions::reading(session::options(path)));
        let (next_reader, needs_takeover) = (AtomicUsize::new(0), AtomicBool::new(true));
        let has_filter = true;
        Ok(SqliteStore {
            sessions,
            guest_readers,
            next_reader,
            readers,
            output_ids,
            installation,
            has_filter,
            needs_takeover,
        })
    }

    /// Skips the statement filter, so that a test can show the limits of the authorizer behind it.
    #[doc(hidden)]
    #[must_use]
    pub fn without_filter(self) -> Self {
        SqliteStore {
            has_filter: false,
            ..self
        }
    }
}

impl SqliteStore {
    pub(super) fn output_ids(&self) -> &OutputIds {
        &self.output_ids
    }

    pub(super) fn installation(&self) -> &str {
        &self.installation
    }

    /// Connections that only read, outside of a transaction.
    pub(super) fn readers(&self) -> Db {
        Db::SqliteReaders(self.readers.clone())
    }

    /// Begins a transaction of the platform.
    pub(super) async fn begin(&self) -> Result<Db> {
        self.sessions.begin().await.map(Db::Sqlite)
    }

    /// Like [`SqliteStore::begin`]. Calls `on_acquired` when the previous transactions are over.
    pub(super) async fn begin_with_callback<T>(
        &self,
        on_acquired: impl FnOnce() -> T,
    ) -> Result<Db> {
        let session = self.sessions.begin_with_callback(on_acquired).await?;
        Ok(Db::Sqlite(session))
    }

    /// Begins a transaction with guests.
    pub(super) async fn begin_tx(&self, worker: &str, time: Duration) -> Result<Tx> {
        let session = self.sessions.begin().await?;
        Ok(self.tx(session, worker, time, false))
    }

    /// Like [`SqliteStore::begin_tx`], for a read-only transaction that does not wait for writers.
    pub(super) async fn begin_read_only_tx(&self, worker: &str, time: Duration) -> Result<Tx> {
        let place = self.next_reader.fetch_add(1, Ordering::Relaxed) % GUEST_READERS;
        let sessions = self.guest_readers.get(place).unwrap_or(&self.sessions);
        let session = sessions.begin().await?;
        Ok(self.tx(session, worker, time, true))
    }

    fn tx(&self, session: Session, worker: &str, time: Duration, reads_only: bool) -> Tx {
        let guests = Guests {
            has_filter: self.has_filter,
            time,
            reads_only,
        };
        Tx::on_sqlite(session, worker, guests, self.readers.clone())
    }

    pub(super) async fn ping(&self) -> Result<()> {
        let answer = sqlx::query("select 1 from oncely_migration")
            .fetch_optional(&self.readers)
            .await;
        answer.map(|_| ()).doing("read from SQLite")
    }

    /// Takes over from the host that used the file before: releases its leased outputs.
    pub(super) async fn take_over(&self) -> Result<Vec<TakenOver>> {
        if !self.needs_takeover.load(Ordering::Relaxed) {
            return Ok(Vec::new());
        }
        let mut session = self.sessions.begin().await?;
        let outputs = outbox::release_leases(&mut session).await?;
        session.commit().await?;
        self.needs_takeover.store(false, Ordering::Relaxed);
        let before = TakenOver {
            instance: "before".to_owned(),
            sessions: 0,
            outputs: Some(outputs),
        };
        Ok(if outputs > 0 {
            vec![before]
        } else {
            Vec::new()
        })
    }

    pub(super) async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool> {
        let mut session = self.sessions.begin().await?;
        let has_more = retention::delete_expired(&mut session, retention).await?;
        session.commit().await?;
        Ok(has_more)
    }

    pub(super) async fn close(&self) {
        self.readers.close().await;
        futures::future::join_all(self.guest_readers.iter().map(Sessions::close)).await;
        self.sessions.close().await;
    }
}
