//! `make bench`: throughput of a host, compared with hand-written loops in the same run.
//!
//! Absolute figures depend on the machine and the day. The ratio to the hand-written loop is the
//! result.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::json;
use support::database::Kind;
use support::guests;
use support::postgres::Cluster;

use crate::contenders::{CONTENDERS, Contender};

mod contenders;
mod cpu;
mod hand_written;
mod http;
mod languages;
mod native;
mod requests;
mod retention;
mod saturation;
mod stage;

/// Measure messages per second on PostgreSQL, from the input stream to the output stream.
#[derive(Debug, Parser)]
struct Options {
    /// Messages per measurement.
    #[arg(long, default_value_t = 20_000)]
    messages: usize,
    /// Measurements of each contender, in rotation; the median is reported.
    #[arg(long, default_value_t = 3)]
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
    /// Compare the languages of handlers instead.
    #[arg(long)]
    languages: bool,
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
        let (holds, report) = requests::measure(time, options.rounds, &options.settings).await?;
        write("requests.json", &report)?;
        ensure!(holds, "requests are slower than wanted");
        return Ok(());
    }
    if options.languages {
        let report = languages::measure(options.rounds, options.only.as_deref()).await?;
        return write("languages.json", &report);
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

    // Measurements
    tokio::task::spawn_blocking(guests::component).await??;
    let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
    let selected = selected(options.only.as_deref());
    let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut cpu: BTreeMap<&str, BTreeMap<String, f64>> = BTreeMap::new();
    for round in 1..=options.rounds {
        for contender in &selected {
            let measured = stage::measure(contender, &cluster, options.messages)
                .await
                .with_context(|| format!("measure {}", contender.name))?;
            let programs: Vec<String> = measured
                .cpu_micros
                .iter()
                .map(|(program, micros)| format!("{program} {micros:.0}"))
                .collect();
            let (rate, name) = (measured.rate, contender.name);
            println!(
                "round {round}  {name:<28} {rate:>8.0} messages/s; µs of CPU each: {}",
                programs.join(", ")
            );
            rates.entry(name).or_default().push(rate);
            cpu.insert(name, measured.cpu_micros);
        }
    }

    // Table and report
    let medians: BTreeMap<&str, f64> = rates
        .iter()
        .map(|(name, rates)| (*name, median(rates)))
        .collect();
    println!(
        "\n{:<28} {:>10} {:>8}  compared with",
        "", "messages/s", "ratio"
    );
    let mut rows = Vec::new();
    for contender in &selected {
        let rate = medians.get(contender.name).copied().unwrap_or_default();
        let ratio = contender
            .baseline
            .and_then(|baseline| medians.get(baseline))
            .map(|baseline| rate / baseline);
        let shown = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        println!(
            "{:<28} {rate:>10.0} {shown:>8}  {}",
            contender.name,
            contender.baseline.unwrap_or_default()
        );
        rows.push(json!({
            "name": contender.name, "description": contender.description, "rates": rates.get(contender.name), "median": rate,
            "cpu_micros_per_message": cpu.get(contender.name),
            "baseline": contender.baseline, "ratio": ratio, "wanted": contender.wanted,
        }));
    }
    write(
        "throughput.json",
        &json!({ "messages": options.messages, "rounds": options.rounds, "contenders": rows }),
    )
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

/// The contenders to measure, with their baselines, in the order of the table.
fn selected(only: Option<&str>) -> Vec<&'static Contender> {
    let matches_only =
        |contender: &Contender| only.is_none_or(|part| contender.name.contains(part));
    let baselines: Vec<&str> = CONTENDERS
        .iter()
        .filter(|c| matches_only(c))
        .filter_map(|c| c.baseline)
        .collect();
    CONTENDERS
        .iter()
        .filter(|contender| matches_only(contender) || baselines.contains(&contender.name))
        .collect()
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
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

/// A measurement without progress for this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
