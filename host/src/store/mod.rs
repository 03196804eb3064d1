//! The database: the traits [`Store`] and [`Tx`], implemented for PostgreSQL and SQLite.
//!
//! All guarantees of Oncely rest on [`Tx`]. The inbox record, the guest's writes, its state and its
//! outputs go into one transaction. [`Tx::commit`] returns `Ok` only for a verified commit.
//!
//! No future of these traits may be dropped before it completes, unless its method says so. Callers
//! run deliveries in tasks that are never aborted.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

pub use crate::config::manifest::WorkerMigration;
use crate::model::alarm::{self, Alarm};
pub use crate::model::keyed_state::{StateEntry, StateSlot, StateWrite};
use crate::model::message::Headers;
pub use crate::model::message::Output;
use crate::model::output_ids::{self, OutputIds};
use crate::model::request::{HttpResponse, RequestKey};
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::{DeadLetter, Settled};

mod archive;
mod changes;
pub mod conflict;
mod db;
mod dead_letter_queries;
mod dead_letters;
mod instance;
mod migrations;
mod outputs;
mod postgres;
mod reports;
mod requests;
mod rows;
mod shared;
mod sqlite;
mod totals;
mod values;
mod wal;
mod watermarks;

pub use changes::{Changes, RowChange};
pub use dead_letters::{
    AttemptRecord, Attribution, AuditRecord, DeadLetterAction, DeadLetterActionResult,
    DeadLetterDepth, DeadLetterFilter, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord,
    DeadLetterState, DeadLetterSummary, EditRecord, Redrive, RedriveLookup, all_dead_letters,
    grouped_dead_letters,
};
pub use instance::{HOST_LEASE, LEASE_SAFE_FOR, RENEW_INTERVAL, RENEW_TIMEOUT, TakenOver};

pub use postgres::PostgresStore;
pub use requests::ClaimedRequest;
pub use sqlite::SqliteStore;
pub use wal::{
    Lsn, OutputWal, RelayMode, SlotState, SwitchProgress, WalEvent, WalReader, WalRecord,
    WalSnapshot, WalState,
};
pub use watermarks::{AckFloor, BrokerState, RecoveredOutput, StreamEnd, Watermark, Watermarks};

/// The error of a store operation. Only `Refused` is caused by a guest.
#[derive(Debug)]
pub enum StoreError {
    /// Conflict with another transaction: a serialization failure, a deadlock, a busy database or a
    /// changed state key. There are no effects; retry at once.
    Conflict(anyhow::Error),
    /// The database is unreachable or returned an error of its own. A commit that failed like this
    /// has an unknown outcome; claiming the same event ids again resolves it. Wait, then retry.
    Unavailable(anyhow::Error),
    /// The commit failed because of a guest's writes (a deferred constraint), or a guest ended the
    /// transaction. There are no further effects.
    Refused(anyhow::Error),
}

impl StoreError {
    /// Whether the connection broke during a guest's statement, which may be the cause.
    pub fn broke_in_statement(&self) -> bool {
        matches!(self, StoreError::Unavailable(cause) if cause.is::<BrokenStatement>())
    }
}

/// The last report of a live host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredReport {
    /// The id of the instance: 16 hex digits.
    pub instance: String,
    /// The number of reports that the instance has written; 0 for none.
    pub number: u64,
    /// `None` before the first report.
    pub text: Option<String>,
}

/// Whether an operation failed because all connections of this host were in use.
pub(crate) fn is_busy(cause: &anyhow::Error) -> bool {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        matches!(
            cause.downcast_ref::<sqlx::Error>(),
            Some(sqlx::Error::PoolTimedOut)
        )
    };
    cause.chain().any(is_full)
}

/// Context of a connection error that ended a guest's statement.
#[derive(Debug)]
pub(crate) struct BrokenStatement;

impl std::fmt::Display for BrokenStatement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection broke during a worker's statement")
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoreError::Conflict(_) => f.write_str("conflict with another transaction"),
            StoreError::Unavailable(_) => f.write_str("the database is unavailable"),
            StoreError::Refused(_) => f.write_str("the database refused the transaction"),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let (StoreError::Conflict(cause)
        | StoreError::Unavailable(cause)
        | StoreError::Refused(cause)) = self;
        Some(cause.as_ref())
    }
}

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// A claim of one event id.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The deduplication key of the message, within the worker of the transaction.
    pub event_id: String,
    /// SHA-256 over subject and body. The same event id with another hash is an id reuse.
    pub payload_sha256: [u8; 32],
    /// Stream and sequence, for display and for `audit`.
    pub origin: Option<(String, u64)>,
    /// The message is a redriven dead letter. It can be claimed although its event is recorded as
    /// dead, until the redriven delivery has an outcome.
    pub redriven: bool,
}

/// The outcome of a claim.
#[derive(Debug)]
pub enum Claimed {
    /// Claimed, if this transaction commits.
    Fresh {
        /// How many attempts at the event have failed before.
        attempts: u32,
    },
    /// The event id has a committed delivery or dead letter, with the same payload.
    Settled(Settled),
    /// The event id belongs to another payload.
    OtherPayload,
}

/// A committed, unpublished output that is leased to this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// The number of its row, in the order of writing.
    pub seq: i64,
    /// The value of `Nats-Msg-Id`; see [`crate::model::output_ids`].
    pub id: String,
    /// The worker that it belongs to.
    pub worker: String,
    /// The subject to publish to, without wildcards.
    pub subject: String,
    /// The headers to publish, besides `Nats-Msg-Id`.
    pub headers: Headers,
    /// The payload, published unchanged.
    pub body: Bytes,
    /// Outputs of one worker with the same key are published in the order of their commits.
    pub ordering_key: Option<String>,
    /// For a row handed over from memory: the unpublished rows of its key that were written before
    /// it. The row may be sent only after them.
    pub blocked_by: Vec<i64>,
    /// The earliest time it may have been sent to the broker. For a row handed over from memory
    /// that is its commit. After the broker's dedupe window, the stream must be searched for the
    /// row before it is published again.
    pub first_attempt_at: Timestamp,
    /// How many publish attempts have failed.
    pub failures: u32,
}

impl OutboxRow {
    /// The readable id, which is sent in a header.
    pub fn output_id(&self) -> &str {
        output_ids::readable_id(&self.headers, &self.id)
    }

    /// Adds to `blocked_by` of each row the previous row of the same key in `rows`.
    pub fn chain(rows: &mut [OutboxRow]) {
        let mut last: HashMap<(String, String), i64> = HashMap::new();
        for row in rows {
            let Some(key) = row.ordering_key.clone() else {
                continue;
            };
            row.blocked_by
                .extend(last.insert((row.worker.clone(), key), row.seq));
        }
    }
}

/// How to release a leased output that was not published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unpublished {
    /// It is due again after a delay. `error` is set if publishing was tried and failed.
    Later {
        /// The delay, counted from the release.
        after: Duration,
        /// The publish error, for display.
        error: Option<String>,
    },
    /// It is blocked until this row is published or dropped.
    BlockedBy(i64),
    /// It waits until an operator retries or drops it.
    Parked {
        /// Why it is not retried, for display.
        reason: String,
    },
    /// It is due at once under another id, because its stream holds another message under the id
    /// `taken`. No effect if the output has another id by now.
    IdTaken {
        /// The id that was refused, a value of `Nats-Msg-Id`.
        taken: String,
        /// The publish error, for display.
        error: String,
    },
}

/// A published output with its place on the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedOutput {
    /// The number of its row in the outbox.
    pub seq: i64,
    /// The value of `Nats-Msg-Id`.
    pub id: String,
    /// The name of the stream that stored it.
    pub stream: String,
    /// The sequence on that stream.
    pub stream_sequence: u64,
    /// When it was recorded as published, on the database's clock.
    pub published_at: Timestamp,
}

/// The place of an output on its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The number of its row in the outbox.
    pub seq: i64,
    /// The name of the stream that stored it.
    pub stream: String,
    /// The sequence on that stream.
    pub stream_sequence: u64,
}

/// One failed attempt. It is counted outside the transaction that it failed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The deduplication key of the message.
    pub event_id: String,
    /// The version of the worker that made the attempt.
    pub version: u32,
    /// The handler's own code, or a code of the host such as `trap`; `None` for no code.
    pub code: Option<String>,
    /// The failure in words.
    pub error: String,
    /// The handler's log, one line per entry.
    pub logs: String,
    /// The input of the handler, its host calls and their results.
    pub recording: Option<StoredRecording>,
}

/// The recording of a failed attempt, for a replay. Only the last one of each event is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecording {
    /// The record of the attempt as JSON: its inputs, host calls and results.
    pub json: Bytes,
    /// Two attempts with the same digest prove that a third one fails identically. `None` if the
    /// attempt proves nothing.
    pub digest: Option<[u8; 32]>,
}

/// A failed attempt that was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountedAttempt {
    /// 1 for the first attempt at an event.
    pub attempt: u32,
    /// Whether its digest equals that of the previous attempt.
    pub is_repeat: bool,
}

/// Alarms that were just raised or cleared.
#[derive(Debug, Default)]
pub struct AlarmNotices {
    /// The raised and cleared alarms, for the log.
    pub notices: Vec<alarm::Notice>,
    /// The alarm messages that are due for publishing now.
    pub rows: Vec<OutboxRow>,
}

/// The result of dead-lettering messages.
#[derive(Debug)]
pub struct DeadLettered {
    /// One proof per message.
    pub proofs: Vec<Settled>,
    /// The dead-letter notices that are due for publishing now.
    pub notices: Vec<OutboxRow>,
    /// Alarms on failures that were new.
    pub alarms: AlarmNotices,
}

/// A filter for outputs. Results are sorted oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutputFilter {
    /// The name of a worker; `None` for all workers.
    pub worker: Option<String>,
    /// All unpublished outputs, not only parked ones.
    #[serde(default)]
    pub unpublished: bool,
    /// Dropped outputs instead.
    #[serde(default)]
    pub dropped: bool,
    /// The maximum number of results.
    pub limit: u32,
}

/// One output in a list.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutputSummary {
    /// The number of its row.
    pub number: i64,
    /// The readable id, sent as `Oncely-Output-Id`.
    pub id: String,
    /// The value of `Nats-Msg-Id`.
    pub message_id: String,
    /// The worker that it belongs to.
    pub worker: String,
    /// The event that caused it.
    pub event_id: String,
    /// The subject to publish to.
    pub subject: String,
    /// Outputs of one worker with the same key are published in order; `None` for no order.
    pub ordering_key: Option<String>,
    /// `parked`, `blocked`, `delayed`, `due`, `leased`, `in-wal`, `published` or `dropped`.
    pub state: String,
    /// The number of the output that blocks it.
    pub blocked_by: Option<i64>,
    /// How many outputs it blocks.
    pub waiting: u64,
    /// How many publish attempts have failed.
    pub failures: u32,
    /// The last publish error.
    pub error: Option<String>,
    /// When it was committed.
    pub created_at: Timestamp,
    /// When it may be published, after its delay or after a failed attempt.
    pub due_at: Timestamp,
    /// When it was parked; `None` if it is not parked.
    pub parked_at: Option<Timestamp>,
    /// When it was dropped; `None` if it is not dropped.
    pub dropped_at: Option<Timestamp>,
    /// The reason for dropping it, as the operator wrote it.
    pub note: Option<String>,
}

/// One output with headers and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRecord {
    /// The fields that a list shows as well.
    pub summary: OutputSummary,
    /// The headers as published, in order.
    pub headers: Headers,
    /// The payload as published.
    pub body: Bytes,
    /// Stream and sequence, once it is published.
    pub place: Option<(String, u64)>,
}

/// The publishing lag of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutboxLag {
    /// The name of the worker.
    pub worker: String,
    /// Outputs and dead-letter notices that are due and not published.
    pub unpublished: u64,
    /// Age of the oldest output that is neither parked nor blocked by a parked one, in
    /// milliseconds.
    pub oldest_ms: Option<u64>,
    /// Parked outputs.
    pub parked: u64,
    /// Outputs blocked by a parked one.
    pub blocked: u64,
}

/// One immutable version of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeploymentRecord {
    /// The name of the worker.
    pub worker: String,
    /// 1 for the first; one more with each deployment of this worker.
    pub version: u32,
    /// SHA-256 of the component, lower-case hex.
    pub digest: String,
    /// The worker's manifest with all defaults filled in, as JSON.
    pub manifest: String,
    /// When it was deployed.
    pub created_at: Timestamp,
}

/// One value of keyed state, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRecord {
    /// The key, unique per worker.
    pub key: String,
    /// The version of the entry. It grows with each change of the key.
    pub version: u64,
    /// Size of the value in bytes.
    pub size: u64,
    /// When the value was last written.
    pub updated_at: Timestamp,
    /// The value; in a list only its first [`STATE_PREVIEW`] bytes.
    pub value: Bytes,
}

/// How many bytes of each value a list of keyed state shows.
pub const STATE_PREVIEW: u32 = 256;

/// Counts and ages of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerTotals {
    /// The name of the worker.
    pub worker: String,
    /// Events whose effects are committed.
    pub done: u64,
    /// Open dead letters.
    pub dead: u64,
    /// Outputs of the handler in the outbox: unpublished, or published in the last 15 minutes.
    pub outputs: u64,
    /// Committed outputs and dead-letter notices that are not published.
    pub unpublished: u64,
    /// Age of the oldest due output that is neither parked nor blocked by a parked one, in
    /// milliseconds.
    pub oldest_unpublished_ms: Option<u64>,
    /// Outputs that are parked until an operator retries or drops them.
    pub parked: u64,
}

/// The minimum retention of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Counted from publishing.
    pub outputs: Duration,
    /// Counted from the transaction; `None` keeps rows for ever.
    pub inbox: Option<Duration>,
    /// The maximum for responses to requests: each response has its own expiry.
    pub requests: Duration,
    /// The most rows that are deleted or moved one by one in a run. On PostgreSQL, whole partitions
    /// are emptied regardless of their size.
    pub limit: u32,
    /// How long to wait for open transactions. New ones may have to wait equally long.
    pub lock_timeout: Duration,
    /// The folder for archives of expired rows; `None` for no archive. After a crash, a row may be
    /// in two archives.
    pub archive: Option<PathBuf>,
}

/// The database, as the host's tasks and the control API use it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The SQL dialect of guests' statements.
    fn dialect(&self) -> Dialect;

    /// The write-ahead log as a source of outputs; `None` if the database has none to read.
    fn wal(&self) -> Option<std::sync::Arc<dyn OutputWal>> {
        None
    }

    /// Returns `Ok` if the database responds.
    async fn ping(&self) -> Result<()>;

    /// Renews this host's lease for [`HOST_LEASE`], and takes over from hosts with an expired
    /// lease: ends their sessions, then releases their leased outputs. This future may be dropped
    /// at any time.
    async fn renew_lease(&self) -> Result<Vec<TakenOver>>;

    /// Begins the transaction of a batch of `worker`. The database cancels statements that run
    /// longer than `time`.
    async fn begin(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>>;

    /// Like [`Store::begin`], for a read-only transaction that does not wait for writers.
    async fn begin_read_only(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>>;

    /// Counts failed attempts, in a transaction of its own. The recording of an event's attempt
    /// replaces the previous one. Results are in the order of `failed`.
    async fn count_attempts(
        &self,
        worker: &str,
        failed: &[FailedAttempt],
    ) -> Result<Vec<CountedAttempt>>;

    /// Deletes the recordings of attempts at these events.
    async fn delete_recordings(&self, worker: &str, event_ids: &[String]) -> Result<()>;

    /// The recording of the last failed attempt at an event, as JSON; `None` if there is none or it
    /// was deleted.
    async fn attempt_recording(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>>;

    /// Writes a crash marker in a transaction of its own: the message, a suspected cause of host
    /// crashes, is about to be handled alone. Returns how many markers of it were written before
    /// and not cleared.
    async fn write_crash_marker(&self, worker: &str, event_id: &str) -> Result<u32>;

    /// Clears the crash marker: handling the message ended, with any result.
    async fn clear_crash_marker(&self, worker: &str, event_id: &str) -> Result<()>;

    /// Dead-letters messages. The inbox record (`dead`), the dead letter and the message
    /// `notices[i]` to the DLQ stream are written in one transaction. A dead letter that exists
    /// already, or whose event has an inbox row already, adds nothing. The first dead letter of a
    /// failure raises an alarm in the same transaction, unless `new_failures` failures of its
    /// worker did so within an hour.
    async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
        new_failures: u32,
    ) -> Result<DeadLettered>;

    /// Leases at most `limit` outputs that are due, unpublished and not leased, oldest first. Of
    /// each key, only rows at the front of its queue are leased. A row blocked by another host's
    /// row becomes due again after that row is published or dropped. The lease is measured by the
    /// database's clock. A row that was leased before keeps its `first_attempt_at`.
    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>>;

    /// Records that exactly these outputs are on their streams.
    async fn mark_published(&self, published: &[Published]) -> Result<()>;

    /// Releases leased outputs that were not published. Rows that are published by now, or were
    /// leased by another host since, do not change.
    async fn release_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()>;

    /// By worker, how many outputs in the outbox changed their id because it was taken.
    async fn taken_ids(&self) -> Result<BTreeMap<String, u64>>;

    /// The generator of this installation's output ids.
    fn output_ids(&self) -> &OutputIds;

    /// The id of this installation: this database and its hosts. 16 hex digits.
    fn installation(&self) -> &str;

    /// The watermarks, and when the one named `on_broker`, the last one on NATS, was written.
    async fn watermarks(&self, on_broker: Option<&str>) -> Result<Watermarks>;

    /// Writes a watermark. It is durable once this returns.
    async fn write_watermark(&self, name: &str, seen: &BrokerState) -> Result<()>;

    /// Records that the broker has a watermark, at this sequence of the watermark stream.
    async fn acknowledge_watermark(&self, name: &str, sequence: u64) -> Result<()>;

    /// The events among these that are in the worker's inbox, as handled or as dead.
    async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>>;

    /// Saves the places of outputs that a recovery found on their streams. Of several places of an
    /// id, the first one is saved. It replaces a place saved earlier.
    async fn save_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()>;

    /// Deletes the recovered places of these ids, which are no longer on their streams.
    async fn delete_recovered(&self, ids: &[&str]) -> Result<()>;

    /// The stream and sequence of those ids that a recovery found.
    async fn find_recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>>;

    /// The last output on each stream that was published `within` this time.
    async fn last_published(&self, within: Duration) -> Result<Vec<PublishedOutput>>;

    /// All outputs in the outbox that were published to a stream, in publishing order.
    async fn published_to(&self, stream: &str) -> Result<Vec<PublishedOutput>>;

    /// Makes published outputs unpublished, so that they are published again. An output that has
    /// another place by now does not change. Returns the number of outputs changed.
    async fn republish(&self, lost: &[PublishedOutput]) -> Result<u64>;

    /// Parked or all unpublished outputs, oldest first; or dropped ones, newest first.
    async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>>;

    /// One output by its number, in any state.
    async fn output(&self, number: i64) -> Result<Option<OutputRecord>>;

    /// Makes parked outputs due. Returns how many of them were parked.
    async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64>;

    /// Drops parked outputs, keeps a record of them, and unblocks the outputs they block. Returns
    /// how many of them were parked.
    async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64>;

    /// The publishing lag of each worker with unpublished outputs. Cheap for tables of any size.
    async fn outbox_lag(&self) -> Result<Vec<OutboxLag>>;

    /// Stores a component under its SHA-256 (lower-case hex). Idempotent.
    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()>;

    /// A component; `None` if it was never stored.
    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>>;

    /// Creates the next deployment of a worker and activates it, in one transaction with the
    /// worker's due migrations.
    ///
    /// # Errors
    /// `Refused` if a migration changed since it ran.
    async fn deploy(
        &self,
        worker: &str,
        digest: &str,
        manifest: &str,
        migrations: &[WorkerMigration],
    ) -> Result<DeploymentRecord>;

    /// The names of a worker's migrations that have not run, in their order.
    ///
    /// # Errors
    /// `Refused` if a migration changed since it ran.
    async fn due_migrations(
        &self,
        worker: &str,
        migrations: &[WorkerMigration],
    ) -> Result<Vec<String>>;

    /// Deactivates a worker: none of its deployments is active any longer. Its history is kept.
    async fn retire_worker(&self, worker: &str) -> Result<()>;

    /// Writes the report of this host for others to read. It is durable once this returns. `began`
    /// is set when the host's earlier transactions are done and this one starts; the time from then
    /// on is the database's.
    async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()>;

    /// The last report of each live host.
    async fn reports(&self) -> Result<Vec<StoredReport>>;

    /// Activates an earlier deployment; `None` if there is no such version.
    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>>;

    /// The active deployment of every worker, by name.
    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>>;

    /// The newest deployment of every worker, retired ones included, by name.
    async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>>;

    /// All deployments of a worker, newest first.
    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>>;

    /// One page of dead letters, newest first. See [`all_dead_letters`] for subjects with
    /// wildcards.
    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>>;

    /// One dead letter with all its details.
    async fn find_dead_letter(&self, id: i64) -> Result<Option<DeadLetterRecord>>;

    /// The matching dead letters, grouped by failure. Those without a group, which are older than
    /// groups, form one group.
    async fn dead_letter_groups(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterGroup>>;

    /// Count and age of the open dead letters, by worker. Cheap for any number of closed ones.
    async fn dead_letter_depths(&self) -> Result<Vec<DeadLetterDepth>>;

    /// The raised alarms, and all alarms on depths and ages that were ever raised, by worker.
    async fn alarms(&self) -> Result<Vec<Alarm>>;

    /// Applies alarm updates and appends their messages, in one transaction. An update is skipped
    /// if its alarm has changed since it was read.
    async fn apply_alarm_updates(&self, updates: &[alarm::AlarmUpdate]) -> Result<AlarmNotices>;

    /// Redrives dead letters, in one transaction. Their generations increase by one. For each, a
    /// message that points the worker to the dead letter is written to the outbox. Its inbox row
    /// stays `dead` until the redriven message claims it. Returns the result for each dead letter,
    /// and the messages that are due for publishing now.
    async fn redrive(
        &self,
        dead_letters: &[Redrive],
        attribution: &Attribution,
    ) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)>;

    /// The message for `worker` that a pointer to dead letter `id` stands for. If the pointer is
    /// out of date or names another worker's dead letter, the proof that it can be acknowledged.
    async fn redriven_message(
        &self,
        worker: &str,
        id: i64,
        generation: u32,
    ) -> Result<RedriveLookup>;

    /// The events of a worker among these that are done.
    async fn done_events(&self, worker: &str, event_ids: &[String]) -> Result<Vec<String>>;

    /// Closes dead letters, or stores a corrected body for one, in one transaction. Closing first
    /// waits for deliveries of redriven ones that are in progress. Returns the result for each dead
    /// letter.
    async fn update_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
    ) -> Result<Vec<DeadLetterActionResult>>;

    /// The value under a key of a worker's state.
    async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>>;

    /// At most `limit` values of a worker's state with keys that begin with `prefix`, sorted by the
    /// bytes of the key.
    async fn state_entries(
        &self,
        worker: &str,
        prefix: &str,
        limit: u32,
    ) -> Result<Vec<StateRecord>>;

    /// Counts and ages of each worker that was deployed or has rows.
    async fn totals(&self) -> Result<Vec<WorkerTotals>>;

    /// Deletes some expired rows: published outputs, and inbox records with their attempts. Events
    /// with a dead letter that can be redriven keep their inbox row. Returns whether rows were
    /// deleted, so that there may be more.
    ///
    /// # Errors
    /// `Conflict` if a transaction stays open for too long; try again later.
    async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool>;

    /// Releases the host's lease and closes all connections once their work is done.
    async fn close(&self);
}

/// The transaction of one batch or one request. Dropping it without `commit` rolls it back and
/// releases the connection.
#[async_trait]
pub trait Tx: Send {
    /// Claims event ids in the inbox: all with one statement, sorted, so that overlapping batches
    /// wait for each other and cannot deadlock. Blocks while another transaction holds one of them
    /// uncommitted. `claims` contains each event id once; the results are in its order.
    async fn claim(&mut self, claims: &[Claim]) -> Result<Vec<Claimed>>;

    /// Releases claimed event ids of batch items that failed and ran no SQL.
    async fn release_claims(&mut self, event_ids: &[String]) -> Result<()>;

    /// Claims an idempotency key for this transaction, or returns the stored response. Does not
    /// wait for another transaction that has the key.
    async fn claim_request(&mut self, request: &RequestKey) -> Result<ClaimedRequest>;

    /// Stores the response to a key that this transaction claimed, for at least `keep`.
    async fn store_response(
        &mut self,
        request: &RequestKey,
        response: &HttpResponse,
        keep: Duration,
    ) -> Result<()>;

    /// The current state of each key, missing keys included.
    async fn load_state(&mut self, keys: &[String]) -> Result<Vec<(String, StateSlot)>>;

    /// Applies all writes, at most one per key.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a key has changed since it was loaded.
    async fn save_state(&mut self, writes: &[StateWrite]) -> Result<()>;

    /// Sets a savepoint for [`Tx::rollback_to_savepoint`], in place of an earlier one.
    async fn savepoint(&mut self) -> Result<()>;

    /// Rolls back to the savepoint, past a guest's failed statement too, so that the transaction
    /// can be committed again.
    ///
    /// # Errors
    /// `Refused` if that is impossible. The transaction can then only be rolled back.
    async fn rollback_to_savepoint(&mut self) -> Result<()>;

    /// Runs a guest's statement and returns its rows. The outer error is the host's, the inner one
    /// is for the guest. After an inner error from the database, the transaction can only be rolled
    /// back.
    async fn query(
        &mut self,
        statement: &str,
        params: &[Value],
        limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>>;

    /// Like [`Tx::query`], but returns the number of changed rows.
    async fn execute(
        &mut self,
        statement: &str,
        params: &[Value],
    ) -> Result<std::result::Result<u64, SqlError>>;

    /// Appends outputs with one statement. They are leased to this host for `lease`, so that no
    /// poller leases rows that are about to be handed to the relay from memory. Returns the outputs
    /// that are due at once, in order. Delayed outputs, and those of a key with a failing output,
    /// are left to the poller.
    async fn append_outputs(
        &mut self,
        outputs: &[Output],
        lease: Duration,
    ) -> Result<Vec<OutboxRow>>;

    /// Starts to track changed rows of workers' tables.
    async fn track_changes(&mut self) -> Result<()>;

    /// The changes since [`Tx::track_changes`], at most `limit` rows of each table, and the reason
    /// why a commit would be refused. Afterwards the transaction can only be rolled back.
    async fn changes(&mut self, limit: usize) -> Result<Changes>;

    /// Commits. Returns `Ok` only if the database confirmed the commit of this very transaction.
    /// The commit is never sent twice.
    ///
    /// # Errors
    /// `Refused` if a guest's statement aborted or ended the transaction or violates a deferred
    /// constraint.
    async fn commit(self: Box<Self>) -> Result<Settled>;

    /// Rolls back. After an error here the connection is closed, which has the same effect.
    async fn rollback(self: Box<Self>);
}
