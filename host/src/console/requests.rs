//! The response stored for an idempotency key.

use std::sync::Arc;

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::dead_letter::{decoded, headers};
use super::page::Section;
use super::parts::{Tone, badge, body, details, full_time, text};
use super::visitor::{Answer, Visitor};
use crate::config::manifest::Worker;
use crate::store::RequestRecord;

/// The responses of a key.
#[derive(Debug, Serialize)]
struct View {
    /// The routes of all workers for requests, each with its worker.
    routes: Vec<(String, String)>,
    /// None before a search.
    responses: Option<Vec<StoredResponse>>,
}

/// One stored response.
#[derive(Debug, Serialize)]
struct StoredResponse {
    worker: String,
    route: String,
    /// A digest of the caller; empty for an unidentified one.
    caller: String,
    status: u16,
    answered_at: Timestamp,
    expires_at: Timestamp,
    headers: Vec<(String, String)>,
    /// Base64.
    body: String,
}

pub async fn find(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let workers = console.host.services.deployed_workers().await?;
    let routes_of = |worker: &Worker| {
        let worker_name = worker.name.clone();
        let path =
            |route: &crate::config::manifest::Route| (worker_name.clone(), route.path.clone());
        worker.routes.iter().map(path).collect::<Vec<_>>()
    };
    let routes: Vec<(String, String)> = workers.iter().flat_map(routes_of).collect();
    let responses = match visitor.query.raw("key").filter(|key| !key.is_empty()) {
        Some(key) => Some(search(&console, &routes, key).await?),
        None => None,
    };
    let view = View { routes, responses };
    visitor.answer(Section::Requests, "Requests", &view, |view| {
        page(view, visitor.query.raw("key").unwrap_or_default())
    })
}

/// The responses of a key on all routes.
async fn search(
    console: &Console,
    routes: &[(String, String)],
    key: &str,
) -> crate::store::Result<Vec<StoredResponse>> {
    let mut found = Vec::new();
    for (worker, route) in routes {
        let store = &console.host.services.store;
        let records = store.answered_requests(worker, route, key).await?;
        let stored = |record: RequestRecord| StoredResponse {
            worker: worker.clone(),
            route: route.clone(),
            caller: record.caller,
            status: record.response.status,
            answered_at: record.answered_at,
            expires_at: record.expires_at,
            headers: record.response.headers,
            body: STANDARD.encode(&record.response.body),
        };
        found.extend(records.into_iter().map(stored));
    }
    Ok(found)
}

fn page(view: &View, key: &str) -> Markup {
    html! {
        h1 { "Requests" }
        @if view.routes.is_empty() {
            p.empty { "No deployed worker answers requests." }
        } @else {
            form.filters action="/requests" method="get" aria-label="Search" {
                div {
                    label for="key" { "Idempotency key" }
                    input #key name="key" value=(key) required autocomplete="off" spellcheck="false";
                }
                div.submit { button type="submit" { "Find" } }
            }
            @if let Some(responses) = &view.responses {
                @if responses.is_empty() {
                    p.empty {
                        "No response is stored for this key. The request was not answered, its "
                        "transaction was rolled back, or the key has expired."
                    }
                }
                @for response in responses { (show(response)) }
            } @else {
                p.caption {
                    "The response that a repeated request with this key gets, on each of "
                    (view.routes.len()) " routes."
                }
            }
        }
    }
}

fn show(response: &StoredResponse) -> Markup {
    let tone = match response.status {
        ..400 => Tone::Good,
        400..500 => Tone::Warn,
        _ => Tone::Bad,
    };
    let caller = match response.caller.as_str() {
        "" => html! { "not identified" },
        digest => html! { code.wrap { (text(digest)) } },
    };
    let bytes = decoded(&response.body);
    html! {
        section.panel aria-label="Response" {
            p.lead {
                (badge(tone, &response.status.to_string())) " "
                (text(&response.worker)) " " code { (text(&response.route)) }
            }
            (details([
                ("Answered", full_time(response.answered_at)),
                ("Key expires", full_time(response.expires_at)),
                ("Caller, as a digest", caller),
            ]))
            (body("Body of the response", &bytes, None))
            (headers(&response.headers))
        }
    }
}
