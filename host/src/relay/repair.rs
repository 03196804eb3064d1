//! Stream repair: publishes outputs again that a stream has lost.
//!
//! JetStream can lose acknowledged messages after a power failure or a restore, and a stream can be
//! deleted and created again. Published outputs are kept for a while for this purpose.
//!
//! A stream loses its tail. The message at the highest sequence that we published shows whether
//! everything before it exists. Removals at its other end are no loss: by age, by a limit, or by a
//! purge. A queue removes messages as they are acknowledged. There, only outputs that were
//! published beyond its end are known to be lost.

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

/// Interval of the regular check. It reads one message of each stream.
const CHECK_INTERVAL: Duration = Duration::from_secs(20);

/// Delay before the next check after a failed one.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// How long a check waits for the recorder, and how often it polls it.
const RECORDER_TIMEOUT: Duration = Duration::from_secs(1);
const RECORDER_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The range of the regular check. Earlier checks have covered older outputs.
const LOOK_BACK: Duration = Duration::from_secs(60);

/// Maximum clock difference between the database and NATS.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// Number of concurrent reads.
const READ_CONCURRENCY: usize = 64;

/// Maximum number of outputs that one statement republishes.
const REPUBLISH_BATCH_MAX: usize = 5_000;

/// Checks the streams of published outputs.
pub struct Repair {
    store: Arc<Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    /// How long published outputs are kept.
    retention: Duration,
    /// Creation time of each checked stream, by name.
    created_at: HashMap<String, Timestamp>,
}

impl Repair {
    pub fn new(
        store: Arc<Store>,
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

    /// Checks at the start, after each new connection, when an ack is suspicious, and at a regular
    /// interval.
    pub async fn run(mut self, mut stopping: Stopping) {
        let mut connections = self.bus.publish_connection();
        let mut look_back = self.retention;
        let mut trouble = LastError::default();
        loop {
            // Let the recorder catch up.
            let is_written = self.wait_for_recorder().await;
            let connection = *connections.borrow_and_update();
            let is_first = self.state.checked_connection() < connection;
            // This check does not cover an output that is recorded later, and newer outputs would
            // precede it.
            let retries_soon = is_first && !is_written;

            // Check the streams.
            let suspects = self.state.suspects();
            let checked = self.check_streams(look_back).await;
            if let Err(error) = &checked {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!(error = why, "stream check failed, retrying");
                }
            } else {
                trouble.clear();
                // The database has no outputs of some suspects, so the check does not visit them.
                suspects
                    .iter()
                    .for_each(|stream| self.state.remove_suspect(stream));
                if !retries_soon {
                    self.state.set_checked_connection(connection);
                }
            }

            // Wait for the next reason to check.
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

    /// Waits until the recorder has written all earlier publishes, because a check covers only
    /// recorded outputs. Returns false after a timeout.
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

    /// Compares the last output that was published to each stream within `look_back` with the
    /// message at its sequence.
    ///
    /// A recreated stream, or one that assigned a sequence twice, is searched completely. There the
    /// last output says nothing about the others.
    ///
    /// # Errors
    /// The last failed check. The other streams are checked all the same.
    async fn check_streams(&mut self, look_back: Duration) -> Result<()> {
        let mut checked = Ok(());
        for last in self
            .store
            .last_published(look_back.min(self.retention))
            .await?
        {
            // A failure on one stream must not prevent the checks of the others.
            if let Err(error) = self.check_stream(&last).await {
                checked = Err(error.context(format!("check the stream {}", last.stream)));
            }
        }
        checked
    }

    /// Checks one stream, and repairs it if it may have lost messages.
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

    /// Publishes all outputs again that a stream has lost.
    async fn repair(&self, stream: &StreamInfo) -> Result<()> {
        let lost = self.find_lost(stream).await?;
        let Some(first) = lost.first() else {
            return Ok(());
        };
        let mut count = 0;
        for chunk in lost.chunks(REPUBLISH_BATCH_MAX) {
            // The stream has lost it, so the result of the recovery is outdated.
            let ids: Vec<&str> = chunk.iter().map(|output| output.id.as_str()).collect();
            self.store.delete_recovered(&ids).await?;
            count += self.store.republish(chunk).await?;
            fault::point(fault::REPUBLISH);
        }
        // A count of zero means that another host was faster.
        if count > 0 {
            self.state.on_loss();
            self.state.record_repair(&stream.name, count);
            self.metrics.regression(&stream.name, count);
            tracing::error!(
                stream = stream.name,
                last_sequence = stream.last_sequence,
                sequence = first.stream_sequence,
                count,
                "stream lost acknowledged messages, republishing outputs"
            );
        }
        Ok(())
    }

    /// The outputs that were published to a stream and lost there, in the order of their
    /// publication.
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

/// Whether an output is lost: its sequence holds a different message, or none although it was not
/// removed by age, by a limit, or by an operator.
pub async fn is_lost(bus: &Bus, stream: &StreamInfo, output: &PublishedOutput) -> Result<bool> {
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
