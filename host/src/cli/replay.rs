//! `oncely replay`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::exit::Exit;
use super::term;
use crate::component;
use crate::dlq::replay::{self, CameTo, Replayable, Report};
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
    letter: Option<i64>,
    /// Run this component in place of the one that failed: where does it depart?
    #[arg(long, value_name = "FILE")]
    component: Option<PathBuf>,
    /// Also show everything the handler asked and saw.
    #[arg(long, conflicts_with = "json")]
    steps: bool,
    /// Print JSON, with everything the handler asked and saw.
    #[arg(long)]
    json: bool,
}

/// What a replay reads of a line of the file.
#[derive(Debug, Deserialize)]
struct Line {
    id: i64,
    event_id: String,
    replay: Option<Attempt>,
}

/// What an export adds to a letter.
#[derive(Debug, Serialize, Deserialize)]
pub struct Attempt {
    #[serde(flatten)]
    pub attempt: Replayable,
    /// The component; none when it stands in an earlier line of the file, or was left out.
    pub component: Option<Wasm>,
}

/// A component in Base64.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Wasm(#[serde(with = "base64_text")] pub Vec<u8>);

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Printed<'r> {
    letter: i64,
    #[serde(flatten)]
    report: &'r Report,
    record: &'r [Step],
}

impl Replay {
    pub async fn run(self) -> Result<()> {
        let lines = read(&self.file)?;
        let line = choose(&lines, self.letter)?;
        let Some(found) = &line.replay else {
            let why = format!("there is no record of an attempt at dead letter {}", line.id);
            return Err(Exit::NotFound.because(why)).hint(
                "letters that never reached their handler have none, nor have closed ones: see docs/dead-letters.md",
            );
        };
        let recorded = component_in(&lines, &found.attempt.digest);
        let wasm = match (&self.component, recorded) {
            (Some(path), _) => component::read(path)?,
            (None, Some(wasm)) => wasm.to_vec(),
            (None, None) => {
                return Err(Exit::Usage.because("the file does not hold the component"))
                    .hint("give the component that failed with --component FILE, or export without --no-component");
            }
        };
        let is_changed = hex::encode(Sha256::digest(&wasm)) != found.attempt.digest;
        let cache = tempfile::tempdir().context("make a folder")?;
        let report = replay::replay(&found.attempt, &line.event_id, wasm.into(), is_changed, cache.path()).await?;
        if self.json {
            term::json(&Printed { letter: line.id, report: &report, record: &found.attempt.record.steps })?;
        } else {
            show(line, &found.attempt, &report, self.steps)?;
        }
        ended(&report)
    }
}

fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| Exit::Usage.because(format!("read {}", path.display())))
        .hint("write such a file with: oncely dlq export ID --out FILE")?;
    let line = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| {
                Exit::Usage.because(format!("line {} of {} is no exported letter", number + 1, path.display()))
            })
            .hint("write such a file with: oncely dlq export ID --out FILE")
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

fn choose(lines: &[Line], letter: Option<i64>) -> Result<&Line> {
    match (lines, letter) {
        ([only], None) => Ok(only),
        ([], _) => Err(Exit::Usage.because("the file holds no letter").into()),
        (lines, None) => {
            let ids: Vec<String> = lines.iter().take(20).map(|line| line.id.to_string()).collect();
            let why = format!("the file holds {} letters: {}", lines.len(), ids.join(", "));
            Err(Exit::Usage.because(why)).hint("say which one with --letter ID")
        }
        (lines, Some(id)) => lines
            .iter()
            .find(|line| line.id == id)
            .ok_or_else(|| Exit::NotFound.because(format!("the file does not hold dead letter {id}")).into()),
    }
}

/// The component with this digest, on whichever line it stands.
fn component_in<'l>(lines: &'l [Line], digest: &str) -> Option<&'l [u8]> {
    let attempts = lines.iter().filter_map(|line| line.replay.as_ref());
    attempts
        .filter(|found| found.attempt.digest == digest)
        .find_map(|found| found.component.as_ref())
        .map(|wasm| wasm.0.as_slice())
}

fn show(line: &Line, attempt: &Replayable, report: &Report, steps: bool) -> Result<()> {
    let record = &attempt.record;
    let failure = record.failure.as_ref();
    term::data(term::details([
        ("dead letter", line.id.to_string()),
        ("event id", line.event_id.clone()),
        ("worker", format!("{} version {}", attempt.manifest.name, attempt.version)),
        ("attempt", format!("{} at {}", record.attempt, units::show_time(record.now))),
        ("failed with", failure.map(|failure| failure.message.clone()).unwrap_or_default()),
        (
            "asked",
            format!(
                "{}{}",
                count(record.steps.len(), "time"),
                if record.cut { ", then the record was cut" } else { "" }
            ),
        ),
    ]))?;
    if steps {
        for (number, step) in record.steps.iter().enumerate() {
            let saw = step.saw.as_ref().map_or_else(|| "no answer".to_owned(), ToString::to_string);
            term::data(format!("{:4} {}", number + 1, short(&step.asked.to_string())))?;
            term::data(format!("     -> {}", short(&saw)))?;
        }
    }
    for line in report.logs.lines() {
        term::data(format!("  | {}", term::visible(line)))?;
    }
    if record.warm && report.outcome == CameTo::Departed {
        term::warning(
            "the instance had handled other messages before (isolation = \"batch\"), of which a replay knows nothing",
        );
    }
    match (&report.departure, report.outcome) {
        (Some(departure), _) => term::data(term::details([
            ("departs at", departure.step.map_or("its log".to_owned(), |step| format!("call {step}"))),
            ("expected", short(&departure.expected)),
            ("instead", short(&departure.instead)),
        ])),
        (None, CameTo::Cut) => {
            term::data(format!("the same for {}; there the record was cut", count(report.steps, "call")))
        }
        (None, _) => term::data(format!("the same: {}, and the failure", count(report.steps, "call"))),
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// One line that a terminal can hold.
fn short(text: &str) -> String {
    const SHOWN_MAX: usize = 300;
    let text = term::visible(text);
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{} … ({} bytes)", text.get(..end).unwrap_or_default(), text.len()),
        None => text,
    }
}

fn ended(report: &Report) -> Result<()> {
    match (report.outcome, &report.departure) {
        (CameTo::Same, _) => Ok(()),
        (CameTo::Cut, _) => Err(Exit::Cut.because("the record was cut before the failure").into()),
        (CameTo::Departed, departure) => {
            let step = departure.as_ref().and_then(|departure| departure.step);
            let place = step.map_or("in its log".to_owned(), |step| format!("at call {step}"));
            Err(Exit::Departed.because(format!("the replay departs from the record {place}")).into())
        }
    }
}
