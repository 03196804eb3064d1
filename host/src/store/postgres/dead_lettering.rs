//! The statements of [`crate::store::dead_lettering`], each for all dead letters.

use crate::store::error::Doing as _;
use std::collections::{HashMap, HashSet};

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use crate::store::Result;
use crate::store::dead_lettering::Key;
use crate::store::shared::{self, InboxRecord, NewDeadLetter};

/// The workers and the event ids, as two columns in the order of the dead letters.
fn keys_of<'a>(new_dead_letters: &'a [NewDeadLetter<'_>]) -> (Vec<&'a str>, Vec<&'a str>) {
    new_dead_letters.iter().map(NewDeadLetter::key).unzip()
}

/// Settles as dead the events that are not settled yet, and returns them.
pub(in crate::store) async fn settle(
    session: &mut Session,
    new_dead_letters: &[NewDeadLetter<'_>],
) -> Result<HashSet<(String, String)>> {
    let mut streams = Vec::with_capacity(new_dead_letters.len());
    let mut sequences = Vec::with_capacity(new_dead_letters.len());
    for new_dead_letter in new_dead_letters {
        streams.push(new_dead_letter.origin().map(|(stream, _)| stream));
        sequences.push(
            new_dead_letter
                .origin()
                .map(|(_, sequence)| shared::signed(sequence))
                .transpose()?,
        );
    }
    let (workers, event_ids) = keys_of(new_dead_letters);
    let query = session.query("select * from oncely.settle_dead($1, $2, $3, $4, $5)");
    let rows = query
        .bind(workers)
        .bind(event_ids)
        .bind(
            new_dead_letters
                .iter()
                .map(|new_dead_letter| new_dead_letter.payload_sha256.as_slice())
                .collect::<Vec<_>>(),
        )
        .bind(streams)
        .bind(sequences)
        .fetch_all(session.connection())
        .await
        .doing("settle dead events")?;
    let keys: sqlx::Result<_> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    keys.doing("read settled events")
}

/// The inbox records of the events, locked against a reclaim of a redriven event.
pub(in crate::store) async fn inbox_records(
    session: &mut Session,
    new_dead_letters: &[NewDeadLetter<'_>],
) -> Result<HashMap<(String, String), InboxRecord>> {
    let (workers, event_ids) = keys_of(new_dead_letters);
    let query = session.query(
        "select worker, event_id, payload_sha256, state = 'dead' from oncely.inbox
         where (worker, event_id) in (select * from unnest($1::text[], $2::text[]))
         order by worker, event_id for update",
    );
    let rows = query
        .bind(workers)
        .bind(event_ids)
        .fetch_all(session.connection())
        .await
        .doing("lock dead events")?;
    let read = |row: &PgRow| {
        let record = InboxRecord {
            payload_sha256: row.try_get(2)?,
            is_dead: row.try_get(3)?,
        };
        Ok(((row.try_get(0)?, row.try_get(1)?), record))
    };
    let inbox_records: sqlx::Result<_> = rows.iter().map(read).collect();
    inbox_records.doing("read dead events")
}

/// Inserts new dead letters and reopens redriven ones. Returns id and generation of both.
pub(in crate::store) async fn insert(
    session: &mut Session,
    new: &[&NewDeadLetter<'_>],
) -> Result<HashMap<Key, (i64, u32)>> {
    let mut headers = Vec::with_capacity(new.len());
    let mut sequences = Vec::with_capacity(new.len());
    for new_dead_letter in new {
        headers.push(shared::headers_to_text(
            &new_dead_letter.dead_letter.message.headers,
        )?);
        sequences.push(
            new_dead_letter
                .origin()
                .map(|(_, sequence)| shared::signed(sequence))
                .transpose()?,
        );
    }
    let dead_letters = || {
        new.iter()
            .map(|new_dead_letter| new_dead_letter.dead_letter)
    };
    let query = session.query(
        "insert into oncely.dead_letter (worker, event_id, payload_sha256, reason, code, detail, attempts, version,
             subject, headers, body, stream, stream_sequence, stored_at, group_id)
         select worker, event_id, payload_sha256, reason, code, detail, attempts, version, subject, headers, body, stream,
             stream_sequence, timestamptz 'epoch' + stored_at * interval '1 microsecond', group_id
         from unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::text[], $6::text[], $7::integer[],
             $8::integer[], $9::text[], $10::text[], $11::bytea[], $12::text[], $13::bigint[], $14::bigint[],
             $15::text[])
             as given (worker, event_id, payload_sha256, reason, code, detail, attempts, version, subject, headers, body,
                 stream, stream_sequence, stored_at, group_id)
         on conflict (worker, event_id, payload_sha256) do update
             set state = 'open', reason = excluded.reason, code = excluded.code, detail = excluded.detail,
                 attempts = excluded.attempts, version = excluded.version, died_at = pg_catalog.now(),
                 group_id = excluded.group_id,
                 first_died_at = coalesce(dead_letter.first_died_at, dead_letter.died_at)
             where dead_letter.state in ('redriven', 'done')
         returning worker, event_id, payload_sha256, id, generation",
    );
    let rows = query
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.worker.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.message.event_id.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|new_dead_letter| new_dead_letter.payload_sha256.as_slice())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.reason.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.code.as_deref().map(shared::printable))
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| shared::printable(&dead_letter.detail))
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.attempts.cast_signed())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.version.cast_signed())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters()
                .map(|dead_letter| shared::printable(&dead_letter.message.subject))
                .collect::<Vec<_>>(),
        )
        .bind(headers)
        .bind(
            dead_letters()
                .map(|dead_letter| dead_letter.message.body.as_ref())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            new.iter()
                .map(|new_dead_letter| new_dead_letter.origin().map(|(stream, _)| stream))
                .collect::<Vec<_>>(),
        )
        .bind(sequences)
        .bind(
            new.iter()
                .map(|new_dead_letter| new_dead_letter.stored_at())
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|new_dead_letter| new_dead_letter.group.id.as_str())
                .collect::<Vec<_>>(),
        )
        .fetch_all(session.connection())
        .await
        .doing("write dead letters")?;
    let read = |row: &PgRow| {
        let generation: i32 = row.try_get(4)?;
        Ok((
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?),
            (row.try_get(3)?, generation.cast_unsigned()),
        ))
    };
    let written: sqlx::Result<_> = rows.iter().map(read).collect();
    written.doing("read written dead letters")
}
