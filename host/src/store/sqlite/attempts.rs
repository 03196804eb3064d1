//! Failed attempts, counted outside of the transaction that failed.

use sqlx::Row;

use super::session::Session;
use crate::store::error::Doing as _;
use crate::store::{CountedAttempt, FailedAttempt, Result, shared};

/// Counts failed attempts and stores their recordings. Returns the number of each attempt within
/// its event.
pub(in crate::store) async fn count(
    session: &mut Session,
    worker: &str,
    failed: &[FailedAttempt],
) -> Result<Vec<CountedAttempt>> {
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
        .fetch_one(session.connection().doing("count failed attempts")?)
        .await
        .doing("count failed attempts")?;
        let attempt = row.try_get(0).doing("count failed attempts")?;
        let is_repeat = is_repeat(session, worker, attempt, given).await?;
        save_recording(session, worker, attempt, given).await?;
        counts.push(CountedAttempt { attempt, is_repeat });
    }
    Ok(counts)
}

/// Whether the previous attempt has the same digest.
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
    let row = sqlx::query(
        "select 1 from oncely_recording where worker = $1 and event_id = $2 and attempt = $3 - 1 and digest = $4",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(digest.as_slice())
    .fetch_optional(session.connection().doing("compare the recordings of two attempts")?)
    .await
    .doing("compare the recordings of two attempts")?;
    Ok(row.is_some())
}

/// Stores the recording of an attempt in place of the previous one.
async fn save_recording(
    session: &mut Session,
    worker: &str,
    attempt: u32,
    given: &FailedAttempt,
) -> Result<()> {
    let Some(recording) = &given.recording else {
        return delete_recording(session, worker, &given.event_id).await;
    };
    sqlx::query(
        "insert or replace into oncely_recording (worker, event_id, attempt, digest, recording) values ($1, $2, $3, $4, $5)",
    )
    .bind(worker)
    .bind(&given.event_id)
    .bind(attempt)
    .bind(recording.digest.as_ref().map(<[u8; 32]>::as_slice))
    .bind(recording.json.as_ref())
    .execute(session.connection().doing("store the recording of an attempt")?)
    .await
    .doing("store the recording of an attempt")?;
    Ok(())
}

/// Deletes the recording of an event's last attempt.
async fn delete_recording(session: &mut Session, worker: &str, event_id: &str) -> Result<()> {
    sqlx::query("delete from oncely_recording where worker = $1 and event_id = $2")
        .bind(worker)
        .bind(event_id)
        .execute(
            session
                .connection()
                .doing("delete the recording of an attempt")?,
        )
        .await
        .doing("delete the recording of an attempt")?;
    Ok(())
}
