//! Actions on dead letters: redrive, edit, close.

use super::errors::Doing;
use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::session::Session;
use super::{attempts, errors, outbox};
use crate::model::redrive::Pointer;
use crate::model::verdict::Settled;
use crate::store::dead_letters::{self, LockedDeadLetter};
use crate::store::{
    Attribution, DeadLetterAction, DeadLetterActionResult, DeadLetterState, OutboxRow, Output,
    Redrive, RedriveLookup, Result, StoreError, rows, shared,
};

/// Redrives dead letters. One transaction writes at a time, so of two concurrent redrives the
/// second is refused.
pub(super) async fn redrive(
    session: &mut Session,
    wanted: &[Redrive],
    attribution: &Attribution,
) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
    let mut refused = Vec::new();
    let mut done = Vec::new();
    let mut pointers = Vec::new();
    for wanted in wanted {
        let Some(dead_letter) = load_dead_letter(session, wanted.id).await? else {
            continue;
        };
        if let Some(why) = dead_letter.redrive_refusal(wanted) {
            refused.push((dead_letter.id, why));
            continue;
        }
        // A message that crashed hosts has another chance.
        attempts::clear_crash_marker(session, &dead_letter.worker, &dead_letter.event_id).await?;
        start_generation(session, dead_letter.id).await?;
        write_audit(session, dead_letter.id, "redrive", attribution).await?;
        let pointer = Pointer {
            dead_letter: dead_letter.id,
            generation: dead_letter.generation + 1,
        };
        pointers.push((
            dead_letter.worker.clone(),
            pointer.output(&dead_letter.worker, &dead_letter.event_id),
        ));
        done.push(dead_letter.id);
    }

    // Append the pointers to the outbox, in the same transaction.
    let pointers: Vec<(&str, &Output)> = pointers
        .iter()
        .map(|(worker, output)| (worker.as_str(), output))
        .collect();
    let rows = outbox::append_for(session, &pointers, shared::NOTICE_LEASE).await?;
    Ok((
        dead_letters::action_results(wanted.iter().map(|wanted| wanted.id), &refused, &done),
        rows,
    ))
}

/// Closes or edits dead letters.
pub(super) async fn update_dead_letters(
    session: &mut Session,
    ids: &[i64],
    action: &DeadLetterAction,
    attribution: &Attribution,
) -> Result<Vec<DeadLetterActionResult>> {
    let mut refused = Vec::new();
    let mut done = Vec::new();
    for id in ids {
        let Some(dead_letter) = load_dead_letter(session, *id).await? else {
            continue;
        };
        if let Some(why) = dead_letter.action_refusal(action) {
            refused.push((dead_letter.id, why));
            continue;
        }
        if let Some(state) = action.closed_state() {
            add_missing_record(session, &dead_letter).await?;
            close(session, dead_letter.id, state).await?;
            if dead_letter.owns_event() {
                attempts::delete_recording(session, &dead_letter.worker, &dead_letter.event_id)
                    .await?;
            }
        }
        if let DeadLetterAction::Edit(body) = action {
            edit(session, dead_letter.id, body, attribution).await?;
        }
        write_audit(session, dead_letter.id, action.as_str(), attribution).await?;
        done.push(dead_letter.id);
    }
    Ok(dead_letters::action_results(
        ids.iter().copied(),
        &refused,
        &done,
    ))
}

/// The message of a redriven dead letter of `worker`; out of date if the pointer is.
pub(super) async fn redriven_message(
    readers: &SqlitePool,
    worker: &str,
    id: i64,
    generation: u32,
) -> Result<RedriveLookup> {
    let row = sqlx::query(
        "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             coalesce(stored_at, first_died_at, died_at) as stored_at,
             coalesce((select edited.body from oncely_dead_letter_edit as edited
                       where edited.dead_letter_id = dead.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely_worker where name = dead.worker), 0) as active
         from oncely_dead_letter as dead
         where id = $1 and generation = $2 and state = 'redriven' and worker = $3",
    )
    .bind(id)
    .bind(generation)
    .bind(worker)
    .fetch_optional(readers)
    .await
    .doing("read a redriven dead letter")?;
    match row {
        Some(row) => {
            let message = rows::redriven(&row)?;
            let active = row.try_get("active").doing("read a version")?;
            Ok(RedriveLookup::Message(Box::new(message), active))
        }
        None => Ok(RedriveLookup::OutOfDate(Settled::seen_by_store())),
    }
}

/// The current state of a dead letter, and the inbox state of its event.
async fn load_dead_letter(session: &mut Session, id: i64) -> Result<Option<LockedDeadLetter>> {
    let context = |error| errors::from_statement(error, "load a dead letter");
    let row = sqlx::query(
        "select id, worker, event_id, payload_sha256, reason, state, generation,
             (select inbox.state from oncely_inbox as inbox
              where inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id) as inbox
         from oncely_dead_letter as dead_letter where id = $1",
    )
    .bind(id)
    .fetch_optional(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
    let read = |row: SqliteRow| -> anyhow::Result<LockedDeadLetter> {
        Ok(LockedDeadLetter {
            id: row.try_get("id")?,
            worker: row.try_get("worker")?,
            event_id: row.try_get("event_id")?,
            payload_sha256: row.try_get("payload_sha256")?,
            reason: row.try_get("reason")?,
            state: DeadLetterState::parse(row.try_get("state")?)?,
            generation: row.try_get("generation")?,
            inbox: row.try_get("inbox")?,
        })
    };
    row.map(|row| {
        read(row)
            .context("read a dead letter")
            .map_err(StoreError::Unavailable)
    })
    .transpose()
}

async fn start_generation(session: &mut Session, id: i64) -> Result<()> {
    sqlx::query(
        "update oncely_dead_letter as dead_letter
         set state = 'redriven', generation = generation + 1,
             last_action_at = cast(unixepoch('subsec') * 1000000 as integer),
             attempts_before = (
                 select coalesce(max(attempt), 0) from oncely_attempt as attempt
                 where attempt.worker = dead_letter.worker and attempt.event_id = dead_letter.event_id)
         where id = $1",
    )
    .bind(id)
    .execute(session.connection().doing("redrive a dead letter")?)
    .await
    .doing("redrive a dead letter")?;
    Ok(())
}

/// Adds the inbox row of an event that was redriven by an earlier version of Oncely.
async fn add_missing_record(session: &mut Session, dead_letter: &LockedDeadLetter) -> Result<()> {
    if dead_letter.state != DeadLetterState::Redriven
        || dead_letter.inbox.is_some()
        || !dead_letter.owns_event()
    {
        return Ok(());
    }
    sqlx::query("insert into oncely_inbox (worker, event_id, state, payload_sha256) values ($1, $2, 'dead', $3)")
        .bind(&dead_letter.worker)
        .bind(&dead_letter.event_id)
        .bind(&dead_letter.payload_sha256)
        .execute(session.connection().doing("add the inbox row of a redriven event")?)
        .await
        .doing("add the inbox row of a redriven event")?;
    Ok(())
}

async fn close(session: &mut Session, id: i64, state: DeadLetterState) -> Result<()> {
    sqlx::query(
        "update oncely_dead_letter set state = $2, last_action_at = cast(unixepoch('subsec') * 1000000 as integer)
         where id = $1",
    )
    .bind(id)
    .bind(state.as_str())
    .execute(session.connection().doing("close a dead letter")?)
    .await
    .doing("close a dead letter")?;
    Ok(())
}

async fn edit(
    session: &mut Session,
    id: i64,
    body: &Bytes,
    attribution: &Attribution,
) -> Result<()> {
    sqlx::query(
        "insert into oncely_dead_letter_edit (dead_letter_id, edit, body, actor, note)
         select $1, coalesce(max(edit), 0) + 1, $2, $3, $4 from oncely_dead_letter_edit where dead_letter_id = $1",
    )
    .bind(id)
    .bind(body.as_ref())
    .bind(shared::printable(&attribution.actor))
    .bind(shared::printable(attribution.note.as_deref().unwrap_or_default()))
    .execute(session.connection().doing("store a corrected body")?)
    .await
    .doing("store a corrected body")?;
    Ok(())
}

/// Writes an audit record.
async fn write_audit(
    session: &mut Session,
    id: i64,
    action: &str,
    attribution: &Attribution,
) -> Result<()> {
    sqlx::query(
        "insert into oncely_dead_letter_audit (dead_letter_id, action, generation, actor, note)
         select id, $2, generation, $3, $4 from oncely_dead_letter where id = $1",
    )
    .bind(id)
    .bind(action)
    .bind(shared::printable(&attribution.actor))
    .bind(attribution.note.as_deref().map(shared::printable))
    .execute(session.connection().doing("write an audit record")?)
    .await
    .doing("write an audit record")?;
    Ok(())
}
