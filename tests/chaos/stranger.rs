//! A stranger who may publish everywhere, and forges pointers to dead letters all along.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use futures::StreamExt;

use crate::publisher::Progress;

/// The worker whose dead letters are pointed at, and another one to which they do not belong.
const WORKER: &str = "test";
pub const BYSTANDER: &str = "bystander";

/// How often it tries.
const EVERY: Duration = Duration::from_millis(100);

/// What it did.
#[derive(Default)]
pub struct Meddling {
    pub pointers: AtomicU64,
}

/// Meddles until it is aborted.
pub async fn meddle(url: String, progress: Arc<Progress>, meddling: Arc<Meddling>) -> Result<()> {
    let client = async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|_| Duration::from_millis(50))
        .connect(url)
        .await
        .context("connect the stranger")?;
    let mut pointers = client.subscribe(format!("oncely.redrive.{WORKER}")).await.context("watch redrives")?;
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // The same pointer, for a worker that it is not meant for.
            Some(pointer) = pointers.next() => {
                let mut headers = pointer.headers.unwrap_or_default();
                headers.insert("Nats-Msg-Id", uuid::Uuid::new_v4().to_string());
                let sent = client.publish_with_headers(format!("oncely.redrive.{BYSTANDER}"), headers, pointer.payload);
                meddling.pointers.fetch_add(u64::from(sent.await.is_ok()), Ordering::Relaxed);
            }
            _ = tick.tick() => {
                let next = progress.published.load(Ordering::Relaxed);
                // And one that points at whatever there is.
                let mut headers = HeaderMap::new();
                headers.insert("Oncely-Letter", (next % 50 + 1).to_string());
                headers.insert("Oncely-Generation", (next % 3 + 1).to_string());
                let sent = client.publish_with_headers(format!("oncely.redrive.{BYSTANDER}"), headers, "".into()).await;
                meddling.pointers.fetch_add(u64::from(sent.is_ok()), Ordering::Relaxed);
            }
        }
    }
}
