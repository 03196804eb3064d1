//! Closing checkpoints: one host at a time, in one transaction each.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::collect::{Collected, collect};
use crate::model::receipt::Checkpoint;
use crate::model::sql::Dialect;
use crate::services::Services;
use crate::store::{CheckpointHead, Store};

/// The most rows of each kind in a checkpoint. It bounds memory, and the transaction that writes
/// the checkpoint. SQLite has one writer, which others wait for.
const LIMIT: usize = 100_000;
const LIMIT_ON_SQLITE: usize = 20_000;

/// How long a host may take for a checkpoint before another one begins it, too. Only the first of
/// them closes it.
const LEASE: Duration = Duration::from_secs(30);

/// How long to wait for the relay to accept the message of a checkpoint.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// Blocks that are deleted at a time, and the most times in a row.
const DELETE_BATCH: u32 = 100;
const DELETE_BATCHES: u32 = 50;

/// The settings of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closing {
    /// The time between two checkpoints.
    pub interval: Duration,
    /// How long leaves are kept.
    pub keep: Duration,
    /// How long published outputs are kept.
    pub keep_outputs: Duration,
}

/// Closes checkpoints until no new rows are left, if it is time and no other host does.
///
/// # Errors
/// The database failed. The next call continues where this one ended.
pub async fn close_due(services: &Services, closing: &Closing) -> Result<()> {
    let store = services.store.as_ref();
    let mut has_closed = false;
    let mut interval = closing.interval;
    while let Some(head) = store.lease_checkpoint(interval, LEASE).await? {
        let since = Instant::now();
        let limit = match store.dialect() {
            Dialect::Postgres => LIMIT,
            Dialect::Sqlite => LIMIT_ON_SQLITE,
        };
        let collected = collect(store, &head, limit, closing)
            .await
            .context("collect the rows of a checkpoint")?;
        let is_complete = collected.is_complete;
        if collected.leaves == 0 {
            store.skip_checkpoint(&head, collected.next).await?;
        } else {
            has_closed |= close(services, &head, collected, since).await?;
        }
        if is_complete {
            break;
        }
        interval = Duration::ZERO;
    }
    if has_closed {
        delete_old(store, closing.keep).await?;
    }
    Ok(())
}

/// Closes one checkpoint, and hands its message to the relay. Returns whether it did: another host
/// may have been faster.
async fn close(
    services: &Services,
    head: &CheckpointHead,
    collected: Collected,
    since: Instant,
) -> Result<bool> {
    let Collected {
        blocks,
        leaves,
        root,
        next,
        ..
    } = collected;
    let store = &services.store;
    let closed_at = store.checkpoint_start().await?.at;
    let previous = head.hash.clone().map(|hash| (head.number, hash));
    let checkpoint = Checkpoint::new(store.installation(), previous, closed_at, leaves, &root);
    let written = Instant::now();
    let rows = store
        .close_checkpoint(head.number, &checkpoint, &blocks, next)
        .await?;
    let Some(rows) = rows else { return Ok(false) };
    let bytes: usize = blocks.iter().map(|block| block.leaves.len()).sum();
    tracing::debug!(
        number = checkpoint.number,
        leaves,
        bytes,
        read_ms = u64::try_from((written - since).as_millis()).unwrap_or(u64::MAX),
        write_ms = u64::try_from(written.elapsed().as_millis()).unwrap_or(u64::MAX),
        "checkpoint closed"
    );
    // The poller publishes the message if the relay is busy.
    let handed_over = services.publish_outputs(rows, Instant::now());
    let _ = tokio::time::timeout(HAND_OVER_TIMEOUT, handed_over).await;
    Ok(true)
}

async fn delete_old(store: &Store, keep: Duration) -> Result<()> {
    for _ in 0..DELETE_BATCHES {
        if store.delete_checkpoint_blocks(keep, DELETE_BATCH).await? < u64::from(DELETE_BATCH) {
            break;
        }
    }
    Ok(())
}
