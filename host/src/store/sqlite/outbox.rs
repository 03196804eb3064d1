//! The outbox: committed outputs that are to be published.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use anyhow::Context;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::session::Session;
use crate::store::error::Doing as _;
use crate::store::shared::{self, KEY_QUEUE_MAX, ReleaseColumns};
use crate::store::{OutboxRow, Output, Published, Result, StoreError, Unpublished, rows};

/// Appends outputs, each with its worker, in order. Those that are due at once are leased to this
/// host and returned. Delayed ones are leased to no host, and are due only after their delay.
pub(in crate::store) async fn append(
    session: &mut Session,
    outputs: &[(&str, &Output)],
    lease: Duration,
) -> Result<Vec<OutboxRow>> {
    let ids = session.output_ids();
    let mut appended: Vec<OutboxRow> = Vec::new();
    let mut queues: HashMap<(&str, &str), KeyQueue> = HashMap::new();
    for (worker, output) in outputs {
        let mut queue = KeyQueue::default();
        if let Some(key) = output
            .ordering_key
            .as_deref()
            .filter(|_| output.delay.is_zero())
        {
            let known = match queues.entry((*worker, key)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => place.insert(KeyQueue::load(session, worker, key).await?),
            };
            // Only the first output of a key needs the queue before it.
            queue = KeyQueue {
                blocked_by: std::mem::take(&mut known.blocked_by),
                blocker: known.blocker,
            };
        }

        // Insert the output; one that is leased has a first attempt.
        let sealed = ids.seal(worker, output);
        let row = insert(session, worker, &sealed, queue.blocker, lease).await?;
        let read = || -> anyhow::Result<_> {
            let first_attempt_at: Option<i64> = row.try_get(1)?;
            Ok((
                row.try_get(0)?,
                first_attempt_at.map(shared::timestamp).transpose()?,
            ))
        };
        let (seq, first_attempt_at) = read()
            .context("read an appended output")
            .map_err(StoreError::Unavailable)?;
        if let Some(first_attempt_at) = first_attempt_at {
            appended.push(shared::appended_row(
                seq,
                worker,
                &sealed,
                first_attempt_at,
                queue.blocked_by,
                None,
            ));
        }
    }
    Ok(appended)
}

/// The queue of a key when an output is written.
#[derive(Default)]
struct KeyQueue {
    blocked_by: Vec<i64>,
    /// The row that a new output has to wait for.
    blocker: Option<i64>,
}

impl KeyQueue {
    async fn load(session: &mut Session, worker: &str, key: &str) -> Result<Self> {
        let rows = sqlx::query(
            "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
             select seq, coalesce(blocked_by, seq),
                 failures > 0 or leased_until <= now or blocked_by is not null or parked_at is not null
             from clock, oncely_outbox
             where worker = $1 and ordering_key = $2 and published_at is null and due_at <= now
             order by seq desc limit $3",
        )
        .bind(worker)
        .bind(key)
        .bind(KEY_QUEUE_MAX as u32)
        .fetch_all(session.connection().doing("read the queue of a key")?)
        .await
        .doing("read the queue of a key")?;
        let read = |row: &SqliteRow| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        let rows: sqlx::Result<Vec<(i64, i64, bool)>> = rows.iter().map(read).collect();
        let rows = rows.doing("read the queue of a key")?;
        let blocked_by: Vec<i64> = rows.iter().map(|(seq, ..)| *seq).collect();
        let blocker = if rows.len() < KEY_QUEUE_MAX {
            rows.iter()
                .filter(|(.., is_blocked)| *is_blocked)
                .map(|(_, waits_for, _)| *waits_for)
                .min()
        } else {
            // Outputs that wait for the same row are unblocked together.
            rows.first().map(|(_, waits_for, _)| *waits_for)
        };
        Ok(KeyQueue {
            blocked_by,
            blocker,
        })
    }
}

async fn insert(
    session: &mut Session,
    worker: &str,
    output: &Output,
    blocked_by: Option<i64>,
    lease: Duration,
) -> Result<SqliteRow> {
    sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
         insert into oncely_outbox (worker, id, event_id, ordinal, subject, headers, body, ordering_key, due_at, blocked_by,
             leased_until, first_attempt_at, leased_by)
         select $1, $2, $3, $4, $5, $6, $7, $8, now + $9, $11,
             case when $9 > 0 then now + $9 when $11 is null then now + $10 else 9223372036854775807 end,
             iif($9 = 0 and $11 is null, now, null), $12
         from clock
         returning seq, first_attempt_at",
    )
    .bind(worker)
    .bind(&output.id)
    .bind(&output.event_id)
    .bind(output.ordinal)
    .bind(&output.subject)
    .bind(shared::headers_to_text(&output.headers)?)
    .bind(output.body.as_ref())
    .bind(output.ordering_key.as_deref())
    .bind(shared::micros(output.delay))
    .bind(shared::micros(lease))
    .bind(blocked_by)
    .bind(session.instance())
    .fetch_one(session.connection().doing("append an output")?)
    .await
    .doing("append an output")
}

/// Leases due outputs, oldest first. A due output that is not the next of its key is blocked by the
/// last one before it. If that one is blocked itself, both get the same blocker. An output is due
/// again once its blocker is gone.
pub(in crate::store) async fn lease(
    session: &mut Session,
    limit: u32,
    lease: Duration,
) -> Result<(Vec<OutboxRow>, Vec<(i64, Unpublished)>)> {
    // Find due outputs, and for each the row that its key waits for, if any.
    let candidates = sqlx::query(
        "with clock as materialized (
             select cast(unixepoch('subsec') * 1000000 as integer) as now
         ), due as materialized (
             select seq, worker, ordering_key from oncely_outbox, clock
             where published_at is null and leased_until <= now
             order by leased_until, seq limit $1
         ), key as materialized (
             select worker, ordering_key, max(seq) as last from due
             where ordering_key is not null group by worker, ordering_key
         ), queue as (
             select seq, worker, ordering_key, true as is_due, null as before from due
             union all
             select before.seq, key.worker, key.ordering_key, false, before.seq
             from key cross join clock cross join oncely_outbox as before
             where before.worker = key.worker and before.ordering_key = key.ordering_key
                 and before.ordering_key is not null and before.published_at is null
                 and before.seq < key.last and before.due_at <= now and before.seq not in (select seq from due)
         ), routed as (
             select seq, is_due, max(before) over (partition by worker, ordering_key order by seq) as before from queue
         )
         select seq, (select coalesce(blocked_by, seq) from oncely_outbox as last where last.seq = routed.before)
         from routed where is_due",
    )
    .bind(limit)
    .fetch_all(session.connection().doing("lease outputs")?)
    .await
    .doing("lease outputs")?;
    let candidates: sqlx::Result<Vec<(i64, Option<i64>)>> = candidates
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();

    // Block those that are not the next of their key.
    let (next, waiting): (Vec<_>, Vec<_>) = candidates
        .doing("lease outputs")?
        .into_iter()
        .partition(|(_, before)| before.is_none());
    let waiting = waiting
        .into_iter()
        .filter_map(|(seq, before)| Some((seq, Unpublished::BlockedBy(before?))));
    release(session, &waiting.collect::<Vec<_>>()).await?;
    if next.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }

    // Lease the rest.
    let rows = sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
         update oncely_outbox
         set leased_until = now + $2, leased_by = $3, first_attempt_at = coalesce(first_attempt_at, now)
         from clock
         where seq in (select value from json_each($1))
         returning seq, id, worker, subject, headers, body, ordering_key, failures, first_attempt_at,
             null as group_number",
    )
    .bind(serde_json::json!(next.iter().map(|(seq, _)| *seq).collect::<Vec<_>>()).to_string())
    .bind(shared::micros(lease))
    .bind(session.instance())
    .fetch_all(session.connection().doing("lease outputs")?)
    .await
    .doing("lease outputs")?;
    rows::leased_outputs(&rows)
}

/// Unblocks outputs that wait for rows that are published or gone.
pub(in crate::store) async fn unblock(session: &mut Session) -> Result<()> {
    sqlx::query(
        "update oncely_outbox
         set blocked_by = null, leased_until = due_at
         where blocked_by in (
             select blocked_by from (select distinct blocked_by from oncely_outbox where blocked_by is not null) as waited_for
             where not exists (
                 select 1 from oncely_outbox as before
                 where before.seq = waited_for.blocked_by and before.published_at is null))",
    )
    .execute(session.connection().doing("unblock outputs")?)
    .await
    .doing("unblock outputs")?;
    Ok(())
}

/// Records where outputs were published. All of them must exist.
pub(in crate::store) async fn mark_published(
    session: &mut Session,
    published: &[Published],
) -> Result<()> {
    let given: Vec<_> = published
        .iter()
        .map(|place| serde_json::json!({"seq": place.seq, "stream": place.stream, "sequence": place.stream_sequence}))
        .collect();
    let result = sqlx::query(
        "update oncely_outbox
         set published_at = coalesce(published_at, cast(unixepoch('subsec') * 1000000 as integer)),
             stream = given.value ->> 'stream', stream_sequence = given.value ->> 'sequence', blocked_by = null,
             parked_at = null
         from json_each($1) as given
         where oncely_outbox.seq = given.value ->> 'seq'",
    )
    .bind(serde_json::Value::Array(given).to_string())
    .execute(session.connection().doing("record published outputs")?)
    .await
    .doing("record published outputs")?;
    shared::check_all_recorded(result.rows_affected(), published.len())
}

/// Releases the leases of previous instances: there is only one host. Returns the number of
/// outputs.
pub(in crate::store) async fn release_leases(session: &mut Session) -> Result<u64> {
    let released = sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now)
         update oncely_outbox set leased_until = now, leased_by = null from clock
         where published_at is null and leased_until > now and leased_by <> $1
             and due_at <= now and blocked_by is null and parked_at is null",
    )
    .bind(session.instance())
    .execute(
        session
            .connection()
            .doing("release the leases of the previous host")?,
    )
    .await
    .doing("release the leases of the previous host")?;
    Ok(released.rows_affected())
}

/// Releases the leases of outputs.
pub(in crate::store) async fn release(
    session: &mut Session,
    rows: &[(i64, Unpublished)],
) -> Result<()> {
    let ids = session.output_ids();
    let given = rows.iter().map(|row| ReleaseColumns::of(row, &ids)).map(|row| {
        serde_json::json!({
            "seq": row.seq, "after": row.after, "failed": row.failed, "blocked_by": row.blocked_by, "parked": row.parked, "error": row.error,
            "taken": row.taken, "next": row.next,
        })
    });
    sqlx::query(
        "with clock as (select cast(unixepoch('subsec') * 1000000 as integer) as now),
         given as (
             select value ->> 'seq' as seq, value ->> 'after' as after, value ->> 'failed' as failed,
                 value ->> 'blocked_by' as blocked_by, value ->> 'parked' as parked, value ->> 'error' as error,
                 value ->> 'taken' as taken, value ->> 'next' as next
             from json_each($1))
         update oncely_outbox
         set leased_until = coalesce(now + given.after, 9223372036854775807), leased_by = null,
             failures = failures + given.failed, blocked_by = given.blocked_by, parked_at = iif(given.parked, now, null),
             last_error = coalesce(given.error, last_error),
             id = coalesce(given.next, id), ids_taken = ids_taken + (given.next is not null)
         from given, clock
         where oncely_outbox.seq = given.seq and published_at is null and coalesce(id = given.taken, true)",
    )
    .bind(serde_json::Value::Array(given.collect()).to_string())
    .execute(session.connection().doing("release outputs")?)
    .await
    .doing("release outputs")?;
    Ok(())
}
