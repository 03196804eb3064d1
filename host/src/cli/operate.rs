//! `oncely pause`, `oncely resume` and `oncely drain`.

use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use tokio::time::Instant;

use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::term;
use crate::api::WorkerOnHost;
use crate::api::operate::{PauseRequest, Resumed};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::runtime::{DrainStatus, RunState};
use crate::store::Pause as StoredPause;

/// How long hosts may take to apply a pause or its end.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How often hosts are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Pause a worker: no host takes messages or requests for it.
///
/// What runs is completed. The pause lasts until `oncely resume`, across restarts and deployments.
/// Requests to a paused worker get 503 with Retry-After.
#[derive(Debug, Args)]
pub struct Pause {
    /// Pause this worker.
    worker: String,
    /// Record this note as the reason.
    #[arg(long)]
    note: Option<String>,
    /// Skip the wait until the hosts have paused it.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Resume a paused worker on all hosts.
#[derive(Debug, Args)]
pub struct Resume {
    /// Resume this worker.
    worker: String,
    /// Skip the wait until the hosts run it.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// Drain a worker: pause it, and wait until its work is complete.
///
/// That is when nothing of it is in flight on any host, and its outputs are published. The worker
/// stays paused. Exit codes: 0 if it is drained, 7 if it is not after the timeout.
#[derive(Debug, Args)]
pub struct Drain {
    /// Drain this worker.
    worker: String,
    /// Wait at most this long.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = units::parse_duration)]
    timeout: Duration,
    /// Record this note as the reason.
    #[arg(long)]
    note: Option<String>,
    /// Print the final status as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Pause {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let worker = &self.worker;
        pause(&client, worker, self.note).await?;
        if self.no_wait {
            return term::data(format!("worker {worker} is paused; hosts are applying it"));
        }
        let status = until_paused(&client, worker).await?;
        let in_flight: usize = status.hosts.iter().filter_map(|host| host.in_flight).sum();
        term::data(format!(
            "worker {worker} is paused on {}",
            count_hosts(status.hosts.len())
        ))?;
        if in_flight > 0 {
            term::note(format!(
                "{in_flight} in flight; wait for them with: oncely drain {worker}"
            ));
        }
        Ok(())
    }
}

/// Pauses a worker, unless it is paused already.
pub(super) async fn pause(client: &Client, worker: &str, note: Option<String>) -> Result<()> {
    let request = PauseRequest { note };
    let path = format!("/workers/{worker}/pause");
    let _: StoredPause = client.post(&path, &request).await?;
    Ok(())
}

/// Waits until every live host has paused the worker.
pub(super) async fn until_paused(client: &Client, worker: &str) -> Result<DrainStatus> {
    let end = Instant::now() + APPLY_TIMEOUT;
    loop {
        let status = drain_status(client, worker).await?;
        let waiting: Vec<&str> = status
            .hosts
            .iter()
            .filter(|host| !host.is_paused)
            .map(|host| host.host.as_str())
            .collect();
        if !status.hosts.is_empty() && waiting.is_empty() {
            return Ok(status);
        }
        if Instant::now() >= end {
            return Err(anyhow!(
                "worker {worker} is paused, but not yet on {}",
                waiting.join(", ")
            ))
            .hint("oncely status");
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

async fn drain_status(client: &Client, worker: &str) -> Result<DrainStatus> {
    client.get(&format!("/workers/{worker}/drain")).await
}

fn count_hosts(hosts: usize) -> String {
    match hosts {
        1 => "1 host".to_owned(),
        hosts => format!("{hosts} hosts"),
    }
}

impl Resume {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let worker = &self.worker;
        let path = format!("/workers/{worker}/resume");
        let resumed: Resumed = client.post(&path, &()).await?;
        if !resumed.was_paused {
            term::note(format!("worker {worker} was not paused"));
        }
        if self.no_wait {
            return term::data(format!("worker {worker} is resumed; hosts are starting it"));
        }
        let end = Instant::now() + APPLY_TIMEOUT;
        loop {
            let hosts: Vec<WorkerOnHost> = client.get(&format!("/workers/{worker}/hosts")).await?;
            let waiting: Vec<String> = hosts.iter().filter_map(not_running).collect();
            if !hosts.is_empty() && waiting.is_empty() {
                return term::data(format!(
                    "worker {worker} is running on {}",
                    count_hosts(hosts.len())
                ));
            }
            if Instant::now() >= end {
                return Err(anyhow!("{}", waiting.join("; ")))
                    .map_err(|error| error.context("the worker is resumed, but does not run yet"))
                    .hint("oncely workers");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// The reason that a worker does not run on a host; none if it does.
fn not_running(on_host: &WorkerOnHost) -> Option<String> {
    match &on_host.status {
        Some(status) if status.state == RunState::Running && status.pause.is_none() => None,
        Some(status) => {
            let why = status.error.as_ref();
            let why = why.map_or_else(String::new, |why| format!(" ({why})"));
            Some(format!("{}: {}{why}", on_host.host, status.state))
        }
        None => Some(format!("{}: has not started it yet", on_host.host)),
    }
}

impl Drain {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let worker = &self.worker;
        pause(&client, worker, self.note).await?;
        let (is_drained, status) = until_drained(&client, worker, self.timeout).await?;
        if self.json {
            term::json(&status)?;
        }
        if is_drained {
            let hosts = count_hosts(status.hosts.len());
            if self.json {
                return Ok(());
            }
            return term::data(format!(
                "worker {worker} is drained: nothing is in flight on {hosts}, and all outputs are \
                 published"
            ));
        }
        let hint = match status.parked {
            0 => format!("wait longer: oncely drain {worker} --timeout 30m"),
            _ => format!("oncely outbox list --worker {worker}"),
        };
        Err(Exit::NotDrained.with_message(format!(
            "worker {worker} is not drained after {}: {}",
            units::format_duration(self.timeout),
            describe(&status)
        )))
        .hint(hint)
    }
}

/// Waits until a paused worker is drained, and shows the progress. False after the timeout.
async fn until_drained(
    client: &Client,
    worker: &str,
    timeout: Duration,
) -> Result<(bool, DrainStatus)> {
    let end = Instant::now() + timeout;
    let mut shown = String::new();
    loop {
        let status = drain_status(client, worker).await?;
        if status.is_drained {
            return Ok((true, status));
        }
        if status.pause.is_none() {
            return Err(anyhow!("worker {worker} was resumed meanwhile"))
                .hint(format!("oncely activity --worker {worker}"));
        }
        let progress = describe(&status);
        if progress != shown {
            term::note(format!("drain {worker}: {progress}"));
            shown = progress;
        }
        if Instant::now() >= end {
            return Ok((false, status));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits until a paused worker has nothing in flight on any host. After the timeout, a warning is
/// shown.
pub(super) async fn until_idle(client: &Client, worker: &str, timeout: Duration) -> Result<()> {
    let end = Instant::now() + timeout;
    loop {
        let status = drain_status(client, worker).await?;
        if status.hosts.iter().all(|host| host.is_drained) {
            return Ok(());
        }
        if Instant::now() >= end {
            term::warning(format!("messages stay in flight: {}", describe(&status)));
            return Ok(());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The work that is left, in words.
fn describe(status: &DrainStatus) -> String {
    let mut left: Vec<String> = Vec::new();
    for host in status.hosts.iter().filter(|host| !host.is_drained) {
        left.push(match (host.is_paused, host.in_flight) {
            (true, Some(in_flight)) => format!("{in_flight} in flight on {}", host.host),
            _ => format!("not yet paused on {}", host.host),
        });
    }
    if status.hosts.is_empty() {
        left.push("no host has reported yet".to_owned());
    }
    if status.unpublished > 0 {
        left.push(format!("{} outputs unpublished", status.unpublished));
    }
    if status.parked > 0 {
        left.push(format!("{} of them parked or blocked", status.parked));
    }
    match left.is_empty() {
        true => "waits for the next report".to_owned(),
        false => left.join(", "),
    }
}
