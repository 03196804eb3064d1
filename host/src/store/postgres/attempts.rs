//! Failed attempts, counted outside the transaction they failed in.

use anyhow::Context;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::errors;
use super::session::Session;
use crate::store::{AttemptRecord, FailedAttempt, Result, StoreError, shared};

/// Adds attempts and returns, for each, which one of its event it was. Two hosts that count the same event at the same
/// moment are a conflict.
pub(super) async fn count(session: &mut Session, worker: &str, failed: &[FailedAttempt]) -> Result<Vec<u32>> {
    let event_ids: Vec<&str> = failed.iter().map(|attempt| attempt.event_id.as_str()).collect();
    let versions: Vec<i32> = failed.iter().map(|attempt| attempt.version.cast_signed()).collect();
    let codes: Vec<Option<_>> = failed.iter().map(|attempt| attempt.code.as_deref().map(shared::printable)).collect();
    let errors: Vec<_> = failed.iter().map(|attempt| shared::printable(&attempt.error)).collect();
    let logs: Vec<_> = failed.iter().map(|attempt| shared::printable(&attempt.logs)).collect();
    let query = session.query(
        "with given as (
             select * from unnest($2::text[], $3::integer[], $4::text[], $5::text[], $6::text[]) with ordinality
                 as given (event_id, version, code, error, logs, place)
         ), counted as (
             select given.*, (pg_catalog.row_number() over (partition by event_id order by place)
                 + (select coalesce(pg_catalog.max(attempt), 0) from oncely.attempt
                    where attempt.worker = $1 and attempt.event_id = given.event_id))::integer as attempt
             from given
         ), inserted as (
             insert into oncely.attempt (worker, event_id, attempt, version, code, error, logs)
             select $1, event_id, attempt, version, code, error, logs from counted order by event_id, attempt
         )
         select attempt from counted order by place",
    );
    let rows = query
        .bind(worker)
        .bind(event_ids)
        .bind(versions)
        .bind(codes)
        .bind(errors)
        .bind(logs)
        .fetch_all(session.connection())
        .await
        .map_err(|error| match errors::is_unique_violation(&error) {
            true => StoreError::Conflict(anyhow::Error::new(error).context("count failed attempts")),
            false => errors::of_statement(error, "count failed attempts"),
        })?;
    let counts: sqlx::Result<Vec<i32>> = rows.iter().map(|row| row.try_get(0)).collect();
    let counts = counts.map_err(|error| errors::of_statement(error, "read the count of attempts"))?;
    Ok(counts.into_iter().map(|count| shared::narrow(count.into())).collect())
}

/// Notes that a message is about to be handled alone; returns how often that was noted before and not taken back.
pub(super) async fn note_unfinished(session: &mut Session, worker: &str, event_id: &str) -> Result<u32> {
    let query = session.query(
        "insert into oncely.unfinished (worker, event_id, times) values ($1, $2, 1)
         on conflict (worker, event_id) do update set times = unfinished.times + 1
         returning times - 1",
    );
    let row = query
        .bind(worker)
        .bind(event_id)
        .fetch_one(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "note an unfinished message"))?;
    let before: i32 = row.try_get(0).map_err(|error| errors::of_statement(error, "read an unfinished message"))?;
    Ok(before.cast_unsigned())
}

/// Takes the note back.
pub(super) async fn take_back_unfinished(session: &mut Session, worker: &str, event_id: &str) -> Result<()> {
    let query = session.query("delete from oncely.unfinished where worker = $1 and event_id = $2");
    query
        .bind(worker)
        .bind(event_id)
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "take back an unfinished message"))?;
    Ok(())
}

/// All attempts at an event, first to last.
pub(super) async fn of_event(session: &mut Session, worker: &str, event_id: &str) -> Result<Vec<AttemptRecord>> {
    let query = session.query(
        "select attempt, version, code, error, logs, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.attempt where worker = $1 and event_id = $2 order by attempt",
    );
    let rows = query
        .bind(worker)
        .bind(event_id)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read attempts"))?;
    rows.iter().map(|row| read(row).context("read an attempt").map_err(StoreError::Unavailable)).collect()
}

fn read(row: &PgRow) -> anyhow::Result<AttemptRecord> {
    Ok(AttemptRecord {
        attempt: row.try_get::<i32, _>("attempt")?.cast_unsigned(),
        at: shared::timestamp(row.try_get("at")?)?,
        version: row.try_get::<i32, _>("version")?.cast_unsigned(),
        code: row.try_get("code")?,
        error: row.try_get("error")?,
        logs: row.try_get("logs")?,
    })
}
