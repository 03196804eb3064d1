//! `make chaos` and `make mutants`: a host under load and faults, checked for exactly-once effects.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use futures::StreamExt;
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;

use crate::campaign::{CampaignReport, Harm, Plan};
use crate::exposure::Exposure;
use crate::restore::RestoreReport;
use crate::storm::{Storm, StormReport};
use crate::takeover::TakeoverReport;

mod campaign;
mod checker;
mod exposure;
mod observed;
mod proxied_database;
mod publisher;
mod redriver;
mod restore;
mod storm;
mod stranger;
mod takeover;
mod watcher;
mod workload;

/// Inject faults into a host under load and check its exactly-once guarantees.
#[derive(Debug, Parser)]
struct Options {
    #[arg(long, default_value = "both")]
    database: Databases,
    /// Minimum number of messages on each database.
    #[arg(long, default_value_t = 20_000)]
    inputs: u64,
    /// Seed of the workload and of the order of faults. Default: random.
    #[arg(long)]
    seed: Option<u64>,
    /// Operations in the storm after the campaigns. Default: 1,000, or 60 with `--short`.
    #[arg(long)]
    operations: Option<u64>,
    /// Run only the storm.
    #[arg(long)]
    storm: bool,
    /// Run only the takeovers (PostgreSQL).
    #[arg(long, conflicts_with = "storm")]
    takeover: bool,
    /// Run only the restores.
    #[arg(long, conflicts_with_all = ["storm", "takeover"])]
    restore: bool,
    /// Maximum duration of the faults.
    #[arg(long, default_value_t = 11.0)]
    minutes: f64,
    /// Maximum messages per transaction. Default: 32 and 1, alternating between worker versions.
    #[arg(long)]
    batch: Option<u32>,
    #[arg(long, default_value_t = 4)]
    lanes: u32,
    /// Set a variable in the environment of the host, such as ONCELY_RELAY=wal.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Run a reduced campaign of about two minutes.
    #[arg(long)]
    short: bool,
    /// Run each mutant of the host; the checker must catch every one.
    #[arg(long)]
    mutants: bool,
    /// Run only this mutant; repeat for several.
    #[arg(long, requires = "mutants")]
    mutant: Vec<String>,
    /// Runs of each mutant, each with its own seed. The mutant must be caught every time.
    #[arg(long, default_value_t = 1, requires = "mutants")]
    times: u64,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Databases {
    Sqlite,
    Postgres,
    Both,
}

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(run(Options::parse()).await)
}

async fn run(options: Options) -> Result<bool> {
    // Built once, before several campaigns need the components at the same time.
    tokio::task::spawn_blocking(guests::component).await??;
    tokio::task::spawn_blocking(guests::http_component).await??;
    let holds = if options.mutants {
        run_mutants(&options).await?
    } else {
        run_campaigns(&options).await?
    };
    Ok(holds)
}

/// Mutants that run concurrently; they mostly wait.
const MUTANTS_AT_ONCE: usize = 5;

/// Minimum number of messages for a mutant that messages expose, and for one that faults expose.
const MUTANT_INPUTS: u64 = 1_500;
const MUTANT_INPUTS_WITH_FAULTS: u64 = 600;

/// Runs the campaigns concurrently; true when every rule holds.
async fn run_campaigns(options: &Options) -> Result<bool> {
    // Plan
    let seed = options
        .seed
        .unwrap_or_else(|| u64::from(rand::random::<u32>()));
    println!("seed {seed}; repeat the same faults with --seed {seed}");
    let kinds = match options.database {
        Databases::Sqlite => vec![Kind::Sqlite],
        Databases::Postgres => vec![Kind::Postgres],
        Databases::Both => vec![Kind::Sqlite, Kind::Postgres],
    };
    let plan = |kind| Plan {
        kind,
        seed,
        inputs: options.inputs,
        batch: options.batch,
        lanes: options.lanes,
        harm_max: Duration::from_secs_f64(options.minutes * 60.0),
        harm: if options.short {
            Harm::SHORT
        } else {
            Harm::FULL
        },
        mutant: None,
        exposure: Exposure::default(),
        env: options.env.clone(),
    };

    // Campaigns
    let storms = kinds.clone();
    let alone = options.storm || options.takeover || options.restore;
    let kinds = if alone { Vec::new() } else { kinds };
    let campaigns = kinds
        .into_iter()
        .map(|kind| tokio::spawn(campaign::run(plan(kind))));
    let mut running: futures::stream::FuturesUnordered<_> = campaigns.collect();
    let mut outcomes = Vec::new();
    while let Some(outcome) = running.next().await {
        let outcome = outcome.context("run a campaign")??;
        show(&outcome);
        outcomes.push(outcome);
    }

    // Takeovers, restores and storms
    let taken_over = if options.takeover && storms.contains(&Kind::Postgres) {
        Some(run_takeovers(options).await?)
    } else {
        None
    };
    let restored = if options.storm || options.takeover {
        Vec::new()
    } else {
        storms.clone()
    };
    let restored = run_restores(options, seed, restored).await?;
    let storms = if options.takeover || options.restore {
        Vec::new()
    } else {
        storms
    };
    let storms = run_storms(options, seed, storms).await?;

    // Report
    let violations: usize = outcomes
        .iter()
        .map(|outcome| outcome.violations.len())
        .sum();
    let violations = violations
        + taken_over
            .as_ref()
            .map_or(0, |taken_over| taken_over.violations.len());
    let violations = violations
        + storms
            .iter()
            .map(|(_, storm)| storm["violations"].as_array().map_or(0, Vec::len))
            .sum::<usize>();
    let violations = violations
        + restored
            .iter()
            .map(|(_, restored)| restored.violations.len())
            .sum::<usize>();
    let restores: BTreeMap<String, Value> = restored
        .iter()
        .map(|(name, restored)| (name.clone(), json!({ "seen": restored.seen })))
        .collect();
    let storms: BTreeMap<String, Value> = storms.into_iter().collect();
    let databases: BTreeMap<String, Value> = outcomes
        .iter()
        .map(|outcome| (name(outcome.plan.kind), report(outcome)))
        .collect();
    let name = if options.short {
        "short.json"
    } else {
        "report.json"
    };
    let takeover_ms = taken_over.map(|taken_over| taken_over.ms);
    let report = json!({
        "seed": seed, "violations": violations, "databases": databases, "storms": storms, "restores": restores,
        "takeover_ms": takeover_ms,
    });
    write(name, &report)?;
    println!("{violations} violations");
    Ok(violations == 0)
}

/// Freezes and partitions hosts, and prints how long each takeover took.
async fn run_takeovers(options: &Options) -> Result<TakeoverReport> {
    let taken_over = takeover::run(if options.short { 1 } else { 3 }, &options.env)
        .await
        .context("lose hosts")?;
    println!("\ntakeover from a host with a guest time limit of an hour");
    for (loss, ms) in &taken_over.ms {
        println!("    {ms:?} ms, {loss}");
    }
    println!("    {:>7}  violations", taken_over.violations.len());
    taken_over
        .violations
        .iter()
        .for_each(|violation| println!("    {}: {}", violation.rule, violation.what));
    Ok(taken_over)
}

/// Restores databases under load, concurrently.
async fn run_restores(
    options: &Options,
    seed: u64,
    kinds: Vec<Kind>,
) -> Result<Vec<(String, RestoreReport)>> {
    let times = if options.short { 1 } else { 3 };
    let restores = kinds
        .into_iter()
        .map(async |kind| (name(kind), restore::run(kind, times, seed).await));
    let mut all = Vec::new();
    for (name, restored) in futures::future::join_all(restores).await {
        let restored = restored.with_context(|| format!("restore {name}"))?;
        println!("\nrestore of {name}");
        restored
            .seen
            .iter()
            .for_each(|(what, count)| println!("    {count:>7}  {what}"));
        println!("    {:>7}  violations", restored.violations.len());
        restored
            .violations
            .iter()
            .for_each(|violation| println!("    {}: {}", violation.rule, violation.what));
        all.push((name, restored));
    }
    Ok(all)
}

/// Runs the storms concurrently; returns the reports by database.
async fn run_storms(
    options: &Options,
    seed: u64,
    kinds: Vec<Kind>,
) -> Result<Vec<(String, Value)>> {
    let (keys, posts) = if options.short {
        (60, 25)
    } else {
        (1_000, 100)
    };
    let keys = options.operations.unwrap_or(keys);
    let storm = |kind| {
        storm::run(Storm {
            kind,
            seed,
            keys,
            posts,
            env: options.env.clone(),
        })
    };
    let mut reports = Vec::new();
    for weathered in futures::future::join_all(kinds.into_iter().map(storm)).await {
        let StormReport {
            storm,
            injected,
            seen,
            violations,
            seconds,
        } = weathered.context("run a storm")?;
        println!(
            "\nstorm on {}: {} operations, {} clients each, {seconds} s",
            name(storm.kind),
            storm.keys,
            storm.posts
        );
        injected
            .iter()
            .chain(&seen)
            .for_each(|(what, count)| println!("    {count:>7}  {what}"));
        println!("    {:>7}  violations", violations.len());
        violations
            .iter()
            .take(20)
            .for_each(|violation| println!("    {}: {}", violation.rule, violation.what));
        let listed: Vec<String> = violations
            .iter()
            .map(|found| format!("{}: {}", found.rule, found.what))
            .collect();
        let report =
            json!({ "seconds": seconds, "injected": injected, "seen": seen, "violations": listed });
        reports.push((name(storm.kind), report));
    }
    Ok(reports)
}

/// The results of one mutant.
#[derive(Default)]
struct Tally {
    runs: u64,
    caught: u64,
    rules: BTreeSet<&'static str>,
    first: String,
    unexposed: Vec<String>,
    seconds: u64,
}

impl Tally {
    fn count(&mut self, outcome: CampaignReport) {
        self.runs += 1;
        self.seconds += outcome.seconds;
        self.rules
            .extend(outcome.violations.iter().map(|violation| violation.rule));
        // Exposure matters for a mutant that was not caught. A caught one may have ended the faults
        // early, such as a host that takes its database for a restored one and holds its workers.
        match outcome.violations.into_iter().next() {
            Some(first) => {
                self.caught += 1;
                self.first = first.what;
            }
            None => self.unexposed.extend(outcome.unexposed),
        }
    }

    /// Counts a run that failed.
    fn fail(&mut self, error: &anyhow::Error) {
        self.runs += 1;
        self.unexposed.push(format!("a run failed: {error:#}"));
    }

    /// Whether the mutant was caught every time, or the unchanged host never, with full exposure.
    fn is_as_expected(&self, mutant: &str) -> bool {
        let wanted = if mutant == NO_MUTANT { 0 } else { self.runs };
        self.caught == wanted && self.unexposed.is_empty()
    }
}

/// The unchanged host, run like a mutant.
const NO_MUTANT: &str = "none";

/// The mutants: one patch each in `tests/mutants`, beside the one that selects a mutant.
fn all_mutants() -> Result<Vec<String>> {
    let folder = guests::repository().join("tests/mutants");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).context("list tests/mutants")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".patch").map(str::to_owned));
    }
    names.retain(|name| name != "selector");
    names.sort();
    Ok(names)
}

/// Runs the mutants and the unchanged host, a few at a time. True when every mutant is caught in
/// every run, the unchanged host never is, and every exposure is complete.
async fn run_mutants(options: &Options) -> Result<bool> {
    // Plan
    let seed = options.seed.unwrap_or(7);
    let mut mutants = vec![NO_MUTANT.to_owned()];
    mutants.extend(
        all_mutants()?
            .into_iter()
            .filter(|name| options.mutant.is_empty() || options.mutant.contains(name)),
    );
    ensure!(
        mutants.len() > 1,
        "there is no such mutant in tests/mutants"
    );
    let plan = |mutant: &str, seed: u64| {
        let exposure = Exposure::for_mutant(mutant)
            .with_context(|| format!("no campaign is designed to expose {mutant}"))?;
        let (harm, harm_max) = if mutant == NO_MUTANT {
            (Harm::OF_ALL_MUTANTS, Duration::from_secs(25))
        } else {
            (Harm::default(), Duration::from_secs(15))
        };
        anyhow::Ok(Plan {
            kind: Kind::Postgres,
            seed,
            inputs: if exposure.acts.is_empty() {
                MUTANT_INPUTS
            } else {
                MUTANT_INPUTS_WITH_FAULTS
            },
            batch: options.batch.or(Some(32)),
            lanes: options.lanes,
            harm_max,
            harm,
            mutant: Some(mutant.to_owned()),
            exposure,
            env: options.env.clone(),
        })
    };
    let mut plans = Vec::new();
    for time in 0..options.times {
        for mutant in &mutants {
            plans.push(plan(mutant, seed + time)?);
        }
    }

    // Runs
    let run = |plan: Plan| async move {
        let mutant = plan.mutant.clone().unwrap_or_default();
        (mutant, campaign::run(plan).await)
    };
    let mut running =
        futures::stream::iter(plans.into_iter().map(run)).buffer_unordered(MUTANTS_AT_ONCE);
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    while let Some((mutant, outcome)) = running.next().await {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            // The other runs continue. This one counts as not exposed.
            Err(error) => {
                println!("{mutant:<26} failed to run: {error:#}");
                tallies.entry(mutant).or_default().fail(&error);
                continue;
            }
        };
        let (seed, found) = (outcome.plan.seed, outcome.violations.len());
        let verdict = if found > 0 { "caught" } else { "not caught" };
        let first = outcome
            .violations
            .first()
            .map(|violation| violation.what.clone())
            .unwrap_or_default();
        println!("{mutant:<26} {verdict:<11} {found:>4} violations  seed {seed}  {first}");
        let unexposed = outcome.unexposed.iter().filter(|_| found == 0);
        unexposed.for_each(|what| println!("{mutant:<26} not exposed: {what}"));
        tallies.entry(mutant).or_default().count(outcome);
    }

    // Report
    let rows: Vec<Value> = tallies
        .iter()
        .map(|(mutant, tally)| {
            json!({ "name": mutant, "runs": tally.runs, "caught": tally.caught, "by": tally.rules,
                "first": tally.first, "unexposed": tally.unexposed, "seconds": tally.seconds })
        })
        .collect();
    let caught = tallies
        .iter()
        .filter(|(mutant, tally)| *mutant != NO_MUTANT && tally.is_as_expected(mutant))
        .count();
    println!(
        "{caught} of {} mutants caught in all of their {} runs",
        mutants.len() - 1,
        options.times
    );
    let file = match options.mutant.as_slice() {
        [mutant] => format!("mutant-{mutant}.json"),
        _ => "mutants.json".to_owned(),
    };
    write(
        &file,
        &json!({ "seed": seed, "times": options.times, "caught": caught, "mutants": mutants.len() - 1, "rows": rows }),
    )?;
    Ok(tallies
        .iter()
        .all(|(mutant, tally)| tally.is_as_expected(mutant)))
}

/// Prints the injected faults, observed events, counts and violations.
fn show(outcome: &CampaignReport) {
    let CampaignReport {
        plan,
        injected,
        seen,
        counted,
        violations,
        seconds,
        kept,
        ..
    } = outcome;
    println!(
        "\n{}: {}, {} lanes, {seconds} s",
        name(plan.kind),
        batches(plan),
        plan.lanes
    );
    println!("  injected");
    injected
        .iter()
        .for_each(|(what, count)| println!("    {count:>7}  {what}"));
    println!("  seen");
    seen.iter()
        .for_each(|(what, count)| println!("    {count:>7}  {what}"));
    println!("  checked");
    if let Value::Object(counted) = json!(counted) {
        counted.iter().for_each(|(what, count)| {
            println!("    {:>7}  {}", count.to_string(), what.replace('_', " "))
        });
    }
    println!("  violations");
    println!("    {:>7}", violations.len());
    violations
        .iter()
        .take(20)
        .for_each(|violation| println!("    {}: {}", violation.rule, violation.what));
    if let Some(kept) = kept {
        println!("    see {}", kept.display());
    }
}

fn report(outcome: &CampaignReport) -> Value {
    let violations: Vec<Value> = outcome
        .violations
        .iter()
        .map(|violation| json!({ "rule": violation.rule, "what": violation.what }))
        .collect();
    json!({
        "batches": batches(&outcome.plan), "lanes": outcome.plan.lanes, "seconds": outcome.seconds,
        "injected": outcome.injected, "seen": outcome.seen, "checked": outcome.counted, "violations": violations,
    })
}

fn batches(plan: &Plan) -> String {
    plan.batch.map_or_else(
        || "batches of 32 and of 1".to_owned(),
        |batch| format!("batches of {batch}"),
    )
}

fn name(kind: Kind) -> String {
    format!("{kind:?}").to_lowercase()
}

fn write(file: &str, value: &Value) -> Result<()> {
    let folder: PathBuf = guests::target_dir()?
        .parent()
        .context("find the target folder")?
        .join("chaos");
    std::fs::create_dir_all(&folder).context("create the report folder")?;
    let path = folder.join(file);
    std::fs::write(&path, serde_json::to_string_pretty(value)? + "\n")
        .context("write the report")?;
    println!("written to {}", path.display());
    Ok(())
}
