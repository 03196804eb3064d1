//! Takeovers: a host freezes, or vanishes from the network, within a transaction on hot rows.
//!
//! Measures how long no message on one of these rows is settled.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use support::database::Kind;
use support::nats::NewMessage;
use support::proxy::Proxy;
use support::world::{World, manifest, signal};

use crate::checker::Violation;
use crate::proxied_database::{HostBuild, ProxiedDatabase};

/// Maximum length of a takeover, independent of the guest's time limit.
const WITHIN: Duration = Duration::from_secs(15);

/// Timeout for waits.
const PATIENCE: Duration = Duration::from_secs(120);

/// Rows that all messages share.
const ACCOUNTS: [(&str, &str); 2] = [("a", "b"), ("c", "d")];

/// Number of messages that keep both hosts busy.
const BUSY_WITH: usize = 120;

/// The way a host is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Frozen,
    Vanished,
}

/// The length of each takeover by kind of loss, and all violations.
#[derive(Debug, Default)]
pub struct TakeoverReport {
    pub ms: BTreeMap<&'static str, Vec<u64>>,
    pub violations: Vec<Violation>,
}

/// Freezes and partitions hosts, `times` times each.
pub async fn run(times: u32, env: &[(String, String)]) -> Result<TakeoverReport> {
    let mut scene = Scene::start(env).await?;
    let mut taken_over = TakeoverReport::default();
    for _ in 0..times {
        for loss in [Loss::Frozen, Loss::Vanished] {
            let took = scene.lose(loss).await?;
            let name = if loss == Loss::Frozen {
                "frozen"
            } else {
                "vanished"
            };
            taken_over
                .ms
                .entry(name)
                .or_default()
                .push(u64::try_from(took.as_millis())?);
            if took > WITHIN {
                let what = format!("no message on a row of a {name} host was settled for {took:?}");
                taken_over.violations.push(Violation {
                    rule: "takeover",
                    what,
                });
            }
        }
    }
    taken_over.violations.extend(scene.check().await?);
    Ok(taken_over)
}

struct Scene {
    world: World,
    to_nats: Proxy,
    to_database: Proxy,
    // Stops the server on drop.
    _cluster: support::postgres::Cluster,
    published: usize,
}

impl Scene {
    async fn start(env: &[(String, String)]) -> Result<Self> {
        let settings =
            "batch = 8\nconcurrency = 2\nack_wait = \"2s\"\n[worker.limits]\ntime = \"1h\"";
        let mut world = World::without_host(Kind::Sqlite, &manifest(settings)?).await?;
        let ProxiedDatabase {
            cluster,
            to_database,
        } = ProxiedDatabase::install(&mut world, Kind::Postgres, HostBuild::CrashPoints).await?;
        let to_nats = Proxy::start(world.nats.port()).await?;
        world.nats_url = format!("nats://127.0.0.1:{}", to_nats.port());
        world.host_env = env.to_vec();
        world.start_host().await?;
        let to_database = to_database.context("find the proxy to the database")?;
        Ok(Scene {
            world,
            to_nats,
            to_database,
            _cluster: cluster.context("find the cluster")?,
            published: 0,
        })
    }

    /// Loses the first host while both are busy. Returns the longest stall of one of the rows.
    async fn lose(&mut self, loss: Loss) -> Result<Duration> {
        let mut rival = self.world.spawn_rival_directly()?;
        self.publish(BUSY_WITH, 150).await?;
        let began = self.settled().await?;

        // Both hosts are in the middle of their messages.
        self.until(began + BUSY_WITH as i64 / 3).await?;
        let pid = self.world.host_pid().context("find the host")?;
        match loss {
            Loss::Frozen => signal(pid, "STOP")?,
            Loss::Vanished => self.set_blackhole(true),
        }

        self.publish(ACCOUNTS.len() * 4, 0).await?;
        let took = self.longest_stall(Instant::now()).await?;
        match loss {
            Loss::Frozen => signal(pid, "CONT")?,
            Loss::Vanished => self.set_blackhole(false),
        }

        // The lost host resumes, or finds out that it was replaced.
        tokio::time::sleep(Duration::from_secs(1)).await;
        rival.kill().context("kill the second host")?;
        rival.wait().context("wait for the second host")?;
        self.publish(ACCOUNTS.len(), 0).await?;
        self.until(self.published as i64).await?;
        Ok(took)
    }

    fn set_blackhole(&self, is_blackhole: bool) {
        self.to_nats.set_blackhole(is_blackhole);
        self.to_database.set_blackhole(is_blackhole);
    }

    /// Publishes messages that share a few rows and hold them for `ms` milliseconds.
    async fn publish(&mut self, count: usize, ms: u64) -> Result<()> {
        let message = |n: usize| {
            let (from, to) = ACCOUNTS[n % ACCOUNTS.len()];
            let options = json!({
                "from": from, "to": to, "delta": 1, "n": 1, "key": from, "seq": n, "ms": ms, "sql": true,
            });
            NewMessage::new(
                "in.ledger",
                &format!("e{n}"),
                "ledger,slow",
                &options.to_string(),
            )
        };
        let messages = (self.published..self.published + count)
            .map(message)
            .collect();
        self.published += count;
        self.world.nats.publish_all(messages).await
    }

    async fn settled(&self) -> Result<i64> {
        self.world
            .database
            .number("select count(*) from oncely.inbox")
            .await
    }

    /// Waits until `wanted` messages are settled.
    async fn until(&self, wanted: i64) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.settled().await? < wanted {
            ensure!(
                Instant::now() < end,
                "only {} of {wanted} messages are settled after {PATIENCE:?}:\n{}",
                self.settled().await?,
                self.world.host_log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Waits until everything is settled. Returns the longest time after `lost` in which no message
    /// on one of the rows was settled, although more were pending.
    async fn longest_stall(&self, lost: Instant) -> Result<Duration> {
        let mut longest = Duration::ZERO;
        let mut seen = BTreeMap::new();
        loop {
            let is_over = self.settled().await? >= self.published as i64;
            for row in self
                .world
                .database
                .rows("select account, count(*) from app.effect group by account")
                .await?
            {
                let [account, count] = row.as_slice() else {
                    bail!("unexpected row {row:?}")
                };
                let (before, since) = seen
                    .entry(account.clone())
                    .or_insert_with(|| (count.clone(), lost));
                if before != count {
                    longest = longest.max(since.elapsed());
                    (*before, *since) = (count.clone(), Instant::now());
                }
            }
            if is_over {
                return Ok(longest);
            }
            ensure!(
                lost.elapsed() < PATIENCE,
                "not all messages are settled after {PATIENCE:?}:\n{}",
                self.world.host_log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Checks that each message has its two rows and all rows sum to zero.
    async fn check(&mut self) -> Result<Vec<Violation>> {
        let mut violations = Vec::new();
        let odd = "select event_id from app.effect group by event_id
            having count(*) <> 2 or sum(delta) <> 0 or count(distinct attempt_nonce) <> 1";
        for row in self.world.database.rows(odd).await? {
            let what = format!(
                "event {} does not have exactly two rows of one attempt",
                row.concat()
            );
            violations.push(Violation {
                rule: "effect once",
                what,
            });
        }
        let events = self
            .world
            .database
            .number("select count(distinct event_id) from app.effect")
            .await?;
        if events != self.published as i64 {
            let what = format!("{events} of {} events took effect", self.published);
            violations.push(Violation {
                rule: "effect once",
                what,
            });
        }
        let dead = self
            .world
            .database
            .number("select count(*) from oncely.dead_letter")
            .await?;
        if dead > 0 {
            violations.push(Violation {
                rule: "dead letters",
                what: format!("{dead} messages died"),
            });
        }
        self.world.kill_host()?;
        Ok(violations)
    }
}
