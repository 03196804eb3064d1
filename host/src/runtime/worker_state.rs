//! The state of the workers of a host, for status, metrics and alarms.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use tokio::time::Instant;

use super::health_checks::PROBE_CONCURRENCY;
use super::worker_entry::Slot;
use super::{Hold, Host};
use crate::alarms::monitor::HostState;
use crate::bus::{Probe, UnhandledMessages};
use crate::consumer::LaneReport;
use crate::metrics::{Measured, MeasuredOutbox, MeasuredWal, MeasuredWorker};
use crate::model::alarm::{Alarm, Kind};
use crate::services::age;
use crate::store::{OutboxLag, Pause, RelayMode};

/// How long the server has to answer the queries of all consumers.
const UNHANDLED_WITHIN: Duration = Duration::from_secs(1);

/// The state of one worker on a host.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct WorkerState {
    pub worker: String,
    /// The version that runs here.
    pub version: Option<u32>,
    pub digest: Option<String>,
    pub stream: Option<String>,
    pub subjects: Vec<String>,
    /// The routes of an HTTP worker, such as `POST /transfers`.
    #[serde(default)]
    pub routes: Vec<String>,
    /// Whether it works here.
    pub state: RunState,
    /// The reason that it is broken or paused.
    pub error: Option<String>,
    /// The pause by an operator that is applied here.
    #[serde(default)]
    pub pause: Option<Pause>,
    /// Messages or requests in flight on this host.
    #[serde(default)]
    pub in_flight: usize,
    /// Its lanes on this host; none while it pulls no messages.
    #[serde(default)]
    pub lanes: Option<LaneReport>,
    /// Whether it is paused by an operator, with nothing in flight on this host.
    #[serde(default)]
    pub is_drained: bool,
    /// The active version, if it cannot run.
    #[serde(default)]
    pub broken_version: Option<u32>,
    /// Messages on its stream that are not handled yet; none when NATS does not respond.
    pub pending: Option<u64>,
    /// Age of the oldest pending message, in milliseconds; none when none is pending.
    pub oldest_pending_ms: Option<u64>,
    pub done: u64,
    pub duplicates: u64,
    pub retries: u64,
    pub dead: u64,
}

/// Whether a worker works on a host.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// It is being prepared, or its subscription is yet to be confirmed.
    Starting,
    /// It takes messages or requests.
    Running,
    /// An operator paused it, or its consumer on the server.
    Paused,
    /// It cannot run, or its consumer is gone.
    Broken,
    /// It does not run while workers and relay are held.
    Held,
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            RunState::Starting => "starting",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Broken => "broken",
            RunState::Held => "held",
        })
    }
}

impl Host {
    /// The workers of this host, by name.
    pub async fn workers(&self) -> Vec<WorkerState> {
        let is_held = self.hold().is_some();
        self.workers
            .lock()
            .await
            .iter()
            .map(|(name, slot)| slot.state(name, is_held))
            .collect()
    }

    /// Like [`Host::workers`], with the pending messages of their streams.
    pub async fn workers_with_backlog(&self) -> Vec<WorkerState> {
        let is_held = self.hold().is_some();
        let (mut states, probes): (Vec<_>, Vec<_>) = self
            .workers
            .lock()
            .await
            .iter()
            .map(|(name, slot)| (slot.state(name, is_held), probe(slot)))
            .unzip();
        for (state, unhandled) in states.iter_mut().zip(unhandled(probes.into_iter()).await) {
            state.pending = unhandled.map(|unhandled| unhandled.messages);
            state.oldest_pending_ms = unhandled.and_then(age).map(|age| age.as_millis() as u64);
        }
        states
    }

    /// All metrics of this host in the text format of Prometheus.
    pub async fn metrics_text(&self) -> Result<String> {
        let outbox = self.services.store.outbox_lag().await.ok();
        let alarms = self.services.store.alarms().await.unwrap_or_default();
        let measured = Measured {
            is_database_writable: outbox.is_some()
                && self.services.health.database_error().is_none(),
            nats_connected: self.services.bus.is_connected(),
            outbox: outbox.map(|lags| lags.into_iter().map(measured_outbox).collect()),
            workers: self.measure_workers().await,
            breakers: self
                .services
                .relay_state
                .breakers()
                .into_iter()
                .map(|breaker| (breaker.stream, breaker.state))
                .collect(),
            wal: self.services.relay_state.wal().map(|wal| MeasuredWal {
                is_active: wal.mode == RelayMode::Wal,
                is_reader: self.services.relay_state.reads_wal(),
                lag: wal.lag,
                retained: wal.slot.map_or(0, |slot| slot.retained),
            }),
            alarms: self.measure_alarms(&alarms).await,
            cache: self.services.cache.measure(),
        };
        self.services
            .metrics
            .text(&measured)
            .context("write the metrics")
    }

    /// All kinds of alarms for each worker, raised or not: a missing series cannot be compared.
    async fn measure_alarms(&self, alarms: &[Alarm]) -> Vec<(String, Kind, bool)> {
        let workers = self.workers.lock().await;
        let names: BTreeSet<&str> = workers
            .keys()
            .map(String::as_str)
            .chain(alarms.iter().map(|alarm| alarm.worker.as_str()))
            .collect();
        let kinds = || Kind::ALL.into_iter().filter(|kind| *kind != Kind::Database);
        let none = names
            .into_iter()
            .flat_map(|worker| kinds().map(|kind| (worker.to_owned(), kind, false)));
        let raised = alarms.iter().filter(|alarm| alarm.is_raised());
        none.chain(raised.map(|alarm| (alarm.worker.clone(), alarm.kind, true)))
            .collect()
    }

    async fn measure_workers(&self) -> Vec<MeasuredWorker> {
        let (mut measured, probes): (Vec<_>, Vec<_>) = self
            .workers
            .lock()
            .await
            .values()
            .filter_map(|slot| {
                let running = slot.running.as_ref()?;
                let worker = MeasuredWorker {
                    worker: running.worker().name.clone(),
                    is_paused: slot.pause.is_some(),
                    in_flight: running.in_flight(),
                    unhandled: None,
                    oldest: None,
                };
                Some((worker, running.probe()))
            })
            .unzip();
        for (worker, unhandled) in measured.iter_mut().zip(unhandled(probes.into_iter()).await) {
            worker.unhandled = unhandled.map(|unhandled| unhandled.messages);
            worker.oldest = unhandled.map(|unhandled| age(unhandled).unwrap_or_default());
        }
        measured
    }

    /// The state of this host that alarms depend on.
    pub(super) async fn state_for_alarms(&self) -> HostState {
        let states = self.workers().await;
        let broken = states
            .iter()
            .filter(|state| state.state == RunState::Broken)
            .map(|state| {
                (
                    state.worker.clone(),
                    state.error.clone().unwrap_or_default(),
                )
            });
        let paused = states
            .iter()
            .filter_map(|state| Some((state.worker.clone(), state.pause.as_ref()?.to_string())));
        HostState {
            is_restored: matches!(self.hold(), Some(Hold::Restored(_))),
            broken: broken.collect(),
            paused: paused.collect(),
        }
    }
}

/// A probe of the consumer of a worker that runs; none without a stream.
fn probe(slot: &Slot) -> Option<Probe> {
    slot.running.as_ref()?.probe()
}

/// The messages that each probe finds unhandled, in order; none when unknown.
async fn unhandled(probes: impl Iterator<Item = Option<Probe>>) -> Vec<Option<UnhandledMessages>> {
    let end = Instant::now() + UNHANDLED_WITHIN;
    let query = |probe: Option<Probe>| async move {
        let unhandled = tokio::time::timeout_at(end, probe?.unhandled()).await;
        unhandled.ok()?.ok()
    };
    futures::stream::iter(probes.map(query))
        .buffered(PROBE_CONCURRENCY)
        .collect()
        .await
}

fn measured_outbox(lag: OutboxLag) -> MeasuredOutbox {
    MeasuredOutbox {
        worker: lag.worker,
        unpublished: lag.unpublished,
        oldest: lag.oldest_ms.map(Duration::from_millis),
        parked: lag.parked,
        blocked: lag.blocked,
    }
}
