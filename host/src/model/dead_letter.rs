//! The notice of a dead letter: the original bytes and headers, and the failure in further headers.

use std::time::Duration;

use bytes::Bytes;

use crate::model::message::{self, Headers, Output, OutputKind, output_id};
use crate::model::verdict::DeadLetter;

/// The stream of all dead letters.
pub const DLQ_STREAM: &str = "ONCELY_DLQ";

/// The subjects of [`DLQ_STREAM`].
pub const DLQ_SUBJECTS: &str = "oncely.dlq.>";

/// The longest text in a header of a notice, in characters.
const DETAIL_MAX: usize = 1_000;

/// Bytes reserved for headers that are added once the dead letter has its number:
/// `Oncely-Dead-Letter`, `Oncely-Group`, `Oncely-Redriven`.
const RESERVED_BYTES: usize = 128;

/// The message to `oncely.dlq.{worker}`.
///
/// Its headers are those of the original, except `Nats-*` and `Oncely-*`, and these:
///
/// - `Oncely-Worker`, `Oncely-Version`, `Oncely-Event-Id`
/// - `Oncely-Reason`, `Oncely-Code`, `Oncely-Detail`, `Oncely-Attempts`
/// - of the original, `Oncely-Subject`, `Oncely-Stream` and `Oncely-Stream-Sequence`
///
/// A notice larger than `payload_max` bytes omits its body and, if necessary, the original headers.
/// `Oncely-Omitted` names the omitted parts. The dead letter in the database is always complete.
pub fn notice(dead_letter: &DeadLetter, payload_max: usize) -> Output {
    let (whole, payload_max) = (
        full_notice(dead_letter),
        payload_max.saturating_sub(RESERVED_BYTES),
    );
    if message::wire_size(&whole.headers, &whole.id, whole.body.len()) <= payload_max {
        return whole;
    }

    // Omit the body, and if that is not enough the original headers.
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

    // The failure and the origin, in headers of the platform.
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

    // A second payload under one event id is a separate dead letter, so its digest is part of the
    // id.
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

/// Makes a text fit for a header: no control characters, at most [`DETAIL_MAX`] characters.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(DETAIL_MAX)
        .collect()
}
