//! Consumes redrives: pointer messages that send redriven dead letters to their worker. From its
//! lane on, a redriven message is handled like any other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Lanes;
use crate::bus::{DeliveredMessage, PullConsumer, Subscription};
use crate::config::manifest::Worker;
use crate::consumer::lane::PendingMessage;
use crate::drain::Stopping;
use crate::fault;
use crate::model::redrive::{self, Pointer, REDRIVE_STREAM};
use crate::model::retry::Backoff;
use crate::store::{RedriveLookup, Store};

/// Maximum number of redriven messages that one host holds for a worker. They have their own
/// capacity, so redriven and new messages do not wait for each other.
pub(super) const CAPACITY: usize = 32;

/// Redelivery delay of a pointer whose dead letter could not be read before the host stopped.
const NACK_DELAY: Duration = Duration::from_millis(1);

/// How long a host with an outdated version waits for its own switch to the active one, and how
/// often it checks. The switch returns pending messages in order. After the timeout another host
/// may receive the redriven message.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(3);
const SWITCH_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// A message without a valid pointer is outdated, like a pointer to a dead letter that changed
/// since.
const INVALID_POINTER: Pointer = Pointer {
    dead_letter: 0,
    generation: 0,
};

/// Subscription of a worker to its redrives.
pub(super) fn subscription(worker: &Worker) -> Subscription {
    Subscription {
        stream: REDRIVE_STREAM.to_owned(),
        durable: worker.durable(),
        subjects: vec![redrive::subject_of(&worker.name)],
        ack_wait: worker.ack_wait,
        // Capacity for several hosts.
        max_ack_pending: 1_000,
        metadata: HashMap::from([("oncely.worker".to_owned(), worker.name.clone())]),
    }
}

/// Pulls as long as the host has capacity, and dispatches to the lanes.
pub(super) async fn pull_loop(mut pull: PullConsumer, lanes: &Lanes, mut stopping: Stopping) {
    loop {
        let next = async {
            let permit = Arc::clone(&lanes.redrive_permits)
                .acquire_owned()
                .await
                .context("wait for capacity")?;
            let pulled = pull
                .next(lanes.redrive_permits.available_permits() + 1)
                .await?;
            anyhow::Ok((pulled, permit))
        };
        let pulled = tokio::select! {
            // After the stop signal no more messages are pulled.
            biased;
            () = stopping.stopped() => break,
            pulled = next => pulled,
        };
        match pulled {
            Ok((pulled, permit)) => dispatch(lanes, pulled, Some(permit), &stopping).await,
            Err(error) => {
                tracing::warn!(
                    worker = lanes.worker.name,
                    error = format!("{error:#}"),
                    "failed to pull redrives, retrying"
                );
                if stopping.wait(Duration::from_secs(1)).await {
                    break;
                }
            }
        }
    }

    // Dispatch the messages that arrived before the stop.
    while let Some(pulled) = pull.drain().await {
        let permit = Arc::clone(&lanes.redrive_permits).try_acquire_owned().ok();
        dispatch(lanes, pulled, permit, &stopping).await;
    }
}

/// Reads the dead letter of a pointer and dispatches its message to a lane.
async fn dispatch(
    lanes: &Lanes,
    pulled: DeliveredMessage,
    permit: Option<OwnedSemaphorePermit>,
    stopping: &Stopping,
) {
    let in_flight = lanes.in_flight.enter(pulled.receipt.progress());
    let pointer = Pointer::parse(&pulled.message).unwrap_or(INVALID_POINTER);
    let sent = match read_for_version(lanes, pointer, stopping).await {
        Some(RedriveLookup::Message(_, active)) if active != lanes.version => {
            pulled.receipt.nack(SWITCH_POLL_INTERVAL).await
        }
        Some(RedriveLookup::Message(message, _)) => {
            fault::point(fault::REDRIVE_READ);
            let key = lanes
                .worker
                .ordering_key
                .as_ref()
                .and_then(|key| key.key_of(&message));
            let (message, delivered, receipt) =
                (Arc::new(*message), pulled.delivered, pulled.receipt);
            let pending_message = PendingMessage {
                message,
                key,
                unusable: None,
                delivered,
                receipt,
                _in_flight: in_flight,
                _permit: permit,
            };
            return lanes.dispatch_all(vec![pending_message]).await;
        }
        Some(RedriveLookup::OutOfDate(proof)) => pulled.receipt.ack(&proof).await,
        None => pulled.receipt.nack(NACK_DELAY).await,
    };
    if let Err(error) = sent {
        tracing::debug!(
            worker = lanes.worker.name,
            error = format!("{error:#}"),
            "failed to send an ack or nack, the redrive will be redelivered"
        );
    }
}

/// Reads a dead letter. A message that failed with the previous version must not run with it again
/// while the new version is starting. The dead letter is read again until this host runs the active
/// version, or until the timeout. `None` when the host stops first.
async fn read_for_version(
    lanes: &Lanes,
    pointer: Pointer,
    stopping: &Stopping,
) -> Option<RedriveLookup> {
    let end = Instant::now() + SWITCH_TIMEOUT;
    loop {
        let found = read_dead_letter(&lanes.store, pointer, &lanes.worker.name, stopping).await?;
        let is_ours =
            !matches!(found, RedriveLookup::Message(_, active) if active != lanes.version);
        if is_ours || Instant::now() >= end {
            return Some(found);
        }
        if stopping.wait(SWITCH_POLL_INTERVAL).await {
            return None;
        }
    }
}

/// Reads a dead letter, and retries until the database is available. `None` when the host stops
/// first.
async fn read_dead_letter(
    store: &Store,
    pointer: Pointer,
    worker: &str,
    stopping: &Stopping,
) -> Option<RedriveLookup> {
    let mut backoff = Backoff::default();
    loop {
        match store
            .redriven_message(worker, pointer.dead_letter, pointer.generation)
            .await
        {
            Ok(found) => return Some(found),
            Err(error) => {
                tracing::warn!(
                    worker,
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "failed to read a redriven dead letter, retrying"
                );
            }
        }
        if stopping.wait(backoff.next(rand::random())).await {
            return None;
        }
    }
}
