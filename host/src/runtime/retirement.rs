//! Retiring a worker: no host runs it any more, and its consumers leave their streams. Its versions, inbox and dead letters stay.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Host;
use crate::config::manifest::Worker;
use crate::model::hint::WithHint;
use crate::model::redrive::REDRIVE_STREAM;
use crate::store::DeploymentRecord;

/// How long it is waited for other hosts to let go of a retired worker, and how often it is asked.
const LET_GO_WITHIN: Duration = Duration::from_secs(30);
const LET_GO_YET: Duration = Duration::from_millis(250);

/// How many reports later a host has certainly heard: the first one may have been on its way.
const NEWER: u64 = 2;

/// What retiring a worker did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Retired {
    pub worker: String,
    /// The version that was active.
    pub version: u32,
    /// The consumers that were removed, each as `consumer of stream`.
    pub removed: Vec<String>,
}

impl Host {
    /// Ends workers that are deployed no more.
    pub(super) async fn take_down_retired(&self, deployments: &[DeploymentRecord]) {
        let mut workers = self.workers.lock().await;
        let is_retired = |name: &String| !deployments.iter().any(|deployment| deployment.worker == *name);
        let retired: Vec<String> = workers.keys().filter(|name| is_retired(name)).cloned().collect();
        if retired.is_empty() {
            return;
        }
        for name in retired {
            if let Some(running) = workers.remove(&name).and_then(|slot| slot.running) {
                running.drain().await;
                tracing::info!(worker = name, "retired: it does not run here any more");
            }
        }
        self.turn_ingress(&workers).await;
        self.reported.notify_one();
    }

    /// Retires a worker. Its consumers are removed, unless its place on the stream is to be kept, once no host runs it.
    pub async fn retire(&self, worker: &str, keeps_place: bool) -> Result<Retired> {
        // One that is retired already may have left its consumers behind.
        let newest = match self.services.active_deployment(worker).await? {
            Some(active) => Some(active),
            None => self.services.store.deployments(worker).await?.into_iter().next(),
        };
        let active = newest.ok_or_else(|| anyhow!("there is no worker `{worker}`")).hint("oncely workers")?;
        self.services.store.retire_worker(worker).await?;
        self.look_for_deployments();
        self.until_no_host_runs(worker).await?;
        let removed = if keeps_place { Vec::new() } else { self.remove_consumers(&active).await? };
        Ok(Retired { worker: worker.to_owned(), version: active.version, removed })
    }

    async fn until_no_host_runs(&self, worker: &str) -> Result<()> {
        let end = Instant::now() + LET_GO_WITHIN;
        // What a host said before it could hear of this is no answer: it would make the consumers again.
        let asked = self.services.store.reports().await?;
        loop {
            let here = match tokio::time::timeout(LET_GO_WITHIN, self.workers.lock()).await {
                Ok(workers) => workers.contains_key(worker),
                Err(_) => true,
            };
            let mut others = Vec::new();
            for report in self.services.store.reports().await? {
                let was = asked.iter().find(|was| was.instance == report.instance);
                let is_news = was.is_none_or(|was| report.number >= was.number.saturating_add(NEWER));
                match report.read()? {
                    Some(read) if is_news && !read.workers.contains_key(worker) => {}
                    Some(read) => others.push(read.host),
                    None => others.push(format!("a host that is starting ({})", report.instance)),
                }
            }
            if !here && others.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("the worker is retired, and still ends on {}; its consumers are kept", others.join(", "));
            }
            tokio::time::sleep(LET_GO_YET).await;
        }
    }

    async fn remove_consumers(&self, deployment: &DeploymentRecord) -> Result<Vec<String>> {
        let worker: Worker = serde_json::from_str(&deployment.manifest).context("read the deployment's manifest")?;
        let mut removed = Vec::new();
        let Some(stream) = worker.stream.clone() else { return Ok(removed) };
        for stream in [stream, REDRIVE_STREAM.to_owned()] {
            let consumer = worker.durable();
            if self.services.bus.retire_consumer(&stream, &consumer).await? {
                removed.push(format!("{consumer} of {stream}"));
            }
        }
        Ok(removed)
    }
}
