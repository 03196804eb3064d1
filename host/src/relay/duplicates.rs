//! Outputs whose id a stream knows already: published only if the stream holds that very output. Ids are keyed hashes, so
//! another message can stand under one only if it was copied from a stream; that output is published under its next id.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::Semaphore;

use super::outgoing;
use crate::bus::{Bus, MessageComparison, PublishError, PublishResult};
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Unpublished};

/// How many messages are read for a comparison at a time: their bodies are in memory meanwhile.
pub const COMPARE_CONCURRENCY: usize = 16;

/// Confirms answers that say `duplicate`. Cheap to clone.
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

    /// The answer to the publication of an output, after a look at the stored message if it says `duplicate`.
    pub async fn confirm(&self, row: &OutboxRow, answer: PublishResult) -> PublishResult {
        let Ok(place) = &answer else { return answer };
        if !place.duplicate {
            return answer;
        }
        let _permit = self.permits.acquire().await;
        match is_stored(&self.bus, row, &place.stream, place.sequence).await {
            Ok(true) => answer,
            Ok(false) => Err(PublishError::IdTaken(id_taken_message(
                &place.stream,
                place.sequence,
            ))),
            Err(error) => Err(PublishError::RetryLater(format!(
                "the stored message could not be read: {error:#}"
            ))),
        }
    }
}

/// Whether an output stands at a place where its id was found. One that is gone from there did: by age, by a limit, by
/// hand, or because it was acknowledged on a queue.
pub async fn is_stored(bus: &Bus, row: &OutboxRow, stream: &str, sequence: u64) -> Result<bool> {
    Ok(bus.compare(stream, sequence, &outgoing(row)).await? != MessageComparison::Different)
}

/// Why an output needs another id.
pub fn id_taken_message(stream: &str, sequence: u64) -> String {
    format!("the stream {stream} holds another message under its id, at {sequence}")
}

/// Has an output published under its next id, and reports it.
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
