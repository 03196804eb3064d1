//! The storm: many clients post the same operation at once, while hosts die and connections break.
//!
//! Each operation has one effect, and all of its clients receive the same answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use oncely::fault;
use oncely_client::{Client, Method};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::proxy::{Cut, Proxy};
use support::server::free_port;
use support::world::World;

use crate::checker::Violation;
use crate::proxied_database::{HostBuild, ProxiedDatabase};

/// Fault points in the handling of a request.
const POINTS: [&str; 6] = [
    fault::AFTER_BEGIN,
    fault::AFTER_CLAIM,
    fault::MID_GUEST,
    fault::AFTER_GUEST,
    fault::BEFORE_COMMIT,
    fault::AFTER_COMMIT,
];

/// Operations posted at the same time. They share transactions.
const AT_ONCE: usize = 12;

/// Delay between operations, which leaves time for faults.
const OPERATION_INTERVAL: Duration = Duration::from_millis(150);

/// Minimum number of host deaths; a storm with fewer proves little.
const DEATHS_MIN: u64 = 3;

/// Retry limit of a client.
const PATIENCE: Duration = Duration::from_secs(120);

/// The plan of a storm.
#[derive(Debug, Clone)]
pub struct Storm {
    pub kind: Kind,
    pub seed: u64,
    /// Operations, each with its own idempotency key.
    pub keys: u64,
    /// Clients that post each operation at once.
    pub posts: usize,
    /// Additional environment of the host.
    pub env: Vec<(String, String)>,
}

/// The result of a storm.
#[derive(Debug)]
pub struct StormReport {
    pub storm: Storm,
    pub injected: BTreeMap<String, u64>,
    pub seen: BTreeMap<String, u64>,
    pub violations: Vec<Violation>,
    pub seconds: u64,
}

/// Answers to one operation.
#[derive(Default)]
struct OperationResponses {
    /// Status, stored headers and body.
    answers: BTreeSet<String>,
    gave_up: Vec<String>,
    tries: u64,
    replayed: u64,
    /// The answer to another body under the same key.
    other: String,
}

/// Runs one storm.
pub async fn run(storm: Storm) -> Result<StormReport> {
    let began = Instant::now();
    let mut storm_run = StormRun::start(storm).await?;
    let client = Client::builder(&format!("http://127.0.0.1:{}", storm_run.to_host.port()))
        .deadline(PATIENCE)
        .try_timeout(Duration::from_secs(15))
        .backoff(Duration::from_millis(20), Duration::from_millis(500))
        .budget(1_000.0, u32::MAX / 4)
        .build()?;
    let is_done = Arc::new(AtomicBool::new(false));
    let posting = tokio::spawn({
        let (storm, is_done) = (storm_run.storm.clone(), Arc::clone(&is_done));
        async move {
            let waves = (0..storm.keys).map(|key| {
                let client = client.clone();
                async move {
                    tokio::time::sleep(OPERATION_INTERVAL * u32::try_from(AT_ONCE).unwrap_or(1))
                        .await;
                    wave(client, key, storm.posts).await
                }
            });
            let responses: Vec<OperationResponses> = futures::stream::iter(waves)
                .buffered(AT_ONCE)
                .collect()
                .await;
            is_done.store(true, Ordering::Relaxed);
            responses
        }
    });
    while !is_done.load(Ordering::Relaxed) {
        storm_run.inject_fault().await?;
    }
    let responses = posting.await.context("post")?;
    storm_run.conclude(responses, began).await
}

/// Posts one operation from many clients at once, and then another one under its key.
async fn wave(client: Client, key: u64, posts: usize) -> OperationResponses {
    let (name, what) = (
        format!("op-{key}"),
        json!({ "event": event(key), "do": ["effect", "slow", "state", "send"], "ms": 5 }),
    );
    let post = |what: Value| {
        client
            .call(Method::POST, "/do/it")
            .key(&*name)
            .json(&what)
            .send()
    };
    let answers = futures::future::join_all((0..posts).map(|_| post(what.clone()))).await;
    let mut responses = OperationResponses::default();
    for answer in answers {
        match answer {
            Ok(answer) => {
                let odd = answer
                    .headers
                    .get("x-odd")
                    .map(|value| value.as_bytes().to_vec());
                let nonce = answer.headers.get("x-nonce").cloned();
                responses.answers.insert(format!(
                    "{} {nonce:?} {odd:?} {}",
                    answer.status,
                    answer.text()
                ));
                responses.tries += u64::from(answer.tries);
                responses.replayed += u64::from(answer.replayed);
            }
            Err(error) => responses.gave_up.push(error.to_string()),
        }
    }
    responses.other = match post(json!({ "event": "other" })).await {
        Ok(answer) => answer.status.to_string(),
        Err(error) => error.to_string(),
    };
    responses
}

fn event(key: u64) -> String {
    format!("e{key}")
}

struct StormRun {
    storm: Storm,
    world: World,
    to_host: Proxy,
    proxied_database: ProxiedDatabase,
    random: StdRng,
    injected: BTreeMap<String, u64>,
}

impl StormRun {
    async fn start(storm: Storm) -> Result<Self> {
        let mut world = World::without_host(Kind::Sqlite, &manifest()?).await?;
        let proxied_database =
            ProxiedDatabase::install(&mut world, storm.kind, HostBuild::CrashPoints).await?;
        let port = free_port()?;
        world.http = format!("127.0.0.1:{port}");
        world.host_env = storm.env.clone();
        world.start_host().await?;
        let to_host = Proxy::start(port).await?;
        let random = StdRng::seed_from_u64(storm.seed);
        Ok(StormRun {
            storm,
            world,
            to_host,
            proxied_database,
            random,
            injected: BTreeMap::new(),
        })
    }

    /// Injects one fault and restarts the host if it died.
    async fn inject_fault(&mut self) -> Result<()> {
        // A short storm could end before random choice has killed enough hosts.
        let act = match self.deaths() < DEATHS_MIN {
            true => 0,
            false => self.random.random_range(
                0..if self.proxied_database.to_database.is_some() {
                    5
                } else {
                    3
                },
            ),
        };
        match act {
            0 => {
                self.sleep_randomly(200, 1_200).await;
                self.world.kill_host()?;
                self.record("host killed");
            }
            1 => {
                let point = POINTS[self.random.random_range(0..POINTS.len())];
                let passes = self.random.random_range(1..=20);
                self.world.kill_host()?;
                self.world.host_env = self.storm.env.clone();
                self.world
                    .host_env
                    .push(("ONCELY_FAULT".to_owned(), format!("{point}:{passes}")));
                self.world.spawn_host()?;
                let end = Instant::now() + Duration::from_secs(6);
                while Instant::now() < end && self.world.is_host_running() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                if !self.world.is_host_running() {
                    self.record(&format!("died at {point}"));
                }
                self.world.host_env = self.storm.env.clone();
            }
            2 => {
                let cut = if self.random.random_bool(0.5) {
                    Cut::HttpAnswerLost
                } else {
                    Cut::HttpAnswerTorn
                };
                if self.to_host.cut(cut, Duration::from_secs(3)).await {
                    self.record("answer to a client lost");
                }
            }
            _ => {
                let cuts = [
                    Cut::CommitNotForwarded,
                    Cut::CommitAnswerLost,
                    Cut::CommitDelayed,
                ];
                let cut = cuts[self.random.random_range(0..cuts.len())];
                let proxy = self
                    .proxied_database
                    .to_database
                    .as_ref()
                    .context("find the proxy to the database")?;
                if proxy.cut(cut, Duration::from_secs(3)).await {
                    self.record(&format!("{cut:?}"));
                }
            }
        }
        if !self.world.is_host_running() {
            self.world.start_host().await?;
        }
        self.sleep_randomly(100, 600).await;
        Ok(())
    }

    /// Number of host deaths so far.
    fn deaths(&self) -> u64 {
        let is_death = |what: &str| what.contains("host killed") || what.starts_with("died");
        self.injected
            .iter()
            .filter(|(what, _)| is_death(what))
            .map(|(_, count)| count)
            .sum()
    }

    async fn sleep_randomly(&mut self, from_ms: u64, to_ms: u64) {
        let time = self.random.random_range(from_ms..=to_ms);
        tokio::time::sleep(Duration::from_millis(time)).await;
    }

    fn record(&mut self, what: &str) {
        *self.injected.entry(what.to_owned()).or_default() += 1;
    }

    async fn conclude(
        mut self,
        responses: Vec<OperationResponses>,
        began: Instant,
    ) -> Result<StormReport> {
        let keys = self.storm.keys;
        let mut violations = Vec::new();
        let mut fail = |rule: &'static str, what: String| violations.push(Violation { rule, what });

        // Each operation has its two rows, and its clients one answer.
        let rows = self
            .world
            .database
            .rows("select event_id, attempt_nonce, delta from app.effect")
            .await?;
        let mut effects: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for row in rows {
            effects
                .entry(row[0].clone())
                .or_default()
                .push(row[1].clone());
        }
        for (key, responses) in (0..keys).zip(&responses) {
            let event = event(key);
            let nonces = effects.remove(&event).unwrap_or_default();
            if nonces.len() != 2 || nonces[0] != nonces[1] {
                fail(
                    "effect once",
                    format!("operation {event} left {} rows: {nonces:?}", nonces.len()),
                );
            }
            if responses.answers.len() != 1 {
                fail(
                    "same answer",
                    format!("the clients of {event} received {:?}", responses.answers),
                );
            }
            if !responses.answers.iter().all(|answer| {
                answer.starts_with("200") && nonces.iter().all(|it| answer.contains(it))
            }) {
                fail(
                    "same answer",
                    format!(
                        "{event} was answered with {:?}, and {nonces:?} took effect",
                        responses.answers
                    ),
                );
            }
            if let Some(why) = responses.gave_up.first() {
                fail(
                    "answered",
                    format!(
                        "{} clients of {event} gave up: {why}",
                        responses.gave_up.len()
                    ),
                );
            }
            if !responses.other.contains("422") {
                fail(
                    "other body",
                    format!(
                        "another body under the key of {event} was answered with {}",
                        responses.other
                    ),
                );
            }
        }

        // No other effects, and one count and output for each operation
        for event in effects.keys() {
            fail(
                "effect once",
                format!("{event} took effect but was never posted"),
            );
        }
        let count = self
            .world
            .oncely(&["state", "get", "test", "count"])
            .await?;
        if !count
            .lines()
            .any(|line| line.trim_end().ends_with(&keys.to_string()))
        {
            fail(
                "state",
                format!("the state after {keys} operations is: {count}"),
            );
        }
        let stored = self.outputs(keys).await?;
        if stored.len() as u64 != keys
            || stored.iter().collect::<BTreeSet<_>>().len() as u64 != keys
        {
            fail(
                "outputs",
                format!(
                    "{} outputs are on the stream for {keys} operations",
                    stored.len()
                ),
            );
        }

        // Coverage and report
        let deaths = self.deaths();
        if deaths < DEATHS_MIN {
            fail(
                "not vacuous",
                format!("hosts died {deaths} times, expected at least {DEATHS_MIN}"),
            );
        }
        self.world.kill_host()?;
        let sum = |of: fn(&OperationResponses) -> u64| responses.iter().map(of).sum::<u64>();
        let seen = BTreeMap::from([
            ("operations".to_owned(), keys),
            ("posts".to_owned(), keys * self.storm.posts as u64),
            ("tries".to_owned(), sum(|responses| responses.tries)),
            (
                "replayed answers".to_owned(),
                sum(|responses| responses.replayed),
            ),
        ]);
        let seconds = began.elapsed().as_secs();
        Ok(StormReport {
            storm: self.storm,
            injected: self.injected,
            seen,
            violations,
            seconds,
        })
    }

    /// The events of the outputs, once there are enough or after a minute.
    async fn outputs(&self, wanted: u64) -> Result<Vec<String>> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let stored = self.world.nats.read_stream("OUT").await?;
            if stored.len() as u64 >= wanted || Instant::now() > end {
                let event = |body: &[u8]| {
                    serde_json::from_slice::<Value>(body).unwrap_or_default()["event"].to_string()
                };
                return Ok(stored.iter().map(|stored| event(&stored.body)).collect());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn manifest() -> Result<String> {
    let migrations = guests::repository().join("tests/guests/migrations");
    Ok(format!(
        "[[stream]]\nname = \"OUT\"\nsubjects = [\"out.>\"]\n\n[[worker]]\nname = \"test\"\ncomponent = \"{}\"\n\
         migrations = \"{}\"\noutputs = [\"out.>\"]\nconcurrency = 8\n\n\
         [[worker.route]]\npath = \"/do/{{*what}}\"\nmethods = [\"POST\"]\nwait = \"5s\"\n",
        guests::http_component()?.display(),
        migrations.display()
    ))
}
