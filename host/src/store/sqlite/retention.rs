//! Deletes expired rows, in batches: SQLite has no partitions.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use jiff::Timestamp;
use sqlx::Row;

use super::session::Session;
use crate::store::archive::ArchiveFile;
use crate::store::error::Doing as _;
use crate::store::shared::DELETED_STATE_KEPT;
use crate::store::{Result, RetentionPolicy, shared};

/// Expired outputs: at most $2, published before $1.
macro_rules! expired_outputs {
    () => {
        "select seq from oncely_outbox where published_at < $1 order by published_at limit $2"
    };
}

/// Expired inbox records: at most $2, settled before $1. Those of dead events stay.
macro_rules! expired_records {
    () => {
        "select worker, event_id from oncely_inbox where state = 'done' and settled_at < $1 order by settled_at limit $2"
    };
}

const DELETE_OUTPUTS: &str = concat!(
    "delete from oncely_outbox where seq in (",
    expired_outputs!(),
    ")"
);
const DELETE_RECORDS: &str = concat!(
    "delete from oncely_inbox where (worker, event_id) in (",
    expired_records!(),
    ")"
);

/// Deletes expired responses.
const DELETE_ANSWERS: &str = "delete from oncely_request where rowid in (
    select rowid from oncely_request where expires_at <= $1 order by expires_at limit $2)";

/// Deletes expired attempts that belong to no dead letter.
const DELETE_ATTEMPTS: &str = "delete from oncely_attempt where (worker, event_id, attempt) in (
    select worker, event_id, attempt from oncely_attempt as attempt
    where at < $1 and not exists (
        select 1 from oncely_dead_letter as dead_letter
        where dead_letter.worker = attempt.worker and dead_letter.event_id = attempt.event_id)
    order by at limit $2)";

/// Expired deletions of keyed state.
macro_rules! expired_deletions {
    () => {
        "select worker, key from oncely_state where value is null and updated_at < $1 order by updated_at limit $2"
    };
}

/// Raises the version floors: new keys of a worker begin above the versions of expired deletions.
const RAISE_FLOORS: &str = concat!(
    "insert into oncely_state_version_floor (worker, version)
     select worker, max(version) from oncely_state where (worker, key) in (",
    expired_deletions!(),
    ") group by worker on conflict (worker) do update set version = max(version, excluded.version)"
);
const DELETE_DELETIONS: &str = concat!(
    "delete from oncely_state where (worker, key) in (",
    expired_deletions!(),
    ")"
);

const OUTPUTS_AS_JSON: &str = concat!(
    "select json_object('seq', seq, 'id', id, 'worker', worker, 'event_id', event_id, 'ordinal', ordinal,
         'subject', subject, 'headers', headers, 'body', '\\x' || lower(hex(body)), 'ordering_key', ordering_key,
         'created_at', created_at, 'published_at', published_at, 'stream', stream, 'stream_sequence', stream_sequence)
     from oncely_outbox where seq in (",
    expired_outputs!(),
    ")"
);
const RECORDS_AS_JSON: &str = concat!(
    "select json_object('worker', worker, 'event_id', event_id, 'state', state,
         'payload_sha256', '\\x' || lower(hex(payload_sha256)), 'stream', stream, 'stream_sequence', stream_sequence,
         'settled_at', settled_at)
     from oncely_inbox where (worker, event_id) in (",
    expired_records!(),
    ")"
);

/// Deletes a batch of expired outputs, responses, deleted keys, inbox records and attempts. Returns
/// whether there may be more.
pub(super) async fn delete_expired(
    session: &mut Session,
    retention: &RetentionPolicy,
) -> Result<bool> {
    let now = Timestamp::now();
    let before = |keep: Duration| now.as_microsecond() - shared::micros(keep);

    // Outputs, and a copy in the archive.
    let outputs = before(retention.outputs);
    if let Some(folder) = &retention.archive {
        archive(
            session,
            OUTPUTS_AS_JSON,
            outputs,
            retention.limit,
            folder,
            "outbox",
            now,
        )
        .await?;
    }
    let mut deleted_max = delete(session, DELETE_OUTPUTS, outputs, retention.limit).await?;

    // Responses to requests.
    deleted_max = deleted_max.max(
        delete(
            session,
            DELETE_ANSWERS,
            now.as_microsecond(),
            retention.limit,
        )
        .await?,
    );

    // Deleted keys of keyed state, after their versions are recorded.
    let deletions = before(DELETED_STATE_KEPT);
    delete(session, RAISE_FLOORS, deletions, retention.limit).await?;
    deleted_max =
        deleted_max.max(delete(session, DELETE_DELETIONS, deletions, retention.limit).await?);

    // Inbox records with their attempts, and a copy in the archive.
    record_completed_redrives(session).await?;
    if let Some(records) = retention.inbox.map(before) {
        if let Some(folder) = &retention.archive {
            archive(
                session,
                RECORDS_AS_JSON,
                records,
                retention.limit,
                folder,
                "inbox",
                now,
            )
            .await?;
        }
        deleted_max =
            deleted_max.max(delete(session, DELETE_RECORDS, records, retention.limit).await?);
        deleted_max =
            deleted_max.max(delete(session, DELETE_ATTEMPTS, records, retention.limit).await?);
    }
    Ok(deleted_max == u64::from(retention.limit))
}

async fn delete(session: &mut Session, rows: &'static str, before: i64, limit: u32) -> Result<u64> {
    let deleted = sqlx::query(rows)
        .bind(before)
        .bind(limit)
        .execute(session.connection().doing("delete expired rows")?)
        .await;
    Ok(deleted.doing("delete expired rows")?.rows_affected())
}

/// Writes rows that are about to be deleted to a file, if there are any.
async fn archive(
    session: &mut Session,
    rows: &'static str,
    before: i64,
    limit: u32,
    folder: &Path,
    table: &str,
    now: Timestamp,
) -> Result<()> {
    let mut file = None;
    let mut rows = sqlx::query(rows)
        .bind(before)
        .bind(limit)
        .fetch(session.connection().doing("archive expired rows")?);
    while let Some(row) = rows.try_next().await.doing("archive expired rows")? {
        let line: String = row.try_get(0).doing("archive expired rows")?;
        let file = file.get_or_insert_with(|| ArchiveFile::create(folder, table, now));
        file.add(Bytes::from(line + "\n")).await;
    }
    match file {
        Some(file) => file.finish().await,
        None => Ok(()),
    }
}

/// Records the redriven dead letters that took effect, before their inbox records are deleted.
async fn record_completed_redrives(session: &mut Session) -> Result<()> {
    sqlx::query(
        "delete from oncely_recording where (worker, event_id) in (
             select dead_letter.worker, dead_letter.event_id from oncely_dead_letter as dead_letter
             join oncely_inbox as inbox on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
             where dead_letter.state = 'redriven' and inbox.state = 'done')",
    )
    .execute(session.connection().doing("record completed redrives")?)
    .await
    .doing("record completed redrives")?;
    sqlx::query(
        "update oncely_dead_letter as dead_letter set state = 'done'
         where dead_letter.state = 'redriven' and exists (
             select 1 from oncely_inbox as inbox where inbox.worker = dead_letter.worker
                 and inbox.event_id = dead_letter.event_id and inbox.state = 'done')",
    )
    .execute(session.connection().doing("record completed redrives")?)
    .await
    .doing("record completed redrives")?;
    Ok(())
}
