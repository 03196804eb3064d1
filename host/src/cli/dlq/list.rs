//! `oncely dlq list`.

use anyhow::Result;
use clap::Args;

use super::select::Filters;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Table};
use crate::model::units;
use crate::store::{LetterFilter, LetterGroup, LetterSummary};

/// Lists dead letters, newest first, or the failures they died of.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    filters: Filters,
    /// Also those that took effect after all, were resolved or dropped.
    #[arg(long)]
    closed: bool,
    /// One line for each failure, those with most letters first.
    #[arg(long)]
    groups: bool,
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
        if self.groups {
            let groups: Vec<LetterGroup> = client.post("/letters/groups", &filter).await?;
            return if self.json { term::json(&groups) } else { show_groups(&groups) };
        }
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

fn show_groups(groups: &[LetterGroup]) -> Result<()> {
    if groups.is_empty() {
        term::note("no dead letters");
        return Ok(());
    }
    let row = |found: &LetterGroup| {
        let group = found.group.as_ref();
        let place =
            group.and_then(|group| group.place.as_ref()).map(|place| format!(", at {place}")).unwrap_or_default();
        vec![
            group.map_or_else(|| "-".to_owned(), |group| group.id.clone()),
            found.worker.clone(),
            found.letters.to_string(),
            group.map(|group| group.reason.clone()).unwrap_or_default(),
            group.and_then(|group| group.code.clone()).unwrap_or_default(),
            units::show_time(found.first_died_at),
            units::show_time(found.last_died_at),
            format!("{}{place}", group.map(|group| group.shape.as_str()).unwrap_or_default()),
        ]
    };
    let mut table =
        Table::new(&["group", "worker", "letters", "reason", "code", "first died at", "last died at", "detail"]);
    groups.iter().map(row).for_each(|row| table.row(row));
    term::data(table.to_string().trim_end())
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
