//! Following a version until the hosts run it.

use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::time::Instant;

use super::client::Client;
use super::term;
use crate::api::{Activated, OnHost};
use crate::model::hint::WithHint;

/// How long hosts may take, and how often they are asked.
const RUNS_WITHIN: Duration = Duration::from_secs(120);
const RUNS_YET: Duration = Duration::from_millis(200);

/// After how long it is told who is waited for.
const TELL_AFTER: Duration = Duration::from_secs(2);

/// How a version stands on one host.
enum Stand {
    Runs,
    NotYet(String),
    Cannot(String),
}

/// Waits until every host that is alive runs the version that was activated, and says so.
pub async fn follow(client: &Client, activated: &Activated, no_wait: bool) -> Result<()> {
    let Activated { worker, version } = activated;
    if no_wait {
        return term::data(format!("worker {worker} version {version} is active; hosts take it up now"));
    }
    let began = Instant::now();
    let mut told = String::new();
    loop {
        let hosts: Vec<OnHost> = client.get(&format!("/workers/{worker}/hosts")).await?;
        let (mut runs, mut waits, mut cannot) = (0, Vec::new(), Vec::new());
        for on_host in &hosts {
            match stand(on_host, *version) {
                Stand::Runs => runs += 1,
                Stand::NotYet(why) => waits.push(format!("{} {why}", on_host.host)),
                Stand::Cannot(why) => cannot.push(format!("{}: {why}", on_host.host)),
            }
        }
        if !cannot.is_empty() {
            let why = anyhow!("{}", cannot.join("; "));
            return Err(why.context(format!("worker {worker} version {version} is active and cannot run")))
                .hint(format!("oncely rollback {worker}"));
        }
        if waits.is_empty() && runs > 0 {
            let hosts = if runs == 1 { String::new() } else { format!(" on {runs} hosts") };
            return term::data(format!("worker {worker} version {version} is active{hosts}"));
        }
        if began.elapsed() >= RUNS_WITHIN {
            term::warning(format!("not every host runs it after {RUNS_WITHIN:?}: {}", waits.join("; ")));
            return term::data(format!("worker {worker} version {version} is active; on {runs} hosts so far"));
        }
        let waits = waits.join("; ");
        if began.elapsed() >= TELL_AFTER && waits != told {
            term::note(format!("waiting for version {version} of {worker}: {waits}"));
            told = waits;
        }
        tokio::time::sleep(RUNS_YET).await;
    }
}

fn stand(on_host: &OnHost, version: u32) -> Stand {
    let Some(runs) = &on_host.runs else { return Stand::NotYet("has not heard of it yet".to_owned()) };
    let why = || runs.error.clone().unwrap_or_default();
    match (runs.state.as_str(), runs.broken_version, runs.version) {
        ("broken", Some(broken), _) if broken == version => Stand::Cannot(why()),
        ("broken", None, Some(runs)) if runs == version => Stand::Cannot(why()),
        ("running" | "paused", None, Some(runs)) if runs == version => Stand::Runs,
        ("held", _, _) => Stand::NotYet("waits until database and broker agree".to_owned()),
        (_, _, Some(runs)) if runs != version => Stand::NotYet(format!("runs version {runs} yet")),
        _ => Stand::NotYet("starts it".to_owned()),
    }
}
