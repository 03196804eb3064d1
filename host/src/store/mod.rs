//! The database: one small surface, two implementations.
//!
//! Everything Oncely promises rests on [`Tx`]: the inbox record, the guest's writes, its state and its outputs
//! go into one transaction, and [`Tx::commit`] says `Ok` only for a commit it has verified. No future of this
//! surface may be dropped before it is done: callers run deliveries in tasks of their own that are never aborted.

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
mod dead_letters;
mod instance;
mod migrations;
mod postgres;
mod requests;
mod rows;
mod shared;
mod sqlite;
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

/// Why the store could not do as asked. None of these is the guest's doing but `Refused`.
#[derive(Debug)]
pub enum StoreError {
    /// Another transaction stood in the way (serialization failure, deadlock, busy, a state key that moved).
    /// Nothing took effect; run it again at once.
    Conflict(anyhow::Error),
    /// The database is out of reach, or answered with an error of its own. A commit that ended like this may
    /// or may not have happened: claiming the same event ids again tells. Wait and run it again.
    Unavailable(anyhow::Error),
    /// The commit failed for what guests wrote (a deferred constraint), or a guest left the transaction.
    /// Nothing more takes effect.
    Refused(anyhow::Error),
}

impl StoreError {
    /// Whether the connection broke while a guest's statement ran, which may be that statement's doing.
    pub fn broke_in_statement(&self) -> bool {
        matches!(self, StoreError::Unavailable(cause) if cause.is::<BrokenStatement>())
    }
}

/// The last report of a live host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredReport {
    pub instance: String,
    /// How many it has written; 0 for none.
    pub number: u64,
    /// None when it has written none.
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

/// The context of an error of the connection that ended a guest's statement.
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
            StoreError::Conflict(_) => f.write_str("another transaction stood in the way"),
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

pub type Result<T> = std::result::Result<T, StoreError>;

/// One event id to claim.
#[derive(Debug, Clone)]
pub struct Claim {
    pub event_id: String,
    pub payload_sha256: [u8; 32],
    /// Stream and sequence, for people and for `audit`.
    pub origin: Option<(String, u64)>,
    /// It was put back as a dead letter: as long as it is under way, it may be claimed although it is dead.
    pub redriven: bool,
}

/// What claiming an event id found.
#[derive(Debug)]
pub enum Claimed {
    /// Ours, if this transaction commits. `attempts` failed before.
    Fresh { attempts: u32 },
    /// A committed delivery or dead letter holds it, for the same payload.
    Settled(Settled),
    /// It is held for another payload.
    OtherPayload,
}

/// A committed output that is to be published, leased to this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    pub seq: i64,
    /// What travels as `Nats-Msg-Id`; see [`crate::model::output_ids`].
    pub id: String,
    pub worker: String,
    pub subject: String,
    pub headers: Headers,
    pub body: Bytes,
    /// Outputs of one worker with the same key are published in the order of their commits.
    pub ordering_key: Option<String>,
    /// For a row handed over from memory: the rows of its key that were in line before it when it was written. It may be
    /// sent only after them.
    pub blocked_by: Vec<i64>,
    /// The first time it may have been sent to the broker: the commit, for a row handed over from memory. Beyond the broker's
    /// dedupe window a row must be looked up before it is published again.
    pub first_attempt_at: Timestamp,
    /// How often publishing failed so far.
    pub failures: u32,
}

impl OutboxRow {
    /// The readable id, which travels in a header.
    pub fn output_id(&self) -> &str {
        output_ids::readable_id(&self.headers, &self.id)
    }

    /// Adds to what is ahead of each of these rows the one of its key that comes before it among them.
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

/// What becomes of a leased output that was not published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unpublished {
    /// It is due again after a while. With an error it has failed once more; without one it was not tried.
    Later {
        after: Duration,
        error: Option<String>,
    },
    /// It waits until this row is published or dropped.
    BlockedBy(i64),
    /// It waits for a person to retry or drop it.
    Parked { reason: String },
    /// It is due at once under another id, because its stream holds another message under the id `taken`. Nothing becomes of
    /// it when it has another id by now.
    IdTaken { taken: String, error: String },
}

/// An output where it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedOutput {
    pub seq: i64,
    pub id: String,
    pub stream: String,
    pub stream_sequence: u64,
    pub published_at: Timestamp,
}

/// Where an output now stands on its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub seq: i64,
    pub stream: String,
    pub stream_sequence: u64,
}

/// One failed attempt, to be counted outside the transaction it failed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    pub event_id: String,
    pub version: u32,
    pub code: Option<String>,
    pub error: String,
    /// What the handler logged, one line each.
    pub logs: String,
    /// What the handler was given, asked and saw.
    pub recording: Option<StoredRecording>,
}

/// The record of a failed attempt, for a replay. Of each event the last one is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRecording {
    pub json: Bytes,
    /// What two attempts that agree on it prove that a third one does, too; none when this one proves nothing.
    pub digest: Option<[u8; 32]>,
}

/// A failed attempt that was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountedAttempt {
    /// 1 for the first of its event.
    pub attempt: u32,
    /// Whether its proof is that of the attempt before it.
    pub is_repeat: bool,
}

/// Alarms that were just raised or cleared.
#[derive(Debug, Default)]
pub struct AlarmNotices {
    pub notices: Vec<alarm::Notice>,
    /// The messages that tell of them, as far as they are to be published now.
    pub rows: Vec<OutboxRow>,
}

/// What burying messages came to.
#[derive(Debug)]
pub struct DeadLettered {
    /// The proof for each.
    pub settled: Vec<Settled>,
    /// The notices that are to be published now.
    pub notices: Vec<OutboxRow>,
    /// The failures among them that were new.
    pub alarms: AlarmNotices,
}

/// Which outputs to list, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutputFilter {
    pub worker: Option<String>,
    /// All that are not published, not only those that are set aside.
    #[serde(default)]
    pub unpublished: bool,
    /// Those that were dropped instead.
    #[serde(default)]
    pub dropped: bool,
    pub limit: u32,
}

/// One output that is not published, in a list.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutputSummary {
    /// The number of its row.
    pub number: i64,
    /// The readable id, which travels as `Oncely-Output-Id`.
    pub id: String,
    /// What travels as `Nats-Msg-Id`.
    pub message_id: String,
    pub worker: String,
    /// The event that caused it.
    pub event_id: String,
    pub subject: String,
    pub ordering_key: Option<String>,
    /// `parked`, `blocked`, `delayed`, `due`, `leased`, `in-wal`, `published` or `dropped`.
    pub state: String,
    /// The number of the output it waits for.
    pub blocked_by: Option<i64>,
    /// How many wait behind it.
    pub waiting: u64,
    pub failures: u32,
    /// Why it was not published the last time.
    pub error: Option<String>,
    pub created_at: Timestamp,
    pub due_at: Timestamp,
    pub parked_at: Option<Timestamp>,
    pub dropped_at: Option<Timestamp>,
    /// Why it was dropped, in a person's words.
    pub note: Option<String>,
}

/// One output, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRecord {
    pub summary: OutputSummary,
    pub headers: Headers,
    pub body: Bytes,
    /// Stream and sequence, once it is published.
    pub place: Option<(String, u64)>,
}

/// How far publishing is behind, for one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutboxLag {
    pub worker: String,
    /// Outputs, and notices of dead letters, that are due and not published.
    pub unpublished: u64,
    /// Age of the oldest of those that neither are set aside nor wait for one that is, in milliseconds.
    pub oldest_ms: Option<u64>,
    /// Outputs that are set aside, and those that wait for them.
    pub parked: u64,
    pub blocked: u64,
}

/// One immutable version of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeploymentRecord {
    pub worker: String,
    /// 1 for the first; one more with each deployment of this worker.
    pub version: u32,
    /// SHA-256 of the component, lower-case hex.
    pub digest: String,
    /// The worker's manifest with all defaults filled in, as JSON.
    pub manifest: String,
    pub created_at: Timestamp,
}

/// One value of keyed state, as people read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRecord {
    pub key: String,
    pub version: u64,
    /// Of the value, in bytes.
    pub size: u64,
    pub updated_at: Timestamp,
    /// The value; in a list its first [`STATE_PREVIEW`] bytes.
    pub value: Bytes,
}

/// How much of each value a list of keyed state shows, in bytes.
pub const STATE_PREVIEW: u32 = 256;

/// Counts and ages of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerTotals {
    pub worker: String,
    /// Events whose effects are committed.
    pub done: u64,
    /// Dead letters that wait for somebody.
    pub dead: u64,
    /// Outputs of the handler that are in the outbox: unpublished, or published in the last quarter of an hour.
    pub outputs: u64,
    /// Outputs, and notices of dead letters, that are committed and not yet published.
    pub unpublished: u64,
    /// Age of the oldest of those that are due, in milliseconds, but for what is set aside or waits for that.
    pub oldest_unpublished_ms: Option<u64>,
    /// Outputs that are set aside until a person retries or drops them.
    pub parked: u64,
}

/// For how long rows are kept, at the least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// After their publication.
    pub outputs: Duration,
    /// After their transaction; none for ever.
    pub inbox: Option<Duration>,
    /// Answers to requests, at the most: each has a time of its own.
    pub requests: Duration,
    /// The most rows that leave, or move, one by one at a time. On PostgreSQL whole parts leave, however large they are.
    pub limit: u32,
    /// How long to wait for transactions that are under way; new ones may have to wait as long.
    pub lock_timeout: Duration,
    /// The folder where what leaves is kept in files; none for nowhere. A row may be in two of them, after a crash.
    pub archive: Option<PathBuf>,
}

/// The database as the loops and the control API use it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    fn dialect(&self) -> Dialect;

    /// The database's log, where outputs can be read from; none where there is no such thing.
    fn wal(&self) -> Option<std::sync::Arc<dyn OutputWal>> {
        None
    }

    /// Answers once the database does.
    async fn ping(&self) -> Result<()>;

    /// Says that this host is alive, for [`HOST_LEASE`], and takes over from those that no longer say so: ends their sessions,
    /// and then releases the outputs they had leased. May be dropped half-way, unlike everything else here.
    async fn renew_lease(&self) -> Result<Vec<TakenOver>>;

    /// Begins the one transaction of a batch of `worker`. The database itself ends statements that run longer
    /// than `time`.
    async fn begin(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>>;

    /// Like [`Store::begin`], for a transaction that can but read, and that need not wait for those that write.
    async fn begin_read_only(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>>;

    /// Counts failed attempts, in a transaction of its own, and keeps the record of the last one of each event in place of
    /// that of the one before. Answers in their order.
    async fn count_attempts(
        &self,
        worker: &str,
        failed: &[FailedAttempt],
    ) -> Result<Vec<CountedAttempt>>;

    /// Forgets the records of attempts at these events.
    async fn delete_recordings(&self, worker: &str, event_ids: &[String]) -> Result<()>;

    /// The record of the last failed attempt at an event, as JSON; none when there is none, or none any more.
    async fn attempt_recording(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>>;

    /// Notes, in a transaction of its own, that a message is about to be handled alone because hosts may have died of
    /// it, and returns how often that was noted before without being taken back.
    async fn write_crash_marker(&self, worker: &str, event_id: &str) -> Result<u32>;

    /// Takes the note back: the message was handled, whatever came of it.
    async fn clear_crash_marker(&self, worker: &str, event_id: &str) -> Result<()>;

    /// Buries messages: inbox record (`dead`), dead letter and the message `notices[i]` to the DLQ stream in one
    /// transaction. A letter whose event is settled already, or that is there already, adds nothing. The first letter of
    /// a failure raises an alarm, in the same transaction, unless `new_failures` of its worker did so within an hour.
    async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
        new_failures: u32,
    ) -> Result<DeadLettered>;

    /// Leases at most `limit` outputs that are due, unpublished and leased to nobody, oldest first. Of a key only those
    /// that come before all others that are in line; what is behind somebody else waits, and comes again once that one is
    /// published or dropped. The lease is in the database's own time. A row that was leased before keeps its
    /// `first_attempt_at`.
    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>>;

    /// Records that exactly these outputs are on their streams.
    async fn mark_published(&self, published: &[Published]) -> Result<()>;

    /// Gives up the lease of outputs that were not published; those that are published by now, or that another host has
    /// taken over, stay as they are.
    async fn release_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()>;

    /// By worker, how many outputs in the outbox had to change their id because it was taken.
    async fn taken_ids(&self) -> Result<BTreeMap<String, u64>>;

    /// The ids under which outputs of this installation travel.
    fn output_ids(&self) -> &OutputIds;

    /// The id of this installation: of this database and the hosts on it. 16 hex digits.
    fn installation(&self) -> &str;

    /// The marks, and whether the one that stands on the broker is among them.
    async fn watermarks(&self, on_broker: Option<&str>) -> Result<Watermarks>;

    /// Writes a mark. Once this has returned it outlives a crash of the database.
    async fn write_watermark(&self, name: &str, seen: &BrokerState) -> Result<()>;

    /// Notes that the broker has a mark, at this sequence on the stream of marks.
    async fn acknowledge_watermark(&self, name: &str, sequence: u64) -> Result<()>;

    /// Which of these events of a worker are in the inbox: handled, or dead.
    async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>>;

    /// Remembers outputs that a recovery found on their streams: of an id the first place, of what was found last.
    async fn save_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()>;

    /// Forgets what a recovery found under these ids: it is not there any more.
    async fn delete_recovered(&self, ids: &[&str]) -> Result<()>;

    /// Which of these ids a recovery found, each with its stream and sequence.
    async fn find_recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>>;

    /// For each stream the last output on it, of those published `within` this time.
    async fn last_published(&self, within: Duration) -> Result<Vec<PublishedOutput>>;

    /// All published outputs on a stream that are still in the outbox, in the order of their publication.
    async fn published_to(&self, stream: &str) -> Result<Vec<PublishedOutput>>;

    /// Forgets that outputs were published, so that they are again; those that stand elsewhere by now stay. Returns how many.
    async fn republish(&self, lost: &[PublishedOutput]) -> Result<u64>;

    /// Outputs that wait for a person, or all that are not published, oldest first; or those that were dropped, newest first.
    async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>>;

    /// One output by its number, whole: published, unpublished or dropped.
    async fn output(&self, number: i64) -> Result<Option<OutputRecord>>;

    /// Has outputs that are set aside published after all. Returns how many of them were.
    async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64>;

    /// Drops outputs that are set aside and keeps a record of them; what waits for them goes on. Returns how many were.
    async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64>;

    /// How far publishing is behind, by worker; those that have unpublished outputs. Cheap, however large the tables are.
    async fn outbox_lag(&self) -> Result<Vec<OutboxLag>>;

    /// Keeps a component under its SHA-256 (lower-case hex); keeping it again changes nothing.
    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()>;

    /// A component; none when it was never kept.
    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>>;

    /// Makes the next deployment of a worker and activates it: its migrations that have not run yet, the
    /// deployment and its activation in one transaction. A migration that changed since it ran is refused.
    async fn deploy(
        &self,
        worker: &str,
        digest: &str,
        manifest: &str,
        migrations: &[WorkerMigration],
    ) -> Result<DeploymentRecord>;

    /// The names of those of a worker's migrations that have not run, in their order. One that changed since it ran is refused.
    async fn due_migrations(
        &self,
        worker: &str,
        migrations: &[WorkerMigration],
    ) -> Result<Vec<String>>;

    /// Deactivates a worker: no deployment of it is active any more. Its history stays.
    async fn retire_worker(&self, worker: &str) -> Result<()>;

    /// Notes what this host runs, for others to read. Once this has returned it outlives a crash of the database. `began` is set
    /// when the transaction has its turn among those of this host: what comes after that is the database's time.
    async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()>;

    /// What the hosts that are alive noted last.
    async fn reports(&self) -> Result<Vec<StoredReport>>;

    /// Activates an earlier deployment; none when there is no such version.
    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>>;

    /// The active deployment of every worker, by name.
    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>>;

    /// The newest deployment of every worker that ever had one, by name.
    async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>>;

    /// All deployments of a worker, newest first.
    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>>;

    /// One page of dead letters, newest first; see [`all_dead_letters`] for subjects with wildcards.
    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>>;

    /// One dead letter, whole.
    async fn find_dead_letter(&self, id: i64) -> Result<Option<DeadLetterRecord>>;

    /// Dead letters that fit by the failure they died of; those without a group, which are older than groups are, together.
    async fn dead_letter_groups(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterGroup>>;

    /// How many dead letters are open, and for how long, by worker; those that have any. Cheap, however many are closed.
    async fn dead_letter_depths(&self) -> Result<Vec<DeadLetterDepth>>;

    /// The alarms that are raised, and those on depths and ages that ever were, by worker.
    async fn alarms(&self) -> Result<Vec<Alarm>>;

    /// Takes steps of alarms, each if its alarm is still as it was seen, and with it appends the message that tells of it,
    /// in one transaction.
    async fn apply_alarm_updates(&self, moves: &[alarm::AlarmUpdate]) -> Result<AlarmNotices>;

    /// Puts dead letters back to their workers, in one transaction: the event is no longer settled, the letter counts one
    /// generation more, and a message that points the worker to it is in the outbox. Says for each whether that was done,
    /// and returns the messages that are to be published now.
    async fn redrive(
        &self,
        dead_letters: &[Redrive],
        attribution: &Attribution,
    ) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)>;

    /// The message that `worker` is to handle after a pointer to the dead letter `id`; or, when that pointer is out of date or
    /// names a dead letter of another worker, the proof that there is nothing to do.
    async fn redriven_message(
        &self,
        worker: &str,
        id: i64,
        generation: u32,
    ) -> Result<RedriveLookup>;

    /// Which of these events of a worker took effect.
    async fn done_events(&self, worker: &str, event_ids: &[String]) -> Result<Vec<String>>;

    /// Closes dead letters for good, or keeps a corrected body for one, in one transaction, and says for each whether that
    /// was done. An event that was put back and is not settled yet is settled as dead with that.
    async fn update_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
    ) -> Result<Vec<DeadLetterActionResult>>;

    /// The value under a key of a worker's state.
    async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>>;

    /// At most `limit` values of a worker's state whose keys begin with `prefix`, by key in the order of its bytes.
    async fn state_entries(
        &self,
        worker: &str,
        prefix: &str,
        limit: u32,
    ) -> Result<Vec<StateRecord>>;

    /// Counts and ages, by worker; workers that were deployed or have rows.
    async fn totals(&self) -> Result<Vec<WorkerTotals>>;

    /// Removes some of what had its time: published outputs, and inbox records with their attempts. What is dead and may be
    /// put back stays settled. Says whether something was done, and there may be more. Transactions that take their time are
    /// a conflict: try again later.
    async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool>;

    /// Gives the host's lease up and closes all connections once their work is done.
    async fn close(&self);
}

/// The transaction of one batch, or of one request. Dropping it without `commit` rolls it back and gives the connection up.
#[async_trait]
pub trait Tx: Send {
    /// Claims event ids in the inbox: all with one statement, sorted, so that batches that overlap wait for each
    /// other and cannot deadlock. Blocks while another transaction holds one of them uncommitted. `claims` holds
    /// each event id once; the answers are in its order.
    async fn claim(&mut self, claims: &[Claim]) -> Result<Vec<Claimed>>;

    /// Gives claimed event ids back, for members of the batch that failed and did no SQL.
    async fn release_claims(&mut self, event_ids: &[String]) -> Result<()>;

    /// Claims an idempotency key for this transaction, or says what was answered to it. Does not wait for another
    /// transaction that has it.
    async fn claim_request(&mut self, request: &RequestKey) -> Result<ClaimedRequest>;

    /// Keeps the answer to a key that this transaction claimed, for at least so long.
    async fn answer_request(
        &mut self,
        request: &RequestKey,
        answer: &HttpResponse,
        keep: Duration,
    ) -> Result<()>;

    /// Each of these keys as it stands, also those that are not there.
    async fn load_state(&mut self, keys: &[String]) -> Result<Vec<(String, StateSlot)>>;

    /// Applies all changes, each key once, or fails with [`StoreError::Conflict`] when a key moved.
    async fn save_state(&mut self, writes: &[StateWrite]) -> Result<()>;

    /// Makes a place to come back to with [`Tx::rollback_to_savepoint`]; it takes the place of an earlier one.
    async fn savepoint(&mut self) -> Result<()>;

    /// Takes back everything since the savepoint, a guest's failed statement included: the transaction can be committed
    /// again. `Refused` when it cannot, and all that is left is to roll back.
    async fn rollback_to_savepoint(&mut self) -> Result<()>;

    /// Runs a guest's statement and returns its rows. The outer error is the house's, the inner one the guest's to
    /// see; after an inner error that came from the database the transaction can only be rolled back.
    async fn query(
        &mut self,
        statement: &str,
        params: &[Value],
        limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>>;

    /// Like [`Tx::query`], for the number of rows changed.
    async fn execute(
        &mut self,
        statement: &str,
        params: &[Value],
    ) -> Result<std::result::Result<u64, SqlError>>;

    /// Appends outputs with one statement, leased to this host for `lease` so that no sweep takes what is about to
    /// be handed to the relay from memory. Returns those that are due at once, in order; delayed ones are left to
    /// the sweep, and so are those of a key that has an output in trouble.
    async fn append_outputs(
        &mut self,
        outputs: &[Output],
        lease: Duration,
    ) -> Result<Vec<OutboxRow>>;

    /// From here on remembers which rows of workers' tables change.
    async fn track_changes(&mut self) -> Result<()>;

    /// What changed since [`Tx::track_changes`], at most `limit` rows of each table, and what a commit would be refused for. After
    /// that the transaction can only be rolled back.
    async fn changes(&mut self, limit: usize) -> Result<Changes>;

    /// Commits, and says so only when the database confirmed that this very transaction did: `Refused` when a
    /// guest's statement left it aborted, ended it, or breaks a deferred constraint. Never sent twice.
    async fn commit(self: Box<Self>) -> Result<Settled>;

    /// Rolls back. An error here changes nothing: the connection is closed.
    async fn rollback(self: Box<Self>);
}
