//! Issuing the receipt of an event.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::leaves_of;
use crate::model::hint::WithHint as _;
use crate::model::receipt::merkle::{self, Hash};
use crate::model::receipt::{BLOCK, EventLeaf, Leaf, Proof, Receipt, hash_of};
use crate::model::schema::Time;
use crate::services::Services;
use crate::store::{BlockFilter, CheckpointBlock, NO_LAST, Store};

/// The blocks that are read at once.
const BLOCK_PAGE: u32 = 4;

/// The most blocks that are searched for the publications of an event's outputs.
const SEARCHED_MAX: usize = 1_000;

/// How much later than its row an event may be in a checkpoint.
const LATE_MAX: SignedDuration = SignedDuration::from_mins(20);

/// The receipt of an event, or the time of the checkpoint that will contain it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Issued {
    pub worker: String,
    #[schemars(with = "Time")]
    pub settled_at: Timestamp,
    /// `None` while no checkpoint contains the event.
    pub receipt: Option<Receipt>,
    /// When the next checkpoint is due, without a receipt.
    #[schemars(with = "Option<Time>")]
    pub due_at: Option<Timestamp>,
}

/// Makes the receipt of an event. `None` if the event is not settled.
///
/// # Errors
/// No checkpoint contains the event or ever will, or its row is not as it was in the checkpoint.
pub async fn issue(
    services: &Services,
    worker: &str,
    event: &str,
    interval: Duration,
) -> Result<Option<Issued>> {
    let store = services.store.as_ref();
    let rows = store.settled_rows(worker, &[event]).await?;
    let Some(row) = rows.into_iter().next().map(|row| row.leaf) else {
        return Ok(None);
    };
    let issued = Issued {
        worker: worker.to_owned(),
        settled_at: row.at,
        receipt: None,
        due_at: None,
    };
    let Some(found) = find_event(store, &row).await? else {
        let due_at = due_at(store, &row, interval).await?;
        return Ok(Some(Issued {
            due_at: Some(due_at),
            ..issued
        }));
    };
    let leaf = Leaf::from_value(&found.leaf)?;
    let Leaf::Event(leaf) = leaf else {
        return Ok(None);
    };
    let recorded = EventLeaf {
        outputs: None,
        ..leaf.clone()
    };
    ensure!(
        recorded == row,
        "the row of event {event} is not as it was in checkpoint {}",
        found.checkpoint
    );
    let outputs = find_outputs(store, &leaf, found.checkpoint).await?;

    // The checkpoints from the first to the last one.
    let proofs = || outputs.iter().chain(std::iter::once(&found));
    let numbers = || proofs().map(|proof| proof.checkpoint);
    let (first, last) = (
        numbers().min().unwrap_or_default(),
        numbers().max().unwrap_or_default(),
    );
    let count = u32::try_from(last - first + 1).context("count the checkpoints")?;
    let checkpoints = store.checkpoints(first, count).await?;
    Ok(Some(Issued {
        receipt: Some(Receipt::new(found, outputs, checkpoints)),
        ..issued
    }))
}

/// When the next checkpoint is due that contains an event.
///
/// # Errors
/// None will.
async fn due_at(store: &Store, row: &EventLeaf, interval: Duration) -> Result<Timestamp> {
    let head = store.checkpoint_head().await?;
    let head = head
        .context("no checkpoint exists: receipts were never turned on")
        .hint("set receipts = \"1m\" for all hosts; receipts exist for events from then on")?;
    if row.at < head.from.events {
        let why = "the event is in no checkpoint: it was settled before receipts were turned on, or \
                   its leaf is older than `keep_receipts`";
        return Err(anyhow::anyhow!(why)).hint("oncely audit");
    }
    let interval = SignedDuration::try_from(interval).unwrap_or_default();
    Ok(head.checked_at + interval)
}

/// The leaf of an event, with its proof.
async fn find_event(store: &Store, row: &EventLeaf) -> Result<Option<Proof>> {
    let Some(first) = store.checkpoint_since(row.at).await? else {
        return Ok(None);
    };
    let last = store.checkpoint_since(row.at + LATE_MAX).await?;
    let mut select = BlockFilter {
        since: row.at,
        until: row.at,
        ..BlockFilter::of_checkpoints(first, last.unwrap_or(NO_LAST))
    };
    loop {
        let page = store.checkpoint_blocks(&select, BLOCK_PAGE).await?;
        let Some(after) = page.last() else {
            return Ok(None);
        };
        select = select.after(after);
        for block in &page {
            let leaves = leaves_of(store.output_ids(), block)?;
            let is_meant = |leaf: &&Value| {
                leaf["kind"] == "event"
                    && leaf["event"] == *row.event
                    && leaf["worker"] == *row.worker
            };
            let is_at = |leaf: &Value| Leaf::from_value(leaf).is_ok_and(|leaf| leaf.at() == row.at);
            let index = leaves
                .iter()
                .position(|leaf| is_meant(&leaf) && is_at(leaf));
            if let Some(index) = index {
                return prove(store, block, &leaves, index).await.map(Some);
            }
        }
    }
}

/// The publications of an event's outputs, with their proofs, in the order of the outputs. The
/// publications that no checkpoint contains are left out.
async fn find_outputs(store: &Store, event: &EventLeaf, checkpoint: u64) -> Result<Vec<Proof>> {
    let mut wanted: Vec<i64> = event
        .outputs
        .iter()
        .flatten()
        .map(|one| one.number)
        .collect();
    let mut found: BTreeMap<i64, Proof> = BTreeMap::new();

    // An output may be in the checkpoint before that of its event, which was read earlier.
    let first = checkpoint.saturating_sub(1);
    let mut select = BlockFilter {
        since: event.at,
        ..BlockFilter::of_checkpoints(first, NO_LAST)
    };
    let mut searched = 0;
    while !wanted.is_empty() && searched < SEARCHED_MAX {
        let page = store.checkpoint_blocks(&select, BLOCK_PAGE).await?;
        let Some(after) = page.last() else { break };
        select = select.after(after);
        searched += page.len();
        for block in &page {
            let leaves = leaves_of(store.output_ids(), block)?;
            for (index, leaf) in leaves.iter().enumerate() {
                let number = leaf["number"].as_i64().unwrap_or_default();
                let is_meant = leaf["kind"] == "output"
                    && wanted.contains(&number)
                    && leaf["event"] == *event.event;
                if is_meant {
                    wanted.retain(|one| *one != number);
                    found.insert(number, prove(store, block, &leaves, index).await?);
                }
            }
        }
    }
    Ok(found.into_values().collect())
}

/// The proof of a leaf of a block.
async fn prove(
    store: &Store,
    block: &CheckpointBlock,
    leaves: &[Value],
    index: usize,
) -> Result<Proof> {
    let hashes: Vec<Hash> = leaves.iter().map(hash_of).collect();
    let roots = store.checkpoint_roots(block.checkpoint).await?;
    let at = usize::try_from(block.block).context("count the blocks")?;
    let mut path = merkle::path(&hashes, index);
    path.extend(merkle::path(&roots, at));
    Ok(Proof {
        leaf: leaves.get(index).cloned().unwrap_or_default(),
        checkpoint: block.checkpoint,
        index: (at * BLOCK + index) as u64,
        path: path.iter().map(hex::encode).collect(),
    })
}
