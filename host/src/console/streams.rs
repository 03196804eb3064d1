//! The streams that workers consume and publish to, those of the platform, and the advice of
//! `oncely doctor` on them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, command, count, counted, sentence, table, text, time};
use super::visitor::{Answer, Visitor};
use crate::bus::StreamFacts;
use crate::config::manifest::Worker;
use crate::doctor::{self, Finding, Level};
use crate::model::subject;
use crate::model::units;

/// The most streams that the page lists. Those that workers use come first.
const SHOWN_MAX: usize = 200;

/// The streams, with the findings that are not fine.
#[derive(Debug, Serialize)]
struct View {
    streams: Vec<Stream>,
    /// How many there are.
    total: usize,
    advice: Vec<Finding>,
}

/// One stream.
#[derive(Debug, Serialize)]
struct Stream {
    name: String,
    subjects: Vec<String>,
    messages: u64,
    bytes: u64,
    first_sequence: u64,
    last_sequence: u64,
    created: Timestamp,
    /// How long it keeps a message, in milliseconds; none for no limit.
    max_age_ms: Option<u64>,
    /// Its limits on size and number; none for none.
    bytes_max: Option<u64>,
    messages_max: Option<u64>,
    /// Whether acknowledged messages are removed.
    is_queue: bool,
    /// The number of servers that hold it.
    replicas: usize,
    is_in_memory: bool,
    duplicate_window_ms: u64,
    consumed_by: BTreeSet<String>,
    filled_by: BTreeSet<String>,
}

impl Stream {
    fn of(facts: StreamFacts, workers: &[Worker]) -> Self {
        let names = |fits: &dyn Fn(&Worker) -> bool| {
            let fitting = workers.iter().filter(|worker| fits(worker));
            fitting
                .map(|worker| worker.name.clone())
                .collect::<BTreeSet<String>>()
        };
        let stream = facts.stream;
        let takes = |output: &String| {
            let mut subjects = stream.subjects.iter();
            subjects.any(|pattern| subject::matches(pattern, output))
        };
        let millis = |time: Duration| time.as_millis() as u64;
        Stream {
            consumed_by: names(&|worker| worker.stream.as_ref() == Some(&stream.name)),
            filled_by: names(&|worker| worker.outputs.iter().any(takes)),
            messages: stream.messages,
            bytes: facts.bytes,
            first_sequence: stream.first_sequence,
            last_sequence: stream.last_sequence,
            created: stream.created,
            max_age_ms: stream.max_age.map(millis),
            bytes_max: facts.bytes_max,
            messages_max: facts.messages_max,
            is_queue: stream.is_queue,
            replicas: facts.replicas,
            is_in_memory: facts.is_in_memory,
            duplicate_window_ms: millis(stream.duplicate_window),
            name: stream.name,
            subjects: stream.subjects,
        }
    }
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let services = &console.host.services;
    let workers = services.deployed_workers().await?;
    let examined = doctor::examine_streams(&console.host.config, &services.bus, &workers);
    let (facts, findings) = examined.await?;
    let mut streams: Vec<Stream> = facts
        .into_iter()
        .map(|facts| Stream::of(facts, &workers))
        .collect();
    // Streams of workers first, then those of others, then those of the platform.
    streams.sort_by_key(|stream| {
        let is_used = !stream.consumed_by.is_empty() || !stream.filled_by.is_empty();
        (
            stream.name.starts_with("ONCELY_"),
            !is_used,
            stream.name.clone(),
        )
    });
    let total = streams.len();
    streams.truncate(SHOWN_MAX);
    let mut advice = findings;
    advice.retain(|finding| finding.level != Level::Ok);
    advice.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    let view = View {
        streams,
        total,
        advice,
    };
    visitor.answer(Section::Streams, "Streams", &view, page)
}

fn page(view: &View) -> Markup {
    let heads = [
        "Stream",
        "Subjects",
        "#Messages",
        "#Last",
        "Keeps",
        "#Replicas",
        "Dedupe window",
        "Created",
        "Consumed by",
        "Filled by",
    ];
    html! {
        h1 { "Streams" }
        (advice(&view.advice))
        @if view.streams.is_empty() { p.empty { "The server has no streams." } }
        @else {
            (table("Streams", &heads, html! { @for stream in &view.streams { (row(stream)) } }))
            @if view.total > view.streams.len() {
                p.caption { "The first " (view.streams.len()) " of " (view.total) " are shown." }
            }
        }
        p.caption { "These and all other checks in a terminal" }
        (command("oncely doctor"))
    }
}

/// The findings on retention, replicas, storage, dedupe windows and limits.
fn advice(findings: &[Finding]) -> Markup {
    if findings.is_empty() {
        return html! {
            p.empty.good { "Retention, replicas, dedupe windows and limits fit the workers." }
        };
    }
    let rows = html! {
        @for finding in findings {
            @let (tone, label) = match finding.level {
                Level::Problem => (Tone::Bad, "problem"),
                Level::Advice | Level::Ok => (Tone::Warn, "advice"),
            };
            tr {
                td { (badge(tone, label)) br; code.tag { (finding.check) } }
                td.wrap { (sentence(&finding.found)) p.caption { (sentence(&finding.reason)) } }
                td.wrap { @if let Some(fix) = &finding.fix { (sentence(fix)) } }
            }
        }
    };
    html! {
        section aria-labelledby="advice" {
            h2 #advice { "Advice" }
            (table("Advice", &["Check", "Finding", "What to do"], rows))
        }
    }
}

fn row(stream: &Stream) -> Markup {
    let linked = |names: &BTreeSet<String>| {
        html! {
            @for name in names { a href=(links::worker(name)) { (text(name)) } " " }
        }
    };
    html! {
        tr {
            th scope="row" {
                (text(&stream.name))
                @if stream.is_in_memory { " " (badge(Tone::Warn, "in memory")) }
            }
            td { @for subject in &stream.subjects { code.tag { (text(subject)) } " " } }
            td.number {
                (count(stream.messages)) br;
                span.muted { (units::format_size(stream.bytes)) }
            }
            td.number { (count(stream.last_sequence)) }
            td { (kept(stream)) }
            td.number { (stream.replicas) }
            td { (units::format_duration(Duration::from_millis(stream.duplicate_window_ms))) }
            td { (time(stream.created)) }
            td { (linked(&stream.consumed_by)) }
            td { (linked(&stream.filled_by)) }
        }
    }
}

/// How long and how much a stream keeps.
fn kept(stream: &Stream) -> String {
    let mut limits = Vec::new();
    if stream.is_queue {
        limits.push("until acknowledged".to_owned());
    }
    let age = stream.max_age_ms.map(Duration::from_millis);
    limits.extend(age.map(units::format_duration));
    limits.extend(stream.bytes_max.map(units::format_size));
    limits.extend(stream.messages_max.map(|most| counted(most, "message")));
    match limits.is_empty() {
        true => "all".to_owned(),
        false => limits.join(", "),
    }
}
