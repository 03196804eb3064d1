//! Dead letters: the original bytes and headers of what could not be handled.

use std::collections::{HashMap, HashSet};

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use super::{attempts, errors, outbox};
use crate::store::shared::{self, Burial};
use crate::store::{LetterFilter, LetterRecord, LetterSummary, OutboxRow, Output, Result, StoreError};
use crate::verdict::Letter;

/// Writes letters, their inbox records and their notices; returns the notices. What is settled already adds nothing.
pub(super) async fn bury(session: &mut Session, letters: &[(Letter, Output)]) -> Result<Vec<OutboxRow>> {
    let burials = Burial::all(letters);
    let inserted = settle(session, &burials).await?;
    let held = held_payloads(session, &burials).await?;
    let new = shared::to_bury(&burials, &inserted, &held);
    let written = insert(session, &new).await?;
    let notices: Vec<_> = new
        .iter()
        .filter(|burial| {
            let (worker, event_id) = burial.key();
            written.contains(&(worker.to_owned(), event_id.to_owned(), burial.payload_sha256.to_vec()))
        })
        .map(|burial| (burial.letter.worker.as_str(), burial.notice))
        .collect();
    outbox::append_for(session, &notices, shared::NOTICE_LEASE).await
}

/// Settles the events that are not settled yet as dead, and returns them.
async fn settle(session: &mut Session, burials: &[Burial<'_>]) -> Result<HashSet<(String, String)>> {
    let mut streams = Vec::with_capacity(burials.len());
    let mut sequences = Vec::with_capacity(burials.len());
    for burial in burials {
        streams.push(burial.origin().map(|(stream, _)| stream));
        sequences.push(burial.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?);
    }
    let query = session.query(
        "insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
         select worker, event_id, 'dead', payload_sha256, stream, stream_sequence
         from unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::bigint[])
             as given (worker, event_id, payload_sha256, stream, stream_sequence)
         order by worker, event_id
         on conflict do nothing
         returning worker, event_id",
    );
    let rows = query
        .bind(burials.iter().map(|burial| burial.key().0).collect::<Vec<_>>())
        .bind(burials.iter().map(|burial| burial.key().1).collect::<Vec<_>>())
        .bind(burials.iter().map(|burial| burial.payload_sha256.as_slice()).collect::<Vec<_>>())
        .bind(streams)
        .bind(sequences)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "settle dead events"))?;
    let keys: sqlx::Result<_> = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect();
    keys.map_err(|error| errors::of_statement(error, "read settled events"))
}

async fn held_payloads(session: &mut Session, burials: &[Burial<'_>]) -> Result<HashMap<(String, String), Vec<u8>>> {
    let query = session.query(
        "select worker, event_id, payload_sha256 from oncely.inbox
         where (worker, event_id) in (select * from unnest($1::text[], $2::text[]))",
    );
    let rows = query
        .bind(burials.iter().map(|burial| burial.key().0).collect::<Vec<_>>())
        .bind(burials.iter().map(|burial| burial.key().1).collect::<Vec<_>>())
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "look up dead events"))?;
    let held: sqlx::Result<_> =
        rows.iter().map(|row| Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?))).collect();
    held.map_err(|error| errors::of_statement(error, "read dead events"))
}

/// Writes letters that are not there yet and returns worker, event id and payload of those it wrote.
async fn insert(session: &mut Session, new: &[&Burial<'_>]) -> Result<HashSet<(String, String, Vec<u8>)>> {
    let mut headers = Vec::with_capacity(new.len());
    let mut sequences = Vec::with_capacity(new.len());
    for burial in new {
        headers.push(shared::headers_to_text(&burial.letter.message.headers)?);
        sequences.push(burial.origin().map(|(_, sequence)| shared::signed(sequence)).transpose()?);
    }
    let letters = || new.iter().map(|burial| burial.letter);
    let query = session.query(
        "insert into oncely.dead_letter (worker, event_id, payload_sha256, reason, code, detail, attempts, version,
             subject, headers, body, stream, stream_sequence)
         select * from unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::text[], $6::text[], $7::integer[],
             $8::integer[], $9::text[], $10::text[], $11::bytea[], $12::text[], $13::bigint[])
         on conflict do nothing
         returning worker, event_id, payload_sha256",
    );
    let rows = query
        .bind(letters().map(|letter| letter.worker.as_str()).collect::<Vec<_>>())
        .bind(letters().map(|letter| letter.message.event_id.as_str()).collect::<Vec<_>>())
        .bind(new.iter().map(|burial| burial.payload_sha256.as_slice()).collect::<Vec<_>>())
        .bind(letters().map(|letter| letter.reason.as_str()).collect::<Vec<_>>())
        .bind(letters().map(|letter| letter.code.as_deref().map(shared::printable)).collect::<Vec<_>>())
        .bind(letters().map(|letter| shared::printable(&letter.detail)).collect::<Vec<_>>())
        .bind(letters().map(|letter| letter.attempts.cast_signed()).collect::<Vec<_>>())
        .bind(letters().map(|letter| letter.version.cast_signed()).collect::<Vec<_>>())
        .bind(letters().map(|letter| shared::printable(&letter.message.subject)).collect::<Vec<_>>())
        .bind(headers)
        .bind(letters().map(|letter| letter.message.body.as_ref()).collect::<Vec<&[u8]>>())
        .bind(new.iter().map(|burial| burial.origin().map(|(stream, _)| stream)).collect::<Vec<_>>())
        .bind(sequences)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "write dead letters"))?;
    let written: sqlx::Result<_> =
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).collect();
    written.map_err(|error| errors::of_statement(error, "read written dead letters"))
}

/// Letters, newest first.
pub(super) async fn list(session: &mut Session, filter: &LetterFilter) -> Result<Vec<LetterSummary>> {
    let query = session.query(
        "select id, worker, event_id, reason, code, detail, subject, attempts, version,
             (extract(epoch from died_at) * 1000000)::bigint as died_at
         from oncely.dead_letter
         where ($1::text is null or worker = $1) and ($2::text is null or reason = $2)
         order by id desc limit $3",
    );
    let rows = query
        .bind(filter.worker.as_deref())
        .bind(filter.reason.as_deref())
        .bind(i64::from(filter.limit))
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "list dead letters"))?;
    rows.iter().map(|row| summary(row).context("read a dead letter").map_err(StoreError::Unavailable)).collect()
}

/// One letter, with its attempts.
pub(super) async fn find(session: &mut Session, id: i64) -> Result<Option<LetterRecord>> {
    let query = session.query(
        "select id, worker, event_id, reason, code, detail, subject, attempts, version,
             (extract(epoch from died_at) * 1000000)::bigint as died_at, headers, body, stream, stream_sequence
         from oncely.dead_letter where id = $1",
    );
    let row = query
        .bind(id)
        .fetch_optional(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read a dead letter"))?;
    let Some(row) = row else { return Ok(None) };
    let mut letter = record(&row).context("read a dead letter").map_err(StoreError::Unavailable)?;
    letter.attempts = attempts::of_event(session, &letter.summary.worker, &letter.summary.event_id).await?;
    Ok(Some(letter))
}

fn summary(row: &PgRow) -> anyhow::Result<LetterSummary> {
    Ok(LetterSummary {
        id: row.try_get("id")?,
        worker: row.try_get("worker")?,
        event_id: row.try_get("event_id")?,
        reason: row.try_get("reason")?,
        code: row.try_get("code")?,
        detail: row.try_get("detail")?,
        subject: row.try_get("subject")?,
        attempts: row.try_get::<i32, _>("attempts")?.cast_unsigned(),
        version: row.try_get::<i32, _>("version")?.cast_unsigned(),
        died_at: shared::timestamp(row.try_get("died_at")?)?,
    })
}

fn record(row: &PgRow) -> anyhow::Result<LetterRecord> {
    Ok(LetterRecord {
        summary: summary(row)?,
        headers: shared::headers_from_text(row.try_get("headers")?)?,
        body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        origin: shared::origin(row.try_get("stream")?, row.try_get("stream_sequence")?),
        attempts: Vec::new(),
    })
}
