//! JSON for people: indented, and otherwise unchanged.
//!
//! Numbers keep their digits, fields keep their order, and duplicate fields stay. Parsing and
//! serializing again would lose all three.

use std::iter::Peekable;
use std::str::Chars;

use serde::de::IgnoredAny;

/// Indents a text; none when it is not JSON.
pub fn indented(text: &[u8]) -> Option<String> {
    serde_json::from_slice::<IgnoredAny>(text).ok()?;
    let mut chars = std::str::from_utf8(text).ok()?.chars().peekable();
    let (mut out, mut depth) = (String::new(), 0_usize);
    while let Some(c) = chars.next() {
        match c {
            '"' => copy_string(&mut chars, &mut out),
            '{' | '[' => {
                out.push(c);
                while chars.next_if(char::is_ascii_whitespace).is_some() {}
                match chars.next_if(|c| matches!(c, '}' | ']')) {
                    Some(end) => out.push(end),
                    None => {
                        depth += 1;
                        new_line(&mut out, depth);
                    }
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => out.push(c),
        }
    }
    Some(out)
}

fn copy_string(chars: &mut Peekable<Chars<'_>>, out: &mut String) {
    out.push('"');
    let mut is_escaped = false;
    for c in chars.by_ref() {
        out.push(c);
        match c {
            '"' if !is_escaped => return,
            '\\' => is_escaped = !is_escaped,
            _ => is_escaped = false,
        }
    }
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("  ", depth));
}

#[cfg(test)]
mod tests {
    use super::indented;

    #[test]
    fn indented_json_keeps_digits_order_and_duplicates() {
        let text = br#"{"b":12345678901234567890123,"a":1.10,"a":1e400, "e" : [ ], "o":{ },"l":[1,{"x":"a\"b{,:\\"}], "u":"\u0041"}"#;
        let shown = indented(text).unwrap();
        let expected = r#"{
  "b": 12345678901234567890123,
  "a": 1.10,
  "a": 1e400,
  "e": [],
  "o": {},
  "l": [
    1,
    {
      "x": "a\"b{,:\\"
    }
  ],
  "u": "\u0041"
}"#;
        assert_eq!(shown, expected);
        for (same, shown) in [
            ("-0.0", "-0.0"),
            ("\"a b\"", "\"a b\""),
            (" [] ", "[]"),
            ("null", "null"),
        ] {
            assert_eq!(indented(same.as_bytes()).as_deref(), Some(shown));
        }
    }

    #[test]
    fn invalid_json_is_not_indented() {
        for text in ["", "{", "{'a': 1}", "[1,]", "a", "1 2", "{\"a\" 1}"] {
            assert_eq!(indented(text.as_bytes()), None, "{text}");
        }
        assert_eq!(indented(b"\"\xff\""), None);
    }
}
