//! The control API, which the CLI uses: JSON over HTTP on the loopback interface, protected by a
//! token.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::bus::OutgoingMessage;
use crate::config::manifest::Worker;
use crate::model::alarm::Alarm;
use crate::model::hint::{self, WithHint};
use crate::model::message;
use crate::model::oci::Reference;
use crate::model::redrive;
use crate::model::schema::Time;
use crate::model::sql::Dialect;
use crate::model::subject;
use crate::relay::{BreakerState, RefusedSubject};
use crate::runtime::deploy::{self, Plan, Proposal};
use crate::runtime::{Host, HostReport, Recovery, RetiredWorker, WorkerReport, WorkerState};
use crate::store::{DeploymentRecord, StateRecord, StoreError, WalState, WorkerTotals};

mod access;
pub mod activity;
mod audit;
pub mod audit_runs;
pub mod dead_letters;
mod doctor;
mod endpoints;
pub mod groups;
pub mod jobs;
pub mod openapi;
pub mod operate;
pub mod outbox;
mod receipts;
pub mod tokens;

pub use access::{Authenticator, Caller, STATED_NAME_HEADER, StatedBy, bearer_token};
use activity::{on_object, on_worker, recorded};
pub use receipts::ReceiptRequest;

/// The maximum body of requests other than component uploads, in bytes.
const BODY_MAX: usize = 16 << 20;

/// The routes of the control API. Everything below `/v1`, and its description, requires
/// `Authorization: Bearer {token}`, with the token of the host or a named one.
pub fn router(host: Arc<Host>, authenticator: Arc<Authenticator>) -> Router {
    let mut authenticated = Router::new();
    for endpoint in endpoints::all() {
        authenticated = authenticated.route(endpoint.path, endpoint.guarded());
    }
    let authenticate = middleware::from_fn_with_state(authenticator, access::authenticate);
    let authenticated = authenticated
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(authenticate.clone());
    Router::new()
        .route("/openapi.json", get(openapi::serve).layer(authenticate))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .nest("/v1", authenticated)
        .with_state(host)
}

/// An error for the CLI, which shows it like its own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ErrorResponse {
    pub error: String,
    pub causes: Vec<String>,
    pub hints: Vec<String>,
}

/// A refused request: the status, and the error with its causes and hints.
pub struct ApiError(pub StatusCode, pub anyhow::Error);

/// The result of a handler.
pub type ApiResult<T> = std::result::Result<Json<T>, ApiError>;

impl<E: Into<anyhow::Error>> From<E> for ApiError {
    fn from(error: E) -> Self {
        let error = error.into();
        let unavailable = hint::find_cause::<StoreError>(&error)
            .is_some_and(|error| matches!(error, StoreError::Unavailable(_)));
        ApiError(
            if unavailable {
                StatusCode::SERVICE_UNAVAILABLE
            } else {
                StatusCode::BAD_REQUEST
            },
            error,
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let response = ErrorResponse::from(&self.1);
        (self.0, Json(response)).into_response()
    }
}

impl From<&anyhow::Error> for ErrorResponse {
    fn from(error: &anyhow::Error) -> Self {
        let mut chain = error.chain().map(ToString::to_string);
        ErrorResponse {
            error: chain.next().unwrap_or_default(),
            causes: chain.collect(),
            hints: hint::hints(error).into_iter().map(str::to_owned).collect(),
        }
    }
}

/// The control API of a host that is starting: it is alive and not ready.
pub fn starting() -> Router {
    let not_ready = || async {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: the host is starting\n",
        )
    };
    Router::new()
        .route("/livez", get(livez))
        .fallback(not_ready)
}

async fn livez() -> &'static str {
    "alive\n"
}

async fn readyz(State(host): State<Arc<Host>>) -> Response {
    match host.readiness().await {
        Ok(broken) => {
            let broken: String = broken.iter().map(|why| format!("{why}\n")).collect();
            format!("ready\n{broken}").into_response()
        }
        Err(why) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {why}\n"),
        )
            .into_response(),
    }
}

/// The metrics in the text format of Prometheus. They contain neither ids nor subjects, so no token
/// is needed.
async fn metrics(State(host): State<Arc<Host>>) -> Response {
    match host.metrics_text().await {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The status of a host.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// The version of the host program.
    pub version: String,
    pub ready: bool,
    /// The reason that it is not ready.
    pub not_ready: Option<String>,
    /// The workers that cannot run although the host is ready, each with the reason.
    #[serde(default)]
    pub broken: Vec<String>,
    /// The reason that the database takes no writes; none when it does.
    #[serde(default)]
    pub database_error: Option<String>,
    pub nats_connected: bool,
    pub workers: Vec<WorkerState>,
    /// The breakers of this host's relay, by stream.
    pub breakers: Vec<BreakerState>,
    /// Refused subjects that outputs of this host's relay wait for, at most 20.
    pub refused_subjects: Vec<RefusedSubject>,
    /// The relay mode; none where polling is the only one.
    pub wal: Option<WalState>,
    /// Whether this host reads the WAL.
    pub is_wal_reader: bool,
    /// The totals of all hosts on this database; none when it is unavailable.
    pub totals: Option<Vec<WorkerTotals>>,
    /// The raised alarms; none when the database is unavailable.
    pub alarms: Option<Vec<Alarm>>,
}

async fn status(State(host): State<Arc<Host>>) -> ApiResult<Status> {
    Ok(Json(Status {
        totals: host.services.store.totals().await.ok(),
        ..current_status(&host).await
    }))
}

/// The status without the totals, whose cost grows with the inbox.
pub async fn current_status(host: &Host) -> Status {
    let (not_ready, broken) = match host.readiness().await {
        Ok(broken) => (None, broken),
        Err(why) => (Some(why), Vec::new()),
    };
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready: not_ready.is_none(),
        not_ready,
        broken,
        database_error: host.services.health.database_error(),
        nats_connected: host.services.bus.is_connected(),
        workers: host.workers_with_backlog().await,
        breakers: host.services.relay_state.breakers(),
        refused_subjects: host.services.relay_state.refused_subjects(),
        wal: host.services.relay_state.wal(),
        is_wal_reader: host.services.relay_state.reads_wal(),
        totals: None,
        alarms: host
            .services
            .store
            .alarms()
            .await
            .ok()
            .map(|alarms| alarms.into_iter().filter(Alarm::is_raised).collect()),
    }
}

/// The database of the host, by which migrations are chosen.
async fn dialect(State(host): State<Arc<Host>>) -> Json<Dialect> {
    Json(host.services.store.dialect())
}

async fn workers(State(host): State<Arc<Host>>) -> ApiResult<Vec<WorkerState>> {
    Ok(Json(host.workers().await))
}

/// One deployment in the history of a worker.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Deployment {
    pub version: u32,
    pub digest: String,
    /// The registry that the component came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<Reference>,
    #[schemars(with = "Time")]
    pub created_at: jiff::Timestamp,
    pub active: bool,
}

pub async fn deployments(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
) -> ApiResult<Vec<Deployment>> {
    let records = host.services.store.deployments(&worker).await?;
    Ok(Json(shown_deployments(&host, &worker, records).await?))
}

/// The last deployments of a worker, newest first, and the active one wherever it is.
///
/// # Errors
/// The worker was never deployed, or the database failed.
pub async fn last_deployments(
    host: &Host,
    worker: &str,
    limit: u32,
) -> Result<Vec<Deployment>, ApiError> {
    let store = &host.services.store;
    let mut records = store.last_deployments(worker, limit).await?;
    let active = store.active_deployments().await?;
    let active = active.into_iter().find(|record| record.worker == worker);
    let is_missing = |active: &DeploymentRecord| {
        let mut listed = records.iter();
        listed.all(|record| record.version != active.version)
    };
    if let Some(active) = active.filter(is_missing) {
        records.push(active);
    }
    shown_deployments(host, worker, records).await
}

async fn shown_deployments(
    host: &Host,
    worker: &str,
    records: Vec<DeploymentRecord>,
) -> Result<Vec<Deployment>, ApiError> {
    if records.is_empty() {
        return Err(worker_not_found(worker));
    }
    let active = host.services.store.active_deployments().await?;
    let is_active = |version| {
        active
            .iter()
            .any(|record| record.worker == worker && record.version == version)
    };
    let shown = records.into_iter().map(|record| Deployment {
        active: is_active(record.version),
        version: record.version,
        component: serde_json::from_str(&record.manifest)
            .ok()
            .and_then(|worker: Worker| worker.component),
        digest: record.digest,
        created_at: record.created_at,
    });
    Ok(shown.collect())
}

/// The digest of an uploaded component.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Uploaded {
    pub digest: String,
}

/// Stores a component, after checking that it is a worker.
async fn upload(State(host): State<Arc<Host>>, caller: Caller, wasm: Bytes) -> ApiResult<Uploaded> {
    // Before the activity: compiling ends with its client.
    host.services.check_component(wasm.clone()).await?;
    let activity = on_object("upload", "component", json!({ "bytes": wasm.len() }));
    let services = Arc::clone(&host.services);
    let change = async move {
        let digest = services.store_component(wasm).await?;
        let recorded = json!({ "digest": digest });
        Ok((Uploaded { digest }, recorded))
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// A stored component, byte for byte.
async fn component(
    State(host): State<Arc<Host>>,
    Path(digest): Path<String>,
) -> std::result::Result<Vec<u8>, ApiError> {
    let found = host.services.store.component(&digest).await?;
    found.ok_or_else(|| {
        ApiError(
            StatusCode::NOT_FOUND,
            anyhow!("there is no component {digest}"),
        )
    })
}

async fn plan(State(host): State<Arc<Host>>, Json(proposal): Json<Proposal>) -> ApiResult<Plan> {
    Ok(Json(deploy::plan(&host, &proposal).await?))
}

/// The deployment that is active now.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Activated {
    pub worker: String,
    pub version: u32,
}

async fn deploy(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(proposal): Json<Proposal>,
) -> ApiResult<Activated> {
    let details = json!({ "digest": proposal.digest, "component": proposal.worker.component });
    let activity = on_worker("deploy", &proposal.worker.name, details);
    let change = {
        let host = Arc::clone(&host);
        async move {
            let (_, record) = deploy::deploy(&host, &proposal).await?;
            let recorded = json!({ "version": record.version });
            Ok((activated(record), recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

fn activated(record: DeploymentRecord) -> Activated {
    Activated {
        worker: record.worker,
        version: record.version,
    }
}

/// The worker to roll back, and the version; by default the one before the active one.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RollbackRequest {
    pub worker: String,
    pub to: Option<u32>,
    /// Refuse unless this version is active.
    #[serde(default)]
    pub from: Option<u32>,
}

pub async fn rollback(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<RollbackRequest>,
) -> ApiResult<Activated> {
    let activity = on_worker("rollback", &request.worker, json!({ "to": request.to }));
    let change = {
        let host = Arc::clone(&host);
        async move {
            if let Some(from) = request.from {
                check_active(&host, &request.worker, from).await?;
            }
            let record = deploy::rollback(&host, &request.worker, request.to).await?;
            let recorded = json!({ "version": record.version });
            Ok((activated(record), recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// Fails unless this version of a worker is active.
async fn check_active(host: &Host, worker: &str, version: u32) -> Result<(), ApiError> {
    let active = host.services.store.active_deployment(worker).await?;
    let active = active.ok_or_else(|| worker_not_found(worker))?;
    if active.version == version {
        return Ok(());
    }
    let error = anyhow!("version {} of {worker} is active now", active.version)
        .hint(format!("oncely workers {worker}"));
    Err(ApiError(StatusCode::CONFLICT, error))
}

/// The worker to retire.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RetireRequest {
    pub worker: String,
    /// Whether to keep its consumers.
    pub keep_consumers: bool,
}

pub async fn retire(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<RetireRequest>,
) -> ApiResult<RetiredWorker> {
    let details = json!({ "keep_consumers": request.keep_consumers });
    let activity = on_worker("retire", &request.worker, details);
    let change = {
        let host = Arc::clone(&host);
        async move {
            let retired = host.retire(&request.worker, request.keep_consumers).await?;
            let recorded = json!({ "version": retired.version, "removed": retired.removed });
            Ok((retired, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// The state of a worker on one of the live hosts.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct WorkerOnHost {
    pub host: String,
    /// None when that host has not started the worker yet.
    pub status: Option<WorkerReport>,
}

pub async fn hosts(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
) -> ApiResult<Vec<WorkerOnHost>> {
    let reports = host.reports().await?;
    let on_host = |mut report: HostReport| WorkerOnHost {
        status: report.workers.remove(&worker),
        host: report.host,
    };
    Ok(Json(reports.into_iter().map(on_host).collect()))
}

/// A recovery after a restore, and who requests it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RecoverRequest {
    /// Only plan the recovery.
    pub dry_run: bool,
    #[serde(default)]
    pub by: StatedBy,
}

async fn recover(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<RecoverRequest>,
) -> ApiResult<Recovery> {
    let caller = caller.stating(&request.by);
    let by = caller.attribution(request.by.note);
    if request.dry_run {
        return Ok(Json(host.recover(true, &by).await?));
    }
    let activity = on_object("recover", "", json!({ "note": by.note }));
    let change = {
        let host = Arc::clone(&host);
        async move {
            let recovery = host.recover(false, &by).await?;
            let recorded = json!({ "reasons": recovery.reasons, "done": recovery.done,
                "dead_letters": recovery.dead_letters });
            Ok((recovery, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// A message to publish.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct PublishRequest {
    pub subject: String,
    pub headers: Vec<(String, String)>,
    /// The event id, sent as `Nats-Msg-Id`.
    pub id: String,
    /// Base64.
    pub body: String,
}

/// The position of a published message.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct PublishAck {
    pub stream: String,
    pub sequence: u64,
    /// Whether the broker had a message with this id already.
    pub duplicate: bool,
    /// The workers that consume this subject of the stream.
    #[serde(default)]
    pub workers: Vec<String>,
}

async fn publish(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(message): Json<PublishRequest>,
) -> ApiResult<PublishAck> {
    // Check the subject and the id.
    subject::check_subject(&message.subject)
        .map_err(|why| anyhow!(why))
        .context("read the subject")?;
    if redrive::is_pointer(&message.subject) {
        let error = anyhow!(
            "`{}` is reserved for redriven dead letters",
            message.subject
        );
        return Err(error.hint("oncely dlq redrive ID").into());
    }
    message::check_event_id(&message.id)
        .map_err(|why| anyhow!(why))
        .context("read the event id")?;
    let body = base64::engine::general_purpose::STANDARD
        .decode(&message.body)
        .context("read the body")?;

    // Publish.
    let at = message.subject.clone();
    let details = json!({ "id": message.id, "bytes": body.len() });
    let activity = on_object("publish", &at, details);
    let outgoing = OutgoingMessage {
        subject: message.subject,
        headers: message.headers,
        id: message.id,
        body: body.into(),
    };
    let services = Arc::clone(&host.services);
    let change = async move {
        let mut acks = services.bus.publish(vec![outgoing]).await;
        let ack = acks
            .pop()
            .context("publish the message")?
            .map_err(|error| anyhow!(error))
            .context("publish the message")?;
        let recorded = json!({ "stream": ack.stream, "sequence": ack.sequence });
        Ok((ack, recorded))
    };
    let ack = recorded(&host, &caller, activity, change).await?;

    // The workers that consume it.
    let is_subscribed = |worker: &crate::config::manifest::Worker| {
        let wants = worker
            .subjects
            .iter()
            .any(|pattern| subject::matches(pattern, &at));
        worker.stream.as_ref() == Some(&ack.stream) && (wants || worker.subjects.is_empty())
    };
    let workers = host.services.deployed_workers().await.unwrap_or_default();
    let workers = workers
        .into_iter()
        .filter(is_subscribed)
        .map(|worker| worker.name)
        .collect();
    Ok(Json(PublishAck {
        stream: ack.stream,
        sequence: ack.sequence,
        duplicate: ack.duplicate,
        workers,
    }))
}

/// One value of keyed state.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StateValue {
    pub key: String,
    pub version: u64,
    /// The size of the value, in bytes.
    pub size: u64,
    #[schemars(with = "Time")]
    pub updated_at: jiff::Timestamp,
    /// Base64; in a list only the first bytes.
    pub value: String,
}

impl From<StateRecord> for StateValue {
    fn from(record: StateRecord) -> Self {
        StateValue {
            key: record.key,
            version: record.version,
            size: record.size,
            updated_at: record.updated_at,
            value: base64::engine::general_purpose::STANDARD.encode(&record.value),
        }
    }
}

/// Which values of keyed state to list.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StateFilter {
    /// The prefix of their keys.
    #[serde(default)]
    pub prefix: String,
    pub limit: u32,
}

pub async fn state_list(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
    Query(filter): Query<StateFilter>,
) -> ApiResult<Vec<StateValue>> {
    let records = host
        .services
        .store
        .state_entries(&worker, &filter.prefix, filter.limit)
        .await?;
    if records.is_empty() && host.services.store.deployments(&worker).await?.is_empty() {
        return Err(worker_not_found(&worker));
    }
    Ok(Json(records.into_iter().map(StateValue::from).collect()))
}

/// The key of a value of keyed state. Keys may contain any character, so they are not part of the
/// path.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StateKey {
    pub key: String,
}

pub async fn state_get(
    State(host): State<Arc<Host>>,
    Path(worker): Path<String>,
    Query(StateKey { key }): Query<StateKey>,
) -> ApiResult<StateValue> {
    if let Some(record) = host.services.store.state_entry(&worker, &key).await? {
        return Ok(Json(record.into()));
    }
    if host.services.store.deployments(&worker).await?.is_empty() {
        return Err(worker_not_found(&worker));
    }
    let error = anyhow!("worker {worker} has no state under `{key}`")
        .hint(format!("oncely state list {worker}"));
    Err(ApiError(StatusCode::NOT_FOUND, error))
}

fn worker_not_found(worker: &str) -> ApiError {
    ApiError(
        StatusCode::NOT_FOUND,
        anyhow!("there is no worker `{worker}`").hint("oncely workers"),
    )
}
