//! Operation of workers in the control API: pause, resume, drain, skip.

use std::sync::Arc;

use anyhow::anyhow;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::access::Caller;
use super::activity::{on_worker, recorded, recorded_with_id};
use super::{ApiError, ApiResult, worker_not_found};
use crate::model::hint::WithHint;
use crate::runtime::{DrainStatus, Host, SkipPlan, SkipTarget, SkippedPart};
use crate::store::Pause;

/// A pause, with its reason.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct PauseRequest {
    #[serde(default)]
    pub note: Option<String>,
}

/// Pauses a worker on all hosts, which apply it within seconds. A paused one keeps its pause.
pub async fn pause(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(worker): Path<String>,
    Json(request): Json<PauseRequest>,
) -> ApiResult<Pause> {
    let activity = on_worker("pause", &worker, json!({ "note": request.note }));
    let by = caller.attribution(request.note);
    let change = {
        let host = Arc::clone(&host);
        async move {
            let pause = host.services.store.pause_worker(&worker, &by).await?;
            let pause = pause.ok_or_else(|| worker_not_found(&worker))?;
            host.notify_deployed();
            let recorded = json!({ "paused_at": pause.at });
            Ok((pause, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// The end of a pause.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Resumed {
    pub was_paused: bool,
}

/// Ends the pause of a worker on all hosts, which apply it within seconds.
pub async fn resume(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(worker): Path<String>,
) -> ApiResult<Resumed> {
    let activity = on_worker("resume", &worker, json!({}));
    let change = {
        let host = Arc::clone(&host);
        async move {
            let was_paused = host.services.store.resume_worker(&worker).await?;
            if !was_paused
                && host
                    .services
                    .store
                    .active_deployment(&worker)
                    .await?
                    .is_none()
            {
                return Err(worker_not_found(&worker));
            }
            host.notify_deployed();
            Ok((Resumed { was_paused }, json!({ "was_paused": was_paused })))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// How far a paused worker is drained.
pub(super) async fn drain(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
) -> ApiResult<DrainStatus> {
    let status = host.drain_status(&worker).await?;
    Ok(Json(status.ok_or_else(|| worker_not_found(&worker))?))
}

/// The messages to skip.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SkipPlanRequest {
    pub target: SkipTarget,
}

/// Plans to skip messages. Changes nothing.
pub(super) async fn skip_plan(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
    Json(request): Json<SkipPlanRequest>,
) -> ApiResult<SkipPlan> {
    Ok(Json(host.plan_skip(&worker, request.target).await?))
}

/// The next messages to skip of a plan.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SkipRequest {
    pub plan: SkipPlan,
    /// The sequence to continue at: `next` of the previous response, at first `from` of the plan.
    pub from: u64,
    #[serde(default)]
    pub note: Option<String>,
}

/// Skips the next messages of a plan, at most 1,000. The worker must be paused.
pub(super) async fn skip(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(worker): Path<String>,
    Json(request): Json<SkipRequest>,
) -> ApiResult<SkippedPart> {
    let SkipRequest { plan, from, note } = request;
    if plan.worker != worker {
        let error = anyhow!("the plan is for worker `{}`", plan.worker);
        return Err(ApiError(
            StatusCode::BAD_REQUEST,
            error.hint(format!("oncely skip {worker} --all --dry-run")),
        ));
    }
    let details = json!({ "stream": plan.stream, "stream_created": plan.stream_created,
        "from": from, "to": plan.to, "note": note });
    let activity = on_worker("skip", &worker, details);
    // The outcome is written with the skipped messages, in one transaction.
    let skip = {
        let host = Arc::clone(&host);
        |id| async move {
            let part = host.skip(&plan, from, id).await?;
            let recorded = json!(part.skipped);
            Ok((part, recorded))
        }
    };
    Ok(Json(
        recorded_with_id(&host, &caller, activity, skip).await?,
    ))
}
