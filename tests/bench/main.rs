//! `make bench`: throughput of a host, compared with hand-written loops in the same run.
//!
//! Absolute figures depend on the machine and the day. The ratio to the hand-written loop is the
//! result.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use support::database::Kind;
use support::guests;
use support::postgres::Cluster;

use crate::report::Measurements;

mod contenders;
mod cpu;
mod curves;
mod hand_written;
mod http;
mod instances;
mod languages;
mod latency;
mod native;
mod peers;
mod relay;
mod report;
mod requests;
mod retention;
mod saturation;
mod stage;
mod statistics;
mod throughput;
mod workers;

/// Measure messages per second on PostgreSQL, from the input stream to the output stream.
#[derive(Debug, Parser)]
struct Options {
    /// Messages per measurement.
    #[arg(long, default_value_t = 20_000)]
    messages: usize,
    /// Measurements of each contender, in rotation; the median is reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Run only contenders or languages whose name contains this text, and their baselines.
    #[arg(long)]
    only: Option<String>,
    /// Overload a host for this many seconds instead, and sample the age of unpublished outputs.
    #[arg(long, value_name = "SECONDS")]
    saturate: Option<u64>,
    /// Database of the saturation run.
    #[arg(long, default_value = "postgres", requires = "saturate")]
    database: Database,
    /// Set a variable in the environment of the saturated host, such as ONCELY_RELAY=wal.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable, requires = "saturate")]
    env: Vec<(String, String)>,
    /// Compare a cached read over HTTP with a constant instead, for this many seconds per round.
    #[arg(long, value_name = "SECONDS")]
    http: Option<u64>,
    /// Compare requests with an idempotency key with a hand-written service instead, for this many
    /// seconds per measurement.
    #[arg(long, value_name = "SECONDS")]
    requests: Option<u64>,
    /// Further lines of the worker's manifest, such as `batch = 1`.
    #[arg(long, default_value = "", requires = "requests")]
    settings: String,
    /// Measure how messages per second change as the work grows instead.
    #[arg(long)]
    curves: bool,
    /// Compare the languages of handlers instead.
    #[arg(long)]
    languages: bool,
    /// Compare the contender `state` with Restate and DBOS instead.
    #[arg(long)]
    peers: bool,
    /// Write this many rows through the inbox and outbox of both databases instead, with retention.
    #[arg(long, value_name = "ROWS")]
    retention: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Database {
    Sqlite,
    Postgres,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(seconds) = options.saturate {
        return saturate(&options, Duration::from_secs(seconds)).await;
    }
    if let Some(seconds) = options.http {
        let (holds, report) = http::measure(Duration::from_secs(seconds)).await?;
        write("http.json", &report)?;
        ensure!(holds, "a cached read exceeds its time limit");
        return Ok(());
    }
    ensure!(
        !cfg!(debug_assertions) || options.retention.is_some(),
        "not a release build; run: make bench"
    );
    if let Some(seconds) = options.requests {
        let time = Duration::from_secs(seconds);
        let report = requests::measure(time, options.rounds, &options.settings).await?;
        return write("requests.json", &report);
    }
    if options.curves {
        let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
        let drawing = guests::repository().join("docs/curves.svg");
        let report = curves::measure(&cluster, options.messages, options.rounds, &drawing).await?;
        return write("curves.json", &report);
    }
    if options.languages {
        let report = languages::measure(options.rounds, options.only.as_deref()).await?;
        return write("languages.json", &report);
    }
    if options.peers {
        let report = peers::measure(options.messages, options.rounds).await?;
        return write("peers.json", &report);
    }
    if let Some(rows) = options.retention {
        let report = retention::measure(rows).await?;
        write("retention.json", &report)?;
        let holds = |database: &str| report[database]["holds"] == true;
        ensure!(
            holds("postgres") && holds("sqlite"),
            "tables grew, or the last rows were slower than the first rows"
        );
        return Ok(());
    }

    compare(&options).await
}

/// Runs the comparison that `make bench` is about, or the part of it that `--only` names.
async fn compare(options: &Options) -> Result<()> {
    let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
    let (messages, rounds) = (options.messages, options.rounds);
    let only = options.only.as_deref();
    let throughput = throughput::measure(&cluster, messages, rounds, only).await?;
    let mut measured = Measurements {
        throughput,
        ..Measurements::default()
    };
    if only.is_none() {
        measured.requests = requests::measure(REQUESTS_TIME, rounds, "").await?;
        measured.relay = relay::measure(&cluster, messages).await?.into();
        measured.workers = workers::measure(&cluster).await?;
        measured.instances = instances::measure(rounds).await?;
        let rate = |name| measured.rate(name).unwrap_or_default();
        let (worker, by_hand) = (rate("state"), rate("state, by hand"));
        measured.latency = latency::measure(&cluster, worker, by_hand).await?;
    }
    println!("\n{}", measured.markdown());
    write("report.json", &measured.json())
}

/// Measures the age of unpublished outputs while a host is saturated.
async fn saturate(options: &Options, time: Duration) -> Result<()> {
    tokio::task::spawn_blocking(guests::component).await??;
    let kind = match options.database {
        Database::Sqlite => Kind::Sqlite,
        Database::Postgres => Kind::Postgres,
    };
    let (holds, report) = saturation::run(kind, time, options.env.clone()).await?;
    write(
        &format!("saturation-{}.json", format!("{kind:?}").to_lowercase()),
        &report,
    )?;
    ensure!(holds, "unpublished outputs exceeded their age limit");
    Ok(())
}

fn write(file: &str, report: &serde_json::Value) -> Result<()> {
    let folder = guests::target_dir()?
        .parent()
        .context("find the target folder")?
        .join("bench");
    std::fs::create_dir_all(&folder).context("create the report folder")?;
    let path = folder.join(file);
    std::fs::write(&path, serde_json::to_string_pretty(report)? + "\n")
        .context("write the report")?;
    println!("written to {}", path.display());
    Ok(())
}

/// How long each measurement of requests takes.
const REQUESTS_TIME: Duration = Duration::from_secs(4);

/// A measurement without progress for this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
