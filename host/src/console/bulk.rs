//! Actions on all dead letters of a filter, after a page that shows their number and a sample.

use std::collections::BTreeMap;
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
use crate::api::dead_letters::{
    self, CloseAction, CloseRequest, DeadLettersRequest, RedriveRequest,
};
use crate::api::{Caller, StatedBy};
use crate::store::{DeadLetterActionResult, DeadLetterFilter, DeadLetterSummary, Redrive};

/// The most dead letters of one action. A terminal can do more.
const SELECTED_MAX: u32 = 10_000;

/// How many dead letters one transaction changes.
const CHUNK_SIZE: usize = 100;

/// How many dead letters the page before a redrive runs dry.
const SAMPLE: usize = 10;

/// An action on several dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Redrive,
    Resolve,
    Drop,
}

impl Action {
    /// The verb, its past participle, and the name of the command.
    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Action::Redrive => ("Redrive", "redriven", "redrive"),
            Action::Resolve => ("Resolve", "resolved", "resolve"),
            Action::Drop => ("Drop", "dropped", "drop"),
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Action::Redrive => {
                "Each message is sent to its worker again. It takes effect once, or it becomes a \
                 dead letter again."
            }
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
    let sample = match action {
        Action::Redrive => Some(dry_run(&console, &selected).await?),
        Action::Resolve | Action::Drop => None,
    };
    let (verb, ..) = action.words();
    let title = format!("{verb} {}", counted(selected.len() as u64, "dead letter"));
    let body = show(&visitor, action, &title, &selected, sample.as_ref());
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
    let Json(mut selected) = dead_letters::find(host(console), Json(filter)).await?;
    if selected.len() > SELECTED_MAX as usize {
        return Err(Problem::refused(
            StatusCode::BAD_REQUEST,
            "the filter selects more than 10000 dead letters",
            "oncely dlq redrive --all --rate 100",
        ));
    }
    selected.sort_by(|a, b| {
        let place = |one: &DeadLetterSummary| {
            (
                one.worker.clone(),
                one.stream.clone(),
                one.stream_sequence,
                one.id,
            )
        };
        place(a).cmp(&place(b))
    });
    Ok(selected)
}

/// How often each prediction occurs in a sample of the selected dead letters.
async fn dry_run(
    console: &Console,
    selected: &[DeadLetterSummary],
) -> Result<BTreeMap<&'static str, u64>, Problem> {
    let ids = selected.iter().take(SAMPLE).map(|one| one.id).collect();
    let request = DeadLettersRequest { ids };
    let Json(previews) = dead_letters::dry_run(host(console), Json(request)).await?;
    let mut predictions = BTreeMap::new();
    for preview in previews {
        *predictions.entry(preview.prediction.label()).or_default() += 1;
    }
    Ok(predictions)
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
        let close = |action| CloseRequest {
            ids: chunk.iter().map(|one| one.id).collect(),
            action,
            by: by.clone(),
            seen: Vec::new(),
        };
        let Json(done) = match action {
            Action::Redrive => {
                let redrive = |one: &DeadLetterSummary| Redrive {
                    id: one.id,
                    generation: Some(one.generation),
                    again: false,
                };
                let request = RedriveRequest {
                    dead_letters: chunk.iter().map(redrive).collect(),
                    by: by.clone(),
                };
                dead_letters::redrive(host(console), caller.clone(), Json(request)).await?
            }
            Action::Resolve => {
                dead_letters::close(
                    host(console),
                    caller.clone(),
                    Json(close(CloseAction::Resolve)),
                )
                .await?
            }
            Action::Drop => {
                dead_letters::close(
                    host(console),
                    caller.clone(),
                    Json(close(CloseAction::Drop)),
                )
                .await?
            }
        };
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

fn show(
    visitor: &Visitor,
    action: Action,
    title: &str,
    selected: &[DeadLetterSummary],
    sample: Option<&BTreeMap<&'static str, u64>>,
) -> Markup {
    let (_, _, name) = action.words();
    let chosen = selection(&visitor.query);
    let options = match options(&chosen) {
        none if none.is_empty() => " --all".to_owned(),
        options => options,
    };
    let shown = selected.get(..SAMPLE).unwrap_or(selected);
    html! {
        p.crumbs { a href={ "/failures" (chosen.query()) } { "Failures" } }
        h1 { (title) "?" }
        @if selected.is_empty() {
            p.empty { "No dead letter matches any more." }
        } @else {
            p { (action.meaning()) }
            @if let Some(sample) = sample {
                section.panel aria-label="Dry run" {
                    p.lead {
                        "Dry run of "
                        @if shown.len() < selected.len() { "the first " (shown.len()) }
                        @else { "all of them" }
                        ": "
                        @for (at, (prediction, number)) in sample.iter().enumerate() {
                            @if at > 0 { ", " }
                            (number) " × " (prediction)
                        }
                    }
                }
            }
            form.panel.stack action={ "/failures/" (name) } method="post" {
                (visitor.form_token())
                @for field in ["worker", "reason", "code", "group", "subject", "since", "until"] {
                    @if let Some(value) = chosen.get(field) {
                        input type="hidden" name=(field) value=(value);
                    }
                }
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
