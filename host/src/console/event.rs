//! One event: its place on the stream, its row in the inbox, its outputs, and the proof that it
//! took effect once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::extract::{Path, State};
use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::dead_letter::{ATTEMPTS_SHOWN, earlier, inbox_tone, last_of, show_attempt};
use super::failures::list;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, cell, command, counted, details, full_time, table, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use crate::bus::{MessageComparison, OutgoingMessage, StartPosition};
use crate::model::message::header;
use crate::store::{
    AttemptRecord, DeadLetterState, DeadLetterSummary, EventRecord, InboxRecord, OutputRecord,
    OutputSummary,
};

/// How many outputs are compared with the messages on their streams.
const COMPARED_MAX: usize = 20;

/// How many messages of a stream are read to count the copies of outputs.
const COUNTED_MAX: usize = 1_000_000;

/// How much earlier than the commit the copies are searched: the clocks may differ.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_hours(1);

/// Everything known of one event.
#[derive(Debug, Serialize)]
struct Event {
    worker: String,
    event_id: String,
    /// The message on its stream; none without a stream.
    source: Option<Source>,
    inbox: Option<InboxRecord>,
    attempts: Vec<AttemptRecord>,
    dead_letters: Vec<DeadLetterSummary>,
    outputs: Vec<EventOutput>,
    /// The conclusion.
    proof: Proof,
}

/// The place of the message on its stream.
#[derive(Debug, Serialize)]
struct Source {
    stream: String,
    sequence: u64,
    /// None when the message is no longer there, or the broker did not answer.
    stored_at: Option<Timestamp>,
    subject: Option<String>,
}

/// An output of the event.
#[derive(Debug, Serialize)]
struct EventOutput {
    #[serde(flatten)]
    summary: OutputSummary,
    /// Whether the platform wrote it, such as the notice of a dead letter.
    is_platform: bool,
    stream: Option<String>,
    stream_sequence: Option<u64>,
    /// The message at its place: `same`, `different` or `gone`; none if it was not compared.
    on_stream: Option<&'static str>,
    /// How many copies are on its stream; none unless they were counted.
    copies: Option<u64>,
    /// The workers that know it as their event.
    handled_by: Vec<String>,
}

/// What the records of the event prove.
#[derive(Debug, Serialize)]
struct Proof {
    holds: bool,
    is_settled: bool,
    text: String,
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path((worker, event_id)): Path<(String, String)>,
    visitor: Visitor,
) -> Answer {
    let record = console
        .host
        .services
        .store
        .event(&worker, &event_id)
        .await?;
    if !record.is_known() {
        let why = format!("worker {worker} knows no event `{event_id}`");
        let hint = "it may wait on its stream, or be older than the retention of the inbox";
        return Err(Problem::not_found(why, hint));
    }
    let counts_copies = visitor.query.is_set("count");
    let event = collect(&console, worker, event_id, record, counts_copies).await?;
    let title = format!("Event {}", event.event_id);
    visitor.answer(Section::Workers, &title, &event, page)
}

/// Adds the state of the streams to the rows of the database.
async fn collect(
    console: &Console,
    worker: String,
    event_id: String,
    record: EventRecord,
    counts_copies: bool,
) -> Result<Event, Problem> {
    let source = source(console, &record).await;
    let mut outputs = Vec::new();
    for (number, output) in record.outputs.iter().enumerate() {
        outputs.push(output_on_stream(console, output, number < COMPARED_MAX).await?);
    }
    if counts_copies {
        count_copies(console, &mut outputs).await?;
    }
    let proof = Proof::of(record.inbox.as_ref(), &record.dead_letters, &outputs);
    Ok(Event {
        worker,
        event_id,
        source,
        inbox: record.inbox,
        attempts: record.attempts,
        dead_letters: record.dead_letters,
        outputs,
        proof,
    })
}

/// The place of the message, from the inbox or else from a dead letter.
async fn source(console: &Console, record: &EventRecord) -> Option<Source> {
    let of_inbox = record.inbox.as_ref();
    let of_inbox = of_inbox.and_then(|row| row.stream.clone().zip(row.stream_sequence));
    let of_dead_letter = || {
        let first = record.dead_letters.first()?;
        first.stream.clone().zip(first.stream_sequence)
    };
    let (stream, sequence) = of_inbox.or_else(of_dead_letter)?;
    let bus = &console.host.services.bus;
    let stored_at = bus.stored_at(&stream, sequence).await.ok().flatten();
    let event = bus.event_at(&stream, sequence).await.ok().flatten();
    Some(Source {
        stream,
        sequence,
        stored_at,
        subject: event.map(|(subject, _)| subject),
    })
}

async fn output_on_stream(
    console: &Console,
    output: &OutputRecord,
    is_compared: bool,
) -> Result<EventOutput, Problem> {
    let services = &console.host.services;
    let summary = output.summary.clone();
    let place = output.place.clone();
    let mut on_stream = None;
    if let (Some((stream, sequence)), true) = (&place, is_compared) {
        let message = OutgoingMessage {
            subject: summary.subject.clone(),
            headers: output.headers.clone(),
            id: summary.message_id.clone(),
            body: output.body.clone(),
        };
        let compared = services.bus.compare(stream, *sequence, &message).await;
        on_stream = compared.ok().map(|found| match found {
            MessageComparison::Same => "same",
            MessageComparison::Different => "different",
            MessageComparison::Gone => "gone",
        });
    }
    let is_platform = summary.subject.starts_with("oncely.");
    let handled_by = if is_compared && !is_platform && place.is_some() {
        services
            .store
            .workers_with_event(&summary.message_id)
            .await?
    } else {
        Vec::new()
    };
    Ok(EventOutput {
        is_platform,
        stream: place.as_ref().map(|(stream, _)| stream.clone()),
        stream_sequence: place.map(|(_, sequence)| sequence),
        on_stream,
        copies: None,
        handled_by,
        summary,
    })
}

/// Counts the copies of all outputs on their streams, with one scan of each stream. A queue cannot
/// be scanned: its messages leave it as they are handled.
async fn count_copies(console: &Console, outputs: &mut [EventOutput]) -> Result<(), Problem> {
    let mut streams: BTreeMap<String, Timestamp> = BTreeMap::new();
    for output in outputs.iter() {
        if let Some(stream) = &output.stream {
            let since = output.summary.created_at;
            let first = streams.entry(stream.clone()).or_insert(since);
            *first = since.min(*first);
        }
    }
    for (stream, first) in streams {
        let since = first.checked_sub(CLOCK_SKEW).unwrap_or(first);
        let bus = &console.host.services.bus;
        if bus.stream(&stream).await?.is_none_or(|info| info.is_queue) {
            continue;
        }
        let mut copies: HashMap<String, u64> = HashMap::new();
        let count = |message: crate::bus::ScannedMessage| {
            if let Some(id) = header(&message.headers, "Nats-Msg-Id") {
                *copies.entry(id.to_owned()).or_default() += 1;
            }
        };
        bus.scan_messages(&stream, StartPosition::Time(since), &[], COUNTED_MAX, count)
            .await?;
        for output in outputs.iter_mut() {
            if output.stream.as_ref() == Some(&stream) {
                let found = copies.get(&output.summary.message_id);
                output.copies = Some(found.copied().unwrap_or_default());
            }
        }
    }
    Ok(())
}

impl Proof {
    fn of(
        inbox: Option<&InboxRecord>,
        dead_letters: &[DeadLetterSummary],
        outputs: &[EventOutput],
    ) -> Self {
        let is_settled = inbox.is_some();
        let own = outputs.iter().filter(|output| !output.is_platform);
        let own: Vec<&EventOutput> = own.collect();
        let doubled = outputs
            .iter()
            .find(|output| output.copies.is_some_and(|copies| copies > 1));
        let different = outputs
            .iter()
            .find(|output| output.on_stream == Some("different"));
        let unpublished = own.iter().filter(|output| output.stream.is_none()).count();
        let is_open = dead_letters
            .iter()
            .any(|one| matches!(one.state, DeadLetterState::Open | DeadLetterState::Redriven));
        let state = inbox.map(|inbox| inbox.state.as_str());
        let (holds, text) = match state {
            _ if let Some(output) = doubled => (
                false,
                format!(
                    "The output {} is on its stream more than once.",
                    output.summary.id
                ),
            ),
            _ if let Some(output) = different => (
                false,
                format!(
                    "Another message is at the place of the output {}.",
                    output.summary.id
                ),
            ),
            Some("done") => (true, done_text(own.len(), unpublished)),
            Some(_) if own.is_empty() && is_open => (
                true,
                "It took no effect: its transactions were rolled back, and it is a dead letter."
                    .to_owned(),
            ),
            Some(_) if own.is_empty() => (
                true,
                "It took no effect, and its dead letter is closed.".to_owned(),
            ),
            Some(_) => (
                false,
                "The inbox has it as dead, but it has outputs.".to_owned(),
            ),
            None => (
                true,
                "It has taken no effect so far: the inbox has no row of it.".to_owned(),
            ),
        };
        Proof {
            holds,
            is_settled,
            text,
        }
    }
}

fn done_text(outputs: usize, unpublished: usize) -> String {
    let effect = "It took effect once: the inbox has one row of it, which was committed together \
                  with its effects and outputs.";
    match (outputs, unpublished) {
        (0, _) => effect.to_owned(),
        (_, 0) => format!("{effect} All its outputs in the outbox are on their streams."),
        (_, rest) => format!("{effect} {rest} of its outputs are not published yet."),
    }
}

fn page(event: &Event) -> Markup {
    let copies = format!("{}?count=1", links::event(&event.worker, &event.event_id));
    html! {
        p.crumbs {
            a href="/workers" { "Workers" } " / "
            a href=(links::worker(&event.worker)) { (text(&event.worker)) }
        }
        h1.long { "Event " (text(&event.event_id)) }
        ol.path {
            (source_step(event))
            (attempts_step(event))
            (inbox_step(event))
            (outputs_step(event, &copies))
            (proof_step(event))
        }
        @if let [dead_letter] = event.dead_letters.as_slice() {
            p.caption { "Check the redrive in a terminal" }
            (command(&format!("oncely dlq verify {}", dead_letter.id)))
        }
    }
}

fn step(name: &str, state: Markup, content: Markup) -> Markup {
    html! {
        li {
            div.heading { h2 { (name) } (state) }
            (content)
        }
    }
}

fn source_step(event: &Event) -> Markup {
    let Some(source) = &event.source else {
        let none = html! { p { "It came from no stream, or it is too old to say." } };
        return step("Message", badge(Tone::Calm, "no stream"), none);
    };
    let (state, stored) = match source.stored_at {
        Some(at) => (badge(Tone::Good, "on the stream"), full_time(at)),
        None => (
            badge(Tone::Calm, "no longer on the stream"),
            html! { "unknown" },
        ),
    };
    let mut pairs = vec![
        ("Stream", text(&source.stream)),
        ("Sequence", html! { (source.sequence) }),
        ("Stored", stored),
    ];
    if let Some(subject) = &source.subject {
        pairs.push(("Subject", text(subject)));
    }
    step("Message", state, details(pairs))
}

fn attempts_step(event: &Event) -> Markup {
    if event.attempts.is_empty() && event.dead_letters.is_empty() {
        return html! {};
    }
    let failed = event.attempts.len() as u64;
    let content = html! {
        @if !event.attempts.is_empty() {
            @let (attempts, hidden) = last_of(&event.attempts, ATTEMPTS_SHOWN);
            (earlier(hidden, "attempt"))
            ol.timeline { @for attempt in attempts { (show_attempt(attempt)) } }
        }
        @if !event.dead_letters.is_empty() { (list(&event.dead_letters)) }
    };
    step(
        "Failures",
        badge(Tone::Bad, &counted(failed, "failed attempt")),
        content,
    )
}

fn inbox_step(event: &Event) -> Markup {
    let Some(inbox) = &event.inbox else {
        let none = html! { p { "No transaction of it was committed." } };
        return step("Inbox", badge(Tone::Warn, "no row"), none);
    };
    let pairs = [
        ("Committed", full_time(inbox.settled_at)),
        ("Payload", html! { code.wrap { (inbox.payload_sha256) } }),
    ];
    step(
        "Inbox",
        badge(inbox_tone(&inbox.state), &inbox.state),
        details(pairs),
    )
}

fn outputs_step(event: &Event, copies: &str) -> Markup {
    let outputs = &event.outputs;
    if outputs.is_empty() {
        let none = html! {
            p {
                "The outbox has no output of it. Published outputs stay there for a while; the "
                "streams keep the messages."
            }
        };
        return step("Outputs", badge(Tone::Calm, "none"), none);
    }
    let heads = [
        "Output",
        "Subject",
        "State",
        "Place",
        "At its place",
        "#Copies",
        "Handled by",
    ];
    let rows = html! { @for output in outputs { (output_row(output)) } };
    let is_counted = outputs.iter().any(|output| output.copies.is_some());
    let content = html! {
        (table("Outputs", &heads, rows))
        @if !is_counted { p { a href=(copies) { "Count the copies on the streams" } } }
    };
    let number = outputs.len() as u64;
    step(
        "Outputs",
        badge(Tone::Calm, &counted(number, "output")),
        content,
    )
}

fn output_row(output: &EventOutput) -> Markup {
    let summary = &output.summary;
    html! {
        tr {
            th scope="row" {
                a href=(links::output(summary.number)) { (cell(&summary.id)) }
                @if output.is_platform { " " span.muted { "platform" } }
            }
            td { (cell(&summary.subject)) }
            td { (output_state(&summary.state)) }
            td {
                @match (&output.stream, output.stream_sequence) {
                    (Some(stream), Some(sequence)) => { (text(stream)) " " (sequence) },
                    _ => "–",
                }
            }
            td {
                @match output.on_stream {
                    Some("same") => (badge(Tone::Good, "same message")),
                    Some("different") => (badge(Tone::Bad, "another message")),
                    Some(_) => (badge(Tone::Calm, "gone")),
                    None => "–",
                }
            }
            td.number { @match output.copies { Some(copies) => (copies), None => "–" } }
            td {
                @for worker in &output.handled_by {
                    a href=(links::event(worker, &summary.message_id)) { (text(worker)) } " "
                }
            }
        }
    }
}

/// The state of an output.
pub fn output_state(state: &str) -> Markup {
    let tone = match state {
        "published" => Tone::Good,
        "parked" => Tone::Bad,
        "blocked" | "delayed" => Tone::Warn,
        "dropped" => Tone::Calm,
        _ => Tone::Busy,
    };
    badge(tone, state)
}

fn proof_step(event: &Event) -> Markup {
    let proof = &event.proof;
    let state = match (proof.holds, proof.is_settled) {
        (true, true) => badge(Tone::Good, "correct"),
        (true, false) => badge(Tone::Busy, "in progress"),
        (false, _) => badge(Tone::Bad, "problem"),
    };
    let content = html! {
        p.lead { (text(&proof.text)) }
        @if let Some(inbox) = &event.inbox {
            p.caption { "Settled " (time(inbox.settled_at)) "." }
        }
    };
    step("Proof", state, content)
}
