//! The table of all requests below `/v1`, each with the role that it needs.

use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::handler::Handler;
use axum::http::Method;
use axum::middleware;
use axum::routing::MethodRouter;

use super::access::{self, RequestKind};
use super::{
    activity, audit, audit_runs, dead_letters, doctor, groups, jobs, operate, outbox, tokens,
};
use crate::component;
use crate::model::role::Role::{self, Admin, Deploy, Operate, View};
use crate::runtime::Host;

/// One kind of request.
pub(super) struct Endpoint {
    pub method: Method,
    /// Below `/v1`, with parameters in braces.
    pub path: &'static str,
    /// The role that it needs. Roles include the ones before them.
    pub role: Role,
    pub handler: MethodRouter<Arc<Host>>,
}

/// All requests of the control API.
///
/// A request that changes something writes an activity, see `recorded` in `api/activity.rs`.
pub(super) fn all() -> Vec<Endpoint> {
    vec![
        // The host and its workers.
        get("/status", View, super::status),
        get("/dialect", View, super::dialect),
        get("/workers", View, super::workers),
        get("/workers/{worker}/deployments", View, super::deployments),
        get("/workers/{worker}/hosts", View, super::hosts),
        get("/workers/{worker}/drain", View, operate::drain),
        get("/workers/{worker}/state", View, super::state_list),
        get("/workers/{worker}/state/entry", View, super::state_get),
        get("/components/{digest}", View, super::component),
        get("/doctor", View, doctor::doctor),
        get("/activity", View, activity::list),
        get("/whoami", View, tokens::whoami),
        // Operation of workers.
        post("/workers/{worker}/pause", Operate, operate::pause),
        post("/workers/{worker}/resume", Operate, operate::resume),
        post("/workers/{worker}/skip/plan", View, operate::skip_plan),
        post("/workers/{worker}/skip", Operate, operate::skip),
        post("/publish", Operate, super::publish),
        post("/audit", Operate, audit::audit),
        get("/audit/runs", View, audit_runs::list),
        get("/audit/runs/{id}", View, audit_runs::show),
        post("/audit/runs", Operate, audit_runs::create),
        // Dead letters. A dry run executes the handler, so it is more than reading.
        post("/dead-letters/find", View, dead_letters::find),
        post("/dead-letters/groups", View, dead_letters::groups),
        post("/dead-letters/groups/{id}/note", Operate, groups::note),
        get("/dead-letters/{id}", View, dead_letters::dead_letter),
        get("/dead-letters/{id}/replay", View, dead_letters::replayable),
        post("/dead-letters/verify", View, dead_letters::verify),
        post("/dead-letters/dry-run", Operate, dead_letters::dry_run),
        post("/dead-letters/redrive", Operate, dead_letters::redrive),
        post("/dead-letters/close", Operate, dead_letters::close),
        post("/dead-letters/{id}/edit", Operate, dead_letters::edit),
        get("/dead-letters/jobs", View, jobs::list),
        get("/dead-letters/jobs/{id}", View, jobs::show),
        get("/dead-letters/jobs/{id}/items", View, jobs::items),
        post("/dead-letters/jobs", Operate, jobs::create),
        post("/dead-letters/jobs/{id}/change", Operate, jobs::change),
        // Outputs.
        get("/outbox", View, outbox::list),
        get("/outbox/{number}", View, outbox::show),
        post("/outbox/retry", Operate, outbox::retry),
        post("/outbox/drop", Operate, outbox::drop),
        // Code.
        post("/components", Deploy, super::upload).with_body_max(component::SIZE_MAX),
        post("/plan", Deploy, super::plan),
        post("/deploy", Deploy, super::deploy),
        post("/rollback", Deploy, super::rollback),
        post("/retire", Deploy, super::retire),
        post("/recover", Deploy, super::recover),
        // Tokens.
        get("/tokens", Admin, tokens::list),
        post("/tokens", Admin, tokens::create),
        post("/tokens/{name}/revoke", Admin, tokens::revoke),
    ]
}

fn get<H, T>(path: &'static str, role: Role, handler: H) -> Endpoint
where
    H: Handler<T, Arc<Host>>,
    T: 'static,
{
    Endpoint {
        method: Method::GET,
        path,
        role,
        handler: axum::routing::get(handler),
    }
}

fn post<H, T>(path: &'static str, role: Role, handler: H) -> Endpoint
where
    H: Handler<T, Arc<Host>>,
    T: 'static,
{
    Endpoint {
        method: Method::POST,
        path,
        role,
        handler: axum::routing::post(handler),
    }
}

impl Endpoint {
    /// Replaces the maximum size of a body, in bytes.
    fn with_body_max(self, bytes: usize) -> Self {
        Endpoint {
            handler: self.handler.layer(DefaultBodyLimit::max(bytes)),
            ..self
        }
    }

    /// The handler behind the check of the caller's role.
    pub fn guarded(self) -> MethodRouter<Arc<Host>> {
        let needed = RequestKind {
            method: self.method,
            path: self.path,
            role: self.role,
        };
        let check = middleware::from_fn_with_state(Arc::new(needed), access::check_role);
        self.handler.route_layer(check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of requests in `docs/access.md`.
    fn documented() -> Vec<String> {
        include_str!("../../../docs/access.md")
            .lines()
            .filter(|line| line.starts_with("| `GET /v1/") || line.starts_with("| `POST /v1/"))
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_guide_to_access_has_each_request_with_its_role() {
        let row = |endpoint: &Endpoint| {
            let Endpoint {
                method, path, role, ..
            } = endpoint;
            format!("| `{method} /v1{path}` | `{}` |", role.as_str())
        };
        let rows: Vec<String> = all().iter().map(row).collect();
        assert_eq!(documented(), rows, "{}", rows.join("\n"));
    }

    #[test]
    fn a_request_that_may_change_something_needs_more_than_view() {
        let reading = [
            "/dead-letters/find",
            "/dead-letters/groups",
            "/dead-letters/verify",
            "/workers/{worker}/skip/plan",
        ];
        for endpoint in all() {
            let is_reading = endpoint.method == Method::GET || reading.contains(&endpoint.path);
            assert!(
                is_reading || endpoint.role > View,
                "{} {}",
                endpoint.method,
                endpoint.path
            );
        }
    }
}
