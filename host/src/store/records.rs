//! The values that go into the database and come out of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;

use crate::model::alarm;
use crate::model::message::Headers;
use crate::model::output_ids;
use crate::model::schema::Time;
use crate::model::verdict::Settled;

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
    /// The number of the group that it belongs to, on PostgreSQL. The outcomes of all outputs of a
    /// group are recorded together, see [`GroupOutcome`].
    pub group: Option<i64>,
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

/// The outcomes of a group of outputs that is leased to this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOutcome {
    /// The number of the group.
    pub number: i64,
    /// Outputs that are on their streams.
    pub published: Vec<Published>,
    /// Outputs that were not published, each by its number and with how to release it.
    pub unpublished: Vec<(i64, Unpublished)>,
    /// The numbers of outputs without an outcome. They stay leased, each by itself.
    pub leased: Vec<i64>,
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
#[derive(
    Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct OutputFilter {
    /// The name of a worker; `None` for all workers.
    pub worker: Option<String>,
    /// All unpublished outputs, not only parked ones.
    #[serde(default)]
    pub unpublished: bool,
    /// Dropped outputs instead.
    #[serde(default)]
    pub dropped: bool,
    /// Only outputs to this stream, by its subjects; `None` for all streams.
    #[serde(default)]
    pub stream: Option<String>,
    /// Only these subjects, with NATS wildcards; all if it is empty. The API sets those of
    /// `stream`.
    #[serde(skip)]
    pub subjects: Vec<String>,
    /// The maximum number of results. With subjects that have wildcards, there may be fewer.
    pub limit: u32,
}

/// One output in a list.
#[derive(
    Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
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
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// When it may be published, after its delay or after a failed attempt.
    #[schemars(with = "Time")]
    pub due_at: Timestamp,
    /// When it was parked; `None` if it is not parked.
    #[schemars(with = "Option<Time>")]
    pub parked_at: Option<Timestamp>,
    /// When it was dropped; `None` if it is not dropped.
    #[schemars(with = "Option<Time>")]
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
#[derive(
    Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
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
