//! Inbox, outbox and requests partitioned by time: expired rows leave with a whole partition, by
//! `truncate`, and not row by row.
//!
//! The current partition is rotated after half the retention, and truncated once its last row has
//! expired. So there are usually two earlier partitions, and three while one is truncated. Rows are
//! kept for 1 to 1.5 times the retention. See `inbox_partitions` in
//! `migrations/postgres/0001_baseline.sql` for why event ids stay unique.

use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use jiff::Timestamp;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row, raw_sql};

use super::session::Session;
use crate::store::archive::ArchiveFile;
use crate::store::error::Doing as _;
use crate::store::{Result, RetentionPolicy, StoreError, shared};

/// The number of partitions per table.
const PARTITIONS: i16 = 4;

/// A partitioned table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PartitionedTable {
    Inbox,
    Outbox,
    Request,
}

impl PartitionedTable {
    fn name(self) -> &'static str {
        match self {
            PartitionedTable::Inbox => "inbox",
            PartitionedTable::Outbox => "outbox",
            PartitionedTable::Request => "request",
        }
    }
}

/// A row of `oncely.partition_rotation`.
#[derive(Debug)]
struct Rotation {
    now: Timestamp,
    part: i16,
    opened_at: Timestamp,
    /// Oldest first, each with the time when it stopped being the current one.
    earlier: Vec<(i16, Timestamp)>,
}

/// The next step of a rotation.
#[derive(Debug, PartialEq, Eq)]
enum RotationStep {
    /// Truncate the oldest of the earlier partitions.
    Truncate,
    /// Make this partition the current one.
    RotateTo(i16),
}

impl Rotation {
    fn next(&self, keep: Duration) -> Option<RotationStep> {
        let has_passed = |since: Timestamp, time: Duration| {
            Duration::try_from(self.now.duration_since(since)).is_ok_and(|passed| passed >= time)
        };
        if let Some((_, closed_at)) = self.earlier.first()
            && has_passed(*closed_at, keep)
        {
            return Some(RotationStep::Truncate);
        }
        let is_empty = |part: &i16| {
            *part != self.part && self.earlier.iter().all(|(earlier, _)| earlier != part)
        };
        match (1..PARTITIONS)
            .map(|ahead| (self.part + ahead) % PARTITIONS)
            .find(is_empty)
        {
            Some(next) if has_passed(self.opened_at, keep / 2) => {
                Some(RotationStep::RotateTo(next))
            }
            _ => None,
        }
    }
}

/// Runs the next step for a table whose rows are kept for `keep`. Returns whether a step was done.
/// Does nothing while another host rotates, or if more rows than `retention.limit` would have to
/// move to the current partition.
///
/// # Errors
/// `Conflict` if an open transaction does not end in time.
pub(super) async fn run_next_step(
    session: &mut Session,
    table: PartitionedTable,
    keep: Duration,
    retention: &RetentionPolicy,
) -> Result<bool> {
    let Some(rotation) = read(session, table).await? else {
        return Ok(false);
    };
    let Some(step) = rotation.next(keep) else {
        return Ok(false);
    };
    session
        .run(
            format!(
                "set local lock_timeout = {}",
                retention.lock_timeout.as_millis()
            ),
            "set the lock timeout",
        )
        .await?;
    match step {
        RotationStep::RotateTo(part) => rotate_to(session, table, part).await.map(|()| true),
        RotationStep::Truncate => truncate_oldest(session, table, &rotation, keep, retention).await,
    }
}

/// The rotation of a table, locked; `None` if another host holds the lock.
async fn read(session: &mut Session, table: PartitionedTable) -> Result<Option<Rotation>> {
    let query = session.query(
        "select partition, earlier, (extract(epoch from opened_at) * 1000000)::bigint as opened_at,
             array(select (extract(epoch from closed) * 1000000)::bigint
                   from unnest(closed_at) with ordinality as at (closed, place) order by place) as closed_at,
             (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::bigint as now
         from oncely.partition_rotation where table_name = $1 for update skip locked",
    );
    let row = query
        .bind(table.name())
        .fetch_optional(session.connection())
        .await
        .doing("lock a partition rotation")?;
    let read = |row: PgRow| -> anyhow::Result<Rotation> {
        let earlier: Vec<i16> = row.try_get("earlier")?;
        let closed_at: Vec<i64> = row.try_get("closed_at")?;
        let closed_at: Result<Vec<_>> = closed_at.into_iter().map(shared::timestamp).collect();
        Ok(Rotation {
            now: shared::timestamp(row.try_get("now")?)?,
            part: row.try_get("partition")?,
            opened_at: shared::timestamp(row.try_get("opened_at")?)?,
            earlier: earlier.into_iter().zip(closed_at?).collect(),
        })
    };
    row.map(|row| {
        read(row)
            .context("read a partition rotation")
            .map_err(StoreError::Unavailable)
    })
    .transpose()
}

/// Makes another partition the current one. For tables with claims, waits for all transactions that
/// have read the current partition.
async fn rotate_to(session: &mut Session, table: PartitionedTable, part: i16) -> Result<()> {
    if table != PartitionedTable::Outbox {
        session
            .run(
                "lock table oncely.partition_rotation in exclusive mode".to_owned(),
                "rotate the partitions",
            )
            .await?;
    }
    let query = session.query(
        "update oncely.partition_rotation set partition = $2, opened_at = pg_catalog.clock_timestamp(), earlier = earlier || partition,
             closed_at = closed_at || pg_catalog.clock_timestamp()
         where table_name = $1",
    );
    query
        .bind(table.name())
        .bind(part)
        .execute(session.connection())
        .await
        .doing("rotate the partitions")?;
    Ok(())
}

/// Truncates the oldest partition after moving its unexpired rows to the current one. Returns
/// whether it was done.
async fn truncate_oldest(
    session: &mut Session,
    table: PartitionedTable,
    rotation: &Rotation,
    keep: Duration,
    retention: &RetentionPolicy,
) -> Result<bool> {
    let Some((part, closed_at)) = rotation.earlier.first() else {
        return Ok(false);
    };
    let (name, current) = (table.name(), rotation.part);
    let unexpired = unexpired(table, keep);

    // An outbox partition stays while it has many unpublished rows, or unpublished WAL outputs.
    if table == PartitionedTable::Outbox
        && (has_more_than(session, *part, &unexpired, retention.limit).await?
            || has_unrecorded_outputs(session, *part).await?)
    {
        return Ok(false);
    }
    if table == PartitionedTable::Inbox {
        record_completed_redrives(session).await?;
    }

    // Archive the expired rows. Responses to requests are not archived.
    if let (Some(folder), PartitionedTable::Inbox | PartitionedTable::Outbox) =
        (&retention.archive, table)
    {
        let rows = if table == PartitionedTable::Outbox && has_relay_records(session).await? {
            WITH_RELAY_RECORDS
        } else {
            "*"
        };
        let leaving =
            format!("select {rows} from oncely.{name}_{part} as {name} where not ({unexpired})");
        archive(
            session,
            &leaving,
            ArchiveFile::create(folder, name, *closed_at),
        )
        .await?;
    }

    // Wait for transactions that use the partition.
    session
        .run(
            format!("lock table oncely.{name}_{part} in access exclusive mode"),
            "lock a partition",
        )
        .await?;
    if table == PartitionedTable::Outbox {
        settle_recorded_outputs(session, *part, current, &unexpired).await?;
    }

    // Move the unexpired rows, then truncate.
    let emptied = format!(
        "update oncely.{name} set partition = {current} where partition = {part} and {unexpired};
         truncate oncely.{name}_{part};
         update oncely.partition_rotation set earlier = earlier[2:], closed_at = closed_at[2:] where table_name = '{name}'"
    );
    session.run(emptied, "truncate a partition").await?;
    Ok(true)
}

/// The condition for unexpired rows of an earlier partition.
fn unexpired(table: PartitionedTable, keep: Duration) -> String {
    match table {
        // A dead event stays settled while its dead letter can be redriven.
        PartitionedTable::Inbox => "inbox.state = 'dead' and exists (
             select from oncely.dead_letter where dead_letter.worker = inbox.worker
                 and dead_letter.event_id = inbox.event_id and dead_letter.state in ('open', 'redriven'))"
            .to_owned(),
        PartitionedTable::Request => "expires_at > pg_catalog.now()".to_owned(),
        PartitionedTable::Outbox => {
            let kept_since = format!("pg_catalog.now() - {} * interval '1 microsecond'", shared::micros(keep));
            format!(
                "case when via = 'poll' then outbox.published_at is null or outbox.published_at > {kept_since}
                 else outbox.seq in (select unnest(seqs) from oncely.relay_record where relay_record.published_at > {kept_since})
                 end"
            )
        }
    }
}

/// Writes rows to an archive. Published or settled rows of this age no longer change.
async fn archive(session: &mut Session, rows: &str, file: ArchiveFile) -> Result<()> {
    session
        .run(
            "set local statement_timeout = 0".to_owned(),
            "archive a partition",
        )
        .await?;
    // The quote and the delimiter are characters that JSON cannot contain, so lines are unquoted.
    let copy = format!(
        "copy (select pg_catalog.row_to_json(leaving) from ({rows}) as leaving) to stdout
         with (format csv, quote E'\\x01', delimiter E'\\x02')"
    );
    let mut lines = session
        .connection()
        .copy_out_raw(&copy)
        .await
        .doing("archive a partition")?;
    while let Some(line) = lines.next().await {
        file.add(line.doing("archive a partition")?).await;
    }
    file.finish().await
}

/// Whether an outbox partition has more than `limit` unexpired rows.
async fn has_more_than(
    session: &mut Session,
    part: i16,
    unexpired: &str,
    limit: u32,
) -> Result<bool> {
    let count = format!(
        "select pg_catalog.count(*) from (
             select from oncely.outbox_{part} as outbox where {unexpired} limit {limit} + 1) as moving_on"
    );
    let counted = raw_sql(AssertSqlSafe(count))
        .fetch_one(session.connection())
        .await
        .and_then(|row| row.try_get(0));
    let count: i64 = counted.doing("count the unexpired rows of a partition")?;
    Ok(count > i64::from(limit))
}

/// Whether an outbox partition has unpublished outputs of groups or in the WAL.
async fn has_unrecorded_outputs(session: &mut Session, part: i16) -> Result<bool> {
    let query = session.query(
        "select exists (select from oncely.unrecorded_output as unpublished where exists (
             select from oncely.outbox where outbox.seq = unpublished.seq and outbox.partition = $1))",
    );
    let row = query
        .bind(part)
        .fetch_one(session.connection())
        .await
        .and_then(|row| row.try_get(0));
    row.doing("find unpublished outputs of groups and in the WAL")
}

/// Moves outputs of groups or from the WAL that were recently published to the current partition.
/// They become polled rows: as WAL rows they would be written to the WAL a second time.
async fn settle_recorded_outputs(
    session: &mut Session,
    part: i16,
    current: i16,
    unexpired: &str,
) -> Result<()> {
    let settled = format!(
        "update oncely.outbox
         set partition = {current}, via = 'poll', published_at = recorded.published_at, stream = recorded.stream,
             stream_sequence = recorded.sequence
         from (select one.seq as recorded_seq, record.stream, one.sequence, record.published_at
               from oncely.relay_record as record
                   cross join unnest(record.seqs, record.sequences) as one (seq, sequence)) as recorded
         where partition = {part} and via <> 'poll' and seq = recorded_seq and {unexpired}"
    );
    session
        .run(settled, "move published outputs of groups and of the WAL")
        .await
}

/// The archived columns once there are relay records: with place and time of publication.
const WITH_RELAY_RECORDS: &str =
    "outbox.*, (select pg_catalog.to_json(recorded) from oncely.find_relay_record(outbox.seq) as recorded
    where outbox.via <> 'poll') as relay_record";

async fn has_relay_records(session: &mut Session) -> Result<bool> {
    let query = session.query("select exists (select from oncely.relay_record)");
    let row = query
        .fetch_one(session.connection())
        .await
        .and_then(|row| row.try_get(0));
    row.doing("find relay records")
}

/// Deletes at most `limit` relay records of outputs that are deleted.
/// Returns whether there may be more.
pub(super) async fn delete_relay_records(
    session: &mut Session,
    keep: Duration,
    limit: u32,
) -> Result<bool> {
    let query = session.query(
        "delete from oncely.relay_record where number in (
             select number from oncely.relay_record
             where published_at < pg_catalog.now() - $1 * interval '1 microsecond'
                 and last_seq <= (select published_seq from oncely.relay_position)
             order by published_at limit $2 for update skip locked)",
    );
    let result = query
        .bind(shared::micros(keep.saturating_mul(2)))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .doing("delete old relay records")?;
    Ok(result.rows_affected() == u64::from(limit))
}

/// Deletes at most `limit` attempts that are older than `keep` and belong to no dead letter.
/// Returns whether there may be more.
pub(super) async fn delete_attempts(
    session: &mut Session,
    keep: Duration,
    limit: u32,
) -> Result<bool> {
    let query = session.query(
        "delete from oncely.attempt where (worker, event_id, attempt) in (
             select worker, event_id, attempt from oncely.attempt
             where at < pg_catalog.now() - $1 * interval '1 microsecond' and not exists (
                 select from oncely.dead_letter
                 where dead_letter.worker = attempt.worker and dead_letter.event_id = attempt.event_id)
             order by at limit $2 for update skip locked)",
    );
    let result = query
        .bind(shared::micros(keep))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .doing("delete old attempts")?;
    Ok(result.rows_affected() == u64::from(limit))
}

/// Deletes at most `limit` rows of keys of keyed state that were deleted a while ago. New keys of
/// their workers start above the versions of those rows. Returns whether there may be more.
pub(super) async fn delete_deleted_state(session: &mut Session, limit: u32) -> Result<bool> {
    let query = session.query(
        "with gone as (
             delete from oncely.state where (worker, key) in (
                 select worker, key from oncely.state
                 where value is null and updated_at < pg_catalog.now() - $1 * interval '1 microsecond'
                 order by updated_at limit $2 for update skip locked)
             returning worker, version
         ), raised as (
             insert into oncely.state_version_floor (worker, version)
             select worker, pg_catalog.max(version) from gone group by worker order by worker
             on conflict (worker) do update set version = greatest(state_version_floor.version, excluded.version)
         )
         select pg_catalog.count(*) from gone",
    );
    let row = query
        .bind(shared::micros(shared::DELETED_STATE_KEPT))
        .bind(i64::from(limit))
        .fetch_one(session.connection())
        .await
        .doing("delete the rows of deleted state keys")?;
    let gone: i64 = row
        .try_get(0)
        .doing("count the rows of deleted state keys")?;
    Ok(gone == i64::from(limit))
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

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(100);

    fn rotation(part: i16, opened_at: i64, earlier: &[(i16, i64)]) -> Rotation {
        let at = |second| Timestamp::from_second(second).unwrap();
        Rotation {
            now: at(1_000),
            part,
            opened_at: at(opened_at),
            earlier: earlier
                .iter()
                .map(|(part, closed)| (*part, at(*closed)))
                .collect(),
        }
    }

    #[test]
    fn a_partition_is_written_for_half_of_keep_and_kept_for_all() {
        assert_eq!(rotation(0, 951, &[]).next(KEEP), None);
        assert_eq!(
            rotation(0, 950, &[]).next(KEEP),
            Some(RotationStep::RotateTo(1))
        );
        assert_eq!(rotation(2, 960, &[(0, 910), (1, 960)]).next(KEEP), None);
        assert_eq!(
            rotation(2, 950, &[(0, 901), (1, 950)]).next(KEEP),
            Some(RotationStep::RotateTo(3))
        );
        assert_eq!(
            rotation(2, 950, &[(0, 900), (1, 950)]).next(KEEP),
            Some(RotationStep::Truncate)
        );
        assert_eq!(
            rotation(1, 940, &[(2, 901), (3, 905), (0, 940)]).next(KEEP),
            None,
            "no partition is empty"
        );
        assert_eq!(
            rotation(3, 900, &[(2, 950)]).next(KEEP),
            Some(RotationStep::RotateTo(0))
        );
    }
}
