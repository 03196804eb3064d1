//! `oncely dlq resolve` and `oncely dlq drop`: letters that will not be put back.

use anyhow::Result;
use clap::Args;

use super::select::{Actor, Selection, check_all_moved};
use crate::api::letters::{CloseRequest, Closing};
use crate::cli::client::{Client, HostArgs};
use crate::cli::exit::Exit;
use crate::cli::term;
use crate::model::hint::WithHint;
use crate::store::{By, LetterSummary, Moved};

/// How many letters one request closes.
const CHUNK: usize = 100;

/// Closes dead letters for which nothing is to be done any more, such as those that were repaired by hand.
#[derive(Debug, Args)]
pub struct Resolve {
    #[command(flatten)]
    selection: Selection,
    /// Why nothing is to be done.
    #[arg(long)]
    note: String,
    #[command(flatten)]
    actor: Actor,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Gives dead letters up: their messages never take effect.
#[derive(Debug, Args)]
pub struct Drop {
    #[command(flatten)]
    selection: Selection,
    /// Why.
    #[arg(long)]
    note: Option<String>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    actor: Actor,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Resolve {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letters = self.selection.find(&client, false).await?;
        close(&client, &letters, Closing::Resolve, self.actor.by(Some(self.note)), self.json).await
    }
}

impl Drop {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letters = self.selection.find(&client, false).await?;
        let count = letters.len();
        if count > 0 && !self.yes && !term::confirm(&format!("drop {count} dead letters for good?")) {
            return Err(Exit::Failure.because(format!("none of the {count} dead letters was dropped")))
                .hint("add --yes to drop them without a question");
        }
        close(&client, &letters, Closing::Drop, self.actor.by(self.note), self.json).await
    }
}

async fn close(client: &Client, letters: &[LetterSummary], closing: Closing, by: By, json: bool) -> Result<()> {
    let what = match closing {
        Closing::Resolve => "resolved",
        Closing::Drop => "dropped",
    };
    let ids: Vec<i64> = letters.iter().map(|letter| letter.id).collect();
    let mut moved: Vec<Moved> = Vec::new();
    for chunk in ids.chunks(CHUNK) {
        let request = CloseRequest { ids: chunk.to_vec(), closing, by: by.clone() };
        moved.extend(client.post::<_, Vec<Moved>>("/letters/close", &request).await?);
    }
    if json {
        term::json(&moved)?;
    } else {
        let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
        term::data(format!("{what}: {count} of {}", moved.len()))?;
    }
    check_all_moved(&moved, what)
}
