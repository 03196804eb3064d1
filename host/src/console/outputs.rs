//! Outputs that are not published: parked ones first, with their reasons, and the decision on them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use maud::{Markup, html};
use serde::Serialize;

use super::dead_letter::{attachment, decoded, headers};
use super::event::output_state;
use super::failures::quoted;
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{
    Tone, age, badge, body, cell, command, count, counted, details, full_time, table, text, time,
};
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::outbox::{self, Output, ParkedOutputsRequest};
use crate::model::breaker;
use crate::model::subject;
use crate::model::units;
use crate::relay::{RefusedSubject, RelayReport};
use crate::store::{OutputFilter, OutputSummary, RelayMode, WalState};

/// The most outputs of a list.
const SHOWN_MAX: u32 = 100;

/// How old the listing of the server's streams may be.
const STREAMS_AGE: Duration = Duration::from_secs(5);

/// The outputs of a filter, and the state of the relay.
#[derive(Debug, Serialize)]
struct View {
    filter: OutputFilter,
    outputs: Vec<OutputSummary>,
    /// The streams that workers publish to.
    streams: BTreeSet<String>,
    /// Of this host.
    refused_subjects: Vec<RefusedSubject>,
    /// None where polling is the only relay mode.
    wal: Option<WalState>,
    /// The relays of all live hosts, by host.
    relays: Vec<(String, RelayReport)>,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let filter = OutputFilter {
        worker: visitor.query.text("worker"),
        unpublished: visitor.query.is_set("unpublished"),
        dropped: visitor.query.is_set("dropped"),
        stream: visitor.query.text("stream"),
        limit: SHOWN_MAX,
        ..OutputFilter::default()
    };
    let Json(outputs) = outbox::list(host(&console), Query(filter.clone())).await?;
    let relay = &console.host.services.relay_state;
    let reports = console.host.reports().await?;
    let view = View {
        filter,
        outputs,
        streams: output_streams(&console).await,
        refused_subjects: relay.refused_subjects(),
        wal: relay.wal(),
        relays: reports
            .into_iter()
            .map(|report| (report.host, report.relay))
            .collect(),
    };
    visitor.answer(Section::Outputs, "Outputs", &view, |view| {
        page(view, &visitor.query)
    })
}

/// The streams that deployed workers publish to. None while NATS does not answer: outputs are
/// shown all the same.
async fn output_streams(console: &Console) -> BTreeSet<String> {
    let services = &console.host.services;
    let (Ok(workers), Ok(known)) = (
        services.deployed_workers().await,
        services.bus.streams(STREAMS_AGE).await,
    ) else {
        return BTreeSet::new();
    };
    let takes = |subjects: &[String], output: &String| {
        let mut patterns = subjects.iter();
        patterns.any(|pattern| subject::matches(pattern, output))
    };
    let outputs: Vec<&String> = workers.iter().flat_map(|worker| &worker.outputs).collect();
    let filled = known
        .iter()
        .filter(|stream| outputs.iter().any(|output| takes(&stream.subjects, output)));
    filled.map(|stream| stream.name.clone()).collect()
}

fn page(view: &View, query: &Fields) -> Markup {
    let filter = &view.filter;
    let (kind, mut option) = match (filter.dropped, filter.unpublished) {
        (true, _) => ("dropped", " --dropped".to_owned()),
        (_, true) => ("unpublished", " --unpublished".to_owned()),
        _ => ("parked", String::new()),
    };
    if let Some(stream) = &filter.stream {
        option.push_str(&format!(" --stream {}", quoted(stream)));
    }
    // A tab keeps the other parts of the filter.
    let others = query.with("unpublished", None).with("dropped", None);
    let tab = |name: &'static str| {
        let fields = match name {
            "parked" => others.clone(),
            name => others.with(name, Some("1")),
        };
        html! {
            a href={ "/outputs" (fields.query()) } aria-current=[(kind == name).then_some("page")] { (name) }
        }
    };
    html! {
        h1 { "Outputs" }
        (relay(view))
        nav.tabs aria-label="Kind of outputs" { (tab("parked")) (tab("unpublished")) (tab("dropped")) }
        (filters(view, kind))
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
        (command(&(String::from("oncely outbox list") + &option)))
    }
}

fn filters(view: &View, kind: &str) -> Markup {
    let filter = &view.filter;
    let chosen = filter.stream.as_deref();
    // A stream without a worker may still have outputs.
    let other = chosen.filter(|chosen| !view.streams.contains(*chosen));
    html! {
        form.filters action="/outputs" method="get" aria-label="Filter" {
            @if kind != "parked" { input type="hidden" name=(kind) value="1"; }
            div {
                label for="stream" { "Stream" }
                select #stream name="stream" {
                    option value="" { "all" }
                    @for name in view.streams.iter().map(String::as_str).chain(other) {
                        option selected[chosen == Some(name)] { (name) }
                    }
                }
            }
            div {
                label for="worker" { "Worker" }
                input #worker name="worker" value=[filter.worker.as_deref()] autocomplete="off" spellcheck="false";
            }
            div.submit {
                button type="submit" { "Filter" }
                @if chosen.is_some() || filter.worker.is_some() { a href="/outputs" { "Clear" } }
            }
        }
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

/// The relays of all hosts, and the relay mode.
fn relay(view: &View) -> Markup {
    let is_open = |(_, relay): &(String, RelayReport)| !relay.breakers.is_empty();
    let is_blocked = view.relays.iter().any(is_open) || !view.refused_subjects.is_empty();
    html! {
        section.panel aria-label="Relay" {
            p.lead {
                @if is_blocked { (badge(Tone::Bad, "blocked")) " Some outputs do not reach their stream." }
                @else { (badge(Tone::Good, "publishing")) " All streams take outputs." }
            }
            @if !view.refused_subjects.is_empty() {
                ul {
                    @for refused in &view.refused_subjects {
                        li { "subject " (text(&refused.subject)) ": " (text(&refused.error)) " (this host)" }
                    }
                }
            }
            (details(mode(view.wal.as_ref())))
        }
        (relay_table(&view.relays))
    }
}

fn relay_table(relays: &[(String, RelayReport)]) -> Markup {
    let rows = html! {
        @for (host, relay) in relays {
            tr {
                th scope="row" {
                    (text(host))
                    @if relay.reads_wal { " " (badge(Tone::Calm, "reads the WAL")) }
                }
                td.wrap {
                    @if relay.breakers.is_empty() { (badge(Tone::Good, "all closed")) }
                    @for breaker in &relay.breakers {
                        div {
                            (badge(Tone::Bad, breaker_state(breaker.state))) " "
                            (text(&breaker.stream)) ": " (cell(&breaker.error))
                        }
                    }
                }
                td.wrap {
                    @if relay.repairs.is_empty() { "none since its start" }
                    @for repair in &relay.repairs {
                        div {
                            (text(&repair.stream)) ": " (counted(repair.outputs, "lost output"))
                            " published again " (time(repair.at))
                        }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="relays" {
            h2 #relays { "Relays of the hosts" }
            (table("Relays of the hosts", &["Host", "Breakers", "Repairs of streams"], rows))
        }
    }
}

fn breaker_state(state: breaker::State) -> &'static str {
    match state {
        breaker::State::Closed => "closed",
        breaker::State::HalfOpen => "half-open",
        breaker::State::Open => "open",
    }
}

/// The relay mode, and the lag of the replication slot.
fn mode(wal: Option<&WalState>) -> Vec<(&'static str, Markup)> {
    let Some(wal) = wal else {
        return vec![("Relay mode", html! { "poll" })];
    };
    let mode = match wal.mode {
        RelayMode::Poll => "poll",
        RelayMode::Entering => "poll, switching to WAL",
        RelayMode::Wal => "WAL",
        RelayMode::Leaving => "WAL, switching to poll",
    };
    let mut pairs = vec![("Relay mode", html! { (mode) })];
    if let Some(reason) = &wal.fallback_reason {
        pairs.push(("Left WAL mode because", text(reason)));
    }
    if wal.mode != RelayMode::Poll {
        pairs.push((
            "Lag behind the commits",
            html! { (age(wal.lag.as_millis() as u64)) },
        ));
    }
    if let Some(slot) = &wal.slot {
        let reader = match (slot.lost, slot.active) {
            (true, _) => badge(Tone::Bad, "lost"),
            (false, true) => badge(Tone::Good, "read by a host"),
            (false, false) => badge(Tone::Warn, "not read"),
        };
        pairs.push(("Replication slot", reader));
        let retained = units::format_size(slot.retained);
        let most = units::format_size(slot.retained_max);
        pairs.push((
            "WAL retained for the slot",
            html! { (retained) " of at most " (most) },
        ));
    }
    pairs
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
