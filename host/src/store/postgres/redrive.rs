//! What is done to dead letters: put back, corrected, closed.

use std::collections::HashMap;

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use super::{attempts, errors, outbox};
use crate::fault;
use crate::model::redrive::Pointer;
use crate::model::verdict::Settled;
use crate::store::letters::{self, Standing};
use crate::store::{
    By, LetterState, Move, Moved, OutboxRow, Output, PutBack, Redrive, Result, StoreError, rows, shared,
};

/// Puts letters back. Their rows are locked first, so that of two who do so at the same time one comes too late.
pub(super) async fn redrive(
    session: &mut Session,
    wanted: &[Redrive],
    by: &By,
) -> Result<(Vec<Moved>, Vec<OutboxRow>)> {
    let ids: Vec<i64> = wanted.iter().map(|redrive| redrive.id).collect();
    let mut refused = Vec::new();
    let mut letters = Vec::new();
    for letter in standings(session, &ids).await? {
        let against = wanted.iter().find(|redrive| redrive.id == letter.id);
        match against.and_then(|wanted| letter.against_redrive(wanted)) {
            Some(why) => refused.push((letter.id, why)),
            None => letters.push(letter),
        }
    }
    let done: Vec<i64> = letters.iter().map(|letter| letter.id).collect();
    forget_deaths_of_hosts(session, &letters).await?;
    count_generation(session, &done).await?;
    record(session, &done, "redrive", by).await?;
    let pointer = |letter: &Standing| {
        let pointer = Pointer { letter: letter.id, generation: letter.generation + 1 };
        (letter.worker.clone(), pointer.output(&letter.worker, &letter.event_id))
    };
    let pointers: Vec<(String, Output)> = letters.iter().map(pointer).collect();
    let pointers: Vec<(&str, &Output)> = pointers.iter().map(|(worker, output)| (worker.as_str(), output)).collect();
    let rows = outbox::append_for(session, &pointers, shared::NOTICE_LEASE).await?;
    Ok((letters::moved(ids, &refused, &done), rows))
}

/// Closes letters or corrects them. What was put back and is not settled is settled as dead before it is closed.
pub(super) async fn move_letters(session: &mut Session, ids: &[i64], what: &Move, by: &By) -> Result<Vec<Moved>> {
    let mut found = standings(session, ids).await?;
    if what.closes().is_some() && settle_under_way(session, &found).await? > 0 {
        found = standings(session, ids).await?;
    }
    let mut refused = Vec::new();
    let mut done = Vec::new();
    for letter in found {
        match letter.against(what) {
            Some(why) => refused.push((letter.id, why)),
            None => done.push(letter.id),
        }
    }
    if let Some(state) = what.closes() {
        close(session, &done, state).await?;
        attempts::forget_records_of_letters(session, &done).await?;
    }
    if let Move::Edit(body) = what {
        edit(session, &done, body, by).await?;
    }
    record(session, &done, what.action(), by).await?;
    Ok(letters::moved(ids.iter().copied(), &refused, &done))
}

/// The message of a redriven dead letter of `worker`; nothing when the pointer to it is out of date.
pub(super) async fn put_back(session: &mut Session, worker: &str, id: i64, generation: u32) -> Result<PutBack> {
    let query = session.query(
        "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at,
             coalesce((select edited.body from oncely.letter_edit as edited
                       where edited.letter = dead_letter.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely.worker where name = dead_letter.worker), 0) as active
         from oncely.dead_letter where id = $1 and generation = $2 and state = 'redriven' and (worker = $3 or $4)",
    );
    let row = query
        .bind(id)
        .bind(generation.cast_signed())
        .bind(worker)
        .bind(fault::mutant(fault::POINTER_WITHOUT_WORKER))
        .fetch_optional(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read a letter that was put back"))?;
    match row {
        Some(row) => {
            let message = rows::redriven(&row)?;
            let active: i32 = row.try_get("active").map_err(|error| errors::of_statement(error, "read a version"))?;
            Ok(PutBack::Message(Box::new(message), active.cast_unsigned()))
        }
        None => Ok(PutBack::OutOfDate(Settled::seen_by_store())),
    }
}

/// The letters as they stand, locked in the order of their ids. The inbox is looked at once the locks are held.
async fn standings(session: &mut Session, ids: &[i64]) -> Result<Vec<Standing>> {
    let doing = |error| errors::of_statement(error, "lock dead letters");
    let query = session.query(
        "select id, worker, event_id, payload_sha256, reason, state, generation from oncely.dead_letter
         where id = any($1) order by id for update",
    );
    let rows = query.bind(ids).fetch_all(session.connection()).await.map_err(doing)?;
    let read = |row: &PgRow| -> anyhow::Result<Standing> {
        Ok(Standing {
            id: row.try_get("id")?,
            worker: row.try_get("worker")?,
            event_id: row.try_get("event_id")?,
            payload_sha256: row.try_get("payload_sha256")?,
            reason: row.try_get("reason")?,
            state: LetterState::read(row.try_get("state")?)?,
            generation: row.try_get::<i32, _>("generation")?.cast_unsigned(),
            inbox: None,
        })
    };
    let letters: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    let mut letters = letters.context("read dead letters").map_err(StoreError::Unavailable)?;
    let query = session.query(
        "select dead_letter.id, inbox.state from oncely.dead_letter
             join oncely.inbox on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
         where dead_letter.id = any($1)",
    );
    let rows = query.bind(ids).fetch_all(session.connection()).await.map_err(doing)?;
    let inbox: sqlx::Result<HashMap<i64, String>> =
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect();
    let mut inbox = inbox.map_err(doing)?;
    for letter in &mut letters {
        letter.inbox = inbox.remove(&letter.id);
    }
    Ok(letters)
}

/// What hosts died of has another chance.
async fn forget_deaths_of_hosts(session: &mut Session, letters: &[Standing]) -> Result<()> {
    let query = session.query(
        "delete from oncely.unfinished using unnest($1::text[], $2::text[]) as given (worker, event_id)
         where unfinished.worker = given.worker and unfinished.event_id = given.event_id",
    );
    query
        .bind(letters.iter().map(|letter| letter.worker.as_str()).collect::<Vec<_>>())
        .bind(letters.iter().map(|letter| letter.event_id.as_str()).collect::<Vec<_>>())
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "take back what hosts died of"))?;
    Ok(())
}

async fn count_generation(session: &mut Session, ids: &[i64]) -> Result<()> {
    let query = session.query(
        "update oncely.dead_letter
         set state = 'redriven', generation = generation + 1, moved_at = pg_catalog.now(),
             attempts_before = (
                 select coalesce(pg_catalog.max(attempt), 0) from oncely.attempt
                 where attempt.worker = dead_letter.worker and attempt.event_id = dead_letter.event_id)
         where id = any($1)",
    );
    query
        .bind(ids)
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "put dead letters back"))?;
    Ok(())
}

/// Locks the events of letters that were put back, and waits for whoever is handling one, so that nobody takes them up from
/// now on. Returns how many letters that concerned.
async fn settle_under_way(session: &mut Session, letters: &[Standing]) -> Result<usize> {
    let is_under_way = |letter: &&Standing| letter.owns_its_event() && letter.state == LetterState::Redriven;
    let under_way: Vec<&Standing> = letters.iter().filter(is_under_way).collect();
    if under_way.is_empty() {
        return Ok(0);
    }
    let doing = |error| errors::of_statement(error, "settle events that were put back");
    let workers: Vec<_> = under_way.iter().map(|letter| letter.worker.as_str()).collect();
    let event_ids: Vec<_> = under_way.iter().map(|letter| letter.event_id.as_str()).collect();
    let query = session.query(
        "select from oncely.inbox where (worker, event_id) in (select * from unnest($1::text[], $2::text[]))
         order by worker, event_id for update",
    );
    query.bind(&workers).bind(&event_ids).execute(session.connection()).await.map_err(doing)?;
    // Those that have no record, because they were put back by an earlier version.
    let query = session.query("select from oncely.settle_dead($1, $2, $3, null, null)");
    query
        .bind(workers)
        .bind(event_ids)
        .bind(under_way.iter().map(|letter| letter.payload_sha256.as_slice()).collect::<Vec<_>>())
        .execute(session.connection())
        .await
        .map_err(doing)?;
    Ok(under_way.len())
}

async fn close(session: &mut Session, ids: &[i64], state: LetterState) -> Result<()> {
    let query =
        session.query("update oncely.dead_letter set state = $2, moved_at = pg_catalog.now() where id = any($1)");
    query
        .bind(ids)
        .bind(state.as_str())
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "close dead letters"))?;
    Ok(())
}

async fn edit(session: &mut Session, ids: &[i64], body: &Bytes, by: &By) -> Result<()> {
    let query = session.query(
        "insert into oncely.letter_edit (letter, edit, body, actor, note)
         select id, coalesce((select pg_catalog.max(edit) from oncely.letter_edit where letter = id), 0) + 1, $2, $3, $4
         from unnest($1::bigint[]) as given (id)",
    );
    query
        .bind(ids)
        .bind(body.as_ref())
        .bind(shared::printable(&by.actor))
        .bind(shared::printable(by.note.as_deref().unwrap_or_default()))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "keep a corrected body"))?;
    Ok(())
}

/// Writes down who did what.
async fn record(session: &mut Session, ids: &[i64], action: &str, by: &By) -> Result<()> {
    let query = session.query(
        "insert into oncely.letter_audit (letter, action, generation, actor, note)
         select id, $2, generation, $3, $4 from oncely.dead_letter where id = any($1) order by id",
    );
    query
        .bind(ids)
        .bind(action)
        .bind(shared::printable(&by.actor))
        .bind(by.note.as_deref().map(shared::printable))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "write down what was done to dead letters"))?;
    Ok(())
}
