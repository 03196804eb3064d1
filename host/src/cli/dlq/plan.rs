//! `oncely dlq redrive --dry-run` and `--plan`: the plan of a redrive.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::dead_letters::DeadLettersRequest;
use crate::cli::client::Client;
use crate::cli::term::{self, Progress, Table};
use crate::dlq::dry_run::{Prediction, Preview, StateValue};
use crate::model::hint::WithHint;
use crate::model::visible::visible;
use crate::store::{DeadLetterSummary, RowChange};

/// How many dead letters one request for a dry run covers.
const CHUNK_SIZE: usize = 20;

/// The dry runs of dead letters, stored in a file for review.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub created_at: Timestamp,
    pub dead_letters: Vec<Preview>,
}

impl Plan {
    /// Runs a dry run of dead letters, one after the other.
    pub async fn create(client: &Client, dead_letters: &[DeadLetterSummary]) -> Result<Plan> {
        let mut plan = Plan {
            created_at: Timestamp::now(),
            dead_letters: Vec::new(),
        };
        let mut progress = Progress::bar("dry run", dead_letters.len() as u64);
        for chunk in dead_letters.chunks(CHUNK_SIZE) {
            let request = DeadLettersRequest {
                ids: chunk.iter().map(|dead_letter| dead_letter.id).collect(),
            };
            plan.dead_letters.extend(
                client
                    .post::<_, Vec<Preview>>("/dead-letters/dry-run", &request)
                    .await?,
            );
            progress.set(plan.dead_letters.len() as u64);
        }
        progress.finish(&format!(
            "{} dead letters; nothing was changed",
            plan.dead_letters.len()
        ));
        Ok(plan)
    }

    pub fn read(path: &Path) -> Result<Plan> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not a plan", path.display()))
            .hint("create one with: oncely dlq redrive --all --dry-run --out plan.json")
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the plan")? + "\n";
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// The dead letters that would succeed.
    pub fn would_succeed(&self) -> impl Iterator<Item = &Preview> {
        self.dead_letters
            .iter()
            .filter(|preview| preview.prediction == Prediction::WouldSucceed)
    }

    /// Prints one dead letter in detail, several in a table.
    pub fn show(&self) -> Result<()> {
        if let [preview] = self.dead_letters.as_slice() {
            return show_one(preview);
        }
        let mut table = Table::new(&["id", "worker", "event id", "prediction", "detail"]);
        let mut counts: BTreeMap<Prediction, usize> = BTreeMap::new();
        for preview in &self.dead_letters {
            *counts.entry(preview.prediction).or_default() += 1;
            let id = preview.dead_letter.to_string();
            table.row([
                &id,
                &preview.worker,
                &preview.event_id,
                preview.prediction.label(),
                &preview.detail,
            ]);
        }
        term::data(table.to_string().trim_end())?;
        term::data("")?;
        term::data(term::details(
            counts
                .iter()
                .map(|(prediction, count)| (prediction.label(), count)),
        ))
    }
}

fn show_one(preview: &Preview) -> Result<()> {
    let version = preview.preconditions.version.map_or_else(
        || "not deployed".to_owned(),
        |version| format!("version {version}"),
    );
    term::data(term::details([
        ("dead letter", preview.dead_letter.to_string()),
        ("worker", format!("{} {version}", preview.worker)),
        ("event id", preview.event_id.clone()),
        ("prediction", preview.prediction.label().to_owned()),
        ("detail", preview.detail.clone()),
    ]))?;
    section("rows", preview.changes.rows.iter().map(row))?;
    section(
        "not shown",
        preview
            .changes
            .omitted
            .iter()
            .map(|item| format!("  {}", visible(item))),
    )?;
    section(
        "state",
        preview.state.iter().map(|change| {
            let (before, after) = (
                change.before.as_ref().map(value),
                change.after.as_ref().map(value),
            );
            diff_line(&change.key, before, after)
        }),
    )?;
    section(
        "outputs",
        preview.outputs.iter().map(|output| {
            let body = STANDARD.decode(&output.body).unwrap_or_default();
            let body = String::from_utf8_lossy(&body).into_owned();
            format!(
                "  {}",
                visible(&format!("{} to {}: {body}", output.id, output.subject))
            )
        }),
    )?;
    section(
        "logs",
        preview
            .logs
            .lines()
            .map(|line| format!("  | {}", visible(line))),
    )
}

/// Prints a heading and its lines; nothing without lines.
fn section(head: &str, lines: impl Iterator<Item = String>) -> Result<()> {
    let lines: Vec<String> = lines.collect();
    if lines.is_empty() {
        Ok(())
    } else {
        term::data(format!("\n{head}\n{}", lines.join("\n")))
    }
}

fn row(change: &RowChange) -> String {
    let shown = |row: &serde_json::Value| row.to_string();
    diff_line(
        &change.table,
        change.before.as_ref().map(shown),
        change.after.as_ref().map(shown),
    )
}

/// One line of a diff: `+` for added, `-` for removed, `~` for changed values.
fn diff_line(name: &str, before: Option<String>, after: Option<String>) -> String {
    let text = match (before, after) {
        (None, Some(after)) => format!("+ {name} {after}"),
        (Some(before), None) => format!("- {name} {before}"),
        (Some(before), Some(after)) => format!("~ {name} {before} -> {after}"),
        (None, None) => format!("~ {name}"),
    };
    format!("  {}", visible(&text))
}

fn value(value: &StateValue) -> String {
    let bytes = STANDARD.decode(&value.value).unwrap_or_default();
    let shown = std::str::from_utf8(&bytes).map_or_else(|_| hex::encode(&bytes), str::to_owned);
    format!("{shown} (version {})", value.version)
}
