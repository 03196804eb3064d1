//! Hostile text for people: control characters and invisible ones are shown as escapes.

/// Text with escaped control characters.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if needs_escape(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Like [`visible`], with line breaks kept.
pub fn visible_text(text: &str) -> String {
    text.lines().map(visible).collect::<Vec<_>>().join("\n")
}

/// Control characters, those that change the writing direction or end a line, and those that take
/// no space. Joiners stay: scripts and emoji need them.
pub fn needs_escape(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_bidi_characters_are_escaped_and_others_stay() {
        assert_eq!(visible("a\u{1b}[31m\tb"), "a\\u{1b}[31m\\tb");
        assert_eq!(visible("\u{202e}exe.txt"), "\\u{202e}exe.txt");
        assert_eq!(
            visible("\u{feff}\u{200b}\u{2028}"),
            "\\u{feff}\\u{200b}\\u{2028}"
        );
        assert_eq!(visible("naïve 日本 👩‍🚀 <b>"), "naïve 日本 👩‍🚀 <b>");
        assert_eq!(visible_text("one\r\ntwo\u{7}"), "one\ntwo\\u{7}");
    }
}
