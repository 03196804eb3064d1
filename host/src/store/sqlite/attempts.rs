//! Failed attempts, counted outside the transaction they failed in.

use anyhow::Context;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::errors;
use super::session::Session;
use crate::store::{AttemptRecord, FailedAttempt, Result, StoreError, shared};

/// Adds attempts and returns, for each, which one of its event it was.
pub(super) async fn count(session: &mut Session, worker: &str, failed: &[FailedAttempt]) -> Result<Vec<u32>> {
    let doing = |error| errors::of_statement(error, "count failed attempts");
    let mut counts = Vec::with_capacity(failed.len());
    for attempt in failed {
        let row = sqlx::query(
            "insert into oncely_attempt (worker, event_id, attempt, version, code, error, logs)
             select $1, $2, coalesce(max(attempt), 0) + 1, $3, $4, $5, $6
             from oncely_attempt where worker = $1 and event_id = $2
             returning attempt",
        )
        .bind(worker)
        .bind(&attempt.event_id)
        .bind(attempt.version)
        .bind(attempt.code.as_deref().map(shared::printable))
        .bind(shared::printable(&attempt.error))
        .bind(shared::printable(&attempt.logs))
        .fetch_one(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
        counts.push(row.try_get(0).map_err(doing)?);
    }
    Ok(counts)
}

/// Notes that a message is about to be handled alone; returns how often that was noted before and not taken back.
pub(super) async fn note_unfinished(session: &mut Session, worker: &str, event_id: &str) -> Result<u32> {
    let doing = |error| errors::of_statement(error, "note an unfinished message");
    let row = sqlx::query(
        "insert into oncely_unfinished (worker, event_id, times) values ($1, $2, 1)
         on conflict (worker, event_id) do update set times = times + 1
         returning times - 1",
    )
    .bind(worker)
    .bind(event_id)
    .fetch_one(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    row.try_get(0).map_err(doing)
}

/// Takes the note back.
pub(super) async fn take_back_unfinished(session: &mut Session, worker: &str, event_id: &str) -> Result<()> {
    let doing = |error| errors::of_statement(error, "take back an unfinished message");
    sqlx::query("delete from oncely_unfinished where worker = $1 and event_id = $2")
        .bind(worker)
        .bind(event_id)
        .execute(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
    Ok(())
}

/// All attempts at an event, first to last.
pub(super) async fn of_event(readers: &SqlitePool, worker: &str, event_id: &str) -> Result<Vec<AttemptRecord>> {
    let rows = sqlx::query(
        "select attempt, version, code, error, logs, at from oncely_attempt
         where worker = $1 and event_id = $2 order by attempt",
    )
    .bind(worker)
    .bind(event_id)
    .fetch_all(readers)
    .await
    .map_err(|error| errors::of_statement(error, "read attempts"))?;
    rows.iter().map(|row| read(row).context("read an attempt").map_err(StoreError::Unavailable)).collect()
}

fn read(row: &SqliteRow) -> anyhow::Result<AttemptRecord> {
    Ok(AttemptRecord {
        attempt: row.try_get("attempt")?,
        at: shared::timestamp(row.try_get("at")?)?,
        version: row.try_get("version")?,
        code: row.try_get("code")?,
        error: row.try_get("error")?,
        logs: row.try_get("logs")?,
    })
}
