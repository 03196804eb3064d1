//! Counts and ages of workers, for display.

use super::db::{Db, Sql};
use super::{Result, WorkerTotals, rows};

/// Messages, dead letters and outputs of each worker, by name.
pub(super) async fn by_worker(db: &mut Db) -> Result<Vec<WorkerTotals>> {
    let sql = Sql {
        postgres: "with inbox as (
             select worker, pg_catalog.count(*) as done from oncely.inbox where state = 'done' group by worker
         ), dead_letter as (
             select worker, pg_catalog.count(*) as dead from oncely.dead_letter where state = 'open' group by worker
         ), outbox as (
             select worker, pg_catalog.count(*) filter (where subject not like 'oncely.%') as outputs,
                 pg_catalog.count(*) filter (where published_at is null and via = 'poll') as unpublished,
                 pg_catalog.count(*) filter (where parked_at is not null) as parked,
                 pg_catalog.min(due_at) filter (where published_at is null and via = 'poll' and due_at <= pg_catalog.now()
                     and parked_at is null and not exists (
                         select from oncely.outbox as before
                         where before.seq = outbox.blocked_by and before.parked_at is not null)) as oldest
             from oncely.outbox group by worker
         ), unrecorded as (
             select worker, pg_catalog.count(*) as unpublished, pg_catalog.min(due_at) as oldest
             from oncely.unrecorded_output group by worker
         ), names as (
             select name as worker from oncely.worker union select worker from inbox
             union select worker from dead_letter union select worker from outbox
         )
         select worker, coalesce(done, 0) as done, coalesce(dead, 0) as dead, coalesce(outputs, 0) as outputs,
             coalesce(outbox.unpublished, 0) + coalesce(unrecorded.unpublished, 0) as unpublished,
             coalesce(parked, 0) as parked,
             (extract(epoch from pg_catalog.now() - least(outbox.oldest, unrecorded.oldest)) * 1000)::bigint as oldest_ms
         from names left join inbox using (worker) left join dead_letter using (worker) left join outbox using (worker)
             left join unrecorded using (worker)
         order by worker",
        sqlite: "with clock as (
             select cast(unixepoch('subsec') * 1000000 as integer) as now
         ), inbox as (
             select worker, count(*) as done from oncely_inbox where state = 'done' group by worker
         ), dead_letter as (
             select worker, count(*) as dead from oncely_dead_letter where state = 'open' group by worker
         ), outbox as (
             select worker, count(*) filter (where subject not like 'oncely.%') as outputs,
                 count(*) filter (where published_at is null) as unpublished,
                 count(*) filter (where parked_at is not null) as parked,
                 min(due_at) filter (where published_at is null and due_at <= now
                     and parked_at is null and not exists (
                         select 1 from oncely_outbox as before
                         where before.seq = outbox.blocked_by and before.parked_at is not null)) as oldest
             from oncely_outbox as outbox, clock group by worker
         ), names as (
             select name as worker from oncely_worker union select worker from inbox
             union select worker from dead_letter union select worker from outbox
         )
         select worker, coalesce(done, 0) as done, coalesce(dead, 0) as dead, coalesce(outputs, 0) as outputs,
             coalesce(unpublished, 0) as unpublished, coalesce(parked, 0) as parked, (now - oldest) / 1000 as oldest_ms
         from clock, names left join inbox using (worker) left join dead_letter using (worker)
             left join outbox using (worker)
         order by worker",
        doing: "count the rows of workers",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::totals).collect()
}
