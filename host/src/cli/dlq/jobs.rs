//! `oncely dlq jobs`: redrives of many dead letters, which run on the hosts.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::api::jobs::{JobChange, JobItemsQuery, JobsQuery};
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Progress, Table};
use crate::model::units;
use crate::store::{DeadLetterActionResult, JobAction, JobItem, JobState, RedriveJob};

/// How often a job is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How many dead letters of a job one request reads.
const PAGE_SIZE: u32 = 5_000;

/// How many refused dead letters of a job are shown.
const REFUSED_SHOWN: usize = 50;

/// List the jobs that redrive dead letters, or show and change one.
///
/// A job runs on the hosts. It continues without the command that created it, and on another host
/// if its own one dies.
#[derive(Debug, Args)]
pub struct Jobs {
    #[command(subcommand)]
    command: Option<Command>,
    /// List at most this many.
    #[arg(long, default_value_t = 20)]
    limit: u32,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a job and its refused dead letters.
    Show(JobId),
    /// Follow a job until it ends.
    Follow(JobId),
    /// Pause a job after its current chunk.
    Pause(JobId),
    /// Resume a paused job.
    Resume(JobId),
    /// Cancel a job. Dead letters that it has redriven stay redriven.
    Cancel(JobId),
}

#[derive(Debug, Args)]
struct JobId {
    /// Select this job.
    id: i64,
}

impl Jobs {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        match &self.command {
            None => self.list(&client).await,
            Some(Command::Show(job)) => self.show(&client, job.id).await,
            Some(Command::Follow(job)) => {
                let job: RedriveJob = client.get(&path_of(job.id)).await?;
                match follow(&client, job).await? {
                    Some(job) => self.show(&client, job.id).await,
                    None => Ok(()),
                }
            }
            Some(Command::Pause(job)) => self.change(&client, job.id, JobAction::Pause).await,
            Some(Command::Resume(job)) => self.change(&client, job.id, JobAction::Resume).await,
            Some(Command::Cancel(job)) => self.change(&client, job.id, JobAction::Cancel).await,
        }
    }

    async fn list(&self, client: &Client) -> Result<()> {
        let query = JobsQuery { limit: self.limit };
        let jobs: Vec<RedriveJob> = client.get_with("/dead-letters/jobs", &query).await?;
        if self.json {
            return term::json(&jobs);
        }
        if jobs.is_empty() {
            term::note("no jobs");
            return Ok(());
        }
        let mut table = Table::new(&[
            "id",
            "state",
            "redriven",
            "refused",
            "total",
            "created at",
            "created by",
            "note",
        ]);
        for job in &jobs {
            table.row([
                job.id.to_string(),
                job.state.as_str().to_owned(),
                job.redriven.to_string(),
                job.refused.to_string(),
                job.total.to_string(),
                units::format_time(job.created_at),
                creator(job),
                job.note.clone().unwrap_or_default(),
            ]);
        }
        term::data(table.to_string().trim_end())
    }

    async fn show(&self, client: &Client, id: i64) -> Result<()> {
        let job: RedriveJob = client.get(&path_of(id)).await?;
        if self.json {
            return term::json(&job);
        }
        let rate = match job.rate {
            0 => "no limit".to_owned(),
            rate => format!("{rate} per second"),
        };
        let mut details = vec![
            ("job", job.id.to_string()),
            ("state", job.state.as_str().to_owned()),
            ("redriven", format!("{} of {}", job.redriven, job.total)),
            ("refused", job.refused.to_string()),
            ("rate", rate),
            ("created at", units::format_time(job.created_at)),
            ("created by", creator(&job)),
        ];
        let mut add = |name, value: Option<String>| details.extend(value.map(|text| (name, text)));
        add("note", job.note.clone());
        add("ended at", job.ended_at.map(units::format_time));
        add("last error", job.error.clone());
        term::data(term::details(details))?;
        if job.refused > 0 {
            let results = results(client, id).await?;
            let refused = results
                .iter()
                .filter_map(|result| Some((result.id, result.refused.as_deref()?)));
            let mut table = Table::new(&["dead letter", "refused because"]);
            for (id, why) in refused.take(REFUSED_SHOWN) {
                table.row([id.to_string(), why.to_owned()]);
            }
            term::data(format!("\n{table}").trim_end())?;
        }
        Ok(())
    }

    async fn change(&self, client: &Client, id: i64, action: JobAction) -> Result<()> {
        let path = format!("{}/change", path_of(id));
        let job: RedriveJob = client.post(&path, &JobChange { action }).await?;
        if self.json {
            return term::json(&job);
        }
        term::data(format!(
            "job {} is {} after {} of {} dead letters",
            job.id,
            job.state.as_str(),
            job.redriven + job.refused,
            job.total
        ))
    }
}

fn path_of(id: i64) -> String {
    format!("/dead-letters/jobs/{id}")
}

fn creator(job: &RedriveJob) -> String {
    match &job.stated_name {
        Some(stated_name) => format!("{} ({stated_name})", job.actor),
        None => job.actor.clone(),
    }
}

/// Follows a job until it ends or is paused. None after Ctrl-C: the job continues.
pub(super) async fn follow(client: &Client, mut job: RedriveJob) -> Result<Option<RedriveJob>> {
    let mut progress = Progress::bar("redrive", job.total);
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        progress.set(job.redriven + job.refused);
        progress.message(job.error.as_deref().unwrap_or_default());
        if job.state.is_final() || job.state == JobState::Paused {
            progress.finish(&format!("{} of {}", job.redriven, job.total));
            return Ok(Some(job));
        }
        tokio::select! {
            biased;
            _ = &mut stop => {
                progress.finish(&format!("{} of {} so far", job.redriven, job.total));
                term::note(format!(
                    "job {} continues on the hosts; show it with: oncely dlq jobs show {}; \
                     cancel it with: oncely dlq jobs cancel {}",
                    job.id, job.id, job.id
                ));
                return Ok(None);
            }
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
        job = client.get(&path_of(job.id)).await?;
    }
}

/// The results of the processed dead letters of a job.
pub(super) async fn results(client: &Client, id: i64) -> Result<Vec<DeadLetterActionResult>> {
    let mut results = Vec::new();
    let mut query = JobItemsQuery {
        from: 0,
        limit: PAGE_SIZE,
    };
    loop {
        let path = format!("{}/items", path_of(id));
        let items: Vec<JobItem> = client.get_with(&path, &query).await?;
        let is_last = items.len() < PAGE_SIZE as usize;
        query.from = items.last().map_or(0, |item| item.position + 1);
        results.extend(items.into_iter().filter_map(|item| item.result));
        if is_last {
            return Ok(results);
        }
    }
}
