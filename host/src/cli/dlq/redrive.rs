//! `oncely dlq redrive`: dead letters go back to their workers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};

use super::plan::Plan;
use super::select::{ActorArgs, Selection, check_none_refused};
use crate::api::dead_letters::{PlannedRedrive, RedrivePlanRequest, RedriveRequest};
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Progress};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::store::{
    self, DeadLetterActionResult, DeadLetterFilter, DeadLetterState, DeadLetterSummary,
};

/// The most letters in one request, and in one that rehearses them first.
const CHUNK_SIZE_MAX: u32 = 100;
const PLAN_CHUNK_SIZE_MAX: u32 = 20;

/// How often it looks what became of letters.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Puts dead letters back: to the worker that failed and to nobody else, under the same event id, so that an event that took
/// effect meanwhile is skipped. It goes in the order of the stream, and can be stopped and begun again.
#[derive(Debug, Args)]
pub struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Change nothing: run the deployment of now on the data of now, roll that back, and show what would have changed.
    #[arg(long)]
    dry_run: bool,
    /// Where to keep what a dry run found, as a plan for --plan.
    #[arg(long, value_name = "FILE", requires = "dry_run")]
    out: Option<PathBuf>,
    /// Put back what a plan says would succeed, as far as deployment and data are still what they were.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "ids", "all", "force"])]
    plan: Option<PathBuf>,
    /// At most so many in a second; 0 for as fast as it goes.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Also those that are under way or closed.
    #[arg(long)]
    force: bool,
    /// How long to wait for what becomes of them.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_duration)]
    wait: Duration,
    /// Why, for the record.
    #[arg(long)]
    note: Option<String>,
    #[command(flatten)]
    actor: ActorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Redrive {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        if let Some(path) = self.plan.clone() {
            return self.redrive_plan(&client, &path).await;
        }
        let dead_letters = self.selection.clone().find(&client, false).await?;
        if dead_letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        if self.dry_run {
            self.dry_run(&client, &dead_letters).await
        } else {
            self.redrive(&client, &dead_letters).await
        }
    }

    async fn dry_run(&self, client: &Client, dead_letters: &[DeadLetterSummary]) -> Result<()> {
        let plan = Plan::create(client, dead_letters).await?;
        if let Some(path) = &self.out {
            plan.write(path)?;
            term::note(format!(
                "put back what would succeed with: oncely dlq redrive --plan {}",
                path.display()
            ));
        }
        if self.json {
            term::json(&plan)
        } else {
            plan.show()
        }
    }

    async fn redrive(self, client: &Client, dead_letters: &[DeadLetterSummary]) -> Result<()> {
        let started_at = Timestamp::now();
        let again = self.force;
        let wanted: Vec<store::Redrive> = dead_letters
            .iter()
            .map(|dead_letter| store::Redrive {
                id: dead_letter.id,
                generation: None,
                again,
            })
            .collect();
        let by = self.actor.clone().with_note(self.note.clone());
        let throttle = Throttle::new(self.rate, CHUNK_SIZE_MAX);
        let (moved, is_complete) = throttle
            .send(&wanted, async |dead_letters: &[store::Redrive]| {
                let request = RedriveRequest {
                    dead_letters: dead_letters.to_vec(),
                    by: by.clone(),
                };
                client
                    .post::<_, Vec<DeadLetterActionResult>>("/dead-letters/redrive", &request)
                    .await
            })
            .await?;
        if !is_complete {
            let hint = format!(
                "go on with the same command and --until {started_at}, which leaves out what died again since"
            );
            return Err(interrupted(&moved, wanted.len())).hint(hint);
        }
        self.report_results(client, &moved).await
    }

    async fn redrive_plan(self, client: &Client, path: &Path) -> Result<()> {
        let plan = Plan::read(path)?;
        let planned = |preview: &crate::dlq::dry_run::Preview| PlannedRedrive {
            id: preview.dead_letter,
            preconditions: preview.preconditions.clone(),
        };
        let wanted: Vec<PlannedRedrive> = plan.would_succeed().map(planned).collect();
        term::note(format!(
            "{} of {} dead letters of the plan would succeed",
            wanted.len(),
            plan.dead_letters.len()
        ));
        let by = self.actor.clone().with_note(self.note.clone());
        let throttle = Throttle::new(self.rate, PLAN_CHUNK_SIZE_MAX);
        let (moved, is_complete) = throttle
            .send(&wanted, async |dead_letters: &[PlannedRedrive]| {
                let request = RedrivePlanRequest {
                    dead_letters: dead_letters.to_vec(),
                    by: by.clone(),
                };
                client
                    .post::<_, Vec<DeadLetterActionResult>>("/dead-letters/redrive-plan", &request)
                    .await
            })
            .await?;
        if !is_complete {
            let hint = "go on with a new plan: oncely dlq redrive --all --dry-run --out plan.json";
            return Err(interrupted(&moved, wanted.len())).hint(hint);
        }
        self.report_results(client, &moved).await
    }

    /// Waits for what becomes of the letters, and tells.
    async fn report_results(
        &self,
        client: &Client,
        moved: &[DeadLetterActionResult],
    ) -> Result<()> {
        // Of all that have something in common, those that took effect since are no failure: nobody asked for them by name.
        let (already_succeeded, moved): (Vec<DeadLetterActionResult>, Vec<DeadLetterActionResult>) =
            moved
                .iter()
                .cloned()
                .partition(|moved| moved.took_effect && !self.selection.is_by_id());
        let mut summary = RedriveSummary::wait(client, &moved, self.wait).await?;
        summary.already_succeeded = already_succeeded.len();
        if self.json {
            term::json(&summary)?;
        } else {
            term::data(summary.to_line())?;
        }
        check_none_refused(&moved, "redriven")
    }
}

fn interrupted(moved: &[DeadLetterActionResult], wanted: usize) -> anyhow::Error {
    let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
    anyhow!("stopped after {count} of {wanted} dead letters")
}

/// So many letters at a time, and how long from one time to the next.
struct Throttle {
    chunk: usize,
    interval: Duration,
}

impl Throttle {
    /// For so many letters in a second; 0 for as fast as it goes.
    fn new(rate: u32, chunk_max: u32) -> Throttle {
        let chunk = if rate == 0 {
            chunk_max
        } else {
            (rate / 10).clamp(1, chunk_max)
        };
        let interval = if rate == 0 {
            Duration::from_nanos(1)
        } else {
            Duration::from_secs(1).mul_f64(f64::from(chunk) / f64::from(rate))
        };
        Throttle {
            chunk: chunk as usize,
            interval,
        }
    }

    /// Sends letters at this pace until all are sent or Ctrl-C is pressed: then false. What was sent is sent.
    async fn send<T>(
        &self,
        dead_letters: &[T],
        send: impl AsyncFn(&[T]) -> Result<Vec<DeadLetterActionResult>>,
    ) -> Result<(Vec<DeadLetterActionResult>, bool)> {
        let mut tick = tokio::time::interval(self.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut progress = Progress::bar("redrive", dead_letters.len() as u64);
        let mut moved: Vec<DeadLetterActionResult> = Vec::new();
        let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
        for chunk in dead_letters.chunks(self.chunk) {
            tokio::select! {
                biased;
                _ = &mut stop => return Ok((moved, false)),
                _ = tick.tick() => {}
            }
            moved.extend(send(chunk).await?);
            progress.set(moved.len() as u64);
        }
        let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
        progress.finish(&format!("{count} of {}", dead_letters.len()));
        Ok((moved, true))
    }
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct RedriveSummary {
    redriven: usize,
    succeeded: usize,
    failed_again: usize,
    pending: usize,
    /// Not put back, as they had taken effect by then.
    already_succeeded: usize,
    refused: Vec<DeadLetterActionResult>,
}

impl RedriveSummary {
    /// Looks until all letters are settled, the time is over, or Ctrl-C is pressed.
    async fn wait(
        client: &Client,
        moved: &[DeadLetterActionResult],
        wait: Duration,
    ) -> Result<RedriveSummary> {
        let ids: Vec<i64> = moved
            .iter()
            .filter(|moved| moved.refused.is_none())
            .map(|moved| moved.id)
            .collect();
        let refused = moved
            .iter()
            .filter(|moved| moved.refused.is_some())
            .cloned()
            .collect();
        let mut summary = RedriveSummary {
            redriven: ids.len(),
            refused,
            ..RedriveSummary::default()
        };
        if ids.is_empty() {
            return Ok(summary);
        }
        let end = Instant::now() + wait;
        let mut progress = Progress::bar("wait for results", ids.len() as u64);
        let filter = DeadLetterFilter {
            ids,
            closed: true,
            limit: u32::MAX,
            ..DeadLetterFilter::default()
        };
        let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            let dead_letters: Vec<DeadLetterSummary> =
                client.post("/dead-letters/find", &filter).await?;
            let count = |state: DeadLetterState| {
                dead_letters
                    .iter()
                    .filter(|dead_letter| dead_letter.state == state)
                    .count()
            };
            summary.succeeded = count(DeadLetterState::Done);
            summary.failed_again = count(DeadLetterState::Open);
            summary.pending = count(DeadLetterState::Redriven);
            progress.set((dead_letters.len() - summary.pending) as u64);
            if summary.pending == 0 || Instant::now() >= end {
                return Ok(summary);
            }
            tokio::select! {
                _ = &mut stop => return Ok(summary),
                // Not so often when there are many.
                () = tokio::time::sleep(POLL_INTERVAL * (1 + summary.redriven as u32 / 500)) => {}
            }
        }
    }

    fn to_line(&self) -> String {
        let mut line = format!("redriven: {}; succeeded: {}", self.redriven, self.succeeded);
        let counts = [
            (self.failed_again, "failed again"),
            (self.pending, "pending"),
            (self.already_succeeded, "already succeeded"),
        ];
        for (count, label) in counts {
            if count > 0 {
                line.push_str(&format!("; {label}: {count}"));
            }
        }
        line
    }
}
