//! One search box: a dead letter by its number, an event by its id, dead letters by their subject.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Redirect};
use maud::html;
use serde::Serialize;

use super::Console;
use super::failures::{PAGES_READ_MAX, list};
use super::links;
use super::page::Section;
use super::parts::text;
use super::visitor::{Answer, Visitor};
use crate::store::{DeadLetterFilter, DeadLetterSummary, dead_letters_within};

/// How many dead letters of a subject are listed.
const SHOWN_MAX: u32 = 50;

/// Everything that fits a search.
#[derive(Debug, Serialize)]
struct Found {
    query: String,
    /// The dead letter with this number.
    dead_letter: Option<i64>,
    /// The workers with an event of this id.
    events: Vec<String>,
    /// Dead letters with this subject.
    dead_letters: Vec<DeadLetterSummary>,
}

pub async fn search(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let query = visitor.query.text("q").unwrap_or_default();
    if query.is_empty() {
        return Ok(Redirect::to("/").into_response());
    }
    let store = &console.host.services.store;
    let number = query.trim_start_matches('#').parse::<i64>().ok();
    let dead_letter = match number {
        Some(number) => store
            .find_dead_letter(number)
            .await?
            .map(|one| one.summary.id),
        None => None,
    };
    let filter = DeadLetterFilter {
        subject: Some(query.clone()),
        limit: SHOWN_MAX,
        ..DeadLetterFilter::default()
    };
    let (dead_letters, _) = dead_letters_within(store, &filter, PAGES_READ_MAX).await?;
    let found = Found {
        dead_letter,
        events: store.workers_with_event(&query).await?,
        dead_letters,
        query,
    };

    // One hit is the answer.
    let only = match (
        found.dead_letter,
        found.events.as_slice(),
        found.dead_letters.is_empty(),
    ) {
        (Some(id), [], true) => Some(links::dead_letter(id)),
        (None, [worker], true) => Some(links::event(worker, &found.query)),
        _ => None,
    };
    if let (Some(to), false) = (only, visitor.is_json()) {
        return Ok(Redirect::to(&to).into_response());
    }
    visitor.answer(Section::Now, "Search", &found, |found| html! {
        h1.long { "Search: " (text(&found.query)) }
        @if found.dead_letter.is_none() && found.events.is_empty() && found.dead_letters.is_empty() {
            p.empty {
                "Nothing fits. An event appears here once it was handled, failed or became a dead "
                "letter."
            }
        }
        @if let Some(id) = found.dead_letter {
            h2 { "Dead letter" }
            p { a href=(links::dead_letter(id)) { "Dead letter " (id) } }
        }
        @if !found.events.is_empty() {
            h2 { "Events with this id" }
            ul { @for worker in &found.events {
                li { a href=(links::event(worker, &found.query)) { (text(worker)) } }
            } }
        }
        @if !found.dead_letters.is_empty() {
            h2 { "Dead letters with this subject" }
            (list(&found.dead_letters))
        }
    })
}
