//! `oncely audit`: compares the database with the streams.

use anyhow::{Result, anyhow};
use clap::Args;
use jiff::Timestamp;

use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::term::{self, Table};
use crate::audit::{Audit as Report, AuditRequest, Difference, WorkerCounts};
use crate::model::hint::WithHint as _;
use crate::model::units;
use crate::model::visible::visible;

/// Check that each message has one outcome, and each output and dead letter is on its stream.
///
/// It compares the inbox, the outbox and the dead letters of a time with the streams, and names
/// each difference. It runs while hosts work.
#[derive(Debug, Args)]
pub struct Audit {
    /// Begin at this time: a duration before now, or a time such as 2026-01-31T12:00:00Z.
    #[arg(long, default_value = "1h", value_name = "TIME")]
    since: String,
    /// Check the messages of this worker only.
    #[arg(long, value_name = "WORKER")]
    worker: Option<String>,
    /// Publish lost outputs and missing notices again.
    #[arg(long)]
    repair: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Audit {
    pub async fn run(self) -> Result<()> {
        let since = units::parse_time(&self.since, Timestamp::now())
            .map_err(|why| anyhow!(Exit::Usage.with_message(format!("--since: {why}"))))
            .hint("--since 1h, or --since 2026-01-31T12:00:00Z")?;
        let request = AuditRequest {
            since,
            worker: self.worker,
            repair: self.repair,
        };
        let report: Report = Client::find(&self.host)?.post("/audit", &request).await?;
        if self.json {
            term::json(&report)?;
        } else {
            show(&report)?;
        }
        let left = report.total.saturating_sub(report.repaired);
        if left > 0 {
            let message = format!("{left} differences, {} repaired", report.repaired);
            return Err(Exit::Findings.with_message(message).into());
        }
        Ok(())
    }
}

fn show(report: &Report) -> Result<()> {
    let mut table = Table::new(&[
        "worker",
        "stream",
        "messages",
        "done",
        "duplicates",
        "dead",
        "no events",
        "pending",
    ]);
    report
        .workers
        .iter()
        .map(row)
        .for_each(|row| table.row(row));
    if !table.is_empty() {
        term::data(format!("{table}"))?;
    }
    let (outputs, dead) = (&report.outputs, &report.dead_letters);
    term::data(term::details([
        ("since", units::format_time(report.since)),
        ("outputs since", units::format_time(report.outputs_since)),
        (
            "outputs",
            format!(
                "{} published, {} found, {} removed from their stream",
                outputs.published, outputs.found, outputs.removed
            ),
        ),
        (
            "dead letters",
            format!(
                "{}, notices: {} found, {} unpublished, {} removed from their stream",
                dead.dead_letters, dead.notices, dead.unpublished, dead.removed
            ),
        ),
        (
            "checkpoints",
            report.checkpoints.as_ref().map_or_else(
                || "none: receipts are off".to_owned(),
                |counts| {
                    format!(
                        "{} with {} leaves, {} rows compared, {} published copies compared",
                        counts.checkpoints, counts.leaves, counts.rows, counts.published
                    )
                },
            ),
        ),
        (
            "differences",
            format!("{}, {} repaired", report.total, report.repaired),
        ),
    ]))?;
    report.notes.iter().for_each(term::note);
    report.differences.iter().try_for_each(show_difference)?;
    let hidden = report.total.saturating_sub(report.differences.len() as u64);
    if hidden > 0 {
        term::note(format!("{hidden} more differences are not listed"));
    }
    Ok(())
}

fn row(counts: &WorkerCounts) -> Vec<String> {
    let numbers = [
        counts.messages,
        counts.done,
        counts.duplicates,
        counts.dead,
        counts.no_events,
        counts.pending,
    ];
    let names = [counts.worker.clone(), counts.stream.clone()];
    names
        .into_iter()
        .chain(numbers.map(|number| number.to_string()))
        .collect()
}

fn show_difference(difference: &Difference) -> Result<()> {
    let Difference {
        kind,
        found,
        action,
        ..
    } = difference;
    let (found, action) = (visible(found), visible(action));
    let rest = if difference.repaired {
        "repaired".to_owned()
    } else {
        format!("fix: {action}")
    };
    term::data(format!("\n{kind}: {found}\n  {rest}"))
}
