//! What is done to dead letters: put back, corrected, closed.

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::session::Session;
use super::{attempts, errors, outbox};
use crate::fault;
use crate::model::redrive::Pointer;
use crate::model::verdict::Settled;
use crate::store::letters::{self, Standing};
use crate::store::{
    By, LetterState, Move, Moved, OutboxRow, Output, PutBack, Redrive, Result, StoreError, rows, shared,
};

/// Puts letters back. One transaction writes at a time, so of two who do so at the same time one comes too late.
pub(super) async fn redrive(
    session: &mut Session,
    wanted: &[Redrive],
    by: &By,
) -> Result<(Vec<Moved>, Vec<OutboxRow>)> {
    let mut refused = Vec::new();
    let mut done = Vec::new();
    let mut pointers = Vec::new();
    for wanted in wanted {
        let Some(letter) = standing(session, wanted.id).await? else { continue };
        if let Some(why) = letter.against_redrive(wanted) {
            refused.push((letter.id, why));
            continue;
        }
        // What hosts died of has another chance.
        attempts::take_back_unfinished(session, &letter.worker, &letter.event_id).await?;
        count_generation(session, letter.id).await?;
        record(session, letter.id, "redrive", by).await?;
        let pointer = Pointer { letter: letter.id, generation: letter.generation + 1 };
        pointers.push((letter.worker.clone(), pointer.output(&letter.worker, &letter.event_id)));
        done.push(letter.id);
    }
    let pointers: Vec<(&str, &Output)> = pointers.iter().map(|(worker, output)| (worker.as_str(), output)).collect();
    let rows = outbox::append_for(session, &pointers, shared::NOTICE_LEASE).await?;
    Ok((letters::moved(wanted.iter().map(|wanted| wanted.id), &refused, &done), rows))
}

/// Closes letters or corrects them. What was put back and is not settled is settled as dead before it is closed.
pub(super) async fn move_letters(session: &mut Session, ids: &[i64], what: &Move, by: &By) -> Result<Vec<Moved>> {
    let mut refused = Vec::new();
    let mut done = Vec::new();
    for id in ids {
        let Some(letter) = standing(session, *id).await? else { continue };
        if let Some(why) = letter.against(what) {
            refused.push((letter.id, why));
            continue;
        }
        if let Some(state) = what.closes() {
            settle_under_way(session, &letter).await?;
            close(session, letter.id, state).await?;
            if letter.owns_its_event() {
                attempts::forget_record(session, &letter.worker, &letter.event_id).await?;
            }
        }
        if let Move::Edit(body) = what {
            edit(session, letter.id, body, by).await?;
        }
        record(session, letter.id, what.action(), by).await?;
        done.push(letter.id);
    }
    Ok(letters::moved(ids.iter().copied(), &refused, &done))
}

/// The message of a redriven dead letter of `worker`; nothing when the pointer to it is out of date.
pub(super) async fn put_back(readers: &SqlitePool, worker: &str, id: i64, generation: u32) -> Result<PutBack> {
    let row = sqlx::query(
        "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             coalesce(stored_at, first_died_at, died_at) as stored_at,
             coalesce((select edited.body from oncely_letter_edit as edited
                       where edited.letter = dead.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely_worker where name = dead.worker), 0) as active
         from oncely_dead_letter as dead
         where id = $1 and generation = $2 and state = 'redriven' and (worker = $3 or $4)",
    )
    .bind(id)
    .bind(generation)
    .bind(worker)
    .bind(fault::mutant(fault::POINTER_WITHOUT_WORKER))
    .fetch_optional(readers)
    .await
    .map_err(|error| errors::of_statement(error, "read a letter that was put back"))?;
    match row {
        Some(row) => {
            let message = rows::redriven(&row)?;
            let active = row.try_get("active").map_err(|error| errors::of_statement(error, "read a version"))?;
            Ok(PutBack::Message(Box::new(message), active))
        }
        None => Ok(PutBack::OutOfDate(Settled::seen_by_store())),
    }
}

/// A letter as it stands, with what the inbox says of its event.
async fn standing(session: &mut Session, id: i64) -> Result<Option<Standing>> {
    let doing = |error| errors::of_statement(error, "look at a dead letter");
    let row = sqlx::query(
        "select id, worker, event_id, payload_sha256, reason, state, generation,
             (select inbox.state from oncely_inbox as inbox
              where inbox.worker = letter.worker and inbox.event_id = letter.event_id) as inbox
         from oncely_dead_letter as letter where id = $1",
    )
    .bind(id)
    .fetch_optional(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    let read = |row: SqliteRow| -> anyhow::Result<Standing> {
        Ok(Standing {
            id: row.try_get("id")?,
            worker: row.try_get("worker")?,
            event_id: row.try_get("event_id")?,
            payload_sha256: row.try_get("payload_sha256")?,
            reason: row.try_get("reason")?,
            state: LetterState::read(row.try_get("state")?)?,
            generation: row.try_get("generation")?,
            inbox: row.try_get("inbox")?,
        })
    };
    row.map(|row| read(row).context("read a dead letter").map_err(StoreError::Unavailable)).transpose()
}

async fn count_generation(session: &mut Session, id: i64) -> Result<()> {
    let doing = |error| errors::of_statement(error, "put a dead letter back");
    sqlx::query(
        "update oncely_dead_letter as letter
         set state = 'redriven', generation = generation + 1,
             moved_at = cast(unixepoch('subsec') * 1000000 as integer),
             attempts_before = (
                 select coalesce(max(attempt), 0) from oncely_attempt as attempt
                 where attempt.worker = letter.worker and attempt.event_id = letter.event_id)
         where id = $1",
    )
    .bind(id)
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}

/// Settles the event as dead if it was put back and is not settled.
async fn settle_under_way(session: &mut Session, letter: &Standing) -> Result<()> {
    if letter.state != LetterState::Redriven || letter.inbox.is_some() || !letter.owns_its_event() {
        return Ok(());
    }
    let doing = |error| errors::of_statement(error, "settle an event that was put back");
    sqlx::query("insert into oncely_inbox (worker, event_id, state, payload_sha256) values ($1, $2, 'dead', $3)")
        .bind(&letter.worker)
        .bind(&letter.event_id)
        .bind(&letter.payload_sha256)
        .execute(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
    Ok(())
}

async fn close(session: &mut Session, id: i64, state: LetterState) -> Result<()> {
    let doing = |error| errors::of_statement(error, "close a dead letter");
    sqlx::query(
        "update oncely_dead_letter set state = $2, moved_at = cast(unixepoch('subsec') * 1000000 as integer)
         where id = $1",
    )
    .bind(id)
    .bind(state.as_str())
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}

async fn edit(session: &mut Session, id: i64, body: &Bytes, by: &By) -> Result<()> {
    let doing = |error| errors::of_statement(error, "keep a corrected body");
    sqlx::query(
        "insert into oncely_letter_edit (letter, edit, body, actor, note)
         select $1, coalesce(max(edit), 0) + 1, $2, $3, $4 from oncely_letter_edit where letter = $1",
    )
    .bind(id)
    .bind(body.as_ref())
    .bind(shared::printable(&by.actor))
    .bind(shared::printable(by.note.as_deref().unwrap_or_default()))
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}

/// Writes down who did what.
async fn record(session: &mut Session, id: i64, action: &str, by: &By) -> Result<()> {
    let doing = |error| errors::of_statement(error, "write down what was done to a dead letter");
    sqlx::query(
        "insert into oncely_letter_audit (letter, action, generation, actor, note)
         select id, $2, generation, $3, $4 from oncely_dead_letter where id = $1",
    )
    .bind(id)
    .bind(action)
    .bind(shared::printable(&by.actor))
    .bind(by.note.as_deref().map(shared::printable))
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}
