//! A lane: one sequential executor of batches, one transaction at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::WorkerCounters;
use super::batch_size::Pace;
use super::crowd::Crowd;
use super::in_flight::InFlight;
use super::queue::{InOrder, Queue};
use crate::bus::Receipt;
use crate::config::manifest::OnFailure;
use crate::delivery::{Delivered, Delivery};
use crate::drain::Stopping;
use crate::fault;
use crate::model::alarm;
use crate::model::dead_letter::notice;
use crate::model::message::{Message, Output};
use crate::model::retry::Backoff;
use crate::model::verdict::{Letter, Reason, Settled, Verdict};
use crate::relay::HandOver;
use crate::store::{Buried, StoreError};

/// From this delivery on a message is handled alone. Retries get there too, which costs them two small transactions.
const ALONE_FROM_DELIVERY: u64 = 3;

/// How often a host may die while it handles a message alone.
const UNFINISHED_MAX: u32 = 3;

/// When the next host is to take up what a lane could not settle before it stopped.
const TAKE_UP_AFTER: Duration = Duration::from_millis(1);

/// One message on its way through a lane.
pub struct Parcel {
    pub message: Arc<Message>,
    /// Parcels with the same key are handled in stream order.
    pub key: Option<String>,
    /// Why it cannot be given to the guest as it is.
    pub unusable: Option<(Reason, String)>,
    /// How often it was delivered, this time included.
    pub delivered: u64,
    pub receipt: Receipt,
    /// Keeps the broker from redelivering it while it is here.
    pub _in_flight: InFlight,
    /// Its room in the host; pulling stops when there is none. None for what came when pulling had stopped already.
    pub _room: Option<OwnedSemaphorePermit>,
}

/// Everything a lane needs.
pub struct Lane {
    pub delivery: Delivery,
    pub relay: HandOver,
    /// Shared by the lanes of a worker.
    pub crowd: Arc<Crowd>,
    pub counters: Arc<WorkerCounters>,
    pub stopping: Stopping,
}

/// The host stops, and the database did not answer any more.
struct Stopped;

impl Lane {
    /// Runs until the worker closes the channel and all that was in it is settled, or until the drain gives up. What then
    /// still waits for its next attempt goes back to the broker.
    pub async fn run(self, mut parcels: mpsc::Receiver<Parcel>) {
        let mut queue = Queue::new();
        let mut pace = Pace::new(self.delivery.worker.batch as usize);
        loop {
            while let Ok(parcel) = parcels.try_recv() {
                queue.push(parcel);
            }
            // Takes what is ready and does not wait for a batch to fill.
            let batch = queue.take(pace.size(), Instant::now());
            if batch.is_empty() {
                match next(&mut parcels, queue.next_due()).await {
                    Next::Arrived(parcel) => queue.push(*parcel),
                    Next::Due => {}
                    Next::Closed => break,
                }
            } else if let Err(Stopped) = self.process(batch, &mut queue, &mut pace).await {
                break;
            }
        }
        give_back(queue.into_rest()).await;
    }

    /// Handles parcels in their order: together, but for those that need a treatment of their own. What is behind such a one
    /// goes back into the queue.
    async fn process(
        &self,
        mut parcels: Vec<Parcel>,
        queue: &mut Queue<Parcel>,
        pace: &mut Pace,
    ) -> Result<(), Stopped> {
        match parcels.iter().position(Parcel::goes_alone) {
            None => self.deliver(parcels, queue, pace).await,
            Some(0) => {
                queue.put_back(parcels.split_off(1));
                match parcels.pop() {
                    Some(parcel) => self.deliver_alone(parcel, queue, pace).await,
                    None => Ok(()),
                }
            }
            Some(before) => {
                queue.put_back(parcels.split_off(before));
                self.deliver(parcels, queue, pace).await
            }
        }
    }

    async fn deliver(&self, parcels: Vec<Parcel>, queue: &mut Queue<Parcel>, pace: &mut Pace) -> Result<(), Stopped> {
        let messages: Vec<Arc<Message>> = parcels.iter().map(|parcel| Arc::clone(&parcel.message)).collect();
        let mut stopping = self.stopping.clone();
        let turn = tokio::select! {
            turn = self.crowd.enter() => turn,
            // The lane that has the turn may wait for the database: these messages are given back.
            () = stopping.stopped(), if !self.crowd.has_room() => {
                queue.put_back(parcels);
                return Err(Stopped);
            }
        };
        let began = Instant::now();
        let Some(delivered) = self.insist("deliver", || self.delivery.deliver(&messages, pace.is_careful())).await
        else {
            queue.put_back(parcels);
            return Err(Stopped);
        };
        let Delivered { verdicts, outputs, leased_at, reruns, undone, conflicts } = delivered;
        self.crowd.learn(conflicts);
        drop(turn);
        pace.learn(reruns, undone);
        pace.took(parcels.len(), began.elapsed());
        self.relay.hand_over(outputs, leased_at).await;
        self.settle(parcels.into_iter().zip(verdicts).collect(), queue).await
    }

    /// Buries a message that cannot be given to the guest, or handles one that was delivered several times without a final
    /// word: hosts may have died of it. A note that survives the host tells the next one; a message that ended hosts alone,
    /// too, is not handled any more.
    async fn deliver_alone(&self, parcel: Parcel, queue: &mut Queue<Parcel>, pace: &mut Pace) -> Result<(), Stopped> {
        if let Some((reason, why)) = parcel.unusable.clone() {
            return self.settle_dead(parcel, reason, why, queue).await;
        }
        let store = &self.delivery.store;
        let (worker, message) = (self.delivery.worker.name.clone(), Arc::clone(&parcel.message));
        let note = || store.note_unfinished(&worker, &message.event_id);
        let Some(unfinished) = self.insist("note an unfinished message", note).await else {
            queue.put_back(vec![parcel]);
            return Err(Stopped);
        };
        fault::point(fault::NOTED_UNFINISHED);
        let settled = if unfinished >= UNFINISHED_MAX {
            let why = format!(
                "the host died {unfinished} times while it handled this message alone, after {} deliveries",
                parcel.delivered
            );
            self.settle_dead(parcel, Reason::CrashedHost, why, queue).await
        } else {
            self.deliver(vec![parcel], queue, pace).await
        };
        let take_back = || store.take_back_unfinished(&worker, &message.event_id);
        self.insist("take back an unfinished message", take_back).await;
        settled
    }

    /// Repeats a database operation until the database answers. Trouble of the database is waited out: no attempt is
    /// spent, the messages are kept from redelivery meanwhile, and no more are pulled than there is room for.
    /// None when the host stops before there is an answer.
    async fn insist<T, F, Fut>(&self, what: &str, operation: F) -> Option<T>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let mut backoff = Backoff::default();
        loop {
            let outcome = operation().await;
            self.delivery.note(&outcome);
            if let Err(StoreError::Conflict(_)) = &outcome {
                self.crowd.learn(1);
            }
            match outcome {
                Ok(answer) => return Some(answer),
                Err(error) => {
                    let worker = self.delivery.worker.name.as_str();
                    tracing::warn!(worker, "{what} again soon: {:#}", anyhow::Error::from(error));
                }
            }
            if self.stopping.wait(backoff.next(rand::random())).await {
                return None;
            }
        }
    }

    /// Turns verdicts into acks, naks, waits and dead letters. Only a proof from the store acknowledges.
    async fn settle(&self, parcels: Vec<(Parcel, Verdict)>, queue: &mut Queue<Parcel>) -> Result<(), Stopped> {
        let mut dead = Vec::new();
        let mut behind = Vec::new();
        for (parcel, verdict) in parcels {
            self.counters.count(&verdict);
            self.delivery.metrics.verdict(&self.delivery.worker.name, verdict.as_str());
            match verdict {
                Verdict::Done(settled) => acknowledge(parcel, settled).await,
                Verdict::Duplicate(settled) => {
                    fault::witness(fault::DUPLICATE_SKIPPED);
                    acknowledge(parcel, settled).await;
                }
                Verdict::Retry { after, .. } if self.holds(&parcel) => queue.hold(parcel, Instant::now() + after),
                Verdict::Retry { after, .. } | Verdict::Wait { after } => come_again(parcel, after).await,
                Verdict::Behind => behind.push(parcel),
                Verdict::Dead(letter) => dead.push((parcel, *letter)),
            }
        }
        // Their key is held by now; if not, the message before them is dead, and once it is buried they go on.
        queue.put_back(behind);
        if dead.is_empty() { Ok(()) } else { self.bury(dead, queue).await }
    }

    /// Whether the later messages of its key wait in the lane for this one, which then must not leave it.
    fn holds(&self, parcel: &Parcel) -> bool {
        self.delivery.worker.on_failure == OnFailure::Hold && parcel.key.is_some()
    }

    /// Dead letters in a transaction of their own, then the acks.
    async fn bury(&self, dead: Vec<(Parcel, Letter)>, queue: &mut Queue<Parcel>) -> Result<(), Stopped> {
        let letters: Vec<(Letter, Output)> =
            dead.iter().map(|(_, letter)| (letter.clone(), notice(letter, self.delivery.payload_max))).collect();
        let leased_at = std::time::Instant::now();
        let new_failures = self.delivery.worker.alarm.new_failures;
        let bury = || self.delivery.store.bury(&letters, new_failures);
        let Some(Buried { settled, notices, alarms }) = self.insist("bury", bury).await else {
            queue.put_back(dead.into_iter().map(|(parcel, _)| parcel).collect());
            return Err(Stopped);
        };
        fault::point(fault::AFTER_BURIAL);
        for (letter, _) in &letters {
            self.delivery.metrics.dead_letter(&letter.worker, letter.reason.as_str());
            tracing::info!(
                worker = letter.worker,
                event_id = letter.message.event_id,
                reason = letter.reason.as_str(),
                "dead letter: {}",
                letter.detail
            );
        }
        alarms.notices.iter().for_each(alarm::log);
        self.relay.hand_over(notices, leased_at).await;
        self.relay.hand_over(alarms.rows, leased_at).await;
        for ((parcel, _), settled) in dead.into_iter().zip(settled) {
            acknowledge(parcel, settled).await;
        }
        Ok(())
    }

    /// A dead letter for a message that is not given to the guest.
    async fn settle_dead(
        &self,
        parcel: Parcel,
        reason: Reason,
        detail: String,
        queue: &mut Queue<Parcel>,
    ) -> Result<(), Stopped> {
        let letter = Letter {
            worker: self.delivery.worker.name.clone(),
            version: self.delivery.version,
            reason,
            code: None,
            detail,
            frames: Vec::new(),
            attempts: 0,
            message: Message::clone(&parcel.message),
        };
        self.settle(vec![(parcel, Verdict::Dead(Box::new(letter)))], queue).await
    }
}

/// Acknowledges. When the ack is lost, the message comes again and is a duplicate.
async fn acknowledge(parcel: Parcel, settled: Settled) {
    if let Err(error) = parcel.receipt.ack(&settled).await {
        tracing::debug!("ack not sent; the message will come again and be skipped: {error:#}");
    }
    fault::point(fault::AFTER_ACK);
}

/// Has the broker deliver it again after a while.
async fn come_again(parcel: Parcel, after: Duration) {
    if let Err(error) = parcel.receipt.nak(after).await {
        tracing::debug!("nak not sent; the broker redelivers by itself: {error:#}");
    }
}

/// Hands what is left to whoever pulls next, in stream order and with little delay: a failed message and those behind it
/// then stay in their order.
pub async fn give_back(parcels: Vec<Parcel>) {
    for parcel in parcels {
        come_again(parcel, TAKE_UP_AFTER).await;
    }
}

/// What ends the wait of a lane that has nothing to run.
enum Next {
    Arrived(Box<Parcel>),
    Due,
    Closed,
}

async fn next(parcels: &mut mpsc::Receiver<Parcel>, due: Option<Instant>) -> Next {
    let due = async {
        match due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // A closed channel means that it is time to stop: what is due then is left to the next host.
        biased;
        parcel = parcels.recv() => parcel.map_or(Next::Closed, |parcel| Next::Arrived(Box::new(parcel))),
        () = due => Next::Due,
    }
}

impl Parcel {
    fn goes_alone(&self) -> bool {
        self.unusable.is_some() || self.delivered >= ALONE_FROM_DELIVERY
    }

    /// Its place on the stream.
    pub fn sequence(&self) -> u64 {
        self.message.origin.as_ref().map_or(0, |origin| origin.sequence)
    }
}

impl InOrder for Parcel {
    fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    fn sequence(&self) -> u64 {
        Parcel::sequence(self)
    }
}
