//! Posts alarms to a webhook: one POST for each, in order, retried until it is accepted or expires.
//!
//! Alarms are read from their stream by a durable consumer. So no other task waits for the webhook,
//! and an alarm survives the host that was posting it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use crate::bus::{AlarmConsumer, AlarmMessage, Bus};
use crate::drain::Stopping;
use crate::metrics::{Metrics, PostOutcome};
use crate::model::retry::{Backoff, OnDeterministicFailure, RetryPolicy};

use super::post::{PostResult, WebhookClient};

/// The durable consumer that all hosts share.
const CONSUMER_NAME: &str = "oncely-webhook";

/// How long an alarm is retried while the webhook fails or does not answer.
const RETRY_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// How long an alarm is retried while the webhook rejects it (4xx). Its settings may be wrong for a
/// moment, and the alarms after it are blocked meanwhile.
const RETRY_REFUSED_FOR: Duration = Duration::from_secs(10 * 60);

/// The minimum and maximum delay between two attempts.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(500);
const RETRY: RetryPolicy = RetryPolicy {
    attempts: u32::MAX,
    backoff: Duration::from_secs(1),
    backoff_max: Duration::from_secs(60),
    deterministic_failures: OnDeterministicFailure::Retry,
};

/// Posts alarms until the host stops.
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
            // The alarm in progress is redelivered to another host or at the next start, under the
            // same id.
            () = stopping.stopped() => return,
            Err(error) = delivering => tracing::debug!(
                error = format!("{error:#}"),
                "failed to read alarms for the webhook, retrying"
            ),
        }
        if stopping.wait(backoff.next(rand::random())).await {
            return;
        }
    }
}

/// Posts one alarm after the other until the broker fails.
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

/// Acknowledges an alarm, or schedules its redelivery.
async fn handle_response(alarm: AlarmMessage, answer: PostResult, metrics: &Metrics) -> Result<()> {
    let (why, retry_for) = match answer {
        PostResult::Accepted => {
            metrics.webhook_post(PostOutcome::Delivered);
            tracing::debug!(alarm = alarm.id, "alarm posted to the webhook");
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
            alarm = alarm.id,
            error = why,
            "alarm not posted to the webhook, giving up"
        );
        return alarm.ack().await;
    }
    metrics.webhook_post(PostOutcome::Failed);
    if alarm.delivered == 1 {
        tracing::warn!(
            alarm = alarm.id,
            error = why,
            "failed to post an alarm to the webhook, retrying"
        );
    }
    let after = RETRY.delay_after(alarm.delivered, Some(RETRY_DELAY_MIN), rand::random());
    alarm.nack(after).await
}
