//! The table of all requests below `/v1`, each with the role that it needs.

use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::handler::Handler;
use axum::http::Method;
use axum::middleware;
use axum::routing::MethodRouter;
use schemars::SchemaGenerator;

use super::access::{self, RequestKind};
use super::openapi::{Contents, Described};
use super::{
    activity, audit, audit_runs, dead_letters, doctor, groups, jobs, operate, outbox, receipts,
    tokens,
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
    /// A summary for the OpenAPI document.
    pub about: &'static str,
    /// The path of the handler's function, such as `oncely::api::status`.
    pub function: &'static str,
    /// Parameters, body and response, from the type of the handler.
    pub contents: fn(&mut SchemaGenerator) -> Contents,
    pub handler: MethodRouter<Arc<Host>>,
}

/// All requests of the control API.
///
/// A request that changes something writes an activity, see `recorded` in `api/activity.rs`.
pub(super) fn all() -> Vec<Endpoint> {
    vec![
        // The host and its workers.
        get("/status", View, super::status)
            .about("The status of the host, of all workers and of the relay"),
        get("/dialect", View, super::dialect).about("The database of the host"),
        get("/workers", View, super::workers).about("The workers on this host"),
        get("/workers/{worker}/deployments", View, super::deployments)
            .about("The deployments of a worker"),
        get("/workers/{worker}/hosts", View, super::hosts)
            .about("The state of a worker on each host"),
        get("/workers/{worker}/drain", View, operate::drain)
            .about("How far a paused worker is drained"),
        get("/workers/{worker}/state", View, super::state_list).about("List values of keyed state"),
        get("/workers/{worker}/state/entry", View, super::state_get)
            .about("One value of keyed state"),
        get("/components/{digest}", View, super::component).about("A stored component"),
        get("/doctor", View, doctor::doctor).about("Run the checks of `oncely doctor`"),
        get("/activity", View, activity::list).about("The activity log, newest first"),
        get("/receipts", View, receipts::receipt).about("The receipt of an event"),
        get("/whoami", View, tokens::whoami).about("The name and the role of the token"),
        // Operation of workers.
        post("/workers/{worker}/pause", Operate, operate::pause)
            .about("Pause a worker on all hosts"),
        post("/workers/{worker}/resume", Operate, operate::resume)
            .about("End the pause of a worker"),
        post("/workers/{worker}/skip/plan", View, operate::skip_plan)
            .about("Plan to skip messages of a backlog"),
        post("/workers/{worker}/skip", Operate, operate::skip)
            .about("Skip the next messages of a plan"),
        post("/publish", Operate, super::publish).about("Publish a message"),
        post("/audit", Operate, audit::audit).about("Compare the database with the streams"),
        get("/audit/runs", View, audit_runs::list).about("The audits that hosts ran, newest first"),
        get("/audit/runs/{id}", View, audit_runs::show).about("One audit with its findings"),
        post("/audit/runs", Operate, audit_runs::create).about("Start an audit in the host"),
        // Dead letters. A dry run executes the handler, so it is more than reading.
        post("/dead-letters/find", View, dead_letters::find)
            .about("Find dead letters, newest first"),
        post("/dead-letters/groups", View, dead_letters::groups)
            .about("Group dead letters by their failure"),
        post("/dead-letters/groups/{id}/note", Operate, groups::note)
            .about("Set the note and the owner of a group"),
        get("/dead-letters/{id}", View, dead_letters::dead_letter)
            .about("One dead letter with its failure history"),
        get("/dead-letters/{id}/replay", View, dead_letters::replayable)
            .about("The recording of its last attempt"),
        post("/dead-letters/verify", View, dead_letters::verify)
            .about("Check the results of redrives"),
        post("/dead-letters/dry-run", Operate, dead_letters::dry_run)
            .about("Predict the results of redrives"),
        post("/dead-letters/redrive", Operate, dead_letters::redrive)
            .about("Redrive at most 500 dead letters at once"),
        post("/dead-letters/close", Operate, dead_letters::close)
            .about("Resolve or drop dead letters"),
        post("/dead-letters/{id}/edit", Operate, dead_letters::edit)
            .about("Store a corrected body"),
        get("/dead-letters/jobs", View, jobs::list).about("The newest redrive jobs"),
        get("/dead-letters/jobs/{id}", View, jobs::show).about("One redrive job"),
        get("/dead-letters/jobs/{id}/items", View, jobs::items)
            .about("The dead letters of a job with their results"),
        post("/dead-letters/jobs", Operate, jobs::create)
            .about("Redrive dead letters as a job of the hosts"),
        post("/dead-letters/jobs/{id}/change", Operate, jobs::change)
            .about("Pause, resume or cancel a job"),
        // Outputs.
        get("/outbox", View, outbox::list).about("List outputs, oldest first"),
        get("/outbox/{number}", View, outbox::show).about("One output with its headers and body"),
        post("/outbox/retry", Operate, outbox::retry).about("Make parked outputs due again"),
        post("/outbox/drop", Operate, outbox::drop).about("Drop parked outputs"),
        // Code.
        post("/components", Deploy, super::upload)
            .with_body_max(component::SIZE_MAX)
            .about("Store a component"),
        post("/plan", Deploy, super::plan).about("Plan a deployment"),
        post("/deploy", Deploy, super::deploy).about("Deploy a worker"),
        post("/rollback", Deploy, super::rollback).about("Activate an earlier version of a worker"),
        post("/retire", Deploy, super::retire).about("Retire a worker"),
        post("/recover", Deploy, super::recover).about("Recover after a restore, or plan to"),
        // Tokens.
        get("/tokens", Admin, tokens::list).about("List the named tokens"),
        post("/tokens", Admin, tokens::create).about("Create a named token"),
        post("/tokens/{name}/revoke", Admin, tokens::revoke).about("Revoke a named token"),
    ]
}

fn get<H, T>(path: &'static str, role: Role, handler: H) -> Endpoint
where
    H: Handler<T, Arc<Host>> + Described<T>,
    T: 'static,
{
    Endpoint {
        method: Method::GET,
        path,
        role,
        about: "",
        function: std::any::type_name::<H>(),
        contents: H::contents,
        handler: axum::routing::get(handler),
    }
}

fn post<H, T>(path: &'static str, role: Role, handler: H) -> Endpoint
where
    H: Handler<T, Arc<Host>> + Described<T>,
    T: 'static,
{
    Endpoint {
        method: Method::POST,
        path,
        role,
        about: "",
        function: std::any::type_name::<H>(),
        contents: H::contents,
        handler: axum::routing::post(handler),
    }
}

impl Endpoint {
    /// Sets the summary.
    fn about(self, about: &'static str) -> Self {
        Endpoint { about, ..self }
    }

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
