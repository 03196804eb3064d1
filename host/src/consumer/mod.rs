//! A running worker: pulls from its stream, dispatches messages to lanes by key, and drains on
//! shutdown.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::bus::{Bus, DeliveredMessage, Probe, PullConsumer, Subscription};
use crate::config::manifest::{OnFailure, Worker};
use crate::delivery::Delivery;
use crate::delivery::concurrency_limit::ConcurrencyLimit;
use crate::drain::{Stop, Stopping};
use crate::fault;
use crate::metrics::Metrics;
use crate::model::verdict::Verdict;
use crate::relay::RelayHandle;
use crate::store::Store;

mod held_keys;
mod in_flight;
mod lane;
mod paused;
mod queue;
mod redelivery;
mod redrive;

pub use held_keys::HeldKey;
use held_keys::HeldKeys;
use in_flight::InFlightMessages;
pub use lane::VERDICT_LOG;
use lane::{Lane, PendingMessage, nack_all};
pub use paused::PausedWorker;
use redelivery::RedeliveryBarrier;

/// Maximum number of queued batches for each lane, besides the running one.
const QUEUED_BATCHES_MAX: usize = 1;

/// Maximum number of additional batches for a worker that holds keys.
const HELD_BATCHES_MAX: usize = 3;

/// How often a worker checks whether the server has registered its subscription.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// Counters of a worker since its start in this host.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    pub done: AtomicU64,
    pub duplicates: AtomicU64,
    pub retries: AtomicU64,
    pub dead: AtomicU64,
}

impl WorkerCounters {
    /// Counts a verdict.
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

/// The lanes of a worker in a host, for its report.
#[derive(
    Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct LaneReport {
    /// The lanes of the manifest.
    pub lanes: usize,
    /// How many of them may run a transaction at the same time: fewer after conflicts.
    pub limit: usize,
    /// How many of them do.
    pub busy: usize,
    /// How many keys are held.
    pub held: usize,
    /// The keys that are held for the longest time, at most 10.
    pub held_keys: Vec<HeldKey>,
}

/// A worker that runs in this host.
pub struct RunningWorker {
    pub worker: Arc<Worker>,
    pub version: u32,
    pub digest: String,
    pub counters: Arc<WorkerCounters>,
    delivery: Delivery,
    probe: Probe,
    in_flight: InFlightMessages,
    concurrency_limit: Arc<ConcurrencyLimit>,
    held_keys: HeldKeys,
    is_subscribed: Arc<AtomicBool>,
    stop: Stop,
    pulling: JoinHandle<()>,
}

impl RunningWorker {
    /// Subscribes and starts the lanes. `counters` are new, or those from before a pause.
    ///
    /// # Errors
    /// The worker has no stream, or the broker refuses or does not answer.
    pub async fn start(
        delivery: Delivery,
        digest: String,
        counters: Arc<WorkerCounters>,
        bus: &Bus,
        relay: RelayHandle,
    ) -> Result<Self> {
        let worker = Arc::clone(&delivery.worker);

        // Subscribe to the stream and to the redrives.
        let stream = worker
            .stream
            .as_deref()
            .context("start a worker without a stream")?;
        let version = delivery.version;
        let pull = bus
            .subscribe(&with_version(subscription(&worker, stream), version))
            .await
            .with_context(|| format!("subscribe worker {} to stream {}", worker.name, stream))?;
        let redriven = bus
            .subscribe(&redrive::subscription(&worker))
            .await
            .with_context(|| format!("subscribe worker {} to its redrives", worker.name))?;

        // Watch the subscription.
        let is_subscribed = Arc::new(AtomicBool::new(false));
        let stop = Stop::new();
        let probe = pull.probe();
        tokio::spawn(wait_until_subscribed(
            probe.clone(),
            Arc::clone(&is_subscribed),
            stop.stopping(),
        ));

        // A worker that holds keys waits for redeliveries first.
        let barrier = match worker.on_failure {
            OnFailure::Skip => RedeliveryBarrier::disabled(),
            OnFailure::Hold => {
                let backlog = probe
                    .backlog()
                    .await
                    .context("read the backlog of the consumer")?;
                RedeliveryBarrier::begin(backlog, worker.ack_wait, capacity(&worker))
            }
        };

        // Start the lanes and pull.
        let lanes = Lanes::start(&delivery, &relay, &counters, &stop);
        let in_flight = lanes.in_flight.clone();
        let concurrency_limit = Arc::clone(&lanes.concurrency_limit);
        let held_keys = lanes.held_keys.clone();
        let pulling = tokio::spawn(run(pull, redriven, lanes, barrier, stop.stopping()));
        Ok(RunningWorker {
            worker,
            version,
            digest,
            counters,
            delivery,
            probe,
            in_flight,
            concurrency_limit,
            held_keys,
            is_subscribed,
            stop,
            pulling,
        })
    }

    /// Whether the server has registered the subscription of this worker.
    pub fn is_subscribed(&self) -> bool {
        self.is_subscribed.load(Ordering::Relaxed)
    }

    /// A probe of its consumer.
    pub fn probe(&self) -> Probe {
        self.probe.clone()
    }

    /// Number of messages that this host holds for the worker.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Its lanes, and the keys that they hold.
    pub fn lanes(&self) -> LaneReport {
        let (limit, busy) = self.concurrency_limit.usage();
        let (held, held_keys) = self.held_keys.report();
        LaneReport {
            lanes: self.worker.concurrency as usize,
            limit,
            busy,
            held,
            held_keys,
        }
    }

    /// Stops pulling and returns when the lanes have settled their messages.
    pub async fn drain(self) {
        self.stop.now();
        if let Err(error) = self.pulling.await {
            tracing::error!(worker = self.worker.name, error = %error, "worker task failed");
        }
    }
}

/// The subscriptions of a worker: to its stream, and to its redrives.
pub fn subscriptions(worker: &Worker, stream: &str) -> [Subscription; 2] {
    [subscription(worker, stream), redrive::subscription(worker)]
}

/// Subscription of a worker to its stream.
pub fn subscription(worker: &Worker, stream: &str) -> Subscription {
    Subscription {
        stream: stream.to_owned(),
        durable: worker.durable(),
        subjects: worker.subjects.clone(),
        ack_wait: worker.ack_wait,
        // Capacity for several hosts.
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

/// Maximum number of messages that one host holds for a worker.
fn capacity(worker: &Worker) -> usize {
    let batches = match worker.on_failure {
        OnFailure::Skip => 1 + QUEUED_BATCHES_MAX,
        OnFailure::Hold => 1 + QUEUED_BATCHES_MAX + HELD_BATCHES_MAX,
    };
    worker.concurrency as usize * worker.batch as usize * batches
}

/// Sets `is_subscribed` once the server has registered the subscription.
async fn wait_until_subscribed(probe: Probe, is_subscribed: Arc<AtomicBool>, stopping: Stopping) {
    loop {
        match probe.is_seen_by_server().await {
            Ok(true) => return is_subscribed.store(true, Ordering::Relaxed),
            Ok(false) => {}
            Err(error) => tracing::debug!(
                error = format!("{error:#}"),
                "failed to check the subscription, retrying"
            ),
        }
        if stopping.wait(PROBE_INTERVAL).await {
            return;
        }
    }
}

/// Handles new and redriven messages until the stop signal, and then lets the lanes settle their
/// messages.
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

/// Pulls as long as the host has capacity, and dispatches to the lanes. Returns the messages that
/// were not dispatched.
async fn pull_loop(
    mut pull: PullConsumer,
    lanes: &Lanes,
    mut barrier: RedeliveryBarrier<PendingMessage>,
    mut stopping: Stopping,
) -> Vec<PendingMessage> {
    let probe = pull.probe();
    loop {
        let next = async {
            let permit = Arc::clone(&lanes.permits)
                .acquire_owned()
                .await
                .context("wait for capacity")?;
            let most = barrier
                .pull_limit(lanes.permits.available_permits() + 1)
                .await;
            let pulled = pull.next(most).await?;
            anyhow::Ok((pulled, permit))
        };
        let pulled = tokio::select! {
            // After the stop signal no more messages are pulled. Redelivered messages have priority
            // over the end of the wait for them.
            biased;
            () = stopping.stopped() => break,
            pulled = next => pulled,
            () = barrier.wait_until_done(&probe, &lanes.permits) => {
                lanes.dispatch_all(barrier.finish()).await;
                continue;
            }
        };
        match pulled {
            Ok((pulled, permit)) => {
                let pending_message = lanes.pending_message(pulled, Some(permit));
                lanes
                    .dispatch_all(
                        barrier.admit(pending_message, lanes.permits.available_permits() == 0),
                    )
                    .await;
            }
            Err(error) => {
                tracing::warn!(
                    worker = lanes.worker.name,
                    error = format!("{error:#}"),
                    "failed to pull messages, retrying"
                );
                if stopping.wait(Duration::from_secs(1)).await {
                    break;
                }
            }
        }
    }

    // Dispatch the messages that arrived before the stop.
    while let Some(pulled) = pull.drain().await {
        // Held messages may use the whole capacity, and release none before the end.
        let permit = Arc::clone(&lanes.permits).try_acquire_owned().ok();
        lanes
            .dispatch_all(barrier.admit(lanes.pending_message(pulled, permit), false))
            .await;
    }
    barrier.finish()
}

/// The lanes of one worker and their shared state.
struct Lanes {
    worker: Arc<Worker>,
    senders: Vec<mpsc::Sender<PendingMessage>>,
    tasks: Vec<JoinHandle<()>>,
    /// Capacity for messages of the stream.
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    version: u32,
    /// Capacity for redriven messages.
    redrive_permits: Arc<Semaphore>,
    store: Arc<Store>,
    in_flight: InFlightMessages,
    concurrency_limit: Arc<ConcurrencyLimit>,
    held_keys: HeldKeys,
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
        let held_keys = HeldKeys::default();
        for _ in 0..worker.concurrency {
            // Capacity is counted over all lanes, so sending to one lane never blocks.
            let (sender, receiver) = mpsc::channel(capacity + redrive::CAPACITY);
            let lane = Lane {
                delivery: delivery.clone(),
                relay: relay.clone(),
                concurrency_limit: Arc::clone(&concurrency_limit),
                held_keys: held_keys.clone(),
                counters: Arc::clone(counters),
                stopping: stop.stopping(),
            };
            senders.push(sender);
            tasks.push(tokio::spawn(lane.run(receiver)));
        }
        let in_flight = InFlightMessages::default();
        let ticker = tokio::spawn(in_flight.clone().send_progress_acks(worker.ack_wait / 3));
        let (permits, metrics) = (
            Arc::new(Semaphore::new(capacity)),
            Arc::clone(&delivery.metrics),
        );
        let redrive_permits = Arc::new(Semaphore::new(redrive::CAPACITY));
        let store = Arc::clone(&delivery.store);
        let version = delivery.version;
        Lanes {
            worker,
            senders,
            tasks,
            permits,
            metrics,
            version,
            redrive_permits,
            store,
            in_flight,
            concurrency_limit,
            held_keys,
            ticker,
        }
    }

    fn pending_message(
        &self,
        pulled: DeliveredMessage,
        permit: Option<OwnedSemaphorePermit>,
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
            _permit: permit,
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
                // A closed lane has panicked. The message will be redelivered.
                let _ = sender.send(pending_message).await;
            }
        }
    }

    /// The lane of a key. For messages without a key it is the event id, so copies of a message
    /// share a lane and never wait for each other.
    fn lane_of(&self, key: &str) -> usize {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        usize::try_from(hasher.finish() % self.senders.len().max(1) as u64).unwrap_or_default()
    }

    /// Waits until the lanes have settled their messages.
    async fn drain(self) {
        drop(self.senders);
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(worker = self.worker.name, error = %error, "lane task failed");
            }
        }
        self.ticker.abort();
    }
}
