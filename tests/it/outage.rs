//! Outages of the broker and the database: no host dies, and no message is charged an attempt.

use std::time::Duration;

use anyhow::Result;
use support::books;
use support::database::{Database, Kind};
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::world::{World, manifest};

/// The length of an outage; `ONCELY_TEST_OUTAGE` sets it, in seconds.
fn outage() -> Duration {
    let seconds = std::env::var("ONCELY_TEST_OUTAGE")
        .ok()
        .and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(5))
}

fn workload(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| {
            NewMessage::new(
                "in.x",
                &format!("e{n}"),
                "insert,slow",
                r#"{"n": 1, "ms": 2}"#,
            )
        })
        .collect()
}

const SETTINGS: &str = "ack_wait = \"2s\"\nbatch = 8";

both!(
    a_nats_outage_loses_nothing_and_costs_no_attempt,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest(SETTINGS)?).await?;
        world.nats.publish_all(workload(0, 300)).await?;
        world
            .until_at_least("select count(*) from oncely.inbox", 1)
            .await?;
        world.nats.kill()?;
        tokio::time::sleep(outage()).await;
        assert!(world.is_host_running());
        world.nats.restart().await?;
        world.nats.publish_all(workload(300, 400)).await?;
        world.quiet(400).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs, books.dead.len()),
            (400, 400, 0)
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt")
                .await?,
            0
        );
        world.ready().await
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_outage_loses_nothing_and_costs_no_attempt() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let mut world = World::without_host(Kind::Sqlite, &manifest(SETTINGS)?).await?;
    world.database = Database::on(&cluster).await?;
    world.start_host().await?;
    world.nats.publish_all(workload(0, 300)).await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 1)
        .await?;
    cluster.stop()?;
    tokio::time::sleep(outage()).await;
    assert!(world.is_host_running());
    let unready = world.oncely_json(&["status", "--json"]).await?;
    assert_eq!(unready.get("ready"), Some(&serde_json::Value::Bool(false)));
    cluster.start_again()?;
    world.nats.publish_all(workload(300, 400)).await?;
    world.quiet(400).await?;
    let books = books::check(&world).await?;
    assert_eq!(
        (books.effects.len(), books.outputs, books.dead.len()),
        (400, 400, 0)
    );
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.attempt")
            .await?,
        0
    );
    world.ready().await
}
