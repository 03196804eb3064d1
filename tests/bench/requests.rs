//! Requests with an idempotency key, compared with a hand-written service: one update and one
//! output each, over 1, 16 and 256 connections.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::postgres::{PgPool, PgPoolOptions};
use support::database::{Database, Kind};
use support::guests;
use support::postgres::Cluster;
use support::world::{World, http_manifest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::statistics::{median, percentile};
use crate::{cpu, hand_written};

const CLIENTS: [usize; 3] = [1, 16, 256];
const ACCOUNTS: usize = 1_000;

/// Connections of the hand-written service to the database: its best number on two cores.
const CONNECTIONS: u32 = 16;

const TABLES: &str = "
    create table hand.request (key text primary key, fingerprint bytea not null, status integer not null,
        body bytea not null, at timestamptz not null default now());
    create table hand.balance (account text primary key, amount bigint not null);
    insert into hand.balance select 'k' || n, 0 from generate_series(0, 999) n;
";

/// One measurement.
struct Measured {
    /// Requests per second.
    rate: f64,
    /// Response times in milliseconds: median and 99th percentile.
    p50: f64,
    p99: f64,
    cpu_micros: BTreeMap<String, f64>,
}

/// Measures both in rotation. `settings` are further lines of the worker's manifest.
pub async fn measure(time: Duration, rounds: usize, settings: &str) -> Result<Value> {
    // A host and a hand-written service on one database.
    tokio::task::spawn_blocking(guests::http_component).await??;
    let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
    let manifest = http_manifest("10s", "\n[[worker.route]]\npath = \"/do/{*what}\"\n")?;
    let worker = "name = \"test\"\n";
    let manifest = manifest.replace(worker, &format!("{worker}{settings}\n"));
    let mut world = World::without_host(Kind::Sqlite, &manifest).await?;
    world.database = Database::on(&cluster).await?;
    world.start_host().await?;
    let accounts = "insert into app.balance select 'k' || n, 0 from generate_series(0, 999) n";
    world.database.execute(accounts).await?;
    let by_hand = start_by_hand(&world).await?;
    let host = world.ingress_url()?.replace("http://", "");

    // Measurements
    let mut measured: BTreeMap<(usize, &str), Vec<Measured>> = BTreeMap::new();
    for round in 1..=rounds {
        for clients in CLIENTS {
            for (name, address) in [("by hand", &by_hand), ("oncely", &host)] {
                let one = load(address, clients, time)
                    .await
                    .with_context(|| format!("{name}, {clients} clients"))?;
                println!(
                    "round {round}  {clients:>3} clients  {name:<8} {:>7.0} requests/s, p50 {:.1} ms, p99 {:.1} ms; µs of \
                     CPU each: {}",
                    one.rate,
                    one.p50,
                    one.p99,
                    cpu::describe(&one.cpu_micros).join(", ")
                );
                measured.entry((clients, name)).or_default().push(one);
            }
        }
    }
    check_outputs(&world).await?;

    // Report
    let median_of = |clients: usize, name: &str, value: fn(&Measured) -> f64| {
        let values = measured.iter().filter(|(key, _)| **key == (clients, name));
        let values: Vec<f64> = values.flat_map(|(_, all)| all.iter().map(value)).collect();
        median(&values)
    };
    let rows: Vec<Value> = CLIENTS
        .iter()
        .map(|clients| {
            let of = |name: &str| {
                json!({
                    "rate": median_of(*clients, name, |one| one.rate),
                    "p50_ms": median_of(*clients, name, |one| one.p50),
                    "p99_ms": median_of(*clients, name, |one| one.p99),
                })
            };
            let rate = |name: &str| median_of(*clients, name, |one| one.rate);
            let ratio = rate("oncely") / rate("by hand");
            println!("{clients:>3} clients: {ratio:.2} times the hand-written service");
            json!({ "clients": clients, "by_hand": of("by hand"), "oncely": of("oncely"), "ratio": ratio })
        })
        .collect();
    Ok(json!({ "rows": rows, "settings": settings }))
}

/// Each successful request has sent one message, and no request two.
async fn check_outputs(world: &World) -> Result<()> {
    let handled =
        "select (select sum(amount) from app.balance) + (select sum(amount) from hand.balance)";
    let handled = world.database.number(handled).await?;
    let context = jetstream::new(world.nats.client().await?);
    let out = context.get_stream("OUT").await?;
    let began = Instant::now();
    loop {
        let stored = i64::try_from(out.get_info().await?.state.messages)?;
        if stored == handled {
            return Ok(());
        }
        ensure!(
            began.elapsed() < crate::PATIENCE,
            "{stored} outputs of {handled} requests"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Sends requests over `clients` connections, one at a time over each, for `time`.
async fn load(address: &str, clients: usize, time: Duration) -> Result<Measured> {
    let cpu_before = cpu::seconds();
    let began = Instant::now();
    let number = Arc::new(AtomicU64::new(0));
    let run = uuid::Uuid::new_v4().simple().to_string();
    let clients = (0..clients).map(|_| {
        let (address, number, run) = (address.to_owned(), Arc::clone(&number), run.clone());
        tokio::spawn(async move {
            let mut connection = TcpStream::connect(&address).await.context("connect")?;
            connection.set_nodelay(true).context("set no delay")?;
            let (mut buffer, mut times) = (vec![0; 8192], Vec::new());
            while began.elapsed() < time {
                let number = number.fetch_add(1, Ordering::Relaxed);
                let sent = Instant::now();
                exchange(&mut connection, &mut buffer, &run, number).await?;
                times.push(sent.elapsed().as_secs_f64() * 1e3);
            }
            anyhow::Ok(times)
        })
    });
    let mut times = Vec::new();
    for client in futures::future::join_all(clients).await {
        times.extend(client??);
    }
    Ok(Measured {
        rate: times.len() as f64 / began.elapsed().as_secs_f64(),
        p50: percentile(&times, 0.5),
        p99: percentile(&times, 0.99),
        cpu_micros: cpu::micros_since(&cpu_before, times.len()),
    })
}

/// One request with a key of its own, and its whole response.
async fn exchange(
    connection: &mut TcpStream,
    buffer: &mut [u8],
    run: &str,
    number: u64,
) -> Result<()> {
    let account = number as usize % ACCOUNTS;
    let body = format!(r#"{{"event":"k{account}","do":["account","send"]}}"#);
    let request = format!(
        "POST /do/it HTTP/1.1\r\nHost: 127.0.0.1\r\nIdempotency-Key: {run}-{number}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    connection
        .write_all(request.as_bytes())
        .await
        .context("send a request")?;
    let mut read = 0;
    loop {
        let more = connection
            .read(buffer.get_mut(read..).context("the response is too long")?)
            .await
            .context("read")?;
        ensure!(more > 0, "the connection was closed");
        read += more;
        let response = String::from_utf8_lossy(buffer.get(..read).unwrap_or_default());
        let Some((head, body)) = response.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.to_ascii_lowercase();
        let length = length
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .and_then(|length| length.parse::<usize>().ok())
            .context("read the length")?;
        if body.len() >= length {
            ensure!(head.starts_with("HTTP/1.1 200"), "{response}");
            return Ok(());
        }
    }
}

/// The hand-written service and its relay. Returns its address.
async fn start_by_hand(world: &World) -> Result<String> {
    let Database::Postgres { direct, .. } = &world.database else {
        unreachable!()
    };
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS + 1)
        .connect(direct)
        .await?;
    sqlx::raw_sql(hand_written::TABLES).execute(&pool).await?;
    sqlx::raw_sql(TABLES).execute(&pool).await?;
    let context = jetstream::new(world.nats.client().await?);
    tokio::spawn(hand_written::relay(pool.clone(), context));
    let router = Router::new().route("/do/it", post(handle)).with_state(pool);
    let listener = TcpListener::bind(("127.0.0.1", 0))
        .await
        .context("listen")?;
    let address = listener.local_addr()?.to_string();
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

async fn handle(
    State(pool): State<PgPool>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> (StatusCode, Vec<u8>) {
    match handle_once(&pool, &headers, &body).await {
        Ok(answer) => answer,
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{error:#}").into_bytes(),
        ),
    }
}

/// Key, effect, output and answer in one transaction.
async fn handle_once(
    pool: &PgPool,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(StatusCode, Vec<u8>)> {
    use sha2::Digest as _;

    let key = headers.get("idempotency-key").context("find the key")?;
    let key = key.to_str()?;
    let fingerprint = sha2::Sha256::digest(body);
    let options: Value = serde_json::from_slice(body)?;
    let account = options["event"].as_str().context("find the account")?;

    // Effect and output
    let mut tx = pool.begin().await?;
    let row = sqlx::query(
        "update hand.balance set amount = amount + 1 where account = $1 returning amount",
    )
    .bind(account)
    .fetch_one(&mut *tx)
    .await?;
    let amount: i64 = row.try_get(0)?;
    let answer = json!({ "account": account, "amount": amount }).to_string();
    sqlx::query("insert into hand.outbox (id, subject, body) values ($1, $2, $3)")
        .bind(format!("hand:{key}:0"))
        .bind("out.http")
        .bind(answer.as_bytes())
        .execute(&mut *tx)
        .await?;

    // Key and answer; a known key rolls everything back.
    let stored = sqlx::query(
        "insert into hand.request (key, fingerprint, status, body) values ($1, $2, 200, $3) on conflict do nothing",
    )
    .bind(key)
    .bind(fingerprint.as_slice())
    .bind(answer.as_bytes())
    .execute(&mut *tx)
    .await?;
    if stored.rows_affected() == 1 {
        tx.commit().await?;
        return Ok((StatusCode::OK, answer.into_bytes()));
    }
    tx.rollback().await?;
    let row = sqlx::query("select fingerprint, body from hand.request where key = $1")
        .bind(key)
        .fetch_one(pool)
        .await?;
    let (of_key, answer): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
    match of_key == fingerprint.as_slice() {
        true => Ok((StatusCode::OK, answer)),
        false => Ok((StatusCode::UNPROCESSABLE_ENTITY, Vec::new())),
    }
}
