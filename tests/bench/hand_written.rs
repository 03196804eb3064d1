//! The baseline: an inbox, the effect and an outbox in one transaction per message, and a relay.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::{
    self, consumer::PullConsumer, consumer::pull, context::Context as JetStream,
};
use futures::TryStreamExt;
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::postgres::{PgPool, PgPoolOptions};
use support::database::Database;
use support::world::World;
use tokio::task::JoinHandle;

use crate::contenders::Work;

/// Messages, and transactions, in flight.
const IN_FLIGHT: usize = 32;

/// Outputs per page.
const PAGE: i64 = 1_000;

pub const TABLES: &str = "
    create schema hand;
    create table hand.inbox (event_id text primary key, at timestamptz not null default now());
    create table hand.state (key text primary key, value bigint not null);
    create table hand.effect (event_id text not null, account text not null, delta bigint not null, nonce text not null);
    create index on hand.effect (event_id);
    create table hand.outbox (seq bigint generated always as identity primary key, id text not null,
        subject text not null, body bytea not null);
";

/// Connects a loop without a host: creates its tables, and a consumer of the input stream.
pub async fn connect(
    world: &World,
    name: &str,
    tables: &'static str,
    connections: u32,
) -> Result<(PgPool, JetStream, PullConsumer)> {
    let Database::Postgres { direct, .. } = &world.database else {
        unreachable!()
    };
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .connect(direct)
        .await?;
    sqlx::raw_sql(tables).execute(&pool).await?;
    let context = jetstream::new(world.nats.client().await?);
    let stream = context.get_stream("IN").await?;
    let config = pull::Config {
        durable_name: Some(name.to_owned()),
        max_ack_pending: 10_000,
        ..Default::default()
    };
    Ok((pool, context, stream.create_consumer(config).await?))
}

/// Starts the consumer and the relay.
pub async fn start(world: &World, work: Work) -> Result<Vec<JoinHandle<Result<()>>>> {
    // One more connection for the relay.
    let connections = IN_FLIGHT as u32 + 1;
    let (pool, context, consumer) = connect(world, "hand", TABLES, connections).await?;
    let relay = tokio::spawn(relay(pool.clone(), context));
    let consume = tokio::spawn(consume(pool, consumer, work));
    Ok(vec![relay, consume])
}

async fn consume(pool: PgPool, consumer: PullConsumer, work: Work) -> Result<()> {
    let messages = consumer
        .stream()
        .max_messages_per_batch(500)
        .messages()
        .await?;
    let handle = |message: jetstream::Message| {
        let pool = pool.clone();
        async move {
            handle(&pool, &message, work).await?;
            message.ack().await.map_err(anyhow::Error::from_boxed)
        }
    };
    messages
        .map_err(anyhow::Error::from)
        .try_for_each_concurrent(IN_FLIGHT, handle)
        .await
}

async fn handle(pool: &PgPool, message: &jetstream::Message, work: Work) -> Result<()> {
    let header = |name: &str| {
        message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(name))
            .map(|value| value.as_str())
    };
    let event_id = header("ce-id").context("find the event id")?;

    // Claim
    let mut tx = pool.begin().await?;
    let claimed =
        sqlx::query("insert into hand.inbox (event_id) values ($1) on conflict do nothing")
            .bind(event_id)
            .execute(&mut *tx)
            .await?;
    if claimed.rows_affected() == 0 {
        return Ok(());
    }

    // Effect
    let options: Value = serde_json::from_slice(&message.payload)?;
    let (subject, body) = match work {
        Work::State | Work::StateInOrder => {
            let key = options["key"].as_str().context("find the key")?;
            let row = sqlx::query(
                "insert into hand.state values ($1, 1)
                 on conflict (key) do update set value = state.value + 1 returning value",
            )
            .bind(key)
            .fetch_one(&mut *tx)
            .await?;
            let value: i64 = row.try_get(0)?;
            (
                "out.state",
                json!({ "key": key, "value": value, "version": value }),
            )
        }
        Work::Sql | Work::DeferredSql | Work::BulkSql => {
            let nonce = uuid::Uuid::new_v4().simple().to_string();
            sqlx::query("insert into hand.effect values ($1, $2, $3, $6), ($1, $4, $5, $6)")
                .bind(event_id)
                .bind("a")
                .bind(-1_i64)
                .bind("b")
                .bind(1_i64)
                .bind(&nonce)
                .execute(&mut *tx)
                .await?;
            (
                "out.effect",
                json!({ "event_id": event_id, "ordinal": 0, "delta": 1, "attempt_nonce": nonce }),
            )
        }
    };

    // Output
    sqlx::query("insert into hand.outbox (id, subject, body) values ($1, $2, $3)")
        .bind(format!("hand:{event_id}:0"))
        .bind(subject)
        .bind(serde_json::to_vec(&body)?)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

/// Reads a page of outputs, publishes them and deletes them.
pub async fn relay(pool: PgPool, context: JetStream) -> Result<()> {
    loop {
        let rows =
            sqlx::query("select seq, id, subject, body from hand.outbox order by seq limit $1")
                .bind(PAGE)
                .fetch_all(&pool)
                .await?;
        if rows.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        let mut seqs: Vec<i64> = Vec::with_capacity(rows.len());
        let mut answers = Vec::with_capacity(rows.len());
        for row in &rows {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", row.try_get::<&str, _>("id")?);
            let (subject, body): (String, Vec<u8>) =
                (row.try_get("subject")?, row.try_get("body")?);
            answers.push(
                context
                    .publish_with_headers(subject, headers, body.into())
                    .await?,
            );
            seqs.push(row.try_get("seq")?);
        }
        for answer in answers {
            answer.await?;
        }
        sqlx::query("delete from hand.outbox where seq = any($1)")
            .bind(&seqs)
            .execute(&pool)
            .await?;
    }
}
