//! Outputs whose id a stream knows already: published only if the stream holds that very output. Ids are keyed hashes, so
//! another message can stand under one only if it was copied from a stream; that output is published under its next id.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::Semaphore;

use super::outgoing;
use crate::bus::{Answer, Bus, Compared, PublishError};
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Unpublished};

/// How many messages are read for a comparison at a time: their bodies are in memory meanwhile.
pub const COMPARED_AT_A_TIME: usize = 16;

/// Confirms answers that say `duplicate`. Cheap to clone.
#[derive(Clone)]
pub struct Duplicates {
    bus: Bus,
    turns: Arc<Semaphore>,
}

impl Duplicates {
    pub fn new(bus: Bus) -> Self {
        Duplicates { bus, turns: Arc::new(Semaphore::new(COMPARED_AT_A_TIME)) }
    }

    /// The answer to the publication of an output, after a look at the stored message if it says `duplicate`.
    pub async fn confirm(&self, row: &OutboxRow, answer: Answer) -> Answer {
        let Ok(place) = &answer else { return answer };
        if !place.duplicate || fault::mutant(fault::BELIEVE_DUPLICATE) {
            return answer;
        }
        let _turn = self.turns.acquire().await;
        match stands(&self.bus, row, &place.stream, place.sequence).await {
            Ok(true) => answer,
            Ok(false) => Err(PublishError::IdTaken(taken_at(&place.stream, place.sequence))),
            Err(error) => Err(PublishError::NotNow(format!("the stored message could not be read: {error:#}"))),
        }
    }
}

/// Whether an output stands at a place where its id was found. One that is gone from there did: by age, by a limit, by
/// hand, or because it was acknowledged on a queue.
pub async fn stands(bus: &Bus, row: &OutboxRow, stream: &str, sequence: u64) -> Result<bool> {
    Ok(bus.compare(stream, sequence, &outgoing(row)).await? != Compared::Different)
}

/// Why an output needs another id.
pub fn taken_at(stream: &str, sequence: u64) -> String {
    format!("the stream {stream} holds another message under its id, at {sequence}")
}

/// Has an output published under its next id, and reports it.
pub fn under_next_id(row: &OutboxRow, error: String, metrics: &Metrics) -> Unpublished {
    fault::witness(fault::ID_TAKEN);
    metrics.output(&row.worker, OutputOutcome::IdTaken);
    tracing::error!(
        worker = row.worker,
        number = row.seq,
        output_id = row.output_id(),
        error,
        "id taken, publishing under another one"
    );
    Unpublished::IdTaken { taken: row.id.clone(), error }
}
