//! The statements of [`crate::store::dead_lettering`], each for one dead letter.

use crate::store::error::Doing as _;
use std::collections::{HashMap, HashSet};

use sqlx::Row;

use super::session::Session;
use crate::store::Result;
use crate::store::dead_lettering::Key;
use crate::store::shared::{self, InboxRecord, NewDeadLetter};

/// Settles the unsettled events as dead, and returns them.
pub(in crate::store) async fn settle(
    session: &mut Session,
    new_dead_letters: &[NewDeadLetter<'_>],
) -> Result<HashSet<(String, String)>> {
    let mut inserted = HashSet::new();
    for new_dead_letter in new_dead_letters {
        let (worker, event_id) = new_dead_letter.key();
        let result = sqlx::query(
            "insert into oncely_inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
             values ($1, $2, 'dead', $3, $4, $5) on conflict do nothing",
        )
        .bind(worker)
        .bind(event_id)
        .bind(new_dead_letter.payload_sha256.as_slice())
        .bind(new_dead_letter.origin().map(|(stream, _)| stream))
        .bind(new_dead_letter.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?)
        .execute(session.connection().doing("settle dead events")?)
        .await
        .doing("settle dead events")?;
        if result.rows_affected() == 1 {
            inserted.insert((worker.to_owned(), event_id.to_owned()));
        }
    }
    Ok(inserted)
}

pub(in crate::store) async fn inbox_records(
    session: &mut Session,
    new_dead_letters: &[NewDeadLetter<'_>],
) -> Result<HashMap<(String, String), InboxRecord>> {
    let mut inbox_records = HashMap::new();
    for new_dead_letter in new_dead_letters {
        let (worker, event_id) = new_dead_letter.key();
        let row =
            sqlx::query("select payload_sha256, state = 'dead' from oncely_inbox where worker = $1 and event_id = $2")
                .bind(worker)
                .bind(event_id)
                .fetch_one(session.connection().doing("look up dead events")?)
                .await
                .doing("look up dead events")?;
        let payload_sha256 = row.try_get(0).doing("look up dead events")?;
        let is_dead = row.try_get(1).doing("look up dead events")?;
        inbox_records.insert(
            (worker.to_owned(), event_id.to_owned()),
            InboxRecord {
                payload_sha256,
                is_dead,
            },
        );
    }
    Ok(inbox_records)
}

/// Inserts new dead letters and reopens redriven ones. Returns id and generation of both.
pub(in crate::store) async fn insert(
    session: &mut Session,
    new: &[&NewDeadLetter<'_>],
) -> Result<HashMap<Key, (i64, u32)>> {
    let mut written = HashMap::new();
    for new_dead_letter in new {
        if let Some(place) = insert_one(session, new_dead_letter).await? {
            written.insert(new_dead_letter.full_key(), place);
        }
    }
    Ok(written)
}

/// Writes a dead letter, or reopens a redriven one. Returns its id and generation; `None` if it is
/// already open.
async fn insert_one(
    session: &mut Session,
    new_dead_letter: &NewDeadLetter<'_>,
) -> Result<Option<(i64, u32)>> {
    let dead_letter = new_dead_letter.dead_letter;
    let row = sqlx::query(
        "insert into oncely_dead_letter (worker, event_id, payload_sha256, reason, code, detail, attempts, version,
             subject, headers, body, stream, stream_sequence, stored_at, group_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
         on conflict (worker, event_id, payload_sha256) do update
             set state = 'open', reason = excluded.reason, code = excluded.code, detail = excluded.detail,
                 attempts = excluded.attempts, version = excluded.version, died_at = excluded.died_at, group_id = excluded.group_id,
                 first_died_at = coalesce(first_died_at, died_at)
             where state in ('redriven', 'done')
         returning id, generation",
    )
    .bind(&dead_letter.worker)
    .bind(&dead_letter.message.event_id)
    .bind(new_dead_letter.payload_sha256.as_slice())
    .bind(dead_letter.reason.as_str())
    .bind(dead_letter.code.as_deref().map(shared::printable))
    .bind(shared::printable(&dead_letter.detail))
    .bind(dead_letter.attempts)
    .bind(dead_letter.version)
    .bind(shared::printable(&dead_letter.message.subject))
    .bind(shared::headers_to_text(&dead_letter.message.headers)?)
    .bind(dead_letter.message.body.as_ref())
    .bind(new_dead_letter.origin().map(|(stream, _)| stream))
    .bind(new_dead_letter.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?)
    .bind(new_dead_letter.stored_at())
    .bind(&new_dead_letter.group.id)
    .fetch_optional(session.connection().doing("write a dead letter")?)
    .await
    .doing("write a dead letter")?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .transpose()
        .doing("write a dead letter")
}
