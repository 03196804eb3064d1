//! Actions on dead letters: redrive, edit, close.

use super::errors::Doing;
use std::collections::HashMap;

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use super::{attempts, errors, outbox};
use crate::model::redrive::Pointer;
use crate::model::verdict::Settled;
use crate::store::dead_letters::{self, LockedDeadLetter};
use crate::store::{
    Attribution, DeadLetterAction, DeadLetterActionResult, DeadLetterState, OutboxRow, Output,
    Redrive, RedriveLookup, Result, StoreError, rows, shared,
};

/// Redrives dead letters. Their rows are locked first, so that only one of two concurrent redrives
/// succeeds.
pub(super) async fn redrive(
    session: &mut Session,
    wanted: &[Redrive],
    attribution: &Attribution,
) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
    // Lock the dead letters and check each.
    let ids: Vec<i64> = wanted.iter().map(|redrive| redrive.id).collect();
    let mut refused = Vec::new();
    let mut dead_letters = Vec::new();
    for dead_letter in lock_dead_letters(session, &ids).await? {
        let request = wanted.iter().find(|redrive| redrive.id == dead_letter.id);
        match request.and_then(|request| dead_letter.redrive_refusal(request)) {
            Some(why) => refused.push((dead_letter.id, why)),
            None => dead_letters.push(dead_letter),
        }
    }
    let done: Vec<i64> = dead_letters
        .iter()
        .map(|dead_letter| dead_letter.id)
        .collect();

    // Start the next generation.
    clear_crash_markers(session, &dead_letters).await?;
    start_generation(session, &done).await?;
    write_audit(session, &done, "redrive", attribution).await?;

    // Append the pointers for their workers.
    let pointer = |dead_letter: &LockedDeadLetter| {
        let pointer = Pointer {
            dead_letter: dead_letter.id,
            generation: dead_letter.generation + 1,
        };
        (
            dead_letter.worker.clone(),
            pointer.output(&dead_letter.worker, &dead_letter.event_id),
        )
    };
    let pointers: Vec<(String, Output)> = dead_letters.iter().map(pointer).collect();
    let pointers: Vec<(&str, &Output)> = pointers
        .iter()
        .map(|(worker, output)| (worker.as_str(), output))
        .collect();
    let rows = outbox::append_for(session, &pointers, shared::NOTICE_LEASE).await?;
    Ok((dead_letters::action_results(ids, &refused, &done), rows))
}

/// Closes or edits dead letters. Before redriven ones are closed, their deliveries in progress end.
pub(super) async fn update_dead_letters(
    session: &mut Session,
    ids: &[i64],
    action: &DeadLetterAction,
    attribution: &Attribution,
) -> Result<Vec<DeadLetterActionResult>> {
    // Lock the dead letters, wait for redriven ones in progress, and check each.
    let mut found = lock_dead_letters(session, ids).await?;
    if action.closed_state().is_some() && wait_for_redriven_deliveries(session, &found).await? > 0 {
        found = lock_dead_letters(session, ids).await?;
    }
    let mut refused = Vec::new();
    let mut done = Vec::new();
    for dead_letter in found {
        match dead_letter.action_refusal(action) {
            Some(why) => refused.push((dead_letter.id, why)),
            None => done.push(dead_letter.id),
        }
    }
    if let Some(state) = action.closed_state() {
        close(session, &done, state).await?;
        attempts::delete_recordings_of_dead_letters(session, &done).await?;
    }
    if let DeadLetterAction::Edit(body) = action {
        edit(session, &done, body, attribution).await?;
    }
    write_audit(session, &done, action.as_str(), attribution).await?;
    Ok(dead_letters::action_results(
        ids.iter().copied(),
        &refused,
        &done,
    ))
}

/// The message of a redriven dead letter of `worker`, unless the pointer to it is out of date.
pub(super) async fn redriven_message(
    session: &mut Session,
    worker: &str,
    id: i64,
    generation: u32,
) -> Result<RedriveLookup> {
    let query = session.query(
        "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at,
             coalesce((select edited.body from oncely.dead_letter_edit as edited
                       where edited.dead_letter_id = dead_letter.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely.worker where name = dead_letter.worker), 0) as active
         from oncely.dead_letter where id = $1 and generation = $2 and state = 'redriven' and worker = $3",
    );
    let row = query
        .bind(id)
        .bind(generation.cast_signed())
        .bind(worker)
        .fetch_optional(session.connection())
        .await
        .doing("read a redriven dead letter")?;
    match row {
        Some(row) => {
            let message = rows::redriven(&row)?;
            let active: i32 = row.try_get("active").doing("read the active version")?;
            Ok(RedriveLookup::Message(
                Box::new(message),
                active.cast_unsigned(),
            ))
        }
        None => Ok(RedriveLookup::OutOfDate(Settled::seen_by_store())),
    }
}

/// The current dead letters, locked in the order of their ids. The inbox is read after they are
/// locked.
async fn lock_dead_letters(session: &mut Session, ids: &[i64]) -> Result<Vec<LockedDeadLetter>> {
    let context = |error| errors::from_statement(error, "lock dead letters");
    let query = session.query(
        "select id, worker, event_id, payload_sha256, reason, state, generation from oncely.dead_letter
         where id = any($1) order by id for update",
    );
    let rows = query
        .bind(ids)
        .fetch_all(session.connection())
        .await
        .map_err(context)?;
    let read = |row: &PgRow| -> anyhow::Result<LockedDeadLetter> {
        Ok(LockedDeadLetter {
            id: row.try_get("id")?,
            worker: row.try_get("worker")?,
            event_id: row.try_get("event_id")?,
            payload_sha256: row.try_get("payload_sha256")?,
            reason: row.try_get("reason")?,
            state: DeadLetterState::parse(row.try_get("state")?)?,
            generation: row.try_get::<i32, _>("generation")?.cast_unsigned(),
            inbox: None,
        })
    };
    let dead_letters: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    let mut dead_letters = dead_letters
        .context("read dead letters")
        .map_err(StoreError::Unavailable)?;
    let query = session.query(
        "select dead_letter.id, inbox.state from oncely.dead_letter
             join oncely.inbox on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
         where dead_letter.id = any($1)",
    );
    let rows = query
        .bind(ids)
        .fetch_all(session.connection())
        .await
        .map_err(context)?;
    let inbox: sqlx::Result<HashMap<i64, String>> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    let mut inbox = inbox.map_err(context)?;
    for dead_letter in &mut dead_letters {
        dead_letter.inbox = inbox.remove(&dead_letter.id);
    }
    Ok(dead_letters)
}

/// Clears crash markers, so that messages during which hosts crashed are tried again.
async fn clear_crash_markers(
    session: &mut Session,
    dead_letters: &[LockedDeadLetter],
) -> Result<()> {
    let query = session.query(
        "delete from oncely.crash_marker using unnest($1::text[], $2::text[]) as given (worker, event_id)
         where crash_marker.worker = given.worker and crash_marker.event_id = given.event_id",
    );
    query
        .bind(
            dead_letters
                .iter()
                .map(|dead_letter| dead_letter.worker.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            dead_letters
                .iter()
                .map(|dead_letter| dead_letter.event_id.as_str())
                .collect::<Vec<_>>(),
        )
        .execute(session.connection())
        .await
        .doing("clear the crash markers of dead letters")?;
    Ok(())
}

async fn start_generation(session: &mut Session, ids: &[i64]) -> Result<()> {
    let query = session.query(
        "update oncely.dead_letter
         set state = 'redriven', generation = generation + 1, last_action_at = pg_catalog.now(),
             attempts_before = (
                 select coalesce(pg_catalog.max(attempt), 0) from oncely.attempt
                 where attempt.worker = dead_letter.worker and attempt.event_id = dead_letter.event_id)
         where id = any($1)",
    );
    query
        .bind(ids)
        .execute(session.connection())
        .await
        .doing("redrive dead letters")?;
    Ok(())
}

/// Locks the inbox rows of redriven events, to wait for deliveries that claimed them. Returns the
/// number of redriven dead letters.
async fn wait_for_redriven_deliveries(
    session: &mut Session,
    dead_letters: &[LockedDeadLetter],
) -> Result<usize> {
    let is_in_flight = |dead_letter: &&LockedDeadLetter| {
        dead_letter.owns_event() && dead_letter.state == DeadLetterState::Redriven
    };
    let in_flight: Vec<&LockedDeadLetter> = dead_letters.iter().filter(is_in_flight).collect();
    if in_flight.is_empty() {
        return Ok(0);
    }
    let workers: Vec<_> = in_flight
        .iter()
        .map(|dead_letter| dead_letter.worker.as_str())
        .collect();
    let event_ids: Vec<_> = in_flight
        .iter()
        .map(|dead_letter| dead_letter.event_id.as_str())
        .collect();
    let query = session.query(
        "select from oncely.inbox where (worker, event_id) in (select * from unnest($1::text[], $2::text[]))
         order by worker, event_id for update",
    );
    query
        .bind(&workers)
        .bind(&event_ids)
        .execute(session.connection())
        .await
        .doing("lock redriven events")?;
    // Add missing rows, of events that were redriven by an earlier version of Oncely.
    let query = session.query("select from oncely.settle_dead($1, $2, $3, null, null)");
    query
        .bind(workers)
        .bind(event_ids)
        .bind(
            in_flight
                .iter()
                .map(|dead_letter| dead_letter.payload_sha256.as_slice())
                .collect::<Vec<_>>(),
        )
        .execute(session.connection())
        .await
        .doing("lock redriven events")?;
    Ok(in_flight.len())
}

async fn close(session: &mut Session, ids: &[i64], state: DeadLetterState) -> Result<()> {
    let query =
        session.query("update oncely.dead_letter set state = $2, last_action_at = pg_catalog.now() where id = any($1)");
    query
        .bind(ids)
        .bind(state.as_str())
        .execute(session.connection())
        .await
        .doing("close dead letters")?;
    Ok(())
}

async fn edit(
    session: &mut Session,
    ids: &[i64],
    body: &Bytes,
    attribution: &Attribution,
) -> Result<()> {
    let query = session.query(
        "insert into oncely.dead_letter_edit (dead_letter_id, edit, body, actor, note)
         select id, coalesce((select pg_catalog.max(edit) from oncely.dead_letter_edit where dead_letter_id = id), 0) + 1, $2, $3, $4
         from unnest($1::bigint[]) as given (id)",
    );
    query
        .bind(ids)
        .bind(body.as_ref())
        .bind(shared::printable(&attribution.actor))
        .bind(shared::printable(
            attribution.note.as_deref().unwrap_or_default(),
        ))
        .execute(session.connection())
        .await
        .doing("store a corrected body")?;
    Ok(())
}

/// Records an action in the audit.
async fn write_audit(
    session: &mut Session,
    ids: &[i64],
    action: &str,
    attribution: &Attribution,
) -> Result<()> {
    let query = session.query(
        "insert into oncely.dead_letter_audit (dead_letter_id, action, generation, actor, note)
         select id, $2, generation, $3, $4 from oncely.dead_letter where id = any($1) order by id",
    );
    query
        .bind(ids)
        .bind(action)
        .bind(shared::printable(&attribution.actor))
        .bind(attribution.note.as_deref().map(shared::printable))
        .execute(session.connection())
        .await
        .doing("write the audit of dead letters")?;
    Ok(())
}

/// Records as done the redriven dead letters that took effect, before their inbox records are
/// deleted.
pub(super) async fn record_completed_redrives(session: &mut Session) -> Result<()> {
    let query = session.query(
        "with done as (
             update oncely.dead_letter set state = 'done' from oncely.inbox
             where dead_letter.state = 'redriven' and inbox.worker = dead_letter.worker
                 and inbox.event_id = dead_letter.event_id and inbox.state = 'done'
             returning dead_letter.worker, dead_letter.event_id
         )
         delete from oncely.recording using done
         where recording.worker = done.worker and recording.event_id = done.event_id",
    );
    query
        .execute(session.connection())
        .await
        .doing("record completed redrives")?;
    Ok(())
}
