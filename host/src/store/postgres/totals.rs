//! Counts and ages of workers, for display.

use super::errors::Doing;
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
                 pg_catalog.count(*) filter (where parked_at is not null) as parked,
                 pg_catalog.min(due_at) filter (where published_at is null and via = 'poll' and due_at <= pg_catalog.now()
                     and parked_at is null and not exists (
                         select from oncely.outbox as before
                         where before.seq = outbox.blocked_by and before.parked_at is not null)) as oldest
             from oncely.outbox group by worker
         ), wal_backlog as (
             select worker, pg_catalog.count(*) as unpublished, pg_catalog.min(due_at) as oldest
             from oncely.wal_backlog() group by worker
         ), names as (
             select name as worker from oncely.worker union select worker from inbox
             union select worker from dead_letter union select worker from outbox
         )
         select worker, coalesce(done, 0) as done, coalesce(dead, 0) as dead, coalesce(outputs, 0) as outputs,
             coalesce(outbox.unpublished, 0) + coalesce(wal_backlog.unpublished, 0) as unpublished,
             coalesce(parked, 0) as parked,
             (extract(epoch from pg_catalog.now() - least(outbox.oldest, wal_backlog.oldest)) * 1000)::bigint as oldest_ms
         from names left join inbox using (worker) left join dead_letter using (worker) left join outbox using (worker)
             left join wal_backlog using (worker)
         order by worker",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("count the rows of workers")?;
    rows.iter().map(rows::totals).collect()
}

/// Records as done the redriven dead letters that took effect, before their inbox records are
/// deleted.
pub(super) async fn record_completed_redrives(session: &mut Session) -> Result<()> {
    let query = session.query(
        "with done as (
             update oncely.dead_letter set state = 'done' from oncely.inbox
             where dead_letter.state = 'redriven' and inbox.worker = dead_letter.worker
                 and inbox.event_id = dead_letter.event_id and inbox.state = 'done'
             returning dead_letter.worker, dead_letter.event_id
         )
         delete from oncely.recording using done
         where recording.worker = done.worker and recording.event_id = done.event_id",
    );
    query
        .execute(session.connection())
        .await
        .doing("record completed redrives")?;
    Ok(())
}
