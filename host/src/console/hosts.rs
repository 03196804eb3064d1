//! The live hosts of the installation, and the reason that one is held.

use std::sync::Arc;

use axum::extract::State;
use maud::html;
use serde::Serialize;

use super::Console;
use super::links;
use super::now::run_state;
use super::page::Section;
use super::parts::{Tone, badge, command, details, table, text};
use super::visitor::{Answer, Visitor};
use crate::api;
use crate::runtime::{Hold, HostReport};

/// This host, and the reports of all hosts.
#[derive(Debug, Serialize)]
struct View {
    version: String,
    ready: bool,
    not_ready: Option<String>,
    database_error: Option<String>,
    nats_connected: bool,
    /// Whether the database and NATS disagree.
    is_restored: bool,
    hosts: Vec<HostReport>,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let status = api::current_status(&console.host).await;
    let view = View {
        version: status.version,
        ready: status.ready,
        not_ready: status.not_ready,
        database_error: status.database_error,
        nats_connected: status.nats_connected,
        is_restored: matches!(console.host.hold(), Some(Hold::Restored(_))),
        hosts: console.host.reports().await.unwrap_or_default(),
    };
    visitor.answer(Section::Hosts, "Hosts", &view, |view| html! {
        h1 { "Hosts" }
        section.panel aria-label="This host" {
            p.lead {
                @if view.ready { (badge(Tone::Good, "ready")) " This host works." }
                @else {
                    (badge(Tone::Bad, "not ready")) " "
                    (text(view.not_ready.as_deref().unwrap_or_default()))
                }
            }
            (details([
                ("Version", html! { (view.version) }),
                ("Database", html! {
                    @match &view.database_error {
                        Some(why) => { (badge(Tone::Bad, "no writes")) " " (text(why)) },
                        None => (badge(Tone::Good, "takes writes")),
                    }
                }),
                ("NATS", match view.nats_connected {
                    true => badge(Tone::Good, "connected"),
                    false => badge(Tone::Bad, "not connected"),
                }),
            ]))
            @if view.is_restored {
                p { "Plan a recovery first. It changes nothing:" }
                (command("oncely recover --dry-run"))
            }
        }
        @for report in &view.hosts {
            section {
                h2 { (text(&report.host)) }
                @if report.workers.is_empty() { p.empty { "It runs no workers." } }
                @else {
                    (table("Workers of the host", &["Worker", "State", "Version", "Error"], html! {
                        @for (worker, on) in &report.workers {
                            tr {
                                th scope="row" { a href=(links::worker(worker)) { (text(worker)) } }
                                td { (run_state(on.state)) }
                                td { @if let Some(version) = on.version { (version) } }
                                td.wrap { (text(on.error.as_deref().unwrap_or_default())) }
                            }
                        }
                    }))
                }
            }
        }
        p.caption { "The same in a terminal" }
        (command("oncely status"))
    })
}
