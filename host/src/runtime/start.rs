//! Start and stop of a host: named stages over groups of tasks, which end in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Mutex, Notify};

use super::supervisor::supervise;
use super::{
    Host, Retention, checkpoints, consistency, health_checks, history, lease, redrive_jobs,
};
use crate::alarms::WebhookClient;
use crate::alarms::{monitor, webhook};
use crate::bus::{Bus, LEADER_TIMEOUT};
use crate::cache::{Cache, feed};
use crate::config::{CacheSettings, HostConfig, TraceSettings};
use crate::drain::{Stopping, TaskGroup};
use crate::fault;
use crate::guest::{GuestEngine, SharedGuests};
use crate::ingress::Ingress;
use crate::metrics::Metrics;
use crate::model::invalidation::CACHE_STREAM;
use crate::model::request::Admission;
use crate::model::retry::Backoff;
use crate::model::signature::PublicKeys;
use crate::relay::{Relay, RelayModeController, RelayState, Repair, WalRelay};
use crate::services::{RelayLink, Services};
use crate::store::Store;
use crate::traces::Traces;

/// How long closing the database connections may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the export of the last spans may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The settings of a host.
pub struct HostOptions {
    pub config: Arc<HostConfig>,
    pub retention: Retention,
    pub admission: Admission,
    /// Posts alarms.
    pub webhook: Option<WebhookClient>,
    pub cache: CacheSettings,
    /// The keys by which components have to be signed; `None` if unsigned ones may run.
    pub component_keys: Option<PublicKeys>,
    pub traces: TraceSettings,
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
    /// Starts a host: its lease, its relay and all deployed workers.
    ///
    /// # Errors
    /// The host's own streams, its lease or its relay cannot be set up. A worker that cannot run is
    /// no error.
    pub async fn start(
        store: Arc<Store>,
        bus: Bus,
        engine: GuestEngine,
        mut options: HostOptions,
    ) -> Result<(Arc<Host>, HostTasks)> {
        health_checks::create_own_streams(&bus, options.config.receipts.is_some()).await?;
        let mut running = HostTasks::default();

        let relay_state = running.begin_lease(&store).await?;
        let stopping = running.supervision.stopping();
        let webhook = options.webhook.take();
        let parts = Parts::new(store, bus, engine, options, relay_state, stopping)?;
        let host = Arc::clone(&parts.host);

        // Nothing is published or consumed before the database and NATS are compared.
        let comparison = host
            .compare()
            .await
            .context("compare the database and NATS")?;
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
}

impl Parts {
    fn new(
        store: Arc<Store>,
        bus: Bus,
        engine: GuestEngine,
        options: HostOptions,
        relay_state: Arc<RelayState>,
        stopping: Stopping,
    ) -> Result<Self> {
        let metrics = Arc::<Metrics>::default();
        let traces = Traces::start(&options.traces, store.installation(), Arc::clone(&metrics))
            .context("set up the export of traces")?;
        let (relay, relay_handle, wal_channels) = Relay::new(
            Arc::clone(&store),
            bus.clone(),
            Arc::clone(&metrics),
            Arc::clone(&relay_state),
            traces.clone(),
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
            options.retention.outputs,
        );
        let cache = Cache::open(&options.cache, Arc::clone(&metrics))?;
        let (shared_store, shared_metrics) = (Arc::clone(&store), Arc::clone(&metrics));
        let ingress = Ingress::new(
            shared_store,
            relay_handle.clone(),
            shared_metrics,
            bus.clone(),
            options.admission,
            cache.clone(),
            traces.clone(),
        );
        let services = Services {
            store,
            bus,
            engine,
            guests: SharedGuests::default(),
            component_keys: options.component_keys,
            cache,
            metrics,
            traces,
            health: Arc::default(),
            relay_state,
            relay: RelayLink::new(relay_handle),
        };
        let host = Arc::new(Host {
            services: Arc::new(services),
            config: options.config,
            retention: options.retention,
            ingress: Arc::new(ingress),
            workers: Mutex::new(BTreeMap::new()),
            pauses: std::sync::Mutex::default(),
            pausing: Mutex::new(()),
            hold: std::sync::Mutex::default(),
            recovering: Mutex::new(()),
            starting_workers: std::sync::Mutex::default(),
            stopping,
            deployed: Notify::new(),
            jobs_changed: Notify::new(),
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
    async fn begin_lease(&mut self, store: &Arc<Store>) -> Result<Arc<RelayState>> {
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

    /// Starts the relay. It stops leasing due outputs with the supervision, and ends after the
    /// last lane has handed over its outputs.
    fn start_relay(&mut self, parts: Parts) {
        let stopping = self.supervision.stopping();
        if let Some((controller, reader)) = parts.wal {
            self.wal.spawn(controller.run(stopping.clone()));
            self.wal.spawn(reader.run(self.wal.stopping()));
        }
        self.relay.spawn(parts.relay.run(stopping.clone()));
        self.relay.spawn(parts.repair.run(stopping));
    }

    /// Subscribes to invalidations, before anything is cached on this host. The stream may be
    /// without a leader for a while, when a server has just ended.
    async fn listen_for_invalidations(&mut self, host: &Host) -> Result<()> {
        let (end, mut backoff) = (Instant::now() + LEADER_TIMEOUT, Backoff::default());
        let invalidations = loop {
            match host.services.bus.feed(CACHE_STREAM).await {
                Ok(feed) => break feed,
                Err(error) if Instant::now() < end => tracing::warn!(
                    error = format!("{error:#}"),
                    "failed to subscribe to invalidations, trying again"
                ),
                Err(error) => return Err(error).context("subscribe to invalidations"),
            }
            tokio::time::sleep(backoff.next(rand::random())).await;
        };
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
        self.supervision
            .spawn(redrive_jobs::run(Arc::clone(host), stopping.clone()));
        self.supervision
            .spawn(history::watch(Arc::clone(host), stopping.clone()));
        if let Some(interval) = host.config.receipts {
            self.supervision.spawn(checkpoints::watch(
                Arc::clone(host),
                interval,
                stopping.clone(),
            ));
        }
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
        host.services.traces.flush(FLUSH_TIMEOUT).await;
        // A server that delays commits delays the close as well.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, host.services.store.close()).await;
        in_time.with_context(|| {
            format!("drain within {limit:?}; the remaining work is resumed at the next start")
        })
    }
}
