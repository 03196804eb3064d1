//! `oncely status` and `oncely workers`: what runs, and how far it is.

use anyhow::Result;
use clap::Args;

use super::client::{Client, HostArgs};
use super::term;
use crate::api::{Deployment, Status as HostStatus};
use crate::host::WorkerState;
use crate::store::WorkerTotals;

/// Shows whether the host is ready, and counts and lags by worker.
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
        term::details(&[
            ("host", format!("oncely {}", status.version)),
            ("ready", status.not_ready.clone().map_or("yes".to_owned(), |why| format!("no: {why}"))),
            ("nats", if status.nats_connected { "connected" } else { "not connected" }.to_owned()),
            ("database", if status.totals.is_some() { "answers" } else { "out of reach" }.to_owned()),
        ]);
        if let Some(totals) = &status.totals {
            show_totals(&status.workers, totals);
        }
        Ok(())
    }
}

fn show_totals(workers: &[WorkerState], totals: &[WorkerTotals]) {
    if totals.is_empty() {
        return term::note("no workers are deployed; deploy one with: oncely deploy");
    }
    let row = |totals: &WorkerTotals| {
        let state = workers.iter().find(|state| state.worker == totals.worker);
        vec![
            totals.worker.clone(),
            state.map_or("not here".to_owned(), |state| state.state.clone()),
            state.and_then(|state| state.pending).map_or("-".to_owned(), |pending| pending.to_string()),
            totals.done.to_string(),
            totals.dead.to_string(),
            totals.outputs.to_string(),
            totals.unpublished.to_string(),
            totals.oldest_unpublished_ms.map_or("-".to_owned(), |ms| format!("{:.1} s", ms as f64 / 1000.0)),
        ]
    };
    let rows: Vec<Vec<String>> = totals.iter().map(row).collect();
    term::data("");
    term::table(&["worker", "state", "waiting", "done", "dead", "outputs", "unpublished", "oldest"], &rows);
}

/// Lists the workers of the host, or the versions of one worker.
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
        let deployments: Vec<Deployment> = client.get(&format!("/workers/{worker}/deployments")).await?;
        if self.json {
            return term::json(&deployments);
        }
        let row = |deployment: &Deployment| {
            vec![
                deployment.version.to_string(),
                if deployment.active { "active" } else { "" }.to_owned(),
                deployment.digest.chars().take(12).collect(),
                term::time(deployment.created_at),
            ]
        };
        let rows: Vec<Vec<String>> = deployments.iter().map(row).collect();
        term::table(&["version", "state", "component", "deployed at"], &rows);
        Ok(())
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
                state.version.map_or("-".to_owned(), |version| version.to_string()),
                state.state.clone(),
                state.stream.clone().unwrap_or_default(),
                state.subjects.join(" "),
                state.digest.clone().unwrap_or_default().chars().take(12).collect(),
            ]
        };
        let rows: Vec<Vec<String>> = workers.iter().map(row).collect();
        term::table(&["worker", "version", "state", "stream", "subjects", "component"], &rows);
        for error in workers.iter().filter_map(|state| state.error.as_ref()) {
            term::note(&format!("broken: {error}"));
        }
        Ok(())
    }
}
