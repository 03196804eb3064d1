//! The host: runs the deployed workers and the relay, and swaps versions without losing messages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::{Mutex, Notify};

use crate::config::HostConfig;
use crate::drain::Stopping;
use crate::ingress::Ingress;
use crate::services::Services;
use crate::store::{DeploymentRecord, Pause};

mod checkpoints;
mod consistency;
pub mod deploy;
mod health_checks;
mod history;
mod lease;
mod pauses;
pub mod plan_details;
mod recovery;
mod redrive_jobs;
mod retention;
mod retirement;
mod skipping;
mod start;
mod supervisor;
mod worker_entry;
mod worker_state;

pub use consistency::Hold;
pub use health_checks::{HostReport, WorkerReport, own_streams};
pub use pauses::DrainStatus;
pub use recovery::Recovery;
pub use retention::Retention;
pub use retirement::RetiredWorker;
pub use skipping::{SkipPlan, SkipTarget, SkippedPart};
pub use start::{HostOptions, HostTasks};
use worker_entry::Slot;
pub use worker_state::{RunState, WorkerState};

/// One running host.
pub struct Host {
    pub services: Arc<Services>,
    pub config: Arc<HostConfig>,
    pub retention: Retention,
    /// Answers HTTP requests.
    pub ingress: Arc<Ingress>,
    workers: Mutex<BTreeMap<String, Slot>>,
    /// The paused workers, as this host knows them.
    pauses: std::sync::Mutex<BTreeMap<String, Pause>>,
    /// Serializes reading and applying of pauses.
    pausing: Mutex<()>,
    /// The reason that workers and relay are held; none while they run.
    hold: std::sync::Mutex<Option<Hold>>,
    /// Serializes comparisons of the database and NATS, and recoveries.
    recovering: Mutex<()>,
    /// Workers whose active version is being prepared or swapped in.
    starting_workers: std::sync::Mutex<BTreeSet<String>>,
    /// Set once the host stops: no further worker is started.
    stopping: Stopping,
    deployed: Notify,
    /// Notified of a new or changed job.
    pub jobs_changed: Notify,
    /// Notified when the state of a worker changed, which other hosts may wait for.
    workers_changed: Notify,
    /// Whether the deployments made at the start are complete.
    has_started: AtomicBool,
}

impl Host {
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
                .map(|state| (state.state, &state.error))
            {
                Some((RunState::Running | RunState::Paused, _)) => {}
                Some((RunState::Broken, why)) => {
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

    /// The name of this host in reports: host name and process id.
    pub fn name(&self) -> String {
        health_checks::host_name()
    }

    /// Completes the start: the host can become ready.
    pub fn set_started(&self) {
        self.has_started.store(true, Ordering::Relaxed);
        self.ingress.set_started();
    }
}
