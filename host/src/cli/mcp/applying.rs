//! The tool that applies a plan: it reads the planned objects again, and refuses a plan whose
//! objects have changed.
//!
//! Where the control API takes the seen state as a precondition, the host checks it in the
//! transaction of the change. The check here comes first in any case, so that a plan that does not
//! hold as a whole changes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Session;
use super::answer::Answer;
use super::planning::dead_letters::{read_dead_letters, seen};
use super::planning::outputs::{read_outputs, seen_output};
use super::planning::workers::{drain_status, skip_plan};
use super::plans::{Change, Plan, SeenOutput};
use crate::api::dead_letters::{CloseAction, CloseRequest, EditRequest, PlannedRedrive};
use crate::api::jobs::{JobChange, JobItemsQuery, JobRequest};
use crate::api::operate::{PauseRequest, Resumed, SkipRequest};
use crate::api::outbox::{ParkedOutputsRequest, ParkedOutputsResponse};
use crate::api::{Activated, Deployment, RollbackRequest};
use crate::cli::client::Client;
use crate::model::hint::WithHint as _;
use crate::runtime::{SkipPlan, SkipTarget, SkippedPart};
use crate::store::{
    DeadLetterActionResult, JobAction, JobItem, JobState, Pause, RedriveJob, SeenDeadLetter,
};

/// How long `apply` waits for a redrive. A longer one goes on by itself.
const JOB_TIMEOUT: Duration = Duration::from_secs(15);

/// How often the job of a redrive is read meanwhile.
const JOB_INTERVAL: Duration = Duration::from_millis(200);

/// A plan to apply.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The id of a plan.
    plan: String,
}

pub async fn apply(session: Arc<Session>, arguments: Apply) -> Result<Answer> {
    if !session.may_apply {
        return Err(anyhow!("this server may not apply plans"))
            .hint("the user can start it with: oncely mcp --allow-apply");
    }
    let client = session.client()?;
    let plan = session.plans.take(&arguments.plan)?;
    ensure!(
        plan.host == client.base(),
        "the plan was made at another host"
    );
    let answer = match plan.change.clone() {
        Change::Redrive { dead_letters, seen } => {
            check_dead_letters(&client, &seen).await?;
            redrive(&client, &plan, dead_letters).await?
        }
        Change::Close { action, seen } => {
            check_dead_letters(&client, &seen).await?;
            close(&client, &plan, action, seen).await?
        }
        Change::Edit { seen, body } => {
            check_dead_letters(&client, &[seen]).await?;
            edit(&client, &plan, seen, &body).await?
        }
        Change::Pause { worker } => pause(&client, &plan, &worker).await?,
        Change::Resume { worker, pause } => resume(&client, &worker, &pause).await?,
        Change::Skip { plan: skipped } => skip(&client, &plan, skipped).await?,
        Change::Rollback { worker, from, to } => rollback(&client, worker, from, to).await?,
        Change::Outputs { is_drop, seen } => outputs(&client, &plan, is_drop, &seen).await?,
        Change::Job { id, action, seen } => change_job(&client, id, action, seen).await?,
    };
    Ok(answer.with("applied", plan.id).with("did", plan.does))
}

/// The error of a plan whose things have changed. Nothing was changed by it.
fn moved(what: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{what}; nothing was changed").hint("make a new plan")
}

async fn check_dead_letters(client: &Client, planned: &[SeenDeadLetter]) -> Result<()> {
    let ids: Vec<i64> = planned.iter().map(|one| one.id).collect();
    let now = read_dead_letters(client, &ids).await?;
    let changed = planned.iter().zip(&now);
    let changed = changed.filter(|(then, now)| **then != seen(now));
    let ids: Vec<String> = changed.map(|(then, _)| then.id.to_string()).collect();
    match ids.as_slice() {
        [] => Ok(()),
        [id] => Err(moved(format!(
            "dead letter {id} has changed since the plan"
        ))),
        ids => Err(moved(format!(
            "{} dead letters have changed since the plan: {}",
            ids.len(),
            ids.join(", ")
        ))),
    }
}

/// Redrives as a job: before each redrive, the host repeats its dry run.
async fn redrive(
    client: &Client,
    plan: &Plan,
    dead_letters: Vec<PlannedRedrive>,
) -> Result<Answer> {
    let request = JobRequest {
        plan: dead_letters,
        by: plan.by(),
        ..JobRequest::default()
    };
    let mut job: RedriveJob = client.post("/dead-letters/jobs", &request).await?;
    let end = Instant::now() + JOB_TIMEOUT;
    while !job.state.is_final() && Instant::now() < end {
        tokio::time::sleep(JOB_INTERVAL).await;
        job = client
            .get(&format!("/dead-letters/jobs/{}", job.id))
            .await?;
    }
    let query = JobItemsQuery {
        from: 0,
        limit: u32::try_from(request.plan.len()).unwrap_or(u32::MAX),
    };
    let path = format!("/dead-letters/jobs/{}/items", job.id);
    let items: Vec<JobItem> = client.get_with(&path, &query).await?;
    let refused: Vec<DeadLetterActionResult> = items
        .into_iter()
        .filter_map(|item| item.result)
        .filter(|result| result.refused.is_some())
        .collect();
    if let (true, 0, [first, ..]) = (job.state.is_final(), job.redriven, refused.as_slice()) {
        let why = first.refused.as_deref().unwrap_or_default();
        return Err(moved(format!("dead letter {}: {why}", first.id)));
    }
    Ok(Answer::default()
        .with("job", job.id)
        .with("state", job.state)
        .with("redriven", job.redriven)
        .with("refused", job.refused)
        .with(
            "next",
            "the worker handles them now; call verify with their ids",
        )
        .and_untrusted(json!({ "refused": refused, "job_error": job.error })))
}

/// The results of actions on dead letters.
fn results(results: &[DeadLetterActionResult]) -> Result<Answer> {
    let refused: Vec<&DeadLetterActionResult> = results
        .iter()
        .filter(|result| result.refused.is_some())
        .collect();
    if let (true, [first, ..]) = (refused.len() == results.len(), refused.as_slice()) {
        let why = first.refused.as_deref().unwrap_or_default();
        return Err(moved(format!("dead letter {}: {why}", first.id)));
    }
    Ok(Answer::default()
        .with("done", results.len() - refused.len())
        .with("refused", refused.len())
        .and_untrusted(json!({ "refused": refused })))
}

async fn close(
    client: &Client,
    plan: &Plan,
    action: CloseAction,
    seen: Vec<SeenDeadLetter>,
) -> Result<Answer> {
    let request = CloseRequest {
        ids: seen.iter().map(|one| one.id).collect(),
        action,
        by: plan.by(),
        seen,
    };
    let closed: Vec<DeadLetterActionResult> = client.post("/dead-letters/close", &request).await?;
    results(&closed)
}

async fn edit(client: &Client, plan: &Plan, seen: SeenDeadLetter, body: &[u8]) -> Result<Answer> {
    let request = EditRequest {
        body: STANDARD.encode(body),
        by: plan.by(),
        seen: Some(seen),
    };
    let path = format!("/dead-letters/{}/edit", seen.id);
    let edited: Vec<DeadLetterActionResult> = client.post(&path, &request).await?;
    Ok(results(&edited)?.with("next", "plan_redrive sends the corrected body"))
}

async fn pause(client: &Client, plan: &Plan, worker: &str) -> Result<Answer> {
    let status = drain_status(client, worker).await?;
    if status.pause.is_some() {
        return Err(moved(format!("worker {worker} was paused since the plan")));
    }
    let request = PauseRequest {
        note: Some(plan.note()),
    };
    // A worker that is paused already keeps its pause.
    let path = format!("/workers/{worker}/pause");
    let pause: Pause = client.post(&path, &request).await?;
    if pause.note != request.note {
        return Err(moved(format!("worker {worker} was paused since the plan")));
    }
    Ok(Answer::untrusted(pause))
}

async fn resume(client: &Client, worker: &str, planned: &Pause) -> Result<Answer> {
    let status = drain_status(client, worker).await?;
    if status.pause.as_ref() != Some(planned) {
        return Err(moved(format!(
            "the pause of worker {worker} is another one"
        )));
    }
    let resumed: Resumed = client
        .post(&format!("/workers/{worker}/resume"), &())
        .await?;
    Ok(Answer::default().with("was_paused", resumed.was_paused))
}

async fn skip(client: &Client, plan: &Plan, planned: SkipPlan) -> Result<Answer> {
    let worker = planned.worker.clone();
    let now = skip_plan(client, &worker, SkipTarget::To(planned.to)).await?;
    let is_same = now.stream == planned.stream
        && now.stream_created == planned.stream_created
        && now.subjects == planned.subjects
        && now.from == planned.from
        && now.pause == planned.pause;
    if !is_same {
        return Err(moved(format!("the backlog of worker {worker} has changed")));
    }
    let mut request = SkipRequest {
        from: planned.from,
        plan: planned,
        note: Some(plan.note()),
    };
    let path = format!("/workers/{worker}/skip");
    let (mut skipped, mut settled) = (0, 0);
    loop {
        let part: SkippedPart = client.post(&path, &request).await?;
        skipped += part.skipped.skipped;
        settled += part.skipped.settled;
        match part.next {
            Some(next) => request.from = next,
            None => break,
        }
    }
    Ok(Answer::default()
        .with("skipped", skipped)
        .with("settled_before", settled)
        .with(
            "next",
            "the worker is still paused; plan_resume ends the pause",
        ))
}

async fn rollback(client: &Client, worker: String, from: u32, to: u32) -> Result<Answer> {
    let path = format!("/workers/{worker}/deployments");
    let deployments: Vec<Deployment> = client.get(&path).await?;
    let active = deployments.iter().find(|one| one.active);
    if active.map(|one| one.version) != Some(from) {
        return Err(moved(format!("version {from} of {worker} is not active")));
    }
    let request = RollbackRequest {
        worker,
        to: Some(to),
        from: Some(from),
    };
    let activated: Activated = client.post("/rollback", &request).await?;
    Ok(Answer::default()
        .with("version", activated.version)
        .with("next", "call worker to see whether the hosts run it"))
}

async fn outputs(
    client: &Client,
    plan: &Plan,
    is_drop: bool,
    planned: &[SeenOutput],
) -> Result<Answer> {
    let numbers: Vec<i64> = planned.iter().map(|one| one.number).collect();
    let now = read_outputs(client, &numbers).await?;
    let mut pairs = planned.iter().zip(&now);
    if let Some((then, _)) = pairs.find(|(then, now)| **then != seen_output(now)) {
        let number = then.number;
        return Err(moved(format!("output {number} has changed since the plan")));
    }
    let request = ParkedOutputsRequest {
        numbers,
        note: plan.note(),
    };
    let path = match is_drop {
        true => "/outbox/drop",
        false => "/outbox/retry",
    };
    let done: ParkedOutputsResponse = client.post(path, &request).await?;
    Ok(Answer::default().with("outputs", done.outputs))
}

async fn change_job(client: &Client, id: i64, action: JobAction, seen: JobState) -> Result<Answer> {
    let path = format!("/dead-letters/jobs/{id}");
    let now: RedriveJob = client.get(&path).await?;
    if now.state != seen {
        return Err(moved(format!("job {id} is in another state")));
    }
    let changed: RedriveJob = client
        .post(&format!("{path}/change"), &JobChange { action })
        .await?;
    let counts: Value = json!({ "redriven": changed.redriven, "refused": changed.refused });
    Ok(Answer::default()
        .with("state", changed.state)
        .with("counts", counts))
}
