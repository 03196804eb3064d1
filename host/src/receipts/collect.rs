//! The leaves of the next checkpoint, read page by page and kept compressed.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};

use super::Closing;
use crate::model::output_ids::OutputIds;
use crate::model::receipt::merkle::{self, Hash};
use crate::model::receipt::{BLOCK, EventLeaf, Leaf, block, hash_of, with_salt};
use crate::store::{
    BlockFilter, CHECKPOINT_MARGIN, CheckpointBlock, CheckpointHead, CheckpointStart,
    CheckpointTimes, Cursor, EventCursor, NO_LAST, Store,
};

/// The rows of one page, and the records of publications, each of several outputs.
const PAGE: u32 = 5_000;
const RECORD_PAGE: u32 = 50;

/// The blocks that are read at once.
const BLOCK_PAGE: u32 = 16;

/// The leaves after which other tasks of the thread run.
const YIELD_AFTER: u64 = 64;

/// The longest time that a transaction may be open and still be found. It bounds the rows that are
/// read twice.
const OPEN_MAX: SignedDuration = SignedDuration::from_mins(15);

/// New leaves, as far as the limit permits.
pub(super) struct Collected {
    pub blocks: Vec<CheckpointBlock>,
    pub leaves: u64,
    pub root: Hash,
    pub next: CheckpointTimes,
    /// Whether there are no more.
    pub is_complete: bool,
}

/// Reads the rows that no checkpoint contains. `limit` is that of each kind of row.
pub(super) async fn collect(
    store: &Store,
    head: &CheckpointHead,
    limit: usize,
    closing: &Closing,
) -> Result<Collected> {
    let start = store.checkpoint_start().await?;

    // Also after the clock was set back, the rows of the last interval are read.
    let interval = SignedDuration::try_from(closing.interval).unwrap_or(OPEN_MAX);
    let interval_ago = start.at - interval.min(OPEN_MAX) - CHECKPOINT_MARGIN;
    let from = CheckpointTimes {
        events: head.from.events.min(interval_ago),
        outputs: head.from.outputs.min(interval_ago),
        activities: head.from.activities.min(interval_ago),
        ..head.from
    };
    let mut collector = Collector {
        store,
        known: known_since(store, &from).await?,
        builder: Builder::new(store.output_ids(), head.number + 1),
        limit,
        start,
        keep_outputs: closing.keep_outputs,
    };
    let events = collector.events(from.events, from.outbox_seq).await?;
    let outputs = collector.outputs(from.outputs).await?;
    let activities = collector.activities(from.activities).await?;

    // The next reads begin where rows may be missing: of open transactions, or beyond the limit.
    let oldest = start.oldest_open.max(start.at - OPEN_MAX).min(start.at) - CHECKPOINT_MARGIN;
    let next = |reached: Option<Timestamp>| reached.map_or(oldest, |at| at.min(oldest));
    let (blocks, leaves, root) = collector.builder.finish()?;
    Ok(Collected {
        blocks,
        leaves,
        root,
        next: CheckpointTimes {
            events: next(events),
            outputs: next(outputs),
            activities: next(activities),
            outbox_seq: match events {
                None => start.outbox_seq,
                Some(_) => from.outbox_seq,
            },
        },
        is_complete: [events, outputs, activities].iter().all(Option::is_none),
    })
}

/// The identities of the leaves that the reads may find again.
async fn known_since(store: &Store, from: &CheckpointTimes) -> Result<HashSet<[u8; 16]>> {
    let since = from.events.min(from.outputs).min(from.activities);
    let mut known = HashSet::new();
    let Some(first) = store.checkpoint_since(since).await? else {
        return Ok(known);
    };
    let mut select = BlockFilter {
        since,
        ..BlockFilter::of_checkpoints(first, NO_LAST)
    };
    loop {
        let page = store.checkpoint_blocks(&select, BLOCK_PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(known);
        };
        select = select.after(last);
        for one in &page {
            for text in block::decompress(&one.leaves)? {
                let leaf = Leaf::from_value(&serde_json::from_str(&text)?)?;
                let from = match &leaf {
                    Leaf::Event(_) => from.events,
                    Leaf::Output(_) => from.outputs,
                    Leaf::Activity(_) | Leaf::ActivityOutcome(_) => from.activities,
                };
                if leaf.at() >= from {
                    known.insert(leaf.identity());
                }
            }
        }
    }
}

struct Collector<'s> {
    store: &'s Store,
    known: HashSet<[u8; 16]>,
    builder: Builder<'s>,
    limit: usize,
    start: CheckpointStart,
    keep_outputs: Duration,
}

impl Collector<'_> {
    /// Adds a leaf that is new. Returns whether it is.
    async fn add(&mut self, leaf: &Leaf) -> Result<bool> {
        if !self.known.insert(leaf.identity()) {
            return Ok(false);
        }
        self.builder.add(leaf)?;
        // Deliveries run on the same threads.
        if self.builder.leaves.is_multiple_of(YIELD_AFTER) {
            tokio::task::yield_now().await;
        }
        Ok(true)
    }

    /// Adds events. Returns the time of the last one if the limit is reached.
    async fn events(&mut self, from: Timestamp, outbox_seq: i64) -> Result<Option<Timestamp>> {
        let (mut after, mut added) = (EventCursor::at(from), 0);
        loop {
            let page = self.store.settled_events(&after, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(None);
            };
            let last_at = last.at;
            after = EventCursor {
                at: last.at,
                worker: last.worker.clone(),
                event: last.event.clone(),
            };
            let is_new =
                |event: &EventLeaf| !self.known.contains(&Leaf::Event(event.clone()).identity());
            let new: Vec<EventLeaf> = page.into_iter().filter(is_new).collect();
            let mut outputs = self.store.outputs_of_events(&new, outbox_seq).await?;
            for mut event in new {
                let key = (event.worker.clone(), event.event.clone());
                event.outputs = self
                    .has_outputs(event.at)
                    .then(|| outputs.remove(&key).unwrap_or_default());
                added += usize::from(self.add(&Leaf::Event(event)).await?);
            }
            if added >= self.limit {
                return Ok(Some(last_at));
            }
        }
    }

    /// Whether the outbox still has the outputs of a transaction of this time.
    fn has_outputs(&self, at: Timestamp) -> bool {
        let age = Duration::try_from(self.start.at.duration_since(at)).unwrap_or_default();
        age < self.keep_outputs
    }

    /// Adds publications. Returns the time of the last one if the limit is reached.
    async fn outputs(&mut self, from: Timestamp) -> Result<Option<Timestamp>> {
        let mut reached: Option<Timestamp> = None;
        for (in_records, limit) in [(false, PAGE), (true, RECORD_PAGE)] {
            let (mut after, mut added) = (Cursor::at(from), 0);
            loop {
                let page = self
                    .store
                    .published_outputs(after, limit, in_records)
                    .await?;
                let (outputs, next) = page;
                for output in outputs {
                    added += usize::from(self.add(&Leaf::Output(output)).await?);
                }
                let Some(next) = next else { break };
                after = next;
                if added >= self.limit {
                    reached = Some(reached.map_or(next.at, |before| before.min(next.at)));
                    break;
                }
            }
        }
        Ok(reached)
    }

    /// Adds activities and their outcomes. Returns the time of the last one if the limit is
    /// reached.
    async fn activities(&mut self, from: Timestamp) -> Result<Option<Timestamp>> {
        let mut reached: Option<Timestamp> = None;
        for of_outcomes in [false, true] {
            let (mut after, mut added) = (Cursor::at(from), 0);
            loop {
                let page: Vec<(i64, Leaf)> = match of_outcomes {
                    false => {
                        let page = self.store.activities_by_age(after, PAGE).await?;
                        page.into_iter()
                            .map(|one| (one.id, Leaf::Activity(one)))
                            .collect()
                    }
                    true => {
                        let page = self.store.activity_outcomes_by_age(after, PAGE).await?;
                        let leaf = |one| Leaf::ActivityOutcome(one);
                        page.into_iter().map(|one| (one.id, leaf(one))).collect()
                    }
                };
                let Some((number, last)) = page.last() else {
                    break;
                };
                after = Cursor {
                    at: last.at(),
                    number: *number,
                };
                for (_, leaf) in &page {
                    added += usize::from(self.add(leaf).await?);
                }
                if added >= self.limit {
                    reached = Some(reached.map_or(after.at, |before| before.min(after.at)));
                    break;
                }
            }
        }
        Ok(reached)
    }
}

/// Leaves in blocks. Only the open block is uncompressed.
struct Builder<'i> {
    ids: &'i OutputIds,
    checkpoint: u64,
    blocks: Vec<CheckpointBlock>,
    leaves: u64,
    /// The open block.
    texts: Vec<String>,
    hashes: Vec<Hash>,
    times: Option<(Timestamp, Timestamp)>,
}

impl<'i> Builder<'i> {
    fn new(ids: &'i OutputIds, checkpoint: u64) -> Self {
        Builder {
            ids,
            checkpoint,
            blocks: Vec::new(),
            leaves: 0,
            texts: Vec::new(),
            hashes: Vec::new(),
            times: None,
        }
    }

    fn add(&mut self, leaf: &Leaf) -> Result<()> {
        let (text, value) = leaf.to_parts()?;
        let salt = self.ids.receipt_salt(&text);
        self.hashes.push(hash_of(&with_salt(value, salt)));
        self.texts.push(text);
        let at = leaf.at();
        let (first, last) = self.times.unwrap_or((at, at));
        self.times = Some((first.min(at), last.max(at)));
        self.leaves += 1;
        if self.texts.len() == BLOCK {
            self.close_block()?;
        }
        Ok(())
    }

    fn close_block(&mut self) -> Result<()> {
        let Some((from_at, until_at)) = self.times.take() else {
            return Ok(());
        };
        self.blocks.push(CheckpointBlock {
            checkpoint: self.checkpoint,
            block: self.blocks.len() as u64,
            from_at,
            until_at,
            root: merkle::root(&self.hashes),
            leaves: block::compress(&self.texts)?,
        });
        self.texts.clear();
        self.hashes.clear();
        Ok(())
    }

    /// The blocks, the number of leaves, and the root over them.
    fn finish(mut self) -> Result<(Vec<CheckpointBlock>, u64, Hash)> {
        self.close_block()?;
        let roots: Vec<Hash> = self.blocks.iter().map(|block| block.root).collect();
        Ok((self.blocks, self.leaves, merkle::root(&roots)))
    }
}
