//! `oncely dlq note`: the owner and the note of a failure group.

use anyhow::Result;
use clap::Args;

use super::select::ActorArgs;
use crate::api::groups::GroupNoteRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::exit::Exit;
use crate::cli::term;
use crate::model::hint::WithHint;
use crate::store::GroupNote;

/// Set the owner and the note of a failure group.
///
/// An option that is not given keeps its text, and an empty text removes it. `oncely dlq list
/// --groups` shows both.
#[derive(Debug, Args)]
pub struct Note {
    /// Select the group with this id.
    group: String,
    /// Set the person or the team that owns the failure.
    #[arg(long)]
    owner: Option<String>,
    /// Set the note on the failure.
    #[arg(long)]
    note: Option<String>,
    #[command(flatten)]
    actor: ActorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Note {
    pub async fn run(self) -> Result<()> {
        if self.owner.is_none() && self.note.is_none() {
            return Err(Exit::Usage.with_message("neither an owner nor a note is given"))
                .hint("add --owner NAME or --note TEXT; an empty text removes it");
        }
        let client = Client::find(&self.host)?;
        let path = format!("/dead-letters/groups/{}/note", self.group);
        let request = GroupNoteRequest {
            owner: self.owner,
            note: self.note,
            by: self.actor.with_note(None),
        };
        let written: Option<GroupNote> = client.post(&path, &request).await?;
        if self.json {
            return term::json(&written);
        }
        let unset = || "-".to_owned();
        let (owner, note) = written.map_or((None, None), |written| (written.owner, written.note));
        term::data(term::details([
            ("group", self.group),
            ("owner", owner.unwrap_or_else(unset)),
            ("note", note.unwrap_or_else(unset)),
        ]))
    }
}
