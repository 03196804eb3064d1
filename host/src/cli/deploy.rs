//! `oncely deploy` and `oncely rollback`: show the plan, then act.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::build::{BuiltComponent, ToolchainArg};
use super::client::{Client, HostArgs};
use super::{rollout, term};
use crate::api::{Activated, RetireRequest, RollbackRequest, Uploaded};
use crate::config::manifest::{Manifest, WorkerEntry};
use crate::model::sql::Dialect;
use crate::runtime::RetiredWorker;
use crate::runtime::deploy::{Plan, Proposal};
use crate::store::WorkerMigration;

/// Builds, checks and deploys the workers of a manifest. Running hosts pick the new version up without a restart.
#[derive(Debug, Args)]
pub struct Deploy {
    /// Manifests, or folders that hold an oncely.toml.
    #[arg(default_value = ".")]
    manifests: Vec<PathBuf>,
    /// Show the plan and stop there.
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until the hosts run the new version.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    toolchain: ToolchainArg,
    #[command(flatten)]
    host: HostArgs,
}

impl Deploy {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        for path in &self.manifests {
            let manifest = Manifest::load(path)?;
            manifest.warnings().iter().for_each(term::warning);
            for entry in &manifest.workers {
                self.deploy(&client, &manifest, entry).await?;
            }
        }
        Ok(())
    }

    async fn deploy(
        &self,
        client: &Client,
        manifest: &Manifest,
        entry: &WorkerEntry,
    ) -> Result<()> {
        let built = BuiltComponent::build(entry, self.toolchain)?;
        let error_context = built.error_context(entry);
        let dialect: Dialect = client.get("/dialect").await?;
        let uploaded: Uploaded = client
            .upload("/components", built.wasm)
            .await
            .context(error_context)?;
        let proposal = propose(manifest, entry, uploaded.digest, dialect)?;
        let plan: Plan = client.post("/plan", &proposal).await?;
        show_plan(&plan);
        if self.dry_run {
            return Ok(());
        }
        let activated: Activated = client.post("/deploy", &proposal).await?;
        rollout::wait(client, &activated, self.no_wait).await
    }
}

/// What goes to the host beside the component.
pub fn propose(
    manifest: &Manifest,
    entry: &WorkerEntry,
    digest: String,
    dialect: Dialect,
) -> Result<Proposal> {
    let migrations: Vec<WorkerMigration> = entry.migrations_for(dialect)?;
    Ok(Proposal {
        worker: entry.worker.clone(),
        digest,
        streams: manifest.streams.clone(),
        migrations,
    })
}

/// Shows what a deployment changes.
pub fn show_plan(plan: &Plan) {
    match (plan.from, plan.changes.is_empty()) {
        (Some(version), true) => term::note(format!(
            "worker {}: nothing changes, version {version} stays",
            plan.worker
        )),
        (Some(version), false) => term::note(format!(
            "worker {}: changes to version {version}",
            plan.worker
        )),
        (None, _) => term::note(format!("worker {}: new", plan.worker)),
    }
    plan.changes
        .iter()
        .for_each(|line| term::note(format!("  {line}")));
}

/// Activates an earlier version of a worker.
#[derive(Debug, Args)]
pub struct Rollback {
    worker: String,
    /// The version; the one before the active one when not given.
    #[arg(long)]
    to: Option<u32>,
    /// Do not wait until the hosts run that version.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Rollback {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let request = RollbackRequest {
            worker: self.worker,
            to: self.to,
        };
        let activated: Activated = client.post("/rollback", &request).await?;
        rollout::wait(&client, &activated, self.no_wait).await
    }
}

/// Retires a worker: no host runs it any more, and its consumers leave their streams. Its versions, inbox and dead letters stay.
/// Deployed again it begins with the oldest message that its stream still has, and skips the messages it has handled.
#[derive(Debug, Args)]
pub struct Retire {
    worker: String,
    /// Keep the consumers, and with them the place on the stream: messages go on to wait there.
    #[arg(long)]
    keep_consumers: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Retire {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let request = RetireRequest {
            worker: self.worker,
            keep_consumers: self.keep_consumers,
        };
        let retired: RetiredWorker = client.post("/retire", &request).await?;
        term::data(format!(
            "worker {} is retired; version {} was active",
            retired.worker, retired.version
        ))?;
        retired
            .removed
            .iter()
            .for_each(|consumer| term::note(format!("  removed the consumer {consumer}")));
        Ok(())
    }
}
