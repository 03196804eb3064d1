//! Outputs as operators see them: parked and dropped ones, and the actions on them.

use std::collections::BTreeMap;

use sqlx::sqlite::SqlitePool;

use super::errors::Doing;
use super::session::Session;
use crate::store::{OutboxLag, OutputFilter, OutputRecord, OutputSummary, Result, rows, shared};

/// The columns of a summary, from the outbox and from dropped outputs. Times are in microseconds.
macro_rules! summaries {
    ($rest:literal) => {
        concat!(
            "with clock as (
                 select cast(unixepoch('subsec') * 1000000 as integer) as now
             ), rows as (
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, body, stream, stream_sequence, blocked_by, null as dropped_at, null as note,
                     case
                         when published_at is not null then 'published'
                         when parked_at is not null then 'parked'
                         when blocked_by is not null then 'blocked'
                         when due_at > now then 'delayed'
                         when leased_until > now then 'leased'
                         else 'due'
                     end as state
                 from oncely_outbox, clock
                 union all
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, body, null, null, null, dropped_at, note, 'dropped'
                 from oncely_dropped_output
             )
             select rows.*, created_at as created, due_at as due, parked_at as parked, dropped_at as dropped,
                 (select count(*) from oncely_outbox as other where other.blocked_by = rows.seq) as waiting
             from rows ",
            $rest
        )
    };
}

/// Parked outputs, or all unpublished ones, oldest first; or dropped outputs, newest first.
pub(super) async fn list(
    readers: &SqlitePool,
    filter: &OutputFilter,
) -> Result<Vec<OutputSummary>> {
    let query = sqlx::query(match (filter.dropped, filter.unpublished) {
        (true, _) => summaries!(
            "where dropped_at is not null and ($1 is null or worker = $1) order by dropped_at desc, seq limit $2"
        ),
        (false, true) => summaries!(
            "where state not in ('published', 'dropped') and ($1 is null or worker = $1) order by seq limit $2"
        ),
        (false, false) => summaries!(
            "where state = 'parked' and parked_at is not null and ($1 is null or worker = $1)
             order by seq limit $2"
        ),
    });
    let rows = query
        .bind(filter.worker.as_deref())
        .bind(filter.limit)
        .fetch_all(readers)
        .await
        .doing("list outputs")?;
    Ok(rows::list(&rows, rows::output_summary))
}

/// One output by its number.
pub(super) async fn find(readers: &SqlitePool, number: i64) -> Result<Option<OutputRecord>> {
    let query = sqlx::query(summaries!("where seq = $1"));
    let row = query
        .bind(number)
        .fetch_optional(readers)
        .await
        .doing("read an output")?;
    row.as_ref().map(rows::output).transpose()
}

/// Makes parked outputs due again. Returns their number.
pub(super) async fn retry(session: &mut Session, numbers: &[i64]) -> Result<u64> {
    let result = sqlx::query(
        "update oncely_outbox
         set parked_at = null, leased_until = cast(unixepoch('subsec') * 1000000 as integer)
         where seq in (select value from json_each($1)) and parked_at is not null",
    )
    .bind(serde_json::json!(numbers).to_string())
    .execute(session.connection().doing("retry outputs")?)
    .await
    .doing("retry outputs")?;
    Ok(result.rows_affected())
}

/// Moves parked outputs to the dropped ones. Returns their number.
pub(super) async fn drop(session: &mut Session, numbers: &[i64], note: &str) -> Result<u64> {
    // Copy the outputs.
    let numbers = serde_json::json!(numbers).to_string();
    sqlx::query(
        "insert into oncely_dropped_output (seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key,
             created_at, due_at, failures, last_error, parked_at, note)
         select seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key, created_at, due_at, failures,
             last_error, parked_at, $2
         from oncely_outbox where seq in (select value from json_each($1)) and parked_at is not null",
    )
    .bind(&numbers)
    .bind(shared::printable(note))
    .execute(session.connection().doing("drop outputs")?)
    .await
    .doing("drop outputs")?;

    // Delete the originals.
    let gone = "delete from oncely_outbox where seq in (select value from json_each($1)) and parked_at is not null";
    let result = sqlx::query(gone)
        .bind(numbers)
        .execute(session.connection().doing("drop outputs")?)
        .await
        .doing("drop outputs")?;
    Ok(result.rows_affected())
}

/// The lag of publishing, by worker.
pub(super) async fn lag(readers: &SqlitePool) -> Result<Vec<OutboxLag>> {
    let rows = sqlx::query(
        "with clock as (
             select cast(unixepoch('subsec') * 1000000 as integer) as now
         ), unpublished as (
             select outbox.worker, outbox.due_at, outbox.parked_at is not null as is_parked,
                 before.parked_at is not null as is_blocked
             from oncely_outbox as outbox left join oncely_outbox as before on before.seq = outbox.blocked_by
             where outbox.published_at is null
         )
         select worker, count(*) filter (where due_at <= now) as unpublished,
             (max(now) - min(due_at) filter (where due_at <= now and not is_parked and not is_blocked)) / 1000 as oldest_ms,
             count(*) filter (where is_parked) as parked, count(*) filter (where is_blocked) as blocked
         from unpublished, clock group by worker order by worker",
    )
    .fetch_all(readers)
    .await
    .doing("measure the lag of publishing")?;
    rows.iter().map(rows::lag).collect()
}

/// The number of outputs that had to change their id, by worker.
pub(super) async fn taken_ids(readers: &SqlitePool) -> Result<BTreeMap<String, u64>> {
    let rows = sqlx::query(
        "select worker, count(*) as taken from oncely_outbox where ids_taken > 0 group by worker",
    )
    .fetch_all(readers)
    .await
    .doing("count taken ids")?;
    rows.iter().map(rows::taken_ids).collect()
}
