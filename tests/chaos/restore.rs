//! Restores: under load and host kills, the database is restored from an earlier copy.
//!
//! A recovery, interrupted once, makes it consistent with NATS again. Each event has its effect
//! once and one output, before or after the restore.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{World, manifest};

use crate::checker::Violation;

/// Messages per second.
const RATE: u64 = 60;

/// One in this many messages dies.
const DIES: u64 = 25;

/// Maximum time from a recovery until the host is ready.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// The result of the restores.
#[derive(Debug, Default)]
pub struct RestoreReport {
    /// Injected faults and observed events by name.
    pub seen: BTreeMap<&'static str, u64>,
    pub violations: Vec<Violation>,
}

/// Restores the database `times` times under continuous load.
pub async fn run(kind: Kind, times: u32, seed: u64) -> Result<RestoreReport> {
    let mut scene = Scene::start(kind, seed).await?;
    let (published, enough) = (Arc::clone(&scene.published), Arc::clone(&scene.enough));
    let nats = async_nats::connect(scene.world.nats.url())
        .await
        .context("connect a publisher")?;
    let publishing = tokio::spawn(publish(nats, published, enough));
    for _ in 0..times {
        scene
            .restore()
            .await
            .with_context(|| format!("host log:\n{}", tail(&scene.world.host_log())))?;
    }
    scene.sleep_randomly(1_000, 2_000).await;
    scene.enough.store(true, Ordering::Relaxed);
    publishing.await.context("publish")??;
    scene.check().await
}

/// Publishes until the restores are done; each message has its own id.
async fn publish(
    nats: async_nats::Client,
    published: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
) -> Result<()> {
    let context = async_nats::jetstream::new(nats);
    while !enough.load(Ordering::Relaxed) {
        let n = published.load(Ordering::Relaxed);
        let behaviour = if n.is_multiple_of(DIES) {
            "reject"
        } else {
            "insert"
        };
        let NewMessage {
            subject,
            headers,
            body,
        } = NewMessage::new("in.x", &format!("e{n}"), behaviour, r#"{"n": 1}"#);
        let mut map = async_nats::HeaderMap::new();
        headers
            .iter()
            .for_each(|(name, value)| map.append(name.as_str(), value.as_str()));
        context
            .publish_with_headers(subject, map, body.into())
            .await?
            .await
            .context("publish")?;
        published.store(n + 1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(1_000 / RATE)).await;
    }
    Ok(())
}

struct Scene {
    world: World,
    random: StdRng,
    published: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    restored: RestoreReport,
}

impl Scene {
    async fn start(kind: Kind, seed: u64) -> Result<Self> {
        let mut world =
            World::without_host(kind, &manifest("batch = 8\nack_wait = \"2s\"")?).await?;
        // Its duplicate window is tiny: only the recovery can find out which outputs are stored.
        world
            .nats
            .make_stream("OUT", "out.>", Duration::from_millis(100))
            .await?;
        world.start_host().await?;
        Ok(Scene {
            world,
            random: StdRng::seed_from_u64(seed ^ 0x0005_70e5),
            published: Arc::default(),
            enough: Arc::default(),
            restored: RestoreReport::default(),
        })
    }

    async fn restore(&mut self) -> Result<()> {
        self.sleep_randomly(1_500, 4_000).await;
        self.world.kill_host()?;
        let backup = self.world.database.copy(self.world.folder.path()).await?;
        self.world.start_host().await?;
        self.sleep_randomly(3_000, 5_000).await;
        self.world.kill_host()?;
        self.world.start_host().await?;
        self.sleep_randomly(2_500, 4_000).await;
        self.world.kill_host()?;
        let lost = "select count(*) from oncely.inbox";
        let lost = self.world.database.number(lost).await? - backup.number(lost).await?;
        self.record(
            "events missing in the restored database",
            u64::try_from(lost)?,
        );
        self.world.database = backup;
        self.world.spawn_host()?;
        self.world
            .not_ready("the database was restored to an earlier time than NATS")
            .await?;
        self.record("databases restored and detected", 1);
        self.recover().await
    }

    /// Recovers, with a host kill during the first recovery.
    async fn recover(&mut self) -> Result<()> {
        let mut cut_off = Command::new(guests::oncely()?)
            .arg("recover")
            .current_dir(self.world.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("run `oncely recover`")?;
        self.sleep_randomly(3_500, 5_500).await;
        self.world.kill_host()?;
        if !cut_off
            .wait()
            .context("wait for the interrupted recovery")?
            .success()
        {
            self.record("recoveries interrupted", 1);
        }
        self.world.spawn_host()?;
        let end = Instant::now() + READY_WITHIN;
        loop {
            let status = self
                .world
                .oncely_json(&["status", "--json"])
                .await
                .unwrap_or_default();
            if status["ready"] == true {
                return Ok(());
            }
            if status["not_ready"]
                .as_str()
                .is_some_and(|why| why.contains("oncely recover"))
            {
                self.world.oncely(&["recover"]).await?;
                self.record("recoveries", 1);
            }
            ensure!(
                Instant::now() < end,
                "not ready {READY_WITHIN:?} after a recovery: {}",
                status["not_ready"]
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until all messages are settled and published, and checks the counts.
    async fn check(mut self) -> Result<RestoreReport> {
        let events = self.published.load(Ordering::Relaxed);
        self.record("events", events);
        let dead = events.div_ceil(DIES);
        self.world.quiet(i64::try_from(events)?).await?;
        let mut violations = Vec::new();
        let mut expect = |rule, what: &str, found: u64, wanted: u64| {
            if found != wanted {
                violations.push(Violation {
                    rule,
                    what: format!("{what}: {found}, expected {wanted}"),
                });
            }
        };
        let database = &self.world.database;
        let number = async |sql: &str| anyhow::Ok(u64::try_from(database.number(sql).await?)?);
        let live = events - dead;
        let odd = "select count(*) from (select event_id from app.effect group by event_id
            having count(*) <> 2 or sum(delta) <> 0 or count(distinct attempt_nonce) <> 1) as odd";
        expect(
            "effect once",
            "events without exactly two rows of one attempt",
            number(odd).await?,
            0,
        );
        let effects = number("select count(distinct event_id) from app.effect").await?;
        expect("effect once", "events that took effect", effects, live);
        let dead_letters =
            number("select count(*) from oncely.dead_letter where state = 'open'").await?;
        expect("dead letters", "open dead letters", dead_letters, dead);
        for (stream, wanted) in [("OUT", live), ("ONCELY_DLQ", dead)] {
            let stored = self.world.nats.read_stream(stream).await?;
            let mut ids: Vec<&String> = stored
                .iter()
                .filter_map(|message| message.headers.get("Oncely-Output-Id"))
                .collect();
            expect(
                "outputs",
                &format!("messages on {stream}"),
                stored.len() as u64,
                wanted,
            );
            ids.sort_unstable();
            ids.dedup();
            expect(
                "outputs",
                &format!("outputs on {stream}"),
                ids.len() as u64,
                wanted,
            );
        }
        self.world.kill_host()?;
        self.restored.violations = violations;
        Ok(self.restored)
    }

    async fn sleep_randomly(&mut self, from_ms: u64, to_ms: u64) {
        let time = self.random.random_range(from_ms..=to_ms);
        tokio::time::sleep(Duration::from_millis(time)).await;
    }

    fn record(&mut self, what: &'static str, times: u64) {
        *self.restored.seen.entry(what).or_default() += times;
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
