//! One measurement: a fresh database, a fresh broker with all messages on its stream, and a clock.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use async_nats::datetime::DateTime;
use async_nats::jetstream::{self, stream::Stream};
use serde_json::{Value, json};
use support::database::{Database, Kind};
use support::guests;
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::production::RunningHost;
use support::world::{World, manifest, manifest_of};
use tokio::task::JoinHandle;

use crate::contenders::{Contender, Implementation, Mix, Work};
use crate::{PATIENCE, cpu, hand_written, native};

/// Messages between an original and its duplicate.
const DISTANCE: usize = 777;

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
    /// Bytes of WAL per message; none on SQLite.
    pub wal_bytes: Option<f64>,
    /// Committed transactions per message; none on SQLite.
    pub transactions: Option<f64>,
    /// The largest resident memory of the host; none of a contender in this process.
    pub memory_mib: Option<f64>,
}

impl Measured {
    pub fn json(&self) -> Value {
        json!({
            "rate": self.rate, "cpu_micros_per_message": self.cpu_micros,
            "wal_bytes_per_message": self.wal_bytes,
            "transactions_per_message": self.transactions, "peak_memory_mib": self.memory_mib,
        })
    }

    /// The costs of a message, for people.
    pub fn costs(&self) -> String {
        let mut costs = cpu::describe(&self.cpu_micros);
        costs.extend(self.wal_bytes.map(|bytes| format!("WAL {bytes:.0} B")));
        costs.extend(self.memory_mib.map(|memory| format!("{memory:.0} MiB")));
        format!("µs of CPU each: {}", costs.join(", "))
    }
}

/// Measures a contender once.
pub async fn measure(
    contender: &Contender,
    cluster: &Cluster,
    messages: usize,
) -> Result<Measured> {
    let mut world = prepare(contender, cluster).await?;
    fill_inbox(&world, contender.size.inbox).await?;
    world
        .nats
        .publish_all((0..messages).map(|n| message(contender, n)).collect())
        .await?;

    // Measurement
    let context = jetstream::new(world.nats.client().await?);
    let work_before = DatabaseWork::of(&world.database).await?;
    let cpu_before = cpu::seconds();
    let tasks = start(contender, &mut world).await?;
    let _others = (1..contender.size.hosts)
        .map(|number| RunningHost::spawn(&world, &format!("host{number}")))
        .collect::<Result<Vec<_>>>()?;
    let odd = (0..messages).filter(|n| is_odd(contender, *n)).count();
    let (poison, duplicates) = match contender.mix {
        Mix::Duplicates(_) => (0, odd),
        _ => (odd, 0),
    };
    let (out, dlq) = (
        context.get_stream("OUT").await?,
        context.get_stream("ONCELY_DLQ").await?,
    );
    wait_for(&out, messages - poison - duplicates)
        .await
        .with_context(|| format!("outputs; host log:\n{}", world.host_log()))?;
    wait_for(&dlq, poison).await.context("dead letters")?;
    let cpu_micros = cpu::micros_since(&cpu_before, messages);
    let work = DatabaseWork::of(&world.database).await?;
    let memory_mib = world.host_pid().map(cpu::peak_memory_mib).transpose()?;
    tasks.iter().for_each(JoinHandle::abort);

    // Rate
    let mut times = stored_times(&out).await?;
    times.extend(stored_times_if_any(&dlq).await?);
    let first = times.iter().min().context("find the first output")?;
    let last = times.iter().max().context("find the last output")?;
    let each = |after: Option<f64>, before: Option<f64>| Some((after? - before?) / messages as f64);
    Ok(Measured {
        rate: messages as f64 / (*last - *first).as_seconds_f64(),
        cpu_micros,
        wal_bytes: each(work.wal_bytes, work_before.wal_bytes),
        transactions: each(work.transactions, work_before.transactions),
        memory_mib,
    })
}

/// A fresh database and broker with tables, streams and a compiled component.
pub async fn prepare(contender: &Contender, cluster: &Cluster) -> Result<World> {
    let settings = match contender.implementation {
        Implementation::HandWritten | Implementation::Native => "",
        Implementation::Host { settings }
        | Implementation::HostWithoutGroups { settings }
        | Implementation::HostInWalMode { settings }
        | Implementation::HostOnSqlite { settings } => settings,
    };
    let manifest = match contender.work {
        Work::BulkSql => manifest_of(&guests::batch_component()?, settings),
        _ => manifest(settings)?,
    };
    let mut world = World::without_host(Kind::Sqlite, &manifest).await?;
    if !matches!(
        contender.implementation,
        Implementation::HostOnSqlite { .. }
    ) {
        world.database = Database::on(cluster).await?;
    }
    if let Implementation::HostWithoutGroups { .. } = contender.implementation {
        let off = "do $$ begin
             execute format('alter database %I set oncely.output_groups = off', current_database());
         end $$";
        world.database.execute(off).await?;
    }
    std::fs::write(world.folder.path().join("schema.json"), SCHEMA).context("write the schema")?;
    let is_wal = matches!(
        contender.implementation,
        Implementation::HostInWalMode { .. }
    );
    if is_wal {
        world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
    }
    world.start_host().await?;
    if is_wal {
        world
            .until("select count(*) from oncely.relay where mode = 'wal'", 1)
            .await?;
    }
    world.stop_host().await?;
    Ok(world)
}

/// Starts the contender. Returns the tasks of one that runs in this process.
pub async fn start(
    contender: &Contender,
    world: &mut World,
) -> Result<Vec<JoinHandle<Result<()>>>> {
    match contender.implementation {
        Implementation::HandWritten => hand_written::start(world, contender.work).await,
        Implementation::Native => native::start(world, contender.work).await,
        _ => {
            world.spawn_host()?;
            Ok(Vec::new())
        }
    }
}

/// Inserts rows of other events into the inbox.
async fn fill_inbox(world: &World, rows: usize) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    let insert = format!(
        "insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
         select 'test', 'earlier-' || n, 'done', sha256(n::text::bytea), 'IN', n, (oncely.inbox_partitions()).current
         from generate_series(1, {rows}) n"
    );
    world.database.execute(&insert).await?;
    world.database.execute("vacuum analyze").await
}

/// What PostgreSQL has done so far.
#[derive(Default)]
struct DatabaseWork {
    /// Of the whole cluster.
    wal_bytes: Option<f64>,
    transactions: Option<f64>,
}

impl DatabaseWork {
    async fn of(database: &Database) -> Result<Self> {
        if let Database::Sqlite(_) = database {
            return Ok(DatabaseWork::default());
        }
        let wal = "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint";
        let transactions =
            "select xact_commit from pg_stat_database where datname = current_database()";
        Ok(DatabaseWork {
            wal_bytes: Some(database.number(wal).await? as f64),
            transactions: Some(database.number(transactions).await? as f64),
        })
    }
}

/// Whether a message is one of those that make the mix. They are spread evenly over the stream.
fn is_odd(contender: &Contender, n: usize) -> bool {
    let is_among = |percent: usize| n * percent % 100 < percent;
    match contender.mix {
        Mix::Clean => false,
        Mix::Poison(percent) | Mix::PoisonAfterSql(percent) => is_among(percent),
        Mix::Duplicates(percent) => n >= DISTANCE && is_among(percent),
    }
}

pub fn message(contender: &Contender, n: usize) -> NewMessage {
    let is_odd = is_odd(contender, n);
    let behaviour = match (contender.mix, contender.work) {
        (Mix::Poison(_), _) if is_odd => "reject",
        (Mix::PoisonAfterSql(_), _) if is_odd => "insert,reject",
        (_, Work::State | Work::StateInOrder) => "state_counter",
        (_, Work::Sql) => "insert",
        (_, Work::DeferredSql) => "defer",
        (_, Work::BulkSql) => "bulk",
    };
    // A duplicate follows its original after some batches.
    let n = match contender.mix {
        Mix::Duplicates(_) if is_odd => n - DISTANCE,
        _ => n,
    };
    let size = contender.size;
    let key = format!("k{}", n % size.keys);
    let is_ordered = contender.work == Work::StateInOrder;
    let mut body = json!({ "key": key, "ordered": is_ordered });
    if size.padding > 0 {
        body["padding"] = size.padding.into();
        body["filler"] = "x".repeat(size.padding).into();
    }
    let mut behaviour = behaviour.to_owned();
    if size.statements > 0 {
        body["n"] = 0.into();
        behaviour = format!("{}{behaviour}", "insert,".repeat(size.statements));
    }
    let mut message = NewMessage::new("in.x", &format!("e{n}"), &behaviour, &body.to_string());
    message.headers.push(("Key".to_owned(), key));
    message
}

pub async fn wait_for(stream: &Stream, messages: usize) -> Result<()> {
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
pub async fn stored_times(stream: &Stream) -> Result<Vec<DateTime>> {
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
