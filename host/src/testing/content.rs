//! The contents of messages and values in cases: JSON, text or bytes.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};

/// The key of an object that holds bytes in base64.
const BASE64: &str = "base64";

/// The bytes of a content: an object or a list is JSON, a string is text, and
/// `{base64: "…"}` is bytes.
///
/// # Errors
/// The bytes are not base64.
pub fn to_bytes(content: &Value) -> Result<Bytes> {
    Ok(match content {
        Value::String(text) => Bytes::from(text.clone()),
        Value::Null => Bytes::new(),
        Value::Object(object) if object.len() == 1 && object.contains_key(BASE64) => {
            let text = object.get(BASE64).and_then(Value::as_str);
            let text = text.context("`base64` takes a string")?;
            STANDARD.decode(text).context("read base64")?.into()
        }
        json => Bytes::from(json.to_string()),
    })
}

/// The content of bytes, in its most readable form.
pub fn from_bytes(bytes: &[u8]) -> Value {
    if let Ok(json @ (Value::Object(_) | Value::Array(_))) = serde_json::from_slice(bytes) {
        return json;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::String(text.to_owned()),
        Err(_) => json!({ BASE64: STANDARD.encode(bytes) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_survive_both_ways() {
        for bytes in [
            &b""[..],
            b"text",
            b"5",
            br#"{"a":[1,"x"]}"#,
            b"[]",
            b"\xff\x00",
        ] {
            assert_eq!(to_bytes(&from_bytes(bytes)).unwrap(), bytes);
        }
        assert_eq!(to_bytes(&json!(5)).unwrap(), b"5"[..]);
        assert!(to_bytes(&json!({"base64": "?"})).is_err());
    }
}
