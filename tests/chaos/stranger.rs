//! A stranger with publish access to all subjects.
//!
//! It guesses ids that outputs and platform messages will have, takes ids that it could not know,
//! and forges pointers to dead letters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use futures::StreamExt;

use support::database::Database;

use crate::publisher::Progress;

/// The worker whose ids are guessed, and another one that owns none of its dead letters.
const WORKER: &str = "test";
pub const BYSTANDER: &str = "bystander";

/// The last token of the stranger's subjects; it separates the stranger's messages from the host's.
pub const SUBJECT: &str = "stranger";

/// Interval between attacks.
const INTERVAL: Duration = Duration::from_millis(200);

/// How many events in advance it guesses.
const GUESSES_IN_ADVANCE: u64 = 20;

/// Outputs that are not due yet, so certainly not on their stream.
const UNPUBLISHED: &str = "select id from oncely.outbox
    where published_at is null and subject like 'out.%' and first_attempt_at is null limit 3";

/// Counts of the attacks.
#[derive(Default)]
pub struct AttackCounts {
    /// Guessed readable ids.
    pub guesses: AtomicU64,
    /// Output ids taken before their publication.
    pub ids: AtomicU64,
    pub pointers: AtomicU64,
}

/// Whether a message on a stream is the stranger's.
pub fn is_from_stranger(subject: &str) -> bool {
    subject.ends_with(&format!(".{SUBJECT}"))
}

/// Attacks until it is aborted.
pub async fn attack(
    url: String,
    database: Database,
    progress: Arc<Progress>,
    attack_counts: Arc<AttackCounts>,
) -> Result<()> {
    let client = async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(|_| Duration::from_millis(50))
        .connect(url)
        .await
        .context("connect the stranger")?;
    let mut pointers = client
        .subscribe(format!("oncely.redrive.{WORKER}"))
        .await
        .context("watch redrives")?;
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut guessed = 0;
    loop {
        tokio::select! {
            // The same pointer, sent to another worker.
            Some(pointer) = pointers.next() => {
                let mut headers = pointer.headers.unwrap_or_default();
                headers.insert("Nats-Msg-Id", uuid::Uuid::new_v4().to_string());
                let sent = client.publish_with_headers(format!("oncely.redrive.{BYSTANDER}"), headers, pointer.payload);
                attack_counts.pointers.fetch_add(u64::from(sent.await.is_ok()), Ordering::Relaxed);
            }
            _ = tick.tick() => {
                // Ids of future events: workloads number them.
                let next = progress.published.load(Ordering::Relaxed);
                for event in next.max(guessed)..next + GUESSES_IN_ADVANCE {
                    for id in guesses(event) {
                        attack_counts.guesses.fetch_add(take(&client, &id).await, Ordering::Relaxed);
                    }
                }
                guessed = guessed.max(next + GUESSES_IN_ADVANCE);
                // Only a holder of the key could know these ids. The database may be down now.
                for id in database.rows(UNPUBLISHED).await.unwrap_or_default().concat() {
                    attack_counts.ids.fetch_add(take(&client, &id).await, Ordering::Relaxed);
                }
                // A forged pointer to an arbitrary dead letter.
                let mut headers = HeaderMap::new();
                headers.insert("Oncely-Dead-Letter", (next % 50 + 1).to_string());
                headers.insert("Oncely-Generation", (next % 3 + 1).to_string());
                let sent = client.publish_with_headers(format!("oncely.redrive.{BYSTANDER}"), headers, "".into()).await;
                attack_counts.pointers.fetch_add(u64::from(sent.is_ok()), Ordering::Relaxed);
            }
        }
    }
}

/// Plausible ids of the outputs of an event, of its redrive and of its dead-letter notice.
fn guesses(event: u64) -> Vec<String> {
    let outputs = (0..3).map(|ordinal| format!("{WORKER}:e{event}:{ordinal}"));
    outputs
        .chain([
            format!("{WORKER}:e{event}:r1"),
            format!("dlq:{event}:0"),
            format!("dlq:{event}"),
        ])
        .collect()
}

/// Publishes under an id on each stream of the host. Returns the number of messages sent.
async fn take(client: &async_nats::Client, id: &str) -> u64 {
    let mut taken = 0;
    for subject in ["out", "oncely.dlq", "oncely.alarm", "oncely.cache"] {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id);
        let sent = client
            .publish_with_headers(format!("{subject}.{SUBJECT}"), headers, "taken".into())
            .await;
        taken += u64::from(sent.is_ok());
    }
    taken
}
