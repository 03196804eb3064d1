//! Audits whose results are kept, for the books of the console.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinHandle;

use super::access::{Caller, StatedBy};
use super::activity::{on_object, recorded};
use super::{ApiError, ApiResult, audit};
use crate::audit::{Audit, AuditRequest};
use crate::model::hint::WithHint;
use crate::model::schema::Time;
use crate::runtime::Host;
use crate::store::{AuditRun, AuditRunResult, NewAuditRun};

/// The longest window of an audit without a waiting client.
pub const WINDOW_MAX: SignedDuration = SignedDuration::from_hours(24);

/// How many differences are kept of each audit.
const KEPT_MAX: usize = 200;

/// The maximum number of audits in one response.
const RUNS_MAX: u32 = 100;

/// How many audits are searched for a running one.
const RUNNING_READ: u32 = 20;

/// An audit to run in the background.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AuditRunRequest {
    /// The beginning of the window, at most 24 hours ago.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// Only this worker's messages; all workers by default.
    #[serde(default)]
    pub worker: Option<String>,
    #[serde(default)]
    pub by: StatedBy,
}

/// An audit with its state.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AuditRunState {
    #[serde(flatten)]
    pub run: AuditRun,
    /// Whether its host still runs it. An audit without an end that does not run was interrupted.
    pub is_running: bool,
}

/// An audit with its report.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AuditRunReport {
    #[serde(flatten)]
    pub state: AuditRunState,
    /// The report, with at most 200 differences; none without one.
    pub report: Option<Audit>,
}

/// Starts an audit, which this host runs in the background. One runs at a time.
pub async fn create(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<AuditRunRequest>,
) -> ApiResult<AuditRun> {
    check_window(request.since)?;
    let Json(known) = list(
        State(Arc::clone(&host)),
        Query(RunsQuery {
            limit: RUNNING_READ,
        }),
    )
    .await?;
    if let Some(running) = known.iter().find(|known| known.is_running) {
        let busy = anyhow!("audit {} is running", running.run.id);
        return Err(ApiError(
            StatusCode::CONFLICT,
            busy.hint("wait until it ends, or audit in a terminal: oncely audit"),
        ));
    }
    let caller = caller.stating(&request.by);
    let request = AuditRequest {
        since: request.since,
        worker: request.worker,
        repair: false,
    };
    let activity = on_object("audit", "the books", json!(request));
    let change = {
        let (host, caller) = (Arc::clone(&host), caller.clone());
        async move {
            let (id, _) = begin(&host, &caller, request).await?;
            let run = host.services.store.audit_run(id).await?;
            let (run, _) = run.ok_or_else(|| run_not_found(id))?;
            let recorded = json!({ "audit": run.id });
            Ok((run, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

fn check_window(since: Timestamp) -> anyhow::Result<()> {
    let age = Timestamp::now().duration_since(since);
    if age > WINDOW_MAX {
        return Err(anyhow!("the window begins more than 24 hours ago")
            .hint("audit longer windows in a terminal: oncely audit --since 7d"));
    }
    Ok(())
}

/// Runs an audit and keeps its result. It ends and is recorded also without its client.
pub(super) async fn run(
    host: &Arc<Host>,
    caller: &Caller,
    request: AuditRequest,
) -> ApiResult<Audit> {
    let (_, task) = begin(host, caller, request).await?;
    Ok(Json(task.await.context("complete the audit")??))
}

/// Records the start of an audit, and runs it in a task of its own.
async fn begin(
    host: &Arc<Host>,
    caller: &Caller,
    request: AuditRequest,
) -> anyhow::Result<(i64, JoinHandle<anyhow::Result<Audit>>)> {
    let new = NewAuditRun {
        worker: request.worker.clone(),
        since: request.since,
        is_repair: request.repair,
        host: host.name(),
    };
    let id = host
        .services
        .store
        .begin_audit_run(&new, &caller.actor)
        .await?;
    let host = Arc::clone(host);
    let task = tokio::spawn(async move {
        let result = audit::examine(&host, &request).await;
        let kept = kept(&result);
        // The client gets the result, also if it is not kept.
        if let Err(error) = host.services.store.end_audit_run(id, &kept).await {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(audit = id, error, "failed to record the result of an audit");
        }
        result
    });
    Ok((id, task))
}

/// The part of a result that is kept.
fn kept(result: &anyhow::Result<Audit>) -> AuditRunResult {
    match result {
        Ok(audit) => {
            let mut shortened = audit.clone();
            shortened.differences.truncate(KEPT_MAX);
            let report = serde_json::to_string(&shortened).map_err(|error| error.to_string())?;
            Ok((report, audit.total, audit.repaired))
        }
        Err(error) => Err(format!("{error:#}")),
    }
}

/// How many audits to list.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RunsQuery {
    pub limit: u32,
}

/// The newest audits.
pub async fn list(
    State(host): State<Arc<Host>>,
    Query(query): Query<RunsQuery>,
) -> ApiResult<Vec<AuditRunState>> {
    let runs = host
        .services
        .store
        .audit_runs(query.limit.min(RUNS_MAX))
        .await?;
    let hosts = live_hosts(&host).await?;
    let states = runs.into_iter().map(|run| state(run, &hosts));
    Ok(Json(states.collect()))
}

/// One audit with its report.
pub async fn show(State(host): State<Arc<Host>>, Path(id): Path<i64>) -> ApiResult<AuditRunReport> {
    let found = host.services.store.audit_run(id).await?;
    let (run, report) = found.ok_or_else(|| run_not_found(id))?;
    let hosts = live_hosts(&host).await?;
    // A report of another version of the host may have other parts.
    let report = report.and_then(|report| serde_json::from_str(&report).ok());
    Ok(Json(AuditRunReport {
        state: state(run, &hosts),
        report,
    }))
}

/// The names of the hosts that live.
async fn live_hosts(host: &Host) -> anyhow::Result<Vec<String>> {
    let reports = host.reports().await?;
    let others = reports.into_iter().map(|report| report.host);
    Ok(others.chain([host.name()]).collect())
}

fn state(run: AuditRun, hosts: &[String]) -> AuditRunState {
    AuditRunState {
        is_running: run.ended_at.is_none() && hosts.contains(&run.host),
        run,
    }
}

fn run_not_found(id: i64) -> ApiError {
    ApiError(
        StatusCode::NOT_FOUND,
        anyhow!("there is no audit {id}; the last 100 are kept").hint("oncely audit"),
    )
}
