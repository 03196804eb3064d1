//! The actions of operators on dead letters, newest first.

use std::sync::Arc;

use axum::extract::State;
use maud::html;

use super::Console;
use super::links;
use super::page::Section;
use super::parts::{cell, table, text, time};
use super::visitor::{Answer, Visitor};
use crate::store::ActivityFilter;

/// How many actions a page lists.
const PAGE_SIZE: u32 = 50;

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let filter = ActivityFilter {
        worker: visitor.query.text("worker"),
        below: visitor.query.number("below"),
        limit: PAGE_SIZE,
    };
    let found = console.host.services.store.activity(&filter).await?;
    let next = found.last().filter(|_| found.len() == PAGE_SIZE as usize);
    let next = next.map(|last| visitor.query.with("below", Some(&last.number.to_string())));
    visitor.answer(Section::Activity, "Activity", &found, |found| html! {
        h1 { "Activity" }
        @if found.is_empty() {
            p.empty { "No dead letter was redriven, edited or closed." }
        } @else {
            (table("Activity", &["When", "Who", "Action", "Dead letter", "Worker", "Note"], html! {
                @for entry in found {
                    tr {
                        td { (time(entry.action.at)) }
                        td { (cell(&entry.action.actor)) }
                        td { (entry.action.action) }
                        td { a href=(links::dead_letter(entry.dead_letter)) { (entry.dead_letter) } }
                        td { a href=(links::worker(&entry.worker)) { (text(&entry.worker)) } }
                        td.wrap { (cell(entry.action.note.as_deref().unwrap_or_default())) }
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
