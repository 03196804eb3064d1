//! A message as a worker receives it, and the derivation of its event id.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::base64_text;
use crate::model::cloud_events;

/// Header names and values, in order. A name may repeat; its case is kept.
pub type Headers = Vec<(String, String)>;

/// The longest event id, in bytes of UTF-8.
pub const EVENT_ID_MAX: usize = 255;

/// The longest delay of an output.
pub const DELAY_MAX: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// One message for one worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// The deduplication key. Never empty, at most [`EVENT_ID_MAX`] bytes.
    pub event_id: String,
    /// The subject it was published to.
    pub subject: String,
    /// All headers, in order; for example the `Nats-Msg-Id` of the publisher.
    pub headers: Headers,
    /// The payload; for a redriven message, the last corrected one.
    #[serde(with = "base64_text")]
    pub body: Bytes,
    /// Its place on a stream; none for a message that did not come from a stream.
    pub origin: Option<Origin>,
    /// Set for a redriven dead letter.
    pub redriven: Option<Redriven>,
}

/// Data that a redriven message carries from its dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redriven {
    /// Failed attempts before the redrive. Later attempts have a budget of their own.
    pub attempts_before: u32,
    /// Of the original payload: a message with a corrected body is still the same event.
    pub payload_sha256: [u8; 32],
}

/// A place on a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The name of the stream.
    pub stream: String,
    /// The sequence of the message on that stream.
    pub sequence: u64,
    /// When the stream stored the message.
    pub stored_at: Timestamp,
}

impl Message {
    /// SHA-256 over subject and body. Two messages with one event id must agree on it. A corrected
    /// message keeps the hash of the original.
    pub fn payload_sha256(&self) -> [u8; 32] {
        if let Some(redriven) = &self.redriven {
            return redriven.payload_sha256;
        }
        let mut hasher = Sha256::new();
        hasher.update((self.subject.len() as u64).to_be_bytes());
        hasher.update(self.subject.as_bytes());
        hasher.update(&self.body);
        hasher.finalize().into()
    }

    /// Failed attempts before the current budget began.
    pub fn attempts_before(&self) -> u32 {
        self.redriven
            .as_ref()
            .map_or(0, |redriven| redriven.attempts_before)
    }

    /// The first value of a header. Names are compared without regard to case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

/// The first value of `name` in `headers`. Names are compared without regard to case.
pub fn header<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    headers
        .iter()
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}

/// A message that a delivery emits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Selects the derivation of the published id.
    pub kind: OutputKind,
    /// The readable id, sent in the header `Oncely-Output-Id`. [`crate::model::output_ids`] derives
    /// `Nats-Msg-Id` from it and from the fields around it.
    pub id: String,
    /// The event that caused it.
    pub event_id: String,
    /// 0 for the first output of its delivery.
    pub ordinal: u32,
    /// The subject to publish it to, without wildcards.
    pub subject: String,
    /// The headers, before `Nats-Msg-Id` and `Oncely-Output-Id` are added.
    pub headers: Headers,
    /// The payload, published unchanged.
    pub body: Bytes,
    /// Outputs of one worker with the same key are published in order; none for no order.
    pub ordering_key: Option<String>,
    /// Zero to publish at once.
    pub delay: Duration,
}

/// The kind of an output. Ids of different kinds never collide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// From a handler. Its id follows from event and ordinal.
    Derived,
    /// From a handler, with an id that the handler chose within its worker.
    Chosen,
    /// Published over HTTP without a worker. Its id is random.
    Published,
    /// The notice of a dead letter.
    DeadLetter,
    /// The pointer to a redriven dead letter.
    Pointer,
    /// The invalidated tags of the cache.
    Invalidation,
    /// The notice of a raised or cleared alarm.
    Alarm,
    /// A checkpoint of receipts.
    Checkpoint,
}

/// A publisher's event id that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidEventId {
    /// Replaces it in the inbox and in the dead letter.
    pub fallback_id: String,
    /// The defect of the publisher's id, for display.
    pub why: String,
}

/// Whether a text is a `traceparent` (W3C Trace Context, section 3.2). It has 2, 32, 16 and 2 hex
/// digits, and neither id is all zeros.
pub fn is_traceparent(text: &str) -> bool {
    let is_hex = |part: &str, length: usize| {
        part.len() == length
            && part
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id =
        |part: &str, length: usize| is_hex(part, length) && part.bytes().any(|byte| byte != b'0');
    let mut parts = text.split('-');
    let (Some(version), Some(trace), Some(span), Some(flags)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let is_whole = version != "00" || parts.next().is_none();
    is_hex(version, 2)
        && version != "ff"
        && is_id(trace, 32)
        && is_id(span, 16)
        && is_hex(flags, 2)
        && is_whole
}

/// The size of a platform message as the server counts it, in bytes. It covers the headers with
/// both ids, and the body.
pub fn wire_size(headers: &Headers, id: &str, body: usize) -> usize {
    let lines: usize = headers
        .iter()
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum();
    let own = "NATS/1.0\r\nNats-Msg-Id: \r\nOncely-Output-Id: \r\n\r\n".len();
    lines + own + id.len().max(MESSAGE_ID_LENGTH) + id.len() + body
}

/// The longest published id, in bytes: a UUID. A keyed hash is shorter.
const MESSAGE_ID_LENGTH: usize = 36;

/// The event id of a message, from the first source that has a value:
///
/// - CloudEvents `ce-source` and `ce-id`, as `source|id`
/// - the id and source in the `body` of an event in structured mode
/// - `Nats-Msg-Id`
/// - its place on the stream, as `stream@stored:sequence`, with the time in microseconds since the
///   epoch
///
/// The time keeps a stream that was recreated, or restored from an older copy, from repeating an
/// id. Without its `body`, an event in structured mode counts as one without a CloudEvents id.
///
/// # Errors
///
/// Returns [`InvalidEventId`] if the publisher's id cannot be used.
pub fn event_id(
    headers: &Headers,
    body: Option<&[u8]>,
    stream: &str,
    stored_at: Timestamp,
    sequence: u64,
) -> Result<String, InvalidEventId> {
    let derived = derived_event_id(stream, stored_at, sequence);
    if cloud_events::media_type(headers) == cloud_events::BATCH {
        return Err(InvalidEventId {
            fallback_id: derived,
            why:
                "a batch of CloudEvents has no event id; publish each event as a message of its own"
                    .to_owned(),
        });
    }
    let Some(sent) = publisher_event_id(headers, body) else {
        return Ok(derived);
    };
    match check_event_id(&sent) {
        Ok(()) => Ok(sent),
        Err(why) => Err(InvalidEventId {
            fallback_id: derived,
            why,
        }),
    }
}

/// The id that the publisher chose; none if the message carries none.
fn publisher_event_id(headers: &Headers, body: Option<&[u8]>) -> Option<String> {
    match (
        non_empty_header(headers, "ce-id"),
        non_empty_header(headers, "ce-source"),
    ) {
        (Some(id), source) => Some(cloud_event_id(
            &percent_decoded(id),
            source.map(percent_decoded).as_deref(),
        )),
        (None, _) => body
            .and_then(|body| structured_id(headers, body))
            .or_else(|| non_empty_header(headers, "Nats-Msg-Id").map(str::to_owned)),
    }
}

/// The id of an event in structured mode: `application/cloudevents+json`.
fn structured_id(headers: &Headers, body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Envelope {
        id: String,
        source: Option<String>,
    }
    let is_structured = cloud_events::media_type(headers) == cloud_events::STRUCTURED;
    let envelope: Envelope = is_structured.then(|| serde_json::from_slice(body).ok())??;
    let is_non_empty = |text: &String| !text.trim().is_empty();
    let source = envelope.source.filter(is_non_empty);
    Some(envelope.id)
        .filter(is_non_empty)
        .map(|id| cloud_event_id(&id, source.as_deref()))
}

fn cloud_event_id(id: &str, source: Option<&str>) -> String {
    match source {
        // `|` cannot stand in a URI reference, so a well-formed source has none. Percent-encoding
        // it in other sources keeps two different pairs from sharing an id.
        Some(source) => format!("{}|{id}", source.replace('|', "%7C")),
        None => id.to_owned(),
    }
}

/// Decodes a header of a CloudEvent. Publishers may percent-encode non-ASCII text, spaces, quotes
/// and percent signs (CloudEvents HTTP binding, section 3.1.3.2). A value that does not decode to
/// UTF-8 stays as it is.
pub(super) fn percent_decoded(value: &str) -> String {
    percent_encoding::percent_decode_str(value)
        .decode_utf8()
        .map_or_else(|_| value.to_owned(), String::from)
}

/// The first value of `name` that is not blank.
fn non_empty_header<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    let values = headers
        .iter()
        .filter(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str());
    values.into_iter().find(|value| !value.trim().is_empty())
}

/// Checks an id that a publisher chose. It must fit the inbox. It must not have the form of an id
/// derived from a stream, which belongs to the message at that place.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn check_event_id(id: &str) -> Result<(), String> {
    if id.trim().is_empty() {
        return Err("the event id is empty".to_owned());
    }
    if id.len() > EVENT_ID_MAX {
        return Err(format!(
            "the event id has {} bytes; at most {EVENT_ID_MAX} are allowed",
            id.len()
        ));
    }
    if id.contains('\0') {
        return Err("the event id contains a NUL character".to_owned());
    }
    if is_derived_event_id(id) {
        return Err(
            "the event id has the form `STREAM@stored:sequence`, which is reserved for messages \
             without an id"
                .to_owned(),
        );
    }
    Ok(())
}

/// The id of a message without one: `stream@stored:sequence`. It never contains `|`, which
/// separates a `ce-source` from its `ce-id`.
pub fn derived_event_id(stream: &str, stored_at: Timestamp, sequence: u64) -> String {
    format!(
        "{}@{}:{sequence}",
        stream.replace('%', "%25").replace('|', "%7C"),
        stored_at.as_microsecond()
    )
}

/// Whether an id has the form of a derived one.
fn is_derived_event_id(id: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((stream, place)) = id.rsplit_once('@') else {
        return false;
    };
    let Some((stored, sequence)) = place.split_once(':') else {
        return false;
    };
    !stream.contains('|')
        && is_number(stored.strip_prefix('-').unwrap_or(stored))
        && is_number(sequence)
}

/// The readable id of the output number `ordinal` (from 0) of a delivery. The same input always
/// yields the same id. An event id that is too long is replaced by its SHA-256, so that ids do not
/// grow along a chain of workers.
pub fn output_id(worker: &str, event_id: &str, ordinal: usize) -> String {
    let id = format!("{worker}:{event_id}:{ordinal}");
    if id.len() <= EVENT_ID_MAX {
        return id;
    }
    format!(
        "{worker}:{}:{ordinal}",
        hex::encode(Sha256::digest(event_id.as_bytes()))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_of(headers: &[(&str, &str)]) -> Result<String, InvalidEventId> {
        let headers = headers
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        event_id(&headers, None, "ORDERS", Timestamp::UNIX_EPOCH, 7)
    }

    #[test]
    fn event_id_prefers_cloudevents_then_msg_id_then_position() {
        assert_eq!(
            id_of(&[("ce-id", "1"), ("ce-source", "/shop"), ("Nats-Msg-Id", "x")]),
            Ok("/shop|1".into())
        );
        assert_eq!(
            id_of(&[("Ce-Id", "1"), ("Nats-Msg-Id", "x")]),
            Ok("1".into())
        );
        assert_eq!(id_of(&[("Nats-Msg-Id", "x")]), Ok("x".into()));
        assert_eq!(id_of(&[]), Ok("ORDERS@0:7".into()));
    }

    #[test]
    fn an_event_has_one_id_in_every_form() {
        let structured = |kind: &str, body: &str| {
            let headers = vec![
                ("Content-Type".to_owned(), kind.to_owned()),
                ("Nats-Msg-Id".to_owned(), "n".to_owned()),
            ];
            event_id(
                &headers,
                Some(body.as_bytes()),
                "ORDERS",
                Timestamp::UNIX_EPOCH,
                7,
            )
            .unwrap()
        };
        let body = r#"{"specversion": "1.0", "id": "évènement 1", "source": "/shop", "type": "t", "data": {}}"#;
        let binary = id_of(&[("ce-id", "évènement 1"), ("ce-source", "/shop")]).unwrap();
        assert_eq!(
            id_of(&[("ce-id", "%C3%A9v%C3%A8nement%201"), ("ce-source", "/shop")]).unwrap(),
            binary
        );
        for kind in [
            "application/cloudevents+json",
            "Application/CloudEvents+JSON; charset=UTF-8",
        ] {
            assert_eq!(structured(kind, body), binary);
        }
        assert_eq!(structured("application/json", body), "n");
        for broken in ["{", "{}", r#"{"id": 1}"#, r#"{"id": " "}"#] {
            assert_eq!(structured("application/cloudevents+json", broken), "n");
        }
        let long = format!(r#"{{"id": "{}", "source": "/shop"}}"#, "x".repeat(300));
        for (kind, body) in [
            (cloud_events::STRUCTURED, long.as_str()),
            (cloud_events::BATCH, body),
            ("application/CloudEvents-Batch+JSON; charset=utf-8", "[]"),
        ] {
            let headers = vec![("Content-Type".to_owned(), kind.to_owned())];
            let invalid = event_id(
                &headers,
                Some(body.as_bytes()),
                "ORDERS",
                Timestamp::UNIX_EPOCH,
                7,
            );
            assert_eq!(invalid.unwrap_err().fallback_id, "ORDERS@0:7");
        }
        // Text that is not an escape stays as it is.
        for id in ["100%", "%zz", "%ff", "a+b"] {
            assert_eq!(id_of(&[("ce-id", id)]), Ok(id.to_owned()));
        }
    }

    #[test]
    fn is_traceparent_accepts_only_valid_values() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(is_traceparent(good));
        for bad in [
            "garbage",
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }

    #[test]
    fn event_id_skips_headers_that_are_empty() {
        let derived = "ORDERS@0:7";
        for (headers, expected) in [
            (vec![("Nats-Msg-Id", "")], derived),
            (vec![("Nats-Msg-Id", " \t")], derived),
            (vec![("ce-id", "")], derived),
            (vec![("ce-id", ""), ("ce-source", "/shop")], derived),
            (
                vec![("ce-id", ""), ("ce-source", "/shop"), ("Nats-Msg-Id", "x")],
                "x",
            ),
            (vec![("ce-id", "  "), ("Nats-Msg-Id", "x")], "x"),
            (vec![("ce-source", "/shop"), ("Nats-Msg-Id", "x")], "x"),
            (
                vec![("ce-id", "1"), ("ce-source", ""), ("Nats-Msg-Id", "x")],
                "1",
            ),
            (
                vec![
                    ("ce-id", ""),
                    ("CE-ID", "2"),
                    ("ce-source", " "),
                    ("ce-source", "/shop"),
                ],
                "/shop|2",
            ),
            (vec![("nats-msg-id", ""), ("Nats-Msg-Id", "y")], "y"),
        ] {
            assert_eq!(id_of(&headers), Ok(expected.into()), "{headers:?}");
        }
    }

    #[test]
    fn event_ids_in_the_derived_form_are_refused() {
        for id in [
            "ORDERS@0:7",
            "ORDERS@0:8",
            "OTHER@1795915819192864:1231",
            "a@b@1:2",
            "@1:2",
            "ORDERS@-5:7",
        ] {
            for headers in [
                vec![("Nats-Msg-Id", id)],
                vec![("ce-id", id)],
                vec![("ce-id", id), ("ce-source", "")],
            ] {
                let invalid = id_of(&headers).unwrap_err();
                assert_eq!(invalid.fallback_id, "ORDERS@0:7");
                assert!(invalid.why.contains("reserved"), "{}", invalid.why);
            }
        }
        for id in [
            "ORDERS@0",
            "ORDERS@0:",
            "ORDERS@:7",
            "ORDERS@x:7",
            "ORDERS@0:7a",
            "ada@example.com",
            "0:7",
        ] {
            assert_eq!(id_of(&[("ce-id", id)]), Ok(id.into()));
        }
        // With a source, the id differs from that of any place, regardless of the stream's name.
        let sourced = id_of(&[("ce-id", "ORDERS@0:7"), ("ce-source", "/shop")]);
        assert_eq!(sourced, Ok("/shop|ORDERS@0:7".into()));
        assert_eq!(
            derived_event_id("/shop|ORDERS", Timestamp::UNIX_EPOCH, 7),
            "/shop%7CORDERS@0:7"
        );
    }

    #[test]
    fn an_unusable_event_id_gets_a_fallback_id() {
        let long = "x".repeat(256);
        let invalid = id_of(&[("Nats-Msg-Id", &long)]).unwrap_err();
        assert_eq!(invalid.fallback_id, "ORDERS@0:7");
        assert!(invalid.why.contains("256 bytes"));
        assert!(id_of(&[("Nats-Msg-Id", "a\0b")]).is_err());
    }

    #[test]
    fn event_ids_of_different_sources_never_collide() {
        assert_ne!(
            id_of(&[("ce-id", "b|c"), ("ce-source", "a")]),
            id_of(&[("ce-id", "c"), ("ce-source", "a|b")])
        );
    }

    #[test]
    fn output_ids_are_stable_and_never_outgrow_the_limit() {
        assert_eq!(output_id("pay", "e1", 0), "pay:e1:0");
        let long = output_id("pay", &"e".repeat(255), 12);
        assert!(long.len() <= EVENT_ID_MAX);
        assert_eq!(long, output_id("pay", &"e".repeat(255), 12));
    }
}
