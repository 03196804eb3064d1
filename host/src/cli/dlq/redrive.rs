//! `oncely dlq redrive`: sends dead letters to their workers again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use super::jobs;
use super::plan::Plan;
use super::select::{ActorArgs, Selection, check_none_refused};
use crate::api::dead_letters::{PlannedRedrive, RedriveRequest};
use crate::api::jobs::JobRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Progress};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::runtime::WorkerState;
use crate::store::{
    self, DeadLetterActionResult, DeadLetterFilter, DeadLetterState, DeadLetterSummary, JobState,
    RedriveJob,
};

/// How often the states of redriven dead letters are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Redrive dead letters: send them to the worker that failed.
///
/// No other worker receives them. The event ids stay the same, so an event that took effect
/// meanwhile is skipped. Dead letters are redriven in the order of their streams. Several are
/// redriven by a job of the hosts, which continues when this command is interrupted.
#[derive(Debug, Args)]
pub struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Run the active deployment against current data, roll it back, and show the changes.
    #[arg(long)]
    dry_run: bool,
    /// Write the results of the dry run to this file, as a plan for --plan.
    #[arg(long, value_name = "FILE", requires = "dry_run")]
    out: Option<PathBuf>,
    /// Redrive the dead letters that would succeed according to this plan.
    ///
    /// Those whose deployment or data changed since are refused.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "ids", "all", "force"])]
    plan: Option<PathBuf>,
    /// Redrive at most this many per second; 0 for no limit.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Include dead letters that are in progress or closed.
    #[arg(long)]
    force: bool,
    /// Return once the job is created.
    #[arg(long, conflicts_with_all = ["dry_run", "wait"])]
    detach: bool,
    /// Wait this long for the results.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_duration)]
    wait: Duration,
    /// Record this note as the reason.
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
                "redrive those that would succeed with: oncely dlq redrive --plan {}",
                path.display()
            ));
        }
        if self.json {
            term::json(&plan)
        } else {
            plan.show()
        }
    }

    /// Redrives one dead letter at once, and several as a job.
    async fn redrive(self, client: &Client, dead_letters: &[DeadLetterSummary]) -> Result<()> {
        let ids: Vec<i64> = dead_letters.iter().map(|one| one.id).collect();
        let by = self.actor.clone().with_note(self.note.clone());
        if let ([id], false) = (ids.as_slice(), self.detach) {
            let redrive = store::Redrive {
                id: *id,
                generation: None,
                again: self.force,
            };
            let request = RedriveRequest {
                dead_letters: vec![redrive],
                by,
            };
            let results: Vec<DeadLetterActionResult> =
                client.post("/dead-letters/redrive", &request).await?;
            return self.report_results(client, &results).await;
        }
        let request = JobRequest {
            ids,
            rate: self.rate,
            again: self.force,
            by,
            ..JobRequest::default()
        };
        self.run_job(client, &request).await
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
        if wanted.is_empty() {
            return self.report_results(client, &[]).await;
        }
        let request = JobRequest {
            plan: wanted,
            rate: self.rate,
            by: self.actor.clone().with_note(self.note.clone()),
            ..JobRequest::default()
        };
        self.run_job(client, &request).await
    }

    /// Creates a job, follows it, and reports its results. The job continues without this command.
    async fn run_job(&self, client: &Client, request: &JobRequest) -> Result<()> {
        let job: RedriveJob = client.post("/dead-letters/jobs", request).await?;
        if self.detach {
            return match self.json {
                true => term::json(&job),
                false => term::data(format!(
                    "job {} redrives {} dead letters; show it with: oncely dlq jobs show {}",
                    job.id, job.total, job.id
                )),
            };
        }
        let Some(job) = jobs::follow(client, job).await? else {
            return Ok(());
        };
        let results = jobs::results(client, job.id).await?;
        self.report_results(client, &results).await?;
        match job.state {
            JobState::Done => Ok(()),
            state => Err(anyhow!(
                "job {} is {} after {} of {} dead letters",
                job.id,
                state.as_str(),
                job.redriven + job.refused,
                job.total
            ))
            .hint(format!("oncely dlq jobs show {}", job.id)),
        }
    }

    /// Waits for the results and prints them.
    async fn report_results(
        &self,
        client: &Client,
        results: &[DeadLetterActionResult],
    ) -> Result<()> {
        // Dead letters selected by a filter that took effect or were redriven meanwhile are no
        // failure. Those selected by id are.
        let by_filter = !self.selection.is_by_id();
        let mut results = results.to_vec();
        for result in results.iter_mut().filter(|result| result.in_progress) {
            // Its result is waited for like that of the others.
            result.refused.take_if(|_| by_filter);
        }
        let (already_succeeded, results): (Vec<_>, Vec<_>) = results
            .into_iter()
            .partition(|result| result.took_effect && by_filter);
        let mut summary = RedriveSummary::wait(client, &results, self.wait).await?;
        if summary.pending > 0 {
            note_paused_workers(client).await?;
        }
        summary.already_succeeded = already_succeeded.len();
        if self.json {
            term::json(&summary)?;
        } else {
            term::data(summary.to_line())?;
        }
        check_none_refused(&results, "redriven")
    }
}

/// Notes the paused workers, whose redriven dead letters stay pending.
async fn note_paused_workers(client: &Client) -> Result<()> {
    let workers: Vec<WorkerState> = client.get("/workers").await?;
    for paused in workers.iter().filter(|worker| worker.pause.is_some()) {
        let worker = &paused.worker;
        term::note(format!(
            "worker {worker} is paused and handles no redrives; resume it with: oncely resume \
             {worker}"
        ));
    }
    Ok(())
}

/// The results of a redrive.
#[derive(Debug, Default, Serialize)]
struct RedriveSummary {
    redriven: usize,
    succeeded: usize,
    failed_again: usize,
    pending: usize,
    /// Not redriven, since they had taken effect by then.
    already_succeeded: usize,
    refused: Vec<DeadLetterActionResult>,
}

impl RedriveSummary {
    /// Polls until no redrive is pending, the time is over, or Ctrl-C is pressed.
    async fn wait(
        client: &Client,
        results: &[DeadLetterActionResult],
        wait: Duration,
    ) -> Result<RedriveSummary> {
        let ids: Vec<i64> = results
            .iter()
            .filter(|result| result.refused.is_none())
            .map(|result| result.id)
            .collect();
        let refused = results
            .iter()
            .filter(|result| result.refused.is_some())
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

        // Poll the dead letters by their ids.
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
                // Less often when there are many.
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
