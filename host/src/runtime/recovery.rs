//! Recovery after a restore.
//!
//! Acknowledged messages that the database does not have are redelivered. Outputs that are on
//! streams already are not published again.
//!
//! Each step can be repeated. The last one writes a new watermark. Until then all hosts are held,
//! and an interrupted recovery is started again.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Host;
use super::consistency::{CHECK_INTERVAL, Hold, outputs_since};
use crate::bus::{ScannedMessage, StartPosition, StreamInfo, WATERMARK_STREAM};
use crate::config::manifest::Worker;
use crate::consumer;
use crate::model::alarm::ALARM_STREAM;
use crate::model::hint::WithHint;
use crate::model::invalidation::CACHE_STREAM;
use crate::model::message::header;
use crate::model::output_ids::OUTPUT_ID_HEADER;
use crate::model::redrive::REDRIVE_STREAM;
use crate::model::schema::Time;
use crate::store::{
    Attribution, BrokerState, DeadLetterFilter, DeadLetterState, RecoveredOutput, Redrive,
    all_dead_letters,
};

/// Time after which every other host is held, too.
const PROPAGATION_DELAY: Duration = CHECK_INTERVAL.saturating_mul(3);

/// Maximum number of messages of a stream that are scanned, and of outputs that are saved, at once.
const PAGE_SIZE: usize = 5_000;

/// Maximum number of tries to write the new watermark. Another host may write one at the same time.
const WATERMARK_TRIES_MAX: u32 = 5;

/// The steps of a recovery, executed or planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Recovery {
    /// The reasons for the recovery; empty when there is nothing to recover.
    pub reasons: Vec<String>,
    /// When the database and NATS last agreed, according to the database.
    #[schemars(with = "Option<Time>")]
    pub agreed_at: Option<Timestamp>,
    pub consumers: Vec<ConsumerRewind>,
    pub streams: Vec<StreamScan>,
    /// Redriven dead letters that are sent to their workers again.
    pub dead_letters: u64,
    /// Whether it was executed, not only planned.
    pub done: bool,
}

/// The position of a worker on its stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsumerRewind {
    pub worker: String,
    pub stream: String,
    /// Everything up to here was acknowledged.
    pub acknowledged: u64,
    /// Messages are redelivered from here on; those that took effect are skipped. None where
    /// redelivery is impossible.
    pub from: Option<u64>,
    /// The end of the stream.
    pub last: u64,
    /// For people: the reason that messages are lost.
    pub note: Option<String>,
}

/// A stream of outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamScan {
    pub stream: String,
    /// The number of outputs stored since shortly before the database and NATS last agreed.
    pub outputs: u64,
    /// For people: the reason that it was not scanned.
    pub note: Option<String>,
}

impl Host {
    /// Brings the database and NATS back into agreement after one of them was restored. With
    /// `dry_run`, only plans it.
    ///
    /// # Errors
    /// Another installation has taken over, or a step failed; then the recovery can be started
    /// again.
    pub async fn recover(&self, dry_run: bool, by: &Attribution) -> Result<Recovery> {
        let _guard = self.recovering.lock().await;

        // Compare the database and NATS.
        let comparison = self
            .compare()
            .await
            .context("compare the database and NATS")?;
        let reasons = match comparison.hold.clone() {
            None => Vec::new(),
            Some(Hold::Restored(why)) => why,
            Some(Hold::TakenOver(other)) => {
                let hint = format!(
                    "return it to this installation with: oncely run --take-over {}",
                    other.owner_id
                );
                return Err(anyhow!("{other}")).hint(hint);
            }
        };
        let agreed = comparison
            .watermarks
            .last
            .as_ref()
            .map(|watermark| (watermark.written_at, watermark.seen.clone()));
        let (agreed_at, before) = agreed.map_or((None, BrokerState::default()), |(at, seen)| {
            (Some(at), seen)
        });
        let mut recovery = Recovery {
            reasons,
            agreed_at,
            consumers: Vec::new(),
            streams: Vec::new(),
            dead_letters: 0,
            done: false,
        };
        if recovery.reasons.is_empty() {
            return Ok(recovery);
        }

        // Hold all hosts: the others notice the disagreement themselves.
        if !dry_run {
            self.set_hold(comparison.hold).await;
            tracing::warn!(reasons = recovery.reasons.join("; "), "recovering");
            tokio::time::sleep(PROPAGATION_DELAY).await;
        }

        // Plan the positions, the dead letters and the streams.
        let workers = self.services.deployed_workers().await?;
        for worker in &workers {
            recovery
                .consumers
                .extend(self.plan_rewind(worker, &before).await?);
        }
        let redriven = self.redriven_dead_letters().await?;
        recovery.dead_letters = redriven.len() as u64;
        let since = agreed_at.map_or(Timestamp::UNIX_EPOCH, outputs_since);
        let streams = self.services.bus.streams(Duration::ZERO).await?;
        for stream in streams.iter().filter(|stream| may_hold_outputs(stream)) {
            recovery
                .streams
                .push(self.scan_stream(stream, since, dry_run).await?);
        }
        if dry_run {
            return Ok(recovery);
        }

        // Execute the plan.
        self.services.relay_state.set_check_recovered(true);
        for rewind in &recovery.consumers {
            let worker = workers.iter().find(|worker| worker.name == rewind.worker);
            if let (Some(worker), Some(from)) = (worker, rewind.from) {
                self.services
                    .bus
                    .rewind(&consumer::subscription(worker, &rewind.stream), from)
                    .await?;
            }
        }
        self.remove_unused_consumers(&workers, &streams).await?;
        if !redriven.is_empty() {
            // The messages of redriven dead letters wait in the outbox like all others.
            self.services
                .store
                .redrive(&redriven, by)
                .await
                .context("redrive dead letters again")?;
        }

        // Resume.
        self.write_final_watermark(&workers).await?;
        self.set_hold(None).await;
        recovery.done = true;
        Ok(recovery)
    }

    /// Plans the position from which a worker receives its messages again.
    async fn plan_rewind(
        &self,
        worker: &Worker,
        before: &BrokerState,
    ) -> Result<Option<ConsumerRewind>> {
        let Some(name) = &worker.stream else {
            return Ok(None);
        };
        let probe = self
            .services
            .bus
            .probe(name, &worker.subjects, &worker.durable());
        let mut rewind = ConsumerRewind {
            worker: worker.name.clone(),
            stream: name.clone(),
            acknowledged: probe
                .ack_floor()
                .await?
                .map_or(0, |acknowledged| acknowledged.sequence),
            from: None,
            last: 0,
            note: None,
        };
        let Some(stream) = self.services.bus.stream(name).await? else {
            rewind.note = Some("the stream does not exist any more".to_owned());
            return Ok(Some(rewind));
        };
        rewind.last = stream.last_sequence;
        if stream.is_queue {
            // Messages still on it were never acknowledged. A stream with interest retention would
            // lose them without its consumer.
            let note = "this stream deletes acknowledged messages: \
                        those that the database does not have are lost";
            rewind.note = Some(note.to_owned());
            return Ok(Some(rewind));
        }

        // The position is valid only on the same stream.
        let is_unchanged = match before.streams.get(name) {
            Some(end)
                if end.created != stream.created || end.last_sequence > stream.last_sequence =>
            {
                false
            }
            Some(end) => {
                let found = self.services.bus.stored_at(name, end.last_sequence).await?;
                end.stored_at.is_none() || found.is_none() || found == end.stored_at
            }
            None => false,
        };
        let floor = before
            .consumers
            .get(&worker.name)
            .filter(|floor| floor.stream == *name && is_unchanged);
        // Messages below were in the inbox before the watermark recorded their acks.
        let from = floor.map_or(1, |floor| floor.sequence.min(rewind.acknowledged) + 1);
        rewind.from = Some(from.max(stream.first_sequence).max(1));
        Ok(Some(rewind))
    }

    /// Removes the consumers of workers that are not deployed in this database.
    ///
    /// If such a worker is deployed later, its messages are redelivered from the beginning. The
    /// acknowledgements from after the restore point are unknown here.
    async fn remove_unused_consumers(
        &self,
        workers: &[Worker],
        streams: &[StreamInfo],
    ) -> Result<()> {
        for stream in streams.iter().filter(|stream| !stream.is_queue) {
            let is_deployed = |durable: &String| {
                workers.iter().any(|worker| {
                    worker.durable() == *durable
                        && worker.stream.as_deref() == Some(stream.name.as_str())
                })
            };
            for unused in self
                .services
                .bus
                .own_consumers(&stream.name)
                .await?
                .iter()
                .filter(|durable| !is_deployed(durable))
            {
                tracing::warn!(
                    consumer = unused,
                    stream = stream.name,
                    "removing the consumer of a worker not deployed"
                );
                self.services
                    .bus
                    .remove_consumer(&stream.name, unused)
                    .await?;
            }
        }
        Ok(())
    }

    async fn redriven_dead_letters(&self) -> Result<Vec<Redrive>> {
        let filter = DeadLetterFilter {
            limit: u32::MAX,
            ..DeadLetterFilter::default()
        };
        let dead_letters = all_dead_letters(self.services.store.as_ref(), &filter).await?;
        let redriven = dead_letters
            .into_iter()
            .filter(|dead_letter| dead_letter.state == DeadLetterState::Redriven);
        Ok(redriven
            .map(|dead_letter| Redrive {
                id: dead_letter.id,
                generation: None,
                again: true,
            })
            .collect())
    }

    /// Scans a stream for outputs stored since `since`. Saves their positions, unless it is a dry
    /// run.
    async fn scan_stream(
        &self,
        stream: &StreamInfo,
        since: Timestamp,
        is_dry_run: bool,
    ) -> Result<StreamScan> {
        let name = stream.name.clone();
        if stream.is_queue {
            let note = "this stream deletes acknowledged messages: \
                        outputs on it may be published twice"
                .to_owned();
            return Ok(StreamScan {
                stream: name,
                outputs: 0,
                note: Some(note),
            });
        }
        let (mut outputs, mut from) = (0, StartPosition::Time(since));
        // Page by page: a stream may hold millions of messages.
        loop {
            let (mut found, mut last) = (Vec::new(), 0);
            let each = |passed: ScannedMessage| {
                last = passed.sequence;
                let is_output = header(&passed.headers, OUTPUT_ID_HEADER).is_some();
                if let Some(id) = header(&passed.headers, "Nats-Msg-Id").filter(|_| is_output) {
                    let (id, stream, stream_sequence) =
                        (id.to_owned(), stream.name.clone(), passed.sequence);
                    found.push(RecoveredOutput {
                        id,
                        stream,
                        stream_sequence,
                    });
                }
            };
            let has_more = self
                .services
                .bus
                .scan_messages(&name, from, &[], PAGE_SIZE, each)
                .await?;
            outputs += found.len() as u64;
            if !is_dry_run {
                self.services.store.save_recovered(&found).await?;
            }
            if !has_more {
                return Ok(StreamScan {
                    stream: name,
                    outputs,
                    note: None,
                });
            }
            from = StartPosition::Sequence(last + 1);
        }
    }

    /// Writes the watermark with which every host resumes.
    async fn write_final_watermark(&self, workers: &[Worker]) -> Result<()> {
        for _ in 0..WATERMARK_TRIES_MAX {
            let after = self.last_watermark().await?;
            let seen = self.read_positions(workers, None).await?;
            if self
                .write_watermark(&seen, after.map_or(0, |watermark| watermark.sequence))
                .await?
            {
                return Ok(());
            }
        }
        Err(anyhow!(
            "no watermark written: other hosts write their own all the time"
        ))
        .hint("oncely recover")
    }
}

/// Whether a stream may hold outputs that must not be published twice.
///
/// Invalidations may repeat, and an alarm that is raised again after a restore is a new one. A copy
/// of a stream proves nothing about the stream itself.
fn may_hold_outputs(stream: &StreamInfo) -> bool {
    !stream.is_copy
        && ![ALARM_STREAM, CACHE_STREAM, WATERMARK_STREAM, REDRIVE_STREAM]
            .contains(&stream.name.as_str())
}
