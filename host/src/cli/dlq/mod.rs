//! `oncely dlq`: dead letters.

use anyhow::Result;
use clap::{Args, Subcommand};

mod close;
mod edit;
mod export;
mod jobs;
mod list;
mod note;
mod plan;
mod redrive;
mod select;
mod show;
mod verify;

pub(super) use select::ActorArgs;

/// Show, correct, redrive and close dead letters: messages that could not be handled.
#[derive(Debug, Args)]
pub struct Dlq {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::List),
    Show(show::Show),
    Redrive(redrive::Redrive),
    Jobs(jobs::Jobs),
    Edit(edit::Edit),
    Resolve(close::Resolve),
    Drop(close::Drop),
    Note(note::Note),
    Export(export::Export),
    Verify(verify::Verify),
}

impl Dlq {
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::List(list) => list.run().await,
            Command::Show(show) => show.run().await,
            Command::Redrive(redrive) => redrive.run().await,
            Command::Jobs(jobs) => jobs.run().await,
            Command::Edit(edit) => edit.run().await,
            Command::Resolve(resolve) => resolve.run().await,
            Command::Drop(drop) => drop.run().await,
            Command::Note(note) => note.run().await,
            Command::Export(export) => export.run().await,
            Command::Verify(verify) => verify.run().await,
        }
    }
}
