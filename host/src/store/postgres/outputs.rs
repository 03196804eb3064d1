//! Outputs as operators see them: lists, retries and drops of parked ones, and the publishing lag.

use std::collections::BTreeMap;

use super::errors::Doing;
use super::session::Session;
use crate::store::{OutboxLag, OutputFilter, OutputRecord, OutputSummary, Result, rows, shared};

/// The columns of a summary, from the outbox and the dropped outputs. Times are in microseconds.
macro_rules! summaries {
    ($rest:literal) => {
        concat!(
            "with rows as (
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, body, coalesce(outbox.stream, recorded.stream) as stream,
                     coalesce(outbox.stream_sequence, recorded.stream_sequence) as stream_sequence, blocked_by,
                     null::timestamptz as dropped_at, null as note,
                     case
                         when via = 'wal' then case when seq in (select seq from oncely.wal_backlog()) then 'in-wal'
                             else 'published' end
                         when outbox.published_at is not null then 'published'
                         when parked_at is not null then 'parked'
                         when blocked_by is not null then 'blocked'
                         when due_at > pg_catalog.now() then 'delayed'
                         when leased_until > pg_catalog.now() then 'leased'
                         else 'due'
                     end as state
                 from oncely.outbox left join lateral oncely.find_relay_record(seq) as recorded on via = 'wal'
                 union all
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, body, null, null, null, dropped_at, note, 'dropped'
                 from oncely.dropped_output
             )
             select rows.*, (extract(epoch from created_at) * 1000000)::bigint as created,
                 (extract(epoch from due_at) * 1000000)::bigint as due,
                 (extract(epoch from parked_at) * 1000000)::bigint as parked,
                 (extract(epoch from dropped_at) * 1000000)::bigint as dropped,
                 (select pg_catalog.count(*) from oncely.outbox as other where other.blocked_by = rows.seq) as waiting
             from rows ",
            $rest
        )
    };
}

/// Parked or all unpublished outputs, oldest first; or dropped ones, newest first.
pub(super) async fn list(
    session: &mut Session,
    filter: &OutputFilter,
) -> Result<Vec<OutputSummary>> {
    let query = session.query(match (filter.dropped, filter.unpublished) {
        (true, _) => summaries!(
            "where dropped_at is not null and ($1::text is null or worker = $1) order by dropped_at desc, seq limit $2"
        ),
        (false, true) => summaries!(
            "where state not in ('published', 'dropped') and ($1::text is null or worker = $1) order by seq limit $2"
        ),
        (false, false) => summaries!(
            "where state = 'parked' and parked_at is not null and ($1::text is null or worker = $1)
             order by seq limit $2"
        ),
    });
    let rows = query
        .bind(filter.worker.as_deref())
        .bind(i64::from(filter.limit))
        .fetch_all(session.connection())
        .await
        .doing("list outputs")?;
    Ok(rows::list(&rows, rows::output_summary))
}

/// One output by its number.
pub(super) async fn find(session: &mut Session, number: i64) -> Result<Option<OutputRecord>> {
    let query = session.query(summaries!("where seq = $1"));
    let row = query
        .bind(number)
        .fetch_optional(session.connection())
        .await
        .doing("read an output")?;
    row.as_ref().map(rows::output).transpose()
}

/// Makes parked outputs due.
pub(super) async fn retry(session: &mut Session, numbers: &[i64]) -> Result<u64> {
    let query = session.query(
        "update oncely.outbox set parked_at = null, leased_until = pg_catalog.now()
         where seq = any($1::bigint[]) and parked_at is not null",
    );
    let result = query.bind(numbers).execute(session.connection()).await;
    Ok(result.doing("retry outputs")?.rows_affected())
}

/// Moves parked outputs to the dropped ones.
pub(super) async fn drop(session: &mut Session, numbers: &[i64], note: &str) -> Result<u64> {
    let query = session.query(
        "with gone as (
             delete from oncely.outbox where seq = any($1::bigint[]) and parked_at is not null
             returning seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key, created_at, due_at,
                 failures, last_error, parked_at
         )
         insert into oncely.dropped_output (seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key,
             created_at, due_at, failures, last_error, parked_at, note)
         select gone.*, $2 from gone",
    );
    let result = query
        .bind(numbers)
        .bind(shared::printable(note))
        .execute(session.connection())
        .await;
    Ok(result.doing("drop outputs")?.rows_affected())
}

/// The publishing lag, by worker.
pub(super) async fn lag(session: &mut Session) -> Result<Vec<OutboxLag>> {
    let query = session.query(
        "with unpublished as (
             select outbox.worker, outbox.due_at, outbox.parked_at is not null as is_parked,
                 before.parked_at is not null as is_blocked
             from oncely.outbox left join oncely.outbox as before on before.seq = outbox.blocked_by
             where outbox.published_at is null and outbox.via = 'poll'
             union all
             select worker, due_at, false, false from oncely.wal_backlog()
         )
         select worker, pg_catalog.count(*) filter (where due_at <= pg_catalog.now()) as unpublished,
             (extract(epoch from pg_catalog.now() - pg_catalog.min(due_at) filter (
                 where due_at <= pg_catalog.now() and not is_parked and not is_blocked)) * 1000)::bigint as oldest_ms,
             pg_catalog.count(*) filter (where is_parked) as parked, pg_catalog.count(*) filter (where is_blocked) as blocked
         from unpublished group by worker order by worker",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("measure the publishing lag")?;
    rows.iter().map(rows::lag).collect()
}

/// How many outputs changed their id because it was taken, by worker.
pub(super) async fn taken_ids(session: &mut Session) -> Result<BTreeMap<String, u64>> {
    let query = session
        .query("select worker, pg_catalog.count(*) as taken from oncely.outbox where ids_taken > 0 group by worker");
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("count taken ids")?;
    rows.iter().map(rows::taken_ids).collect()
}
