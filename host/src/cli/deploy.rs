//! `oncely deploy`, `oncely rollback` and `oncely retire`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::build::{BuiltComponent, EnvironmentArg, ToolchainArg};
use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::{rollout, term};
use crate::api::{Activated, RetireRequest, RollbackRequest, Uploaded};
use crate::config::manifest::{Manifest, Worker, WorkerEntry};
use crate::model::sql::Dialect;
use crate::runtime::RetiredWorker;
use crate::runtime::deploy::{Plan, Proposal};
use crate::runtime::plan_details::{Action, PlanDetails};
use crate::store::WorkerMigration;

/// Build, check and deploy the workers of a manifest.
///
/// Running hosts switch to the new version without a restart.
///
/// Exit codes of --plan: 0 if nothing would change, 10 if something would.
#[derive(Debug, Args)]
pub struct Deploy {
    /// Deploy these manifests, or folders that contain an oncely.toml.
    #[arg(default_value = ".")]
    manifests: Vec<PathBuf>,
    /// Show the plan without executing it. Exit with 10 if something would change.
    #[arg(long)]
    plan: bool,
    /// Show the plan without executing it. Exit with 0 even if something would change.
    #[arg(long, conflicts_with = "plan")]
    dry_run: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "plan")]
    json: bool,
    /// Skip the wait until the hosts run the new version.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    toolchain: ToolchainArg,
    #[command(flatten)]
    environment: EnvironmentArg,
    #[command(flatten)]
    host: HostArgs,
}

impl Deploy {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let mut plans = Vec::new();
        for path in &self.manifests {
            let manifest = Manifest::load(path, self.environment.name())?;
            manifest.warnings().iter().for_each(term::warning);
            for entry in &manifest.workers {
                plans.push(self.deploy(&client, &manifest, entry).await?);
            }
        }
        if !self.plan {
            return Ok(());
        }

        // The result of --plan.
        let document = PlanDocument::new(&plans);
        if self.json {
            term::json(&document)?;
        }
        match document.changes {
            false => Ok(()),
            true => Err(Exit::Changes
                .with_message("the deployment would change something")
                .into()),
        }
    }

    async fn deploy(
        &self,
        client: &Client,
        manifest: &Manifest,
        entry: &WorkerEntry,
    ) -> Result<Plan> {
        let mut built = BuiltComponent::build(entry, self.toolchain).await?;
        let dialect: Dialect = client.get("/dialect").await?;
        let wasm = std::mem::take(&mut built.wasm);
        let uploaded: Uploaded = client
            .upload("/components", wasm)
            .await
            .with_context(|| built.error_context(entry))?;
        let proposal = propose(manifest, entry, built, uploaded.digest, dialect).await?;
        let plan: Plan = client.post("/plan", &proposal).await?;
        if !self.json {
            show_plan(&plan);
        }
        if self.plan || self.dry_run {
            return Ok(plan);
        }
        let activated: Activated = client.post("/deploy", &proposal).await?;
        rollout::wait(client, &activated, plan.changes.is_empty(), self.no_wait).await?;
        Ok(plan)
    }
}

/// The output of `--plan --json`. `docs/deploying.md` documents it.
#[derive(Debug, Serialize)]
struct PlanDocument<'p> {
    /// The version of this format.
    format: u32,
    /// Whether a deployment would change something.
    changes: bool,
    workers: Vec<PlannedWorker<'p>>,
}

#[derive(Debug, Serialize)]
struct PlannedWorker<'p> {
    worker: &'p str,
    /// The active version; null for a new worker.
    version: Option<u32>,
    #[serde(flatten)]
    details: &'p PlanDetails,
}

impl<'p> PlanDocument<'p> {
    fn new(plans: &'p [Plan]) -> Self {
        let worker = |plan: &'p Plan| PlannedWorker {
            worker: &plan.worker,
            version: plan.from,
            details: &plan.details,
        };
        PlanDocument {
            format: 1,
            changes: plans.iter().any(|plan| plan.details.action != Action::None),
            workers: plans.iter().map(worker).collect(),
        }
    }
}

/// The proposal for the host, sent after the component.
pub async fn propose(
    manifest: &Manifest,
    entry: &WorkerEntry,
    mut built: BuiltComponent,
    digest: String,
    dialect: Dialect,
) -> Result<Proposal> {
    let migrations: Vec<WorkerMigration> = entry.migrations_for(dialect)?;
    Ok(Proposal {
        worker: Worker {
            component: built.reference().cloned(),
            ..entry.worker.clone()
        },
        digest,
        streams: manifest.streams.clone(),
        migrations,
        signature: built.signature().await?,
    })
}

/// Prints the changes of a deployment.
pub fn show_plan(plan: &Plan) {
    match (plan.from, plan.changes.is_empty()) {
        (Some(version), true) => term::note(format!(
            "worker {}: nothing changes, version {version} stays",
            plan.worker
        )),
        (Some(version), false) => term::note(format!(
            "worker {}: changes compared with version {version}",
            plan.worker
        )),
        (None, _) => term::note(format!("worker {}: new", plan.worker)),
    }
    plan.changes
        .iter()
        .for_each(|line| term::note(format!("  {line}")));
}

/// Activate an earlier version of a worker.
#[derive(Debug, Args)]
pub struct Rollback {
    /// Roll back this worker.
    worker: String,
    /// Activate this version. Default: the one before the active one.
    #[arg(long)]
    to: Option<u32>,
    /// Skip the wait until the hosts run that version.
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
            from: None,
        };
        let activated: Activated = client.post("/rollback", &request).await?;
        rollout::wait(&client, &activated, false, self.no_wait).await
    }
}

/// Retire a worker: hosts stop running it, and its consumers are removed.
///
/// Its versions, inbox and dead letters stay. Deployed again, it starts with the oldest message on
/// its stream and skips messages that it has handled.
#[derive(Debug, Args)]
pub struct Retire {
    /// Retire this worker.
    worker: String,
    /// Keep the consumers with their position on the stream; new messages wait there.
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
