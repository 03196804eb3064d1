//! Retiring a worker: all hosts stop running it, and its consumers are removed.
//!
//! Its versions, inbox and dead letters stay.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Host, HostReport};
use crate::config::manifest::Worker;
use crate::model::hint::WithHint;
use crate::model::redrive::REDRIVE_STREAM;
use crate::store::DeploymentRecord;

/// How long to wait until other hosts have stopped a retired worker, and how often to poll them.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(250);

/// After how many reports a host is certainly up to date: the first one may have been in progress.
const REPORTS_UNTIL_CURRENT: u64 = 2;

/// The result of retiring a worker.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RetiredWorker {
    pub worker: String,
    /// The version that was active.
    pub version: u32,
    /// The consumers that were removed, each as `consumer of stream`.
    pub removed: Vec<String>,
}

impl Host {
    /// Stops workers that are not deployed any more.
    pub(super) async fn stop_retired_workers(&self, deployments: &[DeploymentRecord]) {
        let mut workers = self.workers.lock().await;
        let is_retired = |name: &String| {
            !deployments
                .iter()
                .any(|deployment| deployment.worker == *name)
        };
        let retired: Vec<String> = workers
            .keys()
            .filter(|name| is_retired(name))
            .cloned()
            .collect();
        if retired.is_empty() {
            return;
        }
        for name in retired {
            if let Some(running) = workers.remove(&name).and_then(|slot| slot.running) {
                running.drain().await;
                tracing::info!(worker = name, "retired worker stopped");
            }
        }
        self.update_routes(&workers).await;
        self.workers_changed.notify_one();
    }

    /// Retires a worker. Its consumers are removed once no host runs it, unless `keep_consumers` is
    /// set.
    ///
    /// # Errors
    /// The worker does not exist, or still runs on a host after 30 seconds.
    pub async fn retire(&self, worker: &str, keep_consumers: bool) -> Result<RetiredWorker> {
        // A worker that is retired already may still have consumers.
        let newest = match self.services.store.active_deployment(worker).await? {
            Some(active) => Some(active),
            None => self
                .services
                .store
                .deployments(worker)
                .await?
                .into_iter()
                .next(),
        };
        let active = newest
            .ok_or_else(|| anyhow!("there is no worker `{worker}`"))
            .hint("oncely workers")?;
        self.services.store.retire_worker(worker).await?;
        self.notify_deployed();
        self.wait_until_stopped(worker).await?;
        let removed = if keep_consumers {
            Vec::new()
        } else {
            self.remove_consumers(&active).await?
        };
        Ok(RetiredWorker {
            worker: worker.to_owned(),
            version: active.version,
            removed,
        })
    }

    /// Waits until no host runs the worker.
    async fn wait_until_stopped(&self, worker: &str) -> Result<()> {
        let end = Instant::now() + STOP_TIMEOUT;
        // Earlier reports do not count: their hosts could create the consumers again.
        let baseline = self.services.store.reports().await?;
        loop {
            let runs_here = match tokio::time::timeout(STOP_TIMEOUT, self.workers.lock()).await {
                Ok(workers) => workers.contains_key(worker),
                Err(_) => true,
            };
            let mut others = Vec::new();
            for report in self.services.store.reports().await? {
                let earlier = baseline
                    .iter()
                    .find(|earlier| earlier.instance == report.instance);
                let is_current = earlier.is_none_or(|earlier| {
                    report.number >= earlier.number.saturating_add(REPORTS_UNTIL_CURRENT)
                });
                match HostReport::parse(&report)? {
                    Some(read) if is_current && !read.workers.contains_key(worker) => {}
                    Some(read) => others.push(read.host),
                    None => others.push(format!("a host that is starting ({})", report.instance)),
                }
            }
            if !runs_here && others.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!(
                    "the worker is retired, but still drains on {}; its consumers are kept",
                    others.join(", ")
                );
            }
            tokio::time::sleep(STOP_POLL_INTERVAL).await;
        }
    }

    async fn remove_consumers(&self, deployment: &DeploymentRecord) -> Result<Vec<String>> {
        let worker: Worker =
            serde_json::from_str(&deployment.manifest).context("read the deployment's manifest")?;
        let mut removed = Vec::new();
        let Some(stream) = worker.stream.clone() else {
            return Ok(removed);
        };
        for stream in [stream, REDRIVE_STREAM.to_owned()] {
            let consumer = worker.durable();
            if self
                .services
                .bus
                .retire_consumer(&stream, &consumer)
                .await?
            {
                removed.push(format!("{consumer} of {stream}"));
            }
        }
        Ok(removed)
    }
}
