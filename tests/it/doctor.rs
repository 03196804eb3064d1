//! `oncely doctor`: a healthy system has no problem, and each planted fault is found.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, StorageType};
use serde_json::Value;
use support::database::{Database, Kind};
use support::guests;
use support::nats::NatsServer;
use support::postgres::Cluster;
use support::world::{World, manifest};

use crate::relay_modes::RelayMode;

/// The findings of a run, by check and level.
struct Findings {
    exit: Option<i32>,
    all: Vec<Value>,
}

impl Findings {
    fn read(output: &Output) -> Result<Self> {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("read the report; stderr: {stderr}"))?;
        let all = report["findings"].as_array().context("find the findings")?;
        Ok(Findings {
            exit: output.status.code(),
            all: all.clone(),
        })
    }

    /// The checks with findings at this level, with their texts.
    fn at(&self, level: &str) -> Vec<(String, String)> {
        let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or("").to_owned();
        let found = self.all.iter().filter(|finding| finding["level"] == level);
        found
            .map(|finding| (text(finding, "check"), text(finding, "found")))
            .collect()
    }

    /// Requires a finding of a check at a level, whose text contains `text`.
    fn require(&self, level: &str, check: &str, text: &str) -> Result<()> {
        let found = self.at(level);
        let is_found = found
            .iter()
            .any(|(name, found)| name == check && found.contains(text));
        ensure!(
            is_found,
            "no {level} of {check} with `{text}`; {level}: {found:?}"
        );
        let wanted = if self.at("problem").is_empty() { 0 } else { 7 };
        ensure!(self.exit == Some(wanted), "exit code {:?}", self.exit);
        let has_fix = |finding: &Value| finding["level"] == "ok" || finding["fix"].is_string();
        ensure!(self.all.iter().all(has_fix), "a finding has no fix");
        Ok(())
    }
}

/// Runs `oncely doctor --json` in a folder.
async fn doctor(folder: &Path, arguments: &[&str]) -> Result<Findings> {
    let mut command = std::process::Command::new(guests::oncely()?);
    command
        .arg("doctor")
        .arg("--json")
        .args(arguments)
        .current_dir(folder)
        .env_remove("ONCELY_HOST")
        .env_remove("ONCELY_TOKEN")
        .env("NO_COLOR", "1");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    Findings::read(&output)
}

/// The arguments for a run without a host on these servers.
fn direct<'a>(database: &'a str, nats: &'a str) -> [&'a str; 5] {
    ["--direct", "--database", database, "--nats", nats]
}

// The disk of the machine that runs the tests is not planted.
fn problems_besides_disk(findings: &Findings) -> Vec<(String, String)> {
    let mut problems = findings.at("problem");
    problems.retain(|(check, _)| check != "disk");
    problems
}

both!(a_healthy_system_has_no_problem, |kind: Kind| async move {
    let cluster = Cluster::start_with(HEALTHY)?;
    let mut world = World::without_host(kind, &manifest("")?).await?;
    if kind == Kind::Postgres {
        world.database = Database::on(&cluster).await?;
    }
    world.start_host().await?;

    // The host checks itself.
    let asked = doctor(world.folder.path(), &[]).await?;
    ensure!(
        problems_besides_disk(&asked).is_empty(),
        "{:?}",
        asked.at("problem")
    );
    asked.require("ok", "host-ready", "ready")?;
    asked.require("ok", "consumer-settings", "2 consumers")?;
    asked.require("ok", "clocks", "NATS")?;
    asked.require("ok", "stream-retention", "outlast")?;

    // The same from its configuration, with and without the host.
    let (database, nats) = (world.database.url(), world.nats.url());
    let before = world
        .database
        .rows("select id from oncely.installation")
        .await?;
    let beside = doctor(world.folder.path(), &direct(&database, &nats)).await?;
    ensure!(
        problems_besides_disk(&beside).is_empty(),
        "{:?}",
        beside.at("problem")
    );
    world.stop_host().await?;
    let files = listing(world.folder.path())?;
    let alone = doctor(world.folder.path(), &direct(&database, &nats)).await?;
    ensure!(
        problems_besides_disk(&alone).is_empty(),
        "{:?}",
        alone.at("problem")
    );
    alone.require("ok", "stream-exists", "1 workers")?;
    ensure!(
        listing(world.folder.path())? == files,
        "a file was left behind"
    );
    assert_eq!(
        world
            .database
            .rows("select id from oncely.installation")
            .await?,
        before
    );
    Ok(())
});

/// A server with the settings that production has.
const HEALTHY: &str =
    "-c max_connections=100 -c shared_buffers=64MB -c wal_level=logical -c max_wal_size=4GB";

/// All files below a folder, with their sizes.
fn listing(folder: &Path) -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.push((entry.path().display().to_string(), entry.metadata()?.len()));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_a_schema_is_advice_and_stays_empty() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start_with(HEALTHY)?;
    let database = Database::on(&cluster).await?;
    let nats = NatsServer::start().await?;
    let found = doctor(folder.path(), &direct(&database.url(), &nats.url())).await?;
    found.require("advice", "schema", "no host of this version has started")?;
    ensure!(
        problems_besides_disk(&found).is_empty(),
        "{:?}",
        found.at("problem")
    );
    let schemas = "select count(*) from pg_namespace where nspname like 'oncely%'";
    assert_eq!(database.number(schemas).await?, 0);

    // A missing file is not created.
    let file = folder.path().join("new.db").display().to_string();
    let found = doctor(folder.path(), &direct(&file, &nats.url())).await?;
    found.require("ok", "sqlite-file", "does not exist yet")?;
    ensure!(
        listing(folder.path())?.is_empty(),
        "{:?}",
        listing(folder.path())?
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_a_postgres_server_are_found() -> Result<()> {
    let cluster = Cluster::start_with(
        "-c fsync=off -c synchronous_commit=off -c autovacuum=off -c max_connections=20 \
         -c shared_buffers=64MB -c wal_level=replica -c max_replication_slots=5",
    )?;
    let mut world = World::without_host(Kind::Postgres, &manifest("")?).await?;
    world.database = Database::on(&cluster).await?;
    world.start_host().await?;
    let database = &world.database;
    database
        .execute("select pg_create_physical_replication_slot('forgotten', true)")
        .await?;
    let name = database.rows("select current_database()").await?;
    let name = name
        .first()
        .and_then(|row| row.first())
        .context("find the name")?;
    let revoke = format!("revoke usage on schema app_default from oncely_app_default_{name}");
    database.execute(&revoke).await?;

    let found = doctor(world.folder.path(), &[]).await?;
    found.require("problem", "postgres-durability", "fsync")?;
    found.require("advice", "postgres-commit", "off")?;
    found.require("problem", "postgres-vacuum", "autovacuum")?;
    found.require("problem", "postgres-connections", "18 connections of 17")?;
    found.require("advice", "postgres-slots", "forgotten is inactive")?;
    found.require(
        "problem",
        "postgres-roles",
        "grant usage on schema app_default",
    )?;

    // WAL mode is requested, but the server does not allow it.
    let (url, nats) = (database.url(), world.nats.url());
    let arguments = [
        &direct(&url, &nats)[..],
        &["--relay", "wal", "--keep-outputs", "1h"],
    ]
    .concat();
    let found = doctor(world.folder.path(), &arguments).await?;
    found.require("problem", "postgres-wal", "wal_level = replica")?;
    found.require("advice", "host-settings", "keep_outputs differs: 15m")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slot_of_the_relay_is_checked_in_wal_mode() -> Result<()> {
    let mode = RelayMode::Wal;
    let mut world = mode.world("").await?;
    let cluster = Cluster::start_with(HEALTHY)?;
    world.database = Database::on(&cluster).await?;
    mode.start(&mut world).await?;
    let found = doctor(world.folder.path(), &[]).await?;
    ensure!(
        problems_besides_disk(&found).is_empty(),
        "{:?}",
        found.at("problem")
    );
    found.require(
        "ok",
        "postgres-wal",
        "relay mode is wal, and its requirements are met",
    )?;
    found.require("ok", "postgres-slots", "1 replication slots")?;

    // Without a host nothing reads the slot.
    world.stop_host().await?;
    let (url, nats) = (world.database.url(), world.nats.url());
    let found = doctor(world.folder.path(), &direct(&url, &nats)).await?;
    found.require("advice", "postgres-slots", "is inactive")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_streams_and_consumers_are_found() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let context = async_nats::jetstream::new(world.nats.client().await?);

    // A dedupe window that is too short, and a limit that drops messages.
    let mut output = context
        .get_stream("OUT")
        .await?
        .cached_info()
        .config
        .clone();
    output.duplicate_window = Duration::from_secs(5);
    context.update_stream(output).await?;
    let mut input = context.get_stream("IN").await?.cached_info().config.clone();
    input.discard = async_nats::jetstream::stream::DiscardPolicy::Old;
    input.max_messages = 100;
    input.max_age = Duration::from_secs(7 * 24 * 3600);
    context.update_stream(input).await?;

    // A consumer that gives up.
    let stream = context.get_stream("IN").await?;
    let changed = pull::Config {
        max_deliver: 5,
        ..consumer_config(&stream, "oncely-test").await?
    };
    stream.update_consumer(changed).await?;

    let found = doctor(world.folder.path(), &[]).await?;
    found.require(
        "problem",
        "stream-dedupe-window",
        "OUT has a dedupe window of 5s",
    )?;
    found.require("advice", "stream-limits", "IN is 0 % full")?;
    found.require(
        "problem",
        "consumer-settings",
        "max_deliver is 5 instead of unlimited",
    )?;
    found.require("advice", "stream-sync", "single server")?;

    // A configuration that forgets handled messages before the stream does.
    let (url, nats) = (world.database.url(), world.nats.url());
    let arguments = [&direct(&url, &nats)[..], &["--keep-inbox", "1d"]].concat();
    let found = doctor(world.folder.path(), &arguments).await?;
    found.require(
        "problem",
        "stream-retention",
        "could handle a message twice",
    )?;

    // A stream in memory, and one that is missing.
    context.delete_stream("OUT").await?;
    let found = doctor(world.folder.path(), &[]).await?;
    found.require("problem", "stream-exists", "no stream accepts `out.>`")?;
    let memory = Config {
        name: "OUT".to_owned(),
        subjects: vec!["out.>".to_owned()],
        storage: StorageType::Memory,
        ..Config::default()
    };
    context.create_stream(memory).await?;
    let found = doctor(world.folder.path(), &[]).await?;
    found.require("problem", "stream-storage", "OUT is stored in memory")?;
    Ok(())
}

/// The configuration of a durable pull consumer.
async fn consumer_config(
    stream: &async_nats::jetstream::stream::Stream,
    name: &str,
) -> Result<pull::Config> {
    let info = stream.consumer_info(name).await?;
    Ok(pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: info.config.ack_wait,
        deliver_policy: info.config.deliver_policy,
        filter_subject: info.config.filter_subject,
        filter_subjects: info.config.filter_subjects,
        max_ack_pending: info.config.max_ack_pending,
        metadata: info.config.metadata,
        ..pull::Config::default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_replica_in_a_cluster_is_found() -> Result<()> {
    let servers = NatsServer::start_cluster().await?;
    let nats = servers.first().context("take a server")?;
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world.nats_url = nats.url();
    world.start_host().await?;
    let healthy = doctor(world.folder.path(), &[]).await?;
    ensure!(
        problems_besides_disk(&healthy).is_empty(),
        "{:?}",
        healthy.at("problem")
    );
    healthy.require("ok", "stream-sync", "several replicas")?;

    let context = async_nats::jetstream::new(nats.client().await?);
    let mut output = context
        .get_stream("OUT")
        .await?
        .cached_info()
        .config
        .clone();
    output.num_replicas = 1;
    context.update_stream(output).await?;
    let found = doctor(world.folder.path(), &[]).await?;
    found.require("problem", "stream-replicas", "OUT has one replica")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_servers_are_problems_within_ten_seconds() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Refused, and without any answer: a listener whose backlog nobody accepts.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let silent = silent.local_addr()?;
    let closed = support::server::free_port()?;
    for (database, nats) in [
        (
            format!("postgres://oncely@127.0.0.1:{closed}/oncely"),
            format!("nats://127.0.0.1:{closed}"),
        ),
        (
            format!("postgres://oncely@{silent}/oncely"),
            format!("nats://{silent}"),
        ),
    ] {
        let began = Instant::now();
        let found = doctor(folder.path(), &direct(&database, &nats)).await?;
        found.require("problem", "postgres-reachable", "read the database")?;
        found.require("problem", "nats-reachable", "NATS")?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(10), "it took {took:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_readable_token_or_database_is_found() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644));
    let data_dir = world.folder.path().join(".oncely");
    open(&data_dir.join("token"))?;
    let file = world.database.url();
    open(Path::new(&file))?;
    let found = doctor(world.folder.path(), &[]).await?;
    found.require("problem", "secret-files", "other users can read the token")?;
    found.require("problem", "sqlite-permissions", "mode 644")?;

    // The host does not start like this; the doctor names the reason.
    world.stop_host().await?;
    let found = doctor(world.folder.path(), &direct(&file, &world.nats.url())).await?;
    found.require("problem", "secret-files", "other users can read the token")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_another_installation_are_found() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let other = World::start(Kind::Sqlite, &manifest("")?).await?;
    let arguments = direct_of(&other.database.url(), &world.nats.url());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let found = doctor(other.folder.path(), &arguments).await?;
    found.require("problem", "nats-owner", "belongs to another installation")
}

fn direct_of(database: &str, nats: &str) -> Vec<String> {
    direct(database, nats).map(str::to_owned).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_text_names_reason_and_fix() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let nats = NatsServer::start().await?;
    let port = support::server::free_port()?;
    let database = format!("postgres://oncely:wonderland@127.0.0.1:{port}/oncely");
    let output = std::process::Command::new(guests::oncely()?)
        .args(["doctor", "--quiet"])
        .args(direct(&database, &nats.url()))
        .current_dir(folder.path())
        .output()?;
    let (text, notes) = (
        String::from_utf8(output.stdout)?,
        String::from_utf8(output.stderr)?,
    );
    assert_eq!(output.status.code(), Some(7), "{text}{notes}");
    ensure!(text.contains("problem: postgres-reachable: "), "{text}");
    ensure!(text.contains("         fix: "), "{text}");
    ensure!(!text.contains("     ok: "), "{text}");
    ensure!(
        !text.contains("wonderland"),
        "the password is shown: {text}"
    );
    ensure!(notes.contains("1 problems"), "{notes}");
    Ok(())
}
