//! Decoding of rows of both databases. They share column names, times in microseconds since the
//! epoch, and 64-bit integers, except for 32-bit counts and versions.

use std::collections::HashMap;

use anyhow::Context;
use jiff::Timestamp;
use sqlx::postgres::{PgRow, Postgres};
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{Decode, Row, Type};

use super::{
    AttemptRecord, AuditRecord, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord,
    DeadLetterState, DeadLetterSummary, DeploymentRecord, EditRecord, HistoryPoint, InboxRecord,
    OutboxLag, OutboxRow, OutputRecord, OutputSummary, PublishedOutput, RequestRecord, Result,
    StateRecord, StateSlot, StoreError, Unpublished, WorkerTotals, group_notes, history, shared,
};
use crate::model::alarm::{Alarm, AlarmUpdate, Kind, Notice};
use crate::model::call_times;
use crate::model::message::{Message, Origin, Redriven};

/// A value that both databases can decode.
pub(super) trait CommonType:
    for<'r> Decode<'r, Postgres> + Type<Postgres> + for<'r> Decode<'r, Sqlite> + Type<Sqlite>
{
}

impl<T> CommonType for T where
    T: for<'r> Decode<'r, Postgres> + Type<Postgres> + for<'r> Decode<'r, Sqlite> + Type<Sqlite>
{
}

/// A row of either database.
pub(super) trait Columns {
    fn get<T: CommonType>(&self, column: &str) -> sqlx::Result<T>;

    fn text(&self, column: &str) -> sqlx::Result<String> {
        self.get(column)
    }

    /// A count or a number; never negative.
    fn number(&self, column: &str) -> sqlx::Result<u64> {
        self.get(column).map(shared::unsigned)
    }

    fn optional_number(&self, column: &str) -> sqlx::Result<Option<u64>> {
        Ok(self.get::<Option<i64>>(column)?.map(shared::unsigned))
    }

    /// Like [`Columns::number`], from a 32-bit column.
    fn small_number(&self, column: &str) -> sqlx::Result<u32> {
        self.get(column).map(i32::cast_unsigned)
    }

    fn time(&self, column: &str) -> sqlx::Result<Timestamp> {
        self.get(column).map(clamped_time)
    }

    fn optional_time(&self, column: &str) -> sqlx::Result<Option<Timestamp>> {
        Ok(self.get::<Option<i64>>(column)?.map(clamped_time))
    }

    fn bytes(&self, column: &str) -> sqlx::Result<Vec<u8>> {
        self.get(column)
    }
}

impl Columns for PgRow {
    fn get<T: CommonType>(&self, column: &str) -> sqlx::Result<T> {
        self.try_get(column)
    }
}

impl Columns for SqliteRow {
    fn get<T: CommonType>(&self, column: &str) -> sqlx::Result<T> {
        self.try_get(column)
    }
}

/// A time from a column, clamped to the range of [`Timestamp`]. The databases accept times outside
/// of it.
fn clamped_time(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 {
        Timestamp::MIN
    } else {
        Timestamp::MAX
    })
}

/// Decodes the rows of a list. An unreadable row is logged and skipped, so that it does not hide
/// the others.
pub(super) fn list<R: Columns, T>(rows: &[R], read: impl Fn(&R) -> Result<T>) -> Vec<T> {
    let readable = |row: &R| match read(row) {
        Ok(read) => Some(read),
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::error!(error, "list row unreadable, skipped");
            None
        }
    };
    rows.iter().filter_map(readable).collect()
}

/// Runs `decode`, and names the decoded thing in its error.
fn read<T>(what: &'static str, decode: impl FnOnce() -> anyhow::Result<T>) -> Result<T> {
    decode()
        .with_context(|| format!("read {what}"))
        .map_err(StoreError::Unavailable)
}

/// A key of keyed state as a transaction reads it.
pub(super) fn state_slot(row: &impl Columns) -> sqlx::Result<(String, StateSlot)> {
    let slot = shared::state_slot(row.get("value")?, row.get("version")?, row.get("has_row")?);
    Ok((row.text("key")?, slot))
}

pub(super) fn alarm(row: &impl Columns) -> Result<Alarm> {
    read("an alarm", || {
        let kind = row.text("kind")?;
        let group = shared::failure_group(
            row.get("id")?,
            row.get("reason")?,
            row.get("code")?,
            row.get("shape")?,
            row.get("place")?,
        );
        Ok(Alarm {
            worker: row.get("worker")?,
            kind: Kind::parse(&kind).with_context(|| format!("`{kind}` is not an alarm kind"))?,
            group,
            times: row.small_number("times")?,
            value: row.number("value")?,
            threshold: row.number("threshold")?,
            raised_at: row.time("raised_at")?,
            cleared_at: row.optional_time("cleared_at")?,
            recovering_ms: row.optional_number("recovering_ms")?,
            open_dead_letters: row
                .optional_number("open_dead_letters")?
                .unwrap_or_default(),
        })
    })
}

/// The notice of an alarm update.
pub(super) fn notice(row: &impl Columns, step: &AlarmUpdate) -> Result<Notice> {
    read("an updated alarm", || {
        Ok(Notice {
            worker: step.worker.clone(),
            kind: step.kind,
            group: step.group.clone(),
            times: row.small_number("times")?,
            value: step.value,
            threshold: step.threshold,
            raised_at: row.time("raised_at")?,
            cleared_at: row.optional_time("cleared_at")?,
            why: step.why.clone(),
        })
    })
}

pub(super) fn attempt(row: &impl Columns) -> Result<AttemptRecord> {
    read("an attempt", || {
        Ok(AttemptRecord {
            attempt: row.small_number("attempt")?,
            at: row.time("at")?,
            version: row.small_number("version")?,
            code: row.get("code")?,
            error: row.get("error")?,
            logs: row.get("logs")?,
        })
    })
}

pub(super) fn deployment(row: &impl Columns) -> Result<DeploymentRecord> {
    read("a deployment", || {
        Ok(DeploymentRecord {
            worker: row.get("worker")?,
            version: row.small_number("version")?,
            digest: row.get("digest")?,
            manifest: row.get("manifest")?,
            created_at: row.time("created_at")?,
        })
    })
}

pub(super) fn dead_letter_group(row: &impl Columns) -> Result<DeadLetterGroup> {
    read("a dead-letter group", || {
        Ok(DeadLetterGroup {
            group: shared::failure_group(
                row.get("id")?,
                row.get("reason")?,
                row.get("code")?,
                row.get("shape")?,
                row.get("place")?,
            ),
            worker: row.get("worker")?,
            dead_letters: row.number("dead_letters")?,
            first_died_at: row.time("first")?,
            last_died_at: row.time("last")?,
            last_dead_letter: row.get("last_dead_letter")?,
            note: group_notes::read(row)?,
            subject: row.get("subject")?,
        })
    })
}

pub(super) fn dead_letter_summary(row: &impl Columns) -> Result<DeadLetterSummary> {
    read("a dead letter", || {
        Ok(DeadLetterSummary {
            id: row.get("id")?,
            state: DeadLetterState::parse(&row.text("state")?)?,
            worker: row.get("worker")?,
            event_id: row.get("event_id")?,
            reason: row.get("reason")?,
            code: row.get("code")?,
            detail: row.get("detail")?,
            group: row.get("group_id")?,
            subject: row.get("subject")?,
            attempts: row.small_number("attempts")?,
            version: row.small_number("version")?,
            died_at: row.time("died_at")?,
            generation: row.small_number("generation")?,
            last_action_at: row.optional_time("last_action_at")?,
            stream: row.get("stream")?,
            stream_sequence: row.optional_number("stream_sequence")?,
        })
    })
}

/// A dead letter without its rows in other tables.
pub(super) fn dead_letter(row: &impl Columns) -> Result<DeadLetterRecord> {
    let summary = dead_letter_summary(row)?;
    read("a dead letter", || {
        Ok(DeadLetterRecord {
            summary,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            first_died_at: row.optional_time("first_died_at")?,
            stored_at: row.time("stored_at")?,
            attempts: Vec::new(),
            edits: Vec::new(),
            audit: Vec::new(),
            inbox: None,
            outputs: Vec::new(),
        })
    })
}

pub(super) fn dead_letter_edit(row: &impl Columns) -> Result<EditRecord> {
    read("a corrected body", || {
        Ok(EditRecord {
            at: row.time("at")?,
            actor: row.get("actor")?,
            note: row.get("note")?,
            body: row.bytes("body")?.into(),
        })
    })
}

pub(super) fn dead_letter_audit(row: &impl Columns) -> Result<AuditRecord> {
    read("an audit entry", || {
        Ok(AuditRecord {
            at: row.time("at")?,
            action: row.get("action")?,
            generation: row.small_number("generation")?,
            actor: row.get("actor")?,
            stated_name: row.get("stated_name")?,
            note: row.get("note")?,
        })
    })
}

pub(super) fn inbox(row: &impl Columns) -> Result<InboxRecord> {
    read("an inbox record", || {
        Ok(InboxRecord {
            state: row.text("state")?,
            settled_at: row.time("settled_at")?,
            payload_sha256: hex::encode(row.bytes("payload_sha256")?),
            stream: row.get("stream")?,
            stream_sequence: row.optional_number("stream_sequence")?,
        })
    })
}

/// An answered request. The status is a 32-bit column on PostgreSQL.
pub(super) fn request(row: &impl Columns) -> Result<RequestRecord> {
    let (status, headers, body) = read("a stored response", || {
        let status: i32 = row.get("status")?;
        Ok((status, row.text("headers")?, row.bytes("body")?))
    })?;
    let response = shared::stored_response(status.into(), &headers, body)?;
    read("an answered request", || {
        Ok(RequestRecord {
            caller: row.get("caller")?,
            answered_at: row.time("answered_at")?,
            expires_at: row.time("expires_at")?,
            response,
        })
    })
}

pub(super) fn history_point(row: &impl Columns) -> Result<HistoryPoint> {
    read("the history of a worker", || {
        let calls = history::total_calls(&row.text("calls")?);
        Ok(HistoryPoint {
            worker: row.get("worker")?,
            at: row.time("at")?,
            done: row.number("done")?,
            retries: row.number("retries")?,
            dead: row.number("dead")?,
            lag_ms: row.number("lag_ms")?,
            p50_us: call_times::quantile_us(&calls, 0.5),
            p99_us: call_times::quantile_us(&calls, 0.99),
        })
    })
}

pub(super) fn worker_name(row: &impl Columns) -> Result<String> {
    read("the name of a worker", || Ok(row.text("worker")?))
}

/// The state of an inbox row, with the time of the commit.
pub(super) fn inbox_state(row: &impl Columns) -> Result<(String, Timestamp)> {
    read("an inbox record", || {
        Ok((row.text("state")?, row.time("settled_at")?))
    })
}

pub(super) fn dead_letter_output(row: &impl Columns) -> Result<DeadLetterOutput> {
    read("an output", || {
        let (id, message_id) = output_ids(row)?;
        Ok(DeadLetterOutput {
            id,
            message_id,
            subject: row.get("subject")?,
            stream: row.get("stream")?,
            stream_sequence: row.optional_number("stream_sequence")?,
        })
    })
}

/// The readable id of an output and its message id. If the headers cannot be read, both are the
/// message id, so that a list can show the row.
fn output_ids(row: &impl Columns) -> anyhow::Result<(String, String)> {
    let (headers, id) = (
        shared::headers_from_text(&row.text("headers")?).unwrap_or_default(),
        row.text("id")?,
    );
    Ok((
        crate::model::output_ids::readable_id(&headers, &id).to_owned(),
        id,
    ))
}

/// The message of a redriven dead letter.
pub(super) fn redriven(row: &impl Columns) -> Result<Message> {
    read("a redriven dead letter", || {
        let origin = shared::origin(row.get("stream")?, row.get("stream_sequence")?);
        let stored_at = row.time("stored_at")?;
        Ok(Message {
            event_id: row.get("event_id")?,
            subject: row.get("subject")?,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            origin: origin.map(|(stream, sequence)| Origin {
                stream,
                sequence,
                stored_at,
            }),
            redriven: Some(Redriven {
                attempts_before: row.small_number("attempts_before")?,
                payload_sha256: row
                    .bytes("payload_sha256")?
                    .as_slice()
                    .try_into()
                    .context("read its digest")?,
            }),
        })
    })
}

/// The number of an output, and how to release it.
type ReleasedOutput = (i64, Unpublished);

/// Decodes leased outputs. An unreadable one is parked; only the later outputs of its key are
/// blocked by it.
pub(super) fn leased_outputs<R: Columns>(
    rows: &[R],
) -> Result<(Vec<OutboxRow>, Vec<ReleasedOutput>)> {
    let (mut leased, mut not_leased) = (Vec::with_capacity(rows.len()), Vec::new());
    let mut first_of_key: HashMap<(String, String), i64> = HashMap::new();
    for row in rows {
        match self::leased(row) {
            Ok(output) => leased.push(output),
            Err(error) => {
                let seq: i64 = read("the number of a leased output", || Ok(row.get("seq")?))?;
                let reason = format!("the row is unreadable: {:#}", anyhow::Error::from(error));
                tracing::error!(
                    number = seq,
                    reason,
                    "unreadable output parked until an operator retries or drops it"
                );
                not_leased.push((seq, Unpublished::Parked { reason }));
                if let (Ok(worker), Ok(Some(key))) = (
                    row.text("worker"),
                    row.get::<Option<String>>("ordering_key"),
                ) {
                    first_of_key
                        .entry((worker, key))
                        .and_modify(|first| *first = seq.min(*first))
                        .or_insert(seq);
                }
            }
        }
    }
    leased.sort_unstable_by_key(|row| row.seq);
    if !first_of_key.is_empty() {
        leased.retain(|row| {
            let key = row
                .ordering_key
                .clone()
                .map(|key| (row.worker.clone(), key));
            let before = key
                .and_then(|key| first_of_key.get(&key))
                .filter(|before| **before < row.seq);
            not_leased.extend(before.map(|before| (row.seq, Unpublished::BlockedBy(*before))));
            before.is_none()
        });
    }
    Ok((leased, not_leased))
}

/// Decodes one leased output.
fn leased(row: &impl Columns) -> Result<OutboxRow> {
    read("a leased output", || {
        Ok(OutboxRow {
            seq: row.get("seq")?,
            id: row.get("id")?,
            worker: row.get("worker")?,
            subject: row.get("subject")?,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            ordering_key: row.get("ordering_key")?,
            blocked_by: Vec::new(),
            group: row.get("group_number")?,
            first_attempt_at: row.time("first_attempt_at")?,
            failures: row.small_number("failures")?,
        })
    })
}

pub(super) fn lag(row: &impl Columns) -> Result<OutboxLag> {
    read("the publishing lag", || {
        Ok(OutboxLag {
            worker: row.get("worker")?,
            unpublished: row.number("unpublished")?,
            oldest_ms: row.optional_number("oldest_ms")?,
            parked: row.number("parked")?,
            blocked: row.number("blocked")?,
        })
    })
}

/// A worker, and how many of its outputs changed their id because it was taken.
pub(super) fn taken_ids(row: &impl Columns) -> Result<(String, u64)> {
    read("a count of taken ids", || {
        Ok((row.text("worker")?, row.number("taken")?))
    })
}

pub(super) fn output_summary(row: &impl Columns) -> Result<OutputSummary> {
    read("an output", || {
        let (id, message_id) = output_ids(row)?;
        Ok(OutputSummary {
            number: row.get("seq")?,
            id,
            message_id,
            worker: row.get("worker")?,
            event_id: row.get("event_id")?,
            subject: row.get("subject")?,
            ordering_key: row.get("ordering_key")?,
            state: row.get("state")?,
            blocked_by: row.get("blocked_by")?,
            waiting: row.number("waiting")?,
            failures: row.small_number("failures")?,
            error: row.get("last_error")?,
            created_at: row.optional_time("created")?.unwrap_or_default(),
            due_at: row.optional_time("due")?.unwrap_or_default(),
            parked_at: row.optional_time("parked")?,
            dropped_at: row.optional_time("dropped")?,
            note: row.get("note")?,
        })
    })
}

pub(super) fn output(row: &impl Columns) -> Result<OutputRecord> {
    let summary = output_summary(row)?;
    read("an output", || {
        Ok(OutputRecord {
            summary,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            place: shared::origin(row.get("stream")?, row.get("stream_sequence")?),
        })
    })
}

/// A published output with its place on the stream.
pub(super) fn published_output(row: &impl Columns) -> Result<PublishedOutput> {
    read("a published output", || {
        Ok(PublishedOutput {
            seq: row.get("seq")?,
            id: row.get("id")?,
            stream: row.get("stream")?,
            stream_sequence: row.number("stream_sequence")?,
            published_at: row.time("published_at")?,
        })
    })
}

pub(super) fn state(row: &impl Columns) -> Result<StateRecord> {
    read("state", || {
        Ok(StateRecord {
            key: row.get("key")?,
            version: row.number("version")?,
            size: row.number("size")?,
            updated_at: row.time("updated_at")?,
            value: row.bytes("value")?.into(),
        })
    })
}

pub(super) fn totals(row: &impl Columns) -> Result<WorkerTotals> {
    read("totals", || {
        Ok(WorkerTotals {
            worker: row.get("worker")?,
            done: row.number("done")?,
            dead: row.number("dead")?,
            outputs: row.number("outputs")?,
            unpublished: row.number("unpublished")?,
            oldest_unpublished_ms: row.optional_number("oldest_ms")?,
            parked: row.number("parked")?,
        })
    })
}
