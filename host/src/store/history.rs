//! The history of workers: counts and lag by five minutes, for a week.
//!
//! A table of fixed size: each worker has one row for each five minutes of a week, and a week later
//! the row is used again. `bucket` shows which week a row is of.

use jiff::Timestamp;
use serde::Serialize;

use super::db::{Db, Param, Sql};
use super::{Result, rows};
use crate::model::call_times;

/// The time of one row, in seconds.
pub const HISTORY_BUCKET_SECS: u64 = 300;

/// The rows of each worker: those of seven days.
pub const HISTORY_BUCKETS: u32 = 7 * 24 * 12;

/// Counts of a worker on one host since it wrote the last ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HistoryCounts {
    /// The name of the worker.
    pub worker: String,
    /// Handled events.
    pub done: u64,
    /// Failed attempts that are retried.
    pub retries: u64,
    /// Dead letters.
    pub dead: u64,
    /// Age of the oldest unhandled message, in milliseconds; 0 if none waits.
    pub lag_ms: u64,
    /// Calls of the handler by their time, see [`call_times`].
    pub calls: Vec<u64>,
}

/// The history of a worker within some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HistoryPoint {
    /// The name of the worker.
    pub worker: String,
    /// The begin of the time.
    pub at: Timestamp,
    /// Handled events.
    pub done: u64,
    /// Failed attempts that were retried.
    pub retries: u64,
    /// Dead letters.
    pub dead: u64,
    /// The highest age of the oldest unhandled message, in milliseconds.
    pub lag_ms: u64,
    /// Half of the calls of the handler took at most this long, in microseconds. `None` without
    /// calls.
    pub p50_us: Option<u64>,
    /// Of 100 calls, 99 took at most this long.
    pub p99_us: Option<u64>,
}

/// Adds counts to the current five minutes. Counts of several hosts are added up; of their lags the
/// highest counts.
pub(super) async fn add(db: &mut Db, counts: &[HistoryCounts]) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.worker_history (worker, slot, bucket, done, retries, dead, lag_ms, calls)
         select worker, bucket % 2016, bucket, done, retries, dead, lag_ms, calls
         from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[])
                 as counts (worker, done, retries, dead, lag_ms, calls),
             (select pg_catalog.floor(extract(epoch from pg_catalog.now()) / 300)::bigint as bucket) as clock
         on conflict (worker, slot) do update set
             done = excluded.done + case when worker_history.bucket = excluded.bucket then worker_history.done else 0 end,
             retries = excluded.retries
                 + case when worker_history.bucket = excluded.bucket then worker_history.retries else 0 end,
             dead = excluded.dead + case when worker_history.bucket = excluded.bucket then worker_history.dead else 0 end,
             lag_ms = greatest(excluded.lag_ms,
                 case when worker_history.bucket = excluded.bucket then worker_history.lag_ms else 0 end),
             calls = case when worker_history.bucket = excluded.bucket then coalesce((
                 select pg_catalog.json_agg(coalesce(kept.number::bigint, 0) + coalesce(added.number::bigint, 0)
                     order by place)::text
                 from pg_catalog.json_array_elements_text(worker_history.calls::json)
                         with ordinality as kept (number, place)
                     full join pg_catalog.json_array_elements_text(excluded.calls::json)
                         with ordinality as added (number, place) using (place)), '[]') else excluded.calls end,
             bucket = excluded.bucket",
        sqlite: "insert into oncely_worker_history (worker, slot, bucket, done, retries, dead, lag_ms, calls)
         select name.value, bucket % 2016, bucket, done.value, retries.value, dead.value, lag.value, calls.value
         from (select unixepoch() / 300 as bucket), json_each($1) as name
             join json_each($2) as done on done.key = name.key join json_each($3) as retries on retries.key = name.key
             join json_each($4) as dead on dead.key = name.key join json_each($5) as lag on lag.key = name.key
             join json_each($6) as calls on calls.key = name.key
         where true
         on conflict (worker, slot) do update set
             done = excluded.done + iif(bucket = excluded.bucket, oncely_worker_history.done, 0),
             retries = excluded.retries + iif(bucket = excluded.bucket, oncely_worker_history.retries, 0),
             dead = excluded.dead + iif(bucket = excluded.bucket, oncely_worker_history.dead, 0),
             lag_ms = max(excluded.lag_ms, iif(bucket = excluded.bucket, oncely_worker_history.lag_ms, 0)),
             calls = iif(bucket = excluded.bucket, (
                 select json_group_array(coalesce(kept.value, 0) + coalesce(added.value, 0)
                     order by coalesce(kept.key, added.key))
                 from json_each(oncely_worker_history.calls) as kept
                     full join json_each(excluded.calls) as added on added.key = kept.key), excluded.calls),
             bucket = excluded.bucket",
        doing: "write the history of workers",
    };
    let names: Vec<&str> = counts.iter().map(|one| one.worker.as_str()).collect();
    let column = |value: fn(&HistoryCounts) -> u64| -> Vec<i64> {
        let capped = |one| i64::try_from(value(one)).unwrap_or(i64::MAX);
        counts.iter().map(capped).collect()
    };
    let (done, retries) = (column(|one| one.done), column(|one| one.retries));
    let (dead, lag) = (column(|one| one.dead), column(|one| one.lag_ms));
    let calls: Vec<String> = counts
        .iter()
        .map(|one| serde_json::json!(one.calls).to_string())
        .collect();
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    let params = [
        Param::Texts(&names),
        Param::Ints(&done),
        Param::Ints(&retries),
        Param::Ints(&dead),
        Param::Ints(&lag),
        Param::Texts(&calls),
    ];
    db.execute(sql, &params).await.map(drop)
}

/// The last `buckets` rows of a worker or of all of them, `step` rows added up for each point,
/// oldest first. Times without a row have no point.
pub(super) async fn read(
    db: &mut Db,
    worker: Option<&str>,
    buckets: u32,
    step: u32,
) -> Result<Vec<HistoryPoint>> {
    let sql = Sql {
        postgres: "select worker, bucket / $3 * $3 * 300000000 as at, pg_catalog.sum(done)::bigint as done,
             pg_catalog.sum(retries)::bigint as retries, pg_catalog.sum(dead)::bigint as dead,
             pg_catalog.max(lag_ms) as lag_ms, pg_catalog.string_agg(calls, ' ') as calls
         from oncely.worker_history
         where ($1::text is null or worker = $1)
             and bucket > pg_catalog.floor(extract(epoch from pg_catalog.now()) / 300)::bigint - $2
         group by worker, bucket / $3 order by worker, bucket / $3",
        sqlite: "select worker, bucket / $3 * $3 * 300000000 as at, sum(done) as done, sum(retries) as retries,
             sum(dead) as dead, max(lag_ms) as lag_ms, group_concat(calls, ' ') as calls
         from oncely_worker_history
         where ($1 is null or worker = $1) and bucket > unixepoch() / 300 - $2
         group by worker, bucket / $3 order by worker, bucket / $3",
        doing: "read the history of workers",
    };
    let params = [
        Param::OptionalText(worker),
        Param::Int(buckets.into()),
        Param::Int(step.max(1).into()),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::history_point))
}

/// The counts of several rows, added up: JSON arrays between spaces.
pub(super) fn total_calls(rows: &str) -> Vec<u64> {
    let mut total = Vec::new();
    for row in rows.split(' ') {
        let counts: Vec<u64> = serde_json::from_str(row).unwrap_or_default();
        call_times::add(&mut total, &counts);
    }
    total
}
