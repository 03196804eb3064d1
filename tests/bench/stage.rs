//! One measurement: a fresh database, a fresh broker with all messages on its stream, and a clock.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use async_nats::datetime::DateTime;
use async_nats::jetstream::{self, stream::Stream};
use serde_json::json;
use support::database::{Database, Kind};
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::world::{World, manifest};

use crate::contenders::{Contender, Implementation, Work};
use crate::{PATIENCE, cpu, hand_written};

const KEYS: usize = 1_000;

/// The JSON Schema of the messages.
const SCHEMA: &str = r#"{
    "type": "object",
    "required": ["key", "ordered"],
    "properties": {
        "key": {"type": "string", "pattern": "^k[0-9]+$", "maxLength": 10},
        "ordered": {"type": "boolean"}
    },
    "additionalProperties": false
}"#;

/// The result of a measurement.
pub struct Measured {
    /// Messages per second, from the first output to the last.
    pub rate: f64,
    /// Microseconds of CPU time per message, by program. Unlike the rate, this hardly depends on
    /// other load of the machine.
    pub cpu_micros: BTreeMap<String, f64>,
}

pub async fn measure(
    contender: &Contender,
    cluster: &Cluster,
    messages: usize,
) -> Result<Measured> {
    let settings = match contender.implementation {
        Implementation::HandWritten => "",
        Implementation::Host { settings } | Implementation::HostInWalMode { settings } => settings,
    };
    let mut world = World::without_host(Kind::Sqlite, &manifest(settings)?).await?;
    world.database = Database::on(cluster).await?;
    std::fs::write(world.folder.path().join("schema.json"), SCHEMA).context("write the schema")?;
    let is_wal = matches!(
        contender.implementation,
        Implementation::HostInWalMode { .. }
    );
    if is_wal {
        world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
    }

    // This start creates the streams and tables and compiles the component.
    world.start_host().await?;
    if is_wal {
        world
            .until("select count(*) from oncely.relay where mode = 'wal'", 1)
            .await?;
    }
    world.stop_host().await?;
    world
        .nats
        .publish_all((0..messages).map(|n| message(contender, n)).collect())
        .await?;

    // Measurement
    let context = jetstream::new(world.nats.client().await?);
    let cpu_before = cpu::seconds();
    let by_hand = match contender.implementation {
        Implementation::HandWritten => Some(hand_written::start(&world, contender.work).await?),
        Implementation::Host { .. } | Implementation::HostInWalMode { .. } => {
            world.spawn_host()?;
            None
        }
    };
    let poison = contender
        .poison
        .map_or(0, |(percent, _)| messages * percent / 100);
    let (out, dlq) = (
        context.get_stream("OUT").await?,
        context.get_stream("ONCELY_DLQ").await?,
    );
    wait_for(&out, messages - poison)
        .await
        .with_context(|| format!("outputs; host log:\n{}", world.host_log()))?;
    wait_for(&dlq, poison).await.context("dead letters")?;
    let cpu_micros = cpu::micros_since(&cpu_before, messages);
    if let Some(by_hand) = by_hand {
        by_hand.stop();
    }

    // Rate
    let mut times = stored_times(&out).await?;
    times.extend(stored_times_if_any(&dlq).await?);
    let first = times.iter().min().context("find the first output")?;
    let last = times.iter().max().context("find the last output")?;
    Ok(Measured {
        rate: messages as f64 / (*last - *first).as_seconds_f64(),
        cpu_micros,
    })
}

fn message(contender: &Contender, n: usize) -> NewMessage {
    let key = format!("k{}", n % KEYS);
    // Spread evenly over the stream.
    let fails = contender
        .poison
        .is_some_and(|(percent, _)| n * percent % 100 < percent);
    let behaviour = match (contender.work, fails, contender.poison) {
        (_, true, Some((_, false))) => "reject",
        (_, true, _) => "insert,reject",
        (Work::State | Work::StateInOrder, ..) => "state_counter",
        (Work::Sql, ..) => "insert",
    };
    let body = json!({ "key": key, "ordered": contender.work == Work::StateInOrder });
    let mut message = NewMessage::new("in.x", &format!("e{n}"), behaviour, &body.to_string());
    message.headers.push(("Key".to_owned(), key));
    message
}

async fn wait_for(stream: &Stream, messages: usize) -> Result<()> {
    let (mut seen, mut moved) = (0, Instant::now());
    while seen < messages {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let now = usize::try_from(stream.get_info().await?.state.messages)?;
        if now != seen {
            (seen, moved) = (now, Instant::now());
        }
        ensure!(
            moved.elapsed() < PATIENCE,
            "only {seen} of {messages} messages arrived"
        );
    }
    ensure!(
        seen == messages,
        "{seen} messages arrived, expected {messages}"
    );
    Ok(())
}

/// Storage times of the first and the last message of a stream.
async fn stored_times(stream: &Stream) -> Result<Vec<DateTime>> {
    let state = stream.get_info().await?.state;
    Ok(vec![state.first_timestamp, state.last_timestamp])
}

async fn stored_times_if_any(stream: &Stream) -> Result<Vec<DateTime>> {
    if stream.get_info().await?.state.messages == 0 {
        Ok(Vec::new())
    } else {
        stored_times(stream).await
    }
}
