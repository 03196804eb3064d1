//! The owner and the note of a failure group.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use maud::{Markup, html};

use super::fields::Fields;
use super::links;
use super::parts::{command, lines, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::groups::{self, GroupNoteRequest, NOTE_MAX, OWNER_MAX};
use crate::store::GroupNote;

/// The owner and the note of a group, with the form that changes them.
pub fn show(visitor: &Visitor, group: &str, written: Option<&GroupNote>) -> Markup {
    let owner = written.and_then(|written| written.owner.as_deref());
    let note = written.and_then(|written| written.note.as_deref());
    html! {
        @if let Some(written) = written {
            @if let Some(owner) = owner { p { "Owner: " strong { (text(owner)) } } }
            @if let Some(note) = note { pre.note role="region" aria-label="Note" tabindex="0" { (lines(note)) } }
            p.caption {
                "Written by " (text(written.stated_name.as_deref().unwrap_or(&written.actor)))
                " " (time(written.at))
            }
        }
        details {
            summary { @if written.is_some() { "Change owner and note" } @else { "Add an owner and a note" } }
            form.stack action={ "/groups/" (links::encoded(group)) "/note" } method="post" {
                (visitor.form_token())
                div {
                    label for="owner" { "Owner" }
                    input #owner name="owner" maxlength=(OWNER_MAX) value=[owner] autocomplete="off";
                }
                div {
                    label for="group-note" { "Note" }
                    textarea #group-note name="note" rows="3" maxlength=(NOTE_MAX) {
                        (note.unwrap_or_default())
                    }
                }
                div.submit { button type="submit" { "Save" } }
            }
            p.caption { "The same in a terminal" }
            (command(&format!("oncely dlq note {group} --owner NAME --note TEXT")))
        }
    }
}

/// Saves the owner and the note. An empty field removes its text.
pub async fn save(
    State(console): State<Arc<Console>>,
    Path(group): Path<String>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let request = GroupNoteRequest {
        owner: Some(fields.text("owner").unwrap_or_default()),
        // Browsers send the line breaks of a form as CR LF.
        note: Some(
            fields
                .text("note")
                .unwrap_or_default()
                .replace("\r\n", "\n"),
        ),
        by: visitor.stated(),
    };
    let (caller, id) = (visitor.caller.clone(), Path(group.clone()));
    let result = match groups::note(host(&console), caller, id, Json(request)).await {
        Ok(_) => Ok("owner and note of the group are saved".to_owned()),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &links::group(&group), result)
}
