//! `oncely dlq resolve` and `oncely dlq drop`: close dead letters without a redrive.

use anyhow::Result;
use clap::Args;

use super::select::{ActorArgs, Selection, check_none_refused};
use crate::api::StatedBy;
use crate::api::dead_letters::{CloseAction, CloseRequest};
use crate::cli::client::{Client, HostArgs};
use crate::cli::exit::Exit;
use crate::cli::term;
use crate::model::hint::WithHint;
use crate::store::{DeadLetterActionResult, DeadLetterSummary};

/// How many dead letters one request closes.
const CHUNK_SIZE: usize = 100;

/// Close dead letters that need no further action, such as those repaired by hand.
#[derive(Debug, Args)]
pub struct Resolve {
    #[command(flatten)]
    selection: Selection,
    /// Record this note as the reason.
    #[arg(long)]
    note: String,
    #[command(flatten)]
    actor: ActorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Drop dead letters: their messages never take effect.
#[derive(Debug, Args)]
pub struct Drop {
    #[command(flatten)]
    selection: Selection,
    /// Record this note as the reason.
    #[arg(long)]
    note: Option<String>,
    /// Skip the confirmation prompt.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    actor: ActorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Resolve {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let dead_letters = self.selection.find(&client, false).await?;
        close(
            &client,
            &dead_letters,
            CloseAction::Resolve,
            self.actor.with_note(Some(self.note)),
            self.json,
        )
        .await
    }
}

impl Drop {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let dead_letters = self.selection.find(&client, false).await?;
        let count = dead_letters.len();
        if count > 0
            && !self.yes
            && !term::confirm(&format!("Permanently drop {count} dead letters?"))
        {
            return Err(Exit::Failure.with_message(format!(
                "refusing to drop {count} dead letters without confirmation"
            )))
            .hint("confirm with --yes");
        }
        close(
            &client,
            &dead_letters,
            CloseAction::Drop,
            self.actor.with_note(self.note),
            self.json,
        )
        .await
    }
}

async fn close(
    client: &Client,
    dead_letters: &[DeadLetterSummary],
    action: CloseAction,
    by: StatedBy,
    json: bool,
) -> Result<()> {
    let participle = match action {
        CloseAction::Resolve => "resolved",
        CloseAction::Drop => "dropped",
    };
    let ids: Vec<i64> = dead_letters
        .iter()
        .map(|dead_letter| dead_letter.id)
        .collect();
    let mut results: Vec<DeadLetterActionResult> = Vec::new();
    for chunk in ids.chunks(CHUNK_SIZE) {
        let request = CloseRequest {
            ids: chunk.to_vec(),
            action,
            by: by.clone(),
            seen: Vec::new(),
        };
        results.extend(
            client
                .post::<_, Vec<DeadLetterActionResult>>("/dead-letters/close", &request)
                .await?,
        );
    }
    if json {
        term::json(&results)?;
    } else {
        let count = results
            .iter()
            .filter(|result| result.refused.is_none())
            .count();
        term::data(format!("{participle}: {count} of {}", results.len()))?;
    }
    check_none_refused(&results, participle)
}
