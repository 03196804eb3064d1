//! `oncely skip`: messages of a worker's backlog that it will not handle.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::operate;
use super::term::{self, Progress, Table};
use crate::api::operate::{SkipPlanRequest, SkipRequest};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::runtime::{SkipPlan, SkipTarget, SkippedPart};

/// How long messages in flight may take. Later ones are not skipped, whatever their state.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// How many ranges of skipped sequences are shown.
const RANGES_SHOWN: usize = 20;

/// Skip messages of a worker's backlog: they are never handled.
///
/// The plan is shown first. The worker is paused, and stays paused afterwards. Messages that were
/// handled, dead-lettered or are in flight are not skipped. The sequences of the skipped ones are
/// recorded, see `oncely activity`.
#[derive(Debug, Args)]
pub struct Skip {
    /// Skip messages of this worker.
    worker: String,
    /// Skip messages up to this sequence of the stream, inclusive.
    #[arg(long, value_name = "SEQUENCE")]
    to: Option<u64>,
    /// Skip messages stored before a time: a duration ago (2h), a time (2026-01-31T12:00:00Z), or a
    /// time of today in UTC (12:00).
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
    /// Skip all messages that are on the stream now.
    #[arg(long)]
    all: bool,
    /// Show the plan without executing it.
    #[arg(long)]
    dry_run: bool,
    /// Skip the confirmation prompt.
    #[arg(long)]
    yes: bool,
    /// Record this note as the reason.
    #[arg(long)]
    note: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    units::parse_time(text, Timestamp::now())
}

/// The skipped messages.
#[derive(Debug, Default, Serialize)]
struct SkipSummary {
    worker: String,
    stream: String,
    skipped: u64,
    /// Handled, dead-lettered or skipped before.
    settled: u64,
    /// The skipped sequences, as ranges of the first and the last one.
    sequences: Vec<(u64, u64)>,
}

impl Skip {
    pub async fn run(self) -> Result<()> {
        // Plan.
        let target = self.target()?;
        let client = Client::find(&self.host)?;
        let path = format!("/workers/{}/skip/plan", self.worker);
        let plan: SkipPlan = client.post(&path, &SkipPlanRequest { target }).await?;
        if self.dry_run && self.json {
            return term::json(&plan);
        }
        if !self.json {
            show_plan(&plan)?;
        }
        if self.dry_run {
            return term::data("nothing was changed; run without --dry-run to skip them");
        }
        if plan.sample.is_empty() && plan.messages_max == 0 {
            term::note("no messages to skip");
            return Ok(());
        }
        let question = format!(
            "Skip at most {} messages of {}? They are never handled by {}.",
            plan.messages_max, plan.stream, plan.worker
        );
        if !self.yes && !term::confirm(&question) {
            return Err(Exit::Usage.with_message(format!(
                "refusing to skip {} messages without confirmation",
                plan.messages_max
            )))
            .hint("confirm with --yes");
        }

        // Pause, let the messages in flight end, and skip the others.
        if plan.pause.is_none() {
            let note = self
                .note
                .clone()
                .unwrap_or_else(|| "oncely skip".to_owned());
            operate::pause(&client, &self.worker, Some(note)).await?;
        }
        operate::until_paused(&client, &self.worker).await?;
        operate::until_idle(&client, &self.worker, DRAIN_TIMEOUT).await?;
        let summary = self.skip(&client, plan).await?;
        if self.json {
            return term::json(&summary);
        }
        term::data(summary.to_text())?;
        term::note(format!(
            "worker {} is paused; resume it with: oncely resume {}",
            self.worker, self.worker
        ));
        Ok(())
    }

    fn target(&self) -> Result<SkipTarget> {
        match (self.to, self.until, self.all) {
            (Some(sequence), None, false) => Ok(SkipTarget::To(sequence)),
            (None, Some(time), false) => Ok(SkipTarget::Until(time)),
            (None, None, true) => Ok(SkipTarget::All),
            _ => {
                Err(Exit::Usage
                    .with_message("select the messages by one of --to, --until and --all"))
                .hint(format!("oncely skip {} --all --dry-run", self.worker))
            }
        }
    }

    /// Skips the messages of a plan, part by part. Each part is recorded when it is done.
    async fn skip(&self, client: &Client, plan: SkipPlan) -> Result<SkipSummary> {
        let path = format!("/workers/{}/skip", self.worker);
        let mut summary = SkipSummary {
            worker: plan.worker.clone(),
            stream: plan.stream.clone(),
            ..SkipSummary::default()
        };
        let mut progress = Progress::bar("skip", plan.messages_max);
        let mut request = SkipRequest {
            from: plan.from,
            plan,
            note: self.note.clone(),
        };
        loop {
            let part: SkippedPart = client.post(&path, &request).await?;
            summary.skipped += part.skipped.skipped;
            summary.settled += part.skipped.settled;
            summary.add_ranges(part.skipped.sequences);
            progress.set(summary.skipped + summary.settled);
            match part.next {
                Some(next) => request.from = next,
                None => break,
            }
        }
        progress.finish(&format!("{} messages", summary.skipped));
        Ok(summary)
    }
}

impl SkipSummary {
    /// Appends ranges, and joins adjacent ones.
    fn add_ranges(&mut self, ranges: Vec<(u64, u64)>) {
        for (first, last) in ranges {
            match self.sequences.last_mut() {
                Some((_, end)) if *end + 1 == first => *end = last,
                _ => self.sequences.push((first, last)),
            }
        }
    }

    fn to_text(&self) -> String {
        let mut text = format!(
            "skipped: {}; settled before: {}",
            self.skipped, self.settled
        );
        if !self.sequences.is_empty() {
            let shown = self.sequences.iter().take(RANGES_SHOWN);
            let shown: Vec<String> = shown
                .map(|(first, last)| match first == last {
                    true => first.to_string(),
                    false => format!("{first}-{last}"),
                })
                .collect();
            text.push_str(&format!(
                "; sequences of {}: {}",
                self.stream,
                shown.join(", ")
            ));
            if self.sequences.len() > RANGES_SHOWN {
                text.push_str(", …");
            }
        }
        text
    }
}

fn show_plan(plan: &SkipPlan) -> Result<()> {
    let subjects = match plan.subjects.is_empty() {
        true => "all".to_owned(),
        false => plan.subjects.join(" "),
    };
    let pause = match &plan.pause {
        Some(pause) => pause.to_string(),
        None => "it will be paused".to_owned(),
    };
    term::data(term::details([
        ("worker", plan.worker.clone()),
        ("pause", pause),
        ("stream", plan.stream.clone()),
        ("subjects", subjects),
        ("sequences", format!("{} to {}", plan.from, plan.to)),
        ("messages", format!("at most {}", plan.messages_max)),
    ]))?;
    if plan.sample.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["sequence", "stored at", "subject", "event id"]);
    for sample in &plan.sample {
        table.row([
            sample.sequence.to_string(),
            units::format_time(sample.stored_at),
            sample.subject.clone(),
            sample.event_id.clone(),
        ]);
    }
    term::data(format!("\n{table}").trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_parts_are_joined() {
        let mut summary = SkipSummary {
            stream: "IN".to_owned(),
            skipped: 7,
            ..SkipSummary::default()
        };
        summary.add_ranges(vec![(1, 3)]);
        summary.add_ranges(vec![(4, 5), (9, 9)]);
        assert_eq!(summary.sequences, [(1, 5), (9, 9)]);
        assert_eq!(
            summary.to_text(),
            "skipped: 7; settled before: 0; sequences of IN: 1-5, 9"
        );
    }
}
