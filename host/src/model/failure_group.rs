//! Groups of dead letters with the same failure, by a fingerprint without the values of a message.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::verdict::{DeadLetter, PANIC_PREFIX, Reason};

/// The longest shape, in characters.
const SHAPE_MAX: usize = 300;

/// The most functions in a place.
const FRAMES_MAX: usize = 3;

/// The failure that a group of dead letters shares.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct FailureGroup {
    /// 16 hex digits, derived from the worker and all fields below.
    pub id: String,
    /// The name of a [`Reason`], such as `attempts-exhausted`.
    pub reason: String,
    /// The handler's own code for the failure, if any.
    pub code: Option<String>,
    /// The detail with `#` in place of numbers and ids, and `"…"` in place of quoted text.
    pub shape: String,
    /// The handler's functions at the trap, innermost first, as far as the component has their
    /// names.
    pub place: Option<String>,
}

impl FailureGroup {
    /// The group of a dead letter.
    pub fn of(dead_letter: &DeadLetter) -> Self {
        let shape = match dead_letter.reason {
            Reason::Rejected
            | Reason::AttemptsExhausted
            | Reason::DeterministicFailure
            | Reason::OutputRefused => {
                // A panic is grouped by its place, because its message may hold any value.
                match dead_letter.detail.starts_with(PANIC_PREFIX) {
                    true => detail_shape(PANIC_PREFIX.trim_end_matches(": ")),
                    false => detail_shape(&dead_letter.detail),
                }
            }
            // The host wrote these details. All dead letters of one reason are one failure.
            Reason::IdReuse | Reason::InvalidId | Reason::Unreadable | Reason::CrashedHost => {
                String::new()
            }
        };
        let place = trap_place(&dead_letter.frames);

        // Hash the worker and all fields, each with a terminator.
        let mut digest = Sha256::new();
        let parts = [
            dead_letter.worker.as_str(),
            dead_letter.reason.as_str(),
            dead_letter.code.as_deref().unwrap_or_default(),
        ];
        for part in parts
            .into_iter()
            .chain([shape.as_str(), place.as_deref().unwrap_or_default()])
        {
            digest.update(part.as_bytes());
            digest.update([0]);
        }
        let digest = hex::encode(digest.finalize());
        FailureGroup {
            id: digest.get(..16).unwrap_or_default().to_owned(),
            reason: dead_letter.reason.as_str().to_owned(),
            code: dead_letter.code.clone(),
            shape,
            place,
        }
    }
}

/// Replaces the values of a message in a detail: quoted text, and words with a digit. Text between
/// backticks is more often a name than a value, so it is treated like other words.
fn detail_shape(detail: &str) -> String {
    let mut shape = String::new();
    let mut rest = detail;
    while let Some(first) = rest.chars().next() {
        if let Some(after) = skip_quoted(rest, first, shape.chars().last()) {
            shape.push_str("\"…\"");
            rest = after;
        } else if is_word_char(first) {
            let end = rest.find(|c| !is_word_char(c)).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            shape.push_str(if is_value(word) { "#" } else { word });
            rest = after;
        } else {
            shape.push(if first.is_control() { ' ' } else { first });
            rest = rest.get(first.len_utf8()..).unwrap_or_default();
        }
        if shape.len() > SHAPE_MAX * 4 {
            break;
        }
    }
    shape.chars().take(SHAPE_MAX).collect()
}

/// The rest after a quoted text at the beginning; none if there is no such text. An apostrophe
/// within a word is no quote.
fn skip_quoted(text: &str, quote: char, before: Option<char>) -> Option<&str> {
    let is_quote = quote == '"' || (quote == '\'' && !before.is_some_and(char::is_alphanumeric));
    if !is_quote {
        return None;
    }
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return text.get(at + c.len_utf8()..),
            _ => {}
        }
    }
    None
}

/// Ids consist of these.
fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '@')
}

fn is_value(word: &str) -> bool {
    word.chars().any(|c| c.is_ascii_digit())
}

/// The place of a trap: the handler's own functions, without those common to all panics.
fn trap_place(frames: &[String]) -> Option<String> {
    const PANIC_PREFIXES: [&str; 9] = [
        "std::", "core::", "alloc::", "<std::", "<core::", "<alloc::", "__rust", "rust_", "abort",
    ];
    let names = frames.iter().map(|frame| without_hash(frame));
    let own = names.filter(|name| !PANIC_PREFIXES.iter().any(|prefix| name.starts_with(prefix)));
    let own: Vec<&str> = own.take(FRAMES_MAX).collect();
    if own.is_empty() {
        None
    } else {
        Some(own.join(" < "))
    }
}

/// A function's name without the hash that Rust appends. The hash differs between builds.
fn without_hash(name: &str) -> &str {
    match name.rsplit_once("::h") {
        Some((name, hash))
            if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) =>
        {
            name
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::message::Message;

    fn dead_letter(reason: Reason, detail: &str) -> DeadLetter {
        DeadLetter {
            worker: "settle".to_owned(),
            version: 1,
            reason,
            code: Some("malformed".to_owned()),
            detail: detail.to_owned(),
            frames: Vec::new(),
            attempts: 1,
            message: Message {
                event_id: "e1".to_owned(),
                subject: "in.x".to_owned(),
                headers: Vec::new(),
                body: bytes::Bytes::new(),
                origin: None,
                redriven: None,
            },
        }
    }

    #[test]
    fn a_shape_omits_values_and_keeps_names() {
        for (detail, shape) in [
            (
                "missing field `id` at line 1 column 17",
                "missing field `id` at line # column #",
            ),
            (
                "invalid type: string \"a \\\" b\", expected u64",
                "invalid type: string \"…\", expected u64",
            ),
            ("account acc-17 is 3.50 short", "account # is # short"),
            (
                "event 0190f3c4-2b6a-7def-8abc-0123456789ab of 2026-01-31T12:00:00Z",
                "event # of #",
            ),
            ("can't open 'it' at 0xdeadbeef0", "can't open \"…\" at #"),
            ("ends in a \"quote", "ends in a \"quote"),
            ("two\nlines", "two lines"),
            ("", ""),
        ] {
            assert_eq!(detail_shape(detail), shape.replace("u64", "#"), "{detail}");
        }
        assert_eq!(detail_shape(&"ä".repeat(5_000)).chars().count(), SHAPE_MAX);
    }

    #[test]
    fn equal_failures_share_a_group_and_others_do_not() {
        let group = |detail: &str| FailureGroup::of(&dead_letter(Reason::Rejected, detail)).id;
        assert_eq!(group("line 1 column 17"), group("line 3 column 4"));
        assert_ne!(group("missing field `id`"), group("missing field `name`"));
        assert_eq!(group("x").len(), 16);
        let other = DeadLetter {
            worker: "other".to_owned(),
            ..dead_letter(Reason::Rejected, "x")
        };
        assert_ne!(FailureGroup::of(&other).id, group("x"));
        let reuse = |detail: &str| FailureGroup::of(&dead_letter(Reason::IdReuse, detail)).id;
        assert_eq!(
            reuse("the event id `abc` was used"),
            reuse("the event id `def` was used")
        );
    }

    #[test]
    fn a_trap_is_grouped_by_the_handlers_own_frames_in_any_build() {
        let trapped = |frames: &[&str]| DeadLetter {
            frames: frames.iter().map(|&frame| frame.to_owned()).collect(),
            ..dead_letter(Reason::AttemptsExhausted, "the handler panicked")
        };
        let one = trapped(&[
            "abort",
            "std::process::abort::h0123456789abcdef",
            "app::pay::h0123456789abcdef",
            "app::handle",
        ]);
        let group = FailureGroup::of(&one);
        assert_eq!(group.place.as_deref(), Some("app::pay < app::handle"));
        let next_build = trapped(&[
            "core::panicking::panic",
            "app::pay::hfedcba9876543210",
            "app::handle",
        ]);
        assert_eq!(FailureGroup::of(&next_build).id, group.id);
        assert_ne!(
            FailureGroup::of(&trapped(&["app::refund", "app::handle"])).id,
            group.id
        );
    }
}
