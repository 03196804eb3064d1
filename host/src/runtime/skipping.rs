//! Skipping of messages: an operator decides that a worker will not handle its backlog up to a
//! sequence.
//!
//! A skipped message is settled in the inbox, like one that was handled. So a delivery that has
//! claimed it first wins, a redelivery is a duplicate, and a restore is detected as usual. The
//! consumer is not touched: once the worker is resumed, its skipped messages are acknowledged as
//! duplicates, without a call of the handler.

use anyhow::{Context, Result, anyhow};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Host;
use crate::bus::StreamRange;
use crate::config::manifest::Worker;
use crate::model::hint::WithHint;
use crate::model::message::Message;
use crate::model::schema::Time;
use crate::store::{Claim, Pause, Skipped, StoreError};

/// How many messages one transaction skips.
const PART_SIZE: usize = 1_000;

/// How many messages a plan shows, and among how many it searches for unsettled ones.
const SAMPLE_SIZE: usize = 5;
const SAMPLE_AMONG: usize = 100;

/// The end of the messages to skip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SkipTarget {
    /// Up to this sequence, inclusive.
    To(u64),
    /// Messages that were stored before this time.
    Until(#[schemars(with = "Time")] Timestamp),
    /// All messages that are on the stream now.
    All,
}

/// The messages that would be skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkipPlan {
    pub worker: String,
    pub stream: String,
    /// Identifies the stream: a stream that was created again has other messages.
    #[schemars(with = "Time")]
    pub stream_created: Timestamp,
    /// The subjects of the worker; empty for all of the stream.
    pub subjects: Vec<String>,
    /// The first and the last sequence, inclusive.
    pub from: u64,
    pub to: u64,
    /// The number of messages, at most: some may be settled already.
    pub messages_max: u64,
    /// The first of them.
    pub sample: Vec<SkipSample>,
    /// None if the worker is not paused yet.
    pub pause: Option<Pause>,
}

/// A message that would be skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkipSample {
    pub sequence: u64,
    #[schemars(with = "Time")]
    pub stored_at: Timestamp,
    pub subject: String,
    pub event_id: String,
}

/// The result of skipping a part of the messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkippedPart {
    #[serde(flatten)]
    pub skipped: Skipped,
    /// The sequence from which on messages are left; none when the end is reached.
    pub next: Option<u64>,
}

impl Host {
    /// Plans to skip the messages of a worker up to `target`. Changes nothing.
    ///
    /// # Errors
    /// The worker is not deployed, or handles requests; or its stream does not exist.
    pub async fn plan_skip(&self, worker: &str, target: SkipTarget) -> Result<SkipPlan> {
        let (worker, name) = self.message_worker(worker).await?;
        let services = &self.services;
        let stream = services.bus.stream(&name).await?;
        let stream = stream.with_context(|| format!("the stream {name} does not exist"))?;

        // Everything up to the ack floor is settled. Without a consumer, nothing is.
        let probe = services
            .bus
            .probe(&name, &worker.subjects, &worker.durable());
        let floor = probe.ack_floor().await?;
        let unhandled = match &floor {
            Some(_) => probe.unhandled().await?.messages,
            None => u64::MAX,
        };
        let floor = floor.map_or(0, |floor| floor.sequence);
        let to = match target {
            SkipTarget::To(sequence) => sequence.min(stream.last_sequence),
            SkipTarget::Until(time) => services.bus.last_sequence_before(&name, time).await?,
            SkipTarget::All => stream.last_sequence,
        };
        let range = StreamRange {
            stream: name,
            subjects: worker.subjects.clone(),
            from: (floor + 1).max(stream.first_sequence),
            to,
        };
        let messages_max = services.bus.count_range(&range, unhandled).await?;
        let sample = self.sample(&worker, &range).await?;
        let pauses = services.store.pauses().await?;
        Ok(SkipPlan {
            pause: pauses
                .into_iter()
                .find_map(|(paused, pause)| (paused == worker.name).then_some(pause)),
            worker: worker.name,
            stream: range.stream,
            stream_created: stream.created,
            subjects: range.subjects,
            from: range.from,
            to: range.to,
            messages_max: messages_max.min((range.to + 1).saturating_sub(range.from)),
            sample,
        })
    }

    /// The first messages of a range that are not settled.
    async fn sample(&self, worker: &Worker, range: &StreamRange) -> Result<Vec<SkipSample>> {
        let mut found: Vec<SkipSample> = Vec::new();
        let each = |message: Message| {
            if let Some(origin) = message.origin {
                found.push(SkipSample {
                    sequence: origin.sequence,
                    stored_at: origin.stored_at,
                    subject: message.subject,
                    event_id: message.event_id,
                });
            }
        };
        self.services
            .bus
            .read_range(range, SAMPLE_AMONG, each)
            .await?;
        let ids: Vec<&str> = found.iter().map(|found| found.event_id.as_str()).collect();
        let known = self.services.store.known_events(&worker.name, &ids).await?;
        found.retain(|found| !known.contains(&found.event_id));
        found.truncate(SAMPLE_SIZE);
        Ok(found)
    }

    /// Skips the next messages of a plan from a sequence on, as the activity with this id.
    ///
    /// # Errors
    /// The worker is not paused, or its stream is another one by now.
    pub async fn skip(&self, plan: &SkipPlan, from: u64, activity: i64) -> Result<SkippedPart> {
        // The worker and its stream as they are now.
        let (worker, name) = self.message_worker(&plan.worker).await?;
        let pauses = self.services.store.pauses().await?;
        if !pauses.iter().any(|(paused, _)| *paused == worker.name) {
            return Err(anyhow!("worker {} is not paused", worker.name))
                .hint(format!("oncely pause {}", worker.name));
        }
        let stream = self.services.bus.stream(&name).await?;
        if name != plan.stream || stream.is_none_or(|now| now.created != plan.stream_created) {
            return Err(anyhow!(
                "worker {} has another stream than at the time of the plan",
                worker.name
            ))
            .hint(format!("oncely skip {} --all --dry-run", worker.name));
        }

        // Read the messages, and settle them in one transaction. Everything up to the ack floor is
        // settled, although its rows may have left the inbox.
        let probe = self
            .services
            .bus
            .probe(&name, &worker.subjects, &worker.durable());
        let floor = probe.ack_floor().await?.map_or(0, |floor| floor.sequence);
        let range = StreamRange {
            stream: name,
            subjects: worker.subjects.clone(),
            from: from.max(floor.saturating_add(1)),
            to: plan.to,
        };
        let mut messages: Vec<Claim> = Vec::new();
        let each = |message: Message| {
            messages.push(Claim {
                payload_sha256: message.payload_sha256(),
                event_id: message.event_id,
                origin: message
                    .origin
                    .map(|origin| (origin.stream, origin.sequence)),
                redriven: false,
            });
        };
        let next = self
            .services
            .bus
            .read_range(&range, PART_SIZE, each)
            .await?;
        let skipped = self
            .services
            .store
            .skip(activity, &worker.name, &range.stream, &messages)
            .await
            .map_err(|error| match error {
                StoreError::Conflict(_) => anyhow::Error::from(error)
                    .context("a message is in flight")
                    .hint(format!("oncely drain {}", worker.name)),
                error => error.into(),
            })?;
        tracing::warn!(
            worker = worker.name,
            stream = range.stream,
            sequences = ?skipped.sequences,
            messages = skipped.skipped,
            "messages skipped"
        );
        Ok(SkippedPart { skipped, next })
    }

    /// A deployed worker that takes messages, and its stream.
    async fn message_worker(&self, worker: &str) -> Result<(Worker, String)> {
        let active = self.services.store.active_deployment(worker).await?;
        let active = active
            .ok_or_else(|| anyhow!("there is no deployed worker `{worker}`"))
            .hint("oncely workers")?;
        let worker: Worker =
            serde_json::from_str(&active.manifest).context("read the deployment's manifest")?;
        match worker.stream.clone() {
            Some(stream) => Ok((worker, stream)),
            None => Err(anyhow!(
                "worker {} handles requests, so it has no backlog to skip",
                worker.name
            )),
        }
    }
}
