//! `oncely status` and `oncely workers`: the running workers, with counts and lags.

use anyhow::Result;
use clap::Args;

use super::client::{Client, HostArgs};
use super::term::{self, Table};
use crate::api::{Deployment, Status as HostStatus};
use crate::model::alarm::Alarm;
use crate::model::breaker;
use crate::model::oci::Reference;
use crate::model::units;
use crate::model::visible::visible;
use crate::runtime::WorkerState;
use crate::store::{Pause, RelayMode, WalState, WorkerTotals};

/// Show whether the host is ready, with counts and lags by worker.
#[derive(Debug, Args)]
pub struct Status {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Status {
    pub async fn run(self) -> Result<()> {
        let status: HostStatus = Client::find(&self.host)?.get("/status").await?;
        if self.json {
            return term::json(&status);
        }
        term::data(term::details([
            ("host", format!("oncely {}", status.version)),
            ("ready", ready(&status)),
            (
                "nats",
                if status.nats_connected {
                    "connected"
                } else {
                    "not connected"
                }
                .to_owned(),
            ),
            ("database", database(&status)),
            ("publishing", publishing(&status)),
            (
                "oldest pending",
                format_age(
                    status
                        .workers
                        .iter()
                        .filter_map(|worker| worker.oldest_pending_ms)
                        .max(),
                ),
            ),
            (
                "oldest unpublished",
                format_age(oldest_unpublished(&status)),
            ),
            (
                "alarms",
                status
                    .alarms
                    .as_ref()
                    .map_or("unknown".to_owned(), |alarms| alarms.len().to_string()),
            ),
        ]))?;
        if let Some(alarms) = status.alarms.as_deref().filter(|alarms| !alarms.is_empty()) {
            show_alarms(alarms)?;
        }
        let parked: u64 = status
            .totals
            .iter()
            .flatten()
            .map(|totals| totals.parked)
            .sum();
        if parked > 0 {
            term::warning(format!(
                "{parked} outputs are parked and hold their keys; \
                 list them with: oncely outbox list"
            ));
        }
        for (worker, pause) in status
            .workers
            .iter()
            .filter_map(|state| Some((&state.worker, state.pause.as_ref()?)))
        {
            note_pause(worker, pause);
        }
        match &status.totals {
            Some(totals) => show_totals(&status.workers, totals),
            None => Ok(()),
        }
    }
}

fn note_pause(worker: &str, pause: &Pause) {
    let pause = visible(&pause.to_string());
    term::note(format!(
        "worker {worker} is {pause}; resume it with: oncely resume {worker}"
    ));
}

fn ready(status: &HostStatus) -> String {
    match (&status.not_ready, status.broken.as_slice()) {
        (Some(why), _) => format!("no: {why}"),
        (None, []) => "yes".to_owned(),
        (None, broken) => format!("yes, but {}", broken.join("; ")),
    }
}

fn database(status: &HostStatus) -> String {
    match (&status.database_error, &status.totals) {
        (Some(why), _) => format!("takes no writes: {why}"),
        (None, Some(_)) => "takes writes".to_owned(),
        (None, None) => "unavailable".to_owned(),
    }
}

/// Prints the raised alarms.
fn show_alarms(alarms: &[Alarm]) -> Result<()> {
    let row = |alarm: &Alarm| {
        let what = alarm
            .group
            .as_ref()
            .map(|group| format!("{}: {} {}", group.id, group.reason, group.shape));
        let (value, threshold) = (
            alarm.kind.format_value(alarm.value),
            alarm.kind.format_value(alarm.threshold),
        );
        vec![
            alarm.kind.as_str().to_owned(),
            alarm.worker.clone(),
            units::format_time(alarm.raised_at),
            what.unwrap_or_else(|| format!("{value} (threshold {threshold})")),
        ]
    };
    let mut table = Table::new(&["alarm", "worker", "raised at", "at that time"]);
    alarms.iter().map(row).for_each(|row| table.row(row));
    term::data(format!("\n{table}").trim_end())
}

/// The destinations that nothing is published to for now, and the relay mode.
fn publishing(status: &HostStatus) -> String {
    match (blocked_destinations(status), &status.wal) {
        (streams, None) => streams,
        (streams, Some(wal)) => format!("{streams}; {}", relay_mode(wal, status.is_wal_reader)),
    }
}

fn relay_mode(wal: &WalState, is_reader: bool) -> String {
    let reader = if is_reader { ", read by this host" } else { "" };
    let mode = match (wal.mode, &wal.fallback_reason) {
        (RelayMode::Wal, _) => {
            format!("WAL mode{reader}, lag {:.1} s", wal.lag.as_secs_f64())
        }
        (RelayMode::Poll, None) => "poll mode".to_owned(),
        (RelayMode::Poll, Some(why)) => format!("poll mode, because {why}"),
        (RelayMode::Entering, _) => "poll mode, switching to WAL mode".to_owned(),
        (RelayMode::Leaving, None) => "poll mode, just switched from WAL mode".to_owned(),
        (RelayMode::Leaving, Some(why)) => {
            format!("poll mode, just switched from WAL mode: {why}")
        }
    };
    match &wal.slot {
        Some(slot) => format!(
            "{mode}; the slot retains {} of WAL",
            units::format_size(slot.retained)
        ),
        None => mode,
    }
}

fn blocked_destinations(status: &HostStatus) -> String {
    let streams = status
        .breakers
        .iter()
        .filter(|breaker| breaker.state != breaker::State::Closed);
    let streams = streams.map(|breaker| (&breaker.stream, &breaker.error));
    let subjects = status
        .refused_subjects
        .iter()
        .map(|refused| (&refused.subject, &refused.error));
    let broken: Vec<String> = streams
        .chain(subjects)
        .map(|(place, why)| format!("not to {place}: {why}"))
        .collect();
    if broken.is_empty() {
        "yes".to_owned()
    } else {
        broken.join("; ")
    }
}

fn oldest_unpublished(status: &HostStatus) -> Option<u64> {
    status
        .totals
        .iter()
        .flatten()
        .filter_map(|totals| totals.oldest_unpublished_ms)
        .max()
}

fn format_age(ms: Option<u64>) -> String {
    ms.map_or("-".to_owned(), |ms| format!("{:.1} s", ms as f64 / 1000.0))
}

fn show_totals(workers: &[WorkerState], totals: &[WorkerTotals]) -> Result<()> {
    if totals.is_empty() {
        term::note("no workers are deployed; deploy one with: oncely deploy");
        return Ok(());
    }
    let row = |totals: &WorkerTotals| {
        let state = workers.iter().find(|state| state.worker == totals.worker);
        vec![
            totals.worker.clone(),
            state.map_or("not here".to_owned(), |state| state.state.to_string()),
            state
                .and_then(|state| state.pending)
                .map_or("-".to_owned(), |pending| pending.to_string()),
            format_age(state.and_then(|state| state.oldest_pending_ms)),
            totals.done.to_string(),
            totals.dead.to_string(),
            totals.outputs.to_string(),
            totals.unpublished.to_string(),
            format_age(totals.oldest_unpublished_ms),
            totals.parked.to_string(),
        ]
    };
    let mut table = Table::new(&[
        "worker",
        "state",
        "pending",
        "oldest pending",
        "done",
        "dead",
        "outputs",
        "unpublished",
        "oldest unpublished",
        "parked",
    ]);
    totals.iter().map(row).for_each(|row| table.row(row));
    term::data(format!("\n{table}").trim_end())
}

/// List the workers of the host, or the versions of one worker.
#[derive(Debug, Args)]
pub struct Workers {
    /// Show the versions of this worker.
    worker: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Workers {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        match &self.worker {
            Some(worker) => self.versions(&client, worker).await,
            None => self.list(&client).await,
        }
    }

    async fn versions(&self, client: &Client, worker: &str) -> Result<()> {
        let deployments: Vec<Deployment> = client
            .get(&format!("/workers/{worker}/deployments"))
            .await?;
        if self.json {
            return term::json(&deployments);
        }
        let row = |deployment: &Deployment| {
            let reference = deployment.component.as_ref();
            vec![
                deployment.version.to_string(),
                if deployment.active { "active" } else { "" }.to_owned(),
                deployment.digest.chars().take(12).collect(),
                units::format_time(deployment.created_at),
                reference.map(Reference::to_string).unwrap_or_default(),
            ]
        };
        let has_references = deployments.iter().any(|one| one.component.is_some());
        let source = has_references.then_some("source");
        let heads = ["version", "state", "component", "deployed at"];
        let heads: Vec<&str> = heads.into_iter().chain(source).collect();
        let mut table = Table::new(&heads);
        deployments.iter().map(row).for_each(|row| table.row(row));
        term::data(table.to_string().trim_end())
    }

    async fn list(&self, client: &Client) -> Result<()> {
        let workers: Vec<WorkerState> = client.get("/workers").await?;
        if self.json {
            return term::json(&workers);
        }
        if workers.is_empty() {
            term::note("no workers are deployed; deploy one with: oncely deploy");
            return Ok(());
        }
        let row = |state: &WorkerState| {
            vec![
                state.worker.clone(),
                state
                    .version
                    .map_or("-".to_owned(), |version| version.to_string()),
                state.state.to_string(),
                state.stream.clone().unwrap_or_default(),
                state.subjects.join(" "),
                state
                    .digest
                    .clone()
                    .unwrap_or_default()
                    .chars()
                    .take(12)
                    .collect(),
            ]
        };
        let mut table = Table::new(&[
            "worker",
            "version",
            "state",
            "stream",
            "subjects",
            "component",
        ]);
        workers.iter().map(row).for_each(|row| table.row(row));
        for state in &workers {
            let worker = &state.worker;
            match (&state.pause, &state.error) {
                (Some(pause), _) => note_pause(worker, pause),
                (None, Some(error)) => {
                    term::warning(format!("a worker is not running: {error}"));
                }
                (None, None) => {}
            }
        }
        term::data(table.to_string().trim_end())
    }
}
