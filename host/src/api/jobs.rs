//! Jobs in the control API: redrives of many dead letters, which run on the hosts.

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::access::{Caller, StatedBy};
use super::activity::{on_object, recorded};
use super::dead_letters::PlannedRedrive;
use super::{ApiError, ApiResult};
use crate::model::hint::WithHint;
use crate::runtime::Host;
use crate::store::{
    DeadLetterFilter, DeadLetterSummary, JobAction, JobItem, NewActivity, NewJobItem,
    NewRedriveJob, RedriveJob, all_dead_letters,
};

/// The maximum number of jobs and of their dead letters in one response.
const JOBS_MAX: u32 = 1_000;
const ITEMS_MAX: u32 = 10_000;

/// Dead letters to redrive as a job. Exactly one of the three selections is set.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct JobRequest {
    /// In the order of their redrives.
    pub ids: Vec<i64>,
    /// All that match now, in the order of their streams.
    pub filter: Option<DeadLetterFilter>,
    /// Those of a plan, each if its preconditions still hold.
    pub plan: Vec<PlannedRedrive>,
    /// Dead letters per second; 0 for no limit.
    pub rate: u32,
    /// Redrive also dead letters that are in progress or closed.
    pub again: bool,
    pub by: StatedBy,
}

pub async fn create(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<JobRequest>,
) -> ApiResult<RedriveJob> {
    // The dead letters, each once.
    let dead_letters = selected(&host, &request).await?;
    let mut seen = HashSet::new();
    let dead_letters: Vec<NewJobItem> = dead_letters
        .into_iter()
        .filter(|item| seen.insert(item.id))
        .collect();

    // Create the job.
    let caller = caller.stating(&request.by);
    let worker = request
        .filter
        .as_ref()
        .and_then(|filter| filter.worker.clone());
    let object = format!("{} dead letters", dead_letters.len());
    let details = json!({ "dead_letters": dead_letters.len(), "filter": request.filter,
        "rate": request.rate, "again": request.again, "note": request.by.note });
    let activity = NewActivity {
        worker,
        ..on_object("dlq redrive", object, details)
    };
    let actor = caller.actor.clone();
    let job = NewRedriveJob {
        dead_letters,
        rate: request.rate,
        again: request.again,
        note: request.by.note,
    };
    let change = {
        let host = Arc::clone(&host);
        async move {
            let job = host.services.store.create_redrive_job(&job, &actor).await?;
            host.jobs_changed.notify_one();
            let recorded = json!({ "job": job.id });
            Ok((job, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// The selected dead letters, in the order of their redrives.
async fn selected(host: &Host, request: &JobRequest) -> anyhow::Result<Vec<NewJobItem>> {
    let selections = [
        !request.ids.is_empty(),
        request.filter.is_some(),
        !request.plan.is_empty(),
    ];
    if selections.iter().filter(|is_set| **is_set).count() != 1 {
        return Err(anyhow!(
            "a job has either `ids`, a `filter` or a `plan` of dead letters"
        ));
    }
    let item = |id| NewJobItem {
        id,
        generation: None,
        preconditions: None,
    };
    if let Some(filter) = &request.filter {
        let filter = DeadLetterFilter {
            limit: u32::MAX,
            ..filter.clone()
        };
        let mut found = all_dead_letters(&host.services.store, &filter).await?;
        found.sort_by(|one, other| one.stream_order().cmp(&other.stream_order()));
        return Ok(found
            .iter()
            .map(|found: &DeadLetterSummary| item(found.id))
            .collect());
    }
    let planned = |planned: &PlannedRedrive| {
        let preconditions = serde_json::to_string(&planned.preconditions);
        Ok(NewJobItem {
            id: planned.id,
            generation: Some(planned.preconditions.generation),
            preconditions: Some(preconditions.context("write a plan")?),
        })
    };
    match request.plan.is_empty() {
        true => Ok(request.ids.iter().copied().map(item).collect()),
        false => request.plan.iter().map(planned).collect(),
    }
}

/// How many jobs to list.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct JobsQuery {
    pub limit: u32,
}

/// The newest jobs.
pub async fn list(
    State(host): State<Arc<Host>>,
    Query(query): Query<JobsQuery>,
) -> ApiResult<Vec<RedriveJob>> {
    let limit = query.limit.min(JOBS_MAX);
    Ok(Json(host.services.store.redrive_jobs(limit).await?))
}

pub async fn show(State(host): State<Arc<Host>>, Path(id): Path<i64>) -> ApiResult<RedriveJob> {
    let job = host.services.store.redrive_job(id).await?;
    Ok(Json(job.ok_or_else(|| job_not_found(id))?))
}

/// Which dead letters of a job to list.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct JobItemsQuery {
    /// From this position on.
    #[serde(default)]
    pub from: u64,
    pub limit: u32,
}

/// Dead letters of a job with their results, in order.
pub async fn items(
    State(host): State<Arc<Host>>,
    Path(id): Path<i64>,
    Query(query): Query<JobItemsQuery>,
) -> ApiResult<Vec<JobItem>> {
    let limit = query.limit.min(ITEMS_MAX);
    let store = &host.services.store;
    Ok(Json(store.redrive_job_items(id, query.from, limit).await?))
}

/// A change of a job.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct JobChange {
    pub action: JobAction,
}

/// Pauses, resumes or cancels a job.
pub async fn change(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(id): Path<i64>,
    Json(request): Json<JobChange>,
) -> ApiResult<RedriveJob> {
    let verb = match request.action {
        JobAction::Pause => "dlq jobs pause",
        JobAction::Resume => "dlq jobs resume",
        JobAction::Cancel => "dlq jobs cancel",
    };
    let activity = on_object(verb, format!("job {id}"), json!({}));
    let change = {
        let host = Arc::clone(&host);
        async move {
            let store = &host.services.store;
            let job = store.change_redrive_job(id, request.action).await?;
            let job = job.ok_or_else(|| job_not_found(id))?;
            host.jobs_changed.notify_one();
            let recorded = json!({ "redriven": job.redriven, "total": job.total });
            Ok((job, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

fn job_not_found(id: i64) -> ApiError {
    ApiError(
        StatusCode::NOT_FOUND,
        anyhow!("there is no job {id}").hint("oncely dlq jobs"),
    )
}
