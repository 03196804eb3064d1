//! All changes through the control API and the console, newest first.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use maud::html;

use super::links;
use super::page::Section;
use super::parts::{cell, table, text, time};
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::activity;
use crate::store::{ActivityFilter, ActivityRecord};

/// How many actions a page lists.
const PAGE_SIZE: u32 = 50;

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let filter = ActivityFilter {
        worker: visitor.query.text("worker"),
        actor: visitor.query.text("actor"),
        below: visitor.query.number("below"),
        limit: PAGE_SIZE,
        ..ActivityFilter::default()
    };
    let Json(found) = activity::list(host(&console), Query(filter)).await?;
    let next = found.last().filter(|_| found.len() == PAGE_SIZE as usize);
    let next = next.map(|last| visitor.query.with("below", Some(&last.id.to_string())));
    visitor.answer(Section::Activity, "Activity", &found, |found| html! {
        h1 { "Activity" }
        @if found.is_empty() {
            p.empty { "Nothing was changed through the control API or the console." }
        } @else {
            (table("Activity", &["When", "Who", "Action", "Worker", "Object", "Outcome"], html! {
                @for entry in found {
                    tr {
                        td { (time(entry.at)) }
                        td { (cell(&who(entry))) }
                        td { (cell(&entry.verb)) }
                        td {
                            @if let Some(worker) = &entry.worker {
                                a href=(links::worker(worker)) { (text(worker)) }
                            }
                        }
                        td { (cell(&entry.object)) }
                        td.wrap { (cell(&outcome(entry))) }
                    }
                }
            }))
            nav.pages aria-label="Pages" {
                @if visitor.query.get("below").is_some() { a href="/activity" { "Newest" } }
                @if let Some(next) = next { a rel="next" href={ "/activity" (next.query()) } { "Older" } }
            }
        }
    })
}

/// The token, and the name that its holder stated.
fn who(entry: &ActivityRecord) -> String {
    match &entry.stated_name {
        Some(name) if *name != entry.actor => format!("{name} ({})", entry.actor),
        _ => entry.actor.clone(),
    }
}

/// The outcome, with the reason of a failure or the note of the change.
fn outcome(entry: &ActivityRecord) -> String {
    let state = entry.outcome.as_deref().unwrap_or("unknown");
    let note = entry.details.get("note").and_then(|note| note.as_str());
    match entry.error.as_deref().or(note) {
        Some(detail) => format!("{state}: {detail}"),
        None => state.to_owned(),
    }
}
