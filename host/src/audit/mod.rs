//! `oncely audit`: compares the inbox, the outbox and the dead letters with the streams.
//!
//! All reads are pages over an index, or one pass over a stream, and the audit locks nothing. It
//! runs beside the hosts: messages above the ack floor, outputs that are not recorded as published,
//! and messages that left their stream are no difference.

use std::time::Duration;

use anyhow::{Result, anyhow};
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::manifest::Worker;
use crate::model::hint::WithHint as _;
use crate::model::schema::Time;
use crate::model::units;
use crate::services::Services;
use crate::store::PublishedOutput;

mod checkpoints;
mod dead_letters;
mod difference;
mod messages;
mod outputs;

pub use checkpoints::CheckpointCounts;
pub use dead_letters::DeadLetterCounts;
pub use difference::{Difference, Kind};
pub use messages::WorkerCounts;
pub use outputs::OutputCounts;

/// The number of rows or messages of one page.
const PAGE: usize = 20_000;

/// The most differences that a report lists.
const LISTED_MAX: usize = 1_000;

/// The time that rows are kept before a window begins: rows at its edge may be deleted meanwhile.
const EDGE: Duration = Duration::from_secs(60);

/// What to audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRequest {
    /// The beginning of the window.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// Only this worker's messages; all workers by default.
    #[serde(default)]
    pub worker: Option<String>,
    /// Whether to repair what can be repaired.
    #[serde(default)]
    pub repair: bool,
}

/// How long the rows that are audited are kept.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    /// Published outputs.
    pub outputs: Duration,
    /// Inbox records; `None` for ever.
    pub inbox: Option<Duration>,
    /// Leaves of checkpoints.
    pub receipts: Duration,
}

/// The result of an audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Audit {
    /// The beginning of the window of messages and dead letters, and that of outputs.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    #[schemars(with = "Time")]
    pub outputs_since: Timestamp,
    pub workers: Vec<WorkerCounts>,
    pub outputs: OutputCounts,
    pub dead_letters: DeadLetterCounts,
    /// `None` if receipts were never turned on.
    #[serde(default)]
    pub checkpoints: Option<CheckpointCounts>,
    /// The differences, at most 1,000.
    pub differences: Vec<Difference>,
    /// The number of all differences, and how many of them were repaired.
    pub total: u64,
    pub repaired: u64,
    /// The parts that were not checked, in words.
    pub notes: Vec<String>,
}

/// The differences and notes that the checks add.
#[derive(Debug, Default)]
struct Findings {
    differences: Vec<Difference>,
    total: u64,
    notes: Vec<String>,
}

impl Findings {
    fn add(&mut self, difference: Difference) {
        self.total += 1;
        if self.differences.len() < LISTED_MAX {
            self.differences.push(difference);
        }
    }

    fn extend(&mut self, differences: Vec<Difference>) {
        differences.into_iter().for_each(|one| self.add(one));
    }

    fn note(&mut self, text: String) {
        self.notes.push(text);
    }
}

/// Audits a window, and repairs what can be repaired if that is requested.
///
/// # Errors
/// The database or NATS failed.
pub async fn audit(services: &Services, request: &AuditRequest, kept: Kept) -> Result<Audit> {
    let now = Timestamp::now();
    let mut findings = Findings::default();
    let since = window(
        request.since,
        kept.inbox,
        "inbox records",
        now,
        &mut findings,
    );
    let outputs_since = window(
        request.since,
        Some(kept.outputs),
        "outputs",
        now,
        &mut findings,
    );

    // Messages, worker by worker.
    let mut workers = Vec::new();
    let deployed = services.deployed_workers().await?;
    if let Some(name) = &request.worker
        && !deployed.iter().any(|worker| worker.name == *name)
    {
        return Err(anyhow!("there is no worker `{name}`").hint("oncely workers"));
    }
    for worker in deployed {
        let is_wanted = request
            .worker
            .as_ref()
            .is_none_or(|name| *name == worker.name);
        let Worker {
            stream: Some(stream),
            ..
        } = &worker
        else {
            continue;
        };
        if is_wanted {
            workers.push(messages::check(services, &worker, stream, since, &mut findings).await?);
        }
    }

    // Outputs, then dead letters.
    let (outputs, lost) = outputs::check(services, outputs_since, &mut findings).await?;
    let (dead_letters, missing) = dead_letters::check(services, since, now, &mut findings).await?;

    // Checkpoints and the rows that they cover.
    let checkpoints = checkpoints::check(services, request.since, kept, &mut findings).await?;

    // Repairs.
    let mut repaired = 0;
    if request.repair {
        repaired += republish(services, &lost, &mut findings.differences).await?;
        for one in &missing {
            if dead_letters::resend(services, one).await? {
                repaired += 1;
                mark(
                    &mut findings.differences,
                    Kind::NoticeMissing,
                    |difference| difference.dead_letter == Some(one.id),
                );
            }
        }
    }
    Ok(Audit {
        since,
        outputs_since,
        workers,
        outputs,
        dead_letters,
        checkpoints,
        differences: findings.differences,
        total: findings.total,
        repaired,
        notes: findings.notes,
    })
}

/// The window for rows that are kept for a time.
fn window(
    since: Timestamp,
    kept: Option<Duration>,
    rows: &str,
    now: Timestamp,
    findings: &mut Findings,
) -> Timestamp {
    let Some(kept) = kept else { return since };
    let edge = SignedDuration::try_from(kept.saturating_sub(EDGE)).unwrap_or_default();
    let first = now - edge;
    if since >= first {
        return since;
    }
    findings.note(format!(
        "{rows} are kept for {}, so earlier ones are not checked",
        units::format_duration(kept)
    ));
    first
}

/// Publishes lost outputs again. Returns their number.
async fn republish(
    services: &Services,
    lost: &[PublishedOutput],
    differences: &mut [Difference],
) -> Result<u64> {
    let mut count = 0;
    for chunk in lost.chunks(PAGE) {
        let ids: Vec<&str> = chunk.iter().map(|output| output.id.as_str()).collect();
        services.store.delete_recovered(&ids).await?;
        count += services.store.republish(chunk).await?;
    }
    let numbers: std::collections::BTreeSet<i64> = lost.iter().map(|output| output.seq).collect();
    mark(differences, Kind::OutputLost, |difference| {
        difference
            .output
            .is_some_and(|number| numbers.contains(&number))
    });
    Ok(count)
}

fn mark(differences: &mut [Difference], kind: Kind, is_meant: impl Fn(&Difference) -> bool) {
    for difference in differences {
        if difference.kind == kind.as_str() && is_meant(difference) {
            difference.repaired = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_no_longer_than_the_rows_are_kept() {
        let now: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let ago = |minutes| now - SignedDuration::from_mins(minutes);
        let mut findings = Findings::default();
        let kept = Some(Duration::from_secs(15 * 60));
        assert_eq!(window(ago(60), None, "rows", now, &mut findings), ago(60));
        assert_eq!(window(ago(10), kept, "rows", now, &mut findings), ago(10));
        assert!(findings.notes.is_empty());

        // Rows at the edge may be deleted meanwhile.
        assert_eq!(window(ago(60), kept, "rows", now, &mut findings), ago(14));
        assert_eq!(findings.notes.len(), 1);
        let kept = Some(Duration::from_secs(1));
        assert_eq!(window(ago(60), kept, "rows", now, &mut findings), now);
    }

    #[test]
    fn a_report_lists_the_first_differences_and_counts_all() {
        let mut findings = Findings::default();
        for n in 0..LISTED_MAX + 5 {
            findings.add(Kind::OutputLost.found(n.to_string()));
        }
        assert_eq!(findings.differences.len(), LISTED_MAX);
        assert_eq!(findings.total, LISTED_MAX as u64 + 5);
    }
}
