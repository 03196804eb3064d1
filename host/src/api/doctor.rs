//! The checks of `oncely doctor` on the machine and with the configuration of this host.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::ApiResult;
use crate::doctor::{self, Report, Running};
use crate::runtime::Host;

/// Runs all checks. Their failures are findings.
pub(super) async fn doctor(State(host): State<Arc<Host>>) -> ApiResult<Report> {
    let running = Running {
        name: host.name(),
        readiness: host.readiness().await,
    };
    Ok(Json(doctor::examine(&host.config, Some(&running)).await))
}
