//! The time from a message on the input stream to its output on the output stream, at a steady
//! rate. Both times are those of the broker.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream;
use jiff::Timestamp;
use serde_json::{Value, json};
use support::nats::Stored;
use support::postgres::Cluster;
use support::world::World;

use crate::contenders::{Contender, by_name};
use crate::stage::{self, message, wait_for};
use crate::statistics::percentile;

/// How long messages are published.
const TIME: Duration = Duration::from_secs(8);

/// Messages of the first seconds are left out.
const WARM_UP: Duration = Duration::from_secs(2);

/// Interval of publishing.
const TICK: Duration = Duration::from_millis(2);

/// Measures the worker and the hand-written loop at shares of their maximum rates, and the worker
/// at half of the loop's maximum.
pub async fn measure(cluster: &Cluster, worker: f64, by_hand: f64) -> Result<Value> {
    let mut rows = Vec::new();
    let rates = [
        ("state, by hand", "50 %", by_hand * 0.5),
        ("state, by hand", "80 %", by_hand * 0.8),
        ("state", "50 % of the loop", by_hand * 0.5),
        ("state", "50 %", worker * 0.5),
        ("state", "80 %", worker * 0.8),
    ];
    for (name, load, rate) in rates {
        let contender = by_name(name).context("find the contender")?;
        let times = at_rate(contender, cluster, rate)
            .await
            .with_context(|| format!("measure {name} at {rate:.0} messages/s"))?;
        let (p50, p99) = (percentile(&times, 0.5), percentile(&times, 0.99));
        println!("{name:<16} {load:<18} {rate:>7.0} messages/s: p50 {p50:.1} ms, p99 {p99:.1} ms");
        rows.push(json!({
            "name": name, "load": load, "rate": rate, "p50_ms": p50, "p99_ms": p99,
        }));
    }
    Ok(Value::Array(rows))
}

/// Milliseconds of each message after the warm-up.
async fn at_rate(contender: &Contender, cluster: &Cluster, rate: f64) -> Result<Vec<f64>> {
    let mut world = stage::prepare(contender, cluster).await?;
    let tasks = stage::start(contender, &mut world).await?;
    let published = publish(contender, &world, rate).await?;
    let context = jetstream::new(world.nats.client().await?);
    wait_for(&context.get_stream("OUT").await?, published)
        .await
        .context("wait for the outputs")?;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);

    // Compare the times of the broker.
    let inputs = world.nats.read_stream("IN").await?;
    let begin = inputs.first().context("find the first message")?.stored_at;
    let stored: HashMap<String, Timestamp> = inputs
        .into_iter()
        .filter(|input| seconds(begin, input.stored_at) > WARM_UP.as_secs_f64())
        .filter_map(|input| Some((input.headers.get("ce-id")?.clone(), input.stored_at)))
        .collect();
    let outputs = world.nats.read_stream("OUT").await?;
    let times: Vec<f64> = outputs
        .iter()
        .filter_map(|output| {
            let input = stored.get(event_of(output)?)?;
            Some(seconds(*input, output.stored_at) * 1e3)
        })
        .collect();
    ensure!(times.len() == stored.len(), "an output has no input");
    Ok(times)
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

/// The event of an output, from its readable id `WORKER:EVENT:NUMBER`.
fn event_of(output: &Stored) -> Option<&str> {
    let id = output
        .headers
        .get("Oncely-Output-Id")
        .or_else(|| output.headers.get("Nats-Msg-Id"))?;
    id.split(':').nth(1)
}

/// Publishes at a steady rate. Returns the number of messages.
async fn publish(contender: &Contender, world: &World, rate: f64) -> Result<usize> {
    let client = world.nats.client().await?;
    let began = Instant::now();
    let mut ticks = tokio::time::interval(TICK);
    let mut published = 0;
    while began.elapsed() < TIME {
        ticks.tick().await;
        let due = (began.elapsed().as_secs_f64() * rate) as usize;
        while published < due {
            let message = message(contender, published);
            let mut headers = HeaderMap::new();
            for (name, value) in &message.headers {
                headers.append(name.as_str(), value.parse::<async_nats::HeaderValue>()?);
            }
            client
                .publish_with_headers(message.subject, headers, message.body.into())
                .await?;
            published += 1;
        }
    }
    client.flush().await?;
    Ok(published)
}
