//! Plans for parked outputs and for redrive jobs.

use std::sync::Arc;

use anyhow::{Result, anyhow, ensure};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::{ITEMS_MAX, planned};
use crate::api::outbox::Output;
use crate::cli::client::Client;
use crate::cli::mcp::Session;
use crate::cli::mcp::answer::Answer;
use crate::cli::mcp::plans::{Change, SeenOutput};
use crate::cli::mcp::selection::{distinct, reason};
use crate::store::{JobAction, RedriveJob};

/// What to do with parked outputs.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputAction {
    /// Publish them again.
    Retry,
    /// Never publish them.
    Drop,
}

/// Parked outputs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Outputs {
    action: OutputAction,
    /// The numbers of parked outputs.
    numbers: Vec<i64>,
    /// Why this is done. The activity log keeps it.
    reason: String,
}

/// The outputs as they are now, in the order of `numbers`.
pub async fn read_outputs(client: &Client, numbers: &[i64]) -> Result<Vec<Output>> {
    let mut found = Vec::new();
    for number in numbers {
        found.push(client.get(&format!("/outbox/{number}")).await?);
    }
    Ok(found)
}

/// An output as it was read.
pub fn seen_output(output: &Output) -> SeenOutput {
    SeenOutput {
        number: output.summary.number,
        state: output.summary.state.clone(),
        failures: output.summary.failures,
        parked_at: output.summary.parked_at,
    }
}

pub async fn outputs(session: Arc<Session>, arguments: Outputs) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let numbers = distinct(&arguments.numbers, ITEMS_MAX)?;
    let client = session.client()?;
    let found = read_outputs(&client, &numbers).await?;
    if let Some(other) = found.iter().find(|one| one.summary.state != "parked") {
        let number = other.summary.number;
        return Err(anyhow!("output {number} is not parked"));
    }
    let (is_drop, verb) = match arguments.action {
        OutputAction::Retry => (false, "retry"),
        OutputAction::Drop => (true, "drop"),
    };
    let does = format!("{verb} {} parked outputs", numbers.len());
    let change = Change::Outputs {
        is_drop,
        seen: found.iter().map(seen_output).collect(),
    };
    let summaries: Vec<_> = found.iter().map(|one| &one.summary).collect();
    Ok(planned(&session, &client, does, reason, change)
        .and_untrusted(json!({ "outputs": summaries })))
}

/// What to do with a job.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OfJob {
    Pause,
    Resume,
    Cancel,
}

/// A job to change.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Job {
    action: OfJob,
    /// The number of the job.
    id: i64,
    /// Why this is done. It is shown with the plan.
    reason: String,
}

pub async fn job(session: Arc<Session>, arguments: Job) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let client = session.client()?;
    let id = arguments.id;
    let job: RedriveJob = client.get(&format!("/dead-letters/jobs/{id}")).await?;
    ensure!(!job.state.is_final(), "job {id} has ended");
    let (action, verb) = match arguments.action {
        OfJob::Pause => (JobAction::Pause, "pause"),
        OfJob::Resume => (JobAction::Resume, "resume"),
        OfJob::Cancel => (JobAction::Cancel, "cancel"),
    };
    let does = format!("{verb} job {id}");
    let change = Change::Job {
        id,
        action,
        seen: job.state,
    };
    Ok(planned(&session, &client, does, reason, change).and_untrusted(job))
}
