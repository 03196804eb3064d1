//! Receipts of events.

use std::sync::Arc;

use anyhow::anyhow;
use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::{ApiError, ApiResult};
use crate::model::hint::WithHint as _;
use crate::receipts::{Issued, issue};
use crate::runtime::Host;

/// The event of a receipt.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ReceiptRequest {
    /// The event id.
    pub event: String,
    /// The worker; none if only one has the event.
    #[serde(default)]
    pub worker: Option<String>,
}

/// The receipt of an event, or the time of the checkpoint that will contain it.
pub(super) async fn receipt(
    State(host): State<Arc<Host>>,
    Query(request): Query<ReceiptRequest>,
) -> ApiResult<Issued> {
    let Some(interval) = host.config.receipts else {
        return Err(
            anyhow!("receipts are off, so no checkpoint contains the event")
                .hint("set receipts = \"1m\" for all hosts; receipts exist for events from then on")
                .into(),
        );
    };
    let event = &request.event;
    let worker = match request.worker {
        Some(worker) => worker,
        None => only_worker(&host, event).await?,
    };
    let issued = issue(&host.services, &worker, event, interval).await?;
    issued.map(Json).ok_or_else(|| not_found(event))
}

/// The worker that has settled an event.
async fn only_worker(host: &Host, event: &str) -> Result<String, ApiError> {
    let workers = host.services.store.workers_with_event(event).await?;
    match workers.as_slice() {
        [] => Err(not_found(event)),
        [worker] => Ok(worker.clone()),
        [first, ..] => Err(anyhow!(
            "several workers have the event {event}: {}",
            workers.join(", ")
        )
        .hint(format!("oncely receipt --worker {first} {event}"))
        .into()),
    }
}

fn not_found(event: &str) -> ApiError {
    let error = anyhow!("the event {event} is not settled, or its record was deleted")
        .hint("oncely status");
    ApiError(StatusCode::NOT_FOUND, error)
}
