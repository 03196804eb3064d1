//! Writing dead letters: the original bytes and headers of what could not be handled.

use std::collections::{HashMap, HashSet};

use sqlx::Row;

use super::session::Session;
use super::{alarms, errors, outbox};
use crate::model::verdict::Letter;
use crate::store::shared::{self, Burial, Held};
use crate::store::{OutboxRow, Output, Result, Told};

/// Writes letters, their inbox records and their notices, and raises an alarm for failures that are new. What is settled
/// already adds nothing.
pub(super) async fn bury(
    session: &mut Session,
    letters: &[(Letter, Output)],
    new_failures: u32,
) -> Result<(Vec<OutboxRow>, Told)> {
    let burials = Burial::all(letters);
    let inserted = settle(session, &burials).await?;
    let held = held(session, &burials).await?;
    let new = shared::to_bury(&burials, &inserted, &held);
    let alarms = alarms::meet(session, &shared::newcomers(&new), new_failures).await?;
    let mut notices = Vec::new();
    for burial in new {
        if let Some((id, generation)) = insert(session, burial).await? {
            notices.push((burial.letter.worker.as_str(), burial.notice_of(id, generation)));
        }
    }
    let notices: Vec<(&str, &Output)> = notices.iter().map(|(worker, notice)| (*worker, notice)).collect();
    let notices = outbox::append_for(session, &notices, shared::NOTICE_LEASE).await?;
    Ok((notices, alarms::tell(session, alarms).await?))
}

/// Settles the events that are not settled yet as dead, and returns them.
async fn settle(session: &mut Session, burials: &[Burial<'_>]) -> Result<HashSet<(String, String)>> {
    let doing = |error| errors::of_statement(error, "settle dead events");
    let mut inserted = HashSet::new();
    for burial in burials {
        let (worker, event_id) = burial.key();
        let result = sqlx::query(
            "insert into oncely_inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
             values ($1, $2, 'dead', $3, $4, $5) on conflict do nothing",
        )
        .bind(worker)
        .bind(event_id)
        .bind(burial.payload_sha256.as_slice())
        .bind(burial.origin().map(|(stream, _)| stream))
        .bind(burial.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?)
        .execute(session.connection().map_err(doing)?)
        .await
        .map_err(doing)?;
        if result.rows_affected() == 1 {
            inserted.insert((worker.to_owned(), event_id.to_owned()));
        }
    }
    Ok(inserted)
}

async fn held(session: &mut Session, burials: &[Burial<'_>]) -> Result<HashMap<(String, String), Held>> {
    let doing = |error| errors::of_statement(error, "look up dead events");
    let mut held = HashMap::new();
    for burial in burials {
        let (worker, event_id) = burial.key();
        let row =
            sqlx::query("select payload_sha256, state = 'dead' from oncely_inbox where worker = $1 and event_id = $2")
                .bind(worker)
                .bind(event_id)
                .fetch_one(session.connection().map_err(doing)?)
                .await
                .map_err(doing)?;
        let payload_sha256 = row.try_get(0).map_err(doing)?;
        let is_dead = row.try_get(1).map_err(doing)?;
        held.insert((worker.to_owned(), event_id.to_owned()), Held { payload_sha256, is_dead });
    }
    Ok(held)
}

/// Writes a letter, or opens it again when it was put back, and returns its id and generation; none when it is there already.
async fn insert(session: &mut Session, burial: &Burial<'_>) -> Result<Option<(i64, u32)>> {
    let doing = |error| errors::of_statement(error, "write a dead letter");
    let letter = burial.letter;
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
    .bind(&letter.worker)
    .bind(&letter.message.event_id)
    .bind(burial.payload_sha256.as_slice())
    .bind(letter.reason.as_str())
    .bind(letter.code.as_deref().map(shared::printable))
    .bind(shared::printable(&letter.detail))
    .bind(letter.attempts)
    .bind(letter.version)
    .bind(shared::printable(&letter.message.subject))
    .bind(shared::headers_to_text(&letter.message.headers)?)
    .bind(letter.message.body.as_ref())
    .bind(burial.origin().map(|(stream, _)| stream))
    .bind(burial.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?)
    .bind(burial.stored_at())
    .bind(&burial.group.id)
    .fetch_optional(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose().map_err(doing)
}
