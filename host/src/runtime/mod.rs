//! The host: runs the deployed workers and the relay, and swaps versions without losing messages.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

use crate::alarms::WebhookClient;
use crate::alarms::monitor::{self, HostState};
use crate::alarms::webhook;
use crate::bus::{Bus, ConsumerState};
use crate::cache::{Cache, feed};
use crate::config::CacheSettings;
use crate::config::manifest::Worker;
use crate::consumer::RunningWorker;
use crate::delivery::Delivery;
use crate::drain::{Stopping, TaskGroup};
use crate::fault;
use crate::guest::GuestEngine;
use crate::ingress::{HttpWorker, Ingress, RouteTable};
use crate::metrics::{Measured, MeasuredOutbox, MeasuredWal, MeasuredWorker, Metrics};
use crate::model::alarm::{Alarm, Kind};
use crate::model::invalidation::CACHE_STREAM;
use crate::model::request::Admission;
use crate::relay::{Relay, RelayModeController, RelayState, Repair, WalRelay};
use crate::services::{RelayLink, Services, age};
use crate::store::{DeploymentRecord, OutboxLag, RelayMode, Store};

mod consistency;
pub mod deploy;
mod health_checks;
mod lease;
mod recovery;
mod retention;
mod retirement;
mod worker_entry;

pub use consistency::Hold;
pub use health_checks::{HostReport, WorkerReport};
pub use recovery::Recovery;
use retention::Pruner;
pub use retention::Retention;
pub use retirement::RetiredWorker;
use worker_entry::{Slot, WorkerRuntime};

/// How often deployments made by other hosts are polled.
const DEPLOYMENT_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How often expired rows are deleted.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);

/// How long closing the database connections may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often compiled components without a deployment are deleted, and their minimum age.
const COMPILED_PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// One running host.
pub struct Host {
    pub services: Arc<Services>,
    pub retention: Retention,
    /// Answers HTTP requests.
    pub ingress: Arc<Ingress>,
    workers: Mutex<BTreeMap<String, Slot>>,
    /// The reason that workers and relay are held; none while they run.
    hold: std::sync::Mutex<Option<Hold>>,
    /// Serializes comparisons of database and broker, and recoveries.
    recovering: Mutex<()>,
    /// Workers whose active version is being prepared or swapped in.
    starting_workers: std::sync::Mutex<BTreeSet<String>>,
    /// Set once the host stops: no further worker is started.
    stopping: Stopping,
    deployed: Notify,
    /// Notified when the state of a worker changed, which other hosts may wait for.
    workers_changed: Notify,
    /// Whether the deployments made at the start are complete.
    has_started: AtomicBool,
}

/// The state of one worker on a host.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
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
    /// `running`, `starting`, `broken`, `paused`, or `held` while database and broker disagree.
    pub state: String,
    /// The reason that it is broken or paused.
    pub error: Option<String>,
    /// The active version, if it cannot run.
    #[serde(default)]
    pub broken_version: Option<u32>,
    /// Messages on its stream that are not handled yet; none when the broker does not answer.
    pub pending: Option<u64>,
    /// Age of the oldest pending message, in milliseconds; none when none is pending.
    pub oldest_pending_ms: Option<u64>,
    pub done: u64,
    pub duplicates: u64,
    pub retries: u64,
    pub dead: u64,
}

/// The tasks of a running host, in the order of shutdown.
pub struct HostTasks {
    /// Tasks that start work: supervision, comparisons, checks, alarms.
    supervision: TaskGroup,
    /// The WAL reader ends after the lanes.
    wal: TaskGroup,
    /// The relay ends after all sources of outputs.
    relay: TaskGroup,
    /// The lease is renewed until all other tasks have ended.
    lease: TaskGroup,
}

/// The parts of a host before its tasks run.
struct Parts {
    host: Arc<Host>,
    relay: Relay,
    repair: Repair,
    wal: Option<(RelayModeController, WalRelay)>,
}

impl Host {
    /// Starts a host: its lease, its relay and all deployed workers. `webhook` posts alarms, if
    /// configured.
    ///
    /// # Errors
    /// The host's own streams, its lease or its relay cannot be set up. A worker that cannot run is
    /// no error.
    pub async fn start(
        store: Arc<dyn Store>,
        bus: Bus,
        engine: GuestEngine,
        retention: Retention,
        admission: Admission,
        webhook: Option<WebhookClient>,
        cache: &CacheSettings,
    ) -> Result<(Arc<Host>, HostTasks)> {
        health_checks::create_own_streams(&bus).await?;
        let mut running = HostTasks::default();

        let relay_state = running.begin_lease(&store).await?;
        let cache = |metrics| Cache::open(cache, metrics);
        let stopping = running.supervision.stopping();
        let parts = Parts::new(
            store,
            bus,
            engine,
            retention,
            admission,
            cache,
            relay_state,
            stopping,
        )?;
        let host = Arc::clone(&parts.host);

        // Nothing is published or consumed before database and broker are compared.
        let comparison = host
            .compare()
            .await
            .context("compare database and broker")?;
        host.set_hold(comparison.hold).await;

        running.start_relay(parts);
        running.listen_for_invalidations(&host).await?;
        host.reconcile()
            .await
            .context("start the deployed workers")?;
        fault::point(fault::STARTED);

        running.start_supervision(&host, webhook);
        Ok((host, running))
    }

    /// Starts, swaps and stops workers until they match the active deployments.
    ///
    /// Workers compile concurrently. A worker that is being started already is skipped.
    pub async fn reconcile(&self) -> Result<()> {
        let deployments = self.services.store.active_deployments().await?;
        self.stop_retired_workers(&deployments).await;
        futures::future::join_all(
            deployments
                .iter()
                .map(|deployment| self.run_deployment(deployment)),
        )
        .await;
        Ok(())
    }

    /// Notifies the supervisor of a deployment.
    pub fn notify_deployed(&self) {
        self.deployed.notify_one();
    }

    /// Runs `deployment` here unless it runs already.
    ///
    /// The previous version runs until the new one is prepared. Then it is drained, and the new
    /// version continues on the same durable consumer.
    async fn run_deployment(&self, deployment: &DeploymentRecord) {
        let Some(_guard) = StartGuard::begin(&self.starting_workers, &deployment.worker) else {
            return;
        };
        if self.is_running(deployment).await {
            return;
        }

        // Message workers are held while database and broker disagree. HTTP workers do not need the
        // broker.
        let is_held = || self.hold().is_some() && takes_messages(deployment);
        if is_held() {
            return;
        }

        // Prepared without the lock, since compiling is slow. A stopping host does not wait for it.
        let mut stopping = self.stopping.clone();
        let prepared = tokio::select! {
            biased;
            () = stopping.stopped() => return,
            prepared = self.services.prepare(deployment) => prepared,
        };

        let mut workers = self.workers.lock().await;
        if is_held() {
            return;
        }
        // Meanwhile another version may have been activated, or the worker retired.
        let is_active = |active: &DeploymentRecord| {
            active.worker == deployment.worker && active.version == deployment.version
        };
        match self.services.store.active_deployments().await {
            Ok(active) if active.iter().any(is_active) => {}
            _ => {
                workers.retain(|name, slot| *name != deployment.worker || slot.running.is_some());
                return;
            }
        }
        let slot = workers.entry(deployment.worker.clone()).or_default();

        // Swap the versions. A failure is logged once per version.
        let swapped = match prepared {
            Ok(delivery) => self.swap(slot, deployment, delivery).await,
            Err(error) => Err(error),
        };
        if let Err(error) = swapped {
            let is_logged = slot
                .broken
                .as_ref()
                .is_some_and(|(version, _)| *version == deployment.version);
            if !is_logged {
                tracing::error!(
                    worker = deployment.worker,
                    version = deployment.version,
                    error = format!("{error:#}"),
                    "worker cannot run"
                );
            }
            slot.broken = Some((deployment.version, format!("{error:#}")));
        }
        self.update_routes(&workers).await;
        self.workers_changed.notify_one();
    }

    /// Replaces the routes of the ingress by those of the running workers.
    async fn update_routes(&self, workers: &BTreeMap<String, Slot>) {
        let requests = workers
            .values()
            .filter_map(|slot| slot.running.as_ref()?.requests());
        self.ingress.set_routes(RouteTable::new(requests)).await;
    }

    /// Whether this deployment runs here.
    async fn is_running(&self, deployment: &DeploymentRecord) -> bool {
        let mut workers = self.workers.lock().await;
        let slot = workers.entry(deployment.worker.clone()).or_default();
        let runs = slot
            .running
            .as_ref()
            .is_some_and(|running| running.version() == deployment.version);
        if runs {
            slot.broken = None;
        }
        runs
    }

    /// Replaces the running version of a worker by the prepared `delivery`.
    async fn swap(
        &self,
        slot: &mut Slot,
        deployment: &DeploymentRecord,
        delivery: Delivery,
    ) -> Result<()> {
        self.check_retention(&delivery.worker).await?;
        let relay = self
            .services
            .relay
            .get()
            .context("start a worker in a host that is stopping")?;
        let is_http = !delivery.worker.routes.is_empty();
        if let Some(old) = slot
            .running
            .take_if(|old| !is_http || old.requests().is_none())
        {
            old.drain().await;
            fault::point(fault::DEPLOY_SWAP);
        }
        let digest = deployment.digest.clone();
        // An HTTP worker takes over at once; the previous version finishes its requests.
        let running = match is_http {
            true => WorkerRuntime::Requests(Arc::new(HttpWorker::new(delivery, digest))),
            false => WorkerRuntime::Messages(Box::new(
                RunningWorker::start(delivery, digest, &self.services.bus, relay).await?,
            )),
        };
        tracing::info!(
            worker = deployment.worker,
            version = deployment.version,
            "worker running"
        );
        slot.running = Some(running);
        (slot.broken, slot.standing) = (None, ConsumerState::default());
        Ok(())
    }

    /// Deletes compiled components that no deployment ever used.
    async fn prune_compiled(&self) -> Result<()> {
        let mut deployed = HashSet::new();
        for active in self.services.store.active_deployments().await? {
            let all = self.services.store.deployments(&active.worker).await?;
            deployed.extend(all.into_iter().map(|deployment| deployment.digest));
        }
        let removed = self
            .services
            .engine
            .remove_compiled(deployed, COMPILED_PRUNE_INTERVAL)
            .await?;
        if removed > 0 {
            tracing::info!(
                removed,
                "removed compiled components that were never deployed"
            );
        }
        Ok(())
    }

    /// Drains the message workers: they settle the messages in flight and pull no more.
    async fn drain_message_workers(&self) {
        let mut workers = self.workers.lock().await;
        let taken = workers
            .values_mut()
            .filter_map(|slot| slot.running.take_if(|work| work.requests().is_none()));
        futures::future::join_all(taken.map(WorkerRuntime::drain)).await;
    }

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
        let workers = self.workers.lock().await;
        let mut states = Vec::new();
        for (name, slot) in workers.iter() {
            let mut state = slot.state(name, is_held);
            if let Some(running) = &slot.running {
                let unhandled = running.unhandled().await;
                state.pending = unhandled.map(|unhandled| unhandled.messages);
                state.oldest_pending_ms = unhandled.and_then(age).map(|age| age.as_millis() as u64);
            }
            states.push(state);
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
            wal: self.services.relay_state.wal().map(|log| MeasuredWal {
                is_active: log.mode == RelayMode::Wal,
                is_reader: self.services.relay_state.reads_wal(),
                lag: log.lag,
                retained: log.slot.map_or(0, |slot| slot.retained),
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
    async fn measure_alarms(&self, standing: &[Alarm]) -> Vec<(String, Kind, bool)> {
        let workers = self.workers.lock().await;
        let names: BTreeSet<&str> = workers
            .keys()
            .map(String::as_str)
            .chain(standing.iter().map(|alarm| alarm.worker.as_str()))
            .collect();
        let kinds = || Kind::ALL.into_iter().filter(|kind| *kind != Kind::Database);
        let none = names
            .into_iter()
            .flat_map(|worker| kinds().map(|kind| (worker.to_owned(), kind, false)));
        let raised = standing.iter().filter(|alarm| alarm.is_raised());
        none.chain(raised.map(|alarm| (alarm.worker.clone(), alarm.kind, true)))
            .collect()
    }

    async fn measure_workers(&self) -> Vec<MeasuredWorker> {
        let workers = self.workers.lock().await;
        let running = workers.values().filter_map(|slot| slot.running.as_ref());
        let measured = running.map(|running| async move {
            let unhandled = running.unhandled().await;
            MeasuredWorker {
                worker: running.worker().name.clone(),
                in_flight: running.in_flight(),
                unhandled: unhandled.map(|unhandled| unhandled.messages),
                oldest: unhandled.map(|unhandled| age(unhandled).unwrap_or_default()),
            }
        });
        futures::future::join_all(measured).await
    }

    /// The state of this host that alarms depend on.
    async fn state_for_alarms(&self) -> HostState {
        let states = self.workers().await.into_iter();
        let broken = states.filter(|state| state.state == "broken");
        HostState {
            is_restored: matches!(self.hold(), Some(Hold::Restored(_))),
            broken: broken
                .map(|state| (state.worker, state.error.unwrap_or_default()))
                .collect(),
        }
    }

    /// Checks whether the host can work.
    ///
    /// Every deployed worker must run here, with a subscription that the server has confirmed, and
    /// writes must be committed. Returns the broken workers with their reasons, while others work.
    ///
    /// # Errors
    /// The reasons that the host is not ready, as text.
    pub async fn readiness(&self) -> std::result::Result<Vec<String>, String> {
        if !self.has_started.load(Ordering::Relaxed) {
            return Err("the host is starting".to_owned());
        }
        if !self.services.bus.is_connected() {
            return Err("no connection to NATS".to_owned());
        }
        if !self.services.bus.can_publish() {
            return Err("no connection to NATS for outputs".to_owned());
        }
        if let Some(hold) = self.hold() {
            return Err(hold.to_string());
        }
        if let Some(why) = self.services.health.database_error() {
            return Err(format!("the database takes no writes: {why}"));
        }
        if let Some(why) = self.services.health.own_streams_error() {
            return Err(format!("the host's own streams: {why}"));
        }
        let deployments = self
            .services
            .store
            .active_deployments()
            .await
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        let broken = self.check_deployments(&deployments).await?;
        match self.services.relay_state.lease_since(Instant::now()) {
            Some(_) => Ok(broken),
            None => Err("the host's lease in the database was not renewed in time".to_owned()),
        }
    }

    /// The workers that cannot run.
    ///
    /// # Errors
    /// A worker is still starting, or none can run.
    async fn check_deployments(
        &self,
        deployments: &[DeploymentRecord],
    ) -> std::result::Result<Vec<String>, String> {
        let states = self.workers().await;
        let (mut broken, mut missing) = (Vec::new(), Vec::new());
        for DeploymentRecord {
            worker, version, ..
        } in deployments
        {
            let state = states.iter().find(|state| state.worker == *worker);
            let is_at =
                |state: &WorkerState| state.broken_version.or(state.version) == Some(*version);
            match state
                .filter(|state| is_at(state))
                .map(|state| (state.state.as_str(), &state.error))
            {
                Some(("running" | "paused", _)) => {}
                Some(("broken", why)) => {
                    broken.push(format!(
                        "worker {worker} cannot run: {}",
                        why.as_deref().unwrap_or_default()
                    ));
                }
                _ => missing.push(format!(
                    "worker {worker} version {version} is not running yet"
                )),
            }
        }
        if !missing.is_empty() {
            return Err(missing.join(", "));
        }
        if !broken.is_empty() && broken.len() == deployments.len() {
            return Err(broken.join("; "));
        }
        Ok(broken)
    }

    /// Completes the start: the host can become ready.
    pub fn set_started(&self) {
        self.has_started.store(true, Ordering::Relaxed);
        self.ingress.set_started();
    }

    /// Closes the ingress and the link to the relay, then drains all workers.
    async fn drain_workers(&self) {
        self.services.relay.close();
        self.ingress.close().await;
        let mut workers = self.workers.lock().await;
        let draining = std::mem::take(&mut *workers)
            .into_values()
            .filter_map(|slot| slot.running);
        futures::future::join_all(draining.map(WorkerRuntime::drain)).await;
    }
}

/// Whether a deployment is of a worker that consumes messages.
fn takes_messages(deployment: &DeploymentRecord) -> bool {
    let worker: serde_json::Result<Worker> = serde_json::from_str(&deployment.manifest);
    worker.is_ok_and(|worker| worker.routes.is_empty())
}

/// A worker that is being started, until dropped.
struct StartGuard<'h> {
    all: &'h std::sync::Mutex<BTreeSet<String>>,
    worker: String,
}

impl<'h> StartGuard<'h> {
    /// None while the worker is being started already.
    fn begin(all: &'h std::sync::Mutex<BTreeSet<String>>, worker: &str) -> Option<Self> {
        let is_first = all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(worker.to_owned());
        is_first.then(|| StartGuard {
            all,
            worker: worker.to_owned(),
        })
    }
}

impl Drop for StartGuard<'_> {
    fn drop(&mut self) {
        self.all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.worker);
    }
}

fn measured_outbox(lag: OutboxLag) -> MeasuredOutbox {
    MeasuredOutbox {
        worker: lag.worker,
        unpublished: lag.unpublished,
        oldest: lag.oldest_ms.map(Duration::from_millis),
        parked: lag.parked,
        held: lag.blocked,
    }
}

impl Parts {
    #[expect(clippy::too_many_arguments, reason = "the parts of a host, each once")]
    fn new(
        store: Arc<dyn Store>,
        bus: Bus,
        engine: GuestEngine,
        retention: Retention,
        admission: Admission,
        open_cache: impl FnOnce(Arc<Metrics>) -> Result<Cache>,
        relay_state: Arc<RelayState>,
        stopping: Stopping,
    ) -> Result<Self> {
        let metrics = Arc::<Metrics>::default();
        let (relay, relay_handle, wal_channels) = Relay::new(
            Arc::clone(&store),
            bus.clone(),
            Arc::clone(&metrics),
            Arc::clone(&relay_state),
        );
        let wal = store.wal().map(|wal| {
            let controller =
                RelayModeController::new(Arc::clone(&wal), Arc::clone(&relay_state), &wal_channels);
            let (store, metrics, state) = (
                Arc::clone(&store),
                Arc::clone(&metrics),
                Arc::clone(&relay_state),
            );
            (
                controller,
                WalRelay::new(store, wal, bus.clone(), metrics, state, wal_channels),
            )
        });
        let repair = Repair::new(
            Arc::clone(&store),
            bus.clone(),
            Arc::clone(&metrics),
            Arc::clone(&relay_state),
            retention.outputs,
        );
        let cache = open_cache(Arc::clone(&metrics))?;
        let (shared_store, shared_metrics) = (Arc::clone(&store), Arc::clone(&metrics));
        let ingress = Ingress::new(
            shared_store,
            relay_handle.clone(),
            shared_metrics,
            bus.clone(),
            admission,
            cache.clone(),
        );
        let services = Services {
            store,
            bus,
            engine,
            cache,
            metrics,
            health: Arc::default(),
            relay_state,
            relay: RelayLink::new(relay_handle),
        };
        let host = Arc::new(Host {
            services: Arc::new(services),
            retention,
            ingress: Arc::new(ingress),
            workers: Mutex::new(BTreeMap::new()),
            hold: std::sync::Mutex::default(),
            recovering: Mutex::new(()),
            starting_workers: std::sync::Mutex::default(),
            stopping,
            deployed: Notify::new(),
            workers_changed: Notify::new(),
            has_started: AtomicBool::new(false),
        });
        Ok(Parts {
            host,
            relay,
            repair,
            wal,
        })
    }
}

impl Default for HostTasks {
    fn default() -> Self {
        let group = TaskGroup::default;
        HostTasks {
            supervision: group(),
            wal: group(),
            relay: group(),
            lease: group(),
        }
    }
}

impl HostTasks {
    /// Takes the host's lease in the database and renews it until the host ends.
    async fn begin_lease(&mut self, store: &Arc<dyn Store>) -> Result<Arc<RelayState>> {
        let state = Arc::<RelayState>::default();
        lease::renew(store.as_ref(), &state)
            .await
            .context("take the host's lease in the database")?;
        self.lease.spawn(lease::run(
            Arc::clone(store),
            Arc::clone(&state),
            self.lease.stopping(),
        ));
        Ok(state)
    }

    /// Starts the relay. It stops claiming due outputs with the supervision, and ends after the
    /// last lane has handed over its outputs.
    fn start_relay(&mut self, parts: Parts) {
        let stopping = self.supervision.stopping();
        if let Some((keeper, reader)) = parts.wal {
            self.wal.spawn(keeper.run(stopping.clone()));
            self.wal.spawn(reader.run(self.wal.stopping()));
        }
        self.relay.spawn(parts.relay.run(stopping.clone()));
        self.relay.spawn(parts.repair.run(stopping));
    }

    /// Subscribes to invalidations, before anything is cached on this host.
    async fn listen_for_invalidations(&mut self, host: &Host) -> Result<()> {
        let invalidations = host
            .services
            .bus
            .feed(CACHE_STREAM)
            .await
            .context("subscribe to invalidations")?;
        let (cache, stopping) = (host.services.cache.clone(), self.supervision.stopping());
        self.relay
            .spawn(feed::listen(invalidations, cache, stopping));
        Ok(())
    }

    fn start_supervision(&mut self, host: &Arc<Host>, webhook: Option<WebhookClient>) {
        let stopping = self.supervision.stopping();
        let state = {
            let host = Arc::clone(host);
            move || {
                let host = Arc::clone(&host);
                async move { host.state_for_alarms().await }
            }
        };
        self.supervision
            .spawn(supervise(Arc::clone(host), stopping.clone()));
        self.supervision.spawn(monitor::watch(
            Arc::clone(&host.services),
            state,
            stopping.clone(),
        ));
        self.supervision
            .spawn(consistency::watch(Arc::clone(host), stopping.clone()));
        self.supervision
            .spawn(health_checks::watch(Arc::clone(host), stopping.clone()));
        if let Some(webhook) = webhook {
            let (bus, metrics) = (
                host.services.bus.clone(),
                Arc::clone(&host.services.metrics),
            );
            self.supervision
                .spawn(webhook::run(bus, webhook, metrics, stopping));
        }
    }

    /// Stops in order: pulling ends, lanes settle their messages, the relay publishes the outputs
    /// handed over.
    ///
    /// Work that is left after `limit` is resumed at the next start; nothing is lost.
    ///
    /// # Errors
    /// The limit has passed.
    pub async fn drain(self, host: &Host, limit: Duration) -> Result<()> {
        let HostTasks {
            supervision,
            wal,
            relay,
            lease,
        } = self;
        let drained = async {
            supervision.drain().await;
            host.drain_workers().await;
            wal.drain().await;
            relay.drain().await;
            // Unsent acks and nacks would delay the redelivery of their messages.
            if host.services.bus.is_connected() {
                let _ = host.services.bus.flush().await;
            }
        };
        let in_time = tokio::time::timeout(limit, drained).await;

        lease.drain().await;
        // A server that delays commits delays the close as well.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, host.services.store.close()).await;
        in_time.with_context(|| {
            format!("drain within {limit:?}; the remaining work is resumed at the next start")
        })
    }
}

/// Polls for deployments of other hosts and deletes expired rows.
async fn supervise(host: Arc<Host>, mut stopping: Stopping) {
    let mut prune_interval = tokio::time::interval(PRUNE_INTERVAL);
    let mut pruner = Pruner::default();
    let mut compiled_prune_interval = tokio::time::interval(COMPILED_PRUNE_INTERVAL);
    // A reconciliation may wait for a compilation. Later ones start the other workers meanwhile.
    let mut reconciliations = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stopping.stopped() => break,
            () = host.deployed.notified() => {
                reconciliations.spawn(try_reconcile(Arc::clone(&host)));
            }
            _ = tokio::time::sleep(DEPLOYMENT_POLL_INTERVAL) => {
                reconciliations.spawn(try_reconcile(Arc::clone(&host)));
            }
            // Rows that a recovery may need are not deleted.
            _ = prune_interval.tick(), if host.hold().is_none() => pruner.run(&host, &stopping).await,
            _ = compiled_prune_interval.tick() => {
                if let Err(error) = host.prune_compiled().await {
                    tracing::debug!(
                        error = format!("{error:#}"),
                        "failed to remove compiled components"
                    );
                }
            }
        }
        while reconciliations.try_join_next().is_some() {}
    }
    // A swap in progress completes; a preparation is cancelled.
    while reconciliations.join_next().await.is_some() {}
}

async fn try_reconcile(host: Arc<Host>) {
    if let Err(error) = host.reconcile().await {
        tracing::debug!(
            error = format!("{error:#}"),
            "failed to reconcile deployments, retrying"
        );
    }
}
