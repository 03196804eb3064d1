//! Checkpoints of receipts: the rows that become leaves, and the closed checkpoints.
//!
//! A row belongs to the first checkpoint whose reads saw it. The next one reads again from the
//! start of the oldest transaction that was open then, so a late commit is found. The caller
//! removes the rows that recent checkpoints contain already.

use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};

use super::db::{Db, Param, Row, Sql, read_row, read_rows};
use super::rows::Columns as _;
use super::{Cursor, OutboxRow, Result, Store, StoreError, outputs, shared};
use crate::model::receipt::merkle::Hash;
use crate::model::receipt::{
    ActivityLeaf, ActivityOutcomeLeaf, CHECKPOINT_OWNER, Checkpoint, EventLeaf, OutputDigest,
    OutputLeaf,
};
use crate::model::redrive;

/// How far before the start of the oldest open transaction the next checkpoint begins to read, for
/// clocks that are set back.
pub const CHECKPOINT_MARGIN: SignedDuration = SignedDuration::from_secs(10);

/// No limit on the number of a checkpoint.
pub const NO_LAST: u64 = i64::MAX as u64;

/// No limit on a time.
const LAST_TIME: Timestamp = Timestamp::MAX;

/// The state of the next checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointHead {
    /// The last checkpoint; 0 for none.
    pub number: u64,
    /// Its hash; `None` for none.
    pub hash: Option<String>,
    /// The times before which all rows are in checkpoints.
    pub from: CheckpointTimes,
    /// The last time that a host read new rows.
    pub checked_at: Timestamp,
    /// When receipts were first turned on.
    pub began_at: Timestamp,
}

/// A time for each kind of row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointTimes {
    /// Of events.
    pub events: Timestamp,
    /// Of publications.
    pub outputs: Timestamp,
    /// Of activities and their outcomes.
    pub activities: Timestamp,
    /// A number of an output, which SQLite uses instead of a time.
    pub outbox_seq: i64,
}

/// The beginning of the reads of a checkpoint, on the database's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointStart {
    /// The current time.
    pub at: Timestamp,
    /// The start of the oldest transaction that is open and may write.
    pub oldest_open: Timestamp,
    /// The last number of an output.
    pub outbox_seq: i64,
}

/// The place after which a page of events begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventCursor {
    /// The time of the last event.
    pub at: Timestamp,
    /// Its worker.
    pub worker: String,
    /// Its id.
    pub event: String,
}

/// Selects blocks of leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockFilter {
    /// Only blocks with a leaf of this time or later.
    pub since: Timestamp,
    /// Only blocks with a leaf of this time or earlier.
    pub until: Timestamp,
    /// Only blocks after this checkpoint and block.
    pub after: (u64, i64),
    /// Only blocks of checkpoints up to this one.
    pub last: u64,
}

/// Leaves as they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointBlock {
    /// The number of the checkpoint.
    pub checkpoint: u64,
    /// The place in it, from 0.
    pub block: u64,
    /// The earliest time of its leaves.
    pub from_at: Timestamp,
    /// The latest one.
    pub until_at: Timestamp,
    /// The root of the subtree.
    pub root: Hash,
    /// Compressed, see [`crate::model::receipt::block`].
    pub leaves: Vec<u8>,
}

/// The row of an event, to compare it with a leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledRow {
    /// Without outputs.
    pub leaf: EventLeaf,
    /// Whether the event was redriven, so that its row may replace that of a dead event.
    pub is_redriven: bool,
}

impl BlockFilter {
    /// All blocks of these checkpoints.
    pub fn of_checkpoints(first: u64, last: u64) -> Self {
        BlockFilter {
            since: Timestamp::UNIX_EPOCH,
            until: LAST_TIME,
            after: (first, -1),
            last,
        }
    }

    /// The blocks after this one.
    pub fn after(self, block: &CheckpointBlock) -> Self {
        BlockFilter {
            after: (block.checkpoint, block.block.cast_signed()),
            ..self
        }
    }
}

impl EventCursor {
    /// The place before all events of a time.
    pub fn at(at: Timestamp) -> Self {
        EventCursor {
            at,
            worker: String::new(),
            event: String::new(),
        }
    }
}

impl Store {
    /// The state of the next checkpoint; `None` if receipts were never on.
    pub async fn checkpoint_head(&self) -> Result<Option<CheckpointHead>> {
        let mut db = self.read().await?;
        let row = db.fetch_optional(HEAD, &[]).await?;
        db.commit().await?;
        row.map(|row| read_row(&row, HEAD.doing, head)).transpose()
    }

    /// Leases the next checkpoint to this host, if no host has done or leased it within
    /// `interval`. Turns receipts on if they never were: they begin with this call.
    pub async fn lease_checkpoint(
        &self,
        interval: Duration,
        lease: Duration,
    ) -> Result<Option<CheckpointHead>> {
        let begin = Sql {
            postgres: "insert into oncely.checkpoint_head
                 (began_at, events_from, outputs_from, activities_from, checked_at, leased_until)
             select pg_catalog.now(), pg_catalog.now(), pg_catalog.now(), pg_catalog.now(), pg_catalog.now(), pg_catalog.now()
             on conflict do nothing",
            sqlite: "insert into oncely_checkpoint_head
                 (row, began_at, events_from, outputs_from, activities_from, checked_at, leased_until)
             select 1, now, now, now, now, now, now
             from (select cast(unixepoch('subsec') * 1000000 as integer) as now) where true
             on conflict do nothing",
            doing: "begin the checkpoints",
        };
        let lease_it = Sql {
            postgres: "update oncely.checkpoint_head
             set leased_until = pg_catalog.now() + $2 * interval '1 microsecond'
             where leased_until <= pg_catalog.now()
                 and checked_at + $1 * interval '1 microsecond' <= pg_catalog.now()
             returning number, hash,
                 (extract(epoch from events_from) * 1000000)::bigint as events_from,
                 (extract(epoch from outputs_from) * 1000000)::bigint as outputs_from,
                 (extract(epoch from activities_from) * 1000000)::bigint as activities_from,
                 outbox_seq, (extract(epoch from checked_at) * 1000000)::bigint as checked_at,
                 (extract(epoch from began_at) * 1000000)::bigint as began_at",
            sqlite: "update oncely_checkpoint_head
             set leased_until = cast(unixepoch('subsec') * 1000000 as integer) + $2
             where leased_until <= cast(unixepoch('subsec') * 1000000 as integer)
                 and checked_at + $1 <= cast(unixepoch('subsec') * 1000000 as integer)
             returning number, hash, events_from, outputs_from, activities_from, outbox_seq, checked_at, began_at",
            doing: "lease the next checkpoint",
        };
        // Without a write while there is nothing to do.
        if let Some(head) = self.checkpoint_head().await? {
            let passed = Timestamp::now().duration_since(head.checked_at);
            if Duration::try_from(passed).is_ok_and(|passed| passed < interval / 2) {
                return Ok(None);
            }
        }
        let mut db = self.write().await?;
        db.execute(begin, &[]).await?;
        let params = [
            Param::Int(shared::micros(interval)),
            Param::Int(shared::micros(lease)),
        ];
        let row = db.fetch_optional(lease_it, &params).await?;
        db.commit().await?;
        row.map(|row| read_row(&row, lease_it.doing, head))
            .transpose()
    }

    /// The beginning of the reads of a checkpoint. It is called before them.
    pub async fn checkpoint_start(&self) -> Result<CheckpointStart> {
        let sql = Sql {
            postgres: "select (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::bigint as at,
                 (extract(epoch from least(pg_catalog.clock_timestamp(), pg_catalog.min(xact_start))) * 1000000)::bigint
                     as oldest_open, 0::bigint as outbox_seq
             from pg_catalog.pg_stat_activity
             where datname = pg_catalog.current_database() and backend_xid is not null",
            sqlite: "select cast(unixepoch('subsec') * 1000000 as integer) as at,
                 cast(unixepoch('subsec') * 1000000 as integer) as oldest_open,
                 coalesce((select max(seq) from oncely_outbox), 0) as outbox_seq",
            doing: "begin to read a checkpoint",
        };
        let mut db = self.read().await?;
        let row = db.fetch_one(sql, &[]).await?;
        db.commit().await?;
        read_row(&row, sql.doing, |row| {
            Ok(CheckpointStart {
                at: row.time("at")?,
                oldest_open: row.time("oldest_open")?,
                outbox_seq: row.get("outbox_seq")?,
            })
        })
    }

    /// A page of the events that were settled after the cursor, oldest first, without their
    /// outputs.
    pub async fn settled_events(&self, after: &EventCursor, limit: u32) -> Result<Vec<EventLeaf>> {
        let sql = Sql {
            postgres: "select worker, event_id, state, payload_sha256, stream, stream_sequence,
                 (extract(epoch from settled_at) * 1000000)::bigint as settled_at
             from oncely.inbox
             where settled_at >= timestamptz 'epoch' + $1 * interval '1 microsecond'
                 and (settled_at, worker, event_id) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2, $3)
             order by settled_at, worker, event_id limit $4",
            sqlite: "select worker, event_id, state, payload_sha256, stream, stream_sequence, settled_at
             from oncely_inbox
             where settled_at >= $1 and (settled_at, worker, event_id) > ($1, $2, $3)
             order by settled_at, worker, event_id limit $4",
            doing: "read settled events by age",
        };
        let params = [
            Param::Int(after.at.as_microsecond()),
            Param::Text(&after.worker),
            Param::Text(&after.event),
            Param::Int(limit.into()),
        ];
        let mut db = self.read_by_index().await?;
        let rows = db.fetch_all(sql, &params).await?;
        db.commit().await?;
        read_rows(&rows, sql.doing, event_leaf)
    }

    /// The outputs of the transactions of these events, by worker and event, in their order. On
    /// SQLite only those with numbers above `after`.
    pub async fn outputs_of_events(
        &self,
        events: &[EventLeaf],
        after: i64,
    ) -> Result<HashMap<(String, String), Vec<OutputDigest>>> {
        let times = || events.iter().map(|event| event.at);
        let (Some(first), Some(last)) = (times().min(), times().max()) else {
            return Ok(HashMap::new());
        };
        // On PostgreSQL both rows of a transaction have its time. SQLite has no index by time.
        let sql = Sql {
            postgres: "select seq, worker, event_id, subject, sha256(body) as body,
                 (extract(epoch from created_at) * 1000000)::bigint as created_at
             from oncely.outbox
             where created_at >= timestamptz 'epoch' + $1 * interval '1 microsecond'
                 and created_at <= timestamptz 'epoch' + $2 * interval '1 microsecond'
             union all
             select seq, worker, event_id, subject, sha256(body),
                 (extract(epoch from created_at) * 1000000)::bigint
             from oncely.dropped_output
             where created_at >= timestamptz 'epoch' + $1 * interval '1 microsecond'
                 and created_at <= timestamptz 'epoch' + $2 * interval '1 microsecond'
             order by seq",
            sqlite: "select seq, worker, event_id, subject, body, created_at from oncely_outbox
             where seq > $3 and created_at >= $1
                 and (worker || char(31) || event_id) in (select value from json_each($4))
             order by seq",
            doing: "read the outputs of events",
        };
        let keys: Vec<String> = events
            .iter()
            .map(|event| format!("{}\u{1f}{}", event.worker, event.event))
            .collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let params = [
            Param::Int(first.as_microsecond()),
            Param::Int(last.as_microsecond()),
            Param::Int(after),
            Param::Texts(&keys),
        ];
        let mut db = self.read_by_index().await?;
        let used = match &db {
            Db::Postgres(_) => 2,
            Db::Sqlite(_) | Db::SqliteReaders(_) => 4,
        };
        let rows = db.fetch_all(sql, params.split_at(used).0).await?;
        db.commit().await?;

        own_outputs(events, &rows, sql.doing, used == 2)
    }

    /// A page of the outputs that were published after the cursor, and the cursor of the next page;
    /// `None` after the last one. `in_records` selects those of groups and of the WAL, with a limit
    /// on records. Published checkpoints are left out.
    pub async fn published_outputs(
        &self,
        after: Cursor,
        limit: u32,
        in_records: bool,
    ) -> Result<(Vec<OutputLeaf>, Option<Cursor>)> {
        let mut db = self.read_by_index().await?;
        if in_records && !matches!(db, Db::Postgres(_)) {
            return Ok((Vec::new(), None));
        }
        let sql = if in_records {
            PUBLISHED_IN_RECORDS
        } else {
            PUBLISHED
        };
        let params = [
            Param::Int(after.at.as_microsecond()),
            Param::Int(after.number),
            Param::Int(limit.into()),
        ];
        let rows = db.fetch_all(sql, &params).await?;
        db.commit().await?;
        let next = rows.last().map(|row| {
            read_row(row, sql.doing, |row| {
                Ok(Cursor {
                    at: row.time("published_at")?,
                    number: row.get("page_number")?,
                })
            })
        });
        let next = next.transpose()?;
        let is_full = in_records || rows.len() >= limit as usize;
        // A record outlasts its outputs.
        let is_leaf = |row: &&Row| matches!(row.get::<Option<String>>("worker"), Ok(Some(worker)) if worker != CHECKPOINT_OWNER);
        let rows = rows.iter().filter(is_leaf);
        let leaves = rows.map(|row| read_row(row, sql.doing, output_leaf));
        Ok((leaves.collect::<Result<_>>()?, next.filter(|_| is_full)))
    }

    /// A page of the activities after the cursor, oldest first.
    pub async fn activities_by_age(&self, after: Cursor, limit: u32) -> Result<Vec<ActivityLeaf>> {
        let sql = Sql {
            postgres: "select id, actor, verb, worker, object, details,
                 (extract(epoch from activity.at) * 1000000)::bigint as at
             from oncely.activity
             where (activity.at, id) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
             order by activity.at, id limit $3",
            sqlite: "select id, actor, verb, worker, object, details, at from oncely_activity
             where (at, id) > ($1, $2) order by at, id limit $3",
            doing: "read activities by age",
        };
        let rows = self.page(sql, after, limit).await?;
        read_rows(&rows, sql.doing, |row| {
            Ok(ActivityLeaf {
                id: row.get("id")?,
                actor: row.text("actor")?,
                verb: row.text("verb")?,
                worker: row.get("worker")?,
                object: row.text("object")?,
                details: hex::encode(Sha256::digest(row.text("details")?)),
                at: row.time("at")?,
            })
        })
    }

    /// A page of the outcomes of activities after the cursor, oldest first.
    pub async fn activity_outcomes_by_age(
        &self,
        after: Cursor,
        limit: u32,
    ) -> Result<Vec<ActivityOutcomeLeaf>> {
        let sql = Sql {
            postgres: "select activity_id, outcome, error, details,
                 (extract(epoch from activity_outcome.at) * 1000000)::bigint as at
             from oncely.activity_outcome
             where (activity_outcome.at, activity_id) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
             order by activity_outcome.at, activity_id limit $3",
            sqlite: "select activity_id, outcome, error, details, at from oncely_activity_outcome
             where (at, activity_id) > ($1, $2) order by at, activity_id limit $3",
            doing: "read the outcomes of activities by age",
        };
        let rows = self.page(sql, after, limit).await?;
        read_rows(&rows, sql.doing, |row| {
            let error: Option<String> = row.get("error")?;
            let details = format!("{}\u{0}{}", error.unwrap_or_default(), row.text("details")?);
            Ok(ActivityOutcomeLeaf {
                id: row.get("activity_id")?,
                outcome: row.text("outcome")?,
                details: hex::encode(Sha256::digest(details)),
                at: row.time("at")?,
            })
        })
    }

    async fn page(&self, sql: Sql, after: Cursor, limit: u32) -> Result<Vec<Row>> {
        let params = [
            Param::Int(after.at.as_microsecond()),
            Param::Int(after.number),
            Param::Int(limit.into()),
        ];
        let mut db = self.read_by_index().await?;
        let rows = db.fetch_all(sql, &params).await?;
        db.commit().await?;
        Ok(rows)
    }

    /// Closes a checkpoint, if the last one is still `expected`: writes it with its blocks, and
    /// appends the message that publishes it. `None` if another host has closed one meanwhile.
    pub async fn close_checkpoint(
        &self,
        expected: u64,
        checkpoint: &Checkpoint,
        blocks: &[CheckpointBlock],
        next: CheckpointTimes,
    ) -> Result<Option<Vec<OutboxRow>>> {
        let mut db = self.write().await?;
        let hash = Some(checkpoint.hash.as_str());
        if !advance(&mut db, expected, checkpoint.number, hash, next).await? {
            db.commit().await?;
            return Ok(None);
        }
        insert_checkpoint(&mut db, checkpoint).await?;
        for block in blocks {
            insert_block(&mut db, block).await?;
        }
        let message = [(CHECKPOINT_OWNER.to_owned(), checkpoint.output())];
        let rows = outputs::append(&mut db, &message).await?;
        db.commit().await?;
        Ok(Some(rows))
    }

    /// Records that there was nothing for a checkpoint, if the last one is still `expected`.
    pub async fn skip_checkpoint(
        &self,
        head: &CheckpointHead,
        next: CheckpointTimes,
    ) -> Result<()> {
        let mut db = self.write().await?;
        let hash = head.hash.as_deref();
        advance(&mut db, head.number, head.number, hash, next).await?;
        db.commit().await
    }

    /// A page of at most `limit` blocks, in the order of their checkpoints.
    pub async fn checkpoint_blocks(
        &self,
        select: &BlockFilter,
        limit: u32,
    ) -> Result<Vec<CheckpointBlock>> {
        let sql = Sql {
            postgres: "select checkpoint, block, root, leaves,
                 (extract(epoch from from_at) * 1000000)::bigint as from_at,
                 (extract(epoch from until_at) * 1000000)::bigint as until_at
             from oncely.checkpoint_block
             where until_at >= timestamptz 'epoch' + $1 * interval '1 microsecond'
                 and from_at <= timestamptz 'epoch' + $2 * interval '1 microsecond'
                 and (checkpoint, block) > ($3, $4) and checkpoint <= $5
             order by checkpoint, block limit $6",
            sqlite: "select checkpoint, block, root, leaves, from_at, until_at from oncely_checkpoint_block
             where until_at >= $1 and from_at <= $2 and (checkpoint, block) > ($3, $4) and checkpoint <= $5
             order by checkpoint, block limit $6",
            doing: "read the leaves of checkpoints",
        };
        let params = [
            Param::Int(select.since.as_microsecond()),
            Param::Int(select.until.as_microsecond()),
            Param::Int(shared::signed(select.after.0)?),
            Param::Int(select.after.1),
            Param::Int(select.last.cast_signed().max(0)),
            Param::Int(limit.into()),
        ];
        let mut db = self.read_by_index().await?;
        let rows = db.fetch_all(sql, &params).await?;
        db.commit().await?;
        rows.iter().map(|row| block(row, sql.doing)).collect()
    }

    /// The roots of the blocks of a checkpoint, in order.
    pub async fn checkpoint_roots(&self, number: u64) -> Result<Vec<Hash>> {
        let sql = Sql {
            postgres: "select root from oncely.checkpoint_block where checkpoint = $1 order by block",
            sqlite: "select root from oncely_checkpoint_block where checkpoint = $1 order by block",
            doing: "read the roots of a checkpoint",
        };
        let mut db = self.read_by_index().await?;
        let rows = db
            .fetch_all(sql, &[Param::Int(shared::signed(number)?)])
            .await?;
        db.commit().await?;
        rows.iter().map(|row| root(row, sql.doing)).collect()
    }

    /// At most `limit` checkpoints from a number on, in order.
    pub async fn checkpoints(&self, from: u64, limit: u32) -> Result<Vec<Checkpoint>> {
        let params = [Param::Int(shared::signed(from)?), Param::Int(limit.into())];
        let mut db = self.read_by_index().await?;
        let rows = db.fetch_all(CHECKPOINTS, &params).await?;
        db.commit().await?;
        read_rows(&rows, CHECKPOINTS.doing, checkpoint)
    }

    /// The number of the first checkpoint that was closed at a time or later; `None` without one.
    pub async fn checkpoint_since(&self, since: Timestamp) -> Result<Option<u64>> {
        let sql = Sql {
            postgres: "select number from oncely.checkpoint
             where closed_at >= timestamptz 'epoch' + $1 * interval '1 microsecond'
             order by closed_at, number limit 1",
            sqlite: "select number from oncely_checkpoint where closed_at >= $1
             order by closed_at, number limit 1",
            doing: "find the first checkpoint of a time",
        };
        let mut db = self.read_by_index().await?;
        let row = db
            .fetch_optional(sql, &[Param::Int(since.as_microsecond())])
            .await?;
        db.commit().await?;
        row.map(|row| read_row(&row, sql.doing, |row| row.number("number")))
            .transpose()
    }

    /// Deletes at most `limit` blocks of checkpoints that are older than `keep`. Returns their
    /// number.
    pub async fn delete_checkpoint_blocks(&self, keep: Duration, limit: u32) -> Result<u64> {
        let sql = Sql {
            postgres: "delete from oncely.checkpoint_block where (checkpoint, block) in (
                 select checkpoint, block from oncely.checkpoint_block
                     join oncely.checkpoint on number = checkpoint
                 where closed_at < pg_catalog.now() - $1 * interval '1 microsecond'
                 order by checkpoint, block limit $2)",
            sqlite: "delete from oncely_checkpoint_block where (checkpoint, block) in (
                 select checkpoint, block from oncely_checkpoint_block
                     join oncely_checkpoint on number = checkpoint
                 where closed_at < cast(unixepoch('subsec') * 1000000 as integer) - $1
                 order by checkpoint, block limit $2)",
            doing: "delete old leaves of checkpoints",
        };
        let params = [Param::Int(shared::micros(keep)), Param::Int(limit.into())];
        let mut db = self.write().await?;
        let deleted = db.execute(sql, &params).await?;
        db.commit().await?;
        Ok(deleted)
    }

    /// The rows of these events of a worker.
    pub async fn settled_rows(&self, worker: &str, events: &[&str]) -> Result<Vec<SettledRow>> {
        let sql = Sql {
            postgres: "select worker, event_id, state, payload_sha256, stream, stream_sequence,
                 (extract(epoch from settled_at) * 1000000)::bigint as settled_at,
                 exists (select from oncely.dead_letter where dead_letter.worker = inbox.worker
                     and dead_letter.event_id = inbox.event_id and generation > 0) as is_redriven
             from oncely.inbox where worker = $1 and event_id = any($2)",
            sqlite: "select inbox.worker, inbox.event_id, inbox.state, inbox.payload_sha256, inbox.stream,
                 inbox.stream_sequence, inbox.settled_at,
                 exists (select 1 from oncely_dead_letter as dead_letter where dead_letter.worker = inbox.worker
                     and dead_letter.event_id = inbox.event_id and generation > 0) as is_redriven
             from json_each($2) as given cross join oncely_inbox as inbox
                 on inbox.worker = $1 and inbox.event_id = given.value",
            doing: "read the rows of events",
        };
        let params = [Param::Text(worker), Param::Texts(events)];
        let mut db = self.read_by_index().await?;
        let rows = db.fetch_all(sql, &params).await?;
        db.commit().await?;
        read_rows(&rows, sql.doing, |row| {
            Ok(SettledRow {
                leaf: event_leaf(row)?,
                is_redriven: row.get("is_redriven")?,
            })
        })
    }
}

const HEAD: Sql = Sql {
    postgres: "select number, hash,
         (extract(epoch from events_from) * 1000000)::bigint as events_from,
         (extract(epoch from outputs_from) * 1000000)::bigint as outputs_from,
         (extract(epoch from activities_from) * 1000000)::bigint as activities_from,
         outbox_seq, (extract(epoch from checked_at) * 1000000)::bigint as checked_at,
         (extract(epoch from began_at) * 1000000)::bigint as began_at
     from oncely.checkpoint_head",
    sqlite: "select number, hash, events_from, outputs_from, activities_from, outbox_seq, checked_at, began_at
     from oncely_checkpoint_head",
    doing: "read the state of checkpoints",
};

const CHECKPOINTS: Sql = Sql {
    postgres: "select number, installation, hash, previous, leaves, root,
         (extract(epoch from closed_at) * 1000000)::bigint as closed_at
     from oncely.checkpoint where number >= $1 order by number limit $2",
    sqlite: "select number, installation, hash, previous, leaves, root, closed_at
     from oncely_checkpoint where number >= $1 order by number limit $2",
    doing: "read checkpoints",
};

const PUBLISHED: Sql = Sql {
    postgres: "select seq, seq as page_number, worker, event_id, id, stream, stream_sequence,
         (extract(epoch from published_at) * 1000000)::bigint as published_at
     from oncely.outbox
     where published_at is not null
         and (published_at, seq) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
     order by published_at, seq limit $3",
    sqlite:
        "select seq, seq as page_number, worker, event_id, id, stream, stream_sequence, published_at
     from oncely_outbox
     where published_at is not null and (published_at, seq) > ($1, $2)
     order by published_at, seq limit $3",
    doing: "read published outputs for a checkpoint",
};

const PUBLISHED_IN_RECORDS: Sql = Sql::on_postgres(
    "with record as (
         select number, stream, seqs, sequences, published_at from oncely.relay_record
         where (published_at, number) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
         order by published_at, number limit $3
     )
     select outbox.seq, record.number as page_number, outbox.worker, outbox.event_id, outbox.id, record.stream,
         published.sequence as stream_sequence,
         (extract(epoch from record.published_at) * 1000000)::bigint as published_at
     from record cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
         left join oncely.outbox on outbox.seq = published.seq and outbox.via <> 'poll'
     order by record.published_at, record.number",
    "read the records of published outputs for a checkpoint",
);

fn head(row: &Row) -> sqlx::Result<CheckpointHead> {
    Ok(CheckpointHead {
        number: row.number("number")?,
        hash: row.get("hash")?,
        from: CheckpointTimes {
            events: row.time("events_from")?,
            outputs: row.time("outputs_from")?,
            activities: row.time("activities_from")?,
            outbox_seq: row.get("outbox_seq")?,
        },
        checked_at: row.time("checked_at")?,
        began_at: row.time("began_at")?,
    })
}

/// The outputs among these rows that belong to the transactions of events. The bodies of
/// PostgreSQL are hashed already.
fn own_outputs(
    events: &[EventLeaf],
    rows: &[Row],
    doing: &'static str,
    is_postgres: bool,
) -> Result<HashMap<(String, String), Vec<OutputDigest>>> {
    let settled: HashMap<(&str, &str), Timestamp> = events
        .iter()
        .map(|event| ((event.worker.as_str(), event.event.as_str()), event.at))
        .collect();
    let mut found: HashMap<(String, String), Vec<OutputDigest>> = HashMap::new();
    for row in rows {
        let read = |row: &Row| {
            let body = row.bytes("body")?;
            let digest = OutputDigest {
                number: row.get("seq")?,
                subject: row.text("subject")?,
                sha256: match is_postgres {
                    true => hex::encode(body),
                    false => hex::encode(Sha256::digest(&body)),
                },
            };
            let key = (row.text("worker")?, row.text("event_id")?);
            Ok((key, row.time("created_at")?, digest))
        };
        let (key, created_at, digest) = read_row(row, doing, read)?;
        // A redrive before this outcome, or after it, is another transaction.
        let at = settled.get(&(key.0.as_str(), key.1.as_str()));
        let is_own = at.is_some_and(|at| match is_postgres {
            true => *at == created_at,
            false => *at <= created_at,
        });
        if is_own && !redrive::is_pointer(&digest.subject) {
            found.entry(key).or_default().push(digest);
        }
    }
    Ok(found)
}

fn event_leaf(row: &Row) -> sqlx::Result<EventLeaf> {
    Ok(EventLeaf {
        worker: row.text("worker")?,
        event: row.text("event_id")?,
        outcome: row.text("state")?,
        payload: hex::encode(row.bytes("payload_sha256")?),
        stream: row.get("stream")?,
        sequence: row.optional_number("stream_sequence")?,
        at: row.time("settled_at")?,
        outputs: None,
    })
}

fn output_leaf(row: &Row) -> sqlx::Result<OutputLeaf> {
    Ok(OutputLeaf {
        worker: row.text("worker")?,
        event: row.text("event_id")?,
        number: row.get("seq")?,
        id: row.text("id")?,
        stream: row.text("stream")?,
        sequence: row.number("stream_sequence")?,
        at: row.time("published_at")?,
    })
}

fn checkpoint(row: &Row) -> sqlx::Result<Checkpoint> {
    let read = Checkpoint::new("", None, Timestamp::UNIX_EPOCH, 0, &[0; 32]);
    Ok(Checkpoint {
        hash: row.text("hash")?,
        installation: row.text("installation")?,
        number: row.number("number")?,
        previous: row.get("previous")?,
        closed_at: row.time("closed_at")?,
        leaves: row.number("leaves")?,
        root: row.text("root")?,
        ..read
    })
}

fn root(row: &Row, doing: &'static str) -> Result<Hash> {
    let bytes = read_row(row, doing, |row| row.bytes("root"))?;
    let wrong = |_| StoreError::Unavailable(anyhow::anyhow!("a root is no SHA-256").context(doing));
    Hash::try_from(bytes).map_err(wrong)
}

fn block(row: &Row, doing: &'static str) -> Result<CheckpointBlock> {
    let root = root(row, doing)?;
    read_row(row, doing, |row| {
        Ok(CheckpointBlock {
            checkpoint: row.number("checkpoint")?,
            block: row.number("block")?,
            from_at: row.time("from_at")?,
            until_at: row.time("until_at")?,
            root,
            leaves: row.bytes("leaves")?,
        })
    })
}

/// Moves the head on, and ends its lease. Returns whether the last checkpoint was `expected`.
async fn advance(
    db: &mut Db,
    expected: u64,
    number: u64,
    hash: Option<&str>,
    next: CheckpointTimes,
) -> Result<bool> {
    let sql = Sql {
        postgres: "update oncely.checkpoint_head set number = $2, hash = $3,
             events_from = timestamptz 'epoch' + $4 * interval '1 microsecond',
             outputs_from = timestamptz 'epoch' + $5 * interval '1 microsecond',
             activities_from = timestamptz 'epoch' + $6 * interval '1 microsecond',
             outbox_seq = $7, checked_at = pg_catalog.now(), leased_until = pg_catalog.now()
         where number = $1",
        sqlite: "update oncely_checkpoint_head set number = $2, hash = $3, events_from = $4, outputs_from = $5,
             activities_from = $6, outbox_seq = $7, checked_at = cast(unixepoch('subsec') * 1000000 as integer),
             leased_until = cast(unixepoch('subsec') * 1000000 as integer)
         where number = $1",
        doing: "move the checkpoints on",
    };
    let params = [
        Param::Int(shared::signed(expected)?),
        Param::Int(shared::signed(number)?),
        Param::OptionalText(hash),
        Param::Int(next.events.as_microsecond()),
        Param::Int(next.outputs.as_microsecond()),
        Param::Int(next.activities.as_microsecond()),
        Param::Int(next.outbox_seq),
    ];
    Ok(db.execute(sql, &params).await? == 1)
}

async fn insert_checkpoint(db: &mut Db, checkpoint: &Checkpoint) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.checkpoint (number, installation, hash, previous, closed_at, leaves, root)
         values ($1, $2, $3, $4, timestamptz 'epoch' + $5 * interval '1 microsecond', $6, $7)",
        sqlite: "insert into oncely_checkpoint (number, installation, hash, previous, closed_at, leaves, root)
         values ($1, $2, $3, $4, $5, $6, $7)",
        doing: "write a checkpoint",
    };
    let params = [
        Param::Int(shared::signed(checkpoint.number)?),
        Param::Text(&checkpoint.installation),
        Param::Text(&checkpoint.hash),
        Param::OptionalText(checkpoint.previous.as_deref()),
        Param::Int(checkpoint.closed_at.as_microsecond()),
        Param::Int(shared::signed(checkpoint.leaves)?),
        Param::Text(&checkpoint.root),
    ];
    db.execute(sql, &params).await.map(drop)
}

async fn insert_block(db: &mut Db, block: &CheckpointBlock) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.checkpoint_block (checkpoint, block, from_at, until_at, root, leaves)
         values ($1, $2, timestamptz 'epoch' + $3 * interval '1 microsecond',
             timestamptz 'epoch' + $4 * interval '1 microsecond', $5, $6)",
        sqlite: "insert into oncely_checkpoint_block (checkpoint, block, from_at, until_at, root, leaves)
         values ($1, $2, $3, $4, $5, $6)",
        doing: "write the leaves of a checkpoint",
    };
    let params = [
        Param::Int(shared::signed(block.checkpoint)?),
        Param::Int(shared::signed(block.block)?),
        Param::Int(block.from_at.as_microsecond()),
        Param::Int(block.until_at.as_microsecond()),
        Param::Bytes(&block.root),
        Param::Bytes(&block.leaves),
    ];
    db.execute(sql, &params).await.map(drop)
}
