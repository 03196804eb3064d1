//! Follows a version until all hosts run it.

use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::time::Instant;

use super::client::Client;
use super::term;
use crate::api::{Activated, WorkerOnHost};
use crate::model::hint::WithHint;
use crate::runtime::RunState;

/// How long hosts may take, and how often they are polled.
const ROLLOUT_TIMEOUT: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How long the failure of a version that was active before may be from that time: a host that
/// cannot run a version tries again after a few seconds.
const STALE_FAILURE: Duration = Duration::from_secs(5);

/// After how long the pending hosts are shown.
const REPORT_AFTER: Duration = Duration::from_secs(2);

/// The state of a version on one host.
enum RolloutState {
    Running,
    Pending(String),
    Failed(String),
}

/// Waits until every live host runs the activated version, and prints the result. A version that
/// `was_active` may have failed before what made it run, such as a signature.
///
/// # Errors
/// A host cannot run the version.
pub async fn wait(
    client: &Client,
    activated: &Activated,
    was_active: bool,
    no_wait: bool,
) -> Result<()> {
    let Activated { worker, version } = activated;
    if no_wait {
        return term::data(format!(
            "worker {worker} version {version} is active; hosts are starting it"
        ));
    }
    let started_at = Instant::now();
    let mut last_reported = String::new();
    loop {
        let on_hosts: Vec<WorkerOnHost> = client.get(&format!("/workers/{worker}/hosts")).await?;
        let (mut running, mut pending, mut failed) = (0, Vec::new(), Vec::new());
        for on_host in &on_hosts {
            match rollout_state(on_host, *version) {
                RolloutState::Running => running += 1,
                RolloutState::Pending(why) => pending.push(format!("{} {why}", on_host.host)),
                RolloutState::Failed(_) if was_active && started_at.elapsed() < STALE_FAILURE => {
                    pending.push(format!("{} tries again", on_host.host));
                }
                RolloutState::Failed(why) => failed.push(format!("{}: {why}", on_host.host)),
            }
        }

        // A host that cannot run it, all hosts that run it, or the time limit.
        if !failed.is_empty() {
            let why = anyhow!("{}", failed.join("; "));
            return Err(why.context(format!(
                "worker {worker} version {version} is active but cannot run"
            )))
            .hint(format!("oncely rollback {worker}"));
        }
        if pending.is_empty() && running > 0 {
            let hosts = if running == 1 {
                String::new()
            } else {
                format!(" on {running} hosts")
            };
            let is_paused = |on_host: &WorkerOnHost| {
                let status = on_host.status.as_ref();
                status.is_some_and(|status| status.pause.is_some())
            };
            let paused = on_hosts.iter().any(is_paused);
            term::data(format!(
                "worker {worker} version {version} is active{hosts}"
            ))?;
            if paused {
                term::note(format!(
                    "worker {worker} stays paused; resume it with: oncely resume {worker}"
                ));
            }
            return Ok(());
        }
        if started_at.elapsed() >= ROLLOUT_TIMEOUT {
            term::warning(format!(
                "not every host runs it after {ROLLOUT_TIMEOUT:?}: {}",
                pending.join("; ")
            ));
            return term::data(format!(
                "worker {worker} version {version} is active on {running} hosts so far"
            ));
        }
        let pending = pending.join("; ");
        if started_at.elapsed() >= REPORT_AFTER && pending != last_reported {
            term::note(format!(
                "waiting for version {version} of {worker}: {pending}"
            ));
            last_reported = pending;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn rollout_state(on_host: &WorkerOnHost, version: u32) -> RolloutState {
    let Some(status) = &on_host.status else {
        return RolloutState::Pending("has not started it yet".to_owned());
    };
    let why = || status.error.clone().unwrap_or_default();
    match (status.state, status.broken_version, status.version) {
        (RunState::Broken, Some(broken), _) if broken == version => RolloutState::Failed(why()),
        (RunState::Broken, None, Some(running)) if running == version => {
            RolloutState::Failed(why())
        }
        (RunState::Running | RunState::Paused, None, Some(running)) if running == version => {
            RolloutState::Running
        }
        (RunState::Held, _, _) => {
            RolloutState::Pending("waits until the database and NATS agree".to_owned())
        }
        (_, _, Some(running)) if running != version => {
            RolloutState::Pending(format!("still runs version {running}"))
        }
        _ => RolloutState::Pending("is starting it".to_owned()),
    }
}
