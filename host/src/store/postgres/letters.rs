//! Reading dead letters: the original bytes and headers of what could not be handled, and what became of it.

use anyhow::Context;
use bytes::Bytes;
use jiff::Timestamp;
use sqlx::Row;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;

use super::session::Session;
use super::{attempts, errors};
use crate::store::{
    AuditRecord, EditRecord, LetterFilter, LetterGroup, LetterOutput, LetterRecord, LetterState, LetterSummary, Result,
    StoreError, shared,
};

/// What a list shows of a letter. Whether one that was put back took effect stands in the inbox.
macro_rules! summaries {
    ($also:literal, $($which:tt)+) => {
        concat!(
            "select * from (
                 select id, worker, event_id, reason, code, detail, subject, attempts, version, generation, stream,
                     stream_sequence, group_id, case when state = 'redriven' and exists (
                         select from oncely.inbox where inbox.worker = dead_letter.worker
                             and inbox.event_id = dead_letter.event_id and inbox.state = 'done')
                     then 'done' else state end as state,
                     (extract(epoch from died_at) * 1000000)::bigint as died_at,
                     (extract(epoch from moved_at) * 1000000)::bigint as moved_at",
            $also,
            " from oncely.dead_letter where ",
            $($which)+,
            ") as letter"
        )
    };
}

/// What a filter says, but for subjects; see [`fitting`].
macro_rules! fits {
    () => {
        "($1::text is null or worker = $1) and ($2::text is null or reason = $2)
         and ($3::text is null or code = $3) and (cardinality($4::bigint[]) = 0 or id = any($4))
         and ($5::bigint is null or id < $5)
         and ($6::bigint is null or died_at >= timestamptz 'epoch' + $6 * interval '1 microsecond')
         and ($7::bigint is null or died_at < timestamptz 'epoch' + $7 * interval '1 microsecond')
         and ($8::text is null or group_id = $8)"
    };
}

/// The same for letters that wait for somebody; those of them that took effect are still to be left out.
macro_rules! fits_and_waits {
    () => {
        concat!("state in ('open', 'redriven') and ", fits!())
    };
}

/// Gives a query the values of a filter.
fn fitting<'q>(query: Query<'q, Postgres, PgArguments>, filter: &'q LetterFilter) -> Query<'q, Postgres, PgArguments> {
    query
        .bind(filter.worker.as_deref())
        .bind(filter.reason.as_deref())
        .bind(filter.code.as_deref())
        .bind(&filter.ids)
        .bind(filter.below)
        .bind(filter.since.map(|time| time.as_microsecond()))
        .bind(filter.until.map(|time| time.as_microsecond()))
        .bind(filter.group.as_deref())
}

/// One page of letters, newest first.
pub(super) async fn list(session: &mut Session, filter: &LetterFilter) -> Result<Vec<LetterSummary>> {
    let query = session.query(if filter.closed {
        concat!(summaries!("", fits!()), " order by id desc limit $9")
    } else {
        concat!(summaries!("", fits_and_waits!()), " where state <> 'done' order by id desc limit $9")
    });
    let rows = fitting(query, filter)
        .bind(i64::from(filter.limit))
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "list dead letters"))?;
    rows.iter().map(|row| summary(row).context("read a dead letter").map_err(StoreError::Unavailable)).collect()
}

/// How many letters fit, and when they died, by group and subject.
pub(super) async fn groups(session: &mut Session, filter: &LetterFilter) -> Result<Vec<LetterGroup>> {
    macro_rules! grouped {
        ($letters:expr, $which:literal) => {
            concat!(
                "with found as (",
                $letters,
                $which,
                "), grouped as (
                     select group_id, worker, subject, pg_catalog.count(*) as letters, pg_catalog.min(died_at) as first,
                         pg_catalog.max(died_at) as last, pg_catalog.max(id) as last_letter
                     from found group by group_id, worker, subject
                 )
                 select grouped.*, letter_group.id, reason, code, shape, place
                 from grouped left join oncely.letter_group on letter_group.id = grouped.group_id"
            )
        };
    }
    let query = session.query(if filter.closed {
        grouped!(summaries!("", fits!()), "")
    } else {
        grouped!(summaries!("", fits_and_waits!()), " where state <> 'done'")
    });
    let rows = fitting(query, filter)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "group dead letters"))?;
    rows.iter().map(|row| group(row).context("read a group").map_err(StoreError::Unavailable)).collect()
}

fn group(row: &PgRow) -> anyhow::Result<LetterGroup> {
    Ok(LetterGroup {
        group: shared::failure_group(
            row.try_get("id")?,
            row.try_get("reason")?,
            row.try_get("code")?,
            row.try_get("shape")?,
            row.try_get("place")?,
        ),
        worker: row.try_get("worker")?,
        letters: shared::unsigned(row.try_get("letters")?),
        first_died_at: shared::timestamp(row.try_get("first")?)?,
        last_died_at: shared::timestamp(row.try_get("last")?)?,
        last_letter: row.try_get("last_letter")?,
        subject: row.try_get("subject")?,
    })
}

/// One letter, with everything that is known of it.
pub(super) async fn find(session: &mut Session, id: i64) -> Result<Option<LetterRecord>> {
    let query = session.query(summaries!(
        ", headers, body, (extract(epoch from first_died_at) * 1000000)::bigint as first_died_at,
           (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at",
        "id = $1"
    ));
    let row = query
        .bind(id)
        .fetch_optional(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read a dead letter"))?;
    let Some(row) = row else { return Ok(None) };
    let mut letter = record(&row).context("read a dead letter").map_err(StoreError::Unavailable)?;
    let (worker, event_id) = (letter.summary.worker.clone(), letter.summary.event_id.clone());
    letter.attempts = attempts::of_event(session, &worker, &event_id).await?;
    letter.edits = edits(session, id).await?;
    letter.audit = audit(session, id).await?;
    letter.settled = settled(session, &worker, &event_id).await?;
    letter.outputs = outputs(session, &worker, &event_id).await?;
    Ok(Some(letter))
}

async fn edits(session: &mut Session, id: i64) -> Result<Vec<EditRecord>> {
    let query = session.query(
        "select actor, note, body, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.letter_edit where letter = $1 order by edit",
    );
    let rows = query
        .bind(id)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read corrected bodies"))?;
    let read = |row: &PgRow| -> anyhow::Result<_> {
        Ok(EditRecord {
            at: shared::timestamp(row.try_get("at")?)?,
            actor: row.try_get("actor")?,
            note: row.try_get("note")?,
            body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        })
    };
    rows.iter().map(|row| read(row).context("read a corrected body").map_err(StoreError::Unavailable)).collect()
}

async fn audit(session: &mut Session, id: i64) -> Result<Vec<AuditRecord>> {
    let query = session.query(
        "select action, generation, actor, note, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.letter_audit where letter = $1 order by seq",
    );
    let rows = query
        .bind(id)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "read what was done to a dead letter"))?;
    let read = |row: &PgRow| -> anyhow::Result<_> {
        Ok(AuditRecord {
            at: shared::timestamp(row.try_get("at")?)?,
            action: row.try_get("action")?,
            generation: row.try_get::<i32, _>("generation")?.cast_unsigned(),
            actor: row.try_get("actor")?,
            note: row.try_get("note")?,
        })
    };
    rows.iter().map(|row| read(row).context("read the audit").map_err(StoreError::Unavailable)).collect()
}

async fn settled(session: &mut Session, worker: &str, event_id: &str) -> Result<Option<(String, Timestamp)>> {
    let query = session.query(
        "select state, (extract(epoch from settled_at) * 1000000)::bigint from oncely.inbox
         where worker = $1 and event_id = $2",
    );
    let row = query
        .bind(worker)
        .bind(event_id)
        .fetch_optional(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "look up an event"))?;
    let read = |row: PgRow| -> anyhow::Result<_> { Ok((row.try_get(0)?, shared::timestamp(row.try_get(1)?)?)) };
    row.map(|row| read(row).context("read an event's record").map_err(StoreError::Unavailable)).transpose()
}

async fn outputs(session: &mut Session, worker: &str, event_id: &str) -> Result<Vec<LetterOutput>> {
    let query = session.query(
        "select id, subject, coalesce(stream, recorded.log_stream) as stream,
             coalesce(stream_sequence, recorded.log_sequence) as stream_sequence
         from oncely.outbox left join lateral (
             select record.stream as log_stream,
                 record.sequences[pg_catalog.array_position(record.seqs, outbox.seq)] as log_sequence
             from oncely.relay_record as record
             where outbox.via = 'wal' and record.last_seq >= outbox.seq and outbox.seq = any(record.seqs) order by record.last_seq limit 1
         ) as recorded on true
         where worker = $1 and event_id = $2 and subject not like 'oncely.%' order by seq",
    );
    let rows = query
        .bind(worker)
        .bind(event_id)
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "look up an event's outputs"))?;
    let read = |row: &PgRow| -> anyhow::Result<_> {
        Ok(LetterOutput {
            id: row.try_get("id")?,
            subject: row.try_get("subject")?,
            stream: row.try_get("stream")?,
            stream_sequence: row.try_get::<Option<i64>, _>("stream_sequence")?.map(shared::unsigned),
        })
    };
    rows.iter().map(|row| read(row).context("read an output").map_err(StoreError::Unavailable)).collect()
}

fn summary(row: &PgRow) -> anyhow::Result<LetterSummary> {
    let moved_at: Option<i64> = row.try_get("moved_at")?;
    Ok(LetterSummary {
        id: row.try_get("id")?,
        state: LetterState::read(row.try_get("state")?)?,
        worker: row.try_get("worker")?,
        event_id: row.try_get("event_id")?,
        reason: row.try_get("reason")?,
        code: row.try_get("code")?,
        detail: row.try_get("detail")?,
        group: row.try_get("group_id")?,
        subject: row.try_get("subject")?,
        attempts: row.try_get::<i32, _>("attempts")?.cast_unsigned(),
        version: row.try_get::<i32, _>("version")?.cast_unsigned(),
        died_at: shared::timestamp(row.try_get("died_at")?)?,
        generation: row.try_get::<i32, _>("generation")?.cast_unsigned(),
        moved_at: moved_at.map(shared::timestamp).transpose()?,
        stream: row.try_get("stream")?,
        stream_sequence: row.try_get::<Option<i64>, _>("stream_sequence")?.map(shared::unsigned),
    })
}

fn record(row: &PgRow) -> anyhow::Result<LetterRecord> {
    let first_died_at: Option<i64> = row.try_get("first_died_at")?;
    Ok(LetterRecord {
        summary: summary(row)?,
        headers: shared::headers_from_text(row.try_get("headers")?)?,
        body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?),
        first_died_at: first_died_at.map(shared::timestamp).transpose()?,
        stored_at: shared::timestamp(row.try_get("stored_at")?)?,
        attempts: Vec::new(),
        edits: Vec::new(),
        audit: Vec::new(),
        settled: None,
        outputs: Vec::new(),
    })
}
