//! Dead letters that were put back: messages of their own send the worker to them, and from there on they go the way of
//! every message.

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

/// How many of them one host holds of a worker. They have room of their own, so that neither they nor what is new waits for
/// the other.
pub(super) const CAPACITY: usize = 32;

/// When the next host is to take up what this one could not look up before it stopped.
const NACK_DELAY: Duration = Duration::from_millis(1);

/// How long a host that does not run the active version waits for its own swap, which hands on what is left in good order,
/// and how often it looks. After that another host may take what was put back.
const SWAP_TIMEOUT: Duration = Duration::from_secs(3);
const SWAP_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// A message that points to no letter is out of date like one whose letter moved on.
const INVALID_POINTER: Pointer = Pointer {
    dead_letter: 0,
    generation: 0,
};

pub(super) fn subscription(worker: &Worker) -> Subscription {
    Subscription {
        stream: REDRIVE_STREAM.to_owned(),
        durable: worker.durable(),
        subjects: vec![redrive::subject_of(&worker.name)],
        ack_wait: worker.ack_wait,
        // Room for several hosts.
        max_ack_pending: 1_000,
        metadata: HashMap::from([("oncely.worker".to_owned(), worker.name.clone())]),
    }
}

/// Pulls as long as there is room; deals to the lanes.
pub(super) async fn pull_loop(mut pull: PullConsumer, lanes: &Lanes, mut stopping: Stopping) {
    loop {
        let next = async {
            let room = Arc::clone(&lanes.redrive_room)
                .acquire_owned()
                .await
                .context("wait for room")?;
            let pulled = pull
                .next(lanes.redrive_room.available_permits() + 1)
                .await?;
            anyhow::Ok((pulled, room))
        };
        let pulled = tokio::select! {
            // Once it is time to stop, nothing more is taken in.
            biased;
            () = stopping.stopped() => break,
            pulled = next => pulled,
        };
        match pulled {
            Ok((pulled, room)) => dispatch(lanes, pulled, Some(room), &stopping).await,
            Err(error) => {
                tracing::warn!(
                    "worker {} asks for what was put back again soon: {error:#}",
                    lanes.worker.name
                );
                if stopping.wait(Duration::from_secs(1)).await {
                    break;
                }
            }
        }
    }
    while let Some(pulled) = pull.drain().await {
        let room = Arc::clone(&lanes.redrive_room).try_acquire_owned().ok();
        dispatch(lanes, pulled, room, &stopping).await;
    }
}

/// Reads the letter that a message points to and deals it to its lane, where it is a message like any other.
async fn dispatch(
    lanes: &Lanes,
    pulled: DeliveredMessage,
    room: Option<OwnedSemaphorePermit>,
    stopping: &Stopping,
) {
    let in_flight = lanes.in_flight.enter(pulled.receipt.progress());
    let pointer = Pointer::parse(&pulled.message).unwrap_or(INVALID_POINTER);
    let settled = match read_for_version(lanes, pointer, stopping).await {
        Some(RedriveLookup::Message(_, active)) if active != lanes.version => {
            pulled.receipt.nack(SWAP_POLL_INTERVAL).await
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
                _room: room,
            };
            return lanes.dispatch_all(vec![pending_message]).await;
        }
        Some(RedriveLookup::OutOfDate(settled)) => pulled.receipt.ack(&settled).await,
        None => pulled.receipt.nack(NACK_DELAY).await,
    };
    if let Err(error) = settled {
        tracing::debug!("a message that was put back comes again: {error:#}");
    }
}

/// Reads a letter. What failed with the version before is not given to it again while the new one is on its way: it is read
/// again until that is here, or for some seconds.
async fn read_for_version(
    lanes: &Lanes,
    pointer: Pointer,
    stopping: &Stopping,
) -> Option<RedriveLookup> {
    let end = Instant::now() + SWAP_TIMEOUT;
    loop {
        let found = read_dead_letter(&*lanes.store, pointer, &lanes.worker.name, stopping).await?;
        let is_ours =
            !matches!(found, RedriveLookup::Message(_, active) if active != lanes.version);
        if is_ours || Instant::now() >= end {
            return Some(found);
        }
        if stopping.wait(SWAP_POLL_INTERVAL).await {
            return None;
        }
    }
}

/// Asks the database until it answers; none when the host stops before.
async fn read_dead_letter(
    store: &dyn Store,
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
            Ok(put_back) => return Some(put_back),
            Err(error) => {
                tracing::warn!(
                    worker,
                    "read a letter again soon: {:#}",
                    anyhow::Error::from(error)
                );
            }
        }
        if stopping.wait(backoff.next(rand::random())).await {
            return None;
        }
    }
}
