//! `oncely replay`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::exit::Exit;
use super::term;
use crate::component;
use crate::dlq::replay::{self, ReplayOutcome, Replayable, Report};
use crate::guest::Step;
use crate::model::base64_text;
use crate::model::hint::WithHint;
use crate::model::units;

/// Runs the last failed attempt at a dead letter again, from a file that `oncely dlq export` wrote: with no database and no broker.
///
/// Ends with 0 when everything was the same up to the failure, with 5 where it departs, with 6 when the record was cut before the failure.
#[derive(Debug, Args)]
pub struct Replay {
    /// What `oncely dlq export ID` wrote.
    file: PathBuf,
    /// Which letter, if the file holds several.
    #[arg(long, value_name = "ID")]
    id: Option<i64>,
    /// Run this component in place of the one that failed: where does it depart?
    #[arg(long, value_name = "FILE")]
    component: Option<PathBuf>,
    /// Also show everything the handler asked and saw.
    #[arg(long, conflicts_with = "json")]
    calls: bool,
    /// Print JSON, with everything the handler asked and saw.
    #[arg(long)]
    json: bool,
}

/// What a replay reads of a line of the file.
#[derive(Debug, Deserialize)]
struct ExportLine {
    id: i64,
    event_id: String,
    replay: Option<ExportedAttempt>,
}

/// What an export adds to a letter.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExportedAttempt {
    #[serde(flatten)]
    pub attempt: Replayable,
    /// The component; none when it stands in an earlier line of the file, or was left out.
    pub component: Option<ComponentBytes>,
}

/// A component in Base64.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ComponentBytes(#[serde(with = "base64_text")] pub Vec<u8>);

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct JsonReport<'r> {
    dead_letter: i64,
    #[serde(flatten)]
    report: &'r Report,
    record: &'r [Step],
}

impl Replay {
    pub async fn run(self) -> Result<()> {
        let lines = read(&self.file)?;
        let line = select_line(&lines, self.id)?;
        let Some(exported) = &line.replay else {
            let why = format!(
                "there is no record of an attempt at dead letter {}",
                line.id
            );
            return Err(Exit::NotFound.with_message(why)).hint(
                "letters that never reached their handler have none, nor have closed ones: see docs/dead-letters.md",
            );
        };
        let recorded = component_in(&lines, &exported.attempt.digest);
        let wasm = match (&self.component, recorded) {
            (Some(path), _) => component::read(path)?,
            (None, Some(wasm)) => wasm.to_vec(),
            (None, None) => {
                return Err(Exit::Usage.with_message("the file does not hold the component"))
                    .hint("give the component that failed with --component FILE, or export without --no-component");
            }
        };
        let is_changed = hex::encode(Sha256::digest(&wasm)) != exported.attempt.digest;
        let cache = tempfile::tempdir().context("make a folder")?;
        let report = replay::replay(
            &exported.attempt,
            &line.event_id,
            wasm.into(),
            is_changed,
            cache.path(),
        )
        .await?;
        if self.json {
            term::json(&JsonReport {
                dead_letter: line.id,
                report: &report,
                record: &exported.attempt.record.steps,
            })?;
        } else {
            show(line, &exported.attempt, &report, self.calls)?;
        }
        exit_result(&report)
    }
}

fn read(path: &Path) -> Result<Vec<ExportLine>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| Exit::Usage.with_message(format!("read {}", path.display())))
        .hint("write such a file with: oncely dlq export ID --out FILE")?;
    let line = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| {
                Exit::Usage.with_message(format!(
                    "line {} of {} is no exported letter",
                    number + 1,
                    path.display()
                ))
            })
            .hint("write such a file with: oncely dlq export ID --out FILE")
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(line)
        .collect()
}

fn select_line(lines: &[ExportLine], id: Option<i64>) -> Result<&ExportLine> {
    match (lines, id) {
        ([only], None) => Ok(only),
        ([], _) => Err(Exit::Usage.with_message("the file holds no letter").into()),
        (lines, None) => {
            let ids: Vec<String> = lines
                .iter()
                .take(20)
                .map(|line| line.id.to_string())
                .collect();
            let why = format!("the file holds {} letters: {}", lines.len(), ids.join(", "));
            Err(Exit::Usage.with_message(why)).hint("say which one with --id ID")
        }
        (lines, Some(id)) => lines.iter().find(|line| line.id == id).ok_or_else(|| {
            Exit::NotFound
                .with_message(format!("the file does not hold dead letter {id}"))
                .into()
        }),
    }
}

/// The component with this digest, on whichever line it stands.
fn component_in<'l>(lines: &'l [ExportLine], digest: &str) -> Option<&'l [u8]> {
    let attempts = lines.iter().filter_map(|line| line.replay.as_ref());
    attempts
        .filter(|exported| exported.attempt.digest == digest)
        .find_map(|exported| exported.component.as_ref())
        .map(|wasm| wasm.0.as_slice())
}

fn show(line: &ExportLine, attempt: &Replayable, report: &Report, calls: bool) -> Result<()> {
    let record = &attempt.record;
    let failure = record.failure.as_ref();
    term::data(term::details([
        ("dead letter", line.id.to_string()),
        ("event id", line.event_id.clone()),
        (
            "worker",
            format!("{} version {}", attempt.manifest.name, attempt.version),
        ),
        (
            "attempt",
            format!("{} at {}", record.attempt, units::format_time(record.now)),
        ),
        (
            "failed with",
            failure
                .map(|failure| failure.message.clone())
                .unwrap_or_default(),
        ),
        (
            "host calls",
            format!(
                "{}{}",
                record.steps.len(),
                if record.truncated {
                    ", then the record was cut"
                } else {
                    ""
                }
            ),
        ),
    ]))?;
    if calls {
        for (number, step) in record.steps.iter().enumerate() {
            let saw = step
                .result
                .as_ref()
                .map_or_else(|| "no answer".to_owned(), ToString::to_string);
            term::data(format!(
                "{:4} {}",
                number + 1,
                truncate(&step.call.to_string())
            ))?;
            term::data(format!("     -> {}", truncate(&saw)))?;
        }
    }
    for line in report.logs.lines() {
        term::data(format!("  | {}", term::visible(line)))?;
    }
    if record.warm && report.outcome == ReplayOutcome::Diverged {
        term::warning(
            "the instance had handled other messages before (isolation = \"batch\"), of which a replay knows nothing",
        );
    }
    match (&report.divergence, report.outcome) {
        (Some(divergence), _) => term::data(term::details([
            (
                "diverges at",
                divergence
                    .call
                    .map_or("its log".to_owned(), |call| format!("call {call}")),
            ),
            ("expected", truncate(&divergence.expected)),
            ("actual", truncate(&divergence.actual)),
        ])),
        (None, ReplayOutcome::Truncated) => term::data(format!(
            "the same for {}; there the record was cut",
            count(report.calls, "call")
        )),
        (None, _) => term::data(format!(
            "the same: {}, and the failure",
            count(report.calls, "call")
        )),
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// One line that a terminal can hold.
fn truncate(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    let text = term::visible(text);
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!(
            "{} … ({} bytes)",
            text.get(..end).unwrap_or_default(),
            text.len()
        ),
        None => text,
    }
}

fn exit_result(report: &Report) -> Result<()> {
    match (report.outcome, &report.divergence) {
        (ReplayOutcome::Reproduced, _) => Ok(()),
        (ReplayOutcome::Truncated, _) => Err(Exit::Truncated
            .with_message("the record was cut before the failure")
            .into()),
        (ReplayOutcome::Diverged, divergence) => {
            let call = divergence.as_ref().and_then(|divergence| divergence.call);
            let place = call.map_or("in its log".to_owned(), |call| format!("at call {call}"));
            Err(Exit::Diverged
                .with_message(format!("the replay diverges from the record {place}"))
                .into())
        }
    }
}
