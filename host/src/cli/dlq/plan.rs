//! `oncely dlq redrive --dry-run` and `--plan`: what putting letters back would come to, and doing just that.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::api::letters::LettersRequest;
use crate::cli::client::Client;
use crate::cli::term::{self, Progress, Table};
use crate::dlq::dry_run::{Class, Rehearsed, StateValue};
use crate::model::hint::WithHint;
use crate::store::{LetterSummary, RowChange};

/// How many letters one request rehearses.
const CHUNK: usize = 20;

/// Rehearsals, kept in a file until somebody has read them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    pub made_at: Timestamp,
    pub letters: Vec<Rehearsed>,
}

impl Plan {
    /// Rehearses letters, one after the other.
    pub async fn make(client: &Client, letters: &[LetterSummary]) -> Result<Plan> {
        let mut plan = Plan { made_at: Timestamp::now(), letters: Vec::new() };
        let mut progress = Progress::bar("rehearse", letters.len() as u64);
        for chunk in letters.chunks(CHUNK) {
            let request = LettersRequest { ids: chunk.iter().map(|letter| letter.id).collect() };
            plan.letters.extend(client.post::<_, Vec<Rehearsed>>("/letters/rehearse", &request).await?);
            progress.set(plan.letters.len() as u64);
        }
        progress.finish(&format!("{} dead letters; nothing was changed", plan.letters.len()));
        Ok(plan)
    }

    pub fn read(path: &Path) -> Result<Plan> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is no plan", path.display()))
            .hint("make one with: oncely dlq redrive --all --dry-run --out plan.json")
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write the plan")? + "\n";
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// The letters it is for to put back.
    pub fn would_succeed(&self) -> impl Iterator<Item = &Rehearsed> {
        self.letters.iter().filter(|letter| letter.class == Class::WouldSucceed)
    }

    /// Shows one letter in detail, several in a table.
    pub fn show(&self) -> Result<()> {
        if let [letter] = self.letters.as_slice() {
            return show_one(letter);
        }
        let mut table = Table::new(&["id", "worker", "event id", "class", "why"]);
        let mut counts: BTreeMap<Class, usize> = BTreeMap::new();
        for letter in &self.letters {
            *counts.entry(letter.class).or_default() += 1;
            let id = letter.letter.to_string();
            table.row([&id, &letter.worker, &letter.event_id, letter.class.in_words(), &letter.why]);
        }
        term::data(table.to_string().trim_end())?;
        term::data("")?;
        term::data(term::details(counts.iter().map(|(class, count)| (class.in_words(), count))))
    }
}

fn show_one(letter: &Rehearsed) -> Result<()> {
    let version =
        letter.basis.version.map_or_else(|| "not deployed".to_owned(), |version| format!("version {version}"));
    term::data(term::details([
        ("dead letter", letter.letter.to_string()),
        ("worker", format!("{} {version}", letter.worker)),
        ("event id", letter.event_id.clone()),
        ("put back now, it", letter.class.in_words().to_owned()),
        ("why", letter.why.clone()),
    ]))?;
    section("rows", letter.changes.rows.iter().map(row))?;
    section("not shown", letter.changes.not_shown.iter().map(|what| format!("  {}", term::visible(what))))?;
    section(
        "state",
        letter.state.iter().map(|change| {
            let (before, after) = (change.before.as_ref().map(value), change.after.as_ref().map(value));
            changed(&change.key, before, after)
        }),
    )?;
    section(
        "outputs",
        letter.outputs.iter().map(|output| {
            let body = STANDARD.decode(&output.body).unwrap_or_default();
            let body = String::from_utf8_lossy(&body).into_owned();
            format!("  {}", term::visible(&format!("{} to {}: {body}", output.id, output.subject)))
        }),
    )?;
    section("logs", letter.logs.lines().map(|line| format!("  | {}", term::visible(line))))
}

/// A head and its lines; nothing when there are none.
fn section(head: &str, lines: impl Iterator<Item = String>) -> Result<()> {
    let lines: Vec<String> = lines.collect();
    if lines.is_empty() { Ok(()) } else { term::data(format!("\n{head}\n{}", lines.join("\n"))) }
}

fn row(change: &RowChange) -> String {
    let shown = |row: &serde_json::Value| row.to_string();
    changed(&change.table, change.before.as_ref().map(shown), change.after.as_ref().map(shown))
}

/// `+` for what is new, `-` for what is gone, `~` for what is another.
fn changed(name: &str, before: Option<String>, after: Option<String>) -> String {
    let text = match (before, after) {
        (None, Some(after)) => format!("+ {name} {after}"),
        (Some(before), None) => format!("- {name} {before}"),
        (Some(before), Some(after)) => format!("~ {name} {before} -> {after}"),
        (None, None) => format!("~ {name}"),
    };
    format!("  {}", term::visible(&text))
}

fn value(value: &StateValue) -> String {
    let bytes = STANDARD.decode(&value.value).unwrap_or_default();
    let shown = std::str::from_utf8(&bytes).map_or_else(|_| hex::encode(&bytes), str::to_owned);
    format!("{shown} (version {})", value.version)
}
