//! Tells a webhook of alarms: one POST for each, in their order, tried again until somebody takes it or it is too late.
//!
//! It reads the stream of alarms like any other consumer, so nothing of what hosts do waits for it, and an alarm survives
//! the host that was telling of it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use crate::bus::{AlarmConsumer, AlarmMessage, Bus};
use crate::drain::Stopping;
use crate::metrics::{Metrics, PostOutcome};
use crate::model::retry::{Backoff, OnDeterministicFailure, RetryPolicy};

use super::post::{PostResult, WebhookClient};

/// The durable consumer of all hosts.
const CONSUMER_NAME: &str = "oncely-webhook";

/// How long an alarm is told again while nobody answers.
const RETRY_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// How long, while somebody answers that he will not have it (4xx): the settings may be wrong for a moment, and those that
/// follow wait behind it.
const RETRY_REFUSED_FOR: Duration = Duration::from_secs(10 * 60);

/// The least and the most it waits between two attempts.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(500);
const RETRY: RetryPolicy = RetryPolicy {
    attempts: u32::MAX,
    backoff: Duration::from_secs(1),
    backoff_max: Duration::from_secs(60),
    deterministic_failures: OnDeterministicFailure::Retry,
};

/// Tells of alarms until the host stops.
pub async fn run(bus: Bus, client: WebhookClient, metrics: Arc<Metrics>, mut stopping: Stopping) {
    let mut backoff = Backoff::default();
    loop {
        let delivering = async {
            let alarms = bus.alarm_consumer(CONSUMER_NAME).await?;
            backoff.reset();
            deliver_all(&alarms, &client, &metrics).await
        };
        tokio::select! {
            biased;
            // What is under way comes again, at another host or at the next start, under the same id.
            () = stopping.stopped() => return,
            Err(error) = delivering => tracing::debug!("no alarms for the webhook for the moment: {error:#}"),
        }
        if stopping.wait(backoff.next(rand::random())).await {
            return;
        }
    }
}

/// Tells of one alarm after the other until the broker is gone.
async fn deliver_all(
    alarms: &AlarmConsumer,
    client: &WebhookClient,
    metrics: &Metrics,
) -> Result<()> {
    loop {
        if let Some(alarm) = alarms.next().await? {
            let answer = client
                .post(&alarm.id, alarm.body.clone(), Timestamp::now())
                .await;
            handle_response(alarm, answer, metrics).await?;
        }
    }
}

/// What follows from an answer.
async fn handle_response(alarm: AlarmMessage, answer: PostResult, metrics: &Metrics) -> Result<()> {
    let (why, retry_for) = match answer {
        PostResult::Accepted => {
            metrics.webhook_post(PostOutcome::Delivered);
            tracing::debug!("told the webhook of {}", alarm.id);
            return alarm.ack().await;
        }
        PostResult::Rejected(why) => (why, RETRY_REFUSED_FOR),
        PostResult::Failed(why) => (why, RETRY_FOR),
    };
    let age =
        Duration::try_from(Timestamp::now().duration_since(alarm.stored_at)).unwrap_or_default();
    if age > retry_for {
        metrics.webhook_post(PostOutcome::Abandoned);
        tracing::error!(
            "the webhook was not told of {}, and will not be: {why}",
            alarm.id
        );
        return alarm.ack().await;
    }
    metrics.webhook_post(PostOutcome::Failed);
    if alarm.delivered == 1 {
        tracing::warn!(
            "the webhook does not take {}; it is told again: {why}",
            alarm.id
        );
    }
    let after = RETRY.delay_after(alarm.delivered, Some(RETRY_DELAY_MIN), rand::random());
    alarm.nack(after).await
}
