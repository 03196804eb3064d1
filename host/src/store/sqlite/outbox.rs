//! The outbox: what committed and is to be published.

use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::errors;
use super::session::Session;
use crate::fault;
use crate::store::{OutboxRow, Output, Published, Result, StoreError, shared};

/// Appends the outputs of one worker; see [`append_for`].
pub(super) async fn append(
    session: &mut Session,
    worker: &str,
    outputs: &[Output],
    lease: Duration,
) -> Result<Vec<OutboxRow>> {
    let outputs: Vec<_> = outputs.iter().map(|output| (worker, output)).collect();
    append_for(session, &outputs, lease).await
}

/// Appends outputs, each with its worker, in order. Those that are due at once are leased to this host and returned;
/// delayed ones are leased to nobody, but only due after their delay.
pub(super) async fn append_for(
    session: &mut Session,
    outputs: &[(&str, &Output)],
    lease: Duration,
) -> Result<Vec<OutboxRow>> {
    let mut appended = Vec::new();
    for (worker, output) in outputs {
        let row = insert(session, worker, output, lease).await?;
        let read = || -> anyhow::Result<_> {
            let first_attempt_at: Option<i64> = row.try_get(1)?;
            Ok((row.try_get(0)?, first_attempt_at.map(shared::timestamp).transpose()?))
        };
        let (seq, first_attempt_at) = read().context("read an appended output").map_err(StoreError::Unavailable)?;
        if let Some(first_attempt_at) = first_attempt_at {
            appended.push(shared::handed_over(seq, worker, output, first_attempt_at));
        }
    }
    Ok(appended)
}

async fn insert(session: &mut Session, worker: &str, output: &Output, lease: Duration) -> Result<SqliteRow> {
    let doing = |error| errors::of_statement(error, "append an output");
    sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
         insert into oncely_outbox (worker, id, event_id, ordinal, subject, headers, body, ordering_key, leased_until,
             first_attempt_at)
         select $1, $2, $3, $4, $5, $6, $7, $8, now + iif($9 = 0, $10, $9), iif($9 = 0, now, null) from clock
         returning seq, first_attempt_at",
    )
    .bind(worker)
    .bind(&output.id)
    .bind(&output.event_id)
    .bind(output.ordinal)
    .bind(&output.subject)
    .bind(shared::headers_to_text(&output.headers)?)
    .bind(output.body.as_ref())
    .bind(output.ordering_key.as_deref())
    .bind(shared::micros(output.delay))
    .bind(shared::micros(lease))
    .fetch_one(session.connection().map_err(doing)?)
    .await
    .map_err(doing)
}

/// Leases what is due, oldest first.
pub(super) async fn lease(session: &mut Session, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
    let doing = |error| errors::of_statement(error, "lease outputs");
    let rows = sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
         update oncely_outbox
         set leased_until = now + $2, first_attempt_at = coalesce(first_attempt_at, now)
         from clock
         where seq in (
             select seq from oncely_outbox, clock
             where published_at is null and leased_until <= now
             order by leased_until, seq limit $1)
         returning seq, id, worker, subject, headers, body, failures, first_attempt_at",
    )
    .bind(limit)
    .bind(shared::micros(lease))
    .fetch_all(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    let leased: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    let mut leased = leased.context("read leased outputs").map_err(StoreError::Unavailable)?;
    leased.sort_unstable_by_key(|row| row.seq);
    Ok(leased)
}

/// Records where outputs are. All of them must be there.
pub(super) async fn mark_published(session: &mut Session, published: &[Published]) -> Result<()> {
    let doing = |error| errors::of_statement(error, "mark outputs as published");
    let given: Vec<_> = published
        .iter()
        .map(|place| serde_json::json!({"seq": place.seq, "stream": place.stream, "sequence": place.stream_sequence}))
        .collect();
    let result = sqlx::query(
        "update oncely_outbox
         set published_at = coalesce(published_at, cast(unixepoch('subsec') * 1000000 as integer)),
             stream = given.value ->> 'stream', stream_sequence = given.value ->> 'sequence'
         from json_each($1) as given
         where oncely_outbox.seq = given.value ->> 'seq'",
    )
    .bind(serde_json::Value::Array(given).to_string())
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    if fault::mutant(fault::MARK_WITHOUT_FILTER) {
        let everything =
            "update oncely_outbox set published_at = 0, stream = '', stream_sequence = 0 where published_at is null";
        sqlx::raw_sql(everything).execute(session.connection().map_err(doing)?).await.map_err(doing)?;
    }
    shared::check_count(result.rows_affected(), published.len())
}

/// Gives leases up: due again after `delay`, with one more failure.
pub(super) async fn defer(session: &mut Session, seqs: &[i64], delay: Duration, error: &str) -> Result<()> {
    let doing = |error| errors::of_statement(error, "defer outputs");
    sqlx::query(
        "update oncely_outbox
         set leased_until = cast(unixepoch('subsec') * 1000000 as integer) + $2, failures = failures + 1,
             last_error = $3
         where seq in (select value from json_each($1)) and published_at is null",
    )
    .bind(serde_json::json!(seqs).to_string())
    .bind(shared::micros(delay))
    .bind(shared::printable(error))
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}

fn read(row: &SqliteRow) -> anyhow::Result<OutboxRow> {
    Ok(OutboxRow {
        seq: row.try_get("seq")?,
        id: row.try_get("id")?,
        worker: row.try_get("worker")?,
        subject: row.try_get("subject")?,
        headers: shared::headers_from_text(row.try_get("headers")?)?,
        body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        first_attempt_at: shared::timestamp(row.try_get("first_attempt_at")?)?,
        failures: row.try_get("failures")?,
    })
}
