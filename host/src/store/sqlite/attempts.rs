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
    let context = |error| errors::from_statement(error, "count failed attempts");
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
        .fetch_one(session.connection().map_err(context)?)
        .await
        .map_err(context)?;
        let attempt = row.try_get(0).map_err(context)?;
        let is_repeat = is_repeat(session, worker, attempt, given).await?;
        save_recording(session, worker, attempt, given).await?;
        counts.push(CountedAttempt { attempt, is_repeat });
    }
    Ok(counts)
}

/// Whether the attempt before this one has the same proof.
async fn is_repeat(
    session: &mut Session,
    worker: &str,
    attempt: u32,
    given: &FailedAttempt,
) -> Result<bool> {
    let Some(digest) = given
        .recording
        .as_ref()
        .and_then(|recording| recording.digest)
    else {
        return Ok(false);
    };
    let context = |error| errors::from_statement(error, "compare the records of two attempts");
    let row = sqlx::query(
        "select 1 from oncely_recording where worker = $1 and event_id = $2 and attempt = $3 - 1 and digest = $4",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(digest.as_slice())
    .fetch_optional(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
    Ok(row.is_some())
}

/// Keeps the record of an attempt in place of that of the one before.
async fn save_recording(
    session: &mut Session,
    worker: &str,
    attempt: u32,
    given: &FailedAttempt,
) -> Result<()> {
    let Some(recording) = &given.recording else {
        return delete_recording(session, worker, &given.event_id).await;
    };
    let context = |error| errors::from_statement(error, "keep the record of an attempt");
    sqlx::query(
        "insert or replace into oncely_recording (worker, event_id, attempt, digest, recording) values ($1, $2, $3, $4, $5)",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(recording.digest.as_ref().map(<[u8; 32]>::as_slice))
    .bind(recording.json.as_ref())
    .execute(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
    Ok(())
}

/// Forgets the record of an event's last attempt.
pub(super) async fn delete_recording(
    session: &mut Session,
    worker: &str,
    event_id: &str,
) -> Result<()> {
    let context = |error| errors::from_statement(error, "forget the record of an attempt");
    sqlx::query("delete from oncely_recording where worker = $1 and event_id = $2")
        .bind(worker)
        .bind(event_id)
        .execute(session.connection().map_err(context)?)
        .await
        .map_err(context)?;
    Ok(())
}

/// The record of an event's last attempt.
pub(super) async fn recording(
    readers: &SqlitePool,
    worker: &str,
    event_id: &str,
) -> Result<Option<Bytes>> {
    let recording: Option<Vec<u8>> = sqlx::query_scalar(
        "select recording from oncely_recording where worker = $1 and event_id = $2",
    )
    .bind(worker)
    .bind(event_id)
    .fetch_optional(readers)
    .await
    .map_err(|error| errors::from_statement(error, "read the record of an attempt"))?;
    Ok(recording.map(Bytes::from))
}

/// Notes that a message is about to be handled alone; returns how often that was noted before and not taken back.
pub(super) async fn write_crash_marker(
    session: &mut Session,
    worker: &str,
    event_id: &str,
) -> Result<u32> {
    let context = |error| errors::from_statement(error, "note an unfinished message");
    let row = sqlx::query(
        "insert into oncely_crash_marker (worker, event_id, starts) values ($1, $2, 1)
         on conflict (worker, event_id) do update set starts = starts + 1
         returning starts - 1",
    )
    .bind(worker)
    .bind(event_id)
    .fetch_one(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
    row.try_get(0).map_err(context)
}

/// Takes the note back.
pub(super) async fn clear_crash_marker(
    session: &mut Session,
    worker: &str,
    event_id: &str,
) -> Result<()> {
    let context = |error| errors::from_statement(error, "take back an unfinished message");
    sqlx::query("delete from oncely_crash_marker where worker = $1 and event_id = $2")
        .bind(worker)
        .bind(event_id)
        .execute(session.connection().map_err(context)?)
        .await
        .map_err(context)?;
    Ok(())
}

/// All attempts at an event, first to last.
pub(super) async fn for_event(
    readers: &SqlitePool,
    worker: &str,
    event_id: &str,
) -> Result<Vec<AttemptRecord>> {
    let rows = sqlx::query(
        "select attempt, version, code, error, logs, at from oncely_attempt
         where worker = $1 and event_id = $2 order by attempt",
    )
    .bind(worker)
    .bind(event_id)
    .fetch_all(readers)
    .await
    .map_err(|error| errors::from_statement(error, "read attempts"))?;
    Ok(rows::list(&rows, rows::attempt))
}
