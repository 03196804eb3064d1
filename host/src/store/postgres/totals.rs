//! Counts and ages for people, and the rows that have had their time.

use std::time::Duration;

use anyhow::Context;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::errors;
use super::session::Session;
use crate::store::{Result, StoreError, WorkerTotals, shared};

pub(super) async fn by_worker(session: &mut Session) -> Result<Vec<WorkerTotals>> {
    let query = session.query(
        "with inbox as (
             select worker, pg_catalog.count(*) as done from oncely.inbox where state = 'done' group by worker
         ), dead_letter as (
             select worker, pg_catalog.count(*) as dead from oncely.dead_letter where state = 'open' group by worker
         ), outbox as (
             select worker, pg_catalog.count(*) filter (where subject not like 'oncely.%') as outputs,
                 pg_catalog.count(*) filter (where published_at is null and via = 'poll') as unpublished,
                 pg_catalog.count(*) filter (where set_aside_at is not null) as set_aside,
                 pg_catalog.min(due_at) filter (where published_at is null and via = 'poll' and due_at <= pg_catalog.now()
                     and set_aside_at is null and not exists (
                         select from oncely.outbox as before
                         where before.seq = outbox.behind and before.set_aside_at is not null)) as oldest
             from oncely.outbox group by worker
         ), in_log as (
             select worker, pg_catalog.count(*) as unpublished, pg_catalog.min(due_at) as oldest
             from oncely.in_log() group by worker
         ), names as (
             select name as worker from oncely.worker union select worker from inbox
             union select worker from dead_letter union select worker from outbox
         )
         select worker, coalesce(done, 0) as done, coalesce(dead, 0) as dead, coalesce(outputs, 0) as outputs,
             coalesce(outbox.unpublished, 0) + coalesce(in_log.unpublished, 0) as unpublished,
             coalesce(set_aside, 0) as set_aside,
             (extract(epoch from pg_catalog.now() - least(outbox.oldest, in_log.oldest)) * 1000)::bigint as oldest_ms
         from names left join inbox using (worker) left join dead_letter using (worker) left join outbox using (worker)
             left join in_log using (worker)
         order by worker",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "count what workers did"))?;
    let totals: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
    totals.context("read totals").map_err(StoreError::Unavailable)
}

fn read(row: &PgRow) -> sqlx::Result<WorkerTotals> {
    let oldest_ms: Option<i64> = row.try_get("oldest_ms")?;
    Ok(WorkerTotals {
        worker: row.try_get("worker")?,
        done: shared::unsigned(row.try_get("done")?),
        dead: shared::unsigned(row.try_get("dead")?),
        outputs: shared::unsigned(row.try_get("outputs")?),
        unpublished: shared::unsigned(row.try_get("unpublished")?),
        oldest_unpublished_ms: oldest_ms.map(shared::unsigned),
        set_aside: shared::unsigned(row.try_get("set_aside")?),
    })
}

/// Deletes old published outputs and old inbox records that are done, with their attempts. Returns how many outputs and
/// records left.
pub(super) async fn prune(session: &mut Session, outputs: Duration, inbox: Duration, limit: u32) -> Result<u64> {
    let keep = outputs;
    let query = session.query(
        "delete from oncely.outbox where seq in (
             select seq from oncely.outbox
             where published_at < pg_catalog.now() - $1 * interval '1 microsecond'
             order by published_at limit $2 for update skip locked)",
    );
    let outputs = query
        .bind(shared::micros(outputs))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "delete old outputs"))?;
    let from_log = prune_log(session, keep, limit).await?;
    write_done(session).await?;
    let query = session.query(
        "with gone as (
             delete from oncely.inbox where (worker, event_id) in (
                 select worker, event_id from oncely.inbox
                 where state = 'done' and settled_at < pg_catalog.now() - $1 * interval '1 microsecond'
                 order by settled_at limit $2 for update skip locked)
             returning worker, event_id
         ), attempts as (
             delete from oncely.attempt using gone
             where attempt.worker = gone.worker and attempt.event_id = gone.event_id
         )
         select pg_catalog.count(*) from gone",
    );
    let row = query
        .bind(shared::micros(inbox))
        .bind(i64::from(limit))
        .fetch_one(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "delete old inbox records"))?;
    let records: i64 = row.try_get(0).map_err(|error| errors::of_statement(error, "read how many records left"))?;
    Ok(outputs.rows_affected() + from_log + shared::unsigned(records))
}

/// Deletes old outputs that were published from the log, together with the records of it. Returns how many.
async fn prune_log(session: &mut Session, keep: Duration, limit: u32) -> Result<u64> {
    let query = session.query(
        "with old as (
             select number, seqs from (
                 select number, seqs, cardinality(seqs) as count, sum(cardinality(seqs)) over (order by number) as total
                 from (select number, seqs from oncely.relay_record
                       where published_at < pg_catalog.now() - $1 * interval '1 microsecond'
                       order by number limit $2) as oldest
             ) as counted where total - count < $2
         ), forgotten as (
             delete from oncely.relay_record using old where relay_record.number = old.number
             returning old.seqs
         ), seqs as (
             select unnest(seqs) as seq from forgotten
         )
         delete from oncely.outbox using seqs where outbox.seq = seqs.seq and outbox.via = 'wal'",
    );
    let pruned = query
        .bind(shared::micros(keep))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "delete old outputs of the log"))?;
    Ok(pruned.rows_affected())
}

/// Writes down which letters that were put back took effect, before the inbox forgets it.
async fn write_done(session: &mut Session) -> Result<()> {
    let query = session.query(
        "update oncely.dead_letter set state = 'done' from oncely.inbox
         where dead_letter.state = 'redriven' and inbox.worker = dead_letter.worker
             and inbox.event_id = dead_letter.event_id and inbox.state = 'done'",
    );
    query
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "write down which dead letters took effect"))?;
    Ok(())
}
