//! The audit of a running system.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::json;

use super::access::Caller;
use super::activity::{on_object, recorded};
use super::{ApiResult, audit_runs};
use crate::audit::{self, Audit, AuditRequest, Kept};
use crate::runtime::Host;

/// Audits a window. It takes seconds to minutes.
pub(super) async fn audit(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<AuditRequest>,
) -> ApiResult<Audit> {
    if !request.repair {
        return audit_runs::run(&host, &caller, request).await;
    }
    let activity = on_object("audit --repair", "the books", json!(request));
    let change = {
        let (host, caller) = (Arc::clone(&host), caller.clone());
        async move {
            let Json(audit) = audit_runs::run(&host, &caller, request).await?;
            let recorded = json!({ "differences": audit.total, "repaired": audit.repaired });
            Ok((audit, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// Audits a window of this host's database and streams.
pub(super) async fn examine(host: &Host, request: &AuditRequest) -> anyhow::Result<Audit> {
    let kept = Kept {
        outputs: host.retention.outputs,
        inbox: host.inbox_retention().await?,
        receipts: host.config.keep_receipts,
    };
    audit::audit(&host.services, request, kept).await
}
