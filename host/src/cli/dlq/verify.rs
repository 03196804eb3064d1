//! `oncely dlq verify`: checks that redriven events took effect once.

use anyhow::Result;
use clap::Args;

use super::select::Selection;
use crate::api::dead_letters::DeadLettersRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::exit::Exit;
use crate::cli::term::{self, Table};
use crate::dlq::verify::{DeadLetterCheck, Verification};
use crate::store::DeadLetterState;

/// Check that the events of dead letters took effect once and sent each output once.
///
/// The inbox and the streams are checked, and nothing is changed. Use it after a redrive.
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
        let dead_letters = self.selection.find(&client, true).await?;
        let request = DeadLettersRequest {
            ids: dead_letters
                .iter()
                .map(|dead_letter| dead_letter.id)
                .collect(),
        };
        let verification: Verification = client.post("/dead-letters/verify", &request).await?;
        if self.json {
            term::json(&verification)?;
        } else {
            show(&verification)?;
        }
        let problems = verification
            .dead_letters
            .iter()
            .filter(|check| check.problem.is_some())
            .count();
        if problems > 0 {
            return Err(Exit::Failure
                .with_message(format!(
                    "{problems} of {} events have a problem",
                    dead_letters.len()
                ))
                .into());
        }
        Ok(())
    }
}

fn show(verification: &Verification) -> Result<()> {
    let mut table = Table::new(&[
        "id", "worker", "event id", "state", "inbox", "outputs", "problem",
    ]);
    for check in &verification.dead_letters {
        table.row([
            check.dead_letter.to_string(),
            check.worker.clone(),
            check.event_id.clone(),
            check.state.as_str().to_owned(),
            check.inbox.clone().unwrap_or_else(|| "-".to_owned()),
            check.outputs.len().to_string(),
            check.problem.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    term::data(table.to_string().trim_end())?;
    let count = |is_match: fn(&DeadLetterCheck) -> bool| {
        verification
            .dead_letters
            .iter()
            .filter(|check| is_match(check))
            .count()
    };
    let done = count(|check| check.state == DeadLetterState::Done && check.problem.is_none());
    let open = count(|check| check.state == DeadLetterState::Open);
    let pending = count(|check| check.state == DeadLetterState::Redriven);
    let problems = count(|check| check.problem.is_some());
    term::data(format!(
        "\nsucceeded once: {done}; open: {open}; pending: {pending}; problems: {problems}"
    ))?;
    for stream in &verification.truncated {
        term::warning(format!(
            "the stream {stream} has more messages than were scanned"
        ));
    }
    Ok(())
}
