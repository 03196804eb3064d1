//! The published checkpoints of receipts.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::Bus;
use crate::model::receipt::{CHECKPOINT_STREAM, Checkpoint};

impl Bus {
    /// The last message under the subject of an installation's checkpoints: its sequence and its
    /// body. `None` if there is none, or no stream.
    pub async fn last_checkpoint(&self, installation: &str) -> Result<Option<(u64, Vec<u8>)>> {
        let subject = Checkpoint::subject(installation);
        self.checkpoint_message(json!({ "last_by_subj": subject }))
            .await
    }

    /// The first message of an installation's checkpoints at a sequence or later.
    pub async fn next_checkpoint(
        &self,
        installation: &str,
        from: u64,
    ) -> Result<Option<(u64, Vec<u8>)>> {
        let subject = Checkpoint::subject(installation);
        self.checkpoint_message(json!({ "seq": from.max(1), "next_by_subj": subject }))
            .await
    }

    async fn checkpoint_message(&self, query: serde_json::Value) -> Result<Option<(u64, Vec<u8>)>> {
        if self.stream(CHECKPOINT_STREAM).await?.is_none() {
            return Ok(None);
        }
        let raw = self
            .get_raw_message(CHECKPOINT_STREAM, query)
            .await
            .context("read a published checkpoint")?;
        let Some(raw) = raw else { return Ok(None) };
        let body = STANDARD
            .decode(&raw.data)
            .context("decode a published checkpoint")?;
        Ok(Some((raw.seq, body)))
    }
}
