//! The outbox: committed outputs that are to be published.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use crate::store::error::Doing as _;
use crate::store::shared::{self, ReleaseColumns};
use crate::store::{
    GroupOutcome, OutboxRow, Output, Published, Result, StoreError, Unpublished, rows,
};

/// Appends outputs, each with its worker, in order. Outputs that are due at once are leased to this
/// host and returned. Delayed ones are not leased and become due later. Times are read at the
/// write, because the transaction may have begun long before.
pub(in crate::store) async fn append(
    session: &mut Session,
    outputs: &[(&str, &Output)],
    lease: Duration,
) -> Result<Vec<OutboxRow>> {
    if outputs.is_empty() {
        return Ok(Vec::new());
    }
    let ids = session.output_ids();
    let outputs: Vec<(&str, Output)> = outputs
        .iter()
        .map(|(worker, output)| (*worker, ids.seal(worker, output)))
        .collect();
    let rows = insert(session, &outputs, lease).await?;
    let mut appended = Vec::with_capacity(rows.len());
    for (row, (worker, output)) in rows.into_iter().zip(&outputs) {
        if let Some(first_attempt_at) = row.first_attempt_at {
            appended.push(shared::appended_row(
                row.seq,
                worker,
                output,
                first_attempt_at,
                row.blocked_by,
                row.group,
            ));
        }
    }
    Ok(appended)
}

/// An appended row.
struct Appended {
    seq: i64,
    /// `None` if the row is left to the poller.
    first_attempt_at: Option<Timestamp>,
    blocked_by: Vec<i64>,
    /// The number of its group.
    group: Option<i64>,
}

/// Inserts outputs and returns their rows in order.
async fn insert(
    session: &mut Session,
    outputs: &[(&str, Output)],
    lease: Duration,
) -> Result<Vec<Appended>> {
    let headers: Vec<String> = outputs
        .iter()
        .map(|(_, output)| shared::headers_to_text(&output.headers))
        .collect::<Result<_>>()?;
    let all = || outputs.iter().map(|(_, output)| output);
    let query = session
        .query("select * from oncely_definer.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)");
    let rows = query
        .bind(session.token())
        .bind(
            outputs
                .iter()
                .map(|(worker, _)| *worker)
                .collect::<Vec<_>>(),
        )
        .bind(all().map(|output| output.id.as_str()).collect::<Vec<_>>())
        .bind(
            all()
                .map(|output| output.event_id.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            all()
                .map(|output| output.ordinal.cast_signed())
                .collect::<Vec<_>>(),
        )
        .bind(
            all()
                .map(|output| output.subject.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(headers)
        .bind(
            all()
                .map(|output| output.body.as_ref())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            all()
                .map(|output| output.ordering_key.as_deref())
                .collect::<Vec<_>>(),
        )
        .bind(
            all()
                .map(|output| shared::micros(output.delay))
                .collect::<Vec<_>>(),
        )
        .bind(shared::micros(lease))
        .fetch_all(session.connection())
        .await
        .doing("append outputs")?;
    let read = |row: &PgRow| -> anyhow::Result<Appended> {
        let first_attempt_at: Option<i64> = row.try_get(1)?;
        let blocked_by: Option<Vec<i64>> = row.try_get(2)?;
        Ok(Appended {
            seq: row.try_get(0)?,
            first_attempt_at: first_attempt_at.map(shared::timestamp).transpose()?,
            blocked_by: blocked_by.unwrap_or_default(),
            group: row.try_get(3)?,
        })
    };
    let rows: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    let mut rows = rows
        .context("read appended outputs")
        .map_err(StoreError::Unavailable)?;
    rows.sort_unstable_by_key(|row| row.seq);
    Ok(rows)
}

/// Takes outputs out of their group, which this host has leased.
pub(in crate::store) async fn take_out_of_group(
    session: &mut Session,
    rows: &[(i64, Unpublished)],
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let query = session.query(
        "update oncely.outbox set via = 'poll', leased_by = null where seq = any($1) and via = 'group'",
    );
    query
        .bind(rows.iter().map(|(seq, _)| *seq).collect::<Vec<_>>())
        .execute(session.connection())
        .await
        .doing("take outputs out of their group")?;
    Ok(())
}

/// Leases due outputs, oldest first, and skips rows that another host is leasing. A due output that
/// is not the first of its per-key queue becomes blocked. Its blocker is the last output before it,
/// or the output that blocks that one. It is due again after its blocker is published or dropped.
pub(in crate::store) async fn lease(
    session: &mut Session,
    limit: u32,
    lease: Duration,
) -> Result<(Vec<OutboxRow>, Vec<(i64, Unpublished)>)> {
    let query = session.query(
        "with due as materialized (
             select seq, worker, ordering_key from oncely.outbox
             where published_at is null and via = 'poll' and leased_until <= pg_catalog.now()
                 and (not_before_lsn is null or not_before_lsn <= (select lsn from oncely.relay_position))
             order by leased_until, seq limit $1
             for update skip locked
         ), key as materialized (
             select worker, ordering_key, pg_catalog.max(seq) as last from due
             where ordering_key is not null group by worker, ordering_key
         ), queued as materialized (
             select key.worker, key.ordering_key, before.seq, before.blocked_by from key cross join lateral (
                 select seq, coalesce(blocked_by, seq) as blocked_by from oncely.outbox as before
                 where before.worker = key.worker and before.ordering_key = key.ordering_key
                     and before.ordering_key is not null and before.published_at is null and before.via = 'poll'
                     and before.seq + 0 < key.last and before.due_at <= pg_catalog.clock_timestamp()
                 offset 0
             ) as before
         ), queue as (
             select seq, worker, ordering_key, true as is_due, null as before from due
             union all
             select seq, worker, ordering_key, false, array[seq, blocked_by] from queued
             where seq not in (select seq from due)
         ), routed as materialized (
             select seq, is_due,
                 (pg_catalog.max(before) over (partition by worker, ordering_key order by seq))[2] as before
             from queue
         ), waiting as (
             update oncely.outbox set leased_until = 'infinity', blocked_by = routed.before
             from routed where outbox.seq = routed.seq and is_due and routed.before is not null
         )
         update oncely.outbox
         set leased_until = pg_catalog.now() + $2 * interval '1 microsecond',
             leased_by = nullif(pg_catalog.current_setting('oncely.instance', true), '')::bigint,
             first_attempt_at = coalesce(first_attempt_at, pg_catalog.now())
         from routed where outbox.seq = routed.seq and is_due and routed.before is null
         returning outbox.seq, id, worker, subject, headers, body, ordering_key, failures,
             (extract(epoch from first_attempt_at) * 1000000)::bigint as first_attempt_at, null::bigint as group_number",
    );
    let rows = query
        .bind(i64::from(limit))
        .bind(shared::micros(lease))
        .fetch_all(session.connection())
        .await
        .doing("lease outputs")?;
    rows::leased_outputs(&rows)
}

/// Makes outputs due whose blocking output is published or dropped.
pub(in crate::store) async fn unblock(session: &mut Session) -> Result<()> {
    let query = session.query(
        "with gone as materialized (
             select blocked_by from (select distinct blocked_by from oncely.outbox where blocked_by is not null) as waited_for
             where not exists (
                 select from oncely.outbox as before where before.seq = waited_for.blocked_by and before.published_at is null
                     and (before.via = 'poll' or before.seq in (select seq from oncely.wal_backlog())))
         ), freed as (
             select seq from oncely.outbox where blocked_by in (select blocked_by from gone) for update skip locked
         )
         update oncely.outbox set blocked_by = null, leased_until = due_at
         from freed where outbox.seq = freed.seq",
    );
    let freed = query.execute(session.connection()).await;
    freed.doing("unblock outputs")?;
    Ok(())
}

/// Records the places of published outputs.
///
/// # Errors
/// `Unavailable` if one of them is not in the outbox.
pub(in crate::store) async fn mark_published(
    session: &mut Session,
    published: &[Published],
) -> Result<()> {
    let sequences: Vec<i64> = published
        .iter()
        .map(|place| shared::signed(place.stream_sequence))
        .collect::<Result<_>>()?;
    let query = session.query(
        "update oncely.outbox
         set via = 'poll', published_at = coalesce(published_at, pg_catalog.now()), stream = given.stream,
             stream_sequence = given.stream_sequence, blocked_by = null, parked_at = null
         from unnest($1::bigint[], $2::text[], $3::bigint[]) as given (seq, stream, stream_sequence)
         where outbox.seq = given.seq",
    );
    let result = query
        .bind(published.iter().map(|place| place.seq).collect::<Vec<_>>())
        .bind(
            published
                .iter()
                .map(|place| place.stream.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(sequences)
        .execute(session.connection())
        .await
        .doing("record published outputs")?;
    shared::check_all_recorded(result.rows_affected(), published.len())
}

/// Releases leases that this host still has: another host may have taken over meanwhile.
pub(in crate::store) async fn release(
    session: &mut Session,
    rows: &[(i64, Unpublished)],
) -> Result<()> {
    let ids = session.output_ids();
    let rows: Vec<_> = rows
        .iter()
        .map(|row| ReleaseColumns::of(row, &ids))
        .collect();
    let query = session.query(
        "update oncely.outbox
         set leased_until = coalesce(pg_catalog.now() + given.after * interval '1 microsecond', 'infinity'),
             leased_by = null, failures = failures + given.failed::int, blocked_by = given.blocked_by,
             parked_at = case when given.parked then pg_catalog.now() end,
             last_error = coalesce(given.error, last_error),
             id = coalesce(given.next, id), ids_taken = ids_taken + (given.next is not null)::int
         from unnest($1::bigint[], $2::bigint[], $3::bool[], $4::bigint[], $5::bool[], $6::text[], $7::text[], $8::text[])
             as given (seq, after, failed, blocked_by, parked, error, taken, next)
         where outbox.seq = given.seq and published_at is null and coalesce(outbox.id = given.taken, true)
             and (leased_by is null
                 or leased_by = nullif(pg_catalog.current_setting('oncely.instance', true), '')::bigint)",
    );
    query
        .bind(rows.iter().map(|row| row.seq).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.after).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.failed).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.blocked_by).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.parked).collect::<Vec<_>>())
        .bind(
            rows.iter()
                .map(|row| row.error.as_deref())
                .collect::<Vec<_>>(),
        )
        .bind(rows.iter().map(|row| row.taken).collect::<Vec<_>>())
        .bind(
            rows.iter()
                .map(|row| row.next.as_deref())
                .collect::<Vec<_>>(),
        )
        .execute(session.connection())
        .await
        .doing("release outputs")?;
    Ok(())
}

/// Leases groups whose lease has ended, oldest first, with at least `limit` outputs if there are as
/// many. Returns their outputs like [`lease`], except that no output is blocked. A group without
/// outputs is deleted.
pub(in crate::store) async fn lease_groups(
    session: &mut Session,
    limit: u32,
    lease: Duration,
) -> Result<(Vec<OutboxRow>, Vec<(i64, Unpublished)>)> {
    let query = session.query(
        "with due as materialized (
             select number, seqs, leased_until, cardinality(seqs) as size from oncely.outbox_group
             where leased_until <= pg_catalog.now() order by leased_until, number limit $1 for update skip locked
         ), picked as materialized (
             select number, pg_catalog.sum(size) over (order by leased_until, number) - size as before, exists (
                     select from unnest(seqs) as member (seq) join oncely.outbox on outbox.seq = member.seq and via = 'group'
                 ) as has_outputs
             from due
         ), emptied as (
             delete from oncely.outbox_group using picked where outbox_group.number = picked.number and not has_outputs
         ), leased as (
             update oncely.outbox_group
             set leased_until = pg_catalog.now() + $2 * interval '1 microsecond',
                 leased_by = nullif(pg_catalog.current_setting('oncely.instance', true), '')::bigint
             from picked where outbox_group.number = picked.number and before < $1 and has_outputs
             returning outbox_group.number, seqs
         )
         select outbox.seq, id, outbox.worker, subject, headers, body, ordering_key, failures,
             (extract(epoch from first_attempt_at) * 1000000)::bigint as first_attempt_at, leased.number as group_number
         from leased cross join unnest(seqs) as member (seq)
             join oncely.outbox on outbox.seq = member.seq and via = 'group'
         order by outbox.seq",
    );
    let rows = query
        .bind(i64::from(limit))
        .bind(shared::micros(lease))
        .fetch_all(session.connection())
        .await
        .doing("lease output groups")?;
    rows::leased_outputs(&rows)
}

/// Deletes groups, leases their outputs that are not published one by one, and records the places
/// of the others. Returns the numbers of the groups that this host had leased. Another host
/// has leased the others by now, or this was recorded before.
pub(in crate::store) async fn close_groups(
    session: &mut Session,
    groups: &[GroupOutcome],
) -> Result<HashSet<i64>> {
    let query = session.query(
        "with closed as (
             delete from oncely.outbox_group
             where number = any($1) and (leased_by is null
                 or leased_by = nullif(pg_catalog.current_setting('oncely.instance', true), '')::bigint)
             returning number, seqs, leased_until, leased_by
         ), leased as (
             update oncely.outbox
             set via = 'poll', leased_until = closed.leased_until, leased_by = closed.leased_by
             from unnest($2::bigint[]) as given (seq) join closed on given.seq = any(closed.seqs)
             where outbox.seq = given.seq
         )
         select number from closed",
    );
    let leased = groups.iter().flat_map(|group| {
        let unpublished = group.unpublished.iter().map(|(seq, _)| seq);
        unpublished.chain(&group.leased).copied()
    });
    let rows = query
        .bind(groups.iter().map(|group| group.number).collect::<Vec<_>>())
        .bind(leased.collect::<Vec<_>>())
        .fetch_all(session.connection())
        .await
        .doing("delete output groups")?;
    let closed: HashSet<i64> = rows
        .iter()
        .map(|row| row.try_get(0))
        .collect::<sqlx::Result<_>>()
        .doing("delete output groups")?;
    let published = groups
        .iter()
        .filter(|group| closed.contains(&group.number))
        .flat_map(|group| &group.published);
    add_relay_records(session, published).await?;
    Ok(closed)
}

/// Records the places of outputs, one row for each stream, for as long as the outputs are kept.
pub(super) async fn add_relay_records<'a>(
    session: &mut Session,
    published: impl IntoIterator<Item = &'a Published>,
) -> Result<()> {
    let mut streams = BTreeMap::<&str, Vec<&Published>>::new();
    for place in published {
        streams.entry(&place.stream).or_default().push(place);
    }
    for (stream, places) in streams {
        let sequences: Vec<i64> = places
            .iter()
            .map(|place| shared::signed(place.stream_sequence))
            .collect::<Result<_>>()?;
        let query = session.query(
            "insert into oncely.relay_record (stream, seqs, sequences, last_seq, last_sequence)
             values ($1, $2, $3, $4, $5)",
        );
        query
            .bind(stream)
            .bind(places.iter().map(|place| place.seq).collect::<Vec<_>>())
            .bind(&sequences)
            .bind(places.iter().map(|place| place.seq).max())
            .bind(sequences.iter().max().copied())
            .execute(session.connection())
            .await
            .doing("record the places of outputs")?;
    }
    Ok(())
}

/// Leaves WAL outputs to the poller.
pub(in crate::store) async fn move_to_polling(
    session: &mut Session,
    rows: &[(i64, Unpublished)],
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let query =
        session.query("update oncely.outbox set via = 'poll', leased_by = null where seq = any($1) and via = 'wal'");
    query
        .bind(rows.iter().map(|(seq, _)| *seq).collect::<Vec<_>>())
        .execute(session.connection())
        .await
        .doing("move outputs from the WAL to polling")?;
    release(session, rows).await
}
