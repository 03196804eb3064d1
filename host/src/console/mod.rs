//! The console: pages for the person on call, served beside the control API.
//!
//! Pages call the handlers of the API and show their results. A request that prefers JSON gets the
//! same result as JSON, so console, API and commands cannot disagree. Everything works without
//! JavaScript: pages have links and forms.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::middleware;
use axum::routing::{get, post};

use crate::api::{Authenticator, Caller};
use crate::config::HostConfig;
use crate::runtime::Host;

mod activity;
mod books;
mod bulk;
mod chart;
mod dead_letter;
mod dry_run;
mod edit;
mod event;
mod failures;
mod fields;
mod group_note;
mod guard;
mod hosts;
mod identity;
mod jobs;
mod links;
mod login;
mod now;
mod oidc;
mod outputs;
mod page;
mod parts;
mod pausing;
mod plan;
mod problem;
mod requests;
mod search;
mod state;
mod streams;
mod visitor;
mod workers;

use identity::Sessions;
pub use login::LoginLink;
use oidc::Oidc;
use problem::Problem;

/// The console of one host.
pub struct Console {
    host: Arc<Host>,
    authenticator: Arc<Authenticator>,
    sessions: Sessions,
    /// Names of this host besides those of the machine itself, in lower case.
    names: Vec<String>,
    /// The login with a provider.
    oidc: Option<Oidc>,
}

impl Console {
    /// The console of a host, for holders of its token or of a named one.
    pub fn new(
        host: Arc<Host>,
        authenticator: Arc<Authenticator>,
        config: &HostConfig,
    ) -> Arc<Self> {
        let names = config
            .console_names
            .iter()
            .map(|name| name.to_ascii_lowercase());
        let public = config.console_url.iter().map(|url| url.host.clone());
        Arc::new(Console {
            host,
            authenticator,
            sessions: Sessions::default(),
            names: names.chain(public).collect(),
            oidc: Oidc::of(config),
        })
    }

    /// The path and query of an address that logs in once, within an hour.
    pub fn login_path(&self, caller: Caller) -> String {
        format!("/login?code={}", self.sessions.code(caller, Instant::now()))
    }
}

/// The routes of the console.
pub fn router(console: Arc<Console>) -> Router {
    Router::new()
        .route("/", get(now::now))
        .route("/login", get(login::form).post(login::log_in))
        .route("/logout", post(login::log_out))
        .route(oidc::BEGIN, get(oidc::begin))
        .route(oidc::CALLBACK, get(oidc::complete))
        .route("/search", get(search::search))
        .route("/failures", get(failures::failures))
        .route("/failures/redrive", get(plan::show).post(plan::start))
        .route("/failures/{action}", get(bulk::confirm).post(bulk::act))
        .route("/groups/{group}/note", post(group_note::save))
        .route("/jobs", get(jobs::list))
        .route("/jobs/{id}", get(jobs::show))
        .route("/jobs/{id}/change", post(jobs::change))
        .route("/jobs/{id}/verify", get(jobs::verify))
        .route("/dead-letters/{id}", get(dead_letter::show))
        .route("/dead-letters/{id}/body", get(dead_letter::download))
        .route("/dead-letters/{id}/dry-run", get(dry_run::show))
        .route("/dead-letters/{id}/redrive", post(dry_run::redrive))
        .route("/dead-letters/{id}/edit", get(edit::form).post(edit::save))
        .route("/dead-letters/{id}/verify", get(dead_letter::verify))
        .route("/dead-letters/{id}/close", post(dead_letter::close))
        .route("/workers", get(workers::list))
        .route("/workers/{worker}", get(workers::show))
        .route(
            "/workers/{worker}/rollback",
            get(workers::confirm_rollback).post(workers::rollback),
        )
        .route(
            "/workers/{worker}/retire",
            get(workers::confirm_retire).post(workers::retire),
        )
        .route(
            "/workers/{worker}/pause",
            get(pausing::confirm).post(pausing::pause),
        )
        .route("/workers/{worker}/resume", post(pausing::resume))
        .route("/workers/{worker}/events/{id}", get(event::show))
        .route("/workers/{worker}/state", get(state::list))
        .route("/workers/{worker}/state/entry", get(state::show))
        .route("/outputs", get(outputs::list))
        .route("/outputs/{number}", get(outputs::show))
        .route("/outputs/{number}/body", get(outputs::download))
        .route("/outputs/{number}/retry", post(outputs::retry))
        .route("/outputs/{number}/drop", post(outputs::drop))
        .route("/streams", get(streams::list))
        .route("/hosts", get(hosts::list))
        .route("/requests", get(requests::find))
        .route("/books", get(books::list).post(books::start))
        .route("/books/{id}", get(books::show))
        .route("/activity", get(activity::list))
        .route(page::STYLESHEET, get(page::stylesheet))
        .route(page::ICON, get(page::icon))
        .fallback(missing)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&console),
            guard::guard,
        ))
        // The command has the token of the API, and no session.
        .route("/v1/console/login-links", post(login::link))
        .with_state(console)
}

/// An address without a page.
async fn missing() -> Problem {
    Problem::not_found("there is no such page".to_owned(), "use the navigation")
}

/// The host as the handlers of the API receive it.
fn host(console: &Console) -> State<Arc<Host>> {
    State(Arc::clone(&console.host))
}
