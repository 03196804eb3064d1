//! Log lines: one event is one line.
//!
//! Text from workers and publishers may contain line breaks and control characters. It must not
//! resemble lines of the host.

use std::io::{Result, Write};

/// Writes each event as one line, with escaped control characters.
pub struct SingleLineWriter<W>(pub W);

impl<W: Write> Write for SingleLineWriter<W> {
    /// Writes one event, as the subscriber passes it, with the line break at its end.
    fn write(&mut self, event: &[u8]) -> Result<usize> {
        let (line, end) = match event.strip_suffix(b"\n") {
            Some(line) => (line, "\n"),
            None => (event, ""),
        };
        let line = String::from_utf8_lossy(line);
        match line.contains(needs_escape) {
            false => self.0.write_all(event)?,
            true => self
                .0
                .write_all(format!("{}{end}", escaped(&line)).as_bytes())?,
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> Result<()> {
        self.0.flush()
    }
}

/// Characters that end a line, move the cursor or change the writing direction.
fn needs_escape(c: char) -> bool {
    let is_bidi_control = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (c.is_control() && c != '\t') || matches!(c, '\u{2028}' | '\u{2029}') || is_bidi_control
}

fn escaped(line: &str) -> String {
    let mut escaped = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        match needs_escape(c) {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_event_with_control_characters_stays_on_one_line() {
        let mut written = Vec::new();
        let event = "WARN it failed: a\nINFO paid\r\u{1b}[2J\u{2028}\u{85}é\ttab\n";
        let mut line = SingleLineWriter(&mut written);
        line.write_all(event.as_bytes()).unwrap();
        line.write_all(b"plain\n").unwrap();
        assert_eq!(
            String::from_utf8(written).unwrap(),
            "WARN it failed: a\\nINFO paid\\r\\u{1b}[2J\\u{2028}\\u{85}é\ttab\nplain\n"
        );
    }
}
