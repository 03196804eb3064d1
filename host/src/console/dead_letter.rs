//! One dead letter: its failure, its message, the recorded calls, the history, and the actions.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{Markup, html};
use serde::Serialize;

use super::failures::{explained, reason, state};
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{
    Tone, badge, body, cell, command, count, counted, details, full_time, lines, table, text, time,
};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{
    self, BodyEdit, CloseAction, CloseRequest, DeadLetter, DeadLettersRequest,
};
use crate::dlq::replay::Replayable;
use crate::dlq::verify::Verification;
use crate::guest::{HostCall, HostResult, Step};
use crate::store::{DeadLetterActionResult, DeadLetterState, DeadLetterSummary};

/// How many recorded calls are shown. `oncely replay` has all of them.
const CALLS_SHOWN: usize = 200;

/// How many attempts, outputs, actions and corrected bodies are shown. `oncely dlq show` has all of
/// them.
pub const ATTEMPTS_SHOWN: usize = 100;
const OUTPUTS_SHOWN: usize = 100;
const ACTIONS_SHOWN: usize = 100;
const EDITS_SHOWN: usize = 10;

/// The last entries of a list, and the number of those before them.
pub fn last_of<T>(all: &[T], shown: usize) -> (&[T], usize) {
    let hidden = all.len().saturating_sub(shown);
    (all.get(hidden..).unwrap_or_default(), hidden)
}

/// The line on entries that are not shown.
pub fn earlier(hidden: usize, noun: &str) -> Markup {
    html! {
        @if hidden > 0 { p.caption { (counted(hidden as u64, noun)) " before these are not shown." } }
    }
}

/// A dead letter with the recording of its last attempt.
#[derive(Debug, Serialize)]
struct View {
    #[serde(flatten)]
    dead_letter: DeadLetter,
    /// None when there is no recording, or it was deleted.
    recording: Option<Replayable>,
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let Json(dead_letter) = dead_letters::dead_letter(host(&console), Path(id)).await?;
    // A recording of another version of the host may be unreadable; the rest is shown.
    let recording = dead_letters::replayable(host(&console), Path(id)).await;
    let view = View {
        dead_letter,
        recording: recording.ok().and_then(|Json(recording)| recording),
    };
    let title = format!("Dead letter {id}");
    visitor.answer(Section::Failures, &title, &view, |view| {
        page(&visitor, view)
    })
}

/// The body as it is stored: the original, or with `edit=N` a corrected one.
pub async fn download(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let Json(dead_letter) = dead_letters::dead_letter(host(&console), Path(id)).await?;
    let edit: Option<usize> = visitor.query.number("edit");
    let stored = match edit {
        Some(edit) => dead_letter.edits.get(edit).map(|edit| &edit.body),
        None => Some(&dead_letter.body),
    };
    let Some(stored) = stored else {
        let why = format!("dead letter {id} has no such corrected body");
        return Err(Problem::not_found(why, "oncely dlq show ID"));
    };
    let name = format!("dead-letter-{id}.bin");
    Ok(attachment(&name, decoded(stored)))
}

/// Bytes as a file. A browser neither shows nor guesses their type.
pub fn attachment(name: &str, bytes: Vec<u8>) -> Response {
    use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (
            CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}\""),
        ),
    ];
    (headers, bytes).into_response()
}

/// Checks that the event took effect once, from the inbox and the streams.
pub async fn verify(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let request = DeadLettersRequest { ids: vec![id] };
    let Json(verification) = dead_letters::verify(host(&console), Json(request)).await?;
    let title = format!("Verification of dead letter {id}");
    visitor.answer(Section::Failures, &title, &verification, |found| {
        show_verification(id, &title, found)
    })
}

/// Resolves or drops it.
pub async fn close(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    mut visitor: Visitor,
    fields: Fields,
) -> Answer {
    let by = visitor.attribution(&fields);
    let (action, participle) = match fields.get("action") {
        Some("drop") => (CloseAction::Drop, "dropped"),
        _ => (CloseAction::Resolve, "resolved"),
    };
    let here = links::dead_letter(id);
    if action == CloseAction::Resolve && by.note.is_none() {
        let missing = "a note says why no action is needed".to_owned();
        return visitor.go(&console, &here, Err(missing));
    }
    let request = CloseRequest {
        ids: vec![id],
        action,
        by,
        seen: Vec::new(),
    };
    let Json(results) =
        dead_letters::close(host(&console), visitor.caller.clone(), Json(request)).await?;
    visitor.go(&console, &here, outcome(id, &results, participle))
}

/// The result of an action on one dead letter, as a sentence.
pub fn outcome(
    id: i64,
    results: &[DeadLetterActionResult],
    participle: &str,
) -> Result<String, String> {
    match results.first().and_then(|result| result.refused.as_deref()) {
        Some(why) => Err(format!("dead letter {id} was not {participle}: {why}")),
        None => Ok(format!("dead letter {id} was {participle}")),
    }
}

/// Bytes that the API sends as Base64.
pub fn decoded(base64: &str) -> Vec<u8> {
    STANDARD.decode(base64).unwrap_or_default()
}

/// The fields of each action: who, and why.
pub fn attribution_fields(visitor: &Visitor, needs_note: bool) -> Markup {
    html! {
        div.pair {
            @if visitor.caller.is_person {
                div { p.caption { "As " strong { (text(visitor.actor())) } } }
            } @else {
                div {
                    label for="actor" { "Your name, for the audit" }
                    input #actor name="actor" required maxlength="100" value=(visitor.actor())
                        autocomplete="name";
                }
            }
            div {
                label for="note" { "Note" @if !needs_note { span.muted { " (optional)" } } }
                input #note name="note" maxlength="1000" required[needs_note] autocomplete="off";
            }
        }
    }
}

/// Whether an operator can still act on it.
fn is_unresolved(summary: &DeadLetterSummary) -> bool {
    matches!(
        summary.state,
        DeadLetterState::Open | DeadLetterState::Redriven
    )
}

fn page(visitor: &Visitor, view: &View) -> Markup {
    let dead_letter = &view.dead_letter;
    let summary = &dead_letter.summary;
    let id = summary.id;
    html! {
        p.crumbs {
            a href="/failures" { "Failures" }
            @if let Some(group) = &summary.group {
                " / " a href=(links::group(group)) { "group " (text(group)) }
            }
        }
        div.heading {
            h1 { "Dead letter " (id) " " (state(summary.state)) }
            p.actions {
                @if summary.state == DeadLetterState::Open {
                    a.button href=(format!("/dead-letters/{id}/dry-run")) { "Dry run and redrive" }
                    a.button.quiet href=(format!("/dead-letters/{id}/edit")) { "Edit the body" }
                }
                a.button.quiet href=(format!("/dead-letters/{id}/verify")) { "Verify" }
            }
        }
        section.panel aria-label="Failure" {
            p.lead { (reason(&summary.reason, summary.code.as_deref())) (text(&summary.detail)) }
            (explained(&summary.reason, summary.code.as_deref()))
        }
        (facts(dead_letter))
        (attempts(dead_letter))
        section aria-labelledby="body" {
            h2 #body { "Body" }
            (body("Body", &decoded(&dead_letter.body), Some(&format!("/dead-letters/{id}/body"))))
            @let (edits, hidden) = last_of(&dead_letter.edits, EDITS_SHOWN);
            (earlier(hidden, "correction"))
            @for (number, edit) in edits.iter().enumerate() {
                (corrected(id, hidden + number, edit))
            }
        }
        (headers(&dead_letter.headers))
        @if let Some(recording) = &view.recording { (calls(id, recording)) }
        (history(dead_letter))
        @if is_unresolved(summary) { (close_form(visitor, id)) }
        (terminal(summary))
    }
}

/// The commands that do the same, and those that only a terminal has.
fn terminal(summary: &DeadLetterSummary) -> Markup {
    let id = summary.id;
    html! {
        p.caption { "The same in a terminal" }
        (command(&format!("oncely dlq show {id}")))
        p.caption { "All of it in a file, with the data for a replay" }
        (command(&format!("oncely dlq export {id} --out dead-letter-{id}.jsonl")))
        @if matches!(
            summary.state,
            DeadLetterState::Redriven | DeadLetterState::Resolved | DeadLetterState::Dropped
        ) {
            p.caption { "Redrive it although it is closed or in progress" }
            (command(&format!("oncely dlq redrive {id} --force")))
        }
    }
}

fn facts(dead_letter: &DeadLetter) -> Markup {
    let summary = &dead_letter.summary;
    let place = match (&summary.stream, summary.stream_sequence) {
        (Some(stream), Some(sequence)) => html! { (text(stream)) " " (sequence) },
        _ => html! { "not from a stream" },
    };
    let worker = html! {
        a href=(links::worker(&summary.worker)) { (text(&summary.worker)) }
        " version " (summary.version)
    };
    let event = html! {
        a href=(links::event(&summary.worker, &summary.event_id)) { (text(&summary.event_id)) }
    };
    let mut pairs = vec![
        ("Worker", worker),
        ("Event", event),
        ("Subject", text(&summary.subject)),
        ("From", place),
        ("Died", full_time(summary.died_at)),
        ("Attempts", html! { (summary.attempts) }),
        ("Redrives", html! { (summary.generation) }),
    ];
    if let Some(first) = dead_letter.first_died_at {
        pairs.push(("First died", full_time(first)));
    }
    if let Some(at) = summary.last_action_at {
        pairs.push(("Last action", full_time(at)));
    }
    if let Some(inbox) = &dead_letter.inbox {
        let shown =
            html! { (badge(inbox_tone(&inbox.state), &inbox.state)) " " (full_time(inbox.at)) };
        pairs.push(("Inbox", shown));
    }
    if let Some(trace) = &dead_letter.trace_id {
        pairs.push(("Trace", html! { code { (text(trace)) } }));
    }
    html! {
        (details(pairs))
        @if !dead_letter.outputs.is_empty() {
            h2 { "Outputs" }
            @let (outputs, hidden) = last_of(&dead_letter.outputs, OUTPUTS_SHOWN);
            (earlier(hidden, "output"))
            ul { @for output in outputs {
                li {
                    code { (text(&output.id)) } " to " (text(&output.subject)) ": "
                    @match (&output.stream, output.stream_sequence) {
                        (Some(stream), Some(sequence)) => { (text(stream)) " " (sequence) },
                        _ => "not published yet",
                    }
                }
            } }
        }
    }
}

/// The colour of a state in the inbox.
pub fn inbox_tone(state: &str) -> Tone {
    if state == "done" {
        Tone::Good
    } else {
        Tone::Bad
    }
}

fn attempts(dead_letter: &DeadLetter) -> Markup {
    let history = &dead_letter.failure_history;
    if history.is_empty() {
        return html! {};
    }
    html! {
        section aria-labelledby="attempts" {
            h2 #attempts { "Attempts" }
            @let (attempts, hidden) = last_of(history, ATTEMPTS_SHOWN);
            (earlier(hidden, "attempt"))
            ol.timeline {
                @for attempt in attempts { (show_attempt(attempt)) }
            }
        }
    }
}

/// One failed attempt, with the log of the handler.
pub fn show_attempt(attempt: &crate::store::AttemptRecord) -> Markup {
    html! {
        li {
            p {
                strong { "Attempt " (attempt.attempt) } " "
                @if let Some(code) = &attempt.code { code.tag { (cell(code)) } " " }
                span.muted { "version " (attempt.version) " · " (time(attempt.at)) }
            }
            pre.error { (lines(&attempt.error)) }
            @if !attempt.logs.is_empty() {
                details {
                    summary { "Log" }
                    pre { (lines(&attempt.logs)) }
                }
            }
        }
    }
}

fn corrected(id: i64, number: usize, edit: &BodyEdit) -> Markup {
    let download = format!("/dead-letters/{id}/body?edit={number}");
    html! {
        h3 { "Corrected body " (number + 1) }
        p.caption { (full_time(edit.at)) " by " (text(&edit.actor)) ": " (text(&edit.note)) }
        (body(&format!("Corrected body {}", number + 1), &decoded(&edit.body), Some(&download)))
    }
}

/// The headers of a message.
pub fn headers(headers: &[(String, String)]) -> Markup {
    let rows = html! {
        @for (name, value) in headers {
            tr { th scope="row" { code { (cell(name)) } } td.wrap { (text(value)) } }
        }
    };
    html! {
        section aria-label="Headers" {
            h2 { "Headers" }
            @if headers.is_empty() { p.empty { "The message has no headers." } }
            @else { (table("Headers", &["Name", "Value"], rows)) }
        }
    }
}

/// The recorded calls of the last attempt.
fn calls(id: i64, recording: &Replayable) -> Markup {
    let steps = &recording.record.steps;
    let rows = html! {
        @for (number, step) in steps.iter().take(CALLS_SHOWN).enumerate() {
            (call(number + 1, step))
        }
    };
    html! {
        section aria-labelledby="calls" {
            h2 #calls { "Recorded calls of attempt " (recording.record.attempt) }
            p.caption {
                (counted(steps.len() as u64, "call")) " of version " (recording.version)
                @if steps.len() > CALLS_SHOWN { ", the first " (count(CALLS_SHOWN as u64)) }
                @if recording.record.truncated { " · the recording was cut" }
            }
            @if steps.is_empty() {
                p.empty { "The handler called nothing." }
            } @else {
                (table("Recorded calls", &["#Call", "Function", "Result"], rows))
            }
            p.caption { "Run the attempt again on your machine" }
            (command(&format!("oncely replay {id}")))
        }
    }
}

fn call(number: usize, step: &Step) -> Markup {
    html! {
        tr {
            td.number { (number) }
            td.wrap { code { (text(&call_text(&step.call))) } }
            td.wrap {
                @match &step.result {
                    Some(result) => (text(&result_text(result))),
                    None => span.muted { "no result" },
                }
            }
        }
    }
}

/// The longest call or result in the table, in characters.
const CALL_MAX: usize = 400;

fn call_text(call: &HostCall) -> String {
    shortened(&serde_json::to_value(call).unwrap_or_default())
}

fn result_text(result: &HostResult) -> String {
    shortened(&serde_json::to_value(result).unwrap_or_default())
}

fn shortened(value: &serde_json::Value) -> String {
    let whole = match value {
        serde_json::Value::String(name) => name.clone(),
        serde_json::Value::Object(fields) => {
            let mut parts = fields.iter();
            parts
                .next()
                .map(|(name, value)| format!("{name} {value}"))
                .unwrap_or_default()
        }
        other => other.to_string(),
    };
    match whole.char_indices().nth(CALL_MAX) {
        Some((end, _)) => format!("{}…", whole.get(..end).unwrap_or_default()),
        None => whole,
    }
}

/// The actions of operators.
fn history(dead_letter: &DeadLetter) -> Markup {
    if dead_letter.audit.is_empty() {
        return html! {};
    }
    html! {
        section aria-labelledby="history" {
            h2 #history { "History" }
            @let (actions, hidden) = last_of(&dead_letter.audit, ACTIONS_SHOWN);
            (earlier(hidden, "action"))
            ol.timeline {
                @for entry in actions {
                    li {
                        p {
                            strong { (entry.action) } " by " (text(&entry.actor)) " "
                            span.muted { (time(entry.at)) }
                        }
                        @if let Some(note) = &entry.note { p { (text(note)) } }
                    }
                }
            }
        }
    }
}

fn close_form(visitor: &Visitor, id: i64) -> Markup {
    html! {
        section aria-labelledby="close" {
            h2 #close { "Close without a redrive" }
            form.panel.stack action=(format!("/dead-letters/{id}/close")) method="post" {
                (visitor.form_token())
                (attribution_fields(visitor, true))
                div.submit {
                    button.quiet type="submit" name="action" value="resolve" { "Resolve" }
                    button.danger type="submit" name="action" value="drop" { "Drop" }
                }
                p.help {
                    "Resolve it if no action is needed, such as after a repair by hand. "
                    "Drop it if its message must never take effect."
                }
            }
        }
    }
}

fn show_verification(id: i64, title: &str, found: &Verification) -> Markup {
    html! {
        p.crumbs { a href=(links::dead_letter(id)) { "Dead letter " (id) } }
        h1 { (title) }
        @for check in &found.dead_letters {
            section.panel aria-label="Result" {
                @match &check.problem {
                    Some(problem) => p.lead { (badge(Tone::Bad, "problem")) " " (text(problem)) },
                    None => p.lead {
                        (badge(Tone::Good, "correct")) " "
                        @match check.inbox.as_deref() {
                            Some("done") => "The event took effect once. No output is on its stream twice.",
                            _ => "The event has not taken effect. None of its outputs is on a stream.",
                        }
                    },
                }
                (details([
                    ("Event", html! {
                        a href=(links::event(&check.worker, &check.event_id)) { (text(&check.event_id)) }
                    }),
                    ("Dead letter", state(check.state)),
                    ("Inbox", html! { (check.inbox.as_deref().unwrap_or("no record yet")) }),
                ]))
                @if !check.outputs.is_empty() {
                    (table("Outputs on streams", &["Output", "#Copies"], html! {
                        @for (output, copies) in &check.outputs {
                            tr { td.wrap { code { (text(output)) } } td.number { (copies) } }
                        }
                    }))
                }
            }
        }
        @for stream in &found.truncated {
            p { "Only the first million messages of " (text(stream)) " were read." }
        }
        p.caption { "The same in a terminal" }
        (command(&format!("oncely dlq verify {id}")))
    }
}
