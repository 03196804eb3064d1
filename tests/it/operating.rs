//! The operator's view is true: active versions run, ready hosts work, retired workers are gone.
//!
//! A worker that cannot run reports why and does not affect others.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, ConsumerLimits, RetentionPolicy};
use support::books;
use support::database::Kind;
use support::eventually::eventually;
use support::guests;
use support::nats::{NatsServer, NewMessage};
use support::postgres::Cluster;
use support::server::free_port;
use support::world::{PATIENCE, World, manifest, signal};

/// The manifest of a worker `other` beside `test`, on its own stream.
fn other(stream: &str) -> Result<String> {
    let text = manifest("")?.replace("name = \"test\"", "name = \"other\"");
    let (_, worker) = text.split_once("[[worker]]").context("find the worker")?;
    // The tables belong to the first worker.
    let lines: Vec<&str> = worker
        .lines()
        .filter(|line| !line.starts_with("migrations"))
        .collect();
    let worker = lines.join("\n");
    Ok(format!(
        "[[worker]]{}",
        worker.replace("stream = \"IN\"", &format!("stream = \"{stream}\""))
    ))
}

async fn jetstream_of(world: &World) -> Result<jetstream::Context> {
    Ok(jetstream::new(world.nats.client().await?))
}

async fn deploy(world: &World, manifest: &str) -> Result<String> {
    std::fs::write(world.folder.path().join("other.toml"), manifest).context("write a manifest")?;
    world.oncely(&["deploy", "other.toml"]).await
}

/// Waits until the status contains this text, and returns the time that took.
async fn until_status(world: &World, wanted: &str) -> Result<Duration> {
    let began = Instant::now();
    loop {
        let status = world.oncely(&["status"]).await?;
        if status.contains(wanted) {
            return Ok(began.elapsed());
        }
        ensure!(
            began.elapsed() < PATIENCE,
            "no `{wanted}` in:\n{status}\n{}",
            world.host_log()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Maximum delay until a failure is reported.
const REPORTED_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_whose_consumer_is_refused_is_not_active() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let jetstream = jetstream_of(&world).await?;

    // A work queue with a rival consumer, and a stream that removes idle consumers
    let stream = |name: &str, subject: &str| Config {
        name: name.to_owned(),
        subjects: vec![subject.to_owned()],
        ..Config::default()
    };
    let queue = Config {
        retention: RetentionPolicy::WorkQueue,
        ..stream("QUEUE", "queue.>")
    };
    let queue = jetstream.create_stream(queue).await?;
    let rival = jetstream::consumer::pull::Config {
        durable_name: Some("rival".to_owned()),
        filter_subject: "queue.a.>".to_owned(),
        ..Default::default()
    };
    queue.create_consumer(rival).await?;
    let limits = ConsumerLimits {
        inactive_threshold: Duration::from_secs(60),
        ..ConsumerLimits::default()
    };
    let forgetful = Config {
        consumer_limits: Some(limits),
        ..stream("FORGETFUL", "forgetful.>")
    };
    jetstream.create_stream(forgetful).await?;

    // A work queue that has all the consumers it allows
    let full = Config {
        retention: RetentionPolicy::WorkQueue,
        max_consumers: 1,
        ..stream("FULL", "full.>")
    };
    let full = jetstream.create_stream(full).await?;
    let only = jetstream::consumer::pull::Config {
        durable_name: Some("only".to_owned()),
        filter_subject: "full.a".to_owned(),
        ..Default::default()
    };
    full.create_consumer(only).await?;

    // All are refused, and nothing is deployed.
    let refused = deploy(&world, &other("QUEUE")?)
        .await
        .unwrap_err()
        .to_string();
    ensure!(
        refused.contains("work queue") && refused.contains("rival takes queue.a.>"),
        "{refused}"
    );
    ensure!(refused.contains("hint: use subjects"), "{refused}");
    let refused = deploy(&world, &other("FORGETFUL")?)
        .await
        .unwrap_err()
        .to_string();
    ensure!(refused.contains("removes idle consumers"), "{refused}");
    let beside = |queue: &str, subject: &str| -> Result<String> {
        Ok(other(queue)?.replace(
            &format!("stream = \"{queue}\""),
            &format!("stream = \"{queue}\"\nsubjects = [\"{subject}\"]"),
        ))
    };
    let refused = deploy(&world, &beside("FULL", "full.b")?)
        .await
        .unwrap_err()
        .to_string();
    ensure!(refused.contains("consumers limit"), "{refused}");
    let workers = world.oncely(&["workers"]).await?;
    ensure!(
        !workers.contains("other"),
        "the worker was deployed: {workers}"
    );
    ensure!(
        world.oncely(&["status"]).await?.contains("ready: yes"),
        "the host is not ready"
    );

    // The rival consumes one subject; others are free.
    assert_eq!(
        deploy(&world, &beside("QUEUE", "queue.b")?).await?.trim(),
        "worker other version 1 is active"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_respects_the_consumer_limits_of_its_stream() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let jetstream = jetstream_of(&world).await?;
    let limits = ConsumerLimits {
        max_ack_pending: 100,
        ..ConsumerLimits::default()
    };
    let config = Config {
        name: "NARROW".to_owned(),
        subjects: vec!["narrow.>".to_owned()],
        consumer_limits: Some(limits),
        ..Config::default()
    };
    let stream = jetstream.create_stream(config).await?;
    assert_eq!(
        deploy(&world, &other("NARROW")?).await?.trim(),
        "worker other version 1 is active"
    );
    let info = stream.consumer_info("oncely-other").await?;
    ensure!(
        (1..=100).contains(&info.config.max_ack_pending),
        "{}",
        info.config.max_ack_pending
    );
    let messages = (0..150)
        .map(|n| NewMessage::new("narrow.x", &format!("n{n}"), "insert", r#"{"n": 1}"#))
        .collect();
    world.nats.publish_all(messages).await?;
    world.quiet(150).await
}

/// The version in an output of `version`, if its event id has this prefix.
fn version_of(body: &[u8], prefix: &str) -> Option<u64> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    body["id"].as_str().filter(|id| id.starts_with(prefix))?;
    body["version"].as_u64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_reported_active_handles_the_next_message() -> Result<()> {
    let labelled = |label: &str| manifest(&format!("[worker.config]\nlabel = \"{label}\""));
    let mut world = World::start(Kind::Postgres, &labelled("0")?).await?;
    let mut rival = world.spawn_rival_directly()?;
    world
        .until("select count(*) from oncely.host_report", 2)
        .await?;
    for n in 1..=3_u64 {
        let printed = deploy(&world, &labelled(&n.to_string())?).await?;
        ensure!(
            printed.contains(&format!(
                "worker test version {} is active on 2 hosts",
                n + 1
            )),
            "{printed}"
        );
        let messages = (0..20).map(|m| {
            NewMessage::new(
                "in.x",
                &format!("e{n}-{m}"),
                "insert,version",
                r#"{"n": 1}"#,
            )
        });
        world.nats.publish_all(messages.collect()).await?;
        world.quiet(n as i64 * 20).await?;
        let outputs = world.nats.read_stream("OUT").await?;
        let by: Vec<u64> = outputs
            .iter()
            .filter_map(|output| version_of(&output.body, &format!("test:e{n}-")))
            .collect();
        assert_eq!(by, [n + 1; 20], "an older version handled a later message");
    }
    rival.kill()?;
    rival.wait()?;
    world.stop_host().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_stream_is_reported_and_other_workers_continue() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let jetstream = jetstream_of(&world).await?;
    let config = Config {
        name: "THEIRS".to_owned(),
        subjects: vec!["theirs.>".to_owned()],
        ..Config::default()
    };
    jetstream.create_stream(config.clone()).await?;
    deploy(&world, &other("THEIRS")?).await?;
    jetstream.delete_stream("THEIRS").await?;
    let elapsed = until_status(
        &world,
        "yes, but worker other cannot run: the stream THEIRS does not exist",
    )
    .await?;
    ensure!(elapsed < REPORTED_WITHIN, "{elapsed:?}");
    let elapsed = until_status(&world, "cannot-run").await?;
    ensure!(elapsed < REPORTED_WITHIN, "{elapsed:?}");
    world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
    world.until("select count(*) from oncely.inbox", 1).await?;

    // Without the stream of the last running worker the host is not ready.
    jetstream.delete_stream("IN").await?;
    let why = world.not_ready("the stream IN does not exist").await?;
    ensure!(why.contains("the stream THEIRS does not exist"), "{why}");
    jetstream.create_stream(config).await?;
    let printed = until_status(&world, "yes, but worker test cannot run").await?;
    ensure!(printed < PATIENCE, "{printed:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_consumer_is_shown_as_paused() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let client = world.nats.client().await?;
    let pause =
        |until: String| client.request("$JS.API.CONSUMER.PAUSE.IN.oncely-test", until.into());
    let until = jiff::Timestamp::now() + Duration::from_secs(3600);
    pause(format!("{{\"pause_until\": \"{until}\"}}")).await?;
    let elapsed = until_status(&world, "paused").await?;
    ensure!(elapsed < REPORTED_WITHIN, "{elapsed:?}");
    let workers = world.oncely_json(&["workers", "--json"]).await?;
    let error = workers
        .pointer("/0/error")
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default()
        .to_owned();
    ensure!(
        error.contains("its consumer is paused for another 59m"),
        "{error}"
    );
    pause("{}".to_owned()).await?;
    until_status(&world, "running").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hosts_own_streams_are_recreated() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let jetstream = jetstream_of(&world).await?;
    for name in [
        "ONCELY_DLQ",
        "ONCELY_REDRIVE",
        "ONCELY_ALARM",
        "ONCELY_CACHE",
    ] {
        jetstream.delete_stream(name).await?;
        let description = format!("{name} exists again");
        world
            .eventually_within(REPORTED_WITHIN, description, || async {
                jetstream.get_stream(name).await?;
                Ok(Some(()))
            })
            .await?;
    }
    until_status(&world, "ready: yes").await?;

    // Requeued messages are handled again.
    world
        .nats
        .publish_all(vec![NewMessage::new("in.x", "bad", "reject", "{}")])
        .await?;
    world
        .until("select count(*) from oncely.dead_letter", 1)
        .await?;
    world.oncely(&["dlq", "redrive", "1"]).await?;
    world
        .until(
            "select count(*) from oncely.dead_letter where generation = 1 and state = 'open'",
            1,
        )
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_cannot_commit_makes_the_host_not_ready() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let cluster = Cluster::start()?;
    world.database = support::database::Database::on(&cluster).await?;
    world.start_host().await?;
    let set = |names: &str| format!("alter system set synchronous_standby_names = '{names}'");
    world.database.execute(&set("absent")).await?;
    world.database.execute("select pg_reload_conf()").await?;
    let began = Instant::now();
    let why = world.not_ready("does not confirm commits").await?;
    ensure!(
        began.elapsed() < REPORTED_WITHIN && why.contains("synchronous standby"),
        "{:?}: {why}",
        began.elapsed()
    );

    // The alarm bypasses the database.
    let limit = REPORTED_WITHIN.saturating_sub(began.elapsed());
    world
        .eventually_within(limit, "the alarm is published", || async {
            let alarms = world.nats.read_stream("ONCELY_ALARM").await?;
            let mut alarms = alarms.iter();
            let alarm = alarms.find(|alarm| alarm.subject == "oncely.alarm._host");
            let is_raised = alarm.is_some_and(|alarm| {
                let body = String::from_utf8_lossy(&alarm.body);
                body.contains("does not confirm commits") && body.contains("\"raised\"")
            });
            Ok(is_raised.then_some(()))
        })
        .await?;

    // A changed setting takes effect without a commit.
    world.database.execute(&set("")).await?;
    world.database.execute("select pg_reload_conf()").await?;
    world.ready().await?;
    world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
    world.until("select count(*) from oncely.inbox", 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_sqlite_file_makes_the_host_not_ready() -> Result<()> {
    use sqlx::{Connection, Executor};
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let file = world.folder.path().join("test.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(file);
    let mut other = sqlx::SqliteConnection::connect_with(&options).await?;
    other.execute("begin immediate").await?;
    let began = Instant::now();
    let why = world.not_ready("the database takes no writes").await?;
    ensure!(
        began.elapsed() < REPORTED_WITHIN * 2,
        "{:?}: {why}",
        began.elapsed()
    );
    other.execute("rollback").await?;
    world.ready().await
}

/// The size of the disk in the test of a full disk.
const DISK_SIZE: u64 = 12 << 20;

/// The flags with which `unshare` permits a command to mount a file system on `folder`: as root, or
/// in a user namespace. None if neither is permitted.
fn mount_flags(folder: &Path) -> Option<&'static str> {
    let mount = format!("mount -t tmpfs tmpfs '{}'", folder.display());
    ["-m", "-Urm"].into_iter().find(|flags| {
        Command::new("unshare")
            .args([*flags, "sh", "-c", &mount])
            .output()
            .is_ok_and(|output| output.status.success())
    })
}

/// Writes a file until the disk is full.
fn fill_disk(path: &Path) -> Result<()> {
    let mut file = File::create(path).context("create a file on the disk")?;
    let written = std::io::copy(&mut std::io::repeat(0).take(DISK_SIZE), &mut file);
    ensure!(
        written
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::StorageFull),
        "the disk is not full: {written:?}"
    );
    Ok(())
}

/// The host's database is on a disk that only the host sees, in its mount namespace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_makes_the_host_not_ready_until_there_is_space() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let disk = world.folder.path().join("disk");
    std::fs::create_dir(&disk).context("create a mount point")?;
    let Some(flags) = mount_flags(&disk) else {
        println!("skipped: no file system can be mounted in a namespace");
        return Ok(());
    };

    // Start the host on a small disk
    let script = world.folder.path().join("on-a-small-disk");
    let mount = format!("mount -t tmpfs -o size={DISK_SIZE} tmpfs \"$0\"");
    let text = format!(
        "#!/bin/sh\nexec unshare {flags} sh -c '{mount} && exec \"$@\"' '{}' '{}' \"$@\"\n",
        disk.display(),
        guests::oncely()?.display()
    );
    std::fs::write(&script, text).context("write a script")?;
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755))?;
    world.database_url = Some(disk.join("test.db").display().to_string());
    world.program = Some(script);
    world.spawn_host()?;
    world.program = None;
    world.ready().await?;
    let pid = world.host_pid().context("find the host")?;
    let disk = PathBuf::from(format!("/proc/{pid}/root{}", disk.display()));

    // The host is not ready, and raises an alarm without the database.
    fill_disk(&disk.join("fill"))?;
    let began = Instant::now();
    let why = world.not_ready("full").await?;
    ensure!(
        began.elapsed() < REPORTED_WITHIN,
        "{:?}: {why}",
        began.elapsed()
    );
    let ready = reqwest::get(format!("{}/readyz", world.control_url()?)).await?;
    assert_eq!(ready.status().as_u16(), 503);
    let messages = (0..5).map(NewMessage::insert).collect();
    world.nats.publish_all(messages).await?;
    let limit = REPORTED_WITHIN.saturating_sub(began.elapsed());
    world
        .eventually_within(limit, "the alarm is raised", || async {
            let log = world.host_log();
            let is_raised = log
                .lines()
                .any(|line| line.contains("alarm raised") && line.contains("alarm=\"database\""));
            Ok(is_raised.then_some(()))
        })
        .await?;
    assert_eq!(world.nats.read_stream("OUT").await?.len(), 0);

    // With space again the host is ready, and handles each message once.
    std::fs::remove_file(disk.join("fill")).context("remove the file from the disk")?;
    world
        .eventually("the host is ready again", || async {
            let status = world.oncely_json(&["status", "--json"]).await?;
            ensure!(status["ready"] == true, "{status}");
            Ok(Some(()))
        })
        .await?;
    world
        .eventually("the outputs are published", || async {
            let published = world.nats.read_stream("OUT").await?.len();
            ensure!(published >= 5, "{published} are published");
            Ok(Some(()))
        })
        .await?;

    // Copy the database to the place where the checks expect it, while the host is suspended
    signal(pid, "STOP")?;
    for file in ["test.db", "test.db-wal"] {
        std::fs::copy(disk.join(file), world.folder.path().join(file))
            .with_context(|| format!("copy {file}"))?;
    }
    signal(pid, "CONT")?;
    let books = books::check(&world).await?;
    assert_eq!(
        (books.effects.len(), books.outputs, books.dead.len()),
        (5, 5, 0)
    );
    world.stop_host().await
}

both!(
    a_retired_worker_restarts_at_the_start_of_its_stream,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("")?).await?;
        world
            .nats
            .publish_all((0..20).map(NewMessage::insert).collect())
            .await?;
        world.quiet(20).await?;
        let printed = world.oncely(&["retire", "test"]).await?;
        assert_eq!(
            printed.trim(),
            "worker test is retired; version 1 was active"
        );
        let jetstream = jetstream_of(&world).await?;
        for stream in ["IN", "ONCELY_REDRIVE"] {
            let consumer = jetstream
                .get_stream(stream)
                .await?
                .consumer_info("oncely-test")
                .await;
            ensure!(consumer.is_err(), "the consumer of {stream} still exists");
        }
        let error = world
            .oncely(&["retire", "nobody"])
            .await
            .unwrap_err()
            .to_string();
        ensure!(
            error.contains("there is no worker `nobody`") && error.contains("hint: oncely workers"),
            "{error}"
        );

        // Repeating the command is no error: the first one may have been interrupted.
        world.oncely(&["retire", "test"]).await?;
        ensure!(
            !world.oncely(&["workers"]).await?.contains("test"),
            "the worker is still listed"
        );
        world.ready().await?;
        world
            .nats
            .publish_all((20..30).map(NewMessage::insert).collect())
            .await?;

        // Handled messages are redelivered and skipped.
        assert_eq!(
            deploy(&world, &manifest("")?).await?.trim(),
            "worker test version 2 is active"
        );
        world.quiet(30).await?;
        assert_eq!(
            world
                .database
                .number("select count(distinct event_id) from app.effect")
                .await?,
            30
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from app.effect")
                .await?,
            60
        );

        world
            .oncely(&["retire", "test", "--keep-consumers"])
            .await?;
        let place = jetstream
            .get_stream("IN")
            .await?
            .consumer_info("oncely-test")
            .await?;
        assert_eq!(place.ack_floor.stream_sequence, 30);
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_not_ready_handles_signals() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    world.kill_host()?;
    // A silent server blocks the host's start.
    world.nats.pause()?;
    world.listen = format!("127.0.0.1:{}", free_port()?);
    world.spawn_host()?;

    // The starting host is alive and not ready.
    let control = format!("http://{}", world.listen);
    let alive = world
        .eventually("the control API answers", || async {
            Ok(Some(reqwest::get(format!("{control}/livez")).await?))
        })
        .await?;
    assert_eq!(alive.status().as_u16(), 200);
    let ready = reqwest::get(format!("{control}/readyz")).await?;
    assert_eq!(ready.status().as_u16(), 503);
    assert_eq!(
        ready.text().await?.trim(),
        "not ready: the host is starting"
    );

    let began = Instant::now();
    let pid = world.host_pid().context("find the host")?;
    signal(pid, "TERM")?;
    while world.is_host_running() {
        ensure!(
            began.elapsed() < Duration::from_secs(5),
            "the host is still running:\n{}",
            world.host_log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.nats.resume()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configured_address_that_is_taken_is_an_error() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    world.listen = taken.local_addr()?.to_string();
    world.spawn_host()?;
    let began = Instant::now();
    while world.is_host_running() {
        ensure!(
            began.elapsed() < REPORTED_WITHIN,
            "the host is still running:\n{}",
            world.host_log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = world.host_log();
    assert!(log.contains("error: listen on 127.0.0.1:"), "{log}");
    assert!(log.contains("--listen"), "{log}");
    Ok(())
}

/// With one server of three down, hosts start and work, because their own streams have three
/// replicas.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_starts_while_one_nats_server_is_down() -> Result<()> {
    let mut servers = NatsServer::start_cluster().await?;
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;

    // An earlier host created one of these streams without replicas.
    let jetstream = jetstream::new(servers[0].client().await?);
    let old = Config {
        name: "ONCELY_DLQ".to_owned(),
        subjects: vec!["oncely.dlq.>".to_owned()],
        ..Config::default()
    };
    jetstream.create_stream(old).await?;
    world.nats_url = servers
        .iter()
        .map(NatsServer::url)
        .collect::<Vec<_>>()
        .join(",");
    world.start_host().await?;
    for name in [
        "ONCELY_DLQ",
        "ONCELY_REDRIVE",
        "ONCELY_ALARM",
        "ONCELY_CACHE",
        "ONCELY_WATERMARKS",
        "IN",
        "OUT",
    ] {
        let replicas = jetstream
            .get_stream(name)
            .await?
            .cached_info()
            .config
            .num_replicas;
        assert_eq!(replicas, 3, "{name}");
    }
    world.stop_host().await?;
    servers[2].kill()?;

    // The deployment needs these streams. The start itself waits for its own.
    for name in ["IN", "OUT"] {
        eventually(format!("{name} has a leader"), || async {
            jetstream.get_stream(name).await?;
            Ok(Some(()))
        })
        .await?;
    }
    world.start_host().await?;
    let client = servers[0].client().await?;
    let jetstream = jetstream::new(client);
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("do", "insert");
    let sent = jetstream
        .publish_with_headers("in.x", headers, r#"{"n": 1}"#.into())
        .await?;
    sent.await?;
    world.until("select count(*) from oncely.inbox", 1).await?;
    world.stop_host().await?;

    // With two servers down, nothing can be stored. The start waits, logs the reason, and continues
    // when a server is back.
    servers[1].kill()?;
    world.spawn_host()?;
    let end = Instant::now() + PATIENCE;
    let waits = [
        "failed to create a stream of the host",
        "waiting for JetStream",
    ];
    while !waits.iter().any(|text| world.host_log().contains(text)) && world.is_host_running() {
        ensure!(
            Instant::now() < end,
            "the log does not name the missing server:\n{}",
            world.host_log()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Runs the program until it fails, which must be soon, and returns its standard error.
async fn fails(world: &World, args: &[&str]) -> Result<String> {
    let mut command = Command::new(guests::oncely()?);
    command
        .args(args)
        .current_dir(world.folder.path())
        .env("RUST_BACKTRACE", "0");
    command.args([
        "--nats",
        &world.nats.url(),
        "--listen",
        "127.0.0.1:0",
        "--http",
        "off",
    ]);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = tokio::time::timeout(Duration::from_secs(30), output)
        .await
        .context("wait for the program to exit")???;
    ensure!(
        !output.status.success(),
        "the program succeeded: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_dir_and_a_sqlite_file_allow_one_host_each() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let database = world.database.url();
    let pid = world.host_pid().context("find the host")?;
    let linked = world.folder.path().join("linked.db");
    let file = database.trim_start_matches("sqlite:");
    std::os::unix::fs::symlink(file, &linked).context("link the database")?;
    let linked = linked.display().to_string();
    for command in ["run", "dev"] {
        let same_folder = fails(
            &world,
            &[command, "--database", "other.db", "--data-dir", ".oncely"],
        )
        .await?;
        ensure!(
            same_folder.contains("use the data folder")
                && same_folder.contains(&format!("process {pid}")),
            "{same_folder}"
        );
        ensure!(
            same_folder.contains("hint: stop the host that runs there"),
            "{same_folder}"
        );
        for name in [&database, &linked] {
            let arguments = [command, "--database", name, "--data-dir", ".second"];
            let same_file = fails(&world, &arguments).await?;
            ensure!(
                same_file.contains("use the database")
                    && same_file.contains(&format!("process {pid}")),
                "{same_file}"
            );
        }
    }
    ensure!(
        world.oncely(&["status"]).await?.contains("ready: yes"),
        "the host was disturbed"
    );
    Ok(())
}

both!(
    a_program_that_is_older_than_the_schema_does_not_start,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("")?).await?;
        world.stop_host().await?;
        let newer =
            "insert into oncely.migration (version, name, checksum) values (9999, 'newer', 'x')";
        let newer = if kind == Kind::Sqlite {
            newer.replace("'x'", "x'00'")
        } else {
            newer.replace("'x'", "'\\x00'")
        };
        world.database.execute(&newer).await?;
        let error = fails(
            &world,
            &[
                "run",
                "--database",
                &world.database.url(),
                "--data-dir",
                ".second",
            ],
        )
        .await?;
        ensure!(
            error.contains("made by a newer oncely: its schema is at 9999"),
            "{error}"
        );
        ensure!(error.contains("hint: run the newer version"), "{error}");
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxy_variables_do_not_apply_to_the_loopback_interface() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    for variable in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        for args in [
            &["status"][..],
            &["workers"],
            &["publish", "in.x", "{}", "--http"],
        ] {
            let mut command = Command::new(guests::oncely()?);
            command
                .args(args)
                .current_dir(world.folder.path())
                .env(variable, "http://127.0.0.1:9");
            let output = tokio::task::spawn_blocking(move || command.output()).await??;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{variable} {args:?}: {said}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_maximum_size_dead_letter_is_announced_without_its_body() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let large = |id: &str, size: usize| {
        let body = format!("{{\"padding\": \"{}\"}}", "x".repeat(size));
        NewMessage::new("in.x", id, "reject", &body)
    };
    world
        .nats
        .publish_all(vec![large("small", 100), large("large", (1 << 20) - 400)])
        .await?;
    world
        .until("select count(*) from oncely.dead_letter", 2)
        .await?;
    world
        .until(world.database.unpublished_except_alarms(), 0)
        .await?;
    let notices = world.nats.read_stream("ONCELY_DLQ").await?;
    let of = |id: &str| {
        notices
            .iter()
            .find(|one| one.headers.get("Oncely-Event-Id").map(String::as_str) == Some(id))
    };
    let (small, large) = (
        of("small").context("find the small notice")?,
        of("large").context("find the large notice")?,
    );
    ensure!(
        !small.body.is_empty() && !small.headers.contains_key("Oncely-Omitted"),
        "{:?}",
        small.headers
    );
    ensure!(large.body.is_empty(), "{} bytes", large.body.len());
    assert_eq!(
        large.headers.get("Oncely-Omitted").map(String::as_str),
        Some("body")
    );
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where parked_at is not null")
            .await?,
        0
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_failed_attempt_is_logged_with_the_handlers_output() -> Result<()> {
    let settings = "[worker.retry]\nattempts = 2\nbackoff = \"50ms\"\nbackoff_max = \"50ms\"\ndeterministic_failures = \"retry\"";
    let world = World::start(Kind::Sqlite, &manifest(settings)?).await?;
    world
        .nats
        .publish_all(vec![NewMessage::new("in.x", "bad", "panic", "{}")])
        .await?;
    world
        .until("select count(*) from oncely.dead_letter", 1)
        .await?;
    let log = world.host_log();
    let attempts: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("attempt failed"))
        .collect();
    assert_eq!(attempts.len(), 2, "{log}");
    for (n, line) in attempts.iter().enumerate() {
        ensure!(
            line.contains("WARN") && line.contains(&format!("attempt={}", n + 1)),
            "{line}"
        );
        ensure!(
            line.contains("the handler panicked: ") && line.contains("logs="),
            "{line}"
        );
    }
    let shown = world.oncely(&["dlq", "show", "1"]).await?;
    ensure!(shown.contains("the handler panicked: "), "{shown}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_may_filter_mirrors_and_transformed_subjects() -> Result<()> {
    use async_nats::jetstream::stream::{Source, SubjectTransform};
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let jetstream = jetstream_of(&world).await?;
    let named = |name: &str, subjects: &[&str]| Config {
        name: name.to_owned(),
        subjects: subjects.iter().map(|&subject| subject.to_owned()).collect(),
        ..Config::default()
    };
    let source = Source {
        name: "P".to_owned(),
        ..Source::default()
    };
    jetstream.create_stream(named("P", &["p.>"])).await?;
    jetstream
        .create_stream(Config {
            mirror: Some(source.clone()),
            ..named("MIRROR", &[])
        })
        .await?;
    jetstream
        .create_stream(Config {
            sources: Some(vec![source]),
            ..named("SOURCED", &[])
        })
        .await?;
    let transform = SubjectTransform {
        source: "tr.>".to_owned(),
        destination: "stored.>".to_owned(),
    };
    jetstream
        .create_stream(Config {
            subject_transform: Some(transform),
            ..named("RENAMED", &["tr.>"])
        })
        .await?;
    for (n, (stream, filter)) in [
        ("MIRROR", "p.msg"),
        ("SOURCED", "p.msg"),
        ("RENAMED", "stored.a"),
    ]
    .iter()
    .enumerate()
    {
        let text = other(stream)?.replace(
            &format!("stream = \"{stream}\""),
            &format!("stream = \"{stream}\"\nsubjects = [\"{filter}\"]"),
        );
        deploy(
            &world,
            &text.replace("name = \"other\"", &format!("name = \"w{n}\"")),
        )
        .await?;
    }
    let message = |subject: &str, id: &str| NewMessage::new(subject, id, "insert", r#"{"n": 1}"#);
    world
        .nats
        .publish_all(vec![
            message("p.msg", "a"),
            message("p.no", "b"),
            message("tr.a", "c"),
            message("tr.b", "d"),
        ])
        .await?;
    world.until("select count(*) from oncely.inbox", 3).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_marker_is_no_event() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    world.nats.publish_raw(
        b"in.x",
        b"NATS/1.0\r\nNats-Marker-Reason: MaxAge\r\nNats-TTL: 1s\r\n\r\n",
        b"",
    )?;
    world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
    world.until("select count(*) from oncely.inbox", 1).await?;
    let info = jetstream_of(&world)
        .await?
        .get_stream("IN")
        .await?
        .consumer_info("oncely-test")
        .await?;
    ensure!(
        info.num_ack_pending == 0 && info.num_redelivered == 0,
        "{info:?}"
    );
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.dead_letter")
            .await?,
        0
    );

    // It does not count as a message that a restored database has forgotten.
    let watermarks = world
        .database
        .number("select max(number) from oncely.watermark")
        .await?;
    world.nats.publish_all(vec![NewMessage::insert(2)]).await?;
    world
        .until_at_least("select max(number) from oncely.watermark", watermarks + 1)
        .await?;
    ensure!(
        world.oncely(&["status"]).await?.contains("ready: yes"),
        "the host waits for a recovery:\n{}",
        world.host_log()
    );
    Ok(())
}
