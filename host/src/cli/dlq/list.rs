//! `oncely dlq list`.

use anyhow::Result;
use clap::Args;

use super::select::Filters;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Table};
use crate::store::{LetterFilter, LetterSummary};
use crate::units;

/// Lists dead letters, newest first.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    filters: Filters,
    /// Also those that took effect after all, were resolved or dropped.
    #[arg(long)]
    closed: bool,
    /// At most so many.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl List {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let filter = LetterFilter { closed: self.closed, limit: self.limit, ..self.filters.filter() };
        let letters: Vec<LetterSummary> = client.post("/letters/find", &filter).await?;
        if self.json {
            return term::json(&letters);
        }
        if letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        term::data(table(&letters).to_string().trim_end())?;
        if u32::try_from(letters.len()).is_ok_and(|count| count == self.limit) {
            term::note(format!("these are the newest {}; --limit shows more", self.limit));
        }
        Ok(())
    }
}

fn table(letters: &[LetterSummary]) -> Table {
    let row = |letter: &LetterSummary| {
        vec![
            letter.id.to_string(),
            letter.worker.clone(),
            letter.reason.clone(),
            letter.code.clone().unwrap_or_default(),
            letter.event_id.clone(),
            letter.attempts.to_string(),
            letter.state.as_str().to_owned(),
            units::show_time(letter.died_at),
            letter.detail.clone(),
        ]
    };
    let mut table =
        Table::new(&["id", "worker", "reason", "code", "event id", "attempts", "state", "died at", "detail"]);
    letters.iter().map(row).for_each(|row| table.row(row));
    table
}
