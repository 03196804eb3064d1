//! `oncely outbox`: list, show, retry and drop outputs that could not be published.

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use clap::{Args, Subcommand};

use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::term::{self, Table};
use crate::api::outbox::{Output, ParkedOutputsRequest, ParkedOutputsResponse};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::model::visible::visible;
use crate::store::{OutputFilter, OutputSummary};

/// How many outputs one request changes.
const CHUNK_SIZE: usize = 1_000;

/// Show, retry and drop outputs that could not be published.
#[derive(Debug, Args)]
pub struct Outbox {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Show(Show),
    Retry(Retry),
    Drop(Drop),
}

/// List parked outputs, oldest first.
#[derive(Debug, Args)]
struct List {
    /// Show only outputs of this worker.
    #[arg(long)]
    worker: Option<String>,
    /// Show only outputs to this stream, by its subjects.
    #[arg(long)]
    stream: Option<String>,
    /// Show all unpublished outputs, not only parked ones.
    #[arg(long)]
    unpublished: bool,
    /// Show dropped outputs, newest first.
    #[arg(long, conflicts_with = "unpublished")]
    dropped: bool,
    /// Show at most this many outputs.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Show one output: its last error, headers and body.
#[derive(Debug, Args)]
struct Show {
    /// Show the output with this number, as listed by `oncely outbox list`.
    number: i64,
    /// Print JSON, with the body in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Retry parked outputs, once the cause of their failure is fixed.
#[derive(Debug, Args)]
struct Retry {
    #[command(flatten)]
    selection: OutputSelection,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Drop parked outputs, which are then never published.
///
/// Outputs that they block are published. A record of the dropped outputs stays.
#[derive(Debug, Args)]
struct Drop {
    #[command(flatten)]
    selection: OutputSelection,
    /// Record this note as the reason.
    #[arg(long, default_value = "")]
    note: String,
    /// Skip the confirmation prompt.
    #[arg(long)]
    yes: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// The outputs that a command applies to.
#[derive(Debug, Args)]
struct OutputSelection {
    /// Select outputs by their numbers.
    #[arg(required_unless_present = "all")]
    numbers: Vec<i64>,
    /// Select all parked outputs.
    #[arg(long, conflicts_with = "numbers")]
    all: bool,
    /// With --all, select only outputs of this worker.
    #[arg(long, requires = "all")]
    worker: Option<String>,
}

impl Outbox {
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::List(list) => list.run().await,
            Command::Show(show) => show.run().await,
            Command::Retry(retry) => retry.run().await,
            Command::Drop(drop) => drop.run().await,
        }
    }
}

impl List {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let (unpublished, dropped) = (self.unpublished, self.dropped);
        let filter = OutputFilter {
            worker: self.worker,
            unpublished,
            dropped,
            stream: self.stream,
            limit: self.limit,
            ..OutputFilter::default()
        };
        let outputs: Vec<OutputSummary> = client.get_with("/outbox", &filter).await?;
        if self.json {
            return term::json(&outputs);
        }
        if outputs.is_empty() {
            term::note(match (unpublished, dropped) {
                (true, _) => "all outputs are published",
                (_, true) => "no outputs were dropped",
                _ => "no outputs are parked",
            });
            return Ok(());
        }
        let row = |output: &OutputSummary| {
            vec![
                output.number.to_string(),
                output.worker.clone(),
                output.state.clone(),
                output.subject.clone(),
                output.ordering_key.clone().unwrap_or_default(),
                output.waiting.to_string(),
                output.failures.to_string(),
                units::format_time(output.created_at),
                match (&output.note, output.blocked_by) {
                    (Some(note), _) if !note.is_empty() => note.clone(),
                    (_, Some(blocked_by)) => format!("blocked by {blocked_by}"),
                    _ => output.error.clone().unwrap_or_default(),
                },
            ]
        };
        let heads = [
            "number",
            "worker",
            "state",
            "subject",
            "key",
            "held",
            "failures",
            "created at",
            "detail",
        ];
        let mut table = Table::new(&heads);
        outputs.iter().map(row).for_each(|row| table.row(row));
        term::data(table.to_string().trim_end())
    }
}

impl Show {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let output: Output = client.get(&format!("/outbox/{}", self.number)).await?;
        if self.json {
            return term::json(&output);
        }
        show(&output)
    }
}

fn show(output: &Output) -> Result<()> {
    let summary = &output.summary;
    let mut details = vec![
        ("output", summary.number.to_string()),
        ("id", summary.id.clone()),
        ("message id", summary.message_id.clone()),
        ("worker", summary.worker.clone()),
        ("event id", summary.event_id.clone()),
        ("subject", summary.subject.clone()),
        (
            "ordering key",
            summary.ordering_key.clone().unwrap_or_default(),
        ),
        ("state", summary.state.clone()),
    ];
    let mut add = |name, value: Option<String>| details.extend(value.map(|value| (name, value)));
    add(
        "blocked by",
        summary.blocked_by.map(|number| number.to_string()),
    );
    add(
        "blocks",
        Some(summary.waiting.to_string()).filter(|_| summary.waiting > 0),
    );
    add("created at", Some(units::format_time(summary.created_at)));
    add("due at", Some(units::format_time(summary.due_at)));
    add("parked at", summary.parked_at.map(units::format_time));
    add("failures", Some(summary.failures.to_string()));
    add("last error", summary.error.clone());
    add("dropped at", summary.dropped_at.map(units::format_time));
    add("note", summary.note.clone().filter(|note| !note.is_empty()));
    let place = output.stream.as_ref().zip(output.stream_sequence);
    add(
        "published at",
        place.map(|(stream, sequence)| format!("{stream} {sequence}")),
    );
    term::data(term::details(details))?;
    term::data("\nheaders")?;
    for (name, value) in &output.headers {
        term::data(format!("  {}: {}", visible(name), visible(value)))?;
    }
    let body = base64::engine::general_purpose::STANDARD
        .decode(&output.body)
        .context("read the body")?;
    term::data(format!("\nbody ({} bytes)", body.len()))?;
    term::data(term::readable(&body))
}

impl Retry {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let numbers = self.selection.find(&client).await?;
        let outputs = post_in_chunks(&client, "/outbox/retry", &numbers, "").await?;
        if self.json {
            return term::json(&ParkedOutputsResponse { outputs });
        }
        term::data(format!(
            "{} requeued; `oncely outbox list` shows those that are parked again",
            describe_count(outputs)
        ))?;
        check_all_parked(outputs, &numbers)
    }
}

impl Drop {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let numbers = self.selection.find(&client).await?;
        let question = format!(
            "Drop {}? Dropped outputs are never published.",
            count_outputs(numbers.len() as u64)
        );
        if !numbers.is_empty() && !self.yes && !term::confirm(&question) {
            return Err(Exit::Usage.with_message(format!(
                "refusing to drop {} without confirmation",
                count_outputs(numbers.len() as u64)
            )))
            .hint("confirm with --yes");
        }
        let outputs = post_in_chunks(&client, "/outbox/drop", &numbers, &self.note).await?;
        if self.json {
            return term::json(&ParkedOutputsResponse { outputs });
        }
        term::data(format!(
            "{} dropped; `oncely outbox list --dropped` shows the record",
            describe_count(outputs)
        ))?;
        check_all_parked(outputs, &numbers)
    }
}

impl OutputSelection {
    async fn find(&self, client: &Client) -> Result<Vec<i64>> {
        if !self.all {
            let mut numbers = self.numbers.clone();
            numbers.sort_unstable();
            numbers.dedup();
            return Ok(numbers);
        }
        let filter = OutputFilter {
            worker: self.worker.clone(),
            limit: u32::MAX,
            ..OutputFilter::default()
        };
        let outputs: Vec<OutputSummary> = client.get_with("/outbox", &filter).await?;
        Ok(outputs.iter().map(|output| output.number).collect())
    }
}

async fn post_in_chunks(client: &Client, path: &str, numbers: &[i64], note: &str) -> Result<u64> {
    let mut outputs = 0;
    for numbers in numbers.chunks(CHUNK_SIZE) {
        let request = ParkedOutputsRequest {
            numbers: numbers.to_vec(),
            note: note.to_owned(),
        };
        let response: ParkedOutputsResponse = client.post(path, &request).await?;
        outputs += response.outputs;
    }
    Ok(outputs)
}

/// Fails if some of the outputs were not parked (any more).
fn check_all_parked(outputs: u64, numbers: &[i64]) -> Result<()> {
    let skipped = (numbers.len() as u64).saturating_sub(outputs);
    if skipped > 0 {
        bail!("{} not parked", describe_count(skipped));
    }
    Ok(())
}

fn count_outputs(outputs: u64) -> String {
    if outputs == 1 {
        "1 output".to_owned()
    } else {
        format!("{outputs} outputs")
    }
}

fn describe_count(outputs: u64) -> String {
    let verb = if outputs == 1 { "is" } else { "are" };
    format!("{} {verb}", count_outputs(outputs))
}
