//! Takeovers from frozen, vanished and killed hosts: within seconds, independent of handler limits.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use support::database::{Database, Kind};
use support::eventually::eventually;
use support::nats::NewMessage;
use support::postgres;
use support::production::RunningHost;
use support::proxy::Proxy;
use support::world::{World, manifest, signal};

/// Maximum length of a takeover.
const TAKEOVER: Duration = Duration::from_secs(15);

/// Handlers may run for an hour.
const SETTINGS: &str = "concurrency = 2\n[worker.limits]\ntime = \"1h\"\n";

/// Run time of the handler that blocks the others.
const SLOW_MS: u64 = 6_000;

/// A message whose handler locks the one hot row and then sleeps.
fn hot(event_id: &str, ms: u64) -> NewMessage {
    let sql = "insert into balance values ('hot', 1) on conflict (account) do update set amount = balance.amount + 1";
    NewMessage::new(
        "in.x",
        event_id,
        "sql_text,sleep",
        &serde_json::json!({ "sql": sql, "sleep_ms": ms }).to_string(),
    )
}

/// Loses the first of two hosts, by `lose`, in a transaction that holds a hot row. Checks that the
/// other host handles everything in time, and returns the lost host.
async fn lose_a_host(
    world: &mut World,
    lose: impl FnOnce(&RunningHost) -> Result<()>,
) -> Result<RunningHost> {
    let lost = RunningHost::start(world, "lost").await?;
    world.host_env.clear();
    let path = world.folder.path().join("oncely.toml");
    lost.oncely(&["deploy", &path.display().to_string()])?;
    lost.until_version(1).await?;

    // This host compiles the component, so that its next start is fast.
    let other = RunningHost::start(world, "other").await?;
    other.until_version(1).await?;
    drop(other);
    world.nats.publish_all(vec![hot("first", SLOW_MS)]).await?;
    let is_open = "select count(*) from pg_stat_activity where state = 'idle in transaction' and datname = current_database() \
                   and application_name like 'oncely guests%'";
    world.until(is_open, 1).await.with_context(|| lost.log())?;
    let other = RunningHost::start(world, "other").await?;
    lose(&lost)?;
    let lost_at = Instant::now();
    assert_eq!(
        world.database.number(is_open).await?,
        1,
        "the handler ended before its host was lost"
    );

    world
        .nats
        .publish_all((0..5).map(|n| hot(&format!("later{n}"), 10)).collect())
        .await?;

    // Waits for the row lock.
    world
        .database
        .execute(
            "begin; insert into app.balance values ('hot', 0) on conflict do nothing; rollback",
        )
        .await?;
    let locks = lost_at.elapsed();
    world.quiet(6).await?;

    // The blocking handler runs once more.
    let messages = lost_at
        .elapsed()
        .saturating_sub(Duration::from_millis(SLOW_MS));
    println!("locks were taken over after {locks:?}, messages after {messages:?}");
    assert!(
        locks < TAKEOVER && messages < TAKEOVER,
        "{locks:?}, {messages:?}\n{}",
        other.log()
    );
    drop(other);
    Ok(lost)
}

/// Checks that the lost host is ready again, and that every message in flight took effect once.
async fn check(world: &World, mut back: RunningHost) -> Result<()> {
    world
        .nats
        .publish_all((0..5).map(|n| hot(&format!("last{n}"), 10)).collect())
        .await?;
    world.quiet(11).await?;
    back.ready().await?;
    assert_eq!(
        world
            .database
            .number("select amount from app.balance")
            .await?,
        11,
        "{}",
        back.log()
    );
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.attempt")
            .await?,
        0,
        "an attempt was counted"
    );
    assert_eq!(world.nats.read_stream("OUT").await?.len(), 11);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_host_blocks_nothing_for_more_than_15_seconds() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest(SETTINGS)?).await?;
    let frozen = lose_a_host(&mut world, |host| signal(host.pid(), "STOP")).await?;
    signal(frozen.pid(), "CONT")?;
    check(&world, frozen).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vanished_host_blocks_nothing_for_more_than_15_seconds() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest(SETTINGS)?).await?;
    let (to_database, to_nats) = (
        Proxy::start(postgres::shared().port()).await?,
        Proxy::start(world.nats.port()).await?,
    );
    let direct = format!(":{}/", postgres::shared().port());
    world.host_env = vec![
        (
            "ONCELY_DATABASE".to_owned(),
            world
                .database
                .url()
                .replace(&direct, &format!(":{}/", to_database.port())),
        ),
        (
            "ONCELY_NATS".to_owned(),
            format!("nats://127.0.0.1:{}", to_nats.port()),
        ),
    ];
    let vanish = |vanished: bool| {
        to_database.set_blackhole(vanished);
        to_nats.set_blackhole(vanished);
    };
    let vanished = lose_a_host(&mut world, |_| {
        vanish(true);
        Ok(())
    })
    .await?;
    vanish(false);
    check(&world, vanished).await
}

// Committed outputs of a killed host are published by another host as soon as its lease has
// expired.
both!(
    outputs_of_a_killed_host_are_published_in_seconds,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("")?).await?;
        let to_nats = Proxy::start(world.nats.port()).await?;
        world.nats_url = format!("nats://127.0.0.1:{}", to_nats.port());
        world.start_host().await?;
        let message = NewMessage::new("in.x", "e1", "slow,emit", r#"{"ms": 500, "n": 3}"#);
        world.nats.publish_all(vec![message]).await?;
        let client = async_nats::jetstream::new(world.nats.client().await?);
        let stream = client.get_stream("IN").await?;
        eventually("the host handles the message", || async {
            let consumer = stream.consumer_info("oncely-test").await?;
            Ok((consumer.num_ack_pending > 0).then_some(()))
        })
        .await?;
        to_nats.set_blackhole(true);
        world.until("select count(*) from oncely.inbox", 1).await?;
        world.kill_host()?;
        assert_eq!(
            world.database.number(world.database.unpublished()).await?,
            3
        );

        let killed_at = Instant::now();
        world.nats_url = world.nats.url();
        world.start_host().await?;
        world.quiet(1).await?;
        let took = killed_at.elapsed();
        println!("published after {took:?}");
        let most = if matches!(world.database, Database::Sqlite(_)) {
            8
        } else {
            12
        };
        assert!(
            took < Duration::from_secs(most),
            "{took:?}\n{}",
            world.host_log()
        );
        assert_eq!(world.nats.read_stream("OUT").await?.len(), 3);
        Ok(())
    }
);
