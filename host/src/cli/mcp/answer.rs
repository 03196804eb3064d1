//! The result of a tool: fields of this server, and the data of the host as `untrusted`.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::untrusted;
use crate::api::ErrorResponse;
use crate::model::visible::visible;

/// The result of a tool.
#[derive(Debug, Default)]
pub struct Answer {
    /// Fields whose values this server made.
    own: Map<String, Value>,
    /// Data of the host, parts of which outsiders wrote.
    untrusted: Option<Value>,
}

impl Answer {
    /// An answer that is data of the host.
    pub fn untrusted(data: impl Serialize) -> Self {
        Answer::default().and_untrusted(data)
    }

    /// Adds data of the host.
    pub fn and_untrusted(self, data: impl Serialize) -> Self {
        Answer {
            untrusted: Some(json!(data)),
            ..self
        }
    }

    /// Adds a field whose value this server made.
    pub fn with(mut self, name: &str, value: impl Serialize) -> Self {
        self.own.insert(name.to_owned(), json!(value));
        self
    }

    /// The result as the assistant gets it, within its bounds.
    pub fn into_json(self) -> Value {
        let mut object = self.own;
        if let Some(data) = self.untrusted {
            let (data, is_cut) = untrusted::bounded(data);
            if is_cut {
                let note = "long values are cut; read fewer things, or one of them";
                object.insert("cut".to_owned(), json!(note));
            }
            object.insert("untrusted".to_owned(), data);
        }
        Value::Object(object)
    }
}

/// A failure. Its texts may quote messages, so they are data, too.
pub fn of_error(error: &anyhow::Error) -> Value {
    let ErrorResponse {
        error,
        causes,
        hints,
    } = ErrorResponse::from(error);
    let text = [error].into_iter().chain(causes);
    let text: Vec<String> = text.map(|text| visible(&text)).collect();
    let (data, _) = untrusted::bounded(json!({ "error": text.join(": "), "hints": hints }));
    json!({ "untrusted": data })
}
