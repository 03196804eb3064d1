//! The dry run of a redrive, and the redrive that it predicts.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use maud::{Markup, html};

use super::dead_letter::{attribution_fields, decoded, outcome};
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, command, details, lines, readable, table, text};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{self, DeadLettersRequest, RedriveRequest};
use crate::dlq::dry_run::{
    Preconditions, Prediction, Preview, StateChange, StateValue, UnsentOutput, stale_reason,
};
use crate::store::{Redrive, RowChange};

/// How many characters of a row, a value or a body are shown.
const VALUE_MAX: usize = 2000;

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let request = DeadLettersRequest { ids: vec![id] };
    let Json(previews) = dead_letters::dry_run(host(&console), Json(request)).await?;
    let Some(preview) = previews.into_iter().next() else {
        let why = format!("there is no dead letter {id}");
        return Err(Problem::not_found(why, "oncely dlq list"));
    };
    let title = format!("Dry run of dead letter {id}");
    visitor.answer(Section::Failures, &title, &preview, |preview| {
        page(&visitor, &title, preview)
    })
}

/// Redrives it if the prediction still holds, or anyway if there is none.
pub async fn redrive(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    mut visitor: Visitor,
    fields: Fields,
) -> Answer {
    let Some(generation) = fields.number("generation") else {
        return Err(Problem::refused(
            StatusCode::BAD_REQUEST,
            "the form has no generation",
            "reload the page of the dry run",
        ));
    };
    let by = visitor.attribution(&fields);
    if let Some(fingerprint) = fields.text("fingerprint") {
        let planned = Preconditions {
            generation,
            version: fields.number("version"),
            fingerprint,
        };
        let request = DeadLettersRequest { ids: vec![id] };
        let Json(previews) = dead_letters::dry_run(host(&console), Json(request)).await?;
        let stale = previews
            .first()
            .and_then(|current| stale_reason(&planned, current));
        if let Some(why) = stale {
            let why = format!("dead letter {id} was not redriven: {why}");
            return visitor.go(&console, &format!("/dead-letters/{id}/dry-run"), Err(why));
        }
    }
    let one = Redrive {
        id,
        generation: Some(generation),
        again: false,
    };
    let request = RedriveRequest {
        dead_letters: vec![one],
        by,
    };
    let caller = visitor.caller.clone();
    let Json(results) = dead_letters::redrive(host(&console), caller, Json(request)).await?;
    let result = outcome(id, &results, "redriven");
    let to = match result {
        Ok(_) => links::dead_letter(id),
        Err(_) => format!("/dead-letters/{id}/dry-run"),
    };
    visitor.go(&console, &to, result)
}

/// The colour of a prediction.
pub fn tone(prediction: Prediction) -> Tone {
    match prediction {
        Prediction::WouldSucceed => Tone::Good,
        Prediction::SameFailure | Prediction::DifferentFailure => Tone::Bad,
        Prediction::AlreadyApplied => Tone::Calm,
        Prediction::OrderHazard | Prediction::NotPossible => Tone::Warn,
    }
}

fn page(visitor: &Visitor, title: &str, preview: &Preview) -> Markup {
    let id = preview.dead_letter;
    let prediction = preview.prediction;
    html! {
        p.crumbs {
            a href="/failures" { "Failures" } " / "
            a href=(links::dead_letter(id)) { "Dead letter " (id) }
        }
        h1 { (title) }
        section.panel aria-label="Prediction" {
            p.lead { (badge(tone(prediction), prediction.label())) " " (text(&preview.detail)) }
            p.caption {
                "The active deployment handled the message with the data of now. "
                "Everything was rolled back."
            }
        }
        (details([
            ("Worker", html! {
                a href=(links::worker(&preview.worker)) { (text(&preview.worker)) }
                @match preview.preconditions.version {
                    Some(version) => { " version " (version) },
                    None => " is not deployed",
                }
            }),
            ("Event", html! {
                a href=(links::event(&preview.worker, &preview.event_id)) { (text(&preview.event_id)) }
            }),
        ]))
        (effects(preview))
        @if !preview.logs.is_empty() {
            h2 { "Log" }
            pre { (lines(&preview.logs)) }
        }
        (redrive_form(visitor, preview))
        p.caption { "The same in a terminal" }
        (command(&format!("oncely dlq redrive {id} --dry-run")))
    }
}

/// Whether a dry run changed anything that can be shown.
pub fn has_effects(preview: &Preview) -> bool {
    let changes = &preview.changes;
    let is_changed =
        !changes.rows.is_empty() || changes.refused.is_some() || !changes.omitted.is_empty();
    is_changed || !preview.state.is_empty() || !preview.outputs.is_empty()
}

/// The changed rows and state, and the outputs.
pub fn effects(preview: &Preview) -> Markup {
    html! {
        (rows(preview))
        (state(&preview.state))
        (outputs(&preview.outputs))
    }
}

/// The redrive, unless it is certain to be refused.
fn redrive_form(visitor: &Visitor, preview: &Preview) -> Markup {
    let id = preview.dead_letter;
    let (verb, is_risky) = match preview.prediction {
        Prediction::WouldSucceed | Prediction::AlreadyApplied => ("Redrive", false),
        _ => ("Redrive anyway", true),
    };
    html! {
        section aria-labelledby="redrive" {
            h2 #redrive { "Redrive" }
            form.panel.stack action=(format!("/dead-letters/{id}/redrive")) method="post" {
                (visitor.form_token())
                input type="hidden" name="generation" value=(preview.preconditions.generation);
                @if !is_risky {
                    input type="hidden" name="fingerprint" value=(preview.preconditions.fingerprint);
                    input type="hidden" name="version" value=[preview.preconditions.version];
                }
                (attribution_fields(visitor, false))
                div.submit {
                    button.danger[is_risky] type="submit" { (verb) }
                    a href=(format!("/dead-letters/{id}/edit")) { "Edit the body first" }
                }
                p.help {
                    @if is_risky {
                        "A redrive takes effect once at most. If it fails again, it is a dead "
                        "letter again."
                    } @else {
                        "The dry run is repeated right before the redrive, which is refused if its "
                        "result has changed."
                    }
                }
            }
        }
    }
}

fn rows(preview: &Preview) -> Markup {
    let changes = &preview.changes;
    html! {
        @if !changes.rows.is_empty() {
            h2 { "Rows" }
            (table("Changed rows", &["", "Table", "Before", "After"], html! {
                @for change in &changes.rows { (row(change)) }
            }))
        }
        @if let Some(refused) = &changes.refused {
            p { "The database would refuse the commit: " (text(refused)) }
        }
        @if !changes.omitted.is_empty() {
            h3 { "Not shown" }
            ul { @for item in &changes.omitted { li { (text(item)) } } }
        }
    }
}

fn row(change: &RowChange) -> Markup {
    let shown = |row: &Option<serde_json::Value>| row.as_ref().map(ToString::to_string);
    difference(&change.table, shown(&change.before), shown(&change.after))
}

fn state(changes: &[StateChange]) -> Markup {
    let shown = |value: &StateValue| {
        let (text, _) = readable(&decoded(&value.value));
        format!("{text} (version {})", value.version)
    };
    html! {
        @if !changes.is_empty() {
            h2 { "State" }
            (table("Changed state", &["", "Key", "Before", "After"], html! {
                @for change in changes {
                    (difference(
                        &change.key,
                        change.before.as_ref().map(shown),
                        change.after.as_ref().map(shown),
                    ))
                }
            }))
        }
    }
}

/// One row of a table of changes.
fn difference(name: &str, before: Option<String>, after: Option<String>) -> Markup {
    let (class, kind) = match (&before, &after) {
        (None, Some(_)) => ("added", "added"),
        (Some(_), None) => ("removed", "removed"),
        _ => ("changed", "changed"),
    };
    html! {
        tr class=(class) {
            td { (kind) }
            th scope="row" { (text(name)) }
            td.wrap { @if let Some(before) = before { code { (cut(&before)) } } }
            td.wrap { @if let Some(after) = after { code { (cut(&after)) } } }
        }
    }
}

fn outputs(outputs: &[UnsentOutput]) -> Markup {
    html! {
        @if !outputs.is_empty() {
            h2 { "Outputs" }
            (table("Outputs", &["Id", "Subject", "Body"], html! {
                @for output in outputs {
                    tr {
                        td.wrap { code { (text(&output.id)) } }
                        td { (text(&output.subject)) }
                        td.wrap { code { (cut(&readable(&decoded(&output.body)).0)) } }
                    }
                }
            }))
        }
    }
}

fn cut(value: &str) -> Markup {
    match value.char_indices().nth(VALUE_MAX) {
        Some((end, _)) => html! { (text(value.get(..end).unwrap_or_default())) "…" },
        None => text(value),
    }
}
