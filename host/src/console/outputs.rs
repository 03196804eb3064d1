//! Outputs that are not published: parked ones first, with their reasons, and the decision on them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use maud::{Markup, html};
use serde::Serialize;

use super::dead_letter::{attachment, decoded, headers};
use super::event::output_state;
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{
    Tone, badge, body, cell, command, count, counted, details, full_time, table, text, time,
};
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::outbox::{self, Output, ParkedOutputsRequest};
use crate::model::breaker;
use crate::model::units;
use crate::relay::{BreakerState, RefusedSubject};
use crate::store::{OutputFilter, OutputSummary, RelayMode, WalState};

/// The most outputs of a list.
const SHOWN_MAX: u32 = 100;

/// The outputs of a filter, and the state of the relay of this host.
#[derive(Debug, Serialize)]
struct View {
    filter: OutputFilter,
    outputs: Vec<OutputSummary>,
    breakers: Vec<BreakerState>,
    refused_subjects: Vec<RefusedSubject>,
    /// None where polling is the only relay mode.
    wal: Option<WalState>,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let filter = OutputFilter {
        worker: visitor.query.text("worker"),
        unpublished: visitor.query.is_set("unpublished"),
        dropped: visitor.query.is_set("dropped"),
        limit: SHOWN_MAX,
    };
    let Json(outputs) = outbox::list(host(&console), Query(filter.clone())).await?;
    let relay = &console.host.services.relay_state;
    let view = View {
        filter,
        outputs,
        breakers: relay.breakers(),
        refused_subjects: relay.refused_subjects(),
        wal: relay.wal(),
    };
    visitor.answer(Section::Outputs, "Outputs", &view, page)
}

fn page(view: &View) -> Markup {
    let filter = &view.filter;
    let (kind, option) = match (filter.dropped, filter.unpublished) {
        (true, _) => ("dropped", " --dropped"),
        (_, true) => ("unpublished", " --unpublished"),
        _ => ("parked", ""),
    };
    let tab = |path: &'static str, name: &'static str| {
        html! { a href=(path) aria-current=[(kind == name).then_some("page")] { (name) } }
    };
    html! {
        h1 { "Outputs" }
        (relay(view))
        nav.tabs aria-label="Kind of outputs" {
            (tab("/outputs", "parked"))
            (tab("/outputs?unpublished=1", "unpublished"))
            (tab("/outputs?dropped=1", "dropped"))
        }
        @if view.outputs.is_empty() {
            p.empty.good { "No output is " (kind) "." }
        } @else {
            (table("Outputs", &["Number", "State", "Output", "Worker", "#Blocks", "Since"], html! {
                @for output in &view.outputs { (row(output)) }
            }))
            @if view.outputs.len() >= SHOWN_MAX as usize {
                p.caption { "The first " (SHOWN_MAX) " are shown." }
            }
        }
        p.caption { "The same in a terminal" }
        (command(&(String::from("oncely outbox list") + option)))
    }
}

fn row(output: &OutputSummary) -> Markup {
    html! {
        tr {
            th scope="row" { a href=(links::output(output.number)) { (output.number) } }
            td { (output_state(&output.state)) }
            td.failure {
                code { (cell(&output.id)) } " to " (cell(&output.subject))
                @if let Some(error) = &output.error { span.shape { (cell(error)) } }
            }
            td { a href=(links::worker(&output.worker)) { (text(&output.worker)) } }
            td.number { (count(output.waiting)) }
            td { (time(output.parked_at.or(output.dropped_at).unwrap_or(output.created_at))) }
        }
    }
}

/// The breakers and the mode of the relay.
fn relay(view: &View) -> Markup {
    let open: Vec<_> = view
        .breakers
        .iter()
        .filter(|breaker| breaker.state != breaker::State::Closed)
        .collect();
    html! {
        section.panel aria-label="Relay" {
            p.lead {
                @if open.is_empty() && view.refused_subjects.is_empty() {
                    (badge(Tone::Good, "publishing")) " All streams take outputs."
                } @else {
                    (badge(Tone::Bad, "blocked")) " Some outputs do not reach their stream."
                }
            }
            ul {
                @for breaker in open { li { "stream " (text(&breaker.stream)) ": " (text(&breaker.error)) } }
                @for refused in &view.refused_subjects {
                    li { "subject " (text(&refused.subject)) ": " (text(&refused.error)) }
                }
            }
            p.caption { (mode(view.wal.as_ref())) }
        }
    }
}

fn mode(wal: Option<&WalState>) -> String {
    let Some(wal) = wal else {
        return "Relay mode: poll".to_owned();
    };
    let mode = match wal.mode {
        RelayMode::Poll => "poll",
        RelayMode::Entering => "poll, switching to WAL",
        RelayMode::Wal => "WAL",
        RelayMode::Leaving => "WAL, switching to poll",
    };
    let reason = wal.fallback_reason.as_ref().map(|why| format!(" ({why})"));
    let slot = wal.slot.as_ref().map(|slot| {
        let retained = units::format_size(slot.retained);
        format!("; the slot retains {retained} of WAL")
    });
    format!(
        "Relay mode: {mode}{}{}",
        reason.unwrap_or_default(),
        slot.unwrap_or_default()
    )
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(number): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let Json(output) = outbox::show(host(&console), Path(number)).await?;
    let title = format!("Output {number}");
    visitor.answer(Section::Outputs, &title, &output, |output| {
        output_page(&visitor, &title, output)
    })
}

fn output_page(visitor: &Visitor, title: &str, output: &Output) -> Markup {
    let summary = &output.summary;
    let number = summary.number;
    let mut pairs = vec![
        ("Output", html! { code.wrap { (text(&summary.id)) } }),
        (
            "Message id",
            html! { code.wrap { (text(&summary.message_id)) } },
        ),
        (
            "Worker",
            html! { a href=(links::worker(&summary.worker)) { (text(&summary.worker)) } },
        ),
        (
            "Event",
            html! {
                a href=(links::event(&summary.worker, &summary.event_id)) { (text(&summary.event_id)) }
            },
        ),
        ("Subject", text(&summary.subject)),
        ("Committed", full_time(summary.created_at)),
        ("Failed publishes", html! { (summary.failures) }),
    ];
    if let (Some(stream), Some(sequence)) = (&output.stream, output.stream_sequence) {
        pairs.push(("Place", html! { (text(stream)) " " (sequence) }));
    }
    if let Some(key) = &summary.ordering_key {
        pairs.push(("Ordering key", text(key)));
    }
    if let Some(blocker) = summary.blocked_by {
        pairs.push((
            "Blocked by",
            html! { a href=(links::output(blocker)) { "output " (blocker) } },
        ));
    }
    if summary.waiting > 0 {
        pairs.push(("Blocks", html! { (counted(summary.waiting, "output")) }));
    }
    if let Some(at) = summary.dropped_at {
        pairs.push(("Dropped", full_time(at)));
    }
    if let Some(note) = &summary.note {
        pairs.push(("Note", text(note)));
    }
    html! {
        p.crumbs { a href="/outputs" { "Outputs" } }
        h1 { (title) " " (output_state(&summary.state)) }
        @if let Some(error) = &summary.error {
            section.panel aria-label="Error" { p.lead { (text(error)) } }
        }
        (details(pairs))
        h2 { "Body" }
        (body("Body", &decoded(&output.body), Some(&format!("/outputs/{number}/body"))))
        (headers(&output.headers))
        @if summary.state == "parked" { (decision(visitor, number)) }
        p.caption { "The same in a terminal" }
        (command(&format!("oncely outbox show {number}")))
    }
}

fn decision(visitor: &Visitor, number: i64) -> Markup {
    html! {
        section aria-labelledby="decision" {
            h2 #decision { "Decision" }
            form.panel.stack action=(format!("/outputs/{number}/retry")) method="post" {
                (visitor.form_token())
                p { "Publish it again, after its cause is repaired." }
                div.submit { button type="submit" { "Retry" } }
            }
            form.panel.stack action=(format!("/outputs/{number}/drop")) method="post" {
                (visitor.form_token())
                p { "Never publish it. The outputs that it blocks are published." }
                div {
                    label for="note" { "Note" }
                    input #note name="note" required maxlength="1000" autocomplete="off";
                }
                div.submit { button.danger type="submit" { "Drop" } }
            }
        }
    }
}

pub async fn download(
    State(console): State<Arc<Console>>,
    Path(number): Path<i64>,
    _: Visitor,
) -> Answer {
    let Json(output) = outbox::show(host(&console), Path(number)).await?;
    Ok(attachment(
        &format!("output-{number}.bin"),
        decoded(&output.body),
    ))
}

pub async fn retry(
    State(console): State<Arc<Console>>,
    Path(number): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let request = ParkedOutputsRequest {
        numbers: vec![number],
        note: String::new(),
    };
    let Json(done) = outbox::retry(host(&console), visitor.caller.clone(), Json(request)).await?;
    visitor.go(
        &console,
        &links::output(number),
        changed(number, done.outputs, "retried"),
    )
}

pub async fn drop(
    State(console): State<Arc<Console>>,
    Path(number): Path<i64>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let Some(note) = fields.text("note") else {
        let missing = "a note says why it is dropped".to_owned();
        return visitor.go(&console, &links::output(number), Err(missing));
    };
    let request = ParkedOutputsRequest {
        numbers: vec![number],
        note,
    };
    let Json(done) = outbox::drop(host(&console), visitor.caller.clone(), Json(request)).await?;
    visitor.go(
        &console,
        &links::output(number),
        changed(number, done.outputs, "dropped"),
    )
}

fn changed(number: i64, outputs: u64, participle: &str) -> Result<String, String> {
    match outputs {
        0 => Err(format!("output {number} is not parked any more")),
        _ => Ok(format!("output {number} was {participle}")),
    }
}
