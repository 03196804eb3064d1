//! A message as a worker receives it, and how its event id is found.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{base64_text, fault};

/// Header names and values in order; a name may repeat, case is kept.
pub type Headers = Vec<(String, String)>;

/// The longest event id, in bytes of UTF-8.
pub const EVENT_ID_MAX: usize = 255;

/// One message for one worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// What dedupes. Never empty, at most [`EVENT_ID_MAX`] bytes.
    pub event_id: String,
    pub subject: String,
    pub headers: Headers,
    #[serde(with = "base64_text")]
    pub body: Bytes,
    /// Where it stands; none for a message that did not come from a stream.
    pub origin: Option<Origin>,
    /// Set when it was a dead letter and was put back.
    pub redriven: Option<Redriven>,
}

/// What a message brings that was put back from the dead letters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redriven {
    /// Failed attempts before it was put back: those from here on have a budget of their own.
    pub attempts_before: u32,
    /// Of the original: a message with a corrected body is still the same event.
    pub payload_sha256: [u8; 32],
}

/// A place on a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub stream: String,
    pub sequence: u64,
    pub stored_at: Timestamp,
}

impl Message {
    /// SHA-256 over subject and body: two messages with one event id must agree on it. A message that was corrected keeps
    /// that of the original.
    pub fn payload_sha256(&self) -> [u8; 32] {
        if fault::mutant(fault::DROP_PAYLOAD_HASH) {
            return [0; 32];
        }
        if let Some(redriven) = &self.redriven {
            return redriven.payload_sha256;
        }
        let mut hasher = Sha256::new();
        hasher.update((self.subject.len() as u64).to_be_bytes());
        hasher.update(self.subject.as_bytes());
        hasher.update(&self.body);
        hasher.finalize().into()
    }

    /// How many attempts failed before its present budget began.
    pub fn attempts_before(&self) -> u32 {
        self.redriven.as_ref().map_or(0, |redriven| redriven.attempts_before)
    }

    /// The first value of a header, its name compared without regard to case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

/// The first value of `name` in `headers`, compared without regard to case.
pub fn header<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// A message a delivery emitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Travels as `Nats-Msg-Id`.
    pub id: String,
    /// The event that caused it.
    pub event_id: String,
    /// 0 for the first output of its delivery.
    pub ordinal: u32,
    pub subject: String,
    pub headers: Headers,
    pub body: Bytes,
    pub ordering_key: Option<String>,
    /// Zero to publish at once.
    pub delay: Duration,
}

/// An id that a publisher sent and that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidEventId {
    /// What stands in for it in the inbox and the dead letter.
    pub stand_in: String,
    /// What is wrong with the one that was sent, for a person.
    pub why: String,
}

/// The event id of a message: CloudEvents `ce-source` and `ce-id` as `source|id`, else `Nats-Msg-Id`,
/// else the stream's name, creation time (microseconds since the epoch) and sequence as
/// `stream@created:sequence`, so that a stream that was deleted and made again never repeats one.
pub fn event_id(
    headers: &Headers,
    stream: &str,
    stream_created: Timestamp,
    sequence: u64,
) -> Result<String, InvalidEventId> {
    let derived = place_id(stream, stream_created, sequence);
    let sent = match (header(headers, "ce-id"), header(headers, "ce-source")) {
        // `|` cannot stand in a URI reference, so a well-formed source has none; percent-encoding it in
        // the others keeps two different pairs from ever giving the same id.
        (Some(id), Some(source)) => format!("{}|{id}", source.replace('|', "%7C")),
        (Some(id), None) => id.to_owned(),
        (None, _) => match header(headers, "Nats-Msg-Id") {
            Some(id) => id.to_owned(),
            None => return Ok(derived),
        },
    };
    if sent.is_empty() {
        return Ok(derived);
    }
    let why = if sent.len() > EVENT_ID_MAX {
        format!("the event id has {} bytes; at most {EVENT_ID_MAX} are allowed", sent.len())
    } else if sent.contains('\0') {
        "the event id contains a NUL character".to_owned()
    } else {
        return Ok(sent);
    };
    Err(InvalidEventId { stand_in: derived, why })
}

/// The id of a message that brings none: its place, `stream@created:sequence`.
pub fn place_id(stream: &str, stream_created: Timestamp, sequence: u64) -> String {
    format!("{stream}@{}:{sequence}", stream_created.as_microsecond())
}

/// The id of the output number `ordinal` (from 0) of one delivery: the same input always yields the same.
/// An event id too long to fit is replaced by its SHA-256, so that ids do not grow along a chain of workers.
pub fn output_id(worker: &str, event_id: &str, ordinal: usize) -> String {
    let id = format!("{worker}:{event_id}:{ordinal}");
    if id.len() <= EVENT_ID_MAX {
        return id;
    }
    format!("{worker}:{}:{ordinal}", hex::encode(Sha256::digest(event_id.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_of(headers: &[(&str, &str)]) -> Result<String, InvalidEventId> {
        let headers = headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        event_id(&headers, "ORDERS", Timestamp::UNIX_EPOCH, 7)
    }

    #[test]
    fn event_id_prefers_cloudevents_then_msg_id_then_place() {
        assert_eq!(id_of(&[("ce-id", "1"), ("ce-source", "/shop"), ("Nats-Msg-Id", "x")]), Ok("/shop|1".into()));
        assert_eq!(id_of(&[("Ce-Id", "1"), ("Nats-Msg-Id", "x")]), Ok("1".into()));
        assert_eq!(id_of(&[("Nats-Msg-Id", "x")]), Ok("x".into()));
        assert_eq!(id_of(&[]), Ok("ORDERS@0:7".into()));
    }

    #[test]
    fn event_id_is_never_empty_and_an_unusable_one_gets_a_stand_in() {
        assert_eq!(id_of(&[("Nats-Msg-Id", "")]), Ok("ORDERS@0:7".into()));
        let long = "x".repeat(256);
        let invalid = id_of(&[("Nats-Msg-Id", &long)]).unwrap_err();
        assert_eq!(invalid.stand_in, "ORDERS@0:7");
        assert!(invalid.why.contains("256 bytes"));
        assert!(id_of(&[("Nats-Msg-Id", "a\0b")]).is_err());
    }

    #[test]
    fn event_ids_of_different_sources_never_collide() {
        assert_ne!(id_of(&[("ce-id", "b|c"), ("ce-source", "a")]), id_of(&[("ce-id", "c"), ("ce-source", "a|b")]));
    }

    #[test]
    fn output_ids_are_stable_and_never_outgrow_the_limit() {
        assert_eq!(output_id("pay", "e1", 0), "pay:e1:0");
        let long = output_id("pay", &"e".repeat(255), 12);
        assert!(long.len() <= EVENT_ID_MAX);
        assert_eq!(long, output_id("pay", &"e".repeat(255), 12));
    }
}
