//! `oncely dlq list`: lists dead letters, or their failure groups.

use anyhow::Result;
use clap::Args;

use super::select::Filters;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Table};
use crate::model::units;
use crate::store::{DeadLetterFilter, DeadLetterGroup, DeadLetterSummary};

/// List dead letters, newest first, or their failure groups.
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    filters: Filters,
    /// Include closed dead letters: those that took effect later, were resolved or were dropped.
    #[arg(long)]
    closed: bool,
    /// List failure groups instead, those with most dead letters first.
    #[arg(long)]
    groups: bool,
    /// List at most this many.
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
        let filter = DeadLetterFilter {
            closed: self.closed,
            limit: self.limit,
            ..self.filters.filter()
        };
        if self.groups {
            let groups: Vec<DeadLetterGroup> = client.post("/dead-letters/groups", &filter).await?;
            return if self.json {
                term::json(&groups)
            } else {
                show_groups(&groups)
            };
        }
        let dead_letters: Vec<DeadLetterSummary> =
            client.post("/dead-letters/find", &filter).await?;
        if self.json {
            return term::json(&dead_letters);
        }
        if dead_letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        term::data(table(&dead_letters).to_string().trim_end())?;
        if u32::try_from(dead_letters.len()).is_ok_and(|count| count == self.limit) {
            term::note(format!(
                "showing the newest {}; use --limit for more",
                self.limit
            ));
        }
        Ok(())
    }
}

fn show_groups(groups: &[DeadLetterGroup]) -> Result<()> {
    if groups.is_empty() {
        term::note("no dead letters");
        return Ok(());
    }
    // Owners and notes have columns once there are any.
    let is_noted = groups.iter().any(|found| found.note.is_some());
    let noted = |found: &DeadLetterGroup| {
        let note = found.note.clone();
        let (owner, note) = note.map_or((None, None), |note| (note.owner, note.note));
        is_noted
            .then(|| [owner.unwrap_or_default(), note.unwrap_or_default()])
            .into_iter()
            .flatten()
    };
    let row = |found: &DeadLetterGroup| {
        let group = found.group.as_ref();
        let place = group
            .and_then(|group| group.place.as_ref())
            .map(|place| format!(", at {place}"))
            .unwrap_or_default();
        let shown = vec![
            group.map_or_else(|| "-".to_owned(), |group| group.id.clone()),
            found.worker.clone(),
            found.dead_letters.to_string(),
            group.map(|group| group.reason.clone()).unwrap_or_default(),
            group
                .and_then(|group| group.code.clone())
                .unwrap_or_default(),
            units::format_time(found.first_died_at),
            units::format_time(found.last_died_at),
            format!(
                "{}{place}",
                group.map(|group| group.shape.as_str()).unwrap_or_default()
            ),
        ];
        shown
            .into_iter()
            .chain(noted(found))
            .collect::<Vec<String>>()
    };
    let mut heads = vec![
        "group",
        "worker",
        "dead letters",
        "reason",
        "code",
        "first died at",
        "last died at",
        "detail",
    ];
    if is_noted {
        heads.extend(["owner", "note"]);
    }
    let mut table = Table::new(&heads);
    groups.iter().map(row).for_each(|row| table.row(row));
    term::data(table.to_string().trim_end())
}

fn table(dead_letters: &[DeadLetterSummary]) -> Table {
    let row = |dead_letter: &DeadLetterSummary| {
        vec![
            dead_letter.id.to_string(),
            dead_letter.worker.clone(),
            dead_letter.reason.clone(),
            dead_letter.code.clone().unwrap_or_default(),
            dead_letter.event_id.clone(),
            dead_letter.attempts.to_string(),
            dead_letter.state.as_str().to_owned(),
            units::format_time(dead_letter.died_at),
            dead_letter.detail.clone(),
        ]
    };
    let mut table = Table::new(&[
        "id", "worker", "reason", "code", "event id", "attempts", "state", "died at", "detail",
    ]);
    dead_letters.iter().map(row).for_each(|row| table.row(row));
    table
}
