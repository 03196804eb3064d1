//! `make bench-peers`: the contender `state`, Restate and DBOS in rotation.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use support::guests;
use support::postgres::Cluster;

use crate::PATIENCE;
use crate::contenders;
use crate::stage::{self, Measured};
use crate::statistics::{median, spread};

mod dbos;
mod restate;

const KEYS: usize = 1_000;

/// A product that does the work of the contender `state`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Restate,
    Dbos,
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Peer::Restate => "restate",
            Peer::Dbos => "dbos",
        }
    }

    /// Messages of a measurement, which take some ten seconds.
    fn messages(self) -> usize {
        match self {
            Peer::Restate => 20_000,
            Peer::Dbos => 3_000,
        }
    }

    /// The settings to try.
    fn settings(self) -> Vec<Value> {
        match self {
            Peer::Restate => restate::SETTINGS.iter().map(|one| one.json()).collect(),
            Peer::Dbos => dbos::SETTINGS.iter().map(|one| one.json()).collect(),
        }
    }

    async fn measure(self, site: &Site, setting: usize) -> Result<Measured> {
        let missing = "find the setting";
        match self {
            Peer::Restate => {
                let setting = restate::SETTINGS.get(setting).context(missing)?;
                restate::measure(&site.target, setting, self.messages()).await
            }
            Peer::Dbos => {
                let setting = dbos::SETTINGS.get(setting).context(missing)?;
                dbos::measure(&site.target, &site.cluster, setting, self.messages()).await
            }
        }
    }

    /// Tries all settings once. Returns the index of the fastest one and the rates. A setting that
    /// loses or repeats a message has an error instead of a rate.
    async fn tune(self, site: &Site) -> Result<(usize, Vec<Value>)> {
        let (mut best, mut tried) = (None, Vec::new());
        for (index, setting) in self.settings().into_iter().enumerate() {
            let name = self.name();
            match self.measure(site, index).await {
                Ok(one) => {
                    println!(
                        "setting  {name:<10} {:>8.0} messages/s; {setting}; {}",
                        one.rate,
                        one.costs()
                    );
                    tried.push(json!({ "setting": setting, "rate": one.rate }));
                    if best.is_none_or(|(_, rate)| one.rate > rate) {
                        best = Some((index, one.rate));
                    }
                }
                Err(error) => {
                    println!("setting  {name:<10} failed: {error:#}; {setting}");
                    tried.push(json!({ "setting": setting, "error": format!("{error:#}") }));
                }
            }
        }
        let (best, _) = best.with_context(|| format!("find a setting of {}", self.name()))?;
        Ok((best, tried))
    }
}

/// A ratio with its target.
struct Ratio {
    name: &'static str,
    peer: Peer,
    at_least: f64,
}

const RATIOS: &[Ratio] = &[
    Ratio {
        name: "state_vs_restate",
        peer: Peer::Restate,
        at_least: 15.0,
    },
    Ratio {
        name: "state_vs_dbos",
        peer: Peer::Dbos,
        at_least: 15.0,
    },
];

/// The servers and programs of all measurements.
struct Site {
    cluster: Cluster,
    /// The target folder, with the programs of `scripts/install-peers`.
    target: PathBuf,
}

/// Measures the contender `state` and the peers in rotation, each peer with its best setting.
pub async fn measure(messages: usize, rounds: usize) -> Result<Value> {
    let build = guests::target_dir()?;
    let site = Site {
        cluster: tokio::task::spawn_blocking(Cluster::start_durable).await??,
        target: build.parent().context("find the target folder")?.to_owned(),
    };
    tokio::task::spawn_blocking(guests::component).await??;
    let state = contenders::by_name("state").context("find the contender")?;
    let mut tuned = BTreeMap::new();
    for peer in [Peer::Restate, Peer::Dbos] {
        tuned.insert(peer, peer.tune(&site).await?);
    }

    // Rounds
    let mut measured: BTreeMap<&str, Vec<Measured>> = BTreeMap::new();
    for round in 1..=rounds {
        let mut add = |name, one: Measured| {
            println!(
                "round {round}  {name:<10} {:>8.0} messages/s; {}",
                one.rate,
                one.costs()
            );
            measured.entry(name).or_default().push(one);
        };
        add(
            state.name,
            stage::measure(state, &site.cluster, messages).await?,
        );
        for (peer, (best, _)) in &tuned {
            let one = peer.measure(&site, *best).await;
            add(
                peer.name(),
                one.with_context(|| format!("measure {}", peer.name()))?,
            );
        }
    }

    // Report
    let rates = |name: &str| -> Vec<f64> {
        let rounds = measured.get(name).into_iter().flatten();
        rounds.map(|one| one.rate).collect()
    };
    let row = |name: &str, messages: usize| {
        let rounds = measured.get(name).into_iter().flatten();
        json!({
            "name": name, "messages": messages,
            "median": median(&rates(name)), "spread": spread(&rates(name)),
            "cpu_micros_per_message": cpu_micros(measured.get(name)),
            "rounds": rounds.map(Measured::json).collect::<Vec<_>>(),
        })
    };
    let mut rows = vec![row(state.name, messages)];
    for (peer, (best, tried)) in &tuned {
        let mut row = row(peer.name(), peer.messages());
        row["setting"] = peer.settings().swap_remove(*best);
        row["tried"] = tried.as_slice().into();
        rows.push(row);
    }
    let mut ratios = Map::new();
    for ratio in RATIOS {
        let peer = ratio.peer.name();
        let value = median(&rates(state.name)) / median(&rates(peer));
        ratios.insert(
            ratio.name.to_owned(),
            json!({
                "value": value, "what": format!("keyed state ÷ {peer}"),
                "wanted": { "at_least": ratio.at_least }, "holds": value >= ratio.at_least,
            }),
        );
    }
    print(&rows, &ratios);
    Ok(json!({ "ratios": ratios, "contenders": rows }))
}

/// The median over the rounds of the CPU time of all processes.
fn cpu_micros(rounds: Option<&Vec<Measured>>) -> f64 {
    let rounds = rounds.into_iter().flatten();
    let sums: Vec<f64> = rounds.map(|one| one.cpu_micros.values().sum()).collect();
    median(&sums)
}

/// Prints the report for people.
fn print(rows: &[Value], ratios: &Map<String, Value>) {
    println!(
        "\n{:<10} {:>10} {:>8} {:>12}",
        "", "messages/s", "spread", "µs of CPU"
    );
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        println!(
            "{:<10} {:>10.0} {:>8.2} {:>12.0}",
            row["name"].as_str().unwrap_or_default(),
            number("median"),
            number("spread"),
            number("cpu_micros_per_message")
        );
    }
    println!("\n| ratio | what | measured | target |\n|---|---|---|---|");
    for (name, ratio) in ratios {
        println!(
            "| `{name}` | {} | {:.2} | ≥ {} |",
            ratio["what"].as_str().unwrap_or_default(),
            ratio["value"].as_f64().unwrap_or_default(),
            ratio["wanted"]["at_least"]
        );
    }
}

/// Waits until `count` reaches `messages`. Polls rarely, since a count takes processor time.
async fn wait_for(messages: usize, count: impl AsyncFn() -> Result<usize>) -> Result<()> {
    let (mut seen, mut moved) = (0, Instant::now());
    while seen < messages {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let now = count().await?;
        if now != seen {
            (seen, moved) = (now, Instant::now());
        }
        ensure!(
            moved.elapsed() < PATIENCE,
            "only {seen} of {messages} outputs arrived"
        );
    }
    Ok(())
}

/// The right counter of each key.
fn expected_counters(messages: usize) -> BTreeMap<String, i64> {
    let mut counters = BTreeMap::new();
    for n in 0..messages {
        *counters.entry(format!("k{}", n % KEYS)).or_default() += 1;
    }
    counters
}
