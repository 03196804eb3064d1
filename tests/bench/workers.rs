//! A thousand workers on one host that do nothing: its memory for each, and its start.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use support::database::{Database, Kind};
use support::guests;
use support::postgres::Cluster;
use support::world::World;

use crate::cpu::resident_kib;

const WORKERS: usize = 1_000;

/// Measures the resident memory of a host with one worker and with a thousand.
pub async fn measure(cluster: &Cluster) -> Result<Value> {
    let (one, _) = idle(cluster, 1).await?;
    let (many, seconds) = idle(cluster, WORKERS).await?;
    let each = (many - one) / (WORKERS - 1) as f64;
    println!("{WORKERS} workers: {each:.0} KiB each; start from the cache {seconds:.1} s");
    Ok(json!({
        "workers": WORKERS, "kib_of_one": one, "kib_of_all": many, "kib_each": each, "start_seconds": seconds,
    }))
}

/// The resident memory in KiB of a host with idle workers, and the seconds of its second start.
async fn idle(cluster: &Cluster, workers: usize) -> Result<(f64, f64)> {
    let component = tokio::task::spawn_blocking(guests::component).await??;
    let mut manifest = "[[stream]]\nname = \"IN\"\nsubjects = [\"in.>\"]\n".to_owned();
    for number in 0..workers {
        manifest += &format!(
            "[[worker]]\nname = \"w{number}\"\ncomponent = \"{}\"\nstream = \"IN\"\nsubjects = [\"in.{number}\"]\n",
            component.display()
        );
    }
    let mut world = World::without_host(Kind::Sqlite, &manifest).await?;
    world.database = Database::on(cluster).await?;
    world.start_host().await?;
    world.stop_host().await?;
    let began = Instant::now();
    world.start_host().await?;
    let seconds = began.elapsed().as_secs_f64();
    let memory = resident_kib(world.host_pid().context("find the host")?)?;
    world.stop_host().await?;
    Ok((memory, seconds))
}
