//! The audit of a running system.

use std::sync::Arc;

use anyhow::Context as _;
use axum::Json;
use axum::extract::State;

use super::ApiResult;
use crate::audit::{self, Audit, AuditRequest, Kept};
use crate::runtime::Host;

/// Audits a window. It takes seconds to minutes.
pub(super) async fn audit(
    State(host): State<Arc<Host>>,
    Json(request): Json<AuditRequest>,
) -> ApiResult<Audit> {
    let kept = Kept {
        outputs: host.retention.outputs,
        inbox: host.inbox_retention().await?,
    };
    // In a task of its own: a client that disconnects does not interrupt a repair.
    let services = Arc::clone(&host.services);
    let task = tokio::spawn(async move { audit::audit(&services, &request, kept).await });
    Ok(Json(task.await.context("audit")??))
}
