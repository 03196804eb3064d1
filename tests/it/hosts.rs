//! Several hosts on one database, as in production, directly and behind a pooler.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{QUICK_RETRIES, World, manifest};

fn workload(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .flat_map(|n| {
            let message = move || {
                NewMessage::new(
                    "in.x",
                    &format!("e{n}"),
                    "insert,slow",
                    r#"{"n": 1, "ms": 1}"#,
                )
            };
            let copies = if n % 10 == 0 { 2 } else { 1 };
            std::iter::repeat_with(message).take(copies)
        })
        .collect()
}

/// Two hosts share the work. A deployment through one host runs on both. One host is killed, and
/// the other continues.
async fn two_hosts(kind: Kind) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let settings = format!("ack_wait = \"2s\"\nbatch = 4\nconcurrency = 2\n{QUICK_RETRIES}");
    let world = World::without_host(kind, &manifest(&settings)?).await?;
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let one = RunningHost::start(&world, &format!("one{number}")).await?;
    let mut two = RunningHost::start(&world, &format!("two{number}")).await?;
    let path = world.folder.path().join("oncely.toml");
    let path = path.to_str().context("convert the manifest path")?;

    assert_eq!(
        one.oncely(&["deploy", path])?.trim(),
        "worker test version 1 is active on 2 hosts"
    );
    one.until_version(1).await?;
    two.until_version(1).await?;
    two.ready().await?;

    world.nats.publish_all(workload(0, 600)).await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 1)
        .await?;
    std::fs::write(
        path,
        manifest(&format!("{settings}\n[worker.config]\nlabel = \"two\""))?,
    )?;
    assert_eq!(
        two.oncely(&["deploy", path])?.trim(),
        "worker test version 2 is active on 2 hosts"
    );
    one.until_version(2).await?;
    two.until_version(2).await?;
    world.quiet(600).await?;
    assert!(
        one.handled()? > 0 && two.handled()? > 0,
        "only one host handled messages"
    );

    world.nats.publish_all(workload(600, 900)).await?;
    drop(one);
    world.quiet(900).await?;
    let books = books::check(&world).await?;
    assert_eq!(
        (books.effects.len(), books.outputs, books.dead.len()),
        (900, 900, 0)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_share_the_work_on_postgres() -> Result<()> {
    two_hosts(Kind::Postgres).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_share_the_work_behind_pgbouncer() -> Result<()> {
    two_hosts(Kind::Pgbouncer).await
}

/// A host with no more NATS permissions than documented.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_nats_permissions_are_enough() -> Result<()> {
    let document =
        std::fs::read_to_string(support::guests::repository().join("docs/operations.md"))?;
    let (_, rest) = document
        .split_once("\npermissions: {")
        .context("find the permissions in docs/operations.md")?;
    let (permissions, _) = rest
        .split_once("\n```")
        .context("find the end of the permissions")?;
    let permissions = permissions.replace("\"payments.>\"", "\"in.>\", \"out.>\"");
    let users = format!(
        "authorization {{ users: [ {{ user: admin, password: secret }}
           {{ user: host, password: secret, permissions: {{{permissions} }} ] }}"
    );
    let admin =
        async_nats::ConnectOptions::with_user_and_password("admin".to_owned(), "secret".to_owned());
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world.nats = support::nats::NatsServer::start_secured(&users, admin).await?;
    world.nats_url = world.nats.url().replace("nats://", "nats://host:secret@");
    world.start_host().await?;
    world
        .nats
        .publish_all((0..5).map(NewMessage::insert).collect())
        .await?;
    world
        .nats
        .publish_all(vec![NewMessage::new("in.x", "dead", "reject", "{}")])
        .await?;
    world.quiet(6).await?;
    let id = world
        .database
        .number("select id from oncely.dead_letter")
        .await?;
    world.oncely(&["dlq", "redrive", &id.to_string()]).await?;
    world
        .until(
            "select count(*) from oncely.dead_letter where state = 'open' and generation = 1",
            1,
        )
        .await?;
    world
        .until_at_least("select count(*) from oncely.watermark where stream_sequence is not null and broker_state like '%test%'", 1)
        .await?;
    world.stop_host().await?;
    world.start_host().await?;
    let log = world.host_log();
    anyhow::ensure!(!log.contains("Permissions Violation"), "{log}");
    Ok(())
}
