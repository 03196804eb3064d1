//! A running worker: pulls from its stream, deals messages to its lanes by key, and drains in good order.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::bus::{Bus, DeliveredMessage, Probe, PullConsumer, Subscription, UnhandledMessages};
use crate::config::manifest::{OnFailure, Worker};
use crate::delivery::Delivery;
use crate::drain::{Stop, Stopping};
use crate::fault;
use crate::metrics::Metrics;
use crate::model::verdict::Verdict;
use crate::relay::RelayHandle;
use crate::store::Store;

mod batch_size;
mod concurrency_limit;
mod in_flight;
mod lane;
mod queue;
mod redelivery;
mod redrive;

use concurrency_limit::ConcurrencyLimit;
use in_flight::InFlightMessages;
use lane::{Lane, PendingMessage, nack_all};
use redelivery::RedeliveryBarrier;

/// How many batches may wait for each lane beside the one that runs.
const QUEUED_BATCHES_MAX: usize = 1;

/// How many more for a worker whose messages may have to wait for others of their key.
const HELD_BATCHES_MAX: usize = 3;

/// How often a worker that is not seen on the server yet looks again.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// What a worker did since it started here.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    pub done: AtomicU64,
    pub duplicates: AtomicU64,
    pub retries: AtomicU64,
    pub dead: AtomicU64,
}

impl WorkerCounters {
    pub fn count(&self, verdict: &Verdict) {
        let counter = match verdict {
            Verdict::Done(_) => &self.done,
            Verdict::Duplicate(_) => &self.duplicates,
            Verdict::Retry { .. } => &self.retries,
            Verdict::Wait { .. } | Verdict::Blocked => return,
            Verdict::Dead(_) => &self.dead,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A worker that runs in this host.
pub struct RunningWorker {
    pub worker: Arc<Worker>,
    pub version: u32,
    pub digest: String,
    pub counters: Arc<WorkerCounters>,
    probe: Probe,
    in_flight: InFlightMessages,
    is_subscribed: Arc<AtomicBool>,
    stop: Stop,
    pulling: JoinHandle<()>,
}

impl RunningWorker {
    /// Subscribes and starts the lanes.
    pub async fn start(
        delivery: Delivery,
        digest: String,
        bus: &Bus,
        relay: RelayHandle,
    ) -> Result<Self> {
        let worker = Arc::clone(&delivery.worker);
        let stream = worker
            .stream
            .as_deref()
            .context("start a worker that takes no messages")?;
        let version = delivery.version;
        let pull = bus
            .subscribe(&with_version(subscription(&worker, stream), version))
            .await
            .with_context(|| format!("subscribe worker {} to stream {}", worker.name, stream))?;
        let redriven = bus
            .subscribe(&redrive::subscription(&worker))
            .await
            .with_context(|| format!("subscribe worker {} to what is put back", worker.name))?;
        let counters = Arc::new(WorkerCounters::default());
        let is_subscribed = Arc::new(AtomicBool::new(false));
        let stop = Stop::new();
        let probe = pull.probe();
        tokio::spawn(wait_until_subscribed(
            probe.clone(),
            Arc::clone(&is_subscribed),
            stop.stopping(),
        ));
        let barrier = match worker.on_failure {
            OnFailure::Skip => RedeliveryBarrier::disabled(),
            OnFailure::Hold => {
                let backlog = probe
                    .backlog()
                    .await
                    .context("ask what an earlier host was given")?;
                RedeliveryBarrier::begin(backlog, worker.ack_wait, capacity(&worker))
            }
        };
        let lanes = Lanes::start(&delivery, &relay, &counters, &stop);
        let in_flight = lanes.in_flight.clone();
        let pulling = tokio::spawn(run(pull, redriven, lanes, barrier, stop.stopping()));
        Ok(RunningWorker {
            worker,
            version,
            digest,
            counters,
            probe,
            in_flight,
            is_subscribed,
            stop,
            pulling,
        })
    }

    /// Whether the server has seen this worker's subscription.
    pub fn is_subscribed(&self) -> bool {
        self.is_subscribed.load(Ordering::Relaxed)
    }

    /// What is on the stream for it; none when the server does not answer in a second.
    pub async fn unhandled(&self) -> Option<UnhandledMessages> {
        let unhandled = tokio::time::timeout(Duration::from_secs(1), self.probe.unhandled()).await;
        unhandled.ok()?.ok()
    }

    /// A way to look at its consumer.
    pub fn probe(&self) -> Probe {
        self.probe.clone()
    }

    /// How many messages this host holds for it.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Stops pulling, lets the lanes settle what they have, and returns when that is done.
    pub async fn drain(self) {
        self.stop.now();
        if let Err(error) = self.pulling.await {
            tracing::error!("worker {} did not end properly: {error}", self.worker.name);
        }
    }
}

/// What a worker takes from its stream.
pub fn subscription(worker: &Worker, stream: &str) -> Subscription {
    Subscription {
        stream: stream.to_owned(),
        durable: worker.durable(),
        subjects: worker.subjects.clone(),
        ack_wait: worker.ack_wait,
        // Room for several hosts.
        max_ack_pending: i64::try_from(capacity(worker) * 4)
            .unwrap_or(i64::MAX)
            .max(1_000),
        metadata: HashMap::from([("oncely.worker".to_owned(), worker.name.clone())]),
    }
}

fn with_version(mut subscription: Subscription, version: u32) -> Subscription {
    subscription
        .metadata
        .insert("oncely.version".to_owned(), version.to_string());
    subscription
}

/// How many messages of a worker one host holds at most.
fn capacity(worker: &Worker) -> usize {
    let batches = match worker.on_failure {
        OnFailure::Skip => 1 + QUEUED_BATCHES_MAX,
        OnFailure::Hold => 1 + QUEUED_BATCHES_MAX + HELD_BATCHES_MAX,
    };
    worker.concurrency as usize * worker.batch as usize * batches
}

/// Sets `is_subscribed` once the server knows of the subscription.
async fn wait_until_subscribed(probe: Probe, is_subscribed: Arc<AtomicBool>, stopping: Stopping) {
    loop {
        match probe.is_seen_by_server().await {
            Ok(true) => return is_subscribed.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(error) => tracing::debug!("subscription not seen yet: {error:#}"),
        }
        if stopping.wait(PROBE_INTERVAL).await {
            return;
        }
    }
}

/// Takes what is new and what was put back until it is time to stop; then lets the lanes settle what they have.
async fn run(
    pull: PullConsumer,
    redriven: PullConsumer,
    lanes: Lanes,
    barrier: RedeliveryBarrier<PendingMessage>,
    stopping: Stopping,
) {
    let new = pull_loop(pull, &lanes, barrier, stopping.clone());
    let (rest, ()) = tokio::join!(new, redrive::pull_loop(redriven, &lanes, stopping));
    lanes.drain().await;
    nack_all(rest).await;
}

/// Pulls as long as there is room; deals to the lanes. Returns what was not dealt.
async fn pull_loop(
    mut pull: PullConsumer,
    lanes: &Lanes,
    mut barrier: RedeliveryBarrier<PendingMessage>,
    mut stopping: Stopping,
) -> Vec<PendingMessage> {
    let probe = pull.probe();
    loop {
        let next = async {
            let room = Arc::clone(&lanes.room)
                .acquire_owned()
                .await
                .context("wait for room")?;
            let most = barrier.pull_limit(lanes.room.available_permits() + 1).await;
            let pulled = pull.next(most).await?;
            anyhow::Ok((pulled, room))
        };
        let pulled = tokio::select! {
            // Once it is time to stop, nothing more is taken in; what is old comes before the end of waiting for it.
            biased;
            () = stopping.stopped() => break,
            pulled = next => pulled,
            () = barrier.wait_until_done(&probe, &lanes.room) => {
                lanes.dispatch_all(barrier.finish()).await;
                continue;
            }
        };
        match pulled {
            Ok((pulled, room)) => {
                let pending_message = lanes.pending_message(pulled, Some(room));
                lanes
                    .dispatch_all(
                        barrier.admit(pending_message, lanes.room.available_permits() == 0),
                    )
                    .await;
            }
            Err(error) => {
                tracing::warn!("worker {} pulls again soon: {error:#}", lanes.worker.name);
                if stopping.wait(Duration::from_secs(1)).await {
                    break;
                }
            }
        }
    }
    while let Some(pulled) = pull.drain().await {
        // What is held may have taken all the room, and gives none back before the end.
        let room = Arc::clone(&lanes.room).try_acquire_owned().ok();
        lanes
            .dispatch_all(barrier.admit(lanes.pending_message(pulled, room), false))
            .await;
    }
    barrier.finish()
}

/// The lanes of one worker and what feeds them.
struct Lanes {
    worker: Arc<Worker>,
    senders: Vec<mpsc::Sender<PendingMessage>>,
    tasks: Vec<JoinHandle<()>>,
    room: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    version: u32,
    /// For what was put back.
    redrive_room: Arc<Semaphore>,
    store: Arc<dyn Store>,
    in_flight: InFlightMessages,
    ticker: JoinHandle<()>,
}

impl Lanes {
    fn start(
        delivery: &Delivery,
        relay: &RelayHandle,
        counters: &Arc<WorkerCounters>,
        stop: &Stop,
    ) -> Self {
        let worker = Arc::clone(&delivery.worker);
        let capacity = capacity(&worker);
        let mut senders = Vec::new();
        let mut tasks = Vec::new();
        let concurrency_limit = Arc::new(ConcurrencyLimit::new(worker.concurrency as usize));
        for _ in 0..worker.concurrency {
            // Room is counted over all lanes, so dealing to one lane never waits behind another.
            let (sender, receiver) = mpsc::channel(capacity + redrive::CAPACITY);
            let lane = Lane {
                delivery: delivery.clone(),
                relay: relay.clone(),
                concurrency_limit: Arc::clone(&concurrency_limit),
                counters: Arc::clone(counters),
                stopping: stop.stopping(),
            };
            senders.push(sender);
            tasks.push(tokio::spawn(lane.run(receiver)));
        }
        let in_flight = InFlightMessages::default();
        let ticker = tokio::spawn(in_flight.clone().send_progress_acks(worker.ack_wait / 3));
        let (room, metrics) = (
            Arc::new(Semaphore::new(capacity)),
            Arc::clone(&delivery.metrics),
        );
        let redrive_room = Arc::new(Semaphore::new(redrive::CAPACITY));
        let store = Arc::clone(&delivery.store);
        let version = delivery.version;
        Lanes {
            worker,
            senders,
            tasks,
            room,
            metrics,
            version,
            redrive_room,
            store,
            in_flight,
            ticker,
        }
    }

    fn pending_message(
        &self,
        pulled: DeliveredMessage,
        room: Option<OwnedSemaphorePermit>,
    ) -> PendingMessage {
        fault::point(fault::AFTER_FETCH);
        self.metrics.consumed(&self.worker.name);
        let message = Arc::new(pulled.message);
        let key = self
            .worker
            .ordering_key
            .as_ref()
            .and_then(|key| key.key_of(&message));
        let in_flight = self.in_flight.enter(pulled.receipt.progress());
        PendingMessage {
            message,
            key,
            unusable: pulled.unusable,
            delivered: pulled.delivered,
            receipt: pulled.receipt,
            _in_flight: in_flight,
            _room: room,
        }
    }

    async fn dispatch_all(&self, pending_messages: Vec<PendingMessage>) {
        for pending_message in pending_messages {
            let lane = self.lane_of(
                pending_message
                    .key
                    .as_deref()
                    .unwrap_or(&pending_message.message.event_id),
            );
            if let Some(sender) = self.senders.get(lane) {
                // A lane that is gone has panicked; the message is redelivered.
                let _ = sender.send(pending_message).await;
            }
        }
    }

    /// Same key, same lane. Without a key the event id serves: copies of one message then never wait for each other.
    fn lane_of(&self, key: &str) -> usize {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        usize::try_from(hasher.finish() % self.senders.len().max(1) as u64).unwrap_or_default()
    }

    /// Lets the lanes settle what they have.
    async fn drain(self) {
        drop(self.senders);
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(
                    "a lane of worker {} did not end properly: {error}",
                    self.worker.name
                );
            }
        }
        self.ticker.abort();
    }
}
