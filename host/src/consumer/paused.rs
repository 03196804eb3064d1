//! A paused worker: it pulls nothing, and its messages in flight end.

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::task::JoinHandle;

use super::in_flight::InFlightMessages;
use super::{RunningWorker, WorkerCounters, subscription};
use crate::bus::{Bus, Probe};
use crate::delivery::Delivery;
use crate::relay::RelayHandle;

/// A worker that is paused in this host, with everything that it needs to resume.
pub struct PausedWorker {
    pub delivery: Delivery,
    pub digest: String,
    pub counters: Arc<WorkerCounters>,
    probe: Probe,
    /// The messages of the time before the pause, and the task that settles them.
    ending: Option<(InFlightMessages, JoinHandle<()>)>,
}

impl PausedWorker {
    /// A worker that starts as paused. Its consumer is created, so that its backlog is counted.
    ///
    /// # Errors
    /// The worker has no stream, or the broker refuses or does not answer.
    pub async fn new(delivery: Delivery, digest: String, bus: &Bus) -> Result<Self> {
        let worker = &delivery.worker;
        let stream = worker
            .stream
            .as_deref()
            .context("start a worker without a stream")?;
        bus.prepare_consumer(&subscription(worker, stream))
            .await
            .with_context(|| format!("subscribe worker {} to stream {}", worker.name, stream))?;
        let probe = bus.probe(stream, &worker.subjects, &worker.durable());
        Ok(PausedWorker {
            delivery,
            digest,
            counters: Arc::default(),
            probe,
            ending: None,
        })
    }

    /// Starts it again. It must be drained: two sets of lanes would mix up the order of messages.
    ///
    /// # Errors
    /// Those of [`RunningWorker::start`].
    pub async fn resume(&self, bus: &Bus, relay: RelayHandle) -> Result<RunningWorker> {
        let (delivery, digest) = (self.delivery.clone(), self.digest.clone());
        RunningWorker::start(delivery, digest, Arc::clone(&self.counters), bus, relay).await
    }

    /// Whether all messages of the time before the pause are settled or returned to the broker.
    pub fn is_drained(&self) -> bool {
        self.ending
            .as_ref()
            .is_none_or(|(_, task)| task.is_finished())
    }

    /// Number of messages that this host holds for the worker.
    pub fn in_flight(&self) -> usize {
        self.ending
            .as_ref()
            .map_or(0, |(messages, _)| messages.len())
    }

    /// A probe of its consumer.
    pub fn probe(&self) -> Probe {
        self.probe.clone()
    }

    /// Waits until it is drained.
    pub async fn drain(self) {
        if let Some((_, task)) = self.ending
            && let Err(error) = task.await
        {
            tracing::error!(
                worker = self.delivery.worker.name,
                error = %error,
                "worker task failed"
            );
        }
    }
}

impl RunningWorker {
    /// Stops pulling. Returns at once; the messages in flight are settled meanwhile.
    pub fn pause(self) -> PausedWorker {
        self.stop.now();
        PausedWorker {
            delivery: self.delivery,
            digest: self.digest,
            counters: self.counters,
            probe: self.probe,
            ending: Some((self.in_flight, self.pulling)),
        }
    }
}
