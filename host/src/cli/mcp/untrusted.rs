//! Data that outsiders wrote, within bounds: visible, short, and of a limited total size.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::model::visible::visible_text;

/// The maximum size of the data in a result, in bytes of JSON.
const SIZE_MAX: usize = 64 << 10;

/// How much of a body is shown at once, in bytes.
pub const BODY_PART: usize = 4 << 10;

/// Bounds of values. The next ones apply if the whole is still too large.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Of a text, in characters.
    text: usize,
    /// Of an array or an object, in items.
    items: usize,
}

const BOUNDS: [Bounds; 3] = [
    Bounds {
        text: 8_000,
        items: 200,
    },
    Bounds {
        text: 1_000,
        items: 50,
    },
    Bounds {
        text: 200,
        items: 10,
    },
];

/// The data within the bounds of a result, and whether something was cut.
pub fn bounded(data: Value) -> (Value, bool) {
    for bounds in BOUNDS {
        let mut is_cut = false;
        let shown = cut(&data, bounds, &mut is_cut);
        if shown.to_string().len() <= SIZE_MAX {
            return (shown, is_cut);
        }
    }
    (json!("too large to show; read one thing at a time"), true)
}

fn cut(value: &Value, bounds: Bounds, is_cut: &mut bool) -> Value {
    match value {
        Value::String(text) => Value::String(cut_text(text, bounds.text, is_cut)),
        Value::Array(items) => {
            let shown = items.iter().take(bounds.items);
            let mut shown: Vec<Value> = shown.map(|one| cut(one, bounds, is_cut)).collect();
            if items.len() > bounds.items {
                *is_cut = true;
                shown.push(json!(format!("… {} more", items.len() - bounds.items)));
            }
            Value::Array(shown)
        }
        Value::Object(fields) => {
            let shown = fields.iter().take(bounds.items);
            let mut shown: Map<String, Value> = shown
                .map(|(name, one)| {
                    let name = cut_text(name, bounds.text, is_cut);
                    (name, cut(one, bounds, is_cut))
                })
                .collect();
            if fields.len() > bounds.items {
                *is_cut = true;
                let rest = fields.len() - bounds.items;
                shown.insert("…".to_owned(), json!(format!("{rest} more")));
            }
            Value::Object(shown)
        }
        other => other.clone(),
    }
}

fn cut_text(text: &str, max: usize, is_cut: &mut bool) -> String {
    let count = text.chars().count();
    if count <= max {
        return visible_text(text);
    }
    *is_cut = true;
    let shown: String = text.chars().take(max).collect();
    format!("{}… {} more characters", visible_text(&shown), count - max)
}

/// Replaces Base64 by a readable part, at each place of `path`; `*` stands for all items of an
/// array.
pub fn show_bodies(data: &mut Value, path: &[&str], offset: usize) {
    let Some((first, rest)) = path.split_first() else {
        let bytes = data.as_str().and_then(|text| STANDARD.decode(text).ok());
        if let Some(bytes) = bytes {
            *data = body(&bytes, offset);
        }
        return;
    };
    match (*first, data) {
        ("*", Value::Array(items)) => {
            for item in items {
                show_bodies(item, rest, offset);
            }
        }
        (name, Value::Object(fields)) => {
            if let Some(field) = fields.get_mut(name) {
                show_bodies(field, rest, offset);
            }
        }
        _ => {}
    }
}

/// A part of a body: text if all of the body is text, else hexadecimal digits.
pub fn body(bytes: &[u8], offset: usize) -> Value {
    let text = std::str::from_utf8(bytes).ok();
    let start = boundary(text, offset.min(bytes.len()));
    let end = boundary(text, start.saturating_add(BODY_PART).min(bytes.len()));
    let part = bytes.get(start..end).unwrap_or_default();
    let (encoding, part) = match text {
        Some(_) => ("text", String::from_utf8_lossy(part).into_owned()),
        None => ("hex", hex::encode(part)),
    };
    let mut shown = Map::new();
    shown.insert("bytes".to_owned(), json!(bytes.len()));
    shown.insert("offset".to_owned(), json!(start));
    shown.insert(encoding.to_owned(), json!(part));
    if end < bytes.len() {
        shown.insert("next_offset".to_owned(), json!(end));
    }
    Value::Object(shown)
}

/// The last position up to `at` that is between two characters.
fn boundary(text: Option<&str>, at: usize) -> usize {
    let is_between = |at: &usize| text.is_none_or(|text| text.is_char_boundary(*at));
    (0..=at).rev().find(is_between).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_bounded_whatever_the_data() {
        let long = "x".repeat(1 << 20);
        let many: Vec<Value> = (0..1_000).map(|_| json!({ "detail": long })).collect();
        let (shown, is_cut) = bounded(json!(many));
        assert!(is_cut && shown.to_string().len() <= SIZE_MAX);
        let names: Map<String, Value> = (0..1_000)
            .map(|n| (format!("{n}{}", "y".repeat(1_000)), json!(1)))
            .collect();
        let (shown, is_cut) = bounded(json!(names));
        assert!(is_cut && shown.to_string().len() <= SIZE_MAX);
        let small = json!({ "a": ["b", 1, null] });
        assert_eq!(bounded(small.clone()), (small, false));
    }

    #[test]
    fn invisible_characters_are_escaped() {
        let (shown, _) = bounded(json!({ "detail": "a\u{202e}b\u{1b}[2J\nc" }));
        assert_eq!(shown["detail"], "a\\u{202e}b\\u{1b}[2J\nc");
    }

    #[test]
    fn bodies_are_shown_in_parts() {
        let text = "ä".repeat(BODY_PART);
        let first = body(text.as_bytes(), 0);
        let next = first["next_offset"].as_u64().unwrap_or_default() as usize;
        assert_eq!(first["text"], "ä".repeat(BODY_PART / 2));
        let second = body(text.as_bytes(), next);
        assert_eq!(second["text"], "ä".repeat(BODY_PART / 2));
        assert!(second.get("next_offset").is_none(), "{second}");
        assert_eq!(
            body(&[0xff, 0], 0),
            json!({ "bytes": 2, "offset": 0, "hex": "ff00" })
        );

        let mut data = json!({ "outputs": [{ "body": "aGk=" }], "body": "not Base64" });
        show_bodies(&mut data, &["outputs", "*", "body"], 0);
        show_bodies(&mut data, &["body"], 0);
        assert_eq!(data["outputs"][0]["body"]["text"], "hi");
        assert_eq!(data["body"], "not Base64");
    }
}
