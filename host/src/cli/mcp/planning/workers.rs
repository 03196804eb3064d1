//! Plans for workers: pause, resume, skip messages, roll back.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::planned;
use crate::api::operate::SkipPlanRequest;
use crate::api::{Deployment, WorkerOnHost};
use crate::cli::client::Client;
use crate::cli::mcp::Session;
use crate::cli::mcp::answer::Answer;
use crate::cli::mcp::plans::Change;
use crate::cli::mcp::selection::{parse_time, reason, worker_segment};
use crate::model::hint::WithHint as _;
use crate::runtime::{DrainStatus, RunState, SkipPlan, SkipTarget};

/// The maximum number of messages that a plan skips.
const SKIPPED_MAX: u64 = 100_000;

/// A worker, and the reason of a change.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfWorker {
    /// The name of the worker.
    worker: String,
    /// Why this is done. The activity log keeps it.
    reason: String,
}

pub async fn drain_status(client: &Client, worker: &str) -> Result<DrainStatus> {
    client.get(&format!("/workers/{worker}/drain")).await
}

pub async fn pause(session: Arc<Session>, arguments: OfWorker) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let worker = worker_segment(&arguments.worker)?.to_owned();
    let client = session.client()?;
    let status = drain_status(&client, &worker).await?;
    ensure!(status.pause.is_none(), "the worker is paused already");
    let does = format!("pause worker {worker} on all hosts");
    let change = Change::Pause { worker };
    Ok(planned(&session, &client, does, reason, change).and_untrusted(status))
}

pub async fn resume(session: Arc<Session>, arguments: OfWorker) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let worker = worker_segment(&arguments.worker)?.to_owned();
    let client = session.client()?;
    let status = drain_status(&client, &worker).await?;
    let pause = status.pause.clone().context("the worker is not paused")?;
    let does = format!("resume worker {worker} on all hosts");
    let change = Change::Resume { worker, pause };
    Ok(planned(&session, &client, does, reason, change).and_untrusted(status))
}

/// Messages to skip.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Skip {
    /// The name of the worker. It must be paused, with nothing in flight.
    worker: String,
    /// Skip messages up to this sequence of the stream, inclusive.
    to_sequence: Option<u64>,
    /// Skip messages stored before: a duration ago (`2h`), or a time (`2026-01-31T12:00:00Z`).
    until: Option<String>,
    /// Skip all messages that are on the stream now.
    #[serde(default)]
    all: bool,
    /// Why this is done. The activity log keeps it.
    reason: String,
}

pub async fn skip(session: Arc<Session>, arguments: Skip) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let target = match (arguments.to_sequence, &arguments.until, arguments.all) {
        (Some(sequence), None, false) => SkipTarget::To(sequence),
        (None, Some(time), false) => SkipTarget::Until(parse_time(time)?),
        (None, None, true) => SkipTarget::All,
        _ => return Err(anyhow!("give one of to_sequence, until and all")),
    };
    let worker = worker_segment(&arguments.worker)?;
    let client = session.client()?;
    let status = drain_status(&client, worker).await?;
    let is_idle = !status.hosts.is_empty() && status.hosts.iter().all(|host| host.is_drained);
    if status.pause.is_none() || !is_idle {
        return Err(anyhow!("the worker is not paused with nothing in flight"))
            .hint("plan_pause, apply, then plan_skip");
    }
    let plan = skip_plan(&client, worker, target).await?;
    ensure!(plan.messages_max > 0, "there are no messages to skip");
    ensure!(
        plan.messages_max <= SKIPPED_MAX,
        "{} messages are too many for one plan; the limit is {SKIPPED_MAX}",
        plan.messages_max
    );
    let does = format!(
        "skip at most {} messages of worker {worker}: sequences {} to {}",
        plan.messages_max, plan.from, plan.to
    );
    let shown = json!(plan);
    let change = Change::Skip { plan };
    Ok(planned(&session, &client, does, reason, change).and_untrusted(shown))
}

pub async fn skip_plan(client: &Client, worker: &str, target: SkipTarget) -> Result<SkipPlan> {
    let path = format!("/workers/{worker}/skip/plan");
    client.post(&path, &SkipPlanRequest { target }).await
}

/// A version to return to.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// The name of the worker.
    worker: String,
    /// The version; by default the one before the active one.
    to: Option<u32>,
    /// Why this is done. It is shown with the plan.
    reason: String,
}

pub async fn rollback(session: Arc<Session>, arguments: Rollback) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let worker = worker_segment(&arguments.worker)?.to_owned();
    let client = session.client()?;
    let path = format!("/workers/{worker}");
    let deployments: Vec<Deployment> = client.get(&format!("{path}/deployments")).await?;
    let hosts: Vec<WorkerOnHost> = client.get(&format!("{path}/hosts")).await?;
    let active = deployments.iter().find(|one| one.active);
    let from = active.context("the worker is retired")?.version;
    let earlier = || from.checked_sub(1).filter(|version| *version > 0);
    let to = arguments.to.or_else(earlier);
    let to = to.context("there is no earlier version")?;
    let is_known = deployments.iter().any(|one| one.version == to);
    ensure!(is_known && to != from, "version {to} cannot be activated");
    let is_running = |one: &&WorkerOnHost| {
        let status = one.status.as_ref();
        status.is_some_and(|status| status.state == RunState::Running)
    };
    let running = hosts.iter().filter(is_running).count();
    let does = format!(
        "activate version {to} of worker {worker} instead of version {from}, which runs on \
         {running} of {} hosts",
        hosts.len()
    );
    let shown: Vec<Deployment> = deployments
        .into_iter()
        .filter(|one| [from, to].contains(&one.version))
        .collect();
    let change = Change::Rollback { worker, from, to };
    Ok(planned(&session, &client, does, reason, change)
        .and_untrusted(json!({ "deployments": shown })))
}
