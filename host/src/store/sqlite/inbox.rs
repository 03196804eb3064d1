//! The inbox: one row for each event id that a worker settled.

use std::collections::HashSet;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::session::Session;
use crate::store::error::Doing as _;
use crate::store::{Claim, Claimed, Result, shared};

/// Claims event ids with one statement, and reads those that already existed with another.
pub(in crate::store) async fn claim(
    session: &mut Session,
    worker: &str,
    claims: &[Claim],
) -> Result<Vec<Claimed>> {
    // Redriven events are dead, and must be reclaimed before they can be claimed.
    for claim in claims.iter().filter(|claim| claim.redriven) {
        reclaim(session, worker, claim).await?;
    }

    // Claim all event ids in one statement.
    let given: Vec<_> = claims
        .iter()
        .map(|claim| {
            let (stream, sequence) = claim.origin.as_ref().map(|(stream, sequence)| (stream, sequence)).unzip();
            let payload = hex::encode(claim.payload_sha256);
            serde_json::json!({"event_id": claim.event_id, "payload": payload, "stream": stream, "sequence": sequence})
        })
        .collect();
    let given = serde_json::Value::Array(given).to_string();
    let fresh = insert(session, worker, &given).await?;
    let found = find_existing(session, worker, &given).await?;

    // An event id that was not inserted existed before.
    let result_of = |(claim, (payload, attempts)): (&Claim, &(Vec<u8>, i64))| {
        let existing_payload = (!fresh.contains(&claim.event_id)).then_some(payload.as_slice());
        shared::claimed(claim, existing_payload, *attempts)
    };
    Ok(claims.iter().zip(&found).map(result_of).collect())
}

/// Reclaims a redriven event, so that it can be claimed although it is dead.
async fn reclaim(session: &mut Session, worker: &str, claim: &Claim) -> Result<()> {
    sqlx::query(
        "delete from oncely_inbox as inbox
         where worker = $1 and event_id = $2 and payload_sha256 = $3 and state = 'dead' and exists (
             select 1 from oncely_dead_letter as dead_letter where dead_letter.worker = inbox.worker
                 and dead_letter.event_id = inbox.event_id and dead_letter.payload_sha256 = inbox.payload_sha256
                 and dead_letter.state = 'redriven')",
    )
    .bind(worker)
    .bind(&claim.event_id)
    .bind(claim.payload_sha256.as_slice())
    .execute(session.connection().doing("reclaim a redriven event")?)
    .await
    .doing("reclaim a redriven event")?;
    Ok(())
}

/// Claims the event ids that do not exist yet, and returns them.
async fn insert(session: &mut Session, worker: &str, given: &str) -> Result<HashSet<String>> {
    let rows = sqlx::query(
        "insert into oncely_inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
         select $1, value ->> 'event_id', 'done', unhex(value ->> 'payload'), value ->> 'stream', value ->> 'sequence'
         from json_each($2) where true
         on conflict do nothing
         returning event_id",
    )
    .bind(worker)
    .bind(given)
    .fetch_all(session.connection().doing("claim event ids")?)
    .await
    .doing("claim event ids")?;
    let fresh: sqlx::Result<_> = rows.iter().map(|row| row.try_get(0)).collect();
    fresh.doing("read claimed event ids")
}

/// Payload hash and attempts of each event id, in the given order. The `cross join` keeps SQLite
/// from scanning the whole inbox in the outer loop.
async fn find_existing(
    session: &mut Session,
    worker: &str,
    given: &str,
) -> Result<Vec<(Vec<u8>, i64)>> {
    let rows = sqlx::query(
        "select inbox.payload_sha256,
             (select coalesce(max(attempt), 0) from oncely_attempt as attempt
              where attempt.worker = $1 and attempt.event_id = given.value ->> 'event_id')
         from json_each($2) as given
             cross join oncely_inbox as inbox on inbox.worker = $1 and inbox.event_id = given.value ->> 'event_id'
         order by given.key",
    )
    .bind(worker)
    .bind(given)
    .fetch_all(session.connection().doing("look up event ids")?)
    .await
    .doing("look up event ids")?;
    let read = |row: &SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?));
    let found: sqlx::Result<_> = rows.iter().map(read).collect();
    found.doing("read event ids")
}

/// Releases claims of this transaction. A redriven event is dead again.
pub(in crate::store) async fn release_claims(
    session: &mut Session,
    worker: &str,
    event_ids: &[&str],
) -> Result<()> {
    let event_ids = serde_json::json!(event_ids).to_string();

    // The record of a redriven event becomes dead again.
    sqlx::query(
        "update oncely_inbox as inbox set state = 'dead'
         where worker = $1 and event_id in (select value from json_each($2)) and exists (
             select 1 from oncely_dead_letter as dead_letter where dead_letter.worker = inbox.worker
                 and dead_letter.event_id = inbox.event_id and dead_letter.payload_sha256 = inbox.payload_sha256
                 and dead_letter.state = 'redriven')",
    )
    .bind(worker)
    .bind(&event_ids)
    .execute(session.connection().doing("release claims")?)
    .await
    .doing("release claims")?;

    // All other records disappear.
    sqlx::query(
        "delete from oncely_inbox
         where worker = $1 and event_id in (select value from json_each($2)) and state = 'done'",
    )
    .bind(worker)
    .bind(event_ids)
    .execute(session.connection().doing("release claims")?)
    .await
    .doing("release claims")?;
    Ok(())
}
