//! `oncely replay`: replays a failed attempt from an export.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::encode::read_component;
use super::exit::Exit;
use super::term;
use crate::dlq::replay::{self, ReplayOutcome, Replayable, Report};
use crate::guest::Step;
use crate::model::base64_text;
use crate::model::hint::WithHint;
use crate::model::units;
use crate::model::visible::visible;

/// Replay the last failed attempt at a dead letter, without the database and NATS.
///
/// The file comes from `oncely dlq export`.
///
/// Exit codes: 0 if the replay matches its recording up to the failure, 5 if it diverges, 6 if the
/// recording was cut before the failure.
#[derive(Debug, Args)]
pub struct Replay {
    /// Read this file, written by `oncely dlq export ID`.
    file: PathBuf,
    /// Select the dead letter, if the file contains several.
    #[arg(long, value_name = "ID")]
    id: Option<i64>,
    /// Run this component instead of the failed one, and show where it diverges.
    #[arg(long, value_name = "FILE")]
    component: Option<PathBuf>,
    /// Show all host calls and their results.
    #[arg(long, conflicts_with = "json")]
    calls: bool,
    /// Print JSON, with all host calls and their results.
    #[arg(long)]
    json: bool,
}

/// The fields of an exported line that a replay reads.
#[derive(Debug, Deserialize)]
struct ExportLine {
    id: i64,
    event_id: String,
    replay: Option<ExportedAttempt>,
}

/// The data for a replay that an export adds to a dead letter.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExportedAttempt {
    #[serde(flatten)]
    pub attempt: Replayable,
    /// The component; none if an earlier line of the file contains it, or if it was left out.
    pub component: Option<ComponentBytes>,
}

/// A component in Base64.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ComponentBytes(#[serde(with = "base64_text")] pub Vec<u8>);

/// The output of `--json`.
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
                "there is no recording of an attempt at dead letter {}",
                line.id
            );
            return Err(Exit::NotFound.with_message(why)).hint(
                "dead letters that never reached their handler and closed ones have no recording; \
                 see docs/dead-letters.md",
            );
        };
        let recorded = component_in(&lines, &exported.attempt.digest);
        let wasm = match (&self.component, recorded) {
            (Some(path), _) => read_component(path)?,
            (None, Some(wasm)) => wasm.to_vec(),
            (None, None) => {
                return Err(Exit::Usage.with_message("the file does not contain the component"))
                    .hint(
                        "pass the failed component with --component FILE, \
                         or export without --no-component",
                    );
            }
        };
        let is_changed = hex::encode(Sha256::digest(&wasm)) != exported.attempt.digest;
        let cache = tempfile::tempdir().context("create a temporary folder")?;
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
        .hint("create the file with: oncely dlq export ID --out FILE")?;
    let line = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| {
                Exit::Usage.with_message(format!(
                    "line {} of {} is not an exported dead letter",
                    number + 1,
                    path.display()
                ))
            })
            .hint("create the file with: oncely dlq export ID --out FILE")
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
        ([], _) => Err(Exit::Usage
            .with_message("the file contains no dead letter")
            .into()),
        (lines, None) => {
            let ids: Vec<String> = lines
                .iter()
                .take(20)
                .map(|line| line.id.to_string())
                .collect();
            let why = format!(
                "the file contains {} dead letters: {}",
                lines.len(),
                ids.join(", ")
            );
            Err(Exit::Usage.with_message(why)).hint("select one with --id ID")
        }
        (lines, Some(id)) => lines.iter().find(|line| line.id == id).ok_or_else(|| {
            Exit::NotFound
                .with_message(format!("the file does not contain dead letter {id}"))
                .into()
        }),
    }
}

/// The component with this digest, from any line of the file.
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
                    ", then the recording was cut"
                } else {
                    ""
                }
            ),
        ),
    ]))?;
    if calls {
        for (number, step) in record.steps.iter().enumerate() {
            let result = step
                .result
                .as_ref()
                .map_or_else(|| "no result".to_owned(), ToString::to_string);
            term::data(format!(
                "{:4} {}",
                number + 1,
                truncate(&step.call.to_string())
            ))?;
            term::data(format!("     -> {}", truncate(&result)))?;
        }
    }
    for line in report.logs.lines() {
        term::data(format!("  | {}", visible(line)))?;
    }
    if record.warm && report.outcome == ReplayOutcome::Diverged {
        term::warning(
            "the instance had handled other messages before (isolation = \"batch\"), \
             which a replay does not repeat",
        );
    }
    match (&report.divergence, report.outcome) {
        (Some(divergence), _) => term::data(term::details([
            (
                "diverges at",
                divergence
                    .call
                    .map_or("the log".to_owned(), |call| format!("call {call}")),
            ),
            ("expected", truncate(&divergence.expected)),
            ("actual", truncate(&divergence.actual)),
        ])),
        (None, ReplayOutcome::Truncated) => term::data(format!(
            "reproduced: {}, up to where the recording was cut",
            count(report.calls, "call")
        )),
        (None, _) => term::data(format!(
            "reproduced: {} and the failure",
            count(report.calls, "call")
        )),
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// A text on one line, truncated for a terminal.
fn truncate(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    let text = visible(text);
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
            .with_message("the recording was cut before the failure")
            .into()),
        (ReplayOutcome::Diverged, divergence) => {
            let call = divergence.as_ref().and_then(|divergence| divergence.call);
            let place = call.map_or("in the log".to_owned(), |call| format!("at call {call}"));
            Err(Exit::Diverged
                .with_message(format!("the replay diverges from the recording {place}"))
                .into())
        }
    }
}
