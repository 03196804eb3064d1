//! Reading of dead letters with their original headers and bodies, and with later events.

use super::errors::Doing;
use jiff::Timestamp;
use sqlx::postgres::{PgArguments, Postgres};
use sqlx::query::Query;

use super::attempts;
use super::session::Session;
use crate::store::{
    AuditRecord, DeadLetterFilter, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord,
    DeadLetterSummary, EditRecord, Result, rows,
};

/// The columns of a dead letter in a list. The inbox shows whether a redriven one took effect.
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
                     (extract(epoch from last_action_at) * 1000000)::bigint as last_action_at",
            $also,
            " from oncely.dead_letter where ",
            $($which)+,
            ") as dead_letter"
        )
    };
}

/// The conditions of a filter, except for subjects; see [`fitting`].
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

/// The same for open and redriven dead letters. The caller has to exclude those that took effect.
macro_rules! fits_and_waits {
    () => {
        concat!("state in ('open', 'redriven') and ", fits!())
    };
}

/// Binds the values of a filter.
fn fitting<'q>(
    query: Query<'q, Postgres, PgArguments>,
    filter: &'q DeadLetterFilter,
) -> Query<'q, Postgres, PgArguments> {
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

/// One page of dead letters, newest first.
pub(super) async fn list(
    session: &mut Session,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterSummary>> {
    let query = session.query(if filter.closed {
        concat!(summaries!("", fits!()), " order by id desc limit $9")
    } else {
        concat!(
            summaries!("", fits_and_waits!()),
            " where state <> 'done' order by id desc limit $9"
        )
    });
    let rows = fitting(query, filter)
        .bind(i64::from(filter.limit))
        .fetch_all(session.connection())
        .await
        .doing("list dead letters")?;
    Ok(rows::list(&rows, rows::dead_letter_summary))
}

/// Counts and times of matching dead letters, by group and subject.
pub(super) async fn groups(
    session: &mut Session,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterGroup>> {
    macro_rules! grouped {
        ($dead_letters:expr, $which:literal) => {
            concat!(
                "with found as (",
                $dead_letters,
                $which,
                "), grouped as (
                     select group_id, worker, subject, pg_catalog.count(*) as dead_letters, pg_catalog.min(died_at) as first,
                         pg_catalog.max(died_at) as last, pg_catalog.max(id) as last_dead_letter
                     from found group by group_id, worker, subject
                 )
                 select grouped.*, dead_letter_group.id, reason, code, shape, place
                 from grouped left join oncely.dead_letter_group on dead_letter_group.id = grouped.group_id"
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
        .doing("group dead letters")?;
    Ok(rows::list(&rows, rows::dead_letter_group))
}

/// One dead letter with all its details.
pub(super) async fn find(session: &mut Session, id: i64) -> Result<Option<DeadLetterRecord>> {
    let query = session.query(summaries!(
        ", headers, body, (extract(epoch from first_died_at) * 1000000)::bigint as first_died_at,
           (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at",
        "id = $1"
    ));
    let row = query
        .bind(id)
        .fetch_optional(session.connection())
        .await
        .doing("read a dead letter")?;
    let Some(row) = row else { return Ok(None) };
    let mut dead_letter = rows::dead_letter(&row)?;
    let (worker, event_id) = (
        dead_letter.summary.worker.clone(),
        dead_letter.summary.event_id.clone(),
    );
    dead_letter.attempts = attempts::for_event(session, &worker, &event_id).await?;
    dead_letter.edits = edits(session, id).await?;
    dead_letter.audit = audit(session, id).await?;
    dead_letter.inbox = inbox_state(session, &worker, &event_id).await?;
    dead_letter.outputs = outputs(session, &worker, &event_id).await?;
    Ok(Some(dead_letter))
}

async fn edits(session: &mut Session, id: i64) -> Result<Vec<EditRecord>> {
    let query = session.query(
        "select actor, note, body, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.dead_letter_edit where dead_letter_id = $1 order by edit",
    );
    let rows = query
        .bind(id)
        .fetch_all(session.connection())
        .await
        .doing("read corrected bodies")?;
    Ok(rows::list(&rows, rows::dead_letter_edit))
}

async fn audit(session: &mut Session, id: i64) -> Result<Vec<AuditRecord>> {
    let query = session.query(
        "select action, generation, actor, note, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.dead_letter_audit where dead_letter_id = $1 order by seq",
    );
    let rows = query
        .bind(id)
        .fetch_all(session.connection())
        .await
        .doing("read the audit of a dead letter")?;
    Ok(rows::list(&rows, rows::dead_letter_audit))
}

async fn inbox_state(
    session: &mut Session,
    worker: &str,
    event_id: &str,
) -> Result<Option<(String, Timestamp)>> {
    let query = session.query(
        "select state, (extract(epoch from settled_at) * 1000000)::bigint as settled_at from oncely.inbox
         where worker = $1 and event_id = $2",
    );
    let row = query
        .bind(worker)
        .bind(event_id)
        .fetch_optional(session.connection())
        .await
        .doing("find an event")?;
    row.as_ref().map(rows::inbox_state).transpose()
}

async fn outputs(
    session: &mut Session,
    worker: &str,
    event_id: &str,
) -> Result<Vec<DeadLetterOutput>> {
    let query = session.query(
        "select id, headers, subject, coalesce(outbox.stream, recorded.stream) as stream,
             coalesce(outbox.stream_sequence, recorded.stream_sequence) as stream_sequence
         from oncely.outbox left join lateral oncely.find_relay_record(seq) as recorded on via = 'wal'
         where worker = $1 and event_id = $2 and subject not like 'oncely.%' order by seq",
    );
    let rows = query
        .bind(worker)
        .bind(event_id)
        .fetch_all(session.connection())
        .await
        .doing("find the outputs of an event")?;
    Ok(rows::list(&rows, rows::dead_letter_output))
}
