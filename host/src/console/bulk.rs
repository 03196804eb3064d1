//! Closing all dead letters of a filter, after a page that shows their number. See `plan.rs` for
//! redrives.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use maud::{Markup, html};

use super::dead_letter::attribution_fields;
use super::failures::{filter_of_form, list, options, selection};
use super::fields::Fields;
use super::page::Section;
use super::parts::{command, counted};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{self, CloseAction, CloseRequest};
use crate::api::{Caller, StatedBy};
use crate::store::{
    DeadLetterActionResult, DeadLetterFilter, DeadLetterSummary, dead_letters_within,
};

/// The most dead letters of one action. A terminal can do more.
const SELECTED_MAX: u32 = 10_000;

/// How many dead letters one transaction changes.
const CHUNK_SIZE: usize = 100;

/// How many dead letters the page before an action shows.
const SHOWN: usize = 10;

/// How many times 500 dead letters are read for a subject with wildcards.
const PAGES_READ_MAX: u32 = 200;

/// An action on several dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Resolve,
    Drop,
}

impl Action {
    /// The verb, its past participle, and the name of the command.
    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Action::Resolve => ("Resolve", "resolved", "resolve"),
            Action::Drop => ("Drop", "dropped", "drop"),
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Action::Resolve => {
                "The dead letters are closed: no action is needed. Their messages take no effect."
            }
            Action::Drop => "The messages never take effect. A dropped dead letter stays readable.",
        }
    }
}

/// The page before the action.
pub async fn confirm(
    State(console): State<Arc<Console>>,
    Path(action): Path<Action>,
    visitor: Visitor,
) -> Answer {
    let selected = select(&console, filter_of_form(&visitor.query)?).await?;
    let (verb, ..) = action.words();
    let title = format!("{verb} {}", counted(selected.len() as u64, "dead letter"));
    let body = show(&visitor, action, &title, &selected);
    Ok(visitor.page(Section::Failures, &title, body))
}

/// The action, on the dead letters that match now. More than were confirmed are refused.
pub async fn act(
    State(console): State<Arc<Console>>,
    Path(action): Path<Action>,
    mut visitor: Visitor,
    fields: Fields,
) -> Answer {
    let selected = select(&console, filter_of_form(&fields)?).await?;
    let confirmed: usize = fields.number("count").unwrap_or_default();
    let list = format!("/failures{}", selection(&fields).query());
    if selected.len() > confirmed {
        let more = format!(
            "{} match now, {confirmed} did when you confirmed; nothing was changed",
            counted(selected.len() as u64, "dead letter")
        );
        return visitor.go(&console, &list, Err(more));
    }
    let by = visitor.attribution(&fields);
    if action == Action::Resolve && by.note.is_none() {
        let missing = "a note says why no action is needed".to_owned();
        return visitor.go(&console, &list, Err(missing));
    }
    let results = apply(&console, action, &selected, &visitor.caller, &by).await?;
    visitor.go(&console, &list, summary(action, &results))
}

/// The open dead letters of a filter, in the order of their streams.
async fn select(
    console: &Console,
    filter: DeadLetterFilter,
) -> Result<Vec<DeadLetterSummary>, Problem> {
    let filter = DeadLetterFilter {
        closed: false,
        below: None,
        limit: SELECTED_MAX + 1,
        ..filter
    };
    let store = &console.host.services.store;
    let (mut selected, rest) = dead_letters_within(store, &filter, PAGES_READ_MAX).await?;
    if selected.len() > SELECTED_MAX as usize || rest.is_some() {
        return Err(Problem::refused(
            StatusCode::BAD_REQUEST,
            "the filter selects more than 10000 dead letters, or reads more than 100000",
            "oncely dlq resolve --worker NAME --note TEXT",
        ));
    }
    selected.sort_by(|one, other| one.stream_order().cmp(&other.stream_order()));
    Ok(selected)
}

async fn apply(
    console: &Console,
    action: Action,
    selected: &[DeadLetterSummary],
    caller: &Caller,
    by: &StatedBy,
) -> Result<Vec<DeadLetterActionResult>, Problem> {
    let mut results = Vec::new();
    for chunk in selected.chunks(CHUNK_SIZE) {
        let action = match action {
            Action::Resolve => CloseAction::Resolve,
            Action::Drop => CloseAction::Drop,
        };
        let request = CloseRequest {
            ids: chunk.iter().map(|one| one.id).collect(),
            action,
            by: by.clone(),
            seen: Vec::new(),
        };
        let (state, caller) = (host(console), caller.clone());
        let Json(done) = dead_letters::close(state, caller, Json(request)).await?;
        results.extend(done);
    }
    Ok(results)
}

/// The number of changed dead letters, and the first reason for a refusal.
fn summary(action: Action, results: &[DeadLetterActionResult]) -> Result<String, String> {
    let (_, participle, _) = action.words();
    let refused: Vec<_> = results
        .iter()
        .filter(|result| result.refused.is_some())
        .collect();
    let done = (results.len() - refused.len()) as u64;
    let text = format!("{} {participle}", counted(done, "dead letter"));
    match refused.first() {
        None => Ok(text),
        Some(first) => Err(format!(
            "{text}; {} refused, such as {}: {}",
            refused.len(),
            first.id,
            first.refused.as_deref().unwrap_or_default()
        )),
    }
}

fn show(visitor: &Visitor, action: Action, title: &str, selected: &[DeadLetterSummary]) -> Markup {
    let (_, _, name) = action.words();
    let chosen = selection(&visitor.query);
    let options = match options(&chosen) {
        none if none.is_empty() => " --all".to_owned(),
        options => options,
    };
    let shown = selected.get(..SHOWN).unwrap_or(selected);
    html! {
        p.crumbs { a href={ "/failures" (chosen.query()) } { "Failures" } }
        h1 { (title) "?" }
        @if selected.is_empty() {
            p.empty { "No dead letter matches any more." }
        } @else {
            p { (action.meaning()) }
            form.panel.stack action={ "/failures/" (name) } method="post" {
                (visitor.form_token())
                (hidden(&chosen))
                input type="hidden" name="count" value=(selected.len());
                (attribution_fields(visitor, action == Action::Resolve))
                div.submit {
                    button.danger[action == Action::Drop] type="submit" { (title) }
                    a href={ "/failures" (chosen.query()) } { "Cancel" }
                }
            }
            h2 { @if shown.len() < selected.len() { "The first " (shown.len()) } @else { "Dead letters" } }
            (list(shown))
            p.caption { "The same in a terminal" }
            (command(&(["oncely dlq", name].join(" ") + &options)))
        }
    }
}

/// The fields of a selection, for the form that acts on it.
pub fn hidden(selected: &Fields) -> Markup {
    html! {
        @for (name, value) in selected.pairs() { input type="hidden" name=(name) value=(value); }
    }
}
