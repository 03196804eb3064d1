//! The languages of handlers in one run: the times of an author, and messages per second.
//!
//! Each language does the work of its template: it stores an order with one statement and sends a
//! message. Packages are there already, but nothing is compiled.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use futures::StreamExt;
use serde_json::{Value, json};
use support::database::{Database, Kind};
use support::eventually::eventually_within;
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::production::RunningHost;
use support::project::Project;
use support::world::{World, manifest};

use crate::statistics::median;
use crate::{PATIENCE, cpu};

struct Language {
    name: &'static str,
    /// The file with the handler.
    source: &'static str,
    /// Messages per measurement: some seconds of work.
    messages: usize,
}

const LANGUAGES: &[Language] = &[
    Language {
        name: "rust",
        source: "src/lib.rs",
        messages: 20_000,
    },
    Language {
        name: "c",
        source: "app.c",
        messages: 20_000,
    },
    Language {
        name: "go",
        source: "main.go",
        messages: 4_000,
    },
    Language {
        name: "javascript",
        source: "app.js",
        messages: 4_000,
    },
    Language {
        name: "python",
        source: "app.py",
        messages: 2_000,
    },
];

const ISOLATIONS: [&str; 2] = ["message", "batch"];

/// A first build may compile a standard library.
const FIRST_BUILD: Duration = Duration::from_secs(600);

/// Times of an author, in seconds.
struct AuthorTimes {
    /// From an empty folder to the output of the first message, with the first build.
    first_message: f64,
    /// From a change of the handler to the first message that the changed handler handles; the
    /// median of three changes.
    change: f64,
    /// The cases of the project with a compiled component.
    cases: f64,
}

/// Times of an operator, in seconds.
struct OperatorTimes {
    /// From `oncely deploy` of a built component to the output of the first message.
    deploy: f64,
    /// From the start of a host that has run the component to the output of a waiting message.
    restart: f64,
}

struct Throughput {
    rate: f64,
    cpu_micros: BTreeMap<String, f64>,
    /// The largest resident memory of the host.
    memory_mib: f64,
}

/// Measures the languages whose name contains `only`.
pub async fn measure(rounds: usize, only: Option<&str>) -> Result<Value> {
    let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
    let mut report = Vec::new();
    for language in LANGUAGES {
        if only.is_none_or(|part| language.name.contains(part)) {
            let measured = measure_one(language, &cluster, rounds).await;
            report.push(measured.with_context(|| format!("measure {}", language.name))?);
        }
    }
    Ok(Value::Array(report))
}

async fn measure_one(language: &Language, cluster: &Cluster, rounds: usize) -> Result<Value> {
    let author = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let (project, times) = develop(&author, language).await?;
    println!(
        "{:<12} first message {:.1} s, change {:.2} s, cases {:.2} s",
        language.name, times.first_message, times.change, times.cases
    );

    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world.database = Database::on(cluster).await?;
    let operator = operate(&world, &project).await?;
    let (deploy, restart) = (operator.deploy, operator.restart);
    println!("{:<12} deploy {deploy:.2} s, restart {restart:.2} s", "");

    let mut throughput = serde_json::Map::new();
    for isolation in ISOLATIONS {
        let mut rates = Vec::new();
        let mut last = None;
        for round in 0..rounds {
            let measured = handle(&world, &project, language, isolation, round).await?;
            let Throughput {
                rate,
                cpu_micros,
                memory_mib,
            } = &measured;
            println!(
                "{:<12} isolation = {isolation}: {rate:.0} messages/s, {memory_mib:.0} MiB, µs of CPU each: {cpu_micros:.0?}",
                ""
            );
            rates.push(*rate);
            last = Some(measured);
        }
        let last = last.context("no round")?;
        throughput.insert(
            isolation.to_owned(),
            json!({
                "rates": rates, "median": median(&rates),
                "cpu_micros_per_message": last.cpu_micros, "memory_mib": last.memory_mib,
            }),
        );
    }
    Ok(json!({
        "language": language.name,
        "first_message_seconds": times.first_message, "change_seconds": times.change,
        "cases_seconds": times.cases,
        "deploy_seconds": operator.deploy, "restart_seconds": operator.restart,
        "throughput": throughput,
    }))
}

/// An author's day: `oncely new`, `oncely dev`, a message, a change, `oncely test`.
async fn develop(world: &World, language: &Language) -> Result<(Project, AuthorTimes)> {
    let start = Instant::now();
    let folder = world.folder.path();
    let target = folder.join("target");
    let mut project = Project::new(world, "orders", language.name, &target).await?;
    // No compiler has anything in its cache.
    project.set("GOCACHE", &folder.join("go-cache"));
    project.set("ZIG_GLOBAL_CACHE_DIR", &folder.join("zig-cache"));

    // First message
    let mut outputs = outputs(world).await?;
    let log_file = folder.join("dev.log");
    let log = fs::File::create(&log_file).context("create a log")?;
    let mut dev = project.command(support::guests::oncely()?);
    dev.args(["dev", "--data-dir", "dev", "--nats", &world.nats.url()])
        .args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the log")?)
        .stderr(log);
    let mut dev = tokio::process::Command::from(dev)
        .kill_on_drop(true)
        .spawn()
        .context("start oncely dev")?;
    let is_ready = |said: &str| said.contains("ready; stop");
    until(&log_file, "ready", FIRST_BUILD, is_ready).await?;
    world.nats.publish_all(vec![order("first")]).await?;
    next(&mut outputs).await?;
    let first_message = start.elapsed().as_secs_f64();

    // Changes
    let mut changes = Vec::new();
    let mut old = "accepted order";
    for new in ["took order", "kept order", "filed order"] {
        let start = Instant::now();
        project.edit(language.source, old, new)?;
        let deployments = changes.len() + 1;
        let is_deployed = |said: &str| said.matches("deployed in").count() == deployments;
        until(&log_file, "a deployment", PATIENCE, is_deployed).await?;
        // The version before may take messages until the new one runs.
        let is_handled = |said: &str| said.contains(new);
        tokio::select! {
            said = until(&log_file, new, PATIENCE, is_handled) => said?,
            failed = publish_orders(world) => match failed? {},
        }
        changes.push(start.elapsed().as_secs_f64());
        old = new;
    }
    let change = median(&changes);
    dev.kill().await.context("stop oncely dev")?;

    // Cases, with the machine code that the first run leaves
    project.oncely(&["test"]).await?;
    let start = Instant::now();
    project.oncely(&["test"]).await?;
    let cases = start.elapsed().as_secs_f64();
    Ok((
        project,
        AuthorTimes {
            first_message,
            change,
            cases,
        },
    ))
}

/// Deploys the built component to a host that has compiled nothing, and restarts the host.
async fn operate(world: &World, project: &Project) -> Result<OperatorTimes> {
    let host = RunningHost::start(world, "host").await?;
    // Commands in the project's folder find this host.
    let own = project.folder.join(".oncely");
    if own.exists() {
        fs::remove_dir_all(&own).context("remove the data of oncely test")?;
    }
    std::os::unix::fs::symlink(host.folder().join(".oncely"), own).context("link the host file")?;
    rewrite(&project.folder, "message")?;
    let mut outputs = outputs(world).await?;

    let start = Instant::now();
    project.oncely(&["deploy"]).await?;
    world.nats.publish_all(vec![order("deployed")]).await?;
    next(&mut outputs).await?;
    let deploy = start.elapsed().as_secs_f64();

    host.stop()?;
    world.nats.publish_all(vec![order("waiting")]).await?;
    let start = Instant::now();
    let mut host = RunningHost::spawn(world, "host")?;
    next(&mut outputs).await?;
    let restart = start.elapsed().as_secs_f64();
    host.ready().await?;
    host.stop()?;
    Ok(OperatorTimes { deploy, restart })
}

/// Handles a backlog with one isolation.
async fn handle(
    world: &World,
    project: &Project,
    language: &Language,
    isolation: &str,
    round: usize,
) -> Result<Throughput> {
    // Deployment and backlog
    let host = RunningHost::start(world, "host").await?;
    rewrite(&project.folder, isolation)?;
    project.oncely(&["deploy"]).await?;
    host.stop()?;
    let backlog = (0..language.messages)
        .map(|n| order(&format!("{isolation}-{round}-{n}")))
        .collect();
    world.nats.publish_all(backlog).await?;
    let context = jetstream::new(world.nats.client().await?);
    let stream = context.get_stream("ORDERS").await?;
    let published = stream.get_info().await?.state.last_sequence;

    // Measurement
    let cpu_before = cpu::seconds();
    let host = RunningHost::spawn(world, "host")?;
    let all = published + u64::try_from(language.messages)?;
    let (mut seen, mut moved) = (published, Instant::now());
    while seen < all {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = stream.get_info().await?.state.last_sequence;
        if now != seen {
            (seen, moved) = (now, Instant::now());
        }
        ensure!(
            moved.elapsed() < PATIENCE,
            "only {} of {} outputs arrived:\n{}",
            seen - published,
            language.messages,
            host.log()
        );
    }
    let memory_mib = cpu::peak_memory_mib(host.pid())?;
    let cpu_micros = cpu::micros_since(&cpu_before, language.messages);
    host.stop()?;

    // Rate
    let first = stream.get_raw_message(published + 1).await?.time;
    let last = stream.get_raw_message(all).await?.time;
    Ok(Throughput {
        rate: language.messages as f64 / (last - first).as_seconds_f64(),
        cpu_micros,
        memory_mib,
    })
}

/// Changes the manifest of a project to deploy the built component, with one isolation.
fn rewrite(folder: &Path, isolation: &str) -> Result<()> {
    let path = folder.join("oncely.toml");
    let text = fs::read_to_string(&path).context("read the manifest")?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("build =") && !line.starts_with("isolation ="))
        .collect();
    let text = kept.join("\n").replace(
        "stream = \"ORDERS\"",
        &format!("stream = \"ORDERS\"\nisolation = \"{isolation}\""),
    );
    fs::write(&path, text + "\n").context("write the manifest")
}

fn order(id: &str) -> NewMessage {
    let body = json!({ "id": id, "cents": 500 });
    NewMessage::new("orders.new", id, "", &body.to_string())
}

async fn outputs(world: &World) -> Result<async_nats::Subscriber> {
    let client = world.nats.client().await?;
    let outputs = client.subscribe("orders.accepted").await?;
    client.flush().await?;
    Ok(outputs)
}

async fn next(outputs: &mut async_nats::Subscriber) -> Result<()> {
    let output = tokio::time::timeout(PATIENCE, outputs.next()).await;
    output
        .context("no output")?
        .context("the connection is closed")?;
    Ok(())
}

/// Publishes orders until that fails.
async fn publish_orders(world: &World) -> Result<Infallible> {
    loop {
        let message = order(&uuid::Uuid::new_v4().to_string());
        world.nats.publish_all(vec![message]).await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until(
    log: &Path,
    what: &str,
    limit: Duration,
    is_said: impl Fn(&str) -> bool,
) -> Result<()> {
    let found = eventually_within(limit, format!("the log says `{what}`"), || {
        let said = fs::read_to_string(log).unwrap_or_default();
        let found = is_said(&said).then_some(());
        async move { Ok(found) }
    });
    let said = || fs::read_to_string(log).unwrap_or_default();
    found.await.with_context(said)
}
