//! Confirms duplicates: outputs whose id a stream already has count as published only if the stream
//! holds the same output.
//!
//! Ids are keyed hashes. A different message has the same id only if it was copied from a stream.
//! The output is then published under its next id.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::Semaphore;

use super::outgoing;
use crate::bus::{Bus, MessageComparison, PublishError, PublishResult};
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Unpublished};

/// Maximum number of messages that are compared at the same time. Their bodies are in memory
/// meanwhile.
pub const COMPARE_CONCURRENCY: usize = 16;

/// Confirms acks that report a duplicate. Cheap to clone.
#[derive(Clone)]
pub struct Duplicates {
    bus: Bus,
    permits: Arc<Semaphore>,
}

impl Duplicates {
    pub fn new(bus: Bus) -> Self {
        Duplicates {
            bus,
            permits: Arc::new(Semaphore::new(COMPARE_CONCURRENCY)),
        }
    }

    /// The result of publishing an output. If the ack reports a duplicate, the stored message is
    /// compared with the output.
    ///
    /// # Errors
    /// - [`PublishError::IdTaken`] if the stream holds a different message.
    /// - [`PublishError::RetryLater`] if the stored message cannot be read.
    /// - The error of the publication itself.
    pub async fn confirm(&self, row: &OutboxRow, result: PublishResult) -> PublishResult {
        let Ok(ack) = &result else { return result };
        if !ack.duplicate {
            return result;
        }
        let _permit = self.permits.acquire().await;
        match is_stored(&self.bus, row, &ack.stream, ack.sequence).await {
            Ok(true) => result,
            Ok(false) => Err(PublishError::IdTaken(id_taken_message(
                &ack.stream,
                ack.sequence,
            ))),
            Err(error) => Err(PublishError::RetryLater(format!(
                "failed to read the stored message: {error:#}"
            ))),
        }
    }
}

/// Whether a stream holds an output at the position of its id. A message that is no longer there
/// counts as stored. It was removed by age, by a limit, by an operator, or by its ack on a queue.
///
/// # Errors
/// The stream cannot be read.
pub async fn is_stored(bus: &Bus, row: &OutboxRow, stream: &str, sequence: u64) -> Result<bool> {
    Ok(bus.compare(stream, sequence, &outgoing(row)).await? != MessageComparison::Different)
}

/// The reason why an output needs another id.
pub fn id_taken_message(stream: &str, sequence: u64) -> String {
    format!(
        "the stream {stream} holds a different message under the id of this output, at sequence \
         {sequence}"
    )
}

/// Logs a taken id, and returns the outcome that publishes the output under its next id.
pub fn retry_with_next_id(row: &OutboxRow, error: String, metrics: &Metrics) -> Unpublished {
    fault::witness(fault::ID_TAKEN);
    metrics.output(&row.worker, OutputOutcome::IdTaken);
    tracing::error!(
        worker = row.worker,
        number = row.seq,
        output_id = row.output_id(),
        error,
        "id taken, publishing under another one"
    );
    Unpublished::IdTaken {
        taken: row.id.clone(),
        error,
    }
}
