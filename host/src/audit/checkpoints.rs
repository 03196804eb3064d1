//! Checkpoints: each has its hash and its leaves, follows the one before, and is the one that was
//! published. Each row is as in its leaf, and each leaf still has its row.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::difference::Kind;
use super::{EDGE, Findings, Kept};
use crate::model::receipt::merkle::{self, Hash};
use crate::model::receipt::{
    ActivityLeaf, CHECKPOINT_STREAM, Checkpoint, EventLeaf, Leaf, OutputDigest, OutputLeaf, block,
    hash_of, salted,
};
use crate::services::Services;
use crate::store::{
    BlockFilter, CheckpointBlock, CheckpointHead, Cursor, EventCursor, SettledRow, Store,
};

/// The checkpoints, blocks and rows of one page.
const CHECKPOINT_PAGE: u32 = 1_000;
const BLOCK_PAGE: u32 = 16;
const PAGE: u32 = 5_000;
const RECORD_PAGE: u32 = 50;

/// The most published copies that are compared.
const PUBLISHED_MAX: u64 = 2_000;

/// The most leaves whose identities are kept, to find rows without one.
const IDENTITIES_MAX: usize = 2_000_000;

/// The checkpoints of a window.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CheckpointCounts {
    pub checkpoints: u64,
    pub leaves: u64,
    /// The rows that were compared with leaves.
    pub rows: u64,
    /// The published copies that were compared.
    pub published: u64,
}

/// Checks the checkpoints that were closed since a time, and the rows that they cover. `None` if
/// receipts were never on.
pub(super) async fn check(
    services: &Services,
    since: Timestamp,
    kept: Kept,
    findings: &mut Findings,
) -> Result<Option<CheckpointCounts>> {
    let store = services.store.as_ref();
    // Read first: every row before its times is in the leaves that are read below.
    let Some(head) = store.checkpoint_head().await? else {
        return Ok(None);
    };
    let now = Timestamp::now();
    let leaves_since = now - SignedDuration::try_from(kept.receipts.saturating_sub(EDGE))?;
    let since = since.max(leaves_since).max(head.began_at);
    let Some(first) = store.checkpoint_since(since).await? else {
        return Ok(Some(CheckpointCounts::default()));
    };
    let mut check = Check {
        services,
        kept,
        now,
        findings,
        counts: CheckpointCounts::default(),
        identities: HashSet::new(),
    };
    let published = check.read_published(&head, first).await?;
    let checkpoints = check.chain(first).await?;
    check.compare_published(&published, &checkpoints);
    check.leaves(&checkpoints).await?;
    check.rows_without_leaf(&head, since).await?;
    Ok(Some(check.counts))
}

/// A message with a checkpoint.
struct PublishedCopy {
    sequence: u64,
    number: u64,
    hash: String,
}

struct Check<'c> {
    services: &'c Services,
    kept: Kept,
    now: Timestamp,
    findings: &'c mut Findings,
    counts: CheckpointCounts,
    /// Of the leaves that were read.
    identities: HashSet<[u8; 16]>,
}

impl Check<'_> {
    fn store(&self) -> &Store {
        self.services.store.as_ref()
    }

    /// The newest published checkpoints.
    async fn read_published(
        &mut self,
        head: &CheckpointHead,
        first: u64,
    ) -> Result<Vec<PublishedCopy>> {
        let bus = &self.services.bus;
        let installation = self.store().installation().to_owned();
        let mut published = Vec::new();
        let Some((last, _)) = bus.last_checkpoint(&installation).await? else {
            self.findings.note(format!(
                "the stream {CHECKPOINT_STREAM} has no checkpoint, so no published copy is compared"
            ));
            return Ok(published);
        };
        let wanted = (head.number.saturating_sub(first) + 1).min(PUBLISHED_MAX);
        let mut from = last.saturating_sub(wanted) + 1;
        while let Some((sequence, body)) = bus.next_checkpoint(&installation, from).await? {
            from = sequence + 1;
            match serde_json::from_slice::<Checkpoint>(&body) {
                Ok(checkpoint) => published.push(PublishedCopy {
                    sequence,
                    number: checkpoint.number,
                    hash: checkpoint.computed_hash(),
                }),
                Err(_) => self.findings.add(
                    Kind::CheckpointDiffers
                        .found(format!(
                            "message {sequence} of {CHECKPOINT_STREAM} is no checkpoint"
                        ))
                        .at(CHECKPOINT_STREAM, sequence),
                ),
            }
        }
        Ok(published)
    }

    /// Checks the hash of each checkpoint, and that it follows the one before. Returns them.
    async fn chain(&mut self, first: u64) -> Result<Vec<Checkpoint>> {
        let mut checkpoints: Vec<Checkpoint> = Vec::new();
        let mut before = match first {
            0 | 1 => None,
            _ => self.store().checkpoints(first - 1, 1).await?.pop(),
        };
        let mut from = first;
        loop {
            let page = self.store().checkpoints(from, CHECKPOINT_PAGE).await?;
            let Some(last) = page.last() else { break };
            from = last.number + 1;
            for checkpoint in page {
                let expected = before
                    .as_ref()
                    .map(|before| (before.number + 1, &before.hash));
                let follows = expected.is_none_or(|(number, hash)| {
                    checkpoint.number == number && checkpoint.previous.as_ref() == Some(hash)
                });
                if checkpoint.hash != checkpoint.computed_hash() {
                    let number = checkpoint.number;
                    self.changed(format!("checkpoint {number} does not have its hash"));
                } else if !follows {
                    let number = checkpoint.number;
                    self.changed(format!(
                        "checkpoint {number} does not follow the one before"
                    ));
                }
                self.counts.checkpoints += 1;
                before = Some(checkpoint.clone());
                checkpoints.push(checkpoint);
            }
        }
        Ok(checkpoints)
    }

    fn changed(&mut self, found: String) {
        self.findings.add(Kind::CheckpointChanged.found(found));
    }

    fn compare_published(&mut self, published: &[PublishedCopy], checkpoints: &[Checkpoint]) {
        let hashes: HashMap<u64, &String> = checkpoints
            .iter()
            .map(|checkpoint| (checkpoint.number, &checkpoint.hash))
            .collect();
        let first = checkpoints
            .first()
            .map_or(0, |checkpoint| checkpoint.number);
        // A number may be there twice, after a restore.
        for copy in published {
            let PublishedCopy {
                sequence,
                number,
                hash,
            } = copy;
            if *number < first {
                continue;
            }
            self.counts.published += 1;
            let found = match hashes.get(number) {
                Some(own) if *own == hash => continue,
                Some(own) => format!("checkpoint {number} was published as {hash}, and is {own}"),
                None => format!("checkpoint {number} was published as {hash}, and is not there"),
            };
            let difference = Kind::CheckpointDiffers.found(found);
            self.findings
                .add(difference.at(CHECKPOINT_STREAM, *sequence));
        }
    }

    /// Checks the roots, and compares each leaf with its row.
    async fn leaves(&mut self, checkpoints: &[Checkpoint]) -> Result<()> {
        let (Some(first), Some(last)) = (checkpoints.first(), checkpoints.last()) else {
            return Ok(());
        };
        let mut select = BlockFilter::of_checkpoints(first.number, last.number);
        let mut roots: HashMap<u64, (Vec<Hash>, u64)> = HashMap::new();
        loop {
            let page = self.store().checkpoint_blocks(&select, BLOCK_PAGE).await?;
            let Some(after) = page.last() else { break };
            select = select.after(after);
            for block in &page {
                let leaves = self.block(block).await?;
                let (roots, count) = roots.entry(block.checkpoint).or_default();
                roots.push(block.root);
                *count += leaves;
            }
        }
        for checkpoint in checkpoints {
            let (roots, count) = roots.remove(&checkpoint.number).unwrap_or_default();
            if hex::encode(merkle::root(&roots)) != checkpoint.root || count != checkpoint.leaves {
                let number = checkpoint.number;
                self.changed(format!(
                    "the leaves of checkpoint {number} do not have its root"
                ));
            }
        }
        Ok(())
    }

    /// Checks one block. Returns the number of its leaves.
    async fn block(&mut self, block: &CheckpointBlock) -> Result<u64> {
        let CheckpointBlock {
            checkpoint,
            block: place,
            ..
        } = block;
        let damaged = format!("block {place} of checkpoint {checkpoint} is changed");
        let Ok(texts) = block::decompress(&block.leaves) else {
            self.changed(damaged);
            return Ok(0);
        };
        let ids = self.store().output_ids();
        let (mut hashes, mut leaves) = (Vec::new(), Vec::new());
        for text in &texts {
            let leaf = salted(text, ids.receipt_salt(text))
                .and_then(|value| Ok((hash_of(&value), Leaf::from_value(&value)?)));
            let Ok((hash, leaf)) = leaf else { break };
            hashes.push(hash);
            leaves.push(leaf);
        }
        self.counts.leaves += leaves.len() as u64;
        if merkle::root(&hashes) != block.root || leaves.len() != texts.len() {
            self.changed(damaged);
        }
        for leaf in &leaves {
            if self.identities.len() < IDENTITIES_MAX {
                self.identities.insert(leaf.identity());
            }
        }
        self.compare(*checkpoint, &leaves).await?;
        Ok(leaves.len() as u64)
    }

    /// Compares leaves with the rows as they are now.
    async fn compare(&mut self, checkpoint: u64, leaves: &[Leaf]) -> Result<()> {
        let mut events: BTreeMap<&str, Vec<&EventLeaf>> = BTreeMap::new();
        let mut outputs: BTreeMap<&str, Vec<&OutputLeaf>> = BTreeMap::new();
        for leaf in leaves {
            match leaf {
                Leaf::Event(event) => events.entry(&event.worker).or_default().push(event),
                Leaf::Output(output) => outputs.entry(&output.stream).or_default().push(output),
                Leaf::Activity(activity) => self.activity(checkpoint, activity).await?,
                Leaf::ActivityOutcome(_) => self.activity_outcome(checkpoint, leaf).await?,
            }
        }
        for (worker, events) in events {
            self.events(checkpoint, worker, &events).await?;
        }
        for (stream, outputs) in outputs {
            self.outputs(checkpoint, stream, &outputs).await?;
        }
        Ok(())
    }

    async fn events(&mut self, checkpoint: u64, worker: &str, leaves: &[&EventLeaf]) -> Result<()> {
        let ids: Vec<&str> = leaves.iter().map(|leaf| leaf.event.as_str()).collect();
        let mut rows: HashMap<String, Vec<SettledRow>> = HashMap::new();
        for row in self.store().settled_rows(worker, &ids).await? {
            rows.entry(row.leaf.event.clone()).or_default().push(row);
        }
        let recent: Vec<EventLeaf> = leaves
            .iter()
            .filter(|leaf| self.has_outputs(leaf))
            .map(|leaf| EventLeaf::clone(leaf))
            .collect();
        let numbers = recent.iter().flat_map(|leaf| leaf.outputs.iter().flatten());
        let after = numbers
            .map(|output| output.number)
            .min()
            .unwrap_or_default()
            - 1;
        let mut outputs = self.store().outputs_of_events(&recent, after).await?;
        for leaf in leaves {
            self.counts.rows += 1;
            let rows = rows.remove(&leaf.event).unwrap_or_default();
            self.event(checkpoint, leaf, &rows)?;
            if !self.has_outputs(leaf) {
                continue;
            }
            // Further outputs are of a later redrive. Missing ones were deleted after their time.
            let key = (leaf.worker.clone(), leaf.event.clone());
            let now = outputs.remove(&key).unwrap_or_default();
            let listed = leaf.outputs.iter().flatten();
            let is_changed = |then: &&OutputDigest| {
                let one = now.iter().find(|one| one.number == then.number);
                one.is_some_and(|one| one != *then)
            };
            for output in listed.filter(is_changed) {
                let found = format!(
                    "output {} of event {} is not as in checkpoint {checkpoint}",
                    output.number, leaf.event
                );
                let difference = Kind::RowChanged.found(found);
                self.findings
                    .add(difference.of_event(&leaf.worker, &leaf.event));
            }
        }
        Ok(())
    }

    /// Whether the outbox still has the outputs of an event.
    fn has_outputs(&self, leaf: &EventLeaf) -> bool {
        let kept = self.kept.outputs.saturating_sub(EDGE);
        let age = std::time::Duration::try_from(self.now.duration_since(leaf.at));
        leaf.outputs.is_some() && age.unwrap_or_default() < kept
    }

    fn event(&mut self, checkpoint: u64, leaf: &EventLeaf, rows: &[SettledRow]) -> Result<()> {
        let recorded = EventLeaf {
            outputs: None,
            ..leaf.clone()
        };
        // The row of a dead event is replaced when a redrive takes effect.
        let is_explained = |row: &SettledRow| {
            row.leaf == recorded
                || (leaf.outcome == "dead" && row.is_redriven && row.leaf.at > leaf.at)
        };
        if rows.iter().any(is_explained) {
            return Ok(());
        }
        let (text, _) = Leaf::Event(recorded).to_parts()?;
        let event = &leaf.event;
        let difference = match rows.first() {
            Some(row) => {
                let (now, _) = Leaf::Event(row.leaf.clone()).to_parts()?;
                Kind::RowChanged.found(format!(
                    "event {event} is not as in checkpoint {checkpoint}: it is {now}, and was {text}"
                ))
            }
            None if self.has_expired(leaf.at) => return Ok(()),
            None => Kind::RowMissing.found(format!(
                "event {event} of checkpoint {checkpoint} has no row; it was {text}"
            )),
        };
        self.findings.add(difference.of_event(&leaf.worker, event));
        Ok(())
    }

    /// Whether an inbox record of this time may be deleted by now.
    fn has_expired(&self, at: Timestamp) -> bool {
        let age = std::time::Duration::try_from(self.now.duration_since(at)).unwrap_or_default();
        self.kept
            .inbox
            .is_some_and(|kept| age >= kept.saturating_sub(EDGE))
    }

    /// Compares publications. An output that was published again has a later time, and a leaf of
    /// its own.
    async fn outputs(
        &mut self,
        checkpoint: u64,
        stream: &str,
        leaves: &[&OutputLeaf],
    ) -> Result<()> {
        let numbers: Vec<i64> = leaves.iter().map(|leaf| leaf.number).collect();
        let rows = self.store().recorded_outputs(stream, &numbers).await?;
        for leaf in leaves {
            let Some(row) = rows.get(&leaf.number) else {
                continue;
            };
            self.counts.rows += 1;
            let is_same = row.id == leaf.id && row.stream_sequence == leaf.sequence;
            if !is_same && row.published_at <= leaf.at {
                let found = format!(
                    "output {} is recorded as {} at {}, and was {} at {} in checkpoint {checkpoint}",
                    leaf.number, row.id, row.stream_sequence, leaf.id, leaf.sequence
                );
                let difference = Kind::RowChanged
                    .found(found)
                    .of_event(&leaf.worker, &leaf.event);
                self.findings.add(difference.at(stream, leaf.sequence));
            }
        }
        Ok(())
    }

    async fn activity(&mut self, checkpoint: u64, leaf: &ActivityLeaf) -> Result<()> {
        let before = Cursor {
            at: leaf.at,
            number: leaf.id - 1,
        };
        let page = self.store().activities_by_age(before, 1).await?;
        let row = page.into_iter().find(|row| row.id == leaf.id);
        self.compare_activity(checkpoint, leaf.id, leaf, row.as_ref());
        Ok(())
    }

    async fn activity_outcome(&mut self, checkpoint: u64, leaf: &Leaf) -> Result<()> {
        let Leaf::ActivityOutcome(leaf) = leaf else {
            return Ok(());
        };
        let before = Cursor {
            at: leaf.at,
            number: leaf.id - 1,
        };
        let page = self.store().activity_outcomes_by_age(before, 1).await?;
        let row = page.into_iter().find(|row| row.id == leaf.id);
        self.compare_activity(checkpoint, leaf.id, leaf, row.as_ref());
        Ok(())
    }

    fn compare_activity<T: PartialEq>(
        &mut self,
        checkpoint: u64,
        id: i64,
        leaf: &T,
        row: Option<&T>,
    ) {
        self.counts.rows += 1;
        let difference = match row {
            Some(row) if row == leaf => return,
            Some(_) => Kind::RowChanged.found(format!(
                "activity {id} is not as in checkpoint {checkpoint}"
            )),
            None => Kind::RowMissing.found(format!(
                "activity {id} of checkpoint {checkpoint} has no row"
            )),
        };
        self.findings.add(difference);
    }

    /// Finds rows that are older than the last reads, and in no checkpoint.
    async fn rows_without_leaf(&mut self, head: &CheckpointHead, since: Timestamp) -> Result<()> {
        if self.identities.len() >= IDENTITIES_MAX {
            self.findings.note(
                "the window has too many leaves to look for rows without a checkpoint".to_owned(),
            );
            return Ok(());
        }
        let mut after = EventCursor::at(since);
        loop {
            let page = self.store().settled_events(&after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = EventCursor {
                at: last.at,
                worker: last.worker.clone(),
                event: last.event.clone(),
            };
            for event in page {
                if event.at < head.from.events {
                    let found = format!("event {} is in no checkpoint", event.event);
                    let (worker, id) = (event.worker.clone(), event.event.clone());
                    self.expect_leaf(&Leaf::Event(event), |kind| {
                        kind.found(found).of_event(&worker, &id)
                    });
                }
            }
            if after.at >= head.from.events {
                break;
            }
        }
        for (in_records, limit) in [(false, PAGE), (true, RECORD_PAGE)] {
            self.outputs_without_leaf(head, since, in_records, limit)
                .await?;
        }
        let mut after = Cursor::at(since);
        loop {
            let page = self.store().activities_by_age(after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Cursor {
                at: last.at,
                number: last.id,
            };
            for activity in page {
                if activity.at < head.from.activities {
                    let found = format!("activity {} is in no checkpoint", activity.id);
                    self.expect_leaf(&Leaf::Activity(activity), |kind| kind.found(found));
                }
            }
        }
        Ok(())
    }

    async fn outputs_without_leaf(
        &mut self,
        head: &CheckpointHead,
        since: Timestamp,
        in_records: bool,
        limit: u32,
    ) -> Result<()> {
        let mut after = Cursor::at(since);
        loop {
            let page = self.store().published_outputs(after, limit, in_records);
            let (page, next) = page.await?;
            for output in page {
                if output.at < head.from.outputs {
                    let found =
                        format!("the place of output {} is in no checkpoint", output.number);
                    let (worker, id) = (output.worker.clone(), output.event.clone());
                    self.expect_leaf(&Leaf::Output(output), |kind| {
                        kind.found(found).of_event(&worker, &id)
                    });
                }
            }
            match next {
                Some(next) if next.at < head.from.outputs => after = next,
                _ => return Ok(()),
            }
        }
    }

    fn expect_leaf(&mut self, leaf: &Leaf, difference: impl FnOnce(Kind) -> super::Difference) {
        if !self.identities.contains(&leaf.identity()) {
            self.findings.add(difference(Kind::RowWithoutCheckpoint));
        }
    }
}
