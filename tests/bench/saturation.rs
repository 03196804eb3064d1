//! A saturated host: the age of its oldest committed, unpublished output.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use serde_json::{Value, json};
use support::database::{Database, Kind};
use support::metrics::{scrape, value};
use support::nats::{NatsServer, NewMessage};
use support::postgres::Cluster;
use support::world::{World, manifest};

/// Sampling interval.
const SAMPLE_EVERY: Duration = Duration::from_millis(200);

/// Minimum backlog that the publisher maintains.
const BACKLOG: u64 = 4_000;

/// The work of each message: two rows and an output.
const SETTINGS: &str = "[worker.retry]\nattempts = 1";

/// Limit of the 99th percentile of the age, in seconds.
const AGE_MAX: f64 = 1.0;

/// State shared by the publisher and the sampler.
#[derive(Default)]
struct Load {
    published: AtomicU64,
    is_over: AtomicBool,
}

/// Saturates a host for a while and samples the age; true when it stays below the limit.
pub async fn run(kind: Kind, time: Duration, env: Vec<(String, String)>) -> Result<(bool, Value)> {
    // Host and load
    let mut world = World::without_host(Kind::Sqlite, &manifest(SETTINGS)?).await?;

    // Kept alive until the end.
    let cluster = match kind {
        Kind::Sqlite => None,
        Kind::Postgres | Kind::Pgbouncer => {
            Some(tokio::task::spawn_blocking(Cluster::start_durable).await??)
        }
    };
    if let Some(cluster) = &cluster {
        world.database = Database::on(cluster).await?;
    }
    world.host_env = env.clone();
    world.start_host().await?;
    let load = Load::default();
    let (samples, published) =
        tokio::join!(sample(&world, time, &load), publish(&world.nats, &load));
    let (mut samples, ()) = (samples?, published?);
    let published = load.published.load(Ordering::Relaxed);
    let ended = Instant::now();
    world
        .quiet(i64::try_from(published)?)
        .await
        .context("wait until the backlog is handled")?;
    let drained = ended.elapsed();

    // Checks and report
    let stored = jetstream::new(world.nats.client().await?)
        .get_stream("OUT")
        .await?
        .cached_info()
        .state
        .messages;
    ensure!(
        stored == published,
        "{published} messages have {stored} outputs on the stream"
    );
    samples.ages.sort_by(f64::total_cmp);
    let p99 = samples.age(0.99);
    let holds = p99 < AGE_MAX;
    let saturated = samples.saturated as f64 / samples.ages.len().max(1) as f64;
    println!(
        "{kind:?}: {published} messages in {:?}, backlog in {:.0} % of the samples; age of the oldest unpublished output: \
         median {:.3} s, p99 {p99:.3} s, maximum {:.3} s",
        time,
        saturated * 100.0,
        samples.age(0.5),
        samples.age(1.0)
    );
    ensure!(
        saturated > 0.9,
        "the host was not saturated: it had a backlog in {:.0} % of the samples",
        saturated * 100.0
    );
    let report = json!({
        "database": format!("{kind:?}").to_lowercase(), "seconds": time.as_secs_f64(), "env": env, "messages": published,
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "messages_per_second": samples.handled as f64 / time.as_secs_f64(), "saturated": saturated,
        "samples": samples.ages.len(), "age_seconds": { "p50": samples.age(0.5), "p99": p99, "max": samples.age(1.0) },
        "wanted_p99_below": AGE_MAX, "seconds_to_drain": drained.as_secs_f64(), "holds": holds,
    });
    Ok((holds, report))
}

/// Measurements of a saturated host.
#[derive(Default)]
struct Samples {
    ages: Vec<f64>,
    /// Number of samples with a backlog.
    saturated: usize,
    handled: u64,
}

impl Samples {
    /// The age at a quantile; the ages must be sorted.
    fn age(&self, share: f64) -> f64 {
        let last = self.ages.len().saturating_sub(1);
        let at = (last as f64 * share).ceil() as usize;
        self.ages.get(at.min(last)).copied().unwrap_or_default()
    }
}

async fn sample(world: &World, time: Duration, load: &Load) -> Result<Samples> {
    let mut samples = Samples::default();
    let (began, mut tick) = (Instant::now(), tokio::time::interval(SAMPLE_EVERY));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while began.elapsed() < time {
        tick.tick().await;
        let text = scrape(world).await.context("scrape the metrics")?;
        let Some(unhandled) = value(&text, r#"oncely_unhandled_messages{worker="test"}"#) else {
            continue;
        };
        samples.ages.push(
            value(&text, "oncely_unpublished_age_max_seconds")
                .context("find the age in the metrics")?,
        );
        samples.saturated += usize::from(unhandled > 0.0);
    }
    load.is_over.store(true, Ordering::Relaxed);
    samples.handled = u64::try_from(
        world
            .database
            .number("select count(*) from oncely.inbox")
            .await?,
    )?;
    Ok(samples)
}

/// Publishes whenever the backlog is too small.
async fn publish(nats: &NatsServer, load: &Load) -> Result<()> {
    let stream = jetstream::new(nats.client().await?)
        .get_stream_no_info("IN")
        .await
        .context("open the stream")?;
    let mut next = 0_u64;
    while !load.is_over.load(Ordering::Relaxed) {
        let consumer = stream
            .consumer_info("oncely-test")
            .await
            .context("read the consumer")?;
        if consumer.num_pending < BACKLOG {
            let chunk = next..next + BACKLOG / 2;
            let message = |n| NewMessage::new("in.x", &format!("e{n}"), "insert", r#"{"n": 1}"#);
            nats.publish_all(chunk.clone().map(message).collect())
                .await?;
            next = chunk.end;
            load.published.store(next, Ordering::Relaxed);
        } else {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}
