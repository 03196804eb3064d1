//! CloudEvents 1.0 in binary and in structured mode.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::model::message::{Headers, header};

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
