//! The relay alone: outputs that wait in the outbox are published by a host without messages.

use anyhow::{Context, Result};
use async_nats::jetstream;
use bytes::Bytes;
use oncely::model::message::OutputKind;
use oncely::store::{Output, PostgresStore, Store};
use std::time::Duration;
use support::database::{Database, Kind};
use support::postgres::Cluster;
use support::world::{World, manifest};

use crate::stage::{stored_times, wait_for};

/// Outputs of a transaction.
const BATCH: usize = 500;

/// Outputs per second, from the first to the last of `outputs`.
pub async fn measure(cluster: &Cluster, outputs: usize) -> Result<f64> {
    // The first start creates tables and streams.
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world.database = Database::on(cluster).await?;
    world.start_host().await?;
    world.stop_host().await?;

    // Outputs without a lease.
    let store = PostgresStore::connect(&world.database.url(), 4).await?;
    let store: Store = store.into();
    for batch in (0..outputs).step_by(BATCH) {
        let waiting: Vec<Output> = (batch..outputs.min(batch + BATCH)).map(output).collect();
        let mut tx = store.begin("test", Duration::from_secs(20)).await?;
        tx.append_outputs(&waiting, Duration::ZERO).await?;
        tx.commit().await?;
    }

    // Publication
    world.spawn_host()?;
    let context = jetstream::new(world.nats.client().await?);
    let out = context.get_stream("OUT").await?;
    wait_for(&out, outputs)
        .await
        .context("wait for the outputs")?;
    let times = stored_times(&out).await?;
    let [first, last] = times[..] else {
        anyhow::bail!("no output was published")
    };
    let rate = outputs as f64 / (last - first).as_seconds_f64();
    println!("relay alone: {rate:.0} outputs/s");
    Ok(rate)
}

fn output(number: usize) -> Output {
    let key = format!("k{}", number % 1_000);
    let body = format!(r#"{{"key":"{key}","value":{number},"version":{number}}}"#);
    Output {
        kind: OutputKind::Derived,
        id: format!("test:e{number}:0"),
        event_id: format!("e{number}"),
        ordinal: 0,
        subject: "out.state".to_owned(),
        headers: Vec::new(),
        body: Bytes::from(body),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}
