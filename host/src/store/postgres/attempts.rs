//! Failed attempts, recorded outside the transaction that they failed in.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::errors;
use super::session::Session;
use crate::store::error::{Doing as _, cause};
use crate::store::{CountedAttempt, FailedAttempt, Result, StoreError, shared};

/// Adds attempts and their recordings. Returns the number of each attempt at its event.
///
/// # Errors
/// `Conflict` if two hosts count the same event at the same moment.
pub(in crate::store) async fn count(
    session: &mut Session,
    worker: &str,
    failed: &[FailedAttempt],
) -> Result<Vec<CountedAttempt>> {
    let event_ids: Vec<&str> = failed
        .iter()
        .map(|attempt| attempt.event_id.as_str())
        .collect();
    let versions: Vec<i32> = failed
        .iter()
        .map(|attempt| attempt.version.cast_signed())
        .collect();
    let codes: Vec<Option<_>> = failed
        .iter()
        .map(|attempt| attempt.code.as_deref().map(shared::printable))
        .collect();
    let errors: Vec<_> = failed
        .iter()
        .map(|attempt| shared::printable(&attempt.error))
        .collect();
    let logs: Vec<_> = failed
        .iter()
        .map(|attempt| shared::printable(&attempt.logs))
        .collect();
    let recordings: Vec<Option<Vec<u8>>> = failed
        .iter()
        .map(|attempt| {
            attempt
                .recording
                .as_ref()
                .map(|recording| recording.json.to_vec())
        })
        .collect();
    let digest = |attempt: &FailedAttempt| attempt.recording.as_ref()?.digest.map(Vec::from);
    let proofs: Vec<Option<Vec<u8>>> = failed.iter().map(digest).collect();
    let query = session.query(
        "with given as (
             select * from unnest($2::text[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::bytea[])
                 with ordinality as given (event_id, version, code, error, logs, recording, digest, place)
         ), counted as (
             select given.*, (pg_catalog.row_number() over (partition by event_id order by place)
                 + (select coalesce(pg_catalog.max(attempt), 0) from oncely.attempt
                    where attempt.worker = $1 and attempt.event_id = given.event_id))::integer as attempt
             from given
         ), inserted as (
             insert into oncely.attempt (worker, event_id, attempt, version, code, error, logs)
             select $1, event_id, attempt, version, code, error, logs from counted order by event_id, attempt
         ), last as (
             select distinct on (event_id) event_id, attempt, digest, recording from counted order by event_id, attempt desc
         ), kept as (
             insert into oncely.recording (worker, event_id, attempt, digest, recording)
             select $1, event_id, attempt, digest, recording from last where recording is not null order by event_id
             on conflict (worker, event_id) do update
                 set attempt = excluded.attempt, digest = excluded.digest, recording = excluded.recording
         ), forgotten as (
             delete from oncely.recording using last
             where recording.worker = $1 and recording.event_id = last.event_id and last.recording is null
         )
         select counted.attempt, coalesce(before.digest = counted.digest, false) as repeats
         from counted left join oncely.recording as before
             on before.worker = $1 and before.event_id = counted.event_id and before.attempt = counted.attempt - 1
         order by place",

    );
    let rows = query
        .bind(worker)
        .bind(event_ids)
        .bind(versions)
        .bind(codes)
        .bind(errors)
        .bind(logs)
        .bind(recordings)
        .bind(proofs)
        .fetch_all(session.connection())
        .await
        .map_err(|error| match errors::is_unique_violation(&error) {
            true => StoreError::Conflict(cause(error).context("count failed attempts")),
            false => errors::from_statement(error, "count failed attempts"),
        })?;
    let counted = |row: &PgRow| {
        Ok(CountedAttempt {
            attempt: row.try_get::<i32, _>(0)?.cast_unsigned(),
            is_repeat: row.try_get(1)?,
        })
    };
    let counts: sqlx::Result<Vec<CountedAttempt>> = rows.iter().map(counted).collect();
    counts.doing("read the count of attempts")
}
