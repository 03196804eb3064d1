//! SQLite: one host, one file.
//!
//! One connection writes, a transaction at a time. A few others only read.

mod alarms;
mod attempts;
mod authorizer;
mod changes;
mod dead_lettering;
mod deployments;
pub(super) mod errors;
mod guest_sql;
mod guest_values;
mod inbox;
pub(super) mod migrate;
mod outbox;
mod redrive;
mod repair;
mod requests;
mod retention;
pub(super) mod session;
mod state;
mod tx;

use errors::Doing;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use bytes::Bytes;
use sqlx::sqlite::{SqlitePool, SqlitePoolOptions};

use self::guest_sql::Guests;
use self::session::Sessions;
use self::tx::SqliteTx;
use super::db::Db;
use super::{
    AlarmNotices, Attribution, BrokerState, CountedAttempt, DeadLetterAction,
    DeadLetterActionResult, DeadLetterDepth, DeadLetterFilter, DeadLetterGroup, DeadLetterRecord,
    DeadLetterSummary, DeadLettered, DeploymentRecord, FailedAttempt, OutboxLag, OutboxRow, Output,
    OutputFilter, OutputRecord, OutputSummary, Published, PublishedOutput, RecoveredOutput,
    Redrive, RedriveLookup, Result, RetentionPolicy, StateRecord, Store, StoredReport, TakenOver,
    Tx, Unpublished, Watermarks, WorkerMigration, WorkerTotals,
};
use super::{dead_letter_queries, outputs, reports, totals, watermarks};
use crate::fault;
use crate::model::alarm::{self, Alarm};
use crate::model::output_ids::OutputIds;
use crate::model::sql::Dialect;
use crate::model::verdict::{DeadLetter, Settled};

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
        migrate::run(&sessions)
            .await
            .with_context(|| format!("migrate the SQLite schema: {}", path.display()))?;

        // Read the identity of the installation.
        let output_ids = migrate::output_ids(&sessions)
            .await
            .context("read the key of the output ids")?;
        let output_ids = Arc::new(output_ids);
        let installation = migrate::installation(&sessions)
            .await
            .context("read the installation's id")?;

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

#[async_trait]
impl Store for SqliteStore {
    fn dialect(&self) -> Dialect {
        Dialect::Sqlite
    }

    async fn ping(&self) -> Result<()> {
        let answer = sqlx::query("select 1 from oncely_migration")
            .fetch_optional(&self.readers)
            .await;
        answer.map(|_| ()).doing("read from SQLite")
    }

    async fn retire_worker(&self, worker: &str) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        deployments::retire(&mut session, worker).await?;
        session.commit().await
    }

    async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()> {
        let mut session = self
            .sessions
            .begin_with_callback(|| began.get_or_init(Instant::now))
            .await?;
        reports::write(&mut Db::Sqlite(&mut session), None, report).await?;
        session.commit().await
    }

    async fn reports(&self) -> Result<Vec<StoredReport>> {
        reports::read(&mut Db::SqliteReaders(&self.readers)).await
    }

    async fn renew_lease(&self) -> Result<Vec<TakenOver>> {
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

    async fn begin(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let session = self.sessions.begin().await?;
        let guests = Guests {
            has_filter: self.has_filter,
            time,
            reads_only: false,
        };
        Ok(Box::new(SqliteTx::new(
            session,
            worker,
            guests,
            self.readers.clone(),
        )))
    }

    async fn begin_read_only(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let place = self.next_reader.fetch_add(1, Ordering::Relaxed) % GUEST_READERS;
        let sessions = self.guest_readers.get(place).unwrap_or(&self.sessions);
        let session = sessions.begin().await?;
        let guests = Guests {
            has_filter: self.has_filter,
            time,
            reads_only: true,
        };
        Ok(Box::new(SqliteTx::new(
            session,
            worker,
            guests,
            self.readers.clone(),
        )))
    }

    async fn count_attempts(
        &self,
        worker: &str,
        failed: &[FailedAttempt],
    ) -> Result<Vec<CountedAttempt>> {
        let mut session = self.sessions.begin().await?;
        let counts = attempts::count(&mut session, worker, failed).await?;
        session.commit().await?;
        Ok(counts)
    }

    async fn delete_recordings(&self, worker: &str, event_ids: &[String]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        for event_id in event_ids {
            attempts::delete_recording(&mut session, worker, event_id).await?;
        }
        session.commit().await
    }

    async fn attempt_recording(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
        attempts::recording(&self.readers, worker, event_id).await
    }

    async fn write_crash_marker(&self, worker: &str, event_id: &str) -> Result<u32> {
        let mut session = self.sessions.begin().await?;
        let before = attempts::write_crash_marker(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(before)
    }

    async fn clear_crash_marker(&self, worker: &str, event_id: &str) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        attempts::clear_crash_marker(&mut session, worker, event_id).await?;
        session.commit().await
    }

    async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
        new_failures: u32,
    ) -> Result<DeadLettered> {
        let mut session = self.sessions.begin().await?;
        let (notices, alarms) =
            dead_lettering::dead_letter(&mut session, dead_letters, new_failures).await?;
        session.commit().await?;
        Ok(DeadLettered {
            proofs: vec![Settled::seen_by_store(); dead_letters.len()],
            notices,
            alarms,
        })
    }

    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
        let mut session = self.sessions.begin().await?;
        let rows = outbox::lease(&mut session, limit, lease).await?;
        session.commit().await?;
        Ok(rows)
    }

    async fn mark_published(&self, published: &[Published]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        outbox::mark_published(&mut session, published).await?;
        session.commit().await
    }

    async fn release_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        outbox::release(&mut session, rows).await?;
        session.commit().await
    }

    async fn taken_ids(&self) -> Result<BTreeMap<String, u64>> {
        outputs::taken_ids(&mut Db::SqliteReaders(&self.readers)).await
    }

    fn output_ids(&self) -> &OutputIds {
        &self.output_ids
    }

    fn installation(&self) -> &str {
        &self.installation
    }

    async fn watermarks(&self, on_broker: Option<&str>) -> Result<Watermarks> {
        watermarks::read(&mut Db::SqliteReaders(&self.readers), on_broker).await
    }

    async fn write_watermark(&self, name: &str, seen: &BrokerState) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        watermarks::write(&mut Db::Sqlite(&mut session), name, seen).await?;
        session.commit().await
    }

    async fn acknowledge_watermark(&self, name: &str, sequence: u64) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        watermarks::acknowledge(&mut Db::Sqlite(&mut session), name, sequence).await?;
        session.commit().await
    }

    async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
        watermarks::known_events(&mut Db::SqliteReaders(&self.readers), worker, event_ids).await
    }

    async fn save_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        watermarks::save_recovered(&mut Db::Sqlite(&mut session), outputs).await?;
        session.commit().await
    }

    async fn delete_recovered(&self, ids: &[&str]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        watermarks::delete_recovered(&mut Db::Sqlite(&mut session), ids).await?;
        session.commit().await
    }

    async fn find_recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>> {
        watermarks::find_recovered(&mut Db::SqliteReaders(&self.readers), ids).await
    }

    async fn last_published(&self, within: Duration) -> Result<Vec<PublishedOutput>> {
        repair::last_published(&self.readers, within).await
    }

    async fn published_to(&self, stream: &str) -> Result<Vec<PublishedOutput>> {
        repair::published_to(&self.readers, stream).await
    }

    async fn republish(&self, lost: &[PublishedOutput]) -> Result<u64> {
        let mut session = self.sessions.begin().await?;
        let done = repair::republish(&mut session, lost).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>> {
        outputs::list(&mut Db::SqliteReaders(&self.readers), filter).await
    }

    async fn output(&self, number: i64) -> Result<Option<OutputRecord>> {
        outputs::find(&mut Db::SqliteReaders(&self.readers), number).await
    }

    async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64> {
        let mut session = self.sessions.begin().await?;
        let done = outputs::retry(&mut Db::Sqlite(&mut session), numbers).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64> {
        let mut session = self.sessions.begin().await?;
        let done = outputs::drop(&mut Db::Sqlite(&mut session), numbers, note).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outbox_lag(&self) -> Result<Vec<OutboxLag>> {
        outputs::lag(&mut Db::SqliteReaders(&self.readers)).await
    }

    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()> {
        let mut session = self.sessions.begin().await?;
        deployments::put_component(&mut session, digest, wasm).await?;
        session.commit().await
    }

    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        deployments::component(&self.readers, digest).await
    }

    async fn deploy(
        &self,
        worker: &str,
        digest: &str,
        manifest: &str,
        migrations: &[WorkerMigration],
    ) -> Result<DeploymentRecord> {
        let mut session = self.sessions.begin().await?;
        let deployment =
            deployments::deploy(&mut session, worker, digest, manifest, migrations).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn due_migrations(
        &self,
        worker: &str,
        migrations: &[WorkerMigration],
    ) -> Result<Vec<String>> {
        let mut session = self.sessions.begin().await?;
        let due = deployments::due_migrations(&mut session, worker, migrations).await?;
        session.commit().await?;
        Ok(due)
    }

    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>> {
        let mut session = self.sessions.begin().await?;
        let deployment = deployments::activate(&mut session, worker, version).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        deployments::newest(&self.readers).await
    }

    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        deployments::active(&self.readers).await
    }

    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>> {
        deployments::for_worker(&self.readers, worker).await
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>> {
        dead_letter_queries::list(&mut Db::SqliteReaders(&self.readers), filter).await
    }

    async fn find_dead_letter(&self, id: i64) -> Result<Option<DeadLetterRecord>> {
        dead_letter_queries::find(&mut Db::SqliteReaders(&self.readers), id).await
    }

    async fn dead_letter_groups(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterGroup>> {
        dead_letter_queries::groups(&mut Db::SqliteReaders(&self.readers), filter).await
    }

    async fn dead_letter_depths(&self) -> Result<Vec<DeadLetterDepth>> {
        alarms::depths(&self.readers).await
    }

    async fn alarms(&self) -> Result<Vec<Alarm>> {
        alarms::list(&self.readers).await
    }

    async fn apply_alarm_updates(&self, updates: &[alarm::AlarmUpdate]) -> Result<AlarmNotices> {
        let mut session = self.sessions.begin().await?;
        let notices = alarms::apply(&mut session, updates).await?;
        session.commit().await?;
        Ok(notices)
    }

    async fn redrive(
        &self,
        dead_letters: &[Redrive],
        attribution: &Attribution,
    ) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
        let mut session = self.sessions.begin().await?;
        let moved = redrive::redrive(&mut session, dead_letters, attribution).await?;
        fault::point(fault::BEFORE_REDRIVE);
        session.commit().await?;
        fault::point(fault::AFTER_REDRIVE);
        Ok(moved)
    }

    async fn redriven_message(
        &self,
        worker: &str,
        id: i64,
        generation: u32,
    ) -> Result<RedriveLookup> {
        redrive::redriven_message(&self.readers, worker, id, generation).await
    }

    async fn done_events(&self, worker: &str, event_ids: &[String]) -> Result<Vec<String>> {
        inbox::done(&self.readers, worker, event_ids).await
    }

    async fn update_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
    ) -> Result<Vec<DeadLetterActionResult>> {
        let mut session = self.sessions.begin().await?;
        let moved = redrive::update_dead_letters(&mut session, ids, action, attribution).await?;
        session.commit().await?;
        Ok(moved)
    }

    async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>> {
        state::entry(&self.readers, worker, key).await
    }

    async fn state_entries(
        &self,
        worker: &str,
        prefix: &str,
        limit: u32,
    ) -> Result<Vec<StateRecord>> {
        state::entries(&self.readers, worker, prefix, limit).await
    }

    async fn totals(&self) -> Result<Vec<WorkerTotals>> {
        totals::by_worker(&mut Db::SqliteReaders(&self.readers)).await
    }

    async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool> {
        let mut session = self.sessions.begin().await?;
        let has_more = retention::delete_expired(&mut session, retention).await?;
        session.commit().await?;
        Ok(has_more)
    }

    async fn close(&self) {
        self.readers.close().await;
        futures::future::join_all(self.guest_readers.iter().map(Sessions::close)).await;
        self.sessions.close().await;
    }
}
