//! Messages per second of all contenders, in rotation.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use support::guests;
use support::postgres::Cluster;

use crate::contenders::{CONTENDERS, Contender};
use crate::stage::{self, Measured};
use crate::statistics::{median, spread};

/// Measures the contenders whose name contains `only`, and their baselines, `rounds` times each.
pub async fn measure(
    cluster: &Cluster,
    messages: usize,
    rounds: usize,
    only: Option<&str>,
) -> Result<Value> {
    tokio::task::spawn_blocking(guests::component).await??;
    tokio::task::spawn_blocking(guests::batch_component).await??;
    let selected = selected(only);
    let mut measured: BTreeMap<&str, Vec<Measured>> = BTreeMap::new();
    for round in 1..=rounds {
        for contender in &selected {
            let name = contender.name;
            let one = stage::measure(contender, cluster, messages)
                .await
                .with_context(|| format!("measure {name}"))?;
            println!(
                "round {round}  {name:<28} {:>8.0} messages/s; {}",
                one.rate,
                one.costs()
            );
            measured.entry(name).or_default().push(one);
        }
    }

    // Table and report
    println!(
        "\n{:<28} {:>10} {:>8} {:>8}  compared with",
        "", "messages/s", "spread", "ratio"
    );
    let none = Vec::new();
    let rates = |name: &str| -> Vec<f64> {
        let rounds = measured.get(name).unwrap_or(&none);
        rounds.iter().map(|one| one.rate).collect()
    };
    let mut rows = Vec::new();
    for contender in &selected {
        let name = contender.name;
        let rate = median(&rates(name));
        let baseline = contender.baseline.unwrap_or_default();
        let ratio = contender
            .baseline
            .map(|baseline| rate / median(&rates(baseline)));
        let shown = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let spread = spread(&rates(name));
        println!("{name:<28} {rate:>10.0} {spread:>8.2} {shown:>8}  {baseline}");
        let rounds = measured.get(name).unwrap_or(&none);
        rows.push(json!({
            "name": name, "description": contender.description, "median": rate, "spread": spread,
            "baseline": contender.baseline, "ratio": ratio,
            "rounds": rounds.iter().map(Measured::json).collect::<Vec<_>>(),
        }));
    }
    Ok(json!({ "messages": messages, "contenders": rows }))
}

/// The contenders to measure, with their baselines, in the order of the table.
fn selected(only: Option<&str>) -> Vec<&'static Contender> {
    let matches_only =
        |contender: &Contender| only.is_none_or(|part| contender.name.contains(part));
    let baselines: Vec<&str> = CONTENDERS
        .iter()
        .filter(|contender| matches_only(contender))
        .filter_map(|contender| contender.baseline)
        .collect();
    CONTENDERS
        .iter()
        .filter(|contender| matches_only(contender) || baselines.contains(&contender.name))
        .collect()
}
