//! Actions on dead letters: redrive, edit, close.

use std::collections::HashMap;

use anyhow::Context as _;
use bytes::Bytes;

use super::db::{Db, Param, Row, Sql, read_row, read_rows};
use super::dead_letters::{self, LockedDeadLetter};
use super::rows::Columns as _;
use super::{
    Attribution, DeadLetterAction, DeadLetterActionResult, DeadLetterState, OutboxRow, Output,
    Redrive, RedriveLookup, Result, SeenDeadLetter, StoreError, attempts, outputs, rows, shared,
};
use crate::model::redrive::Pointer;
use crate::model::verdict::Settled;

/// Redrives dead letters. Their rows are locked first, so that only one of two concurrent redrives
/// succeeds.
pub(super) async fn redrive(
    db: &mut Db,
    wanted: &[Redrive],
    attribution: &Attribution,
) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
    // Lock the dead letters and check each.
    let ids: Vec<i64> = wanted.iter().map(|redrive| redrive.id).collect();
    let mut refused = Vec::new();
    let mut dead_letters = Vec::new();
    for dead_letter in lock_dead_letters(db, &ids).await? {
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
    attempts::clear_crash_markers_of_dead_letters(db, &done).await?;
    start_generation(db, &done).await?;
    write_audit(db, &done, "redrive", attribution).await?;

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
    let rows = outputs::append(db, &pointers).await?;
    Ok((dead_letters::action_results(ids, &refused, &done), rows))
}

/// Closes or edits dead letters. Before redriven ones are closed, their deliveries in progress end.
pub(super) async fn update_dead_letters(
    db: &mut Db,
    ids: &[i64],
    action: &DeadLetterAction,
    attribution: &Attribution,
    seen: &[SeenDeadLetter],
) -> Result<Vec<DeadLetterActionResult>> {
    // Lock the dead letters, wait for redriven ones in progress, and check each.
    let mut found = lock_dead_letters(db, ids).await?;
    if action.closed_state().is_some() && wait_for_redriven_deliveries(db, &found).await? {
        found = lock_dead_letters(db, ids).await?;
    }
    let edits = match seen {
        [] => HashMap::new(),
        _ => edit_counts(db, ids).await?,
    };
    let mut refused = Vec::new();
    let mut done = Vec::new();
    for dead_letter in found {
        let change = seen
            .iter()
            .find(|seen| seen.id == dead_letter.id)
            .and_then(|seen| {
                let edits = edits.get(&dead_letter.id).copied().unwrap_or_default();
                dead_letter.change_since(seen, edits)
            });
        match change.or_else(|| dead_letter.action_refusal(action)) {
            Some(why) => refused.push((dead_letter.id, why)),
            None => done.push(dead_letter.id),
        }
    }
    if let Some(state) = action.closed_state() {
        close(db, &done, state).await?;
        attempts::delete_recordings_of_dead_letters(db, &done).await?;
    }
    if let DeadLetterAction::Edit(body) = action {
        edit(db, &done, body, attribution).await?;
    }
    write_audit(db, &done, action.as_str(), attribution).await?;
    Ok(dead_letters::action_results(
        ids.iter().copied(),
        &refused,
        &done,
    ))
}

/// The message of a redriven dead letter of `worker`, unless the pointer to it is out of date.
pub(super) async fn redriven_message(
    db: &mut Db,
    worker: &str,
    id: i64,
    generation: u32,
) -> Result<RedriveLookup> {
    let sql = Sql {
        postgres: "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at,
             coalesce((select edited.body from oncely.dead_letter_edit as edited
                       where edited.dead_letter_id = dead_letter.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely.worker where name = dead_letter.worker), 0) as active
         from oncely.dead_letter where id = $1 and generation = $2 and state = 'redriven' and worker = $3",
        sqlite: "select event_id, subject, headers, payload_sha256, attempts_before, stream, stream_sequence,
             coalesce(stored_at, first_died_at, died_at) as stored_at,
             coalesce((select edited.body from oncely_dead_letter_edit as edited
                       where edited.dead_letter_id = dead.id order by edit desc limit 1), body) as body,
             coalesce((select version from oncely_worker where name = dead.worker), 0) as active
         from oncely_dead_letter as dead
         where id = $1 and generation = $2 and state = 'redriven' and worker = $3",
        doing: "read a redriven dead letter",
    };
    let params = [
        Param::Int(id),
        Param::Int(generation.into()),
        Param::Text(worker),
    ];
    let Some(row) = db.fetch_optional(sql, &params).await? else {
        return Ok(RedriveLookup::OutOfDate(Settled::seen_by_store()));
    };
    let message = rows::redriven(&row)?;
    let active = read_row(&row, sql.doing, |row| row.small_number("active"))?;
    Ok(RedriveLookup::Message(Box::new(message), active))
}

/// The current dead letters, locked in the order of their ids. The inbox is read after they are
/// locked. On SQLite, one transaction writes at a time.
async fn lock_dead_letters(db: &mut Db, ids: &[i64]) -> Result<Vec<LockedDeadLetter>> {
    let sql = Sql {
        postgres: "select id, worker, event_id, reason, state, generation from oncely.dead_letter
         where id = any($1) order by id for update",
        sqlite: "select id, worker, event_id, reason, state, generation from oncely_dead_letter
         where id in (select value from json_each($1)) order by id",
        doing: "lock dead letters",
    };
    let rows = db.fetch_all(sql, &[Param::Ints(ids)]).await?;
    let read = |row: &Row| -> anyhow::Result<LockedDeadLetter> {
        Ok(LockedDeadLetter {
            id: row.get("id")?,
            worker: row.text("worker")?,
            event_id: row.text("event_id")?,
            reason: row.text("reason")?,
            state: DeadLetterState::parse(&row.text("state")?)?,
            generation: row.small_number("generation")?,
            inbox: None,
        })
    };
    let dead_letters: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    let mut dead_letters = dead_letters
        .context("read dead letters")
        .map_err(StoreError::Unavailable)?;
    let mut inbox = inbox_states(db, ids).await?;
    for dead_letter in &mut dead_letters {
        dead_letter.inbox = inbox.remove(&dead_letter.id);
    }
    Ok(dead_letters)
}

/// The state of the inbox record of each dead letter's event.
async fn inbox_states(db: &mut Db, ids: &[i64]) -> Result<HashMap<i64, String>> {
    let sql = Sql {
        postgres: "select dead_letter.id, inbox.state from oncely.dead_letter
             join oncely.inbox on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
         where dead_letter.id = any($1)",
        sqlite: "select dead_letter.id, inbox.state from oncely_dead_letter as dead_letter
             join oncely_inbox as inbox on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
         where dead_letter.id in (select value from json_each($1))",
        doing: "read the inbox of dead letters",
    };
    let rows = db.fetch_all(sql, &[Param::Ints(ids)]).await?;
    let states = read_rows(&rows, sql.doing, |row| {
        Ok((row.get("id")?, row.text("state")?))
    })?;
    Ok(states.into_iter().collect())
}

/// The number of corrected bodies of each locked dead letter that has some: the last one has it.
async fn edit_counts(db: &mut Db, ids: &[i64]) -> Result<HashMap<i64, u32>> {
    let sql = Sql {
        postgres:
            "select dead_letter_id, pg_catalog.max(edit) as edits from oncely.dead_letter_edit
         where dead_letter_id = any($1) group by dead_letter_id",
        sqlite: "select dead_letter_id, max(edit) as edits from oncely_dead_letter_edit
         where dead_letter_id in (select value from json_each($1)) group by dead_letter_id",
        doing: "count corrected bodies",
    };
    let rows = db.fetch_all(sql, &[Param::Ints(ids)]).await?;
    let counts = read_rows(&rows, sql.doing, |row| {
        Ok((row.get("dead_letter_id")?, row.small_number("edits")?))
    })?;
    Ok(counts.into_iter().collect())
}

async fn start_generation(db: &mut Db, ids: &[i64]) -> Result<()> {
    let sql = Sql {
        postgres: "update oncely.dead_letter
         set state = 'redriven', generation = generation + 1, last_action_at = pg_catalog.now(),
             attempts_before = (
                 select coalesce(pg_catalog.max(attempt), 0) from oncely.attempt
                 where attempt.worker = dead_letter.worker and attempt.event_id = dead_letter.event_id)
         where id = any($1)",
        sqlite: "update oncely_dead_letter as dead_letter
         set state = 'redriven', generation = generation + 1,
             last_action_at = cast(unixepoch('subsec') * 1000000 as integer),
             attempts_before = (
                 select coalesce(max(attempt), 0) from oncely_attempt as attempt
                 where attempt.worker = dead_letter.worker and attempt.event_id = dead_letter.event_id)
         where id in (select value from json_each($1))",
        doing: "redrive dead letters",
    };
    db.execute(sql, &[Param::Ints(ids)]).await.map(drop)
}

/// Locks the inbox rows of redriven events, to wait for deliveries that claimed them. Returns
/// whether there are any. On SQLite, one transaction writes at a time, so none is in progress.
async fn wait_for_redriven_deliveries(
    db: &mut Db,
    dead_letters: &[LockedDeadLetter],
) -> Result<bool> {
    let is_in_flight = |dead_letter: &&LockedDeadLetter| {
        dead_letter.owns_event() && dead_letter.state == DeadLetterState::Redriven
    };
    let in_flight = dead_letters.iter().filter(is_in_flight);
    let ids: Vec<i64> = in_flight.map(|dead_letter| dead_letter.id).collect();
    if ids.is_empty() || !matches!(db, Db::Postgres(_)) {
        return Ok(false);
    }
    let sql = Sql::on_postgres(
        "select from oncely.inbox where (worker, event_id) in (
             select worker, event_id from oncely.dead_letter where id = any($1))
         order by worker, event_id for update",
        "lock redriven events",
    );
    db.execute(sql, &[Param::Ints(&ids)]).await?;
    Ok(true)
}

async fn close(db: &mut Db, ids: &[i64], state: DeadLetterState) -> Result<()> {
    let sql = Sql {
        postgres: "update oncely.dead_letter set state = $2, last_action_at = pg_catalog.now() where id = any($1)",
        sqlite: "update oncely_dead_letter set state = $2, last_action_at = cast(unixepoch('subsec') * 1000000 as integer)
         where id in (select value from json_each($1))",
        doing: "close dead letters",
    };
    let params = [Param::Ints(ids), Param::Text(state.as_str())];
    db.execute(sql, &params).await.map(drop)
}

async fn edit(db: &mut Db, ids: &[i64], body: &Bytes, attribution: &Attribution) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.dead_letter_edit (dead_letter_id, edit, body, actor, note)
         select id, coalesce((select pg_catalog.max(edit) from oncely.dead_letter_edit where dead_letter_id = id), 0) + 1, $2, $3, $4
         from unnest($1::bigint[]) as given (id)",
        sqlite: "insert into oncely_dead_letter_edit (dead_letter_id, edit, body, actor, note)
         select value, coalesce((select max(edit) from oncely_dead_letter_edit where dead_letter_id = value), 0) + 1, $2, $3, $4
         from json_each($1)",
        doing: "store a corrected body",
    };
    let actor = shared::printable(&attribution.actor);
    let note = shared::printable(attribution.note.as_deref().unwrap_or_default());
    let params = [
        Param::Ints(ids),
        Param::Bytes(body),
        Param::Text(&actor),
        Param::Text(&note),
    ];
    db.execute(sql, &params).await.map(drop)
}

/// Records an action in the audit.
async fn write_audit(
    db: &mut Db,
    ids: &[i64],
    action: &str,
    attribution: &Attribution,
) -> Result<()> {
    let sql = Sql {
        postgres:
            "insert into oncely.dead_letter_audit (dead_letter_id, action, generation, actor, note, stated_name)
         select id, $2, generation, $3, $4, $5 from oncely.dead_letter where id = any($1) order by id",
        sqlite:
            "insert into oncely_dead_letter_audit (dead_letter_id, action, generation, actor, note, stated_name)
         select id, $2, generation, $3, $4, $5 from oncely_dead_letter
         where id in (select value from json_each($1)) order by id",
        doing: "write the audit of dead letters",
    };
    let actor = shared::printable(&attribution.actor);
    let note = attribution.note.as_deref().map(shared::printable);
    let stated_name = attribution.stated_name.as_deref().map(shared::printable);
    let params = [
        Param::Ints(ids),
        Param::Text(action),
        Param::Text(&actor),
        Param::OptionalText(note.as_deref()),
        Param::OptionalText(stated_name.as_deref()),
    ];
    db.execute(sql, &params).await.map(drop)
}
