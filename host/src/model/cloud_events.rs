//! CloudEvents 1.0 in binary and in structured mode.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::model::message::{Headers, Output, header, percent_decoded};

/// The content type of an event in structured mode.
pub const STRUCTURED: &str = "application/cloudevents+json";

/// The content type of several events in one message.
pub const BATCH: &str = "application/cloudevents-batch+json";

/// The media type of a message in lower case, without parameters; empty if it has none.
pub fn media_type(headers: &Headers) -> String {
    let kind = header(headers, "content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default();
    kind.trim().to_ascii_lowercase()
}

/// The value that a schema describes: the body, or the data of an event in structured mode.
///
/// # Errors
/// The defect of the body, as a clause without a full stop.
pub fn data(headers: &Headers, body: &[u8]) -> Result<Value, String> {
    let not_json = |error: serde_json::Error| format!("the body is not JSON: {error}");
    let value: Value = serde_json::from_slice(body).map_err(not_json)?;
    if media_type(headers) != STRUCTURED {
        return Ok(value);
    }
    let Value::Object(mut event) = value else {
        return Err("the event is not a JSON object".to_owned());
    };
    if let Some(data) = event.remove("data") {
        return Ok(data);
    }
    match event.get("data_base64").and_then(Value::as_str) {
        Some(data) => {
            let data = STANDARD
                .decode(data)
                .map_err(|_| "`data_base64` of the event is not base64".to_owned())?;
            serde_json::from_slice(&data)
                .map_err(|error| format!("`data_base64` of the event is not JSON: {error}"))
        }
        None => Err("the event has no `data`".to_owned()),
    }
}

/// The characters that are percent-encoded in the header of an attribute, beside those outside
/// ASCII (CloudEvents HTTP binding, section 3.1.3.2).
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// The prefix of the headers of attributes.
const PREFIX: &str = "ce-";

/// The attributes that the host gives to an output, by name.
pub type Attributes = Vec<(&'static str, String)>;

/// Whether a message is an event in structured mode, or a batch of events.
pub fn is_enveloped(headers: &Headers) -> bool {
    [STRUCTURED, BATCH].contains(&media_type(headers).as_str())
}

/// Adds attributes to an output as headers. Headers of the handler win.
pub fn add_headers(output: &mut Output, attributes: Attributes) {
    if header(&output.headers, "content-type").is_none()
        && let Some(kind) = content_type(&output.headers, &output.body)
    {
        output.headers.push(("Content-Type".to_owned(), kind));
    }
    for (name, value) in attributes {
        let name = format!("{PREFIX}{name}");
        if header(&output.headers, &name).is_none() {
            let value = utf8_percent_encode(&value, ENCODED).to_string();
            output.headers.push((name, value));
        }
    }
}

/// Makes an output an event in structured mode. Attributes in headers of the handler win, and move
/// into the event.
pub fn envelop(output: &mut Output, attributes: Attributes) {
    let kind = content_type(&output.headers, &output.body);
    let mut event: Map<String, Value> = attributes
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect();
    if let Some(kind) = kind {
        event.insert("datacontenttype".to_owned(), Value::from(kind));
    }
    output.headers.retain(|(name, value)| {
        let name = name.to_ascii_lowercase();
        let attribute = name.strip_prefix(PREFIX).filter(|name| is_attribute(name));
        if let Some(attribute) = attribute {
            event.insert(attribute.to_owned(), Value::from(percent_decoded(value)));
        }
        attribute.is_none() && name != "content-type"
    });
    let kind = event.get("datacontenttype").and_then(Value::as_str);
    let is_json = is_json_type(kind.unwrap_or_default()) && is_json(&output.body);
    let is_text = kind.is_some_and(|kind| kind.starts_with("text/"));

    // JSON is inserted as it is, so that no number changes.
    let mut raw = None;
    match std::str::from_utf8(&output.body) {
        Ok(body) if is_json => raw = Some(body),
        _ if output.body.is_empty() => {}
        Ok(body) if is_text => {
            event.insert("data".to_owned(), Value::from(body));
        }
        _ => {
            let data = STANDARD.encode(&output.body);
            event.insert("data_base64".to_owned(), Value::from(data));
        }
    }
    let mut text = Value::Object(event).to_string();
    if let Some(data) = raw {
        text.pop();
        text = format!("{text},\"data\":{data}}}");
    }
    output.body = Bytes::from(text);
    let kind = ("Content-Type".to_owned(), STRUCTURED.to_owned());
    output.headers.push(kind);
}

/// The content type of an output: that of its handler, else by its body; none if it has no body.
fn content_type(headers: &Headers, body: &[u8]) -> Option<String> {
    match header(headers, "content-type") {
        Some(kind) => Some(kind.to_owned()),
        None if body.is_empty() => None,
        None if is_json(body) => Some("application/json".to_owned()),
        None => Some("application/octet-stream".to_owned()),
    }
}

fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(body).is_ok()
}

/// Whether a content type is JSON: `application/json`, or one that ends with `+json`.
fn is_json_type(kind: &str) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    kind == "application/json" || kind == "text/json" || kind.ends_with("+json")
}

/// Whether an attribute may have this name.
fn is_attribute(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    !name.is_empty() && name != "data" && name.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::model::message::OutputKind;

    fn output(headers: &[(&str, &str)], body: &str) -> Output {
        let headers = headers.iter();
        Output {
            kind: OutputKind::Derived,
            id: "w:e:0".to_owned(),
            event_id: "e".to_owned(),
            ordinal: 0,
            subject: "a.b".to_owned(),
            headers: headers
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            body: Bytes::from(body.to_owned()),
            ordering_key: None,
            delay: Duration::ZERO,
        }
    }

    fn attributes() -> Attributes {
        vec![
            ("specversion", "1.0".to_owned()),
            ("id", "w:é 1%:0".to_owned()),
            ("type", "t".to_owned()),
        ]
    }

    fn enveloped(headers: &[(&str, &str)], body: &str) -> (Headers, Value) {
        let mut output = output(headers, body);
        envelop(&mut output, attributes());
        let event = serde_json::from_slice(&output.body).unwrap();
        (output.headers, event)
    }

    #[test]
    fn attributes_become_headers_unless_the_handler_set_them() {
        let mut output = output(&[("Ce-Type", "own"), ("A", "b")], "{}");
        add_headers(&mut output, attributes());
        let get = |name| header(&output.headers, name);
        assert_eq!(get("ce-type"), Some("own"));
        assert_eq!(get("ce-id"), Some("w:%C3%A9%201%25:0"));
        assert_eq!(get("content-type"), Some("application/json"));
        assert_eq!(output.headers.len(), 5);
    }

    #[test]
    fn an_envelope_has_the_attributes_and_the_data() {
        let number = "12345678901234567890.10";
        let (headers, event) = enveloped(
            &[("ce-type", "own"), ("ce-region", "%C3%A9u"), ("A", "b")],
            &format!("{{\"n\": {number}}}"),
        );
        let kind = ("Content-Type".to_owned(), STRUCTURED.to_owned());
        assert_eq!(headers, [("A".to_owned(), "b".to_owned()), kind]);
        assert_eq!(
            (&event["type"], &event["region"], &event["id"]),
            (&json!("own"), &json!("éu"), &json!("w:é 1%:0"))
        );
        assert_eq!(event["datacontenttype"], "application/json");
        let mut raw = output(&[], number);
        envelop(&mut raw, attributes());
        assert!(std::str::from_utf8(&raw.body).unwrap().contains(number));
    }

    #[test]
    fn data_is_json_text_or_base64_by_its_content_type() {
        for (headers, body, expected) in [
            (
                vec![("Content-Type", "text/plain")],
                "a b",
                json!({"data": "a b"}),
            ),
            (
                vec![("Content-Type", "application/a+json")],
                "[1]",
                json!({"data": [1]}),
            ),
            (
                vec![("Content-Type", "application/json")],
                "{",
                json!({"data_base64": "ew=="}),
            ),
            (
                vec![("Content-Type", "a/b")],
                "1",
                json!({"data_base64": "MQ=="}),
            ),
            (vec![], "no", json!({"data_base64": "bm8="})),
            (vec![], "", json!({})),
        ] {
            let (_, event) = enveloped(&headers, body);
            for key in ["data", "data_base64"] {
                assert_eq!(event.get(key), expected.get(key), "{body}: {event}");
            }
        }
    }

    #[test]
    fn a_schema_describes_the_data_of_an_event() {
        let of = |kind: &str, body: &str| {
            data(
                &vec![("content-type".to_owned(), kind.to_owned())],
                body.as_bytes(),
            )
        };
        assert_eq!(
            of("application/json", r#"{"data": 1}"#),
            Ok(json!({"data": 1}))
        );
        assert_eq!(of(STRUCTURED, r#"{"data": 1}"#), Ok(json!(1)));
        assert_eq!(of(STRUCTURED, r#"{"data_base64": "MQ=="}"#), Ok(json!(1)));
        for body in [
            "[]",
            "{}",
            r#"{"data_base64": "?"}"#,
            r#"{"data_base64": "ew=="}"#,
        ] {
            assert!(of(STRUCTURED, body).is_err(), "{body}");
        }
    }
}
