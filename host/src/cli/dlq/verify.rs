//! `oncely dlq verify`: the proof that nothing doubled.

use anyhow::Result;
use clap::Args;

use super::select::Selection;
use crate::api::letters::LettersRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::exit::Exit;
use crate::cli::term::{self, Table};
use crate::dlq::verify::{Verification, Verified};
use crate::store::LetterState;

/// Looks at the inbox and on the streams whether the events of dead letters, those that were put back above all, took effect
/// once and sent each output once. Changes nothing.
#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    selection: Selection,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Verify {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letters = self.selection.find(&client, true).await?;
        let request = LettersRequest { ids: letters.iter().map(|letter| letter.id).collect() };
        let verification: Verification = client.post("/letters/verify", &request).await?;
        if self.json {
            term::json(&verification)?;
        } else {
            show(&verification)?;
        }
        let wrong = verification.letters.iter().filter(|letter| letter.wrong.is_some()).count();
        if wrong > 0 {
            return Err(Exit::Failure
                .because(format!("{wrong} of {} events are not as they must be", letters.len()))
                .into());
        }
        Ok(())
    }
}

fn show(verification: &Verification) -> Result<()> {
    let mut table = Table::new(&["id", "worker", "event id", "state", "inbox", "outputs", "wrong"]);
    for letter in &verification.letters {
        table.row([
            letter.letter.to_string(),
            letter.worker.clone(),
            letter.event_id.clone(),
            letter.state.as_str().to_owned(),
            letter.inbox.clone().unwrap_or_else(|| "-".to_owned()),
            letter.outputs.len().to_string(),
            letter.wrong.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    term::data(table.to_string().trim_end())?;
    let count = |fits: fn(&Verified) -> bool| verification.letters.iter().filter(|letter| fits(letter)).count();
    let done = count(|letter| letter.state == LetterState::Done && letter.wrong.is_none());
    let open = count(|letter| letter.state == LetterState::Open);
    let under_way = count(|letter| letter.state == LetterState::Redriven);
    let wrong = count(|letter| letter.wrong.is_some());
    term::data(format!("\ntook effect once: {done}; open: {open}; under way: {under_way}; wrong: {wrong}"))?;
    for stream in &verification.cut {
        term::warning(format!("the stream {stream} holds more than was looked at"));
    }
    Ok(())
}
