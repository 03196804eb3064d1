//! The streams that workers consume and publish to, and those of the platform.

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
use super::parts::{count, table, text, time};
use super::visitor::{Answer, Visitor};
use crate::config::manifest::Worker;
use crate::model::subject;
use crate::model::units;

/// How old the listing of the server may be.
const AGE_MAX: Duration = Duration::from_secs(5);

/// One stream.
#[derive(Debug, Serialize)]
struct Stream {
    name: String,
    subjects: Vec<String>,
    messages: u64,
    first_sequence: u64,
    last_sequence: u64,
    created: Timestamp,
    /// How long it keeps a message, in milliseconds; none for no limit.
    max_age_ms: Option<u64>,
    consumed_by: BTreeSet<String>,
    filled_by: BTreeSet<String>,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let workers = console.host.services.deployed_workers().await?;
    let known = console.host.services.bus.streams(AGE_MAX).await?;
    let names = |fits: &dyn Fn(&Worker) -> bool| {
        let fitting = workers.iter().filter(|worker| fits(worker));
        fitting
            .map(|worker| worker.name.clone())
            .collect::<BTreeSet<String>>()
    };
    let streams = known.iter().map(|stream| Stream {
        consumed_by: names(&|worker| worker.stream.as_ref() == Some(&stream.name)),
        filled_by: names(&|worker| {
            let takes = |output: &String| {
                stream
                    .subjects
                    .iter()
                    .any(|pattern| subject::matches(pattern, output))
            };
            worker.outputs.iter().any(takes)
        }),
        name: stream.name.clone(),
        subjects: stream.subjects.clone(),
        messages: stream.messages,
        first_sequence: stream.first_sequence,
        last_sequence: stream.last_sequence,
        created: stream.created,
        max_age_ms: stream.max_age.map(|age| age.as_millis() as u64),
    });
    let mut streams: Vec<Stream> = streams.collect();
    // Streams of workers first, then those of others, then those of the platform.
    streams.sort_by_key(|stream| {
        let is_used = !stream.consumed_by.is_empty() || !stream.filled_by.is_empty();
        (
            stream.name.starts_with("ONCELY_"),
            !is_used,
            stream.name.clone(),
        )
    });
    visitor.answer(Section::Streams, "Streams", &streams, |streams| {
        let heads = [
            "Stream",
            "Subjects",
            "#Messages",
            "#Last",
            "Keeps",
            "Created",
            "Consumed by",
            "Filled by",
        ];
        html! {
            h1 { "Streams" }
            @if streams.is_empty() { p.empty { "The server has no streams." } }
            @else { (table("Streams", &heads, html! { @for stream in streams { (row(stream)) } })) }
        }
    })
}

fn row(stream: &Stream) -> Markup {
    let linked = |names: &BTreeSet<String>| {
        html! {
            @for name in names { a href=(links::worker(name)) { (text(name)) } " " }
        }
    };
    let age = stream.max_age_ms.map(Duration::from_millis);
    html! {
        tr {
            th scope="row" { (text(&stream.name)) }
            td { @for subject in &stream.subjects { code.tag { (text(subject)) } " " } }
            td.number { (count(stream.messages)) }
            td.number { (count(stream.last_sequence)) }
            td { (age.map_or_else(|| "all".to_owned(), units::format_duration)) }
            td { (time(stream.created)) }
            td { (linked(&stream.consumed_by)) }
            td { (linked(&stream.filled_by)) }
        }
    }
}
