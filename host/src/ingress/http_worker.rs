//! A running version of an HTTP worker. Its requests share transactions, as messages do.
//!
//! A lane takes the requests that wait and handles them in one transaction. It never waits for
//! more, so a request that is alone is handled at once. Requests gather while all lanes are busy.
//! Requests that only read have transactions of their own.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, oneshot, watch};

use crate::delivery::batch_size::{AdaptiveBatchSize, REQUESTS_TIME};
use crate::delivery::concurrency_limit::ConcurrencyLimit;
use crate::delivery::request::{IncomingRequest, RequestOutcome};
use crate::delivery::request_group::{GroupResult, PendingRequest};
use crate::delivery::{Delivery, Savepoints};
use crate::model::sql::Dialect;
use crate::store::StoreError;

/// How long a request waits to be handled.
const CAPACITY_TIMEOUT: Duration = Duration::from_secs(10);

/// After this time in the queue, a request opens one more lane. Twice the time of a group, so that
/// requests keep gathering while lanes make progress.
const LANE_TIMEOUT: Duration = REQUESTS_TIME.saturating_mul(2);

/// How long the requests of a group wait for one of them at least. A handler that takes far longer
/// than usual runs alone; on a busy machine, each one takes long now and then.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

/// Handlers of which no more fit in a group are slow: each request gets a lane at once.
const SLOW_GROUP: usize = 2;

/// A running version of an HTTP worker.
pub struct HttpWorker {
    pub delivery: Delivery,
    pub digest: String,
    /// One permit per transaction at a time.
    permits: Semaphore,
    /// Fewer lanes while their transactions conflict.
    lane_limit: ConcurrencyLimit,
    processors: usize,
    queue: Mutex<RequestQueue>,
    in_flight: watch::Sender<usize>,
    is_paused: AtomicBool,
}

struct RequestQueue {
    waiting: VecDeque<QueuedRequest>,
    /// How many requests were queued so far.
    queued: u64,
    lanes: usize,
    group_size: AdaptiveBatchSize,
}

struct QueuedRequest {
    /// Its position among all requests so far; 0 for one that a lane returned.
    number: u64,
    request: PendingRequest,
    since: Instant,
    /// Whether it runs in a transaction of its own, because it takes long.
    is_slow: bool,
}

/// The requests of the next transaction.
struct Group {
    requests: Vec<PendingRequest>,
    savepoints: Savepoints,
    /// How long they wait for one of them.
    patience: Duration,
    /// Whether it is one request that takes long.
    is_slow: bool,
}

/// Counts a request until dropped.
pub struct InFlight<'w>(&'w HttpWorker);

/// An open lane, until dropped.
struct OpenLane(Arc<HttpWorker>);

impl HttpWorker {
    pub fn new(delivery: Delivery, digest: String) -> Self {
        let concurrency = delivery.worker.concurrency as usize;
        let group_size = AdaptiveBatchSize::new(delivery.worker.batch as usize, REQUESTS_TIME);
        HttpWorker {
            delivery,
            digest,
            permits: Semaphore::new(concurrency),
            lane_limit: ConcurrencyLimit::new(concurrency),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            queue: Mutex::new(RequestQueue {
                waiting: VecDeque::new(),
                queued: 0,
                lanes: 0,
                group_size,
            }),
            in_flight: watch::Sender::new(0),
            is_paused: AtomicBool::new(false),
        }
    }

    /// Pauses or resumes it. A request that entered before is handled.
    pub fn set_paused(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::SeqCst);
    }

    /// Whether it handles no requests.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::SeqCst)
    }

    /// Counts a request as being handled.
    pub fn enter(&self) -> InFlight<'_> {
        self.in_flight.send_modify(|count| *count += 1);
        InFlight(self)
    }

    /// How many requests are being handled.
    pub fn in_flight(&self) -> usize {
        *self.in_flight.borrow()
    }

    /// Waits for the requests in flight. Later requests go to another version.
    pub async fn drain(&self) {
        let mut in_flight = self.in_flight.subscribe();
        let _ = in_flight.wait_for(|count| *count == 0).await;
    }

    /// Handles a request. Returns `None` if it could not begin in time.
    ///
    /// # Errors
    /// Nothing took effect.
    pub async fn handle(
        self: &Arc<Self>,
        incoming: &Arc<IncomingRequest>,
    ) -> Option<Result<RequestOutcome, StoreError>> {
        if incoming.request.is_safe() {
            let permit = tokio::time::timeout(CAPACITY_TIMEOUT, self.permits.acquire());
            let _permit = permit.await.ok()?;
            return Some(self.delivery.handle(incoming).await);
        }

        let (sender, mut outcome) = oneshot::channel();
        let number = self.push(PendingRequest {
            incoming: Arc::clone(incoming),
            outcome: sender,
        });
        self.open_lane(self.usual_lanes());
        tokio::select! {
            outcome = &mut outcome => return Some(received(outcome)),
            () = tokio::time::sleep(LANE_TIMEOUT) => self.open_lane(self.max_lanes()),
        }
        tokio::select! {
            outcome = &mut outcome => return Some(received(outcome)),
            () = tokio::time::sleep(CAPACITY_TIMEOUT) => {}
        }
        match self.remove(number) {
            true => None,
            false => Some(received(outcome.await)),
        }
    }

    /// Handles groups of requests until none waits.
    async fn run_lane(self: Arc<Self>) {
        let lane = OpenLane(self);
        let worker = &lane.0;
        loop {
            // Take the requests that wait.
            let limit = worker.lane_limit.acquire().await;
            let _permit = worker.permits.acquire().await;
            let Some(group) = worker.take_group() else {
                return;
            };
            // The limit is for groups, which a slow request must not hold up.
            let limit = Some(limit).filter(|_| !group.is_slow);

            // Handle them.
            let handled =
                worker
                    .delivery
                    .handle_group(group.requests, group.savepoints, group.patience);
            let result = handled.await;
            worker.record(&result);
            worker.lane_limit.record_conflicts(result.conflicts);
            drop(limit);
            worker.requeue(result);
        }
    }

    fn queue(&self) -> MutexGuard<'_, RequestQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, request: PendingRequest) -> u64 {
        let mut queue = self.queue();
        queue.queued += 1;
        let number = queue.queued;
        queue.waiting.push_back(QueuedRequest {
            number,
            request,
            since: Instant::now(),
            is_slow: false,
        });
        number
    }

    /// Puts the requests that a slow one held up back to the front, and that one to the end.
    fn requeue(&self, result: GroupResult) {
        let returned = |request, is_slow| QueuedRequest {
            number: 0,
            request,
            since: Instant::now(),
            is_slow,
        };
        let mut queue = self.queue();
        for request in result.left.into_iter().rev() {
            queue.waiting.push_front(returned(request, false));
        }
        let slow = result.slow.into_iter();
        queue
            .waiting
            .extend(slow.map(|request| returned(request, true)));
    }

    /// Takes a request out of the queue. Returns false if a lane has taken it.
    fn remove(&self, number: u64) -> bool {
        let mut queue = self.queue();
        let before = queue.waiting.len();
        queue.waiting.retain(|queued| queued.number != number);
        queue.waiting.len() < before
    }

    /// The next requests to handle in one transaction.
    fn take_group(self: &Arc<Self>) -> Option<Group> {
        let mut queue = self.queue();
        let first = queue.waiting.front()?;
        let is_slow = first.is_slow;
        // The more requests wait, the more a larger group shortens their wait.
        let max = match is_slow {
            true => 1,
            false => queue.group_size.within(first.since.elapsed()),
        };
        let same = queue
            .waiting
            .iter()
            .take_while(|queued| queued.is_slow == is_slow);
        let size = same.take(max).count();
        let requests = queue.waiting.drain(..size).map(|queued| queued.request);
        let requests = requests.collect();
        let savepoints = queue.group_size.savepoints();
        let patience = PATIENCE_MIN.max(queue.group_size.expected() * 20);
        drop(queue);
        // The requests behind a slow one go to another lane.
        if is_slow {
            self.open_lane(self.max_lanes());
        }
        Some(Group {
            requests,
            savepoints,
            patience,
            is_slow,
        })
    }

    /// Adapts the size of groups.
    fn record(&self, result: &GroupResult) {
        let handlers = &result.handlers;
        let mut queue = self.queue();
        queue
            .group_size
            .record_reruns(result.reruns, handlers.undone);
        if handlers.calls > 0 {
            queue.group_size.record_time(handlers.calls, handlers.time);
        }
    }

    /// Opens a lane if requests wait and fewer than `max` are open.
    fn open_lane(self: &Arc<Self>, max: usize) {
        let mut queue = self.queue();
        if !queue.waiting.is_empty() && queue.lanes < max {
            queue.lanes += 1;
            tokio::spawn(Arc::clone(self).run_lane());
        }
    }

    fn max_lanes(&self) -> usize {
        match self.delivery.store.dialect() {
            // There is one writer at a time.
            Dialect::Sqlite => 1,
            Dialect::Postgres => self.delivery.worker.concurrency as usize,
        }
    }

    /// Quick handlers use a processor each: with more lanes than processors, groups are smaller for
    /// no gain. One of two lanes runs handlers while the other one commits.
    fn usual_lanes(&self) -> usize {
        if self.queue().group_size.current() <= SLOW_GROUP {
            return self.max_lanes();
        }
        self.processors.max(2).min(self.max_lanes())
    }
}

/// The outcome from a lane.
fn received(
    outcome: Result<Result<RequestOutcome, StoreError>, oneshot::error::RecvError>,
) -> Result<RequestOutcome, StoreError> {
    let ended = |_| Err(StoreError::Unavailable(anyhow::anyhow!("the lane ended")));
    outcome.unwrap_or_else(ended)
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

impl Drop for OpenLane {
    fn drop(&mut self) {
        self.0.queue().lanes -= 1;
        // A request may have come since the queue was found empty.
        self.0.open_lane(self.0.usual_lanes());
    }
}
