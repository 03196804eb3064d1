//! Tells a webhook of alarms: one POST for each, in their order, tried again until somebody takes it or it is too late.
//!
//! It reads the stream of alarms like any other consumer, so nothing of what hosts do waits for it, and an alarm survives
//! the host that was telling of it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use crate::bus::{AlarmMessage, Alarms, Bus};
use crate::drain::Stopping;
use crate::metrics::{Metrics, Post};
use crate::model::retry::{Backoff, ProvedPoison, RetryPolicy};

use super::post::{Answer, Poster};

/// The durable consumer of all hosts.
const DURABLE: &str = "oncely-webhook";

/// How long an alarm is told again while nobody answers.
const TOLD_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// How long, while somebody answers that he will not have it (4xx): the settings may be wrong for a moment, and those that
/// follow wait behind it.
const REFUSED_FOR: Duration = Duration::from_secs(10 * 60);

/// The least and the most it waits between two attempts.
const AGAIN_LEAST: Duration = Duration::from_millis(500);
const AGAIN: RetryPolicy = RetryPolicy {
    attempts: u32::MAX,
    backoff: Duration::from_secs(1),
    backoff_max: Duration::from_secs(60),
    proved_poison: ProvedPoison::Retry,
};

/// Tells of alarms until the host stops.
pub async fn tell(bus: Bus, poster: Poster, metrics: Arc<Metrics>, mut stopping: Stopping) {
    let mut backoff = Backoff::default();
    loop {
        let told = async {
            let alarms = bus.alarms(DURABLE).await?;
            backoff.reset();
            tell_all(&alarms, &poster, &metrics).await
        };
        tokio::select! {
            biased;
            // What is under way comes again, at another host or at the next start, under the same id.
            () = stopping.stopped() => return,
            Err(error) = told => tracing::debug!("no alarms for the webhook for the moment: {error:#}"),
        }
        if stopping.wait(backoff.next(rand::random())).await {
            return;
        }
    }
}

/// Tells of one alarm after the other until the broker is gone.
async fn tell_all(alarms: &Alarms, poster: &Poster, metrics: &Metrics) -> Result<()> {
    loop {
        if let Some(alarm) = alarms.next().await? {
            let answer = poster.post(&alarm.id, alarm.body.clone(), Timestamp::now()).await;
            follow(alarm, answer, metrics).await?;
        }
    }
}

/// What follows from an answer.
async fn follow(alarm: AlarmMessage, answer: Answer, metrics: &Metrics) -> Result<()> {
    let (why, told_for) = match answer {
        Answer::Taken => {
            metrics.webhook_post(Post::Taken);
            tracing::debug!("told the webhook of {}", alarm.id);
            return alarm.is_told().await;
        }
        Answer::Refused(why) => (why, REFUSED_FOR),
        Answer::Failed(why) => (why, TOLD_FOR),
    };
    let age = Duration::try_from(Timestamp::now().duration_since(alarm.stored_at)).unwrap_or_default();
    if age > told_for {
        metrics.webhook_post(Post::GivenUp);
        tracing::error!("the webhook was not told of {}, and will not be: {why}", alarm.id);
        return alarm.is_told().await;
    }
    metrics.webhook_post(Post::Failed);
    if alarm.delivered == 1 {
        tracing::warn!("the webhook does not take {}; it is told again: {why}", alarm.id);
    }
    let after = AGAIN.after(alarm.delivered, Some(AGAIN_LEAST), rand::random());
    alarm.again(after).await
}
