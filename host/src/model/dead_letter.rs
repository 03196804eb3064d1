//! The message that tells of a dead letter: the original bytes and headers, and its story in headers.

use std::time::Duration;

use bytes::Bytes;

use crate::model::message::{self, Headers, Output, OutputKind, output_id};
use crate::model::verdict::Letter;

/// The stream all dead letters go to.
pub const DLQ_STREAM: &str = "ONCELY_DLQ";

/// What that stream holds.
pub const DLQ_SUBJECTS: &str = "oncely.dlq.>";

/// How much of the detail travels in a header, in characters.
const DETAIL_MAX: usize = 1_000;

/// Room for the headers that are added when the letter has its number: `Oncely-Letter`, `Oncely-Group`, `Oncely-Redriven`.
const ADDED_LATER: usize = 128;

/// The message to `oncely.dlq.{worker}`. Its headers: all of the original's, but those of the transport (`Nats-*`), and
/// `Oncely-Worker`, `Oncely-Version`, `Oncely-Event-Id`, `Oncely-Reason`, `Oncely-Code`, `Oncely-Detail`,
/// `Oncely-Attempts`, `Oncely-Subject` (the original's), `Oncely-Stream` and `Oncely-Stream-Sequence`.
///
/// One that would be larger than `payload_max` goes without its body, and then without the original's headers, and says so in
/// `Oncely-Left-Out`: the letter in the database has all of it.
pub fn notice(letter: &Letter, payload_max: usize) -> Output {
    let (whole, payload_max) = (whole_notice(letter), payload_max.saturating_sub(ADDED_LATER));
    if message::size_on_its_way(&whole.headers, &whole.id, whole.body.len()) <= payload_max {
        return whole;
    }
    let left_out = |parts: &str| ("Oncely-Left-Out".to_owned(), parts.to_owned());
    let mut without = Output { body: Bytes::new(), ..whole };
    without.headers.push(left_out("body"));
    if message::size_on_its_way(&without.headers, &without.id, 0) > payload_max {
        without.headers.retain(|(name, _)| name.starts_with("Oncely-") && name != "Oncely-Left-Out");
        without.headers.push(left_out("body, headers"));
    }
    without
}

fn whole_notice(letter: &Letter) -> Output {
    let message = &letter.message;
    let mut headers: Headers = message
        .headers
        .iter()
        .filter(|(name, _)| {
            let name = name.to_ascii_lowercase();
            !name.starts_with("nats-") && !name.starts_with("oncely-")
        })
        .cloned()
        .collect();
    let mut add = |name: &str, value: String| headers.push((name.to_owned(), value));
    add("Oncely-Worker", letter.worker.clone());
    add("Oncely-Version", letter.version.to_string());
    add("Oncely-Event-Id", one_line(&message.event_id));
    add("Oncely-Reason", letter.reason.as_str().to_owned());
    if let Some(code) = &letter.code {
        add("Oncely-Code", one_line(code));
    }
    add("Oncely-Detail", one_line(&letter.detail));
    add("Oncely-Attempts", letter.attempts.to_string());
    add("Oncely-Subject", message.subject.clone());
    if let Some(origin) = &message.origin {
        add("Oncely-Stream", origin.stream.clone());
        add("Oncely-Stream-Sequence", origin.sequence.to_string());
    }
    // A second payload under one event id is a letter of its own, so its digest is part of the id.
    let digest = hex::encode(message.payload_sha256());
    let ordinal_free = format!("dlq:{}", digest.get(..16).unwrap_or_default());
    let id = output_id(&letter.worker, &message.event_id, 0);
    Output {
        kind: OutputKind::DeadLetter,
        id: format!("{ordinal_free}:{}", id.strip_suffix(":0").unwrap_or(&id)),
        event_id: message.event_id.clone(),
        ordinal: 0,
        subject: format!("oncely.dlq.{}", letter.worker),
        headers,
        body: message.body.clone(),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}

/// Fit for a header: no line breaks or other control characters, bounded.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(DETAIL_MAX).collect()
}
