//! The native limit: the same effects and outputs without a sandbox, in batches with bulk
//! statements, and one row for all outputs of a batch.
//!
//! It does what a host does for the happy path alone. There are no attempts, no dead letters, no
//! lookup of lost outputs and no second host.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer::PullConsumer, context::Context as JetStream};
use futures::StreamExt;
use serde_json::{Value, json};
use sqlx::postgres::PgPool;
use sqlx::{Postgres, Row, Transaction};
use support::world::World;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::contenders::Work;
use crate::hand_written;

/// Batches at the same time. A key belongs to one of them, so none waits for another.
const LANES: usize = 2;

/// Messages of a batch.
const BATCH: usize = 250;

/// Messages that are pulled and not acknowledged yet.
const IN_FLIGHT: usize = 2_000;

/// Batches whose outputs are being published.
const PUBLISHING: usize = 4;

const TABLES: &str = "
    create schema native;
    create table native.inbox (event_id text primary key, at timestamptz not null default now());
    create table native.state (key text primary key, value bigint not null);
    create table native.effect (event_id text not null, account text not null, delta bigint not null, nonce text not null);
    create index on native.effect (event_id);
    create table native.segment (seq bigint generated always as identity primary key, outputs bytea not null);
";

struct Lane {
    pool: PgPool,
    context: JetStream,
    work: Work,
    publishing: Arc<Semaphore>,
}

/// An output of a batch.
struct Output {
    id: String,
    subject: &'static str,
    body: Vec<u8>,
}

/// Starts the consumer and its lanes.
pub async fn start(world: &World, work: Work) -> Result<Vec<JoinHandle<Result<()>>>> {
    let connections = u32::try_from(LANES + PUBLISHING)?;
    let (pool, context, consumer) =
        hand_written::connect(world, "native", TABLES, connections).await?;
    let mut lanes = Vec::new();
    let mut tasks = Vec::new();
    for _ in 0..LANES {
        let (sender, receiver) = mpsc::channel(IN_FLIGHT);
        let lane = Lane {
            pool: pool.clone(),
            context: context.clone(),
            work,
            publishing: Arc::new(Semaphore::new(PUBLISHING)),
        };
        lanes.push(sender);
        tasks.push(tokio::spawn(lane.run(receiver)));
    }
    tasks.push(tokio::spawn(dispatch(consumer, lanes)));
    Ok(tasks)
}

/// Passes each message to the lane of its key.
async fn dispatch(
    consumer: PullConsumer,
    lanes: Vec<mpsc::Sender<jetstream::Message>>,
) -> Result<()> {
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(IN_FLIGHT)
        .messages()
        .await?;
    while let Some(message) = messages.next().await {
        let message = message?;
        let mut hasher = DefaultHasher::new();
        header(&message, "Key")?.hash(&mut hasher);
        let lane = lanes.get(hasher.finish() as usize % lanes.len());
        lane.context("find the lane")?.send(message).await?;
    }
    Ok(())
}

fn header<'m>(message: &'m jetstream::Message, name: &str) -> Result<&'m str> {
    let headers = message.headers.as_ref().context("find the headers")?;
    let value = headers.get(name).with_context(|| format!("find {name}"))?;
    Ok(value.as_str())
}

impl Lane {
    async fn run(self, mut messages: mpsc::Receiver<jetstream::Message>) -> Result<()> {
        let mut batch = Vec::with_capacity(BATCH);
        while messages.recv_many(&mut batch, BATCH).await > 0 {
            let batch = std::mem::take(&mut batch);
            let (segment, outputs) = self.commit(&batch).await?;
            for message in &batch {
                let client = self.context.client();
                let reply = message.message.reply.clone().context("find the reply")?;
                client.publish(reply, "+ACK".into()).await?;
            }

            // Publish while the next batch runs.
            let permit = Arc::clone(&self.publishing).acquire_owned().await?;
            let (pool, context) = (self.pool.clone(), self.context.clone());
            tokio::spawn(async move {
                let published = publish(&pool, &context, segment, outputs).await;
                drop(permit);
                published.inspect_err(|error| eprintln!("native: {error:#}"))
            });
        }
        Ok(())
    }

    /// One transaction for all messages. Returns the row of their outputs, and the outputs.
    async fn commit(&self, batch: &[jetstream::Message]) -> Result<(i64, Vec<Output>)> {
        let mut by_id: BTreeMap<&str, &jetstream::Message> = BTreeMap::new();
        for message in batch {
            by_id.insert(header(message, "ce-id")?, message);
        }
        let ids: Vec<&str> = by_id.keys().copied().collect();
        let mut tx = self.pool.begin().await?;
        let fresh: Vec<String> = sqlx::query_scalar(
            "insert into native.inbox (event_id) select unnest($1::text[]) on conflict do nothing returning event_id",
        )
        .bind(&ids)
        .fetch_all(&mut *tx)
        .await?;
        let mut messages = Vec::with_capacity(fresh.len());
        for event_id in &fresh {
            let message = by_id.get(event_id.as_str()).context("find a message")?;
            let options: Value = serde_json::from_slice(&message.payload)?;
            let key = options["key"].as_str().context("find the key")?.to_owned();
            messages.push((event_id.as_str(), key));
        }
        let outputs = match self.work {
            Work::State | Work::StateInOrder => count(&mut tx, &messages).await?,
            Work::Sql | Work::DeferredSql | Work::BulkSql => insert(&mut tx, &messages).await?,
        };
        let encoded: Vec<Value> = outputs
            .iter()
            .map(|output| json!([output.id, output.subject, output.body.len()]))
            .collect();
        let mut segment = serde_json::to_vec(&encoded)?;
        outputs
            .iter()
            .for_each(|output| segment.extend(&output.body));
        let row = sqlx::query("insert into native.segment (outputs) values ($1) returning seq")
            .bind(segment)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok((row.try_get(0)?, outputs))
    }
}

/// Adds one to the key of each message.
async fn count(
    tx: &mut Transaction<'_, Postgres>,
    messages: &[(&str, String)],
) -> Result<Vec<Output>> {
    let mut values: BTreeMap<&str, i64> =
        messages.iter().map(|(_, key)| (key.as_str(), 0)).collect();
    let keys: Vec<&str> = values.keys().copied().collect();
    let rows = sqlx::query("select key, value from native.state where key = any($1) for update")
        .bind(&keys)
        .fetch_all(&mut **tx)
        .await?;
    for row in &rows {
        if let Some(value) = values.get_mut(row.try_get::<&str, _>(0)?) {
            *value = row.try_get(1)?;
        }
    }
    let mut outputs = Vec::with_capacity(messages.len());
    for (event_id, key) in messages {
        let value = values.get_mut(key.as_str()).context("find a key")?;
        *value += 1;
        outputs.push(Output {
            id: format!("native:{event_id}:0"),
            subject: "out.state",
            body: serde_json::to_vec(&json!({ "key": key, "value": value, "version": value }))?,
        });
    }
    sqlx::query(
        "insert into native.state (key, value) select * from unnest($1::text[], $2::bigint[])
         on conflict (key) do update set value = excluded.value",
    )
    .bind(&keys)
    .bind(values.values().copied().collect::<Vec<i64>>())
    .execute(&mut **tx)
    .await?;
    Ok(outputs)
}

/// Inserts two rows for each message.
async fn insert(
    tx: &mut Transaction<'_, Postgres>,
    messages: &[(&str, String)],
) -> Result<Vec<Output>> {
    let nonces: Vec<String> = messages
        .iter()
        .map(|_| uuid::Uuid::new_v4().simple().to_string())
        .collect();
    let ids: Vec<&str> = messages.iter().map(|(event_id, _)| *event_id).collect();
    sqlx::query(
        "insert into native.effect select event_id, account, delta, nonce
         from unnest($1::text[], $2::text[]) as given (event_id, nonce),
             (values ('a', -1), ('b', 1)) as both_rows (account, delta)",
    )
    .bind(&ids)
    .bind(&nonces)
    .execute(&mut **tx)
    .await?;
    let outputs = ids.iter().zip(&nonces).map(|(event_id, nonce)| {
        let body =
            json!({ "event_id": event_id, "ordinal": 0, "delta": 1, "attempt_nonce": nonce });
        anyhow::Ok(Output {
            id: format!("native:{event_id}:0"),
            subject: "out.effect",
            body: serde_json::to_vec(&body)?,
        })
    });
    outputs.collect()
}

/// Publishes the outputs of a batch, and deletes their row once all are on their stream.
async fn publish(
    pool: &PgPool,
    context: &JetStream,
    segment: i64,
    outputs: Vec<Output>,
) -> Result<()> {
    let mut acks = Vec::with_capacity(outputs.len());
    for output in outputs {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", output.id);
        let published = context.publish_with_headers(output.subject, headers, output.body.into());
        acks.push(published.await?);
    }
    for ack in acks {
        ack.await?;
    }
    sqlx::query("delete from native.segment where seq = $1")
        .bind(segment)
        .execute(pool)
        .await?;
    Ok(())
}
