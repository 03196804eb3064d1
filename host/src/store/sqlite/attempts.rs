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
