//! Repairs what a stream has lost: JetStream may forget what it acknowledged when the power goes or a store is restored,
//! and a stream may be deleted and made again. Published outputs are kept for a while for this.
//!
//! A stream loses its tail: what stands at the highest sequence we published tells whether everything before it is
//! there. What moves at its other end (age, limits, a purge) is no loss. Of a queue, from which messages go away as they are
//! acknowledged, only what was published beyond its end is known to be lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use jiff::{SignedDuration, Timestamp};

use super::state::RelayState;
use crate::bus::{Bus, StreamInfo};
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::Metrics;
use crate::model::retry::LastError;
use crate::store::{PublishedOutput, Store};

/// How often the streams are looked at without a reason. Each look is one message read for each stream.
const CHECK_INTERVAL: Duration = Duration::from_secs(20);

/// How soon it looks again when it could not.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// How long a look waits for the relay's records, and how often it asks for them.
const RECORDER_TIMEOUT: Duration = Duration::from_secs(1);
const RECORDER_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What was published so long before a look without a reason was seen by an earlier one.
const LOOK_BACK: Duration = Duration::from_secs(60);

/// How far the clocks of the database and the broker may be apart.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// How many messages are read at a time.
const READ_CONCURRENCY: usize = 64;

/// How many outputs are taken back at a time.
const REPUBLISH_BATCH_MAX: usize = 5_000;

/// Looks after the streams that outputs went to.
pub struct Repair {
    store: Arc<dyn Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    /// For how long published outputs are kept.
    retention: Duration,
    /// When each stream was made, as far as it was looked at.
    created_at: HashMap<String, Timestamp>,
}

impl Repair {
    pub fn new(
        store: Arc<dyn Store>,
        bus: Bus,
        metrics: Arc<Metrics>,
        state: Arc<RelayState>,
        retention: Duration,
    ) -> Self {
        Repair {
            store,
            bus,
            metrics,
            state,
            retention,
            created_at: HashMap::new(),
        }
    }

    /// Looks at the start, after each new connection, when an answer is suspicious, and every now and then.
    pub async fn run(mut self, mut stopping: Stopping) {
        let mut connections = self.bus.publish_connection();
        let mut look_back = self.retention;
        let mut trouble = LastError::default();
        loop {
            let is_written = self.wait_for_recorder().await;
            let connection = *connections.borrow_and_update();
            let is_first = self.state.checked_connection() < connection;
            // What is written down only now would not be missed, and what comes after it would go first.
            let retries_soon = is_first && !is_written;
            let suspects = self.state.suspects();
            let checked = self.check_streams(look_back).await;
            if let Err(error) = &checked {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!("looking for what streams have lost again soon: {why}");
                }
            } else {
                trouble.clear();
                // Of some of them the database knows nothing.
                suspects
                    .iter()
                    .for_each(|stream| self.state.remove_suspect(stream));
                if !retries_soon {
                    self.state.set_checked_connection(connection);
                }
            }
            tokio::select! {
                biased;
                () = stopping.stopped() => return,
                Ok(()) = connections.changed() => look_back = self.retention,
                () = self.state.suspect_added.notified() => look_back = self.retention,
                () = tokio::time::sleep(RETRY_DELAY), if checked.is_err() || retries_soon => {}
                () = tokio::time::sleep(CHECK_INTERVAL), if checked.is_ok() && !retries_soon => look_back = LOOK_BACK,
            }
        }
    }

    /// Lets the relay write down what was published before: what the database does not know of, nobody would miss. False when
    /// that takes too long.
    async fn wait_for_recorder(&self) -> bool {
        let written = async {
            while self.state.is_writing() {
                tokio::time::sleep(RECORDER_POLL_INTERVAL).await;
            }
        };
        tokio::time::timeout(RECORDER_TIMEOUT, written)
            .await
            .is_ok()
    }

    /// Compares the last output published to each stream within some time with what stands there. A stream that was made
    /// anew, or that gave a sequence twice, is looked through: there what was published last says nothing of the rest.
    async fn check_streams(&mut self, look_back: Duration) -> Result<()> {
        let mut checked = Ok(());
        for last in self
            .store
            .last_published(look_back.min(self.retention))
            .await?
        {
            // Trouble with one stream is no reason not to look at the others.
            if let Err(error) = self.check_stream(&last).await {
                checked = Err(error.context(format!("look at the stream {}", last.stream)));
            }
        }
        checked
    }

    async fn check_stream(&mut self, last: &PublishedOutput) -> Result<()> {
        let Some(stream) = self.bus.stream(&last.stream).await? else {
            return Ok(());
        };
        let is_known = self.created_at.get(&stream.name) == Some(&stream.created);
        if !is_known
            || self.state.is_suspect(&stream.name)
            || is_lost(&self.bus, &stream, last).await?
        {
            self.repair(&stream).await?;
            self.created_at.insert(stream.name, stream.created);
        }
        Ok(())
    }

    /// Has everything published again that a stream has lost.
    async fn repair(&self, stream: &StreamInfo) -> Result<()> {
        let lost = self.find_lost(stream).await?;
        let Some(first) = lost.first() else {
            return Ok(());
        };
        let mut count = 0;
        for chunk in lost.chunks(REPUBLISH_BATCH_MAX) {
            // It is not where a recovery found it.
            let ids: Vec<&str> = chunk.iter().map(|output| output.id.as_str()).collect();
            self.store.delete_recovered(&ids).await?;
            count += self.store.republish(chunk).await?;
            fault::point(fault::REPUBLISH);
        }
        // Else another host was faster.
        if count > 0 {
            self.state.on_loss();
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

    /// What was published to a stream and was lost there, in the order of its publication.
    async fn find_lost(&self, stream: &StreamInfo) -> Result<Vec<PublishedOutput>> {
        let published = self.store.published_to(&stream.name).await?;
        if stream.is_queue {
            let is_beyond = |output: &PublishedOutput| {
                output.stream_sequence > stream.last_sequence
                    || stream.created > output.published_at
            };
            return Ok(published.into_iter().filter(is_beyond).collect());
        }
        let Some(since) = published.iter().map(|output| output.published_at).min() else {
            return Ok(Vec::new());
        };
        let ids = published.iter().map(|output| output.id.clone()).collect();
        let found = self
            .bus
            .find_published(&stream.name, &[], since - CLOCK_SKEW_MAX, &ids)
            .await?;
        let missing = published
            .into_iter()
            .filter(|output| !found.contains_key(&output.id));
        let judged = futures::stream::iter(missing).map(|output| {
            let (bus, stream) = (self.bus.clone(), stream.clone());
            async move {
                is_lost(&bus, &stream, &output)
                    .await
                    .map(|is_lost| is_lost.then_some(output))
            }
        });
        let lost: Vec<Option<PublishedOutput>> =
            judged.buffered(READ_CONCURRENCY).try_collect().await?;
        Ok(lost.into_iter().flatten().collect())
    }
}

/// Whether an output neither stands where it was published nor left from there in a way that is no loss: by age, by a
/// limit, by hand.
async fn is_lost(bus: &Bus, stream: &StreamInfo, output: &PublishedOutput) -> Result<bool> {
    if output.stream_sequence > stream.last_sequence {
        return Ok(true);
    }
    if stream.is_queue {
        return Ok(stream.created > output.published_at);
    }
    Ok(
        match bus
            .message_id_at(&stream.name, output.stream_sequence)
            .await?
        {
            Some(id) => id != output.id,
            None => stream.created > output.published_at,
        },
    )
}
