//! Receipts: checkpoints over settled rows, and the proof of one event for a customer.
//!
//! No transaction of a delivery takes part. One host at a time reads the rows that were settled
//! since the last checkpoint, and closes the next one.

use anyhow::Result;
use serde_json::Value;

use crate::model::output_ids::OutputIds;
use crate::model::receipt::{block, salted};
use crate::store::CheckpointBlock;

mod close;
mod collect;
mod issue;

pub use close::{Closing, close_due};
pub use issue::{Issued, issue};

/// The leaves of a block, with their salts.
fn leaves_of(ids: &OutputIds, block: &CheckpointBlock) -> Result<Vec<Value>> {
    let texts = block::decompress(&block.leaves)?;
    let leaf = |text: String| {
        let salt = ids.receipt_salt(&text);
        salted(&text, salt)
    };
    texts.into_iter().map(leaf).collect()
}
