//! The database: [`Store`] and [`Tx`], on PostgreSQL or SQLite.
//!
//! All guarantees of Oncely rest on [`Tx`]. The inbox record, the guest's writes, its state and its
//! outputs go into one transaction. [`Tx::commit`] returns `Ok` only for a verified commit.
//!
//! No future of these types may be dropped before it completes, unless its method says so. Callers
//! run deliveries in tasks that are never aborted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;

pub use crate::config::manifest::WorkerMigration;
use crate::fault;
use crate::model::alarm::{self, Alarm};
pub use crate::model::keyed_state::{StateEntry, StateSlot, StateWrite};
pub use crate::model::message::Output;
use crate::model::output_ids::OutputIds;
use crate::model::sql::Dialect;
use crate::model::verdict::{DeadLetter, Settled};

mod activity;
mod alarms;
mod archive;
mod attempts;
mod audit;
mod audit_runs;
mod changes;
mod checkpoints;
pub mod conflict;
mod db;
mod dead_letter_queries;
mod dead_lettering;
mod dead_letters;
mod deployments;
mod error;
mod events;
mod group_notes;
mod guest_statement;
mod history;
mod inbox;
pub mod inspection;
mod instance;
mod migrations;
mod outputs;
mod pauses;
mod postgres;
mod records;
mod redrive;
mod redrive_jobs;
mod repair;
mod reports;
mod requests;
mod rows;
mod shared;
mod skips;
mod sqlite;
mod state;
mod tokens;
mod totals;
mod tx;
mod values;
mod wal;
mod watermarks;

pub use activity::{ActivityFilter, ActivityOutcome, ActivityRecord, Actor, NewActivity};
pub use attempts::LastAttempt;
pub use audit::{AuditedDeadLetter, Cursor, Outcome};
pub use audit_runs::{AuditRun, AuditRunResult, NewAuditRun};
pub use changes::{Changes, RowChange, TableRows, changed_rows};
pub use checkpoints::{
    BlockFilter, CHECKPOINT_MARGIN, CheckpointBlock, CheckpointHead, CheckpointStart,
    CheckpointTimes, EventCursor, NO_LAST, SettledRow,
};
pub use dead_letters::{
    AttemptRecord, Attribution, AuditRecord, DeadLetterAction, DeadLetterActionResult,
    DeadLetterDepth, DeadLetterFilter, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord,
    DeadLetterState, DeadLetterSummary, EditRecord, Redrive, RedriveLookup, SeenDeadLetter,
    all_dead_letters, count_dead_letters, dead_letters_within, grouped_dead_letters,
};
pub(crate) use error::{BrokenStatement, is_busy};
pub use error::{Result, StoreError};
pub use events::{EVENT_OUTPUTS_MAX, EventRecord, InboxRecord};
pub use group_notes::{GroupNote, GroupNoteChange};
pub use guest_statement::{DeferredStatement, FailedStatement};
pub use history::{HISTORY_BUCKET_SECS, HISTORY_BUCKETS, HistoryCounts, HistoryPoint};
pub use instance::{HOST_LEASE, LEASE_SAFE_FOR, RENEW_INTERVAL, RENEW_TIMEOUT, TakenOver};
pub use pauses::Pause;
pub use postgres::{PostgresStore, ScratchDatabase};
pub use records::{
    AlarmNotices, Claim, Claimed, CountedAttempt, DeadLettered, DeploymentRecord, FailedAttempt,
    GroupOutcome, OutboxLag, OutboxRow, OutputFilter, OutputRecord, OutputSummary, Published,
    PublishedOutput, RetentionPolicy, STATE_PREVIEW, StateRecord, StoredRecording, StoredReport,
    Unpublished, WorkerTotals,
};
pub use redrive_jobs::{JobAction, JobItem, JobState, NewJobItem, NewRedriveJob, RedriveJob};
pub use requests::{ClaimedRequest, KeptResponse, RequestRecord};
pub use skips::Skipped;
pub use sqlite::SqliteStore;
pub use tokens::{ActiveToken, TokenRecord};
pub use tx::Tx;
pub use wal::{
    Lsn, OutputWal, RelayMode, SlotState, SwitchProgress, WalEvent, WalReader, WalRecord,
    WalSnapshot, WalState,
};
pub use watermarks::{AckFloor, BrokerState, RecoveredOutput, StreamEnd, Watermark, Watermarks};

use self::db::Db;
use self::postgres::Purpose;

/// The database, as the host's tasks and the control API use it.
pub enum Store {
    /// Many hosts share one database.
    Postgres(Box<PostgresStore>),
    /// One host has a file of its own.
    Sqlite(Box<SqliteStore>),
}

impl From<PostgresStore> for Store {
    fn from(store: PostgresStore) -> Self {
        Store::Postgres(Box::new(store))
    }
}

impl From<SqliteStore> for Store {
    fn from(store: SqliteStore) -> Self {
        Store::Sqlite(Box::new(store))
    }
}

impl Store {
    /// The SQL dialect of guests' statements.
    pub fn dialect(&self) -> Dialect {
        match self {
            Store::Postgres(_) => Dialect::Postgres,
            Store::Sqlite(_) => Dialect::Sqlite,
        }
    }

    /// The write-ahead log as a source of outputs; `None` if the database has none to read.
    pub fn wal(&self) -> Option<Arc<dyn OutputWal>> {
        match self {
            Store::Postgres(store) => store.wal(),
            Store::Sqlite(_) => None,
        }
    }

    /// Returns `Ok` if the database responds.
    pub async fn ping(&self) -> Result<()> {
        match self {
            Store::Postgres(store) => store.begin(Purpose::Read).await?.commit().await,
            Store::Sqlite(store) => store.ping().await,
        }
    }

    /// Renews this host's lease for [`HOST_LEASE`], and takes over from hosts with an expired
    /// lease: ends their sessions, then releases their leased outputs. This future may be dropped
    /// at any time.
    pub async fn renew_lease(&self) -> Result<Vec<TakenOver>> {
        match self {
            Store::Postgres(store) => store.renew_lease().await,
            Store::Sqlite(store) => store.take_over().await,
        }
    }

    /// Begins the transaction of a batch of `worker`. The database cancels statements that run
    /// longer than `time`.
    pub async fn begin(&self, worker: &str, time: Duration) -> Result<Tx> {
        match self {
            Store::Postgres(store) => store.begin_tx(worker, Purpose::Guest(time)).await,
            Store::Sqlite(store) => store.begin_tx(worker, time).await,
        }
    }

    /// Like [`Store::begin`], for a read-only transaction that does not wait for writers.
    pub async fn begin_read_only(&self, worker: &str, time: Duration) -> Result<Tx> {
        match self {
            Store::Postgres(store) => store.begin_tx(worker, Purpose::GuestReadOnly(time)).await,
            Store::Sqlite(store) => store.begin_read_only_tx(worker, time).await,
        }
    }

    /// Counts failed attempts, in a transaction of its own. The recording of an event's attempt
    /// replaces the previous one. Results are in the order of `failed`.
    pub async fn count_attempts(
        &self,
        worker: &str,
        failed: &[FailedAttempt],
    ) -> Result<Vec<CountedAttempt>> {
        let mut db = self.write().await?;
        let done = attempts::count(&mut db, worker, failed).await?;
        db.commit().await?;
        Ok(done)
    }

    /// Deletes the recordings of attempts at these events.
    pub async fn delete_recordings(&self, worker: &str, event_ids: &[String]) -> Result<()> {
        let mut db = self.write_async().await?;
        attempts::delete_recordings(&mut db, worker, event_ids).await?;
        db.commit().await
    }

    /// The recording of the last failed attempt at an event, as JSON; `None` if there is none or it
    /// was deleted.
    pub async fn attempt_recording(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
        let mut db = self.read().await?;
        let found = attempts::recording(&mut db, worker, event_id).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The last failed attempts at these events, in any order. Events without one are left out.
    pub async fn last_attempts(
        &self,
        worker: &str,
        event_ids: &[String],
    ) -> Result<Vec<LastAttempt>> {
        if event_ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut db = self.read().await?;
        let found = attempts::last(&mut db, worker, event_ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Writes a crash marker in a transaction of its own: the message, a suspected cause of host
    /// crashes, is about to be handled alone. Returns how many markers of it were written before
    /// and not cleared.
    pub async fn write_crash_marker(&self, worker: &str, event_id: &str) -> Result<u32> {
        let mut db = self.write().await?;
        let done = attempts::write_crash_marker(&mut db, worker, event_id).await?;
        db.commit().await?;
        Ok(done)
    }

    /// Clears the crash marker: handling the message ended, with any result.
    pub async fn clear_crash_marker(&self, worker: &str, event_id: &str) -> Result<()> {
        let mut db = self.write().await?;
        attempts::clear_crash_marker(&mut db, worker, event_id).await?;
        db.commit().await
    }

    /// Dead-letters messages. The inbox record (`dead`), the dead letter and the message
    /// `notices[i]` to the DLQ stream are written in one transaction. A dead letter that exists
    /// already, or whose event has an inbox row already, adds nothing. The first dead letter of a
    /// failure raises an alarm in the same transaction, unless `new_failures` failures of its
    /// worker did so within an hour.
    pub async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
        new_failures: u32,
    ) -> Result<DeadLettered> {
        let mut db = self.write().await?;
        let (notices, alarms) =
            dead_lettering::dead_letter(&mut db, dead_letters, new_failures).await?;
        db.commit().await?;
        Ok(DeadLettered {
            proofs: vec![Settled::seen_by_store(); dead_letters.len()],
            notices,
            alarms,
        })
    }

    /// Leases outputs that are due, unpublished and not leased, oldest first: at most `limit`, or
    /// as many more as the last group has. Of each key, only rows at the front of its queue are
    /// leased. A row blocked by another host's row becomes due again after that row is published or
    /// dropped. The lease is measured by the database's clock. A row that was leased before keeps
    /// its `first_attempt_at`.
    pub async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
        let mut db = self.write().await?;
        let done = outputs::lease(&mut db, limit, lease).await?;
        db.commit().await?;
        Ok(done)
    }

    /// Records that exactly these outputs are on their streams.
    pub async fn mark_published(&self, published: &[Published]) -> Result<()> {
        let mut db = self.write_async().await?;
        outputs::mark_published(&mut db, published).await?;
        db.commit().await
    }

    /// Records the outcomes of groups of outputs. If another host has leased a group meanwhile,
    /// only its published outputs are recorded.
    pub async fn record_groups(&self, groups: &[GroupOutcome]) -> Result<()> {
        let is_published = groups.iter().all(|group| group.unpublished.is_empty());
        let mut db = match is_published {
            true => self.write_async().await?,
            false => self.write().await?,
        };
        outputs::record_groups(&mut db, groups).await?;
        db.commit().await
    }

    /// Releases leased outputs that were not published. Rows that are published by now, or were
    /// leased by another host since, do not change.
    pub async fn release_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()> {
        let mut db = self.write().await?;
        outputs::release(&mut db, rows).await?;
        db.commit().await
    }

    /// By worker, how many outputs in the outbox changed their id because it was taken.
    pub async fn taken_ids(&self) -> Result<BTreeMap<String, u64>> {
        let mut db = self.read().await?;
        let found = outputs::taken_ids(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The generator of this installation's output ids.
    pub fn output_ids(&self) -> &OutputIds {
        match self {
            Store::Postgres(store) => store.output_ids(),
            Store::Sqlite(store) => store.output_ids(),
        }
    }

    /// The id of this installation: this database and its hosts. 16 hex digits.
    pub fn installation(&self) -> &str {
        match self {
            Store::Postgres(store) => store.installation(),
            Store::Sqlite(store) => store.installation(),
        }
    }

    /// The watermarks, and when the one named `on_broker`, the last one on NATS, was written.
    pub async fn watermarks(&self, on_broker: Option<&str>) -> Result<Watermarks> {
        let mut db = self.read().await?;
        let found = watermarks::read(&mut db, on_broker).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Writes a watermark. It is durable once this returns.
    pub async fn write_watermark(&self, name: &str, seen: &BrokerState) -> Result<()> {
        let mut db = self.write().await?;
        watermarks::write(&mut db, name, seen).await?;
        db.commit().await
    }

    /// Records that the broker has a watermark, at this sequence of the watermark stream.
    pub async fn acknowledge_watermark(&self, name: &str, sequence: u64) -> Result<()> {
        let mut db = self.write_async().await?;
        watermarks::acknowledge(&mut db, name, sequence).await?;
        db.commit().await
    }

    /// The events among these that are in the worker's inbox, as handled or as dead.
    pub async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
        let mut db = self.read().await?;
        let found = inbox::known(&mut db, worker, event_ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Saves the places of outputs that a recovery found on their streams. Of several places of an
    /// id, the first one is saved. It replaces a place saved earlier.
    pub async fn save_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()> {
        let mut db = self.write().await?;
        watermarks::save_recovered(&mut db, outputs).await?;
        db.commit().await
    }

    /// Deletes the recovered places of these ids, which are no longer on their streams.
    pub async fn delete_recovered(&self, ids: &[&str]) -> Result<()> {
        let mut db = self.write().await?;
        watermarks::delete_recovered(&mut db, ids).await?;
        db.commit().await
    }

    /// The stream and sequence of those ids that a recovery found.
    pub async fn find_recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>> {
        let mut db = self.read().await?;
        let found = watermarks::find_recovered(&mut db, ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The last output on each stream that was published `within` this time.
    pub async fn last_published(&self, within: Duration) -> Result<Vec<PublishedOutput>> {
        let mut db = self.read().await?;
        let found = repair::last_published(&mut db, within).await?;
        db.commit().await?;
        Ok(found)
    }

    /// All outputs in the outbox that were published to a stream, in publishing order.
    pub async fn published_to(&self, stream: &str) -> Result<Vec<PublishedOutput>> {
        let mut db = self.read().await?;
        let found = repair::published_to(&mut db, stream).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Makes published outputs unpublished, so that they are published again. An output that has
    /// another place by now does not change. Returns the number of outputs changed.
    pub async fn republish(&self, lost: &[PublishedOutput]) -> Result<u64> {
        let mut db = self.write().await?;
        let done = repair::republish(&mut db, lost).await?;
        db.commit().await?;
        Ok(done)
    }

    /// The outcomes of those events that a worker has settled.
    pub async fn outcomes(
        &self,
        worker: &str,
        event_ids: &[&str],
    ) -> Result<HashMap<String, Outcome>> {
        let mut db = self.read_by_index().await?;
        let found = audit::outcomes(&mut db, worker, event_ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// A page of at most `limit` dead letters that died after the cursor and before a time, oldest
    /// first.
    pub async fn dead_letters_by_age(
        &self,
        after: Cursor,
        before: Timestamp,
        limit: u32,
    ) -> Result<Vec<AuditedDeadLetter>> {
        let mut db = self.read_by_index().await?;
        let found = audit::dead_letters(&mut db, after, before, limit).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The numbers among these that a dead letter has.
    pub async fn existing_dead_letters(&self, ids: &[i64]) -> Result<BTreeSet<i64>> {
        let mut db = self.read_by_index().await?;
        let found = audit::existing_dead_letters(&mut db, ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The workers and events of notices of dead letters that are unpublished or were dropped.
    pub async fn unpublished_notices(&self) -> Result<BTreeSet<(String, String)>> {
        let mut db = self.read_by_index().await?;
        let found = audit::unpublished_notices(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Sends the notice of a dead letter again, under its id.
    pub async fn resend_notice(
        &self,
        dead_letter: &DeadLetter,
        notice: Output,
        id: i64,
        generation: u32,
    ) -> Result<Vec<OutboxRow>> {
        let mut db = self.write().await?;
        let rows = audit::resend_notice(&mut db, dead_letter, notice, (id, generation)).await?;
        db.commit().await?;
        Ok(rows)
    }

    /// A page of about `limit` outputs that were published after the cursor, by polling or from the
    /// WAL, and the cursor of the next page; `None` after the last one.
    pub async fn published_by_age(
        &self,
        after: Cursor,
        limit: u32,
        from_wal: bool,
    ) -> Result<(Vec<PublishedOutput>, Option<Cursor>)> {
        let mut db = self.read_by_index().await?;
        let found = match from_wal {
            false => audit::published(&mut db, after, limit).await?,
            true => audit::published_in_records(&mut db, after, limit.div_ceil(100)).await?,
        };
        db.commit().await?;
        Ok(found)
    }

    /// Those of these outputs that are recorded on a stream now, by number.
    pub async fn recorded_outputs(
        &self,
        stream: &str,
        numbers: &[i64],
    ) -> Result<HashMap<i64, PublishedOutput>> {
        let mut db = self.read_by_index().await?;
        let found = audit::recorded(&mut db, stream, numbers).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Parked or all unpublished outputs, oldest first; or dropped ones, newest first.
    pub async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>> {
        let mut db = self.read().await?;
        let found = outputs::list(&mut db, filter).await?;
        db.commit().await?;
        Ok(found)
    }

    /// One output by its number, in any state.
    pub async fn output(&self, number: i64) -> Result<Option<OutputRecord>> {
        let mut db = self.read().await?;
        let found = outputs::find(&mut db, number).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Makes parked outputs due. Returns how many of them were parked.
    pub async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64> {
        let mut db = self.write().await?;
        let done = outputs::retry(&mut db, numbers).await?;
        db.commit().await?;
        Ok(done)
    }

    /// Drops parked outputs, keeps a record of them, and unblocks the outputs they block. Returns
    /// how many of them were parked.
    pub async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64> {
        let mut db = self.write().await?;
        let done = outputs::drop(&mut db, numbers, note).await?;
        db.commit().await?;
        Ok(done)
    }

    /// The publishing lag of each worker with unpublished outputs. Cheap for tables of any size.
    pub async fn outbox_lag(&self) -> Result<Vec<OutboxLag>> {
        let mut db = self.read().await?;
        let found = outputs::lag(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Stores a component under its SHA-256 (lower-case hex). Idempotent.
    pub async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()> {
        let mut db = self.write().await?;
        deployments::put_component(&mut db, digest, wasm).await?;
        db.commit().await
    }

    /// A component; `None` if it was never stored.
    pub async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let mut db = self.read().await?;
        let found = deployments::component(&mut db, digest).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Stores the signature of a component, as JSON. It replaces an earlier one.
    pub async fn put_signature(&self, digest: &str, signature: &str) -> Result<()> {
        let mut db = self.write().await?;
        deployments::put_signature(&mut db, digest, signature).await?;
        db.commit().await
    }

    /// The signature of a component; `None` if it was deployed without one.
    pub async fn signature(&self, digest: &str) -> Result<Option<String>> {
        let mut db = self.read().await?;
        let found = deployments::signature(&mut db, digest).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Creates the next deployment of a worker and activates it, in one transaction with the
    /// worker's due migrations.
    ///
    /// # Errors
    /// `Refused` if a migration changed since it ran.
    pub async fn deploy(
        &self,
        worker: &str,
        digest: &str,
        manifest: &str,
        migrations: &[WorkerMigration],
    ) -> Result<DeploymentRecord> {
        let (mut db, login) = match self {
            Store::Postgres(store) => (store.begin(Purpose::Deploy).await?, store.login()),
            Store::Sqlite(store) => (store.begin().await?, None),
        };
        let deployment =
            deployments::deploy(&mut db, login, worker, digest, manifest, migrations).await?;
        db.commit().await?;
        Ok(deployment)
    }

    /// The names of a worker's migrations that have not run, in their order.
    ///
    /// # Errors
    /// `Refused` if a migration changed since it ran.
    pub async fn due_migrations(
        &self,
        worker: &str,
        migrations: &[WorkerMigration],
    ) -> Result<Vec<String>> {
        let mut db = self.read().await?;
        let found = deployments::due_migrations(&mut db, worker, migrations).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Deactivates a worker: none of its deployments is active any longer. Its history is kept.
    pub async fn retire_worker(&self, worker: &str) -> Result<()> {
        let mut db = self.write().await?;
        deployments::retire(&mut db, worker).await?;
        db.commit().await
    }

    /// Writes the report of this host for others to read. It is durable once this returns. `began`
    /// is set when the host's earlier transactions are done and this one starts; the time from then
    /// on is the database's.
    pub async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()> {
        let (mut db, instance) = match self {
            Store::Postgres(store) => {
                let db = store.begin(Purpose::Platform).await?;
                let _ = began.set(Instant::now());
                (db, Some(store.instance_id()))
            }
            Store::Sqlite(store) => {
                let on_acquired = || began.get_or_init(Instant::now);
                (store.begin_with_callback(on_acquired).await?, None)
            }
        };
        reports::write(&mut db, instance, report).await?;
        db.commit().await
    }

    /// The last report of each live host.
    pub async fn reports(&self) -> Result<Vec<StoredReport>> {
        let mut db = self.read().await?;
        let found = reports::read(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Adds counts of this host's workers to their history. A crash of PostgreSQL may lose them.
    pub async fn add_history(&self, counts: &[HistoryCounts]) -> Result<()> {
        let mut db = self.write_async().await?;
        history::add(&mut db, counts).await?;
        db.commit().await
    }

    /// The history of a worker, or of all workers by name, over the last `buckets` times of five
    /// minutes, `step` of them added up for each point, oldest first.
    pub async fn history(
        &self,
        worker: Option<&str>,
        buckets: u32,
        step: u32,
    ) -> Result<Vec<HistoryPoint>> {
        let mut db = self.read().await?;
        let found = history::read(&mut db, worker, buckets, step).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Activates an earlier deployment; `None` if there is no such version.
    pub async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>> {
        let mut db = self.write().await?;
        let done = deployments::activate(&mut db, worker, version).await?;
        db.commit().await?;
        Ok(done)
    }

    /// The active deployment of every worker, by name.
    pub async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut db = self.read().await?;
        let found = deployments::active(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The active deployment of a worker; `None` if it has none.
    pub async fn active_deployment(&self, worker: &str) -> Result<Option<DeploymentRecord>> {
        let mut db = self.read().await?;
        let found = deployments::active_of(&mut db, worker).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The newest deployment of every worker, retired ones included, by name.
    pub async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut db = self.read().await?;
        let found = deployments::newest(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// All deployments of a worker, newest first.
    pub async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>> {
        let mut db = self.read().await?;
        let found = deployments::for_worker(&mut db, worker, i64::MAX).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The last deployments of a worker, newest first.
    pub async fn last_deployments(
        &self,
        worker: &str,
        limit: u32,
    ) -> Result<Vec<DeploymentRecord>> {
        let mut db = self.read().await?;
        let found = deployments::for_worker(&mut db, worker, limit.into()).await?;
        db.commit().await?;
        Ok(found)
    }

    /// One page of dead letters, newest first. See [`all_dead_letters`] for subjects with
    /// wildcards.
    pub async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>> {
        let mut db = self.read().await?;
        let found = dead_letter_queries::list(&mut db, filter).await?;
        db.commit().await?;
        Ok(found)
    }

    /// One dead letter with all its details.
    pub async fn find_dead_letter(&self, id: i64) -> Result<Option<DeadLetterRecord>> {
        let mut db = self.read().await?;
        let found = dead_letter_queries::find(&mut db, id).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The matching dead letters, grouped by failure. Those without a group, which are older than
    /// groups, form one group.
    pub async fn dead_letter_groups(
        &self,
        filter: &DeadLetterFilter,
    ) -> Result<Vec<DeadLetterGroup>> {
        let mut db = self.read().await?;
        let found = dead_letter_queries::groups(&mut db, filter).await?;
        db.commit().await?;
        Ok(found)
    }

    /// How many dead letters match a filter, and the id of the newest one. See
    /// [`count_dead_letters`] for subjects with wildcards.
    async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<(u64, Option<i64>)> {
        let mut db = self.read().await?;
        let found = dead_letter_queries::count(&mut db, filter).await?;
        db.commit().await?;
        Ok(found)
    }

    /// All rows of an event of a worker.
    pub async fn event(&self, worker: &str, event_id: &str) -> Result<EventRecord> {
        let mut db = self.read().await?;
        let found = events::find(&mut db, worker, event_id).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The answered requests with an idempotency key on a worker's route, of all callers, newest
    /// first.
    pub async fn answered_requests(
        &self,
        worker: &str,
        route: &str,
        key: &str,
    ) -> Result<Vec<RequestRecord>> {
        let mut db = self.read().await?;
        let found = requests::find(&mut db, worker, route, key).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The workers that know an event id, by name.
    pub async fn workers_with_event(&self, event_id: &str) -> Result<Vec<String>> {
        let mut db = self.read().await?;
        let found = events::workers_with(&mut db, event_id).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Count and age of the open dead letters, by worker. Cheap for any number of closed ones.
    pub async fn dead_letter_depths(&self) -> Result<Vec<DeadLetterDepth>> {
        let mut db = self.read().await?;
        let found = alarms::depths(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The raised alarms, and all alarms on depths and ages that were ever raised, by worker.
    pub async fn alarms(&self) -> Result<Vec<Alarm>> {
        let mut db = self.read().await?;
        let found = alarms::list(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Applies alarm updates and appends their messages, in one transaction. An update is skipped
    /// if its alarm has changed since it was read.
    pub async fn apply_alarm_updates(
        &self,
        updates: &[alarm::AlarmUpdate],
    ) -> Result<AlarmNotices> {
        let mut db = self.write().await?;
        let done = alarms::apply(&mut db, updates).await?;
        db.commit().await?;
        Ok(done)
    }

    /// Redrives dead letters, in one transaction. Their generations increase by one. For each, a
    /// message that points the worker to the dead letter is written to the outbox. Its inbox row
    /// stays `dead` until the redriven message claims it. Returns the result for each dead letter,
    /// and the messages that are due for publishing now.
    pub async fn redrive(
        &self,
        dead_letters: &[Redrive],
        attribution: &Attribution,
    ) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
        let mut db = self.write().await?;
        let redriven = redrive::redrive(&mut db, dead_letters, attribution).await?;
        fault::point(fault::BEFORE_REDRIVE);
        db.commit().await?;
        fault::point(fault::AFTER_REDRIVE);
        Ok(redriven)
    }

    /// The message for `worker` that a pointer to dead letter `id` stands for. If the pointer is
    /// out of date or names another worker's dead letter, the proof that it can be acknowledged.
    pub async fn redriven_message(
        &self,
        worker: &str,
        id: i64,
        generation: u32,
    ) -> Result<RedriveLookup> {
        let mut db = self.read().await?;
        let found = redrive::redriven_message(&mut db, worker, id, generation).await?;
        db.commit().await?;
        Ok(found)
    }

    /// The events of a worker among these that are done.
    pub async fn done_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
        let mut db = self.read().await?;
        let found = inbox::done(&mut db, worker, event_ids).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Closes dead letters, or stores a corrected body for one, in one transaction. Closing first
    /// waits for deliveries of redriven ones that are in progress. Returns the result for each dead
    /// letter.
    pub async fn update_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
    ) -> Result<Vec<DeadLetterActionResult>> {
        self.update_seen_dead_letters(ids, action, attribution, &[])
            .await
    }

    /// Like [`Store::update_dead_letters`]. Those in `seen` are refused if they have changed.
    pub async fn update_seen_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
        seen: &[SeenDeadLetter],
    ) -> Result<Vec<DeadLetterActionResult>> {
        let mut db = self.write().await?;
        let done = redrive::update_dead_letters(&mut db, ids, action, attribution, seen).await?;
        db.commit().await?;
        Ok(done)
    }

    /// The value under a key of a worker's state.
    pub async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>> {
        let mut db = self.read().await?;
        let found = state::entry(&mut db, worker, key).await?;
        db.commit().await?;
        Ok(found)
    }

    /// At most `limit` values of a worker's state with keys that begin with `prefix`, sorted by the
    /// bytes of the key.
    pub async fn state_entries(
        &self,
        worker: &str,
        prefix: &str,
        limit: u32,
    ) -> Result<Vec<StateRecord>> {
        let mut db = self.read().await?;
        let found = state::entries(&mut db, worker, prefix, limit).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Counts and ages of each worker that was deployed or has rows.
    pub async fn totals(&self) -> Result<Vec<WorkerTotals>> {
        let mut db = self.read().await?;
        let found = totals::by_worker(&mut db).await?;
        db.commit().await?;
        Ok(found)
    }

    /// Deletes some expired rows: published outputs, and inbox records with their attempts. Events
    /// with a dead letter that can be redriven keep their inbox row. Returns whether rows were
    /// deleted, so that there may be more.
    ///
    /// # Errors
    /// `Conflict` if a transaction stays open for too long; try again later.
    pub async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool> {
        match self {
            Store::Postgres(store) => store.delete_expired(retention).await,
            Store::Sqlite(store) => store.delete_expired(retention).await,
        }
    }

    /// Releases the host's lease and closes all connections once their work is done.
    pub async fn close(&self) {
        match self {
            Store::Postgres(store) => store.close().await,
            Store::Sqlite(store) => store.close().await,
        }
    }

    /// A transaction that only reads.
    async fn read(&self) -> Result<Db> {
        match self {
            Store::Postgres(store) => store.begin(Purpose::Read).await,
            Store::Sqlite(store) => Ok(store.readers()),
        }
    }

    /// Like [`Store::read`], for pages of large tables.
    async fn read_by_index(&self) -> Result<Db> {
        match self {
            Store::Postgres(store) => store.begin(Purpose::ReadByIndex).await,
            Store::Sqlite(store) => Ok(store.readers()),
        }
    }

    /// A transaction that writes.
    async fn write(&self) -> Result<Db> {
        match self {
            Store::Postgres(store) => store.begin(Purpose::Platform).await,
            Store::Sqlite(store) => store.begin().await,
        }
    }

    /// Like [`Store::write`]. A crash of PostgreSQL may lose its writes, which is harmless.
    async fn write_async(&self) -> Result<Db> {
        match self {
            Store::Postgres(store) => store.begin(Purpose::AsyncCommit).await,
            Store::Sqlite(store) => store.begin().await,
        }
    }
}
