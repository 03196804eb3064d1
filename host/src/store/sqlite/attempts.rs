//! Failed attempts, counted outside the transaction they failed in.

use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::SqlitePool;

use super::errors;
use super::session::Session;
use crate::store::{AttemptRecord, CountedAttempt, FailedAttempt, Result, rows, shared};

/// Adds attempts, keeps their records, and returns for each which one of its event it was.
pub(super) async fn count(
    session: &mut Session,
    worker: &str,
    failed: &[FailedAttempt],
) -> Result<Vec<CountedAttempt>> {
    let doing = |error| errors::of_statement(error, "count failed attempts");
    let mut counts = Vec::with_capacity(failed.len());
    for given in failed {
        let row = sqlx::query(
            "insert into oncely_attempt (worker, event_id, attempt, version, code, error, logs)
             select $1, $2, coalesce(max(attempt), 0) + 1, $3, $4, $5, $6
             from oncely_attempt where worker = $1 and event_id = $2
             returning attempt",
        )
        .bind(worker)
        .bind(&given.event_id)
        .bind(given.version)
        .bind(given.code.as_deref().map(shared::printable))
        .bind(shared::printable(&given.error))
        .bind(shared::printable(&given.logs))
        .fetch_one(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
        let attempt = row.try_get(0).map_err(doing)?;
        let repeats = repeats(session, worker, attempt, given).await?;
        keep_record(session, worker, attempt, given).await?;
        counts.push(CountedAttempt { attempt, repeats });
    }
    Ok(counts)
}

/// Whether the attempt before this one has the same proof.
async fn repeats(session: &mut Session, worker: &str, attempt: u32, given: &FailedAttempt) -> Result<bool> {
    let Some(proof) = given.record.as_ref().and_then(|record| record.proof) else { return Ok(false) };
    let doing = |error| errors::of_statement(error, "compare the records of two attempts");
    let row = sqlx::query(
        "select 1 from oncely_record where worker = $1 and event_id = $2 and attempt = $3 - 1 and proof = $4",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(proof.as_slice())
    .fetch_optional(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(row.is_some())
}

/// Keeps the record of an attempt in place of that of the one before.
async fn keep_record(session: &mut Session, worker: &str, attempt: u32, given: &FailedAttempt) -> Result<()> {
    let Some(record) = &given.record else { return forget_record(session, worker, &given.event_id).await };
    let doing = |error| errors::of_statement(error, "keep the record of an attempt");
    sqlx::query(
        "insert or replace into oncely_record (worker, event_id, attempt, proof, record) values ($1, $2, $3, $4, $5)",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(record.proof.as_ref().map(<[u8; 32]>::as_slice))
    .bind(record.json.as_ref())
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}

/// Forgets the record of an event's last attempt.
pub(super) async fn forget_record(session: &mut Session, worker: &str, event_id: &str) -> Result<()> {
    let doing = |error| errors::of_statement(error, "forget the record of an attempt");
    sqlx::query("delete from oncely_record where worker = $1 and event_id = $2")
        .bind(worker)
        .bind(event_id)
        .execute(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
    Ok(())
}

/// The record of an event's last attempt.
pub(super) async fn record(readers: &SqlitePool, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
    let record: Option<Vec<u8>> =
        sqlx::query_scalar("select record from oncely_record where worker = $1 and event_id = $2")
            .bind(worker)
            .bind(event_id)
            .fetch_optional(readers)
            .await
            .map_err(|error| errors::of_statement(error, "read the record of an attempt"))?;
    Ok(record.map(Bytes::from))
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
    Ok(rows::list(&rows, rows::attempt))
}
