//! Pauses of workers: each host applies those in the database, and reports that it did.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Host;
use super::worker_entry::{Slot, WorkerRuntime};
use crate::bus::ConsumerState;
use crate::store::{OutboxLag, Pause};

/// How far a paused worker is drained, on all hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrainStatus {
    /// None if the worker is not paused.
    pub pause: Option<Pause>,
    /// Every live host.
    pub hosts: Vec<HostDrain>,
    /// Outputs of the worker that are due and not published.
    pub unpublished: u64,
    /// Those of them that are parked until an operator decides, or blocked by one that is.
    pub parked: u64,
    /// Whether nothing of it is in flight on any host, and its outputs are published.
    pub is_drained: bool,
}

/// How far a paused worker is drained on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostDrain {
    pub host: String,
    /// Whether the host has stopped taking messages and requests of the worker.
    pub is_paused: bool,
    /// Messages or requests in flight, as of its last report; none if the worker is not started.
    pub in_flight: Option<usize>,
    /// Whether it is paused with nothing in flight.
    pub is_drained: bool,
}

impl Host {
    /// Applies the pauses in the database to the workers of this host.
    ///
    /// One call at a time: a slow one must not apply pauses that have ended since it read them.
    pub(super) async fn apply_pauses(&self) -> Result<()> {
        let _guard = self.pausing.lock().await;
        let pauses = self.services.store.pauses().await?;
        let pauses: BTreeMap<String, Pause> = pauses.into_iter().collect();
        // Workers that start from now on start as paused.
        self.pauses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&pauses);
        let mut workers = self.workers.lock().await;
        for (name, slot) in workers.iter_mut() {
            let pause = pauses.get(name);
            slot.earlier.retain(|worker| Arc::strong_count(worker) > 1);
            if slot.pause.as_ref() != pause {
                match pause {
                    Some(pause) => tracing::info!(
                        worker = name,
                        actor = pause.actor,
                        note = pause.note,
                        "worker paused"
                    ),
                    None => tracing::info!(worker = name, "worker resumed"),
                }
                slot.apply_pause(pause);
                self.workers_changed.notify_one();
            }
            if pause.is_none() {
                self.resume(name, slot).await;
            }
        }
        Ok(())
    }

    /// The pause of a worker that is about to start here.
    pub(super) fn pause_of(&self, worker: &str) -> Option<Pause> {
        self.pauses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(worker)
            .cloned()
    }

    /// Starts a worker again that was paused, once its earlier messages are settled. A failure is
    /// retried by the next call.
    async fn resume(&self, name: &str, slot: &mut Slot) {
        let Some(WorkerRuntime::Paused(paused)) = &slot.running else {
            return;
        };
        let Some(relay) = self.services.relay.get() else {
            return;
        };
        if !paused.is_drained() || self.hold().is_some() {
            return;
        }
        match paused.resume(&self.services.bus, relay).await {
            Ok(running) => {
                slot.running = Some(WorkerRuntime::Messages(Box::new(running)));
                self.workers_changed.notify_one();
            }
            Err(error) => tracing::warn!(
                worker = name,
                error = format!("{error:#}"),
                "failed to resume a worker, retrying"
            ),
        }
    }

    /// How far a worker is drained, on all hosts. None if it is not deployed.
    pub async fn drain_status(&self, worker: &str) -> Result<Option<DrainStatus>> {
        if self
            .services
            .store
            .active_deployment(worker)
            .await?
            .is_none()
        {
            return Ok(None);
        }
        let pauses = self.services.store.pauses().await?;
        let pause = pauses
            .into_iter()
            .find_map(|(name, pause)| (name == worker).then_some(pause));

        // The hosts first: outputs that they commit until they are drained are counted below.
        let mut hosts = Vec::new();
        for report in self.reports().await? {
            let on_host = report.workers.get(worker);
            // A report from before this pause does not count.
            let is_paused = pause.is_some()
                && on_host.is_some_and(|on_host| {
                    on_host.pause.as_ref().map(|paused| paused.at)
                        == pause.as_ref().map(|pause| pause.at)
                });
            hosts.push(HostDrain {
                host: report.host,
                is_paused,
                in_flight: on_host.map(|on_host| on_host.in_flight),
                is_drained: is_paused && on_host.is_some_and(|on_host| on_host.is_drained),
            });
        }
        let lags = self.services.store.outbox_lag().await;
        let lags = lags.context("count the unpublished outputs")?;
        let lag = lags.into_iter().find(|lag| lag.worker == worker);
        let (unpublished, parked) = lag.map_or((0, 0), |lag: OutboxLag| {
            (lag.unpublished, lag.parked + lag.blocked)
        });
        let is_drained =
            !hosts.is_empty() && hosts.iter().all(|host| host.is_drained) && unpublished == 0;
        Ok(Some(DrainStatus {
            pause,
            hosts,
            unpublished,
            parked,
            is_drained,
        }))
    }
}

impl Slot {
    /// Pauses the running worker, or records that it is not paused any more.
    fn apply_pause(&mut self, pause: Option<&Pause>) {
        self.pause = pause.cloned();
        // A request may have found an earlier version before its replacement.
        for earlier in &self.earlier {
            earlier.set_paused(pause.is_some());
        }
        match &self.running {
            Some(WorkerRuntime::Requests(worker)) => worker.set_paused(pause.is_some()),
            Some(WorkerRuntime::Messages(_)) if pause.is_some() => {
                if let Some(WorkerRuntime::Messages(running)) = self.running.take() {
                    self.running = Some(WorkerRuntime::Paused(Box::new(running.pause())));
                    self.consumer_state = ConsumerState::default();
                }
            }
            _ => {}
        }
    }
}
