//! Unpublished outputs in the control API: list, show, retry and drop them.

use std::sync::Arc;

use anyhow::anyhow;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use base64::Engine as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::access::Caller;
use super::activity::{on_object, recorded};
use super::{ApiError, ApiResult};
use crate::model::hint::WithHint;
use crate::runtime::Host;
use crate::store::{OutputFilter, OutputSummary};

pub async fn list(
    State(host): State<Arc<Host>>,
    Query(mut filter): Query<OutputFilter>,
) -> ApiResult<Vec<OutputSummary>> {
    if let Some(name) = &filter.stream {
        filter.subjects = subjects_of(&host, name).await?;
    }
    Ok(Json(host.services.store.outputs(&filter).await?))
}

/// The subjects of a stream. Outputs that are not published yet have no other mark of it.
async fn subjects_of(host: &Host, name: &str) -> Result<Vec<String>, ApiError> {
    let stream = host.services.bus.stream(name).await?;
    let subjects = stream.map(|stream| stream.subjects);
    subjects
        .filter(|subjects| !subjects.is_empty())
        .ok_or_else(|| {
            let missing = anyhow!("there is no stream {name} with subjects");
            ApiError(StatusCode::NOT_FOUND, missing.hint("nats stream ls"))
        })
}

/// One complete output.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    #[serde(flatten)]
    pub summary: OutputSummary,
    pub headers: Vec<(String, String)>,
    /// Base64.
    pub body: String,
    pub stream: Option<String>,
    pub stream_sequence: Option<u64>,
}

pub async fn show(State(host): State<Arc<Host>>, Path(number): Path<i64>) -> ApiResult<Output> {
    let Some(record) = host.services.store.output(number).await? else {
        let error =
            anyhow!("there is no output {number}; published outputs are kept for a while only");
        return Err(ApiError(
            StatusCode::NOT_FOUND,
            error.hint("oncely outbox list"),
        ));
    };
    Ok(Json(Output {
        summary: record.summary,
        headers: record.headers,
        body: base64::engine::general_purpose::STANDARD.encode(&record.body),
        stream: record.place.as_ref().map(|(stream, _)| stream.clone()),
        stream_sequence: record.place.map(|(_, sequence)| sequence),
    }))
}

/// Parked outputs, and a note on the decision.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ParkedOutputsRequest {
    pub numbers: Vec<i64>,
    #[serde(default)]
    pub note: String,
}

/// How many outputs were changed. The others were not parked any more.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ParkedOutputsResponse {
    pub outputs: u64,
}

/// Makes parked outputs due again.
pub async fn retry(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<ParkedOutputsRequest>,
) -> ApiResult<ParkedOutputsResponse> {
    let activity = on_object("outbox retry", outputs_named(&request), json!(request));
    let store = Arc::clone(&host.services.store);
    let change = async move {
        let outputs = store.retry_outputs(&request.numbers).await?;
        tracing::info!(outputs, "parked outputs requeued");
        let response = ParkedOutputsResponse { outputs };
        let recorded = json!(response);
        Ok((response, recorded))
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// Drops parked outputs.
pub async fn drop(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<ParkedOutputsRequest>,
) -> ApiResult<ParkedOutputsResponse> {
    let activity = on_object("outbox drop", outputs_named(&request), json!(request));
    let store = Arc::clone(&host.services.store);
    let change = async move {
        let outputs = store.drop_outputs(&request.numbers, &request.note).await?;
        tracing::warn!(
            outputs,
            numbers = ?request.numbers,
            note = request.note,
            "parked outputs dropped"
        );
        let response = ParkedOutputsResponse { outputs };
        let recorded = json!(response);
        Ok((response, recorded))
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// The outputs of a request, for display.
fn outputs_named(request: &ParkedOutputsRequest) -> String {
    match request.numbers.as_slice() {
        [number] => format!("output {number}"),
        numbers => format!("{} outputs", numbers.len()),
    }
}
