//! `make bench-retention`: many rows pass the inbox and outbox while expired rows are deleted.
//!
//! Tables must not grow, and the last rows must be as fast as the first ones.
//!
//! Only the store is under load, without broker and guests, so that millions of rows take minutes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use oncely::model::message::OutputKind;
use oncely::store::{
    Claim, GroupOutcome, Output, PostgresStore, Published, RetentionPolicy, SqliteStore, Store,
    StoreError,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use support::postgres::Cluster;

use crate::cpu;

/// Rows per transaction, and concurrent transactions.
const BATCH: usize = 200;
const LANES: usize = 4;

const WORKER: &str = "bench";
const TIME: Duration = Duration::from_secs(20);

/// Retention of rows.
const KEEP: Duration = Duration::from_secs(15);

/// Interval between deletions of expired rows; a host uses a minute, with a longer retention.
const RETIRE_EVERY: Duration = Duration::from_millis(250);

/// Minimum speed of the last rows relative to the first. Maximum table size relative to the size
/// after the first rows expired.
const LEAST_SPEED: f64 = 0.9;
const MOST_SIZE: f64 = 1.1;

/// The location of the tables.
enum Place {
    Postgres(String),
    Sqlite(tempfile::TempDir),
}

/// Measurements of one tenth of the rows.
struct Tenth {
    rate: f64,
    /// Size of both tables with their indexes, in bytes.
    largest: i64,
    removed: f64,
    /// Microseconds of CPU time per row.
    cpu_micros: f64,
}

/// Writes `rows` rows through the tables of both databases.
pub async fn measure(rows: usize) -> Result<Value> {
    let cluster = tokio::task::spawn_blocking(Cluster::start_durable).await??;
    let database = cluster.create_database().await?;
    let url = cluster.url(&database);
    let postgres: Arc<Store> = Arc::new(PostgresStore::connect(&url, 16).await?.into());
    let on_postgres = run("postgres", postgres, Place::Postgres(url), rows).await?;
    let folder = tempfile::tempdir()?;
    let sqlite: Arc<Store> = Arc::new(
        SqliteStore::open(&folder.path().join("oncely.db"))
            .await?
            .into(),
    );
    let on_sqlite = run("sqlite", sqlite, Place::Sqlite(folder), rows).await?;
    Ok(
        json!({ "rows": rows, "keep_seconds": KEEP.as_secs(), "postgres": on_postgres, "sqlite": on_sqlite }),
    )
}

async fn run(name: &str, store: Arc<Store>, place: Place, rows: usize) -> Result<Value> {
    let next = Arc::new(AtomicUsize::new(0));
    let lanes: Vec<_> = (0..LANES)
        .map(|_| tokio::spawn(lane(Arc::clone(&store), Arc::clone(&next), rows)))
        .collect();
    let removal = tokio::spawn(remove(Arc::clone(&store)));
    let mut tenths: Vec<Tenth> = Vec::new();
    for tenth in 1..=10 {
        let (began, before, cpu_before) =
            (Instant::now(), next.load(Ordering::Relaxed), cpu_seconds());
        let mut largest = 0;
        while next.load(Ordering::Relaxed) < rows * tenth / 10 {
            ensure!(
                !lanes.iter().any(|lane| lane.is_finished()) || tenth == 10,
                "a lane stopped early"
            );
            largest = largest.max(place.size().await?);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let done = next.load(Ordering::Relaxed) - before;
        let cpu_micros = (cpu_seconds() - cpu_before) * 1e6 / done as f64;
        let rate = done as f64 / began.elapsed().as_secs_f64();
        let left = place.rows().await?;
        let removed = 1.0 - left as f64 / next.load(Ordering::Relaxed) as f64;
        println!(
            "{name:<9} {tenth:>2}/10 {rate:>8.0} rows/s, {cpu_micros:>5.1} µs of CPU each, {:>6.1} MB at most, {left} rows there",
            largest as f64 / 1e6
        );
        tenths.push(Tenth {
            rate,
            largest,
            removed,
            cpu_micros,
        });
    }
    for lane in lanes {
        lane.await??;
    }
    removal.abort();
    report(name, &tenths)
}

fn report(name: &str, tenths: &[Tenth]) -> Result<Value> {
    let (Some(first), Some(last)) = (tenths.first(), tenths.last()) else {
        anyhow::bail!("no measurement was made")
    };
    let speed = last.rate / first.rate;

    // The table size also depends on the rate.
    let settled = tenths
        .iter()
        .skip(1)
        .take(3)
        .map(|tenth| tenth.largest)
        .max()
        .unwrap_or_default();
    let later = tenths
        .iter()
        .skip(4)
        .map(|tenth| tenth.largest)
        .max()
        .unwrap_or_default();
    let size = later as f64 / settled as f64;
    println!(
        "{name:<9} last tenth {speed:.2} as fast as the first; largest size {size:.2} of the 2nd to 4th tenth\n"
    );
    ensure!(
        last.removed > 0.5,
        "{name}: only {:.0} % of the rows were deleted: use more rows",
        last.removed * 100.0
    );
    let tenths: Vec<Value> =
        tenths.iter().map(|tenth| json!({ "rows_per_second": tenth.rate, "largest_bytes": tenth.largest, "cpu_micros_per_row": tenth.cpu_micros })).collect();
    Ok(json!({
        "tenths": tenths, "speed_last_to_first": speed, "size_later_to_settled": size,
        "holds": speed >= LEAST_SPEED && size <= MOST_SIZE,
    }))
}

fn cpu_seconds() -> f64 {
    cpu::seconds().values().sum()
}

/// Settles events with one output each and marks the outputs as published.
async fn lane(store: Arc<Store>, next: Arc<AtomicUsize>, rows: usize) -> Result<()> {
    loop {
        let first = next.fetch_add(BATCH, Ordering::Relaxed);
        if first >= rows {
            return Ok(());
        }
        let events: Vec<String> = (first..first + BATCH)
            .map(|n| format!("order-{n}"))
            .collect();
        let claim = |event: &String| Claim {
            event_id: event.clone(),
            payload_sha256: [7; 32],
            origin: Some(("ORDERS".to_owned(), first as u64)),
            redriven: false,
        };
        let mut tx = store.begin(WORKER, TIME).await?;
        tx.claim(&events.iter().map(claim).collect::<Vec<_>>())
            .await?;
        let outputs: Vec<Output> = events.iter().map(output).collect();
        let appended = tx.append_outputs(&outputs, TIME).await?;
        tx.commit().await?;
        let place = |seq| Published {
            seq,
            stream: "PAYMENTS".to_owned(),
            stream_sequence: seq as u64,
        };
        // On SQLite there are no groups, and the places are recorded row by row.
        let outcome = GroupOutcome {
            number: appended[0].group.unwrap_or_default(),
            published: appended.iter().map(|row| place(row.seq)).collect(),
            unpublished: Vec::new(),
            leased: Vec::new(),
        };
        while let Err(error) = store.record_groups(std::slice::from_ref(&outcome)).await {
            ensure!(
                matches!(error, StoreError::Conflict(_)),
                "mark outputs as published: {error:?}"
            );
        }
    }
}

fn output(event: &String) -> Output {
    Output {
        kind: OutputKind::Derived,
        id: format!("{WORKER}:{event}:0"),
        event_id: event.clone(),
        ordinal: 0,
        subject: "payments.settled".to_owned(),
        headers: Vec::new(),
        body: Bytes::from_static(&[b'x'; 200]),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}

async fn remove(store: Arc<Store>) {
    let policy = RetentionPolicy {
        outputs: KEEP,
        inbox: Some(KEEP),
        requests: KEEP,
        limit: 10_000,
        lock_timeout: Duration::from_secs(2),
        archive: None,
    };
    loop {
        match store.delete_expired(&policy).await {
            Ok(true) => {}
            _ => tokio::time::sleep(RETIRE_EVERY).await,
        }
    }
}

impl Place {
    async fn size(&self) -> Result<i64> {
        match self {
            Place::Postgres(_) => {
                let size = "select sum(pg_total_relation_size(oid))::bigint from pg_class
                     where relname ~ '^(inbox|outbox)_[0-3]$' and relnamespace = 'oncely'::regnamespace";
                self.number(size).await
            }
            Place::Sqlite(_) => {
                self.number(
                    "select page_count * page_size from pragma_page_count, pragma_page_size",
                )
                .await
            }
        }
    }

    async fn rows(&self) -> Result<i64> {
        self.number(match self {
            Place::Postgres(_) => "select count(*) from oncely.inbox",
            Place::Sqlite(_) => "select count(*) from oncely_inbox",
        })
        .await
    }

    async fn number(&self, query: &'static str) -> Result<i64> {
        match self {
            Place::Postgres(url) => {
                let mut connection = PgConnection::connect(url).await?;
                sqlx::query_scalar(query)
                    .fetch_one(&mut connection)
                    .await
                    .context("query PostgreSQL")
            }
            Place::Sqlite(folder) => {
                let url = format!(
                    "sqlite:{}?mode=ro",
                    folder.path().join("oncely.db").display()
                );
                let mut connection = sqlx::SqliteConnection::connect(&url).await?;
                sqlx::query_scalar(query)
                    .fetch_one(&mut connection)
                    .await
                    .context("query SQLite")
            }
        }
    }
}
