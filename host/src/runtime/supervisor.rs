//! Supervision: runs active deployments, switches versions, prunes components and expired rows.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;

use super::Host;
use super::retention::Pruner;
use super::worker_entry::{Slot, WorkerRuntime};
use crate::bus::ConsumerState;
use crate::config::manifest::Worker;
use crate::consumer::{PausedWorker, RunningWorker};
use crate::delivery::Delivery;
use crate::drain::Stopping;
use crate::fault;
use crate::ingress::{HttpWorker, RouteTable};
use crate::store::DeploymentRecord;

/// How often deployments made by other hosts are polled.
const DEPLOYMENT_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How often expired rows are deleted.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);

/// How often compiled components without a deployment are deleted, and their minimum age.
const COMPILED_PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);

impl Host {
    /// Starts, swaps and stops workers until they match the active deployments.
    ///
    /// Workers compile concurrently. A worker that is being started already is skipped.
    pub async fn reconcile(&self) -> Result<()> {
        let deployments = self.services.store.active_deployments().await?;
        self.apply_pauses().await?;
        self.stop_retired_workers(&deployments).await;
        futures::future::join_all(
            deployments
                .iter()
                .map(|deployment| self.run_deployment(deployment)),
        )
        .await;
        Ok(())
    }

    /// Notifies the supervisor of a deployment, a pause or its end.
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

        // Message workers are held while the database and NATS disagree. HTTP workers do not need
        // NATS.
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
        match self
            .services
            .store
            .active_deployment(&deployment.worker)
            .await
        {
            Ok(Some(active)) if active.version == deployment.version => {}
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
    pub(super) async fn update_routes(&self, workers: &BTreeMap<String, Slot>) {
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
        let pause = self.pause_of(&deployment.worker);
        let bus = &self.services.bus;
        let running = match (is_http, &pause) {
            (true, _) => {
                let worker = HttpWorker::new(delivery, digest);
                worker.set_paused(pause.is_some());
                WorkerRuntime::Requests(Arc::new(worker))
            }
            (false, None) => {
                let running = RunningWorker::start(delivery, digest, Arc::default(), bus, relay);
                WorkerRuntime::Messages(Box::new(running.await?))
            }
            (false, Some(_)) => {
                let paused = PausedWorker::new(delivery, digest, bus);
                WorkerRuntime::Paused(Box::new(paused.await?))
            }
        };
        tracing::info!(
            worker = deployment.worker,
            version = deployment.version,
            is_paused = pause.is_some(),
            "worker running"
        );
        let earlier = slot.running.as_ref().and_then(WorkerRuntime::requests);
        slot.earlier.extend(earlier);
        slot.running = Some(running);
        slot.pause = pause;
        (slot.broken, slot.consumer_state) = (None, ConsumerState::default());
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
    pub(super) async fn drain_message_workers(&self) {
        let mut workers = self.workers.lock().await;
        let taken = workers
            .values_mut()
            .filter_map(|slot| slot.running.take_if(|work| work.requests().is_none()));
        futures::future::join_all(taken.map(WorkerRuntime::drain)).await;
    }

    /// Closes the ingress and the link to the relay, then drains all workers.
    pub(super) async fn drain_workers(&self) {
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

/// Polls for deployments of other hosts and deletes expired rows.
pub(super) async fn supervise(host: Arc<Host>, mut stopping: Stopping) {
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
