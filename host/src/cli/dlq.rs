//! `oncely dlq`: the dead letters.

use anyhow::Result;
use base64::Engine as _;
use clap::{Args, Subcommand};

use super::client::{Client, HostArgs};
use super::term::{self, Table};
use crate::api::Letter;
use crate::store::{LetterFilter, LetterSummary};
use crate::units;

/// Shows messages that could not be handled, and why.
#[derive(Debug, Args)]
pub struct Dlq {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Show(Show),
}

/// Lists dead letters, newest first.
#[derive(Debug, Args)]
struct List {
    /// Only of this worker.
    #[arg(long)]
    worker: Option<String>,
    /// Only with this reason, such as rejected or attempts-exhausted.
    #[arg(long)]
    reason: Option<String>,
    /// At most so many.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Shows one dead letter: its story, headers and body.
#[derive(Debug, Args)]
struct Show {
    id: i64,
    /// Print JSON, the body in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Dlq {
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::List(list) => list.run().await,
            Command::Show(show) => show.run().await,
        }
    }
}

impl List {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let filter = LetterFilter { worker: self.worker, reason: self.reason, limit: self.limit };
        let letters: Vec<LetterSummary> = client.get_with("/letters", &filter).await?;
        if self.json {
            return term::json(&letters);
        }
        if letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        let row = |letter: &LetterSummary| {
            vec![
                letter.id.to_string(),
                letter.worker.clone(),
                letter.reason.clone(),
                letter.code.clone().unwrap_or_default(),
                letter.event_id.clone(),
                letter.attempts.to_string(),
                units::show_time(letter.died_at),
                letter.detail.clone(),
            ]
        };
        let heads = ["id", "worker", "reason", "code", "event id", "attempts", "died at", "detail"];
        let mut table = Table::new(&heads);
        letters.iter().map(row).for_each(|row| table.row(row));
        term::data(table.to_string().trim_end())
    }
}

impl Show {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letter: Letter = client.get(&format!("/letters/{}", self.id)).await?;
        if self.json {
            return term::json(&letter);
        }
        show(&letter)
    }
}

fn show(letter: &Letter) -> Result<()> {
    let summary = &letter.summary;
    let place = match (&letter.stream, letter.stream_sequence) {
        (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
        _ => "not from a stream".to_owned(),
    };
    term::data(term::details([
        ("dead letter", summary.id.to_string()),
        ("worker", format!("{} version {}", summary.worker, summary.version)),
        ("reason", summary.reason.clone()),
        ("code", summary.code.clone().unwrap_or_default()),
        ("detail", summary.detail.clone()),
        ("event id", summary.event_id.clone()),
        ("subject", summary.subject.clone()),
        ("from", place),
        ("died at", units::show_time(summary.died_at)),
        ("attempts", summary.attempts.to_string()),
    ]))?;
    for attempt in &letter.story {
        term::data(format!(
            "\nattempt {} at {}, version {}: {}",
            attempt.attempt,
            units::show_time(attempt.at),
            attempt.version,
            term::visible(&attempt.error)
        ))?;
        for line in attempt.logs.lines() {
            term::data(format!("  | {}", term::visible(line)))?;
        }
    }
    term::data("\nheaders")?;
    for (name, value) in &letter.headers {
        term::data(format!("  {}: {}", term::visible(name), term::visible(value)))?;
    }
    let body = base64::engine::general_purpose::STANDARD.decode(&letter.body).unwrap_or_default();
    term::data(format!("\nbody ({} bytes)", body.len()))?;
    term::data(term::readable(&body))
}
