//! Reading dead letters: the original bytes and headers of messages, and their failure history.

use super::errors::Doing;
use jiff::Timestamp;
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool};

use super::attempts;
use crate::store::{
    AuditRecord, DeadLetterFilter, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord,
    DeadLetterSummary, EditRecord, Result, rows,
};

/// The columns of a dead letter in a list. The inbox shows whether a redriven one took effect.
macro_rules! summaries {
    ($also:literal, $($which:tt)+) => {
        concat!(
            "select * from (
                 select id, worker, event_id, reason, code, detail, subject, attempts, version, generation, stream,
                     stream_sequence, group_id, case when state = 'redriven' and exists (
                         select 1 from oncely_inbox as inbox where inbox.worker = dead_letter.worker
                             and inbox.event_id = dead_letter.event_id and inbox.state = 'done')
                     then 'done' else state end as state,
                     died_at,
                     last_action_at",
            $also,
            " from oncely_dead_letter as dead_letter where ",
            $($which)+,
            ")"
        )
    };
}

/// The conditions of a filter, without its subjects; see [`fitting`].
macro_rules! fits {
    () => {
        "($1 is null or worker = $1) and ($2 is null or reason = $2)
         and ($3 is null or code = $3) and ($4 = '[]' or id in (select value from json_each($4)))
         and ($5 is null or id < $5)
         and ($6 is null or died_at >= $6)
         and ($7 is null or died_at < $7)
         and ($8 is null or group_id = $8)"
    };
}

/// The same for open and redriven dead letters. The query must still exclude those that took
/// effect.
macro_rules! fits_and_waits {
    () => {
        concat!("state in ('open', 'redriven') and ", fits!())
    };
}

/// Binds the values of a filter to a query.
fn fitting<'q>(
    query: Query<'q, Sqlite, SqliteArguments>,
    filter: &'q DeadLetterFilter,
) -> Query<'q, Sqlite, SqliteArguments> {
    query
        .bind(filter.worker.as_deref())
        .bind(filter.reason.as_deref())
        .bind(filter.code.as_deref())
        .bind(serde_json::json!(filter.ids).to_string())
        .bind(filter.below)
        .bind(filter.since.map(|time| time.as_microsecond()))
        .bind(filter.until.map(|time| time.as_microsecond()))
        .bind(filter.group.as_deref())
}

/// One page of dead letters, newest first.
pub(super) async fn list(
    readers: &SqlitePool,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterSummary>> {
    let query = sqlx::query(if filter.closed {
        concat!(summaries!("", fits!()), " order by id desc limit $9")
    } else {
        concat!(
            summaries!("", fits_and_waits!()),
            " where state <> 'done' order by id desc limit $9"
        )
    });
    let rows = fitting(query, filter)
        .bind(filter.limit)
        .fetch_all(readers)
        .await
        .doing("list dead letters")?;
    Ok(rows::list(&rows, rows::dead_letter_summary))
}

/// The number of dead letters that match a filter, and their times, by group and subject.
pub(super) async fn groups(
    readers: &SqlitePool,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterGroup>> {
    macro_rules! grouped {
        ($dead_letters:expr, $which:literal) => {
            concat!(
                "with found as (",
                $dead_letters,
                $which,
                "), grouped as (
                     select group_id, worker, subject, count(*) as dead_letters, min(died_at) as first, max(died_at) as last,
                         max(id) as last_dead_letter
                     from found group by group_id, worker, subject
                 )
                 select grouped.*, dead_letter_group.id, reason, code, shape, place
                 from grouped left join oncely_dead_letter_group as dead_letter_group on dead_letter_group.id = grouped.group_id"
            )
        };
    }
    let query = sqlx::query(if filter.closed {
        grouped!(summaries!("", fits!()), "")
    } else {
        grouped!(summaries!("", fits_and_waits!()), " where state <> 'done'")
    });
    let rows = fitting(query, filter)
        .fetch_all(readers)
        .await
        .doing("group dead letters")?;
    Ok(rows::list(&rows, rows::dead_letter_group))
}

/// One dead letter, with its failure history, edits, audit records and outputs.
pub(super) async fn find(readers: &SqlitePool, id: i64) -> Result<Option<DeadLetterRecord>> {
    let query = sqlx::query(summaries!(
        ", headers, body, first_died_at, coalesce(stored_at, first_died_at, died_at) as stored_at",
        "id = $1"
    ));
    let row = query
        .bind(id)
        .fetch_optional(readers)
        .await
        .doing("read a dead letter")?;
    let Some(row) = row else { return Ok(None) };
    let mut dead_letter = rows::dead_letter(&row)?;
    let (worker, event_id) = (
        dead_letter.summary.worker.clone(),
        dead_letter.summary.event_id.clone(),
    );
    dead_letter.attempts = attempts::for_event(readers, &worker, &event_id).await?;
    dead_letter.edits = edits(readers, id).await?;
    dead_letter.audit = audit(readers, id).await?;
    dead_letter.inbox = inbox_state(readers, &worker, &event_id).await?;
    dead_letter.outputs = outputs(readers, &worker, &event_id).await?;
    Ok(Some(dead_letter))
}

async fn edits(readers: &SqlitePool, id: i64) -> Result<Vec<EditRecord>> {
    let query = sqlx::query(
        "select actor, note, body, at
         from oncely_dead_letter_edit where dead_letter_id = $1 order by edit",
    );
    let rows = query
        .bind(id)
        .fetch_all(readers)
        .await
        .doing("read corrected bodies")?;
    Ok(rows::list(&rows, rows::dead_letter_edit))
}

async fn audit(readers: &SqlitePool, id: i64) -> Result<Vec<AuditRecord>> {
    let query = sqlx::query(
        "select action, generation, actor, note, at
         from oncely_dead_letter_audit where dead_letter_id = $1 order by seq",
    );
    let rows = query
        .bind(id)
        .fetch_all(readers)
        .await
        .doing("read the audit records of a dead letter")?;
    Ok(rows::list(&rows, rows::dead_letter_audit))
}

async fn inbox_state(
    readers: &SqlitePool,
    worker: &str,
    event_id: &str,
) -> Result<Option<(String, Timestamp)>> {
    let query = sqlx::query(
        "select state, settled_at from oncely_inbox
         where worker = $1 and event_id = $2",
    );
    let row = query
        .bind(worker)
        .bind(event_id)
        .fetch_optional(readers)
        .await
        .doing("look up an event")?;
    row.as_ref().map(rows::inbox_state).transpose()
}

async fn outputs(
    readers: &SqlitePool,
    worker: &str,
    event_id: &str,
) -> Result<Vec<DeadLetterOutput>> {
    let query = sqlx::query(
        "select id, headers, subject, stream, stream_sequence from oncely_outbox
         where worker = $1 and event_id = $2 and subject not like 'oncely.%' order by seq",
    );
    let rows = query
        .bind(worker)
        .bind(event_id)
        .fetch_all(readers)
        .await
        .doing("look up an event's outputs")?;
    Ok(rows::list(&rows, rows::dead_letter_output))
}
