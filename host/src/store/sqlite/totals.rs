//! Counts and ages for people, and the rows that have had their time.

use std::time::Duration;

use anyhow::Context;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::errors;
use super::session::Session;
use crate::store::{Result, Retire, StoreError, WorkerTotals, shared};

pub(super) async fn by_worker(readers: &SqlitePool) -> Result<Vec<WorkerTotals>> {
    let rows = sqlx::query(
        "with clock as (
             select cast(unixepoch('subsec') * 1000000 as integer) as now
         ), inbox as (
             select worker, count(*) as done from oncely_inbox where state = 'done' group by worker
         ), dead_letter as (
             select worker, count(*) as dead from oncely_dead_letter where state = 'open' group by worker
         ), outbox as (
             select worker, count(*) filter (where subject not like 'oncely.%') as outputs,
                 count(*) filter (where published_at is null) as unpublished,
                 count(*) filter (where set_aside_at is not null) as set_aside,
                 min(due_at) filter (where published_at is null and due_at <= now
                     and set_aside_at is null and not exists (
                         select 1 from oncely_outbox as before
                         where before.seq = outbox.behind and before.set_aside_at is not null)) as oldest
             from oncely_outbox as outbox, clock group by worker
         ), names as (
             select name as worker from oncely_worker union select worker from inbox
             union select worker from dead_letter union select worker from outbox
         )
         select worker, coalesce(done, 0) as done, coalesce(dead, 0) as dead, coalesce(outputs, 0) as outputs,
             coalesce(unpublished, 0) as unpublished, coalesce(set_aside, 0) as set_aside, (now - oldest) / 1000 as oldest_ms
         from clock, names left join inbox using (worker) left join dead_letter using (worker)
             left join outbox using (worker)
         order by worker",
    )
    .fetch_all(readers)
    .await
    .map_err(|error| errors::of_statement(error, "count what workers did"))?;
    let totals: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
    totals.context("read totals").map_err(StoreError::Unavailable)
}

fn read(row: &SqliteRow) -> sqlx::Result<WorkerTotals> {
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

/// Deletes some of the published outputs, inbox records and attempts that had their time. Returns whether
/// there may be more.
pub(super) async fn retire(session: &mut Session, what: &Retire) -> Result<bool> {
    let doing = |error| errors::of_statement(error, "delete old outputs");
    let outputs = sqlx::query(
        "delete from oncely_outbox where seq in (
             select seq from oncely_outbox
             where published_at < cast(unixepoch('subsec') * 1000000 as integer) - $1
             order by published_at limit $2)",
    )
    .bind(shared::micros(what.outputs))
    .bind(what.limit)
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?
    .rows_affected();
    write_done(session).await?;
    let records = match what.inbox {
        Some(keep) => {
            remove_records(session, keep, what.limit).await?.max(remove_attempts(session, keep, what.limit).await?)
        }
        None => 0,
    };
    Ok(outputs.max(records) == u64::from(what.limit))
}

async fn remove_records(session: &mut Session, keep: Duration, limit: u32) -> Result<u64> {
    let doing = |error| errors::of_statement(error, "delete old inbox records");
    let removed = sqlx::query(
        "delete from oncely_inbox where (worker, event_id) in (
             select worker, event_id from oncely_inbox
             where state = 'done' and settled_at < cast(unixepoch('subsec') * 1000000 as integer) - $1
             order by settled_at limit $2)",
    );
    let removed = removed.bind(shared::micros(keep)).bind(limit).execute(session.connection().map_err(doing)?).await;
    Ok(removed.map_err(doing)?.rows_affected())
}

/// Deletes attempts that belong to no dead letter.
async fn remove_attempts(session: &mut Session, keep: Duration, limit: u32) -> Result<u64> {
    let doing = |error| errors::of_statement(error, "delete old attempts");
    let removed = sqlx::query(
        "delete from oncely_attempt where (worker, event_id, attempt) in (
             select worker, event_id, attempt from oncely_attempt as attempt
             where at < cast(unixepoch('subsec') * 1000000 as integer) - $1 and not exists (
                 select 1 from oncely_dead_letter as letter
                 where letter.worker = attempt.worker and letter.event_id = attempt.event_id)
             order by at limit $2)",
    );
    let removed = removed.bind(shared::micros(keep)).bind(limit).execute(session.connection().map_err(doing)?).await;
    Ok(removed.map_err(doing)?.rows_affected())
}

/// Writes down which letters that were put back took effect, before the inbox forgets it.
async fn write_done(session: &mut Session) -> Result<()> {
    let doing = |error| errors::of_statement(error, "write down which dead letters took effect");
    sqlx::query(
        "update oncely_dead_letter as letter set state = 'done'
         where letter.state = 'redriven' and exists (
             select 1 from oncely_inbox as inbox where inbox.worker = letter.worker
                 and inbox.event_id = letter.event_id and inbox.state = 'done')",
    )
    .execute(session.connection().map_err(doing)?)
    .await
    .map_err(doing)?;
    Ok(())
}
