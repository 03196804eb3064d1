//! What the rows of either database say: both name their columns the same, count time in microseconds since the epoch, and
//! have 64-bit integers, but for counts and versions of 32 bits.

use std::collections::HashMap;

use anyhow::Context;
use jiff::Timestamp;
use sqlx::postgres::{PgRow, Postgres};
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{Decode, Row, Type};

use super::{
    AttemptRecord, AuditRecord, DeploymentRecord, EditRecord, LetterGroup, LetterOutput, LetterRecord, LetterState,
    LetterSummary, OnStream, OutboxLag, OutboxRow, OutputRecord, OutputSummary, Result, StateRecord, StoreError,
    Unpublished, WorkerTotals, shared,
};
use crate::model::alarm::{Alarm, Kind, Move, Notice};
use crate::model::message::{Message, Origin, Redriven};

/// A value that both databases can give.
pub(super) trait Plain:
    for<'r> Decode<'r, Postgres> + Type<Postgres> + for<'r> Decode<'r, Sqlite> + Type<Sqlite>
{
}

impl<T> Plain for T where T: for<'r> Decode<'r, Postgres> + Type<Postgres> + for<'r> Decode<'r, Sqlite> + Type<Sqlite> {}

/// A row of either database.
pub(super) trait Columns {
    fn get<T: Plain>(&self, column: &str) -> sqlx::Result<T>;

    fn text(&self, column: &str) -> sqlx::Result<String> {
        self.get(column)
    }

    /// A count or a number, neither of which is ever negative.
    fn number(&self, column: &str) -> sqlx::Result<u64> {
        self.get(column).map(shared::unsigned)
    }

    fn number_if_any(&self, column: &str) -> sqlx::Result<Option<u64>> {
        Ok(self.get::<Option<i64>>(column)?.map(shared::unsigned))
    }

    /// The same in a column of 32 bits.
    fn short(&self, column: &str) -> sqlx::Result<u32> {
        self.get(column).map(i32::cast_unsigned)
    }

    fn time(&self, column: &str) -> sqlx::Result<Timestamp> {
        self.get(column).map(shown_time)
    }

    fn time_if_any(&self, column: &str) -> sqlx::Result<Option<Timestamp>> {
        Ok(self.get::<Option<i64>>(column)?.map(shown_time))
    }

    fn bytes(&self, column: &str) -> sqlx::Result<Vec<u8>> {
        self.get(column)
    }
}

impl Columns for PgRow {
    fn get<T: Plain>(&self, column: &str) -> sqlx::Result<T> {
        self.try_get(column)
    }
}

impl Columns for SqliteRow {
    fn get<T: Plain>(&self, column: &str) -> sqlx::Result<T> {
        self.try_get(column)
    }
}

/// A time from a column. The databases keep times of years that cannot be shown: such a time is the first or last that can.
fn shown_time(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 { Timestamp::MIN } else { Timestamp::MAX })
}

/// The rows of a list, for people. One that cannot be read is logged and left out: it does not hide the others.
pub(super) fn list<R: Columns, T>(rows: &[R], read: impl Fn(&R) -> Result<T>) -> Vec<T> {
    let readable = |row: &R| match read(row) {
        Ok(read) => Some(read),
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::error!(error, "row of a list not readable, left out");
            None
        }
    };
    rows.iter().filter_map(readable).collect()
}

/// What was read, or which thing could not be.
fn read<T>(what: &'static str, how: impl FnOnce() -> anyhow::Result<T>) -> Result<T> {
    how().with_context(|| format!("read {what}")).map_err(StoreError::Unavailable)
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
            kind: Kind::read(&kind).with_context(|| format!("`{kind}` is no kind of alarm"))?,
            group,
            times: row.short("times")?,
            value: row.number("value")?,
            threshold: row.number("threshold")?,
            raised_at: row.time("raised_at")?,
            cleared_at: row.time_if_any("cleared_at")?,
            calm_ms: row.number_if_any("calm_ms")?,
            to_do: row.number_if_any("to_do")?.unwrap_or_default(),
        })
    })
}

/// What is to be told of an alarm that moved.
pub(super) fn notice(row: &impl Columns, step: &Move) -> Result<Notice> {
    read("an alarm that moved", || {
        Ok(Notice {
            worker: step.worker.clone(),
            kind: step.kind,
            group: step.group.clone(),
            times: row.short("times")?,
            value: step.value,
            threshold: step.threshold,
            raised_at: row.time("raised_at")?,
            cleared_at: row.time_if_any("cleared_at")?,
            why: step.why.clone(),
        })
    })
}

pub(super) fn attempt(row: &impl Columns) -> Result<AttemptRecord> {
    read("an attempt", || {
        Ok(AttemptRecord {
            attempt: row.short("attempt")?,
            at: row.time("at")?,
            version: row.short("version")?,
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
            version: row.short("version")?,
            digest: row.get("digest")?,
            manifest: row.get("manifest")?,
            created_at: row.time("created_at")?,
        })
    })
}

pub(super) fn letter_group(row: &impl Columns) -> Result<LetterGroup> {
    read("a group", || {
        Ok(LetterGroup {
            group: shared::failure_group(
                row.get("id")?,
                row.get("reason")?,
                row.get("code")?,
                row.get("shape")?,
                row.get("place")?,
            ),
            worker: row.get("worker")?,
            letters: row.number("letters")?,
            first_died_at: row.time("first")?,
            last_died_at: row.time("last")?,
            last_letter: row.get("last_letter")?,
            subject: row.get("subject")?,
        })
    })
}

pub(super) fn letter_summary(row: &impl Columns) -> Result<LetterSummary> {
    read("a dead letter", || {
        Ok(LetterSummary {
            id: row.get("id")?,
            state: LetterState::read(&row.text("state")?)?,
            worker: row.get("worker")?,
            event_id: row.get("event_id")?,
            reason: row.get("reason")?,
            code: row.get("code")?,
            detail: row.get("detail")?,
            group: row.get("group_id")?,
            subject: row.get("subject")?,
            attempts: row.short("attempts")?,
            version: row.short("version")?,
            died_at: row.time("died_at")?,
            generation: row.short("generation")?,
            moved_at: row.time_if_any("moved_at")?,
            stream: row.get("stream")?,
            stream_sequence: row.number_if_any("stream_sequence")?,
        })
    })
}

/// A letter without what stands in other tables.
pub(super) fn letter(row: &impl Columns) -> Result<LetterRecord> {
    let summary = letter_summary(row)?;
    read("a dead letter", || {
        Ok(LetterRecord {
            summary,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            first_died_at: row.time_if_any("first_died_at")?,
            stored_at: row.time("stored_at")?,
            attempts: Vec::new(),
            edits: Vec::new(),
            audit: Vec::new(),
            settled: None,
            outputs: Vec::new(),
        })
    })
}

pub(super) fn letter_edit(row: &impl Columns) -> Result<EditRecord> {
    read("a corrected body", || {
        Ok(EditRecord {
            at: row.time("at")?,
            actor: row.get("actor")?,
            note: row.get("note")?,
            body: row.bytes("body")?.into(),
        })
    })
}

pub(super) fn letter_audit(row: &impl Columns) -> Result<AuditRecord> {
    read("the audit", || {
        Ok(AuditRecord {
            at: row.time("at")?,
            action: row.get("action")?,
            generation: row.short("generation")?,
            actor: row.get("actor")?,
            note: row.get("note")?,
        })
    })
}

/// What became of an event, and when.
pub(super) fn settled(row: &impl Columns) -> Result<(String, Timestamp)> {
    read("an event's record", || Ok((row.text("state")?, row.time("settled_at")?)))
}

pub(super) fn letter_output(row: &impl Columns) -> Result<LetterOutput> {
    read("an output", || {
        let (id, message_id) = output_ids(row)?;
        Ok(LetterOutput {
            id,
            message_id,
            subject: row.get("subject")?,
            stream: row.get("stream")?,
            stream_sequence: row.number_if_any("stream_sequence")?,
        })
    })
}

/// The readable id of an output, and the one it travels with. Where the headers cannot be read, it is the same: a list shows
/// such a row, too.
fn output_ids(row: &impl Columns) -> anyhow::Result<(String, String)> {
    let (headers, id) = (shared::headers_from_text(&row.text("headers")?).unwrap_or_default(), row.text("id")?);
    Ok((crate::model::output_ids::readable(&headers, &id).to_owned(), id))
}

/// The message of a letter that was put back.
pub(super) fn redriven(row: &impl Columns) -> Result<Message> {
    read("a letter that was put back", || {
        let origin = shared::origin(row.get("stream")?, row.get("stream_sequence")?);
        let stored_at = row.time("stored_at")?;
        Ok(Message {
            event_id: row.get("event_id")?,
            subject: row.get("subject")?,
            headers: shared::headers_from_text(&row.text("headers")?)?,
            body: row.bytes("body")?.into(),
            origin: origin.map(|(stream, sequence)| Origin { stream, sequence, stored_at }),
            redriven: Some(Redriven {
                attempts_before: row.short("attempts_before")?,
                payload_sha256: row.bytes("payload_sha256")?.as_slice().try_into().context("read its digest")?,
            }),
        })
    })
}

/// An output by its number, and what becomes of it.
type NotSent = (i64, Unpublished);

/// Outputs that were leased. Those that cannot be read are set aside; the later ones of their keys wait for them, and nothing
/// else does.
pub(super) fn all_leased<R: Columns>(rows: &[R]) -> Result<(Vec<OutboxRow>, Vec<NotSent>)> {
    let (mut leased, mut not_sent) = (Vec::with_capacity(rows.len()), Vec::new());
    let mut first_of_key: HashMap<(String, String), i64> = HashMap::new();
    for row in rows {
        match self::leased(row) {
            Ok(output) => leased.push(output),
            Err(error) => {
                let seq: i64 = read("the number of a leased output", || Ok(row.get("seq")?))?;
                let reason = format!("the row cannot be read: {:#}", anyhow::Error::from(error));
                tracing::error!(number = seq, reason, "output set aside until a person retries or drops it");
                not_sent.push((seq, Unpublished::Aside { reason }));
                if let (Ok(worker), Ok(Some(key))) = (row.text("worker"), row.get::<Option<String>>("ordering_key")) {
                    first_of_key.entry((worker, key)).and_modify(|first| *first = seq.min(*first)).or_insert(seq);
                }
            }
        }
    }
    leased.sort_unstable_by_key(|row| row.seq);
    if !first_of_key.is_empty() {
        leased.retain(|row| {
            let key = row.ordering_key.clone().map(|key| (row.worker.clone(), key));
            let before = key.and_then(|key| first_of_key.get(&key)).filter(|before| **before < row.seq);
            not_sent.extend(before.map(|before| (row.seq, Unpublished::Behind(*before))));
            before.is_none()
        });
    }
    Ok((leased, not_sent))
}

/// An output that was leased.
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
            ahead: Vec::new(),
            first_attempt_at: row.time("first_attempt_at")?,
            failures: row.short("failures")?,
        })
    })
}

pub(super) fn lag(row: &impl Columns) -> Result<OutboxLag> {
    read("how far publishing is behind", || {
        Ok(OutboxLag {
            worker: row.get("worker")?,
            unpublished: row.number("unpublished")?,
            oldest_ms: row.number_if_any("oldest_ms")?,
            set_aside: row.number("set_aside")?,
            held: row.number("held")?,
        })
    })
}

/// A worker, and how many of its outputs had to change their id.
pub(super) fn taken_ids(row: &impl Columns) -> Result<(String, u64)> {
    read("how many ids were taken", || Ok((row.text("worker")?, row.number("taken")?)))
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
            behind: row.get("behind")?,
            waiting: row.number("waiting")?,
            failures: row.short("failures")?,
            error: row.get("last_error")?,
            created_at: row.time_if_any("created")?.unwrap_or_default(),
            due_at: row.time_if_any("due")?.unwrap_or_default(),
            set_aside_at: row.time_if_any("set_aside")?,
            dropped_at: row.time_if_any("dropped")?,
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

/// Where an output was published.
pub(super) fn on_stream(row: &impl Columns) -> Result<OnStream> {
    read("what was published", || {
        Ok(OnStream {
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
            oldest_unpublished_ms: row.number_if_any("oldest_ms")?,
            set_aside: row.number("set_aside")?,
        })
    })
}
