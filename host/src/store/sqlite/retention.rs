//! What had its time leaves, in batches: SQLite has no partitions.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use jiff::Timestamp;
use sqlx::Row;

use super::errors;
use super::session::Session;
use crate::store::archive::ArchiveFile;
use crate::store::shared::DELETED_STATE_KEPT;
use crate::store::{Result, Retire, shared};

/// The published outputs that had their time: at most $2, published before $1.
macro_rules! old_outputs {
    () => {
        "select seq from oncely_outbox where published_at < $1 order by published_at limit $2"
    };
}

/// The inbox records that had their time. What is dead stays.
macro_rules! old_records {
    () => {
        "select worker, event_id from oncely_inbox where state = 'done' and settled_at < $1 order by settled_at limit $2"
    };
}

const DELETE_OUTPUTS: &str = concat!("delete from oncely_outbox where seq in (", old_outputs!(), ")");
const DELETE_RECORDS: &str = concat!("delete from oncely_inbox where (worker, event_id) in (", old_records!(), ")");

/// Those whose time is over.
const DELETE_ANSWERS: &str = "delete from oncely_request where rowid in (
    select rowid from oncely_request where expires_at <= $1 order by expires_at limit $2)";

/// Those that belong to no dead letter.
const DELETE_ATTEMPTS: &str = "delete from oncely_attempt where (worker, event_id, attempt) in (
    select worker, event_id, attempt from oncely_attempt as attempt
    where at < $1 and not exists (
        select 1 from oncely_dead_letter as letter
        where letter.worker = attempt.worker and letter.event_id = attempt.event_id)
    order by at limit $2)";

/// The deleted keys of keyed state that had their time.
macro_rules! old_deletions {
    () => {
        "select worker, key from oncely_state where value is null and updated_at < $1 order by updated_at limit $2"
    };
}

/// New keys of their workers begin above the versions of those.
const RAISE_FLOORS: &str = concat!(
    "insert into oncely_state_floor (worker, version)
     select worker, max(version) from oncely_state where (worker, key) in (",
    old_deletions!(),
    ") group by worker on conflict (worker) do update set version = max(version, excluded.version)"
);
const DELETE_DELETIONS: &str = concat!("delete from oncely_state where (worker, key) in (", old_deletions!(), ")");

const OUTPUTS_AS_JSON: &str = concat!(
    "select json_object('seq', seq, 'id', id, 'worker', worker, 'event_id', event_id, 'ordinal', ordinal,
         'subject', subject, 'headers', headers, 'body', '\\x' || lower(hex(body)), 'ordering_key', ordering_key,
         'created_at', created_at, 'published_at', published_at, 'stream', stream, 'stream_sequence', stream_sequence)
     from oncely_outbox where seq in (",
    old_outputs!(),
    ")"
);
const RECORDS_AS_JSON: &str = concat!(
    "select json_object('worker', worker, 'event_id', event_id, 'state', state,
         'payload_sha256', '\\x' || lower(hex(payload_sha256)), 'stream', stream, 'stream_sequence', stream_sequence,
         'settled_at', settled_at)
     from oncely_inbox where (worker, event_id) in (",
    old_records!(),
    ")"
);

/// Removes some of the published outputs, inbox records, attempts and deleted keys that had their time. Returns whether there may be more.
pub(super) async fn retire(session: &mut Session, what: &Retire) -> Result<bool> {
    let now = Timestamp::now();
    let before = |keep: Duration| now.as_microsecond() - shared::micros(keep);
    let outputs = before(what.outputs);
    if let Some(folder) = &what.archive {
        archive(session, OUTPUTS_AS_JSON, outputs, what.limit, folder, "outbox", now).await?;
    }
    let mut most = delete(session, DELETE_OUTPUTS, outputs, what.limit).await?;
    most = most.max(delete(session, DELETE_ANSWERS, now.as_microsecond(), what.limit).await?);
    let deletions = before(DELETED_STATE_KEPT);
    delete(session, RAISE_FLOORS, deletions, what.limit).await?;
    most = most.max(delete(session, DELETE_DELETIONS, deletions, what.limit).await?);
    write_done(session).await?;
    if let Some(records) = what.inbox.map(before) {
        if let Some(folder) = &what.archive {
            archive(session, RECORDS_AS_JSON, records, what.limit, folder, "inbox", now).await?;
        }
        most = most.max(delete(session, DELETE_RECORDS, records, what.limit).await?);
        most = most.max(delete(session, DELETE_ATTEMPTS, records, what.limit).await?);
    }
    Ok(most == u64::from(what.limit))
}

async fn delete(session: &mut Session, rows: &'static str, before: i64, limit: u32) -> Result<u64> {
    let doing = |error| errors::of_statement(error, "remove old rows");
    let deleted = sqlx::query(rows).bind(before).bind(limit).execute(session.connection().map_err(doing)?).await;
    Ok(deleted.map_err(doing)?.rows_affected())
}

/// Writes what is about to be deleted to a file, if it is anything.
async fn archive(
    session: &mut Session,
    rows: &'static str,
    before: i64,
    limit: u32,
    folder: &Path,
    table: &str,
    now: Timestamp,
) -> Result<()> {
    let doing = |error| errors::of_statement(error, "archive old rows");
    let mut file = None;
    let mut rows = sqlx::query(rows).bind(before).bind(limit).fetch(session.connection().map_err(doing)?);
    while let Some(row) = rows.try_next().await.map_err(doing)? {
        let line: String = row.try_get(0).map_err(doing)?;
        let file = file.get_or_insert_with(|| ArchiveFile::create(folder, table, now));
        file.add(Bytes::from(line + "\n")).await;
    }
    match file {
        Some(file) => file.finish().await,
        None => Ok(()),
    }
}

/// Writes down which letters that were put back took effect, before the inbox forgets it.
async fn write_done(session: &mut Session) -> Result<()> {
    let doing = |error| errors::of_statement(error, "write down which dead letters took effect");
    sqlx::query(
        "delete from oncely_record where (worker, event_id) in (
             select letter.worker, letter.event_id from oncely_dead_letter as letter
             join oncely_inbox as inbox on inbox.worker = letter.worker and inbox.event_id = letter.event_id
             where letter.state = 'redriven' and inbox.state = 'done')",
    )
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    sqlx::query(
        "update oncely_dead_letter as letter set state = 'done'
         where letter.state = 'redriven' and exists (
             select 1 from oncely_inbox as inbox where inbox.worker = letter.worker
                 and inbox.event_id = letter.event_id and inbox.state = 'done')",
    )
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}
