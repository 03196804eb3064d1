//! Dead letters: the original bytes and headers of what could not be handled.

use std::collections::{HashMap, HashSet};

use anyhow::Context;
use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

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
    let mut notices = Vec::new();
    for burial in shared::to_bury(&burials, &inserted, &held) {
        if insert(session, burial).await? {
            notices.push((burial.letter.worker.as_str(), burial.notice));
        }
    }
    outbox::append_for(session, &notices, shared::NOTICE_LEASE).await
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

async fn held_payloads(session: &mut Session, burials: &[Burial<'_>]) -> Result<HashMap<(String, String), Vec<u8>>> {
    let doing = |error| errors::of_statement(error, "look up dead events");
    let mut held = HashMap::new();
    for burial in burials {
        let (worker, event_id) = burial.key();
        let row = sqlx::query("select payload_sha256 from oncely_inbox where worker = $1 and event_id = $2")
            .bind(worker)
            .bind(event_id)
            .fetch_one(session.connection().map_err(doing)?)
            .await
            .map_err(doing)?;
        held.insert((worker.to_owned(), event_id.to_owned()), row.try_get(0).map_err(doing)?);
    }
    Ok(held)
}

/// Writes a letter; false when it is there already.
async fn insert(session: &mut Session, burial: &Burial<'_>) -> Result<bool> {
    let doing = |error| errors::of_statement(error, "write a dead letter");
    let letter = burial.letter;
    let result = sqlx::query(
        "insert into oncely_dead_letter (worker, event_id, payload_sha256, reason, code, detail, attempts, version,
             subject, headers, body, stream, stream_sequence)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
         on conflict do nothing",
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
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(result.rows_affected() == 1)
}

/// Letters, newest first.
pub(super) async fn list(readers: &SqlitePool, filter: &LetterFilter) -> Result<Vec<LetterSummary>> {
    let rows = sqlx::query(
        "select id, worker, event_id, reason, code, detail, subject, attempts, version, died_at
         from oncely_dead_letter
         where ($1 is null or worker = $1) and ($2 is null or reason = $2)
         order by id desc limit $3",
    )
    .bind(filter.worker.as_deref())
    .bind(filter.reason.as_deref())
    .bind(filter.limit)
    .fetch_all(readers)
    .await
    .map_err(|error| errors::of_statement(error, "list dead letters"))?;
    rows.iter().map(|row| summary(row).context("read a dead letter").map_err(StoreError::Unavailable)).collect()
}

/// One letter, with its attempts.
pub(super) async fn find(readers: &SqlitePool, id: i64) -> Result<Option<LetterRecord>> {
    let row = sqlx::query(
        "select id, worker, event_id, reason, code, detail, subject, attempts, version, died_at, headers, body,
             stream, stream_sequence
         from oncely_dead_letter where id = $1",
    )
    .bind(id)
    .fetch_optional(readers)
    .await
    .map_err(|error| errors::of_statement(error, "read a dead letter"))?;
    let Some(row) = row else { return Ok(None) };
    let mut letter = record(&row).context("read a dead letter").map_err(StoreError::Unavailable)?;
    letter.attempts = attempts::of_event(readers, &letter.summary.worker, &letter.summary.event_id).await?;
    Ok(Some(letter))
}

fn summary(row: &SqliteRow) -> anyhow::Result<LetterSummary> {
    Ok(LetterSummary {
        id: row.try_get("id")?,
        worker: row.try_get("worker")?,
        event_id: row.try_get("event_id")?,
        reason: row.try_get("reason")?,
        code: row.try_get("code")?,
        detail: row.try_get("detail")?,
        subject: row.try_get("subject")?,
        attempts: row.try_get("attempts")?,
        version: row.try_get("version")?,
        died_at: shared::timestamp(row.try_get("died_at")?)?,
    })
}

fn record(row: &SqliteRow) -> anyhow::Result<LetterRecord> {
    Ok(LetterRecord {
        summary: summary(row)?,
        headers: shared::headers_from_text(row.try_get("headers")?)?,
        body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        origin: shared::origin(row.try_get("stream")?, row.try_get("stream_sequence")?),
        attempts: Vec::new(),
    })
}
