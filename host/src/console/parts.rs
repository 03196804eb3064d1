//! Parts of pages: hostile text, times, ages, bodies, commands, tables.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};

use crate::model::json_text;
use crate::model::units;
use crate::model::visible::needs_escape;

/// How many bytes of a body are shown. The whole body can be downloaded.
pub const BODY_SHOWN_MAX: usize = 64 << 10;

/// How many bytes of a binary body are shown, as hex.
const HEX_SHOWN_MAX: usize = 2048;

/// How many characters of a text are shown in a row of a table.
const CELL_MAX: usize = 160;

/// Text of messages and workers: escaped, with control and invisible characters as marked escapes.
pub fn text(content: &str) -> Markup {
    html! {
        @for part in runs(content) {
            @match part {
                Run::Plain(plain) => (plain),
                Run::Escaped(c) => span.escape { (c.escape_default()) },
            }
        }
    }
}

/// Like [`text`], with line breaks kept: for preformatted text.
pub fn lines(content: &str) -> Markup {
    html! {
        @for (number, line) in content.lines().enumerate() {
            @if number > 0 { "\n" }
            (text(line))
        }
    }
}

/// Like [`text`], cut for a row of a table. The whole text is on the page of the thing.
pub fn cell(content: &str) -> Markup {
    match content.char_indices().nth(CELL_MAX) {
        Some((end, _)) => html! { (text(content.get(..end).unwrap_or_default())) "…" },
        None => text(content),
    }
}

enum Run<'t> {
    Plain(&'t str),
    Escaped(char),
}

/// Splits a text before and after each character that needs an escape.
fn runs(content: &str) -> Vec<Run<'_>> {
    let mut found = Vec::new();
    let mut rest = content;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| needs_escape(*c)) {
        let (plain, tail) = rest.split_at(at);
        if !plain.is_empty() {
            found.push(Run::Plain(plain));
        }
        found.push(Run::Escaped(c));
        rest = tail.get(c.len_utf8()..).unwrap_or_default();
    }
    if !rest.is_empty() {
        found.push(Run::Plain(rest));
    }
    found
}

/// A time, with its distance from now.
pub fn time(at: Timestamp) -> Markup {
    let now = Timestamp::now();
    let ago = match now.duration_since(at) {
        past if past >= SignedDuration::ZERO => format!("{} ago", span(past.unsigned_abs())),
        future => format!("in {}", span(future.unsigned_abs())),
    };
    html! { time datetime=(at) title=(units::format_time(at)) { (ago) } }
}

/// A time in full, with its distance from now.
pub fn full_time(at: Timestamp) -> Markup {
    html! { (units::format_time(at)) " " span.muted { "(" (time(at)) ")" } }
}

/// An age in milliseconds.
pub fn age(ms: u64) -> String {
    span(Duration::from_millis(ms))
}

/// A duration in one or two units, rounded down: `45 s`, `12 min`, `3 h 20 min`, `4 d`.
fn span(duration: Duration) -> String {
    let secs = duration.as_secs();
    let (mins, hours, days) = (secs / 60, secs / 3600, secs / 86_400);
    match secs {
        0 if duration.as_millis() > 0 => format!("{} ms", duration.as_millis()),
        0..120 => format!("{secs} s"),
        120..7200 => format!("{mins} min"),
        7200..172_800 => match mins % 60 {
            0 => format!("{hours} h"),
            rest => format!("{hours} h {rest} min"),
        },
        _ => format!("{days} d"),
    }
}

/// A number with thin spaces between thousands.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            shown.push('\u{2009}');
        }
        shown.push(digit);
    }
    shown
}

/// A number with its noun: `1 output`, `2 outputs`.
pub fn counted(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(number))
}

/// The colour of a state. The text carries the meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Good,
    Bad,
    Warn,
    Busy,
    Calm,
}

/// A state.
pub fn badge(tone: Tone, label: &str) -> Markup {
    let class = match tone {
        Tone::Good => "badge good",
        Tone::Bad => "badge bad",
        Tone::Warn => "badge warn",
        Tone::Busy => "badge busy",
        Tone::Calm => "badge",
    };
    html! { span class=(class) { (text(label)) } }
}

/// A command to copy: one click selects all of it.
pub fn command(line: &str) -> Markup {
    html! { code.command { (text(line)) } }
}

/// A sentence of the host, with its commands between backticks.
pub fn sentence(content: &str) -> Markup {
    html! {
        @for (place, part) in content.split('`').enumerate() {
            @if place % 2 == 1 { code { (text(part)) } } @else { (text(part)) }
        }
    }
}

/// Pairs of names and values.
pub fn details<'n>(pairs: impl IntoIterator<Item = (&'n str, Markup)>) -> Markup {
    html! {
        dl.details {
            @for (name, value) in pairs { div { dt { (name) } dd { (value) } } }
        }
    }
}

/// A table that scrolls in itself if the window is too narrow. A head that begins with `#` is that
/// of numbers.
pub fn table(label: &str, heads: &[&str], rows: Markup) -> Markup {
    html! {
        div.scroll role="region" aria-label=(label) tabindex="0" {
            table {
                thead { tr { @for head in heads {
                    @match head.strip_prefix('#') {
                        Some(head) => th.number scope="col" { (head) },
                        None => th scope="col" { (head) },
                    }
                } } }
                tbody { (rows) }
            }
        }
    }
}

/// A body of a message: indented JSON, text or hex. The rest can be downloaded.
pub fn body(label: &str, bytes: &[u8], download: Option<&str>) -> Markup {
    let (shown, kind) = readable(bytes);
    let is_cut = bytes.len() > BODY_SHOWN_MAX || (kind == "hex" && bytes.len() > HEX_SHOWN_MAX);
    html! {
        p.caption {
            (units::format_size(bytes.len() as u64)) " · " (kind)
            @if is_cut { " · " strong { "the beginning" } }
            @if let Some(download) = download { " · " a href=(download) { "Download" } }
        }
        @if bytes.is_empty() {
            p.empty { "The body is empty." }
        } @else {
            pre.body role="region" aria-label=(label) tabindex="0" { code { (lines(&shown)) } }
        }
    }
}

/// The text of a body for people, and its form.
pub fn readable(bytes: &[u8]) -> (String, &'static str) {
    if bytes.len() <= BODY_SHOWN_MAX
        && let Some(indented) = json_text::indented(bytes)
    {
        return (indented, "JSON");
    }
    let shown = bytes.get(..BODY_SHOWN_MAX).unwrap_or(bytes);
    match std::str::from_utf8(shown) {
        Ok(text) => (text.to_owned(), "text"),
        // The cut may be within a character.
        Err(error) if error.error_len().is_none() && shown.len() < bytes.len() => {
            let whole = shown.get(..error.valid_up_to()).unwrap_or_default();
            (String::from_utf8_lossy(whole).into_owned(), "text")
        }
        Err(_) => {
            let shown = bytes.get(..HEX_SHOWN_MAX).unwrap_or(bytes);
            (hex_lines(shown), "hex")
        }
    }
}

/// 16 bytes a line: the position, the bytes, and the printable ASCII among them.
fn hex_lines(bytes: &[u8]) -> String {
    let line = |(number, chunk): (usize, &[u8])| {
        let bytes: Vec<String> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
        let ascii = |byte: &u8| match byte.is_ascii_graphic() {
            true => char::from(*byte),
            false => '.',
        };
        let shown: String = chunk.iter().map(ascii).collect();
        format!("{:08x}  {:47}  {shown}", number * 16, bytes.join(" "))
    };
    let lines: Vec<String> = bytes.chunks(16).enumerate().map(line).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_escaped_and_marked() {
        let shown = text("<script>alert(1)</script>\u{202e}x").into_string();
        assert_eq!(
            shown,
            "&lt;script&gt;alert(1)&lt;/script&gt;<span class=\"escape\">\\u{202e}</span>x"
        );
        assert_eq!(lines("a\r\nb").into_string(), "a\nb");
        let long = "x".repeat(1000);
        assert_eq!(cell(&long).into_string().chars().count(), CELL_MAX + 1);
    }

    #[test]
    fn spans_and_counts_are_short() {
        let shown = |secs| span(Duration::from_secs(secs));
        assert_eq!(shown(45), "45 s");
        assert_eq!(shown(720), "12 min");
        assert_eq!(shown(12_000), "3 h 20 min");
        assert_eq!(shown(7200), "2 h");
        assert_eq!(shown(400_000), "4 d");
        assert_eq!(span(Duration::from_millis(12)), "12 ms");
        assert_eq!(count(1_234_567), "1\u{2009}234\u{2009}567");
        assert_eq!(counted(1, "output"), "1 output");
    }

    #[test]
    fn bodies_are_shown_by_their_content() {
        assert_eq!(readable(b"{\"a\":1}").0, "{\n  \"a\": 1\n}");
        assert_eq!(readable("naïve".as_bytes()), ("naïve".to_owned(), "text"));
        assert_eq!(
            readable(&[0, 255, 65]).0,
            "00000000  00 ff 41                                         ..A"
        );
        let cut = "ä".repeat(BODY_SHOWN_MAX);
        let (shown, kind) = readable(format!("x{cut}").as_bytes());
        assert_eq!((shown.len(), kind), (BODY_SHOWN_MAX - 1, "text"));
    }
}
