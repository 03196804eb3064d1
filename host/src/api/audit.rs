//! The audit of a running system.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::json;

use super::ApiResult;
use super::access::Caller;
use super::activity::{on_object, recorded};
use crate::audit::{self, Audit, AuditRequest, Kept};
use crate::runtime::Host;

/// Audits a window. It takes seconds to minutes.
pub(super) async fn audit(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<AuditRequest>,
) -> ApiResult<Audit> {
    let kept = Kept {
        outputs: host.retention.outputs,
        inbox: host.inbox_retention().await?,
        receipts: host.config.keep_receipts,
    };
    let services = Arc::clone(&host.services);
    if !request.repair {
        return Ok(Json(audit::audit(&services, &request, kept).await?));
    }
    let activity = on_object("audit --repair", "the books", json!(request));
    let change = async move {
        let audit = audit::audit(&services, &request, kept).await?;
        let recorded = json!({ "differences": audit.total, "repaired": audit.repaired });
        Ok((audit, recorded))
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}
