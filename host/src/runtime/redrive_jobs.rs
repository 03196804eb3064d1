//! Runs jobs that redrive many dead letters. Each host takes one at a time.
//!
//! A job belongs to the host that has leased it. When that host dies, another one continues ten
//! seconds later, exactly where the last transaction ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Host;
use crate::dlq::dry_run::{self, Preconditions};
use crate::drain::Stopping;
use crate::model::retry::LastError;
use crate::store::conflict::pause_after;
use crate::store::{JobItem, OutboxRow, RedriveJob, StoreError};

/// How often a host polls for jobs created on other hosts.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of dead letters of a chunk, and of one that includes a dry run.
const CHUNK_SIZE_MAX: u32 = 100;
const PLAN_CHUNK_SIZE_MAX: u32 = 20;

/// Chunks per second of a job with a limited rate.
const CHUNKS_PER_SECOND: u32 = 10;

/// How often the lease of a job is renewed during a dry run. It lasts ten seconds.
const LEASE_RENEW_INTERVAL: Duration = Duration::from_secs(3);

/// Maximum number of retries of a chunk at once after conflicts.
const CONFLICTS_MAX: u32 = 5;

/// Runs jobs until the host stops.
pub(super) async fn run(host: Arc<Host>, stopping: Stopping) {
    let runner = i64::from_ne_bytes(rand::random());
    let mut trouble = LastError::default();
    loop {
        match run_next(&host, runner, &stopping).await {
            // There may be another job.
            Ok(true) => {
                trouble.clear();
                if stopping.is_stopping() {
                    return;
                }
                continue;
            }
            Ok(false) => trouble.clear(),
            Err(error) => {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!(error = why, "failed to run a job, retrying");
                }
            }
        }
        let mut stopping = stopping.clone();
        tokio::select! {
            biased;
            () = stopping.stopped() => return,
            () = host.jobs_changed.notified() => {}
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}

/// Runs the next job of this host until it ends, is paused or goes to another host. False if there
/// is none.
async fn run_next(host: &Host, runner: i64, stopping: &Stopping) -> Result<bool> {
    // While the database and NATS disagree, dead letters may be those of another time.
    if host.hold().is_some() {
        return Ok(false);
    }
    let leased = host.services.store.lease_redrive_job(runner).await?;
    let Some(job) = leased else {
        return Ok(false);
    };
    tracing::info!(job = job.id, dead_letters = job.total, "job running");
    let store = &host.services.store;
    match run_job(host, &job, runner, stopping).await {
        Ok(()) => {
            if let Some(job) = store.redrive_job(job.id).await? {
                let (state, redriven, refused) = (job.state.as_str(), job.redriven, job.refused);
                tracing::info!(job = job.id, state, redriven, refused, "job left");
            }
            Ok(true)
        }
        Err(error) => {
            // Shown with the job, if the database takes it.
            let _ = store
                .record_redrive_job_error(job.id, &format!("{error:#}"))
                .await;
            Err(error.context(format!("run job {}", job.id)))
        }
    }
}

async fn run_job(host: &Host, job: &RedriveJob, runner: i64, stopping: &Stopping) -> Result<()> {
    let mut due = Instant::now();
    loop {
        // Chunks at the rate of the job.
        let wait = due.saturating_duration_since(Instant::now());
        if stopping.wait(wait).await || host.hold().is_some() {
            return Ok(());
        }
        let size = chunk_size(job.rate);
        let items = host
            .services
            .store
            .open_redrive_job_items(job.id, size)
            .await?;
        let items = within_plan_limit(items);
        if items.is_empty() {
            return Ok(());
        }
        if job.rate > 0 {
            let count = u32::try_from(items.len()).unwrap_or(u32::MAX);
            let interval = Duration::from_secs(1) * count / job.rate;
            due = due.max(Instant::now()) + interval;
        }

        // Check those of a plan again, and redrive.
        let refusals = leased(host, job.id, runner, refusals(host, &items)).await?;
        let positions: Vec<u64> = items.iter().map(|item| item.position).collect();
        let since = Instant::now();
        let redriven = redrive(host, job.id, runner, &positions, &refusals).await?;
        let Some(outputs) = redriven else {
            return Ok(());
        };
        host.services.publish_outputs(outputs, since).await;
    }
}

/// Keeps the lease of a job during slow work.
async fn leased<T>(host: &Host, job: i64, runner: i64, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            // Without a renewal, the job goes to another host, and this chunk is not redriven.
            () = tokio::time::sleep(LEASE_RENEW_INTERVAL) => {
                let _ = host.services.store.renew_redrive_job(job, runner).await;
            }
        }
    }
}

fn chunk_size(rate: u32) -> u32 {
    match rate {
        0 => CHUNK_SIZE_MAX,
        rate => (rate / CHUNKS_PER_SECOND).clamp(1, CHUNK_SIZE_MAX),
    }
}

/// A dry run takes longer, so fewer of a plan are processed at once.
fn within_plan_limit(mut items: Vec<JobItem>) -> Vec<JobItem> {
    if items.iter().any(|item| item.preconditions.is_some()) {
        items.truncate(PLAN_CHUNK_SIZE_MAX as usize);
    }
    items
}

/// The dead letters whose plan does not hold any more, each with the reason.
async fn refusals(host: &Host, items: &[JobItem]) -> Result<HashMap<i64, String>> {
    let mut planned: Vec<(i64, Preconditions)> = Vec::new();
    for item in items {
        if let Some(text) = &item.preconditions {
            let preconditions = serde_json::from_str(text).context("read a plan")?;
            planned.push((item.id, preconditions));
        }
    }
    if planned.is_empty() {
        return Ok(HashMap::new());
    }
    let ids: Vec<i64> = planned.iter().map(|(id, _)| *id).collect();
    let current = dry_run::preview(&host.services, &ids).await?;
    let stale = planned.iter().filter_map(|(id, preconditions)| {
        let current = current.iter().find(|preview| preview.dead_letter == *id);
        let why = current.map_or_else(
            || Some("no such dead letter".to_owned()),
            |current| dry_run::stale_reason(preconditions, current),
        );
        why.map(|why| (*id, why))
    });
    Ok(stale.collect())
}

/// Redrives a chunk, and retries after conflicts.
async fn redrive(
    host: &Host,
    job: i64,
    runner: i64,
    positions: &[u64],
    refusals: &HashMap<i64, String>,
) -> Result<Option<Vec<OutboxRow>>> {
    let store = &host.services.store;
    let mut conflicts = 0;
    loop {
        match store
            .run_redrive_job(job, runner, positions, refusals)
            .await
        {
            Err(StoreError::Conflict(_)) if conflicts < CONFLICTS_MAX => {
                conflicts += 1;
                pause_after(conflicts).await;
            }
            result => return Ok(result?),
        }
    }
}
