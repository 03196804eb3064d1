//! Checks during the run: no output before its effect, no half transfer, and the backlog.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream;
use futures::StreamExt;
use serde_json::Value;
use support::database::Database;

use crate::publisher::Progress;
use crate::stranger::is_from_stranger;

/// Counts of the checks, and violations.
#[derive(Default)]
pub struct WatcherReport {
    pub outputs: AtomicU64,
    pub snapshots: AtomicU64,
    pub too_early: Mutex<Vec<String>>,
}

impl WatcherReport {
    fn fail(&self, what: String) {
        self.too_early
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what);
    }
}

/// Checks for fresh outputs that their effect is visible.
pub async fn watch_outputs(
    url: String,
    database: Database,
    report: Arc<WatcherReport>,
) -> Result<()> {
    let client = connect(url).await?;
    let mut outputs = client
        .subscribe("out.>")
        .await
        .context("subscribe to outputs")?;
    while let Some(message) = outputs.next().await {
        if is_from_stranger(&message.subject) {
            continue;
        }
        let body: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        let text = |name: &str| {
            body.get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .replace('\'', "")
        };
        let (event, nonce) = (text("event_id"), text("attempt_nonce"));
        let sql = format!(
            "select count(*) from app.effect where event_id = '{event}' and attempt_nonce = '{nonce}'"
        );
        // The database may be down now.
        if let Ok(rows) = database.number(&sql).await {
            report.outputs.fetch_add(1, Ordering::Relaxed);
            if rows != 2 {
                report.fail(format!(
                    "an output of event {event} was published with {rows} visible rows of its effect"
                ));
            }
        }
        // Skip queued outputs: only a fresh one can show that it was published too early.
        let moment = Instant::now();
        while moment.elapsed() < Duration::from_millis(100) {
            let _ = tokio::time::timeout(Duration::from_millis(50), outputs.next()).await;
        }
    }
    Ok(())
}

/// Checks that every snapshot of the effects sums to zero.
pub async fn watch_ledger(database: Database, report: Arc<WatcherReport>) {
    loop {
        if let Ok(sum) = database
            .number("select coalesce(sum(delta), 0) from app.effect")
            .await
        {
            report.snapshots.fetch_add(1, Ordering::Relaxed);
            if sum != 0 {
                report.fail(format!("a snapshot of all effects sums to {sum}"));
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Reports the backlog to the publisher.
pub async fn watch_backlog(url: String, progress: Arc<Progress>) -> Result<()> {
    let context = jetstream::new(connect(url).await?);
    loop {
        if let Ok(stream) = context.get_stream_no_info("IN").await
            && let Ok(consumer) = stream.consumer_info("oncely-test").await
        {
            let backlog = consumer.num_pending + consumer.num_ack_pending as u64;
            progress.backlog.store(backlog, Ordering::Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn connect(url: String) -> Result<async_nats::Client> {
    async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|_| Duration::from_millis(50))
        .connect(url)
        .await
        .context("connect a watcher")
}
