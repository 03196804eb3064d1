//! A cached read over HTTP, compared with an axum handler that returns the same constant.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::routing::get;
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::world::World;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Concurrent connections, each with one request at a time.
const CONNECTIONS: usize = 16;
const ROUNDS: usize = 3;

/// Maximum ratio of the cached read's time to the constant's.
const WANTED: f64 = 2.0;

/// Measures both alternately; true when the ratio is within its limit.
pub async fn measure(time: Duration) -> Result<(bool, Value)> {
    let migrations = guests::repository().join("tests/guests/migrations");
    let manifest = format!(
        "[[worker]]\nname = \"test\"\ncomponent = \"{}\"\nmigrations = \"{}\"\n[[worker.route]]\npath = \"/events/{{event}}\"\n\
         methods = [\"GET\"]\ncache = \"1h\"\ncache_scope = \"shared\"\n",
        tokio::task::spawn_blocking(guests::http_component)
            .await??
            .display(),
        migrations.display()
    );
    let world = World::start(Kind::Sqlite, &manifest).await?;
    let host = world
        .ingress_url()?
        .trim_start_matches("http://")
        .to_owned();
    let constant = serve_a_constant().await?;
    let mut medians = Vec::new();
    for (name, address) in [("constant", &constant), ("cached", &host)] {
        request_once(address)
            .await
            .with_context(|| format!("request the {name} answer"))?;
    }
    let mut rates = [Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        for (rates, (name, address)) in rates
            .iter_mut()
            .zip([("constant", &constant), ("cached", &host)])
        {
            let rate = measure_rate(address, time).await?;
            println!("round {round}  {name:<10} {rate:>8.0} requests/s");
            rates.push(rate);
        }
    }
    for mut rates in rates {
        rates.sort_by(f64::total_cmp);
        medians.push(rates.get(ROUNDS / 2).copied().unwrap_or_default());
    }
    let [constant, cached] = medians[..] else {
        anyhow::bail!("no measurement was made")
    };
    let ratio = constant / cached;
    println!("a cached read takes {ratio:.2} times as long as a constant; the limit is {WANTED}");
    Ok((
        ratio <= WANTED,
        json!({ "constant": constant, "cached": cached, "ratio": ratio, "wanted": WANTED }),
    ))
}

async fn serve_a_constant() -> Result<String> {
    let listener = TcpListener::bind(("127.0.0.1", 0))
        .await
        .context("listen")?;
    let address = listener.local_addr()?.to_string();
    let answer = || async { ([("content-type", "application/json")], r#"{"rows":0}"#) };
    let router = Router::new().route("/events/{event}", get(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

/// Requests per second.
async fn measure_rate(address: &str, time: Duration) -> Result<f64> {
    let count = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let clients = (0..CONNECTIONS).map(|_| {
        let (count, address) = (Arc::clone(&count), address.to_owned());
        tokio::spawn(async move {
            let mut connection = TcpStream::connect(&address).await.context("connect")?;
            let mut buffer = vec![0; 4096];
            while began.elapsed() < time {
                exchange(&mut connection, &mut buffer).await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        })
    });
    for client in futures::future::join_all(clients).await {
        client??;
    }
    Ok(count.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}

async fn request_once(address: &str) -> Result<()> {
    let mut connection = TcpStream::connect(address).await.context("connect")?;
    exchange(&mut connection, &mut vec![0; 4096]).await
}

/// One request and its answer, which is short and has a content length.
async fn exchange(connection: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    connection
        .write_all(b"GET /events/e HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        .await
        .context("send a request")?;
    let mut read = 0;
    loop {
        let more = connection
            .read(buffer.get_mut(read..).context("the answer is too long")?)
            .await
            .context("read")?;
        ensure!(more > 0, "the connection was closed");
        read += more;
        let answer = buffer.get(..read).unwrap_or_default();
        if answer.ends_with(b"{\"rows\":0}") {
            ensure!(
                answer.starts_with(b"HTTP/1.1 200"),
                "{}",
                String::from_utf8_lossy(answer)
            );
            return Ok(());
        }
    }
}
