//! Repairs what a stream has lost: JetStream may forget what it acknowledged when the power goes or a store is restored,
//! and a stream may be deleted and made again. Published outputs are kept for a while for this.
//!
//! A stream loses its tail: what stands at the highest sequence we published tells whether everything before it is
//! there. What moves at its other end (age, limits, a purge) is no loss.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;

use super::RelayState;
use crate::bus::{Bus, StreamInfo};
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::Metrics;
use crate::store::{LastPublished, Store};

/// How often the streams are looked at without a reason. Each look is one message read for each stream.
const LOOK_EVERY: Duration = Duration::from_secs(20);

/// What was published so long before a look without a reason was seen by an earlier one.
const LOOK_BACK: Duration = Duration::from_secs(60);

/// Looks after the streams that outputs went to.
pub struct Repair {
    store: Arc<dyn Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    /// For how long published outputs are kept.
    keep: Duration,
}

impl Repair {
    pub fn new(store: Arc<dyn Store>, bus: Bus, metrics: Arc<Metrics>, state: Arc<RelayState>, keep: Duration) -> Self {
        Repair { store, bus, metrics, state, keep }
    }

    /// Looks at the start, after each new connection, when an answer is suspicious, and every now and then.
    pub async fn run(self, mut stopping: Stopping) {
        let mut connections = self.bus.connections();
        let mut back = self.keep;
        loop {
            if let Err(error) = self.look(back).await {
                tracing::debug!("looking at the streams again soon: {error:#}");
            }
            tokio::select! {
                biased;
                () = stopping.stopped() => return,
                Ok(()) = connections.changed() => back = self.keep,
                () = self.state.suspicion.notified() => back = self.keep,
                () = tokio::time::sleep(LOOK_EVERY) => back = LOOK_BACK,
            }
        }
    }

    /// Compares the last output published to each stream within some time with what stands there.
    async fn look(&self, back: Duration) -> Result<()> {
        for last in self.store.last_published(back.min(self.keep)).await? {
            let Some(stream) = self.bus.stream(&last.stream).await? else { continue };
            if !self.is_there(&stream, &last).await? {
                self.repair(&stream).await?;
            }
        }
        Ok(())
    }

    /// Has everything published again from the first output on that is not there.
    async fn repair(&self, stream: &StreamInfo) -> Result<()> {
        let published = self.store.published_on(&stream.name).await?;
        let mut there = 0;
        let mut lost = published.len();
        while there < lost {
            let middle = usize::midpoint(there, lost);
            match published.get(middle) {
                Some(output) if self.is_there(stream, output).await? => there = middle + 1,
                _ => lost = middle,
            }
        }
        let Some(first) = published.get(lost) else { return Ok(()) };
        let count = self.store.publish_again(&stream.name, first.stream_sequence).await?;
        fault::point(fault::PUBLISH_AGAIN);
        if count > 0 {
            self.state.losses.fetch_add(1, Ordering::Relaxed);
            self.metrics.regression(&stream.name, count);
            tracing::error!(
                stream = stream.name,
                "the stream has lost what it had stored: it ends at {} and does not hold what we published at {}; \
                 publishing {count} outputs again",
                stream.last_sequence,
                first.stream_sequence
            );
        }
        Ok(())
    }

    /// Whether an output stands where it was published, or left from there by a way that is no loss.
    async fn is_there(&self, stream: &StreamInfo, output: &LastPublished) -> Result<bool> {
        Ok(match self.bus.message_id_at(&stream.name, output.stream_sequence).await? {
            Some(id) => id == output.id,
            // Removed by age, by a limit or by hand; but not if the stream is another one than then.
            None => output.stream_sequence <= stream.last_sequence && stream.created <= output.published_at,
        })
    }
}
