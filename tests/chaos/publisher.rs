//! Publishes the workload and records the broker's acknowledgements, through every broker outage.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream;
use support::nats::NewMessage;

use crate::workload::Workload;

/// Messages published at a time.
const CHUNK: usize = 20;

/// The publisher pauses while more messages than this wait for the worker.
const BACKLOG_MAX: u64 = 1_000;

/// The publisher gives up when the backlog has been full for this long after the last fault: the
/// host handles nothing any more.
const STALLED_AFTER: Duration = Duration::from_secs(45);

/// State shared by the publisher and its campaign.
#[derive(Default)]
pub struct Progress {
    /// Messages that the broker acknowledged.
    pub published: AtomicU64,
    /// Messages that waited for the worker at the last check.
    pub backlog: AtomicU64,
    /// Whether the campaign has finished its faults.
    pub enough: AtomicBool,
    pub acked: Mutex<BTreeMap<u64, Vec<u8>>>,
}

/// Publishes at least `least` messages, about `rate` per second, until the campaign has enough, or
/// the host stops handling them.
pub async fn publish(
    url: String,
    mut workload: Workload,
    least: u64,
    rate: f64,
    progress: Arc<Progress>,
) -> Result<Workload> {
    let client = async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|_| Duration::from_millis(50))
        .connect(url)
        .await
        .context("connect the publisher")?;
    let context = jetstream::context::ContextBuilder::new()
        .timeout(Duration::from_secs(1))
        .ack_timeout(Duration::from_secs(1))
        .build(client);
    let mut interval = tokio::time::interval(Duration::from_secs_f64(CHUNK as f64 / rate));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_room = Instant::now();
    while progress.published.load(Ordering::Relaxed) < least
        || !progress.enough.load(Ordering::Relaxed)
    {
        interval.tick().await;
        if !progress.enough.load(Ordering::Relaxed) {
            last_room = Instant::now();
        }
        if last_room.elapsed() > STALLED_AFTER {
            break;
        }
        if progress.backlog.load(Ordering::Relaxed) < BACKLOG_MAX {
            let messages: Vec<NewMessage> = (0..CHUNK).map(|_| workload.next_message()).collect();
            publish_until_acked(&context, messages, &progress).await?;
            last_room = Instant::now();
        }
    }
    Ok(workload)
}

/// Publishes until all messages are acknowledged. The broker deduplicates repeated attempts by id.
pub async fn publish_until_acked(
    context: &jetstream::Context,
    mut messages: Vec<NewMessage>,
    progress: &Progress,
) -> Result<()> {
    while !messages.is_empty() {
        let mut sent = Vec::new();
        for message in messages {
            let mut headers = HeaderMap::new();
            for (name, value) in &message.headers {
                headers.append(name.as_str(), value.parse::<async_nats::HeaderValue>()?);
            }
            let body = message.body.clone().into();
            sent.push((
                context
                    .publish_with_headers(message.subject.clone(), headers, body)
                    .await,
                message,
            ));
        }
        messages = Vec::new();
        for (answer, message) in sent {
            let acked = match answer {
                Ok(answer) => answer.await,
                Err(error) => Err(error),
            };
            match acked {
                Ok(ack) => {
                    progress.published.fetch_add(1, Ordering::Relaxed);
                    let mut acked = progress
                        .acked
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    acked.insert(ack.sequence, message.body);
                }
                Err(_) => messages.push(message),
            }
        }
        if !messages.is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}
