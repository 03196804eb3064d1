//! The inbox: one row for each settled event of a worker.

use std::collections::HashMap;

use anyhow::anyhow;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use crate::store::error::Doing as _;
use crate::store::{Claim, Claimed, Result, StoreError, shared};

/// Claims event ids, sorted, with one statement, which waits for transactions that hold one of
/// them. Records that such a transaction commits meanwhile are not in the statement's snapshot, so
/// a second statement reads them.
pub(in crate::store) async fn claim(
    session: &mut Session,
    worker: &str,
    claims: &[Claim],
) -> Result<Vec<Claimed>> {
    // Redriven events are dead in the inbox: delete those records first.
    for claim in claims.iter().filter(|claim| claim.redriven) {
        reclaim(session, worker, claim).await?;
    }
    let mut found = insert(session, worker, claims).await?;

    // Ids that are neither new nor visible were committed during the wait.
    let unseen: Vec<&str> = claims
        .iter()
        .map(|claim| claim.event_id.as_str())
        .filter(|event_id| !found.contains_key(*event_id))
        .collect();
    if !unseen.is_empty() {
        found.extend(find_existing(session, worker, &unseen).await?);
    }
    let result_of = |claim: &Claim| match found.get(&claim.event_id) {
        Some(found) => Ok(shared::claimed(
            claim,
            found.existing_payload.as_deref(),
            found.attempts,
        )),
        None => Err(StoreError::Conflict(anyhow!(
            "the inbox record of event {} was deleted during its claim",
            claim.event_id
        ))),
    };
    claims.iter().map(result_of).collect()
}

/// Deletes the dead record of a redriven event, so that the event can be claimed.
async fn reclaim(session: &mut Session, worker: &str, claim: &Claim) -> Result<()> {
    let query = session.query("select oncely_definer.reclaim($1, $2, $3, $4)");
    query
        .bind(session.token())
        .bind(worker)
        .bind(&claim.event_id)
        .bind(claim.payload_sha256.as_slice())
        .execute(session.connection())
        .await
        .doing("reclaim a redriven event")?;
    Ok(())
}

/// The result for one event id.
struct InboxEntry {
    /// The payload of an earlier record; `None` if the claim created the record.
    existing_payload: Option<Vec<u8>>,
    attempts: i64,
}

async fn insert(
    session: &mut Session,
    worker: &str,
    claims: &[Claim],
) -> Result<HashMap<String, InboxEntry>> {
    let event_ids: Vec<&str> = claims.iter().map(|claim| claim.event_id.as_str()).collect();
    let payloads: Vec<&[u8]> = claims
        .iter()
        .map(|claim| claim.payload_sha256.as_slice())
        .collect();
    let mut streams = Vec::with_capacity(claims.len());
    let mut sequences = Vec::with_capacity(claims.len());
    for claim in claims {
        streams.push(claim.origin.as_ref().map(|(stream, _)| stream.as_str()));
        sequences.push(
            claim
                .origin
                .as_ref()
                .map(|(_, sequence)| shared::signed(*sequence))
                .transpose()?,
        );
    }
    let query = session.query("select * from oncely_definer.claim($1, $2, $3, $4, $5, $6)");
    let rows = query
        .bind(session.token())
        .bind(worker)
        .bind(event_ids)
        .bind(payloads)
        .bind(streams)
        .bind(sequences)
        .fetch_all(session.connection())
        .await
        .doing("claim event ids")?;
    let read = |row: &PgRow| {
        let existing_payload: Option<Vec<u8>> = row.try_get("payload_sha256")?;
        let known = row.try_get("fresh")? || existing_payload.is_some();
        Ok(known.then_some((
            row.try_get("event_id")?,
            InboxEntry {
                existing_payload,
                attempts: row.try_get("attempts")?,
            },
        )))
    };
    let found: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
    let found = found.doing("read claimed event ids")?;
    Ok(found.into_iter().flatten().collect())
}

async fn find_existing(
    session: &mut Session,
    worker: &str,
    event_ids: &[&str],
) -> Result<HashMap<String, InboxEntry>> {
    let query = session.query("select * from oncely_definer.lookup($1, $2, $3)");
    let rows = query
        .bind(session.token())
        .bind(worker)
        .bind(event_ids)
        .fetch_all(session.connection())
        .await
        .doing("find existing event ids")?;
    let read = |row: &PgRow| {
        Ok((
            row.try_get(0)?,
            InboxEntry {
                existing_payload: Some(row.try_get(1)?),
                attempts: 0,
            },
        ))
    };
    let found: sqlx::Result<_> = rows.iter().map(read).collect();
    found.doing("read event ids")
}

/// Releases claims of this transaction.
pub(in crate::store) async fn release_claims(
    session: &mut Session,
    worker: &str,
    event_ids: &[String],
) -> Result<()> {
    let query = session.query("select oncely_definer.release_claims($1, $2, $3)");
    query
        .bind(session.token())
        .bind(worker)
        .bind(event_ids)
        .execute(session.connection())
        .await
        .doing("release claims")?;
    Ok(())
}
