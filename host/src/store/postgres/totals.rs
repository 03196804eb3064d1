//! Counts and ages for people.

use super::errors;
use super::session::Session;
use crate::store::{Result, WorkerTotals, rows};

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
    rows.iter().map(rows::totals).collect()
}

/// Writes down which letters that were put back took effect, before the inbox forgets it.
pub(super) async fn write_done(session: &mut Session) -> Result<()> {
    let query = session.query(
        "with done as (
             update oncely.dead_letter set state = 'done' from oncely.inbox
             where dead_letter.state = 'redriven' and inbox.worker = dead_letter.worker
                 and inbox.event_id = dead_letter.event_id and inbox.state = 'done'
             returning dead_letter.worker, dead_letter.event_id
         )
         delete from oncely.record using done
         where record.worker = done.worker and record.event_id = done.event_id",
    );
    query
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "write down which dead letters took effect"))?;
    Ok(())
}
