//! A lane: one sequential executor of batches, one transaction at a time.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::bus::Receipt;
use crate::delivery::{Delivered, Delivery};
use crate::drain::Stopping;
use crate::fault;
use crate::message::{Message, Output};
use crate::relay::HandOver;
use crate::retry::Backoff;
use crate::store::StoreError;
use crate::verdict::{Letter, Reason, Settled, Verdict};
use crate::worker::{InFlight, WorkerCounters};

/// From this delivery on a message is handled alone. Retries get there too, which costs them two small transactions.
const ALONE_FROM_DELIVERY: u64 = 3;

/// How often a host may die while it handles a message alone.
const UNFINISHED_MAX: u32 = 2;

/// One message on its way through a lane.
pub struct Parcel {
    pub message: Arc<Message>,
    /// Why it cannot be given to the guest as it is.
    pub unusable: Option<(Reason, String)>,
    /// How often it was delivered, this time included.
    pub delivered: u64,
    pub receipt: Receipt,
    /// Keeps the broker from redelivering it while it is here.
    pub in_flight: InFlight,
    /// Its room in the host; pulling stops when there is none.
    pub room: OwnedSemaphorePermit,
}

/// Everything a lane needs.
pub struct Lane {
    pub delivery: Delivery,
    pub relay: HandOver,
    pub counters: Arc<WorkerCounters>,
    pub stopping: Stopping,
}

impl Lane {
    /// Runs until the worker closes the channel and all that was in it is settled, or until the drain gives up.
    pub async fn run(self, mut parcels: mpsc::Receiver<Parcel>) {
        let batch_max = self.delivery.worker.batch as usize;
        let mut batch = Vec::with_capacity(batch_max);
        // Takes what is ready and does not wait for a batch to fill.
        while parcels.recv_many(&mut batch, batch_max).await > 0 {
            self.process(std::mem::take(&mut batch)).await;
        }
    }

    /// Handles parcels in their order: together, but for those that need a treatment of their own.
    async fn process(&self, parcels: Vec<Parcel>) {
        let mut together = Vec::with_capacity(parcels.len());
        for parcel in parcels {
            if parcel.unusable.is_none() && parcel.delivered < ALONE_FROM_DELIVERY {
                together.push(parcel);
                continue;
            }
            self.deliver(std::mem::take(&mut together)).await;
            match parcel.unusable.clone() {
                Some((reason, why)) => self.settle_dead(parcel, reason, why).await,
                None => self.deliver_alone(parcel).await,
            }
        }
        self.deliver(together).await;
    }

    async fn deliver(&self, parcels: Vec<Parcel>) {
        if parcels.is_empty() {
            return;
        }
        let messages: Vec<Arc<Message>> = parcels.iter().map(|parcel| Arc::clone(&parcel.message)).collect();
        // Without an answer from the database the messages stay unacknowledged: the broker delivers them again.
        let Some(delivered) = self.insist("deliver", || self.delivery.deliver(&messages)).await else { return };
        let Delivered { verdicts, outputs } = delivered;
        self.relay.hand_over(outputs).await;
        self.settle(parcels.into_iter().zip(verdicts).collect()).await;
    }

    /// Handles a message that was delivered several times without a final word: hosts may have died of it. A note that
    /// survives the host tells the next one; a message that ended hosts alone, too, is not handled any more.
    async fn deliver_alone(&self, parcel: Parcel) {
        let store = &self.delivery.store;
        let (worker, message) = (self.delivery.worker.name.clone(), Arc::clone(&parcel.message));
        let note = || store.note_unfinished(&worker, &message.event_id);
        let Some(unfinished) = self.insist("note an unfinished message", note).await else { return };
        fault::point(fault::NOTED_UNFINISHED);
        if unfinished >= UNFINISHED_MAX {
            let why = format!(
                "the host died {unfinished} times while it handled this message alone, after {} deliveries",
                parcel.delivered
            );
            self.settle_dead(parcel, Reason::CrashedHost, why).await;
        } else {
            self.deliver(vec![parcel]).await;
        }
        let take_back = || store.take_back_unfinished(&worker, &message.event_id);
        self.insist("take back an unfinished message", take_back).await;
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
            match operation().await {
                Ok(answer) => return Some(answer),
                Err(error) => {
                    let worker = self.delivery.worker.name.as_str();
                    tracing::warn!(worker, "{what} again soon: {:#}", anyhow::Error::from(error));
                    self.counters.database_waits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            }
            if self.stopping.wait(backoff.next(rand::random())).await {
                return None;
            }
        }
    }

    /// Turns verdicts into acks, naks and dead letters. Only a proof from the store acknowledges.
    async fn settle(&self, parcels: Vec<(Parcel, Verdict)>) {
        let mut dead = Vec::new();
        for (parcel, verdict) in parcels {
            self.counters.count(&verdict);
            match verdict {
                Verdict::Done(settled) => acknowledge(parcel, settled).await,
                Verdict::Duplicate(settled) => {
                    fault::witness(fault::DUPLICATE_SKIPPED);
                    acknowledge(parcel, settled).await;
                }
                Verdict::Retry { after, .. } | Verdict::Wait { after } => {
                    if let Err(error) = parcel.receipt.nak(after).await {
                        tracing::debug!("nak not sent; the broker redelivers by itself: {error:#}");
                    }
                }
                Verdict::Dead(letter) => dead.push((parcel, *letter)),
            }
        }
        if !dead.is_empty() {
            self.bury(dead).await;
        }
    }

    /// Dead letters in a transaction of their own, then the acks.
    async fn bury(&self, dead: Vec<(Parcel, Letter)>) {
        let letters: Vec<(Letter, Output)> =
            dead.iter().map(|(_, letter)| (letter.clone(), crate::dead_letter::notice(letter))).collect();
        let Some((settled, notices)) = self.insist("bury", || self.delivery.store.bury(&letters)).await else {
            return;
        };
        fault::point(fault::AFTER_BURIAL);
        for (letter, _) in &letters {
            tracing::info!(
                worker = letter.worker,
                event_id = letter.message.event_id,
                reason = letter.reason.as_str(),
                "dead letter: {}",
                letter.detail
            );
        }
        self.relay.hand_over(notices).await;
        for ((parcel, _), settled) in dead.into_iter().zip(settled) {
            acknowledge(parcel, settled).await;
        }
    }

    /// A dead letter for a message that is not given to the guest.
    async fn settle_dead(&self, parcel: Parcel, reason: Reason, detail: String) {
        let letter = Letter {
            worker: self.delivery.worker.name.clone(),
            version: self.delivery.version,
            reason,
            code: None,
            detail,
            attempts: 0,
            message: Message::clone(&parcel.message),
        };
        self.settle(vec![(parcel, Verdict::Dead(Box::new(letter)))]).await;
    }
}

/// Acknowledges. When the ack is lost, the message comes again and is a duplicate.
async fn acknowledge(parcel: Parcel, settled: Settled) {
    if let Err(error) = parcel.receipt.ack(&settled).await {
        tracing::debug!("ack not sent; the message will come again and be skipped: {error:#}");
    }
    fault::point(fault::AFTER_ACK);
}
