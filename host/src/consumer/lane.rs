//! A lane: a sequential executor of batches, one transaction at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::WorkerCounters;
use super::held_keys::HeldKeys;
use super::in_flight::InFlightGuard;
use super::queue::{Queue, Sequenced};
use crate::bus::Receipt;
use crate::delivery::batch_size::{AdaptiveBatchSize, BATCH_TIME};
use crate::delivery::concurrency_limit::ConcurrencyLimit;
use crate::delivery::{BatchResult, Delivery};
use crate::drain::Stopping;
use crate::fault;
use crate::model::alarm;
use crate::model::dead_letter::notice;
use crate::model::message::{Message, Output};
use crate::model::retry::Backoff;
use crate::model::verdict::{DeadLetter, Reason, Settled, Verdict};
use crate::relay::RelayHandle;
use crate::store::{DeadLettered, StoreError};

/// From this delivery on a message is handled alone. Retries reach this count too, at the cost of
/// two small transactions each.
const ALONE_FROM_DELIVERY: u64 = 3;

/// Maximum number of host crashes while a message is handled alone.
const CRASHES_MAX: u32 = 3;

/// Redelivery delay of messages that a lane could not settle before the host stopped.
const NACK_DELAY: Duration = Duration::from_millis(1);

/// A message in a lane.
pub struct PendingMessage {
    pub message: Arc<Message>,
    /// Messages with the same key are handled in stream order.
    pub key: Option<String>,
    /// The reason why the message cannot be handled by the guest.
    pub unusable: Option<(Reason, String)>,
    /// Number of deliveries, including this one.
    pub delivered: u64,
    pub receipt: Receipt,
    /// Keeps the broker from redelivering the message while this host holds it.
    pub _in_flight: InFlightGuard,
    /// Its permit of the host's capacity. Pulling stops when none is left. `None` for a message
    /// that arrived after pulling had stopped.
    pub _permit: Option<OwnedSemaphorePermit>,
}

/// A lane of a worker.
pub(super) struct Lane {
    pub delivery: Delivery,
    pub relay: RelayHandle,
    /// Shared by all lanes of a worker.
    pub concurrency_limit: Arc<ConcurrencyLimit>,
    /// Shared by all lanes of a worker.
    pub held_keys: HeldKeys,
    pub counters: Arc<WorkerCounters>,
    pub stopping: Stopping,
}

/// The host stops while the database is unavailable.
struct Stopped;

impl Lane {
    /// Runs until the channel is closed and all its messages are settled, or until the drain times
    /// out. Messages that still wait for their next attempt are returned to the broker.
    pub async fn run(self, mut pending_messages: mpsc::Receiver<PendingMessage>) {
        let mut queue = Queue::new();
        let mut batch_size =
            AdaptiveBatchSize::new(self.delivery.worker.batch as usize, BATCH_TIME);
        loop {
            while let Ok(pending_message) = pending_messages.try_recv() {
                queue.push(pending_message);
            }
            // Takes the available messages and does not wait for a full batch.
            let batch = queue.take(batch_size.current(), Instant::now());
            if batch.is_empty() {
                match next_event(&mut pending_messages, queue.next_due()).await {
                    LaneEvent::Arrived(pending_message) => queue.push(*pending_message),
                    LaneEvent::Due => {}
                    LaneEvent::Closed => break,
                }
            } else if let Err(Stopped) = self.process(batch, &mut queue, &mut batch_size).await {
                break;
            }
        }
        nack_all(queue.into_remaining()).await;
    }

    /// Handles messages in their order. They run together, except those that must be handled alone.
    /// The messages after such a one are requeued.
    async fn process(
        &self,
        mut pending_messages: Vec<PendingMessage>,
        queue: &mut Queue<PendingMessage>,
        batch_size: &mut AdaptiveBatchSize,
    ) -> Result<(), Stopped> {
        match pending_messages
            .iter()
            .position(PendingMessage::is_handled_alone)
        {
            None => self.deliver(pending_messages, queue, batch_size).await,
            Some(0) => {
                queue.requeue(pending_messages.split_off(1));
                match pending_messages.pop() {
                    Some(pending_message) => {
                        self.deliver_alone(pending_message, queue, batch_size).await
                    }
                    None => Ok(()),
                }
            }
            Some(before) => {
                queue.requeue(pending_messages.split_off(before));
                self.deliver(pending_messages, queue, batch_size).await
            }
        }
    }

    async fn deliver(
        &self,
        pending_messages: Vec<PendingMessage>,
        queue: &mut Queue<PendingMessage>,
        batch_size: &mut AdaptiveBatchSize,
    ) -> Result<(), Stopped> {
        // Wait for a permit.
        let messages: Vec<Arc<Message>> = pending_messages
            .iter()
            .map(|pending_message| Arc::clone(&pending_message.message))
            .collect();
        let mut stopping = self.stopping.clone();
        let permit = tokio::select! {
            permit = self.concurrency_limit.acquire() => permit,
            // The lane with the permit may be waiting for the database. Return the messages to the
            // broker.
            () = stopping.stopped(), if !self.concurrency_limit.has_permit() => {
                queue.requeue(pending_messages);
                return Err(Stopped);
            }
        };

        // Deliver the batch.
        let began = Instant::now();
        let Some(delivered) = self
            .retry_until_available("deliver", || {
                self.delivery.deliver(&messages, batch_size.savepoints())
            })
            .await
        else {
            queue.requeue(pending_messages);
            return Err(Stopped);
        };

        // Adapt the batch size and the concurrency.
        let BatchResult {
            verdicts,
            outputs,
            leased_at,
            reruns,
            savepoint_rollbacks,
            conflicts,
        } = delivered;
        self.concurrency_limit.record_conflicts(conflicts);
        drop(permit);
        batch_size.record_reruns(reruns, savepoint_rollbacks);
        batch_size.record_time(pending_messages.len(), began.elapsed());

        // Publish and settle.
        self.relay.hand_over(outputs, leased_at).await;
        self.settle(pending_messages.into_iter().zip(verdicts).collect(), queue)
            .await
    }

    /// Handles one message alone: it is unusable, or it was delivered several times without a
    /// verdict.
    ///
    /// An unusable message becomes a dead letter. Any other one may have crashed its hosts, so a
    /// crash marker is stored before the guest runs. The marker remains if the host dies. A message
    /// that also crashed [`CRASHES_MAX`] hosts alone becomes a dead letter.
    async fn deliver_alone(
        &self,
        pending_message: PendingMessage,
        queue: &mut Queue<PendingMessage>,
        batch_size: &mut AdaptiveBatchSize,
    ) -> Result<(), Stopped> {
        if let Some((reason, why)) = pending_message.unusable.clone() {
            return self.settle_dead(pending_message, reason, why, queue).await;
        }

        // Set the crash marker.
        let store = &self.delivery.store;
        let (worker, message) = (
            self.delivery.worker.name.clone(),
            Arc::clone(&pending_message.message),
        );
        let set_marker = || store.write_crash_marker(&worker, &message.event_id);
        let Some(crashes) = self
            .retry_until_available("set the crash marker", set_marker)
            .await
        else {
            queue.requeue(vec![pending_message]);
            return Err(Stopped);
        };
        fault::point(fault::CRASH_MARKER_SET);

        // Handle the message.
        let handled = if crashes >= CRASHES_MAX {
            let why = format!(
                "the host crashed {crashes} times while it handled this message alone, after {} \
                 deliveries",
                pending_message.delivered
            );
            self.settle_dead(pending_message, Reason::CrashedHost, why, queue)
                .await
        } else {
            self.deliver(vec![pending_message], queue, batch_size).await
        };

        // Clear the crash marker.
        let clear_marker = || store.clear_crash_marker(&worker, &message.event_id);
        self.retry_until_available("clear the crash marker", clear_marker)
            .await;
        handled
    }

    /// Retries a database operation until the database is available. No attempt is counted. The
    /// messages are kept from redelivery meanwhile, and no more are pulled than the capacity
    /// allows. Returns `None` when the host stops first.
    async fn retry_until_available<T, F, Fut>(&self, what: &str, operation: F) -> Option<T>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let mut backoff = Backoff::default();
        loop {
            let outcome = operation().await;
            self.delivery.report_health(&outcome);
            if let Err(StoreError::Conflict(_)) = &outcome {
                self.concurrency_limit.record_conflicts(1);
            }
            match outcome {
                Ok(result) => return Some(result),
                Err(error) => {
                    let worker = self.delivery.worker.name.as_str();
                    tracing::warn!(
                        worker,
                        operation = what,
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "database operation failed, retrying"
                    );
                }
            }
            if self.stopping.wait(backoff.next(rand::random())).await {
                return None;
            }
        }
    }

    /// Converts verdicts into acks, nacks, held keys and dead letters. An ack requires a proof from
    /// the store.
    async fn settle(
        &self,
        pending_messages: Vec<(PendingMessage, Verdict)>,
        queue: &mut Queue<PendingMessage>,
    ) -> Result<(), Stopped> {
        let mut dead = Vec::new();
        let mut blocked = Vec::new();
        for (pending_message, verdict) in pending_messages {
            self.counters.count(&verdict);
            self.delivery
                .metrics
                .verdict(&self.delivery.worker.name, verdict.as_str());
            tracing::debug!(
                target: VERDICT_LOG,
                worker = self.delivery.worker.name,
                subject = pending_message.message.subject,
                event_id = pending_message.message.event_id,
                verdict = verdict.as_str(),
                "message handled"
            );
            if verdict.is_final()
                && let Some(key) = &pending_message.key
            {
                self.held_keys
                    .release(key, &pending_message.message.event_id);
            }
            match verdict {
                Verdict::Done(proof) => acknowledge(pending_message, proof).await,
                Verdict::Duplicate(proof) => {
                    fault::witness(fault::DUPLICATE_SKIPPED);
                    acknowledge(pending_message, proof).await;
                }
                Verdict::Retry { attempt, after } if self.blocks_key(&pending_message) => {
                    if let Some(key) = &pending_message.key {
                        let event_id = &pending_message.message.event_id;
                        self.held_keys.hold(key, event_id, attempt, after);
                    }
                    queue.hold(pending_message, Instant::now() + after)
                }
                Verdict::Retry { after, .. } | Verdict::Wait { after } => {
                    nack(pending_message, after).await
                }
                Verdict::Blocked => blocked.push(pending_message),
                Verdict::Dead(dead_letter) => dead.push((pending_message, *dead_letter)),
            }
        }
        // The earlier message holds the key. If it is dead, its dead letter is stored below, before
        // the next batch.
        queue.requeue(blocked);
        if dead.is_empty() {
            Ok(())
        } else {
            self.dead_letter(dead, queue).await
        }
    }

    /// Whether a failed message blocks its key. It then must stay in the lane.
    fn blocks_key(&self, pending_message: &PendingMessage) -> bool {
        self.delivery
            .worker
            .held_key(&pending_message.message)
            .is_some()
    }

    /// Stores dead letters in a transaction of their own, and then acknowledges their messages.
    async fn dead_letter(
        &self,
        dead: Vec<(PendingMessage, DeadLetter)>,
        queue: &mut Queue<PendingMessage>,
    ) -> Result<(), Stopped> {
        // Store the dead letters.
        let dead_letters: Vec<(DeadLetter, Output)> = dead
            .iter()
            .map(|(_, dead_letter)| {
                (
                    dead_letter.clone(),
                    notice(dead_letter, self.delivery.payload_max),
                )
            })
            .collect();
        let leased_at = std::time::Instant::now();
        let new_failures = self.delivery.worker.alarm.new_failures;
        let dead_letter = || self.delivery.store.dead_letter(&dead_letters, new_failures);
        let Some(DeadLettered {
            proofs,
            notices,
            alarms,
        }) = self
            .retry_until_available("write dead letters", dead_letter)
            .await
        else {
            queue.requeue(
                dead.into_iter()
                    .map(|(pending_message, _)| pending_message)
                    .collect(),
            );
            return Err(Stopped);
        };
        fault::point(fault::AFTER_DEAD_LETTER);

        // Log and count them.
        for (dead_letter, _) in &dead_letters {
            self.delivery
                .metrics
                .dead_letter(&dead_letter.worker, dead_letter.reason.as_str());
            tracing::info!(
                worker = dead_letter.worker,
                event_id = dead_letter.message.event_id,
                reason = dead_letter.reason.as_str(),
                detail = dead_letter.detail,
                "message dead-lettered"
            );
        }
        alarms.notices.iter().for_each(alarm::log);

        // Publish their notices and acknowledge.
        self.relay.hand_over(notices, leased_at).await;
        self.relay.hand_over(alarms.rows, leased_at).await;
        for ((pending_message, _), proof) in dead.into_iter().zip(proofs) {
            acknowledge(pending_message, proof).await;
        }
        Ok(())
    }

    /// Dead-letters a message without running the guest.
    async fn settle_dead(
        &self,
        pending_message: PendingMessage,
        reason: Reason,
        detail: String,
        queue: &mut Queue<PendingMessage>,
    ) -> Result<(), Stopped> {
        let dead_letter = DeadLetter {
            worker: self.delivery.worker.name.clone(),
            version: self.delivery.version,
            reason,
            code: None,
            detail,
            frames: Vec::new(),
            attempts: 0,
            message: Message::clone(&pending_message.message),
        };
        self.settle(
            vec![(pending_message, Verdict::Dead(Box::new(dead_letter)))],
            queue,
        )
        .await
    }
}

/// The target of the log lines on verdicts, one for each message.
pub const VERDICT_LOG: &str = "oncely::verdict";

/// Acknowledges a message. After a lost ack the message is redelivered and is a duplicate.
async fn acknowledge(pending_message: PendingMessage, proof: Settled) {
    if let Err(error) = pending_message.receipt.ack(&proof).await {
        tracing::debug!(
            error = format!("{error:#}"),
            "failed to send an ack, the redelivered message will be skipped"
        );
    }
    fault::point(fault::AFTER_ACK);
}

/// Nacks a message. The broker redelivers it after the delay.
async fn nack(pending_message: PendingMessage, after: Duration) {
    if let Err(error) = pending_message.receipt.nack(after).await {
        tracing::debug!(
            error = format!("{error:#}"),
            "failed to send a nack, the message will be redelivered after its ack wait"
        );
    }
}

/// Nacks messages in stream order with a short delay. The next host receives a failed message and
/// later ones of its key in their order.
pub async fn nack_all(pending_messages: Vec<PendingMessage>) {
    for pending_message in pending_messages {
        nack(pending_message, NACK_DELAY).await;
    }
}

/// The event that ends the wait of an idle lane.
enum LaneEvent {
    Arrived(Box<PendingMessage>),
    Due,
    Closed,
}

async fn next_event(
    pending_messages: &mut mpsc::Receiver<PendingMessage>,
    due: Option<Instant>,
) -> LaneEvent {
    let due = async {
        match due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // A closed channel means that the host stops. Messages that are due then are left to the
        // next host.
        biased;
        pending_message = pending_messages.recv() => pending_message.map_or(LaneEvent::Closed, |pending_message| LaneEvent::Arrived(Box::new(pending_message))),
        () = due => LaneEvent::Due,
    }
}

impl PendingMessage {
    fn is_handled_alone(&self) -> bool {
        self.unusable.is_some() || self.delivered >= ALONE_FROM_DELIVERY
    }

    /// Its sequence on the stream.
    pub fn sequence(&self) -> u64 {
        self.message
            .origin
            .as_ref()
            .map_or(0, |origin| origin.sequence)
    }
}

impl Sequenced for PendingMessage {
    fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    fn sequence(&self) -> u64 {
        PendingMessage::sequence(self)
    }
}
