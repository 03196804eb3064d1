//! Scenarios that hold in both relay modes. `relay.rs` and `repair.rs` run them with the poller,
//! `wal.rs` in WAL mode.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::counting::{check_order, count, counting_messages, published_values};
use support::database::Kind;
use support::production::RunningHost;
use support::proxy::{Cut, Proxy};
use support::world::{World, manifest};

pub const IN_WAL_MODE: &str = "select count(*) from oncely.relay where mode = 'wal'";
const READERS: &str =
    "select count(*) from pg_replication_slots where database = current_database() and active";

/// The relay mode of a scenario's hosts.
#[derive(Debug, Clone, Copy)]
pub enum RelayMode {
    Poll(Kind),
    /// On PostgreSQL.
    Wal,
}

impl RelayMode {
    /// A world whose hosts request this mode; `settings` are those of the worker.
    pub async fn world(self, settings: &str) -> Result<World> {
        let kind = match self {
            RelayMode::Poll(kind) => kind,
            RelayMode::Wal => Kind::Postgres,
        };
        let mut world = World::without_host(kind, &manifest(settings)?).await?;
        if matches!(self, RelayMode::Wal) {
            world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
        }
        Ok(world)
    }

    /// Starts the host and waits until the outputs are relayed in this mode.
    pub async fn start(self, world: &mut World) -> Result<()> {
        world.start_host().await?;
        self.until_active(world).await
    }

    /// Waits until the outputs are relayed in this mode: in WAL mode, until a host reads the WAL.
    async fn until_active(self, world: &World) -> Result<()> {
        if matches!(self, RelayMode::Wal) {
            world.until(IN_WAL_MODE, 1).await?;
            world.until(READERS, 1).await?;
        }
        Ok(())
    }
}

/// The outputs of a key keep their order although publications are cut and the broker is down for
/// the time of `outage`.
pub async fn order_when_the_broker_dies(
    mode: RelayMode,
    settings: &str,
    outage: Duration,
) -> Result<()> {
    let mut world = mode.world(settings).await?;
    let proxy = Proxy::start(world.nats.port()).await?;
    world.nats_url = format!("nats://127.0.0.1:{}", proxy.port());
    mode.start(&mut world).await?;
    let count = 900;
    for part in 0..6 {
        world
            .nats
            .publish_all(counting_messages(part * count / 6, (part + 1) * count / 6))
            .await?;
        let cut = if part % 2 == 0 {
            Cut::OutputsNotForwarded
        } else {
            Cut::OutputAnswersLost
        };
        ensure!(
            proxy.cut(cut, Duration::from_secs(20)).await,
            "no publication could be cut"
        );
    }
    world.nats.kill()?;
    tokio::time::sleep(outage).await;
    world.nats.restart().await?;
    world.quiet(count as i64).await?;
    check_order(&world, count).await
}

/// The outputs of a key keep their order although the only host is killed repeatedly under load.
pub async fn order_when_the_host_is_killed(mode: RelayMode, settings: &str) -> Result<()> {
    let mut world = mode.world(settings).await?;
    mode.start(&mut world).await?;
    let count = 900;
    world.nats.publish_all(counting_messages(0, count)).await?;
    for round in 1..=3 {
        let enough = round * 150 + 1;
        world
            .until_at_least("select count(*) from oncely.inbox", enough)
            .await?;
        world.kill_host()?;
        world.start_host().await?;
    }
    world.quiet(count as i64).await?;
    check_order(&world, count).await
}

/// The outputs of a key keep their order although two hosts commit them alternately, and one host,
/// in WAL mode the reader, is killed under load.
pub async fn order_across_hosts(mode: RelayMode, settings: &str) -> Result<()> {
    let world = mode.world(settings).await?;
    let one = RunningHost::start(&world, "one").await?;
    mode.until_active(&world).await?;
    let mut two = RunningHost::start(&world, "two").await?;
    let path = world.folder.path().join("oncely.toml");
    one.oncely(&[
        "deploy",
        path.to_str().context("convert the manifest path")?,
    ])?;
    two.until_version(1).await?;
    two.ready().await?;

    // Both hosts handle messages.
    let count = 600;
    world
        .nats
        .publish_all(counting_messages(0, count / 2))
        .await?;
    world.quiet(count as i64 / 2).await?;
    assert!(
        one.handled()? > 0 && two.handled()? > 0,
        "only one host handled messages"
    );

    // Kill the first one under load
    world
        .nats
        .publish_all(counting_messages(count / 2, count))
        .await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 351)
        .await?;
    drop(one);
    let killed = Instant::now();
    mode.until_active(&world).await?;
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "taken over after {:?}",
        killed.elapsed()
    );
    world.quiet(count as i64).await?;
    check_order(&world, count).await
}

/// A world whose output stream accepts at most 300 bytes. An oversized output is parked. It blocks
/// three outputs of its key and none of the other key.
pub async fn world_with_parked_output(mode: RelayMode) -> Result<World> {
    let mut world = mode.world("concurrency = 1").await?;
    world.nats.make_narrow_stream("OUT", "out.>", 300).await?;
    mode.start(&mut world).await?;
    let large = [
        count(0, "held", 0),
        count(1, "held", 600),
        count(2, "held", 0),
        count(3, "free", 0),
    ];
    world.nats.publish_all(large.to_vec()).await?;
    world
        .until(
            "select count(*) from oncely.outbox where parked_at is not null",
            1,
        )
        .await?;
    world
        .nats
        .publish_all(
            (4..8)
                .map(|n| count(n, ["held", "free"][n % 2], 0))
                .collect(),
        )
        .await?;
    world.until("select count(*) from oncely.inbox", 8).await?;

    // Three outputs of the other key are published, and the first one of this key.
    world
        .until(world.database.unpublished_except_alarms(), 4)
        .await?;
    let published = published_values(&world).await?;
    assert_eq!(
        (published["held"].clone(), published["free"].clone()),
        (vec![1], vec![1, 2, 3])
    );
    Ok(world)
}

/// Makes the output stream of [`world_with_parked_output`] accept the parked output, and retries
/// it.
pub async fn publish_parked_output(world: &World) -> Result<()> {
    world.nats.make_narrow_stream("OUT", "out.>", 3_000).await?;
    world
        .oncely(&["outbox", "retry", "--all", "--worker", "test"])
        .await?;
    world.quiet(8).await?;
    check_order(world, 8).await
}

/// The output stream loses its last 150 messages, as after a restored backup or a power cut. They
/// are published again, and the relay continues. Returns the world for further checks.
pub async fn lost_outputs_are_published_again(mode: RelayMode, settings: &str) -> Result<World> {
    let mut world = mode.world(settings).await?;
    mode.start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 100)).await?;
    world.quiet(100).await?;
    world.nats.kill()?;
    world.nats.copy_stream("OUT")?;
    world.nats.restart().await?;
    world.nats.publish_all(counting_messages(100, 250)).await?;
    world.quiet(250).await?;
    let before = output_ids(&world).await?;
    assert_eq!(before.len(), 250);

    // Restore the older store
    world.nats.kill()?;
    world.nats.roll_back_stream("OUT")?;
    world.nats.restart().await?;
    let after = until_stored(&world, 250).await?;
    assert_eq!(
        after.iter().collect::<BTreeSet<_>>(),
        before.iter().collect()
    );
    check_order(&world, 250).await?;

    // The relay continues.
    world.nats.publish_all(counting_messages(250, 260)).await?;
    world.quiet(260).await?;
    until_stored(&world, 260).await?;
    Ok(world)
}

/// The ids on the output stream, in order.
pub async fn output_ids(world: &World) -> Result<Vec<String>> {
    let stored = world.nats.read_stream("OUT").await?;
    stored
        .iter()
        .map(|message| {
            Ok(message
                .headers
                .get("Nats-Msg-Id")
                .context("read the id")?
                .clone())
        })
        .collect()
}

/// Waits until the output stream holds `count` messages and no output is unpublished.
pub async fn until_stored(world: &World, count: usize) -> Result<Vec<String>> {
    let ids = world
        .eventually(format!("OUT has {count} messages"), || async {
            let ids = output_ids(world).await?;
            ensure!(ids.len() == count, "it has {}", ids.len());
            Ok(Some(ids))
        })
        .await?;
    world.until(world.database.unpublished(), 0).await?;
    assert_eq!(
        ids.iter().collect::<BTreeSet<_>>().len(),
        count,
        "an output is on the stream twice"
    );
    Ok(ids)
}
