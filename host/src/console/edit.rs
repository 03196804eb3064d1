//! A corrected body for a dead letter: edit, compare, save.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{Markup, html};
use similar::{ChangeTag, TextDiff};

use super::dead_letter::{attribution_fields, decoded, outcome};
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{command, text};
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{self, DeadLetter, EditRequest};
use crate::model::json_text;

/// The longest body that is edited in a browser, in bytes.
const EDITED_MAX: usize = 256 << 10;

/// How many unchanged lines surround a change.
const CONTEXT: usize = 3;

/// How long the comparison may take.
const DIFF_TIME: std::time::Duration = std::time::Duration::from_secs(1);

/// How the text in the form becomes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// As it is, with the line breaks of Unix: browsers change them.
    Text,
    /// Like text, with the line breaks of Windows.
    TextWithCrLf,
    /// Base64, for bodies that a form cannot hold unchanged.
    Base64,
}

impl Encoding {
    /// The encoding that keeps a body.
    fn of(body: &[u8]) -> Self {
        let Ok(text) = std::str::from_utf8(body) else {
            return Encoding::Base64;
        };
        let without = text.replace("\r\n", "\n");
        let is_control = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        match () {
            () if without.contains(is_control) => Encoding::Base64,
            () if without == text => Encoding::Text,
            () if without.replace('\n', "\r\n") == text => Encoding::TextWithCrLf,
            () => Encoding::Base64,
        }
    }

    fn parse(name: Option<&str>) -> Self {
        match name {
            Some("crlf") => Encoding::TextWithCrLf,
            Some("base64") => Encoding::Base64,
            _ => Encoding::Text,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Encoding::Text => "text",
            Encoding::TextWithCrLf => "crlf",
            Encoding::Base64 => "base64",
        }
    }

    fn encode(self, body: &[u8]) -> String {
        match self {
            Encoding::Base64 => STANDARD.encode(body),
            _ => String::from_utf8_lossy(body).into_owned(),
        }
    }

    fn decode(self, text: &str) -> Result<Vec<u8>, String> {
        let lines = text.replace("\r\n", "\n");
        match self {
            Encoding::Text => Ok(lines.into_bytes()),
            Encoding::TextWithCrLf => Ok(lines.replace('\n', "\r\n").into_bytes()),
            Encoding::Base64 => {
                let compact: String = lines.split_whitespace().collect();
                let decoded = STANDARD.decode(compact);
                decoded.map_err(|error| format!("the body is not Base64: {error}"))
            }
        }
    }
}

pub async fn form(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let Json(dead_letter) = dead_letters::dead_letter(host(&console), Path(id)).await?;
    let current = current_body(&dead_letter);
    let encoding = Encoding::of(&current);
    let draft = Draft {
        encoding,
        text: encoding.encode(&current),
        diff: None,
    };
    let title = title(id);
    let body = page(&visitor, id, &current, &draft);
    Ok(visitor.page(Section::Failures, &title, body))
}

/// Shows the changes, or saves them.
pub async fn save(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    mut visitor: Visitor,
    fields: Fields,
) -> Answer {
    let Json(dead_letter) = dead_letters::dead_letter(host(&console), Path(id)).await?;
    let current = current_body(&dead_letter);
    let mut draft = Draft {
        encoding: Encoding::parse(fields.get("encoding")),
        text: fields.raw("body").unwrap_or_default().to_owned(),
        diff: None,
    };
    let by = visitor.attribution(&fields);
    let title = title(id);
    let refuse = |visitor: &Visitor, why: &str, draft: &Draft| {
        let body = page(visitor, id, &current, draft);
        Ok(visitor.refusal(Section::Failures, &title, why, body))
    };
    let new = match draft.encoding.decode(&draft.text) {
        Ok(new) => new,
        Err(why) => return refuse(&visitor, &why, &draft),
    };
    if new == current {
        return refuse(&visitor, "the body is unchanged", &draft);
    }

    // Compare first: the saved body is the one that the worker receives.
    if fields.get("step") != Some("save") {
        draft.diff = Some(Comparison::of(&current, &new));
        let body = page(&visitor, id, &current, &draft);
        return Ok(visitor.page(Section::Failures, &title, body));
    }
    if by.note.is_none() {
        return refuse(&visitor, "a corrected body needs a note", &draft);
    }
    let request = EditRequest {
        body: STANDARD.encode(&new),
        by,
        seen: None,
    };
    let Json(results) = dead_letters::edit(
        host(&console),
        visitor.caller.clone(),
        Path(id),
        Json(request),
    )
    .await?;
    let result = outcome(id, &results, "corrected");
    let to = match result {
        Ok(_) => format!("/dead-letters/{id}/dry-run"),
        Err(_) => links::dead_letter(id),
    };
    visitor.go(&console, &to, result)
}

fn title(id: i64) -> String {
    format!("Edit the body of dead letter {id}")
}

/// The body that the worker would receive.
fn current_body(dead_letter: &DeadLetter) -> Vec<u8> {
    let edits = dead_letter.edits.last().map(|edit| &edit.body);
    decoded(edits.unwrap_or(&dead_letter.body))
}

/// The text in the form, and its difference from the current body.
struct Draft {
    encoding: Encoding,
    text: String,
    diff: Option<Comparison>,
}

/// The changed lines, with some around them.
struct Comparison {
    hunks: Vec<Vec<(ChangeTag, String)>>,
    /// Whether only the form of the JSON differs.
    is_same_json: bool,
    /// The reason that the new body is no JSON, if the old one was.
    broken_json: Option<String>,
}

impl Comparison {
    fn of(old: &[u8], new: &[u8]) -> Self {
        let parse = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes);
        let (old_json, new_json) = (parse(old), parse(new));
        let broken = old_json.is_ok().then(|| new_json.as_ref().err());
        let is_same_json = matches!((&old_json, &new_json), (Ok(old), Ok(new)) if old == new);

        // JSON in one line would be one change: compare it indented.
        let shown = |bytes: &[u8]| {
            let indented = json_text::indented(bytes);
            indented.unwrap_or_else(|| String::from_utf8_lossy(bytes).into_owned())
        };
        let both_json = old_json.is_ok() && new_json.is_ok() && !is_same_json;
        let plain = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (old_text, new_text) = match both_json {
            true => (shown(old), shown(new)),
            false => (plain(old), plain(new)),
        };
        let diff = TextDiff::configure()
            .timeout(DIFF_TIME)
            .diff_lines(&old_text, &new_text);
        let hunks = diff.grouped_ops(CONTEXT);
        let hunks = hunks.iter().map(|hunk| {
            let changes = hunk
                .iter()
                .flat_map(|operation| diff.iter_changes(operation));
            let line = |change: similar::Change<&str>| {
                (
                    change.tag(),
                    change.value().trim_end_matches(['\n', '\r']).to_owned(),
                )
            };
            changes.map(line).collect()
        });
        Comparison {
            hunks: hunks.collect(),
            is_same_json,
            broken_json: broken.flatten().map(ToString::to_string),
        }
    }

    fn show(&self) -> Markup {
        html! {
            section aria-labelledby="changes" {
                h2 #changes { "Changes" }
                @if let Some(error) = &self.broken_json {
                    p.flash.error role="alert" { "The new body is not valid JSON: " (text(error)) }
                }
                @if self.is_same_json { p { "The JSON is the same; only its form differs." } }
                div.diff role="region" aria-label="Changes" tabindex="0" {
                    @for (number, hunk) in self.hunks.iter().enumerate() {
                        @if number > 0 { p.gap { "⋯" } }
                        @for (tag, line) in hunk { (diff_line(*tag, line)) }
                    }
                }
            }
        }
    }
}

fn diff_line(tag: ChangeTag, line: &str) -> Markup {
    let (class, sign) = match tag {
        ChangeTag::Delete => ("removed", "-"),
        ChangeTag::Insert => ("added", "+"),
        ChangeTag::Equal => ("same", " "),
    };
    html! { p class=(class) { span.sign { (sign) } (text(line)) } }
}

fn page(visitor: &Visitor, id: i64, current: &[u8], draft: &Draft) -> Markup {
    html! {
        p.crumbs {
            a href="/failures" { "Failures" } " / "
            a href=(links::dead_letter(id)) { "Dead letter " (id) }
        }
        h1 { (title(id)) }
        @if current.len() > EDITED_MAX {
            p { "The body is too large for a form. Correct it in a terminal:" }
            (command(&(format!("oncely dlq show {id} --raw") + " > body")))
            (command(&format!("oncely dlq edit {id} --body body --note NOTE")))
        } @else {
            @if let Some(diff) = &draft.diff { (diff.show()) }
            (edit_form(visitor, id, draft))
        }
    }
}

fn edit_form(visitor: &Visitor, id: i64, draft: &Draft) -> Markup {
    let label = match draft.encoding {
        Encoding::Text => "Body",
        Encoding::TextWithCrLf => "Body, with line breaks of Windows",
        Encoding::Base64 => "Body in Base64",
    };
    html! {
        form.stack action=(format!("/dead-letters/{id}/edit")) method="post" {
            (visitor.form_token())
            input type="hidden" name="encoding" value=(draft.encoding.as_str());
            label for="body" { (label) }
            // A browser drops a line break right after the tag.
            textarea #body name="body" rows="16" spellcheck="false" autocomplete="off" {
                "\n" (draft.text)
            }
            p.help {
                "The original never changes. A redrive sends the last corrected body, under the same "
                "event id."
            }
            @if draft.diff.is_some() {
                (attribution_fields(visitor, true))
                div.submit {
                    button type="submit" name="step" value="save" { "Save the corrected body" }
                    button.quiet type="submit" name="step" value="compare" formnovalidate {
                        "Compare again"
                    }
                    a href=(links::dead_letter(id)) { "Cancel" }
                }
            } @else {
                div.submit {
                    button type="submit" name="step" value="compare" { "Show the changes" }
                    a href=(links::dead_letter(id)) { "Cancel" }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_survives_the_form_of_a_browser() {
        for body in [
            &b"{\"a\": 1}\n"[..],
            b"one\r\ntwo\r\n",
            b"mixed\r\nand\n",
            b"\0binary",
            &[0xff, 0xfe],
            "naïve\tü".as_bytes(),
            b"",
        ] {
            let encoding = Encoding::of(body);
            // A browser sends CRLF for each line break.
            let sent = encoding
                .encode(body)
                .replace("\r\n", "\n")
                .replace('\n', "\r\n");
            assert_eq!(encoding.decode(&sent).unwrap(), body, "{encoding:?}");
            assert_eq!(Encoding::parse(Some(encoding.as_str())), encoding);
        }
        assert!(Encoding::Base64.decode("!").is_err());
    }

    #[test]
    fn a_comparison_shows_changed_fields_of_json_in_one_line() {
        let found = Comparison::of(br#"{"amount":-5,"to":"b"}"#, br#"{"amount":5,"to":"b"}"#);
        let changed: Vec<&str> = found
            .hunks
            .iter()
            .flatten()
            .filter(|(tag, _)| *tag != ChangeTag::Equal)
            .map(|(_, line)| line.as_str())
            .collect();
        assert_eq!(changed, ["  \"amount\": -5,", "  \"amount\": 5,"]);
        assert!(Comparison::of(b"{}", b"{").broken_json.is_some());
        assert!(Comparison::of(b"{\"a\":1}", b"{\"a\": 1}").is_same_json);
    }
}
