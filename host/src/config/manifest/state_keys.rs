//! The state keys that a message is likely to need: templates such as `account/{subject:2}`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OrderingKey;
use crate::model::message::{EVENT_ID_MAX, Message};

/// A state key template with parts from the message: `{header:NAME}`, `{subject:TOKEN}` or `{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(rename = "StateKeyPattern")]
pub struct StateKey {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Id,
    Field(OrderingKey),
}

impl StateKey {
    /// The key for a message; `None` if the message lacks a part, or the result is no valid key.
    pub fn key_for(&self, message: &Message) -> Option<String> {
        let mut key = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => key.push_str(text),
                Part::Id => key.push_str(&message.event_id),
                Part::Field(place) => key.push_str(&place.key_of(message)?),
            }
        }
        ((1..=EVENT_ID_MAX).contains(&key.len()) && !key.contains('\0')).then_some(key)
    }
}

impl TryFrom<String> for StateKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let Some((place, behind)) = after.split_once('}') else {
                return Err(format!("`{text}` has a `{{` without a `}}`"));
            };
            parts.push(Part::Text(before.to_owned()));
            parts.push(match place {
                "id" => Part::Id,
                place => Part::Field(OrderingKey::try_from(place.to_owned())?),
            });
            rest = behind;
        }
        if rest.contains('}') {
            return Err(format!("`{text}` has a `}}` without a `{{`"));
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| *part != Part::Text(String::new()));
        if parts.is_empty() {
            return Err("it is empty".to_owned());
        }
        Ok(StateKey { text, parts })
    }
}

impl From<StateKey> for String {
    fn from(key: StateKey) -> String {
        key.text
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn key(template: &str) -> Result<Option<String>, String> {
        let message = Message {
            event_id: "e1".into(),
            subject: "payments.de.42".into(),
            headers: vec![("Account".into(), "a7".into())],
            body: Bytes::new(),
            origin: None,
            redriven: None,
        };
        StateKey::try_from(template.to_owned()).map(|key| key.key_for(&message))
    }

    #[test]
    fn a_state_key_is_built_from_text_and_message_fields() {
        let expect = |template, expected: &str| {
            assert_eq!(key(template), Ok(Some(expected.to_owned())), "{template}")
        };
        expect("counter", "counter");
        expect("{header:account}", "a7");
        expect("balance/{header:Account}/{subject:2}", "balance/a7/de");
        expect("seen:{id}", "seen:e1");
        assert_eq!(key("{header:Nobody}"), Ok(None));
        assert_eq!(key("{subject:9}"), Ok(None));
    }

    #[test]
    fn invalid_state_key_templates_are_refused() {
        for template in [
            "",
            "{",
            "a}",
            "{}",
            "{key}",
            "{subject:0}",
            "{header:}",
            "{a{id}}",
        ] {
            assert!(key(template).is_err(), "{template}");
        }
    }
}
