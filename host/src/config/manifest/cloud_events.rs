//! `[worker.cloudevents]`: outputs become CloudEvents.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::manifest::parse::{one_of, required};
use crate::config::toml_text::{Pair, Section, Text};
use crate::model::cloud_events;
use crate::model::message::{EVENT_ID_MAX, Output, OutputKind};
use crate::model::subject;

pub(super) const CLOUD_EVENTS_KEYS: [&str; 4] = ["mode", "source", "type", "types"];

/// The longest source, in bytes. Source and id together are the event id of a consumer.
const SOURCE_MAX: usize = 128;

/// The longest type, in bytes.
const TYPE_MAX: usize = 512;

/// The placeholder for the subject in a type.
const SUBJECT: &str = "{subject}";

/// The attributes of the outputs of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CloudEvents {
    /// Whether attributes are headers or members of the body.
    pub mode: CloudEventsMode,
    /// The source of all outputs.
    pub source: String,
    /// The type of outputs; `{subject}` stands for their subject.
    #[serde(rename = "type")]
    pub default_type: String,
    /// The types of outputs to single subjects.
    #[serde(default)]
    pub types: BTreeMap<String, String>,
}

/// The place of the attributes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CloudEventsMode {
    /// Headers that begin with `ce-`.
    Binary,
    /// A JSON envelope in the body.
    Structured,
}

impl CloudEvents {
    /// Makes an output an event. One that is an event in structured mode stays as it is.
    pub fn apply(&self, output: &mut Output, now: Timestamp) {
        if cloud_events::is_enveloped(&output.headers) {
            return;
        }
        let default_type = || self.default_type.replace(SUBJECT, &output.subject);
        let own_type = self.types.get(&output.subject).cloned();
        let mut attributes = vec![
            ("specversion", "1.0".to_owned()),
            ("id", self.id_of(&output.id)),
            ("source", self.source.clone()),
            ("type", own_type.unwrap_or_else(default_type)),
        ];
        // Two events that send an output with one chosen id must send the same body.
        if self.mode == CloudEventsMode::Binary || output.kind != OutputKind::Chosen {
            attributes.push(("time", now.to_string()));
            for name in ["traceparent", "tracestate"] {
                let value = output.headers.iter();
                let mut value = value.filter(|(key, _)| key.eq_ignore_ascii_case(name));
                if let Some((_, value)) = value.next() {
                    attributes.push((name, value.clone()));
                }
            }
        }
        match self.mode {
            CloudEventsMode::Binary => cloud_events::add_headers(output, attributes),
            CloudEventsMode::Structured => cloud_events::envelop(output, attributes),
        }
    }

    /// The id of the output, or its SHA-256 if source and id are too long for a consumer.
    fn id_of(&self, output_id: &str) -> String {
        if self.source.len() + 1 + output_id.len() <= EVENT_ID_MAX {
            return output_id.to_owned();
        }
        hex::encode(Sha256::digest(output_id.as_bytes()))
    }
}

pub(super) fn cloud_events(
    text: Text<'_>,
    section: &Section<'_>,
    outputs: &[String],
) -> anyhow::Result<Option<CloudEvents>> {
    let Some(table) = section.table("cloudevents", "[worker.cloudevents]", &CLOUD_EVENTS_KEYS)?
    else {
        return Ok(None);
    };
    let mode = table.text("mode", "\"binary\"", one_of(&["binary", "structured"]))?;
    let source = required(&table, "source", "\"/orders\"", check_source)?;
    let default_type = table.text("type", "\"com.example.{subject}\"", check_type)?;
    let mut types = BTreeMap::new();
    for (subject, pair) in table.pairs("types", "[worker.cloudevents.types]", &[])? {
        let kind = match pair {
            Pair::Text(kind) => kind,
            Pair::Table(_) => String::new(),
        };
        let is_output = outputs
            .iter()
            .any(|output| subject::matches(output, &subject));
        let why = match check_type(&kind) {
            Err(why) => format!("the type of `{subject}` is invalid: {why}"),
            Ok(()) if is_output => {
                types.insert(subject, kind);
                continue;
            }
            Ok(()) => format!("`types` names `{subject}`, which is no subject of `outputs`"),
        };
        let hint = "write one subject of `outputs`, without wildcards, for each type";
        return Err(text.refuse(&table.span_of("types"), why, hint));
    }
    Ok(Some(CloudEvents {
        mode: match mode {
            Some(mode) if mode.value == "structured" => CloudEventsMode::Structured,
            _ => CloudEventsMode::Binary,
        },
        source: source.value,
        default_type: default_type.map_or_else(|| SUBJECT.to_owned(), |kind| kind.value),
        types,
    }))
}

fn check_source(source: &str) -> Result<(), String> {
    let is_allowed = |c: char| c.is_ascii_graphic() && !"\"%<>\\^`{|}".contains(c);
    if (1..=SOURCE_MAX).contains(&source.len()) && source.chars().all(is_allowed) {
        return Ok(());
    }
    Err(format!(
        "it must be a URI reference of 1 to {SOURCE_MAX} bytes"
    ))
}

fn check_type(kind: &str) -> Result<(), String> {
    let is_allowed = |c: char| !c.is_control();
    if (1..=TYPE_MAX).contains(&kind.len()) && kind.chars().all(is_allowed) {
        return Ok(());
    }
    Err(format!(
        "it must have 1 to {TYPE_MAX} bytes and no control characters"
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::model::message::{Message, event_id};

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn sent(mode: CloudEventsMode, kind: OutputKind, id: &str) -> Output {
        let events = CloudEvents {
            mode,
            source: "/pay".to_owned(),
            default_type: "com.{subject}".to_owned(),
            types: [("a.b".to_owned(), "own".to_owned())].into(),
        };
        let mut output = Output {
            kind,
            id: id.to_owned(),
            event_id: "e".to_owned(),
            ordinal: 0,
            subject: "a.b".to_owned(),
            headers: vec![("traceparent".to_owned(), PARENT.to_owned())],
            body: Bytes::from_static(b"{}"),
            ordering_key: None,
            delay: Duration::ZERO,
        };
        events.apply(&mut output, Timestamp::UNIX_EPOCH);
        output
    }

    /// The event id of an output for a worker that receives it.
    fn received(output: &Output) -> String {
        event_id(
            &output.headers,
            Some(&output.body),
            "S",
            Timestamp::UNIX_EPOCH,
            1,
        )
        .unwrap()
    }

    #[test]
    fn an_output_has_all_attributes_in_both_modes() {
        let binary = sent(CloudEventsMode::Binary, OutputKind::Derived, "w:e:0");
        let message = Message {
            event_id: String::new(),
            subject: String::new(),
            headers: binary.headers.clone(),
            body: binary.body.clone(),
            origin: None,
            redriven: None,
        };
        let structured = sent(CloudEventsMode::Structured, OutputKind::Derived, "w:e:0");
        let event: serde_json::Value = serde_json::from_slice(&structured.body).unwrap();
        for (name, value) in [
            ("specversion", "1.0"),
            ("id", "w:e:0"),
            ("source", "/pay"),
            ("type", "own"),
            ("time", "1970-01-01T00:00:00Z"),
            ("traceparent", PARENT),
        ] {
            assert_eq!(message.header(&format!("ce-{name}")), Some(value));
            assert_eq!(event[name], value);
        }
        assert_eq!(message.header("traceparent"), Some(PARENT));
        assert_eq!(event["data"], serde_json::json!({}));
        assert_eq!(received(&binary), "/pay|w:e:0");
        assert_eq!(received(&structured), "/pay|w:e:0");
    }

    #[test]
    fn an_id_that_is_too_long_for_a_consumer_is_hashed() {
        let long = "x".repeat(EVENT_ID_MAX);
        for mode in [CloudEventsMode::Binary, CloudEventsMode::Structured] {
            let id = received(&sent(mode, OutputKind::Derived, &long));
            assert_eq!(id.len(), "/pay|".len() + 64);
        }
    }

    #[test]
    fn an_output_with_a_chosen_id_has_the_same_body_for_every_event() {
        let output = sent(CloudEventsMode::Structured, OutputKind::Chosen, "own");
        let event: serde_json::Value = serde_json::from_slice(&output.body).unwrap();
        assert!(event.get("time").is_none() && event.get("traceparent").is_none());
    }
}
