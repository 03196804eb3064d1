//! The message that tells of a dead letter: the original bytes and headers, and its story in headers.

use std::time::Duration;

use bytes::Bytes;

use crate::model::message::{self, Headers, Output, OutputKind, output_id};
use crate::model::verdict::DeadLetter;

/// The stream all dead letters go to.
pub const DLQ_STREAM: &str = "ONCELY_DLQ";

/// What that stream holds.
pub const DLQ_SUBJECTS: &str = "oncely.dlq.>";

/// How much of the detail travels in a header, in characters.
const DETAIL_MAX: usize = 1_000;

/// Room for the headers that are added when the letter has its number: `Oncely-Dead-Letter`, `Oncely-Group`, `Oncely-Redriven`.
const RESERVED_BYTES: usize = 128;

/// The message to `oncely.dlq.{worker}`. Its headers: all of the original's, but those of the transport (`Nats-*`), and
/// `Oncely-Worker`, `Oncely-Version`, `Oncely-Event-Id`, `Oncely-Reason`, `Oncely-Code`, `Oncely-Detail`,
/// `Oncely-Attempts`, `Oncely-Subject` (the original's), `Oncely-Stream` and `Oncely-Stream-Sequence`.
///
/// One that would be larger than `payload_max` goes without its body, and then without the original's headers, and says so in
/// `Oncely-Omitted`: the letter in the database has all of it.
pub fn notice(dead_letter: &DeadLetter, payload_max: usize) -> Output {
    let (whole, payload_max) = (
        full_notice(dead_letter),
        payload_max.saturating_sub(RESERVED_BYTES),
    );
    if message::wire_size(&whole.headers, &whole.id, whole.body.len()) <= payload_max {
        return whole;
    }
    let left_out = |parts: &str| ("Oncely-Omitted".to_owned(), parts.to_owned());
    let mut without = Output {
        body: Bytes::new(),
        ..whole
    };
    without.headers.push(left_out("body"));
    if message::wire_size(&without.headers, &without.id, 0) > payload_max {
        without
            .headers
            .retain(|(name, _)| name.starts_with("Oncely-") && name != "Oncely-Omitted");
        without.headers.push(left_out("body, headers"));
    }
    without
}

fn full_notice(dead_letter: &DeadLetter) -> Output {
    let message = &dead_letter.message;
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
    add("Oncely-Worker", dead_letter.worker.clone());
    add("Oncely-Version", dead_letter.version.to_string());
    add("Oncely-Event-Id", one_line(&message.event_id));
    add("Oncely-Reason", dead_letter.reason.as_str().to_owned());
    if let Some(code) = &dead_letter.code {
        add("Oncely-Code", one_line(code));
    }
    add("Oncely-Detail", one_line(&dead_letter.detail));
    add("Oncely-Attempts", dead_letter.attempts.to_string());
    add("Oncely-Subject", message.subject.clone());
    if let Some(origin) = &message.origin {
        add("Oncely-Stream", origin.stream.clone());
        add("Oncely-Stream-Sequence", origin.sequence.to_string());
    }
    // A second payload under one event id is a letter of its own, so its digest is part of the id.
    let digest = hex::encode(message.payload_sha256());
    let ordinal_free = format!("dlq:{}", digest.get(..16).unwrap_or_default());
    let id = output_id(&dead_letter.worker, &message.event_id, 0);
    Output {
        kind: OutputKind::DeadLetter,
        id: format!("{ordinal_free}:{}", id.strip_suffix(":0").unwrap_or(&id)),
        event_id: message.event_id.clone(),
        ordinal: 0,
        subject: format!("oncely.dlq.{}", dead_letter.worker),
        headers,
        body: message.body.clone(),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}

/// Fit for a header: no line breaks or other control characters, bounded.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(DETAIL_MAX)
        .collect()
}
