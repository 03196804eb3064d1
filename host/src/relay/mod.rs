//! The relay: publishes committed outputs.
//!
//! Usually committed outputs come from memory. The poller finds outputs that a crash, an outage or
//! a delay left in the outbox. It selects rows that are due and unpublished, so there is no cursor
//! that could skip a row. Rows are leased in the database, so that two hosts do not publish the
//! same row. A row counts as published only after the ack of the stream.
//!
//! One loop runs publishes, database writes and polls concurrently, with one output of each key in
//! flight.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::{mpsc, watch};
use tracing::Instrument;

use crate::bus::{
    Bus, OutgoingMessage, PublishAck, PublishError, PublishResult, StreamInfo, stream_for_subject,
};
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Published, RelayMode, Store, StoreError, Unpublished};
use crate::traces::Traces;

mod breakers;
mod duplicates;
mod key_queues;
mod poller;
mod recorder;
mod recovered;
mod repair;
mod state;
mod subjects;
mod trace;
mod wal;

use breakers::Breakers;
use duplicates::Duplicates;
use key_queues::{KeyQueues, LeasedOutput};
pub use poller::DUPLICATE_WINDOW_MIN;
use poller::OutputBatch;
use recorder::Recorder;
pub use repair::{Repair, is_lost};
pub use state::{BreakerState, RefusedSubject, RelayReport, RelayState};
use subjects::{Refusal, SubjectBreakers};
use trace::RunningPublish;
pub use wal::{RelayModeController, WalChannels, WalRelay};
use wal::{WalAction, WalOutputs};

/// Maximum number of queued batches of outputs. Lanes wait when the queue is full, so that effects
/// and publishing do not drift apart.
const HAND_OVER_MAX: usize = 64;

/// Maximum number of outputs in memory.
const OUTPUTS_MAX: usize = 4_000;

/// Maximum number of outputs in flight.
const IN_FLIGHT_MAX: usize = 1_000;

/// Maximum number of outputs of a poll.
const POLL_BATCH_MAX: usize = 1_000;

/// Interval of the poller. Delays of outputs are honoured with this precision.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Minimum interval between polls while other outputs wait for published ones.
const POLL_INTERVAL_MIN: Duration = Duration::from_millis(20);

/// How long publishing waits for the stream check after a new connection. After that it continues
/// without the check.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval at which the result of that check is polled.
const REPAIR_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Maximum age of the list of streams that maps outputs to streams, normally and after an unknown
/// stream.
const STREAMS_MAX_AGE: Duration = Duration::from_secs(10);
const STREAMS_MAX_AGE_ON_MISS: Duration = Duration::from_secs(1);

/// Delay before outputs are tried again while the relay is suspended, because database and NATS
/// disagree.
const SUSPENDED_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Delay after the first failure of an output. It doubles with each further failure.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(250);

/// Maximum of that delay.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(15);

/// Handle of the relay for lanes. Cheap to clone.
#[derive(Clone)]
pub struct RelayHandle {
    store: Arc<Store>,
    state: Arc<RelayState>,
    sender: mpsc::Sender<HandedOverOutputs>,
    /// False while the WAL reader is far behind.
    accepting: watch::Receiver<bool>,
}

/// Outputs that lanes of this host committed. Their leases began at `since` or later.
struct HandedOverOutputs {
    rows: Vec<OutboxRow>,
    /// All outputs that belong to a group, with its number.
    group_members: Vec<(i64, i64)>,
    /// Outputs that are already on their streams.
    already_published: Vec<Published>,
    since: Instant,
}

impl RelayHandle {
    /// Hands over committed outputs whose leases began at `since` or later. Waits while the relay
    /// is behind. If the relay has ended, the poller of another host finds them.
    pub async fn hand_over(&self, rows: Vec<OutboxRow>, since: Instant) {
        let _ = self.accepting.clone().wait_for(|is_open| *is_open).await;
        if rows.is_empty() {
            return;
        }
        let group_members = recorder::members(&rows);
        match recovered::split(&self.store, &self.state, rows).await {
            Ok((rows, already_published)) => drop(
                self.sender
                    .send(HandedOverOutputs {
                        rows,
                        group_members,
                        already_published,
                        since,
                    })
                    .await,
            ),
            // The poller finds them once their lease has expired.
            Err(error) => tracing::debug!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "failed to hand over outputs, leaving them to the poller"
            ),
        }
    }
}

/// The task that publishes outputs.
pub struct Relay {
    store: Arc<Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    handed_over: mpsc::Receiver<HandedOverOutputs>,
    from_wal: mpsc::Receiver<WalOutputs>,
    key_queues: KeyQueues,
    recorder: Recorder,
    streams: Arc<Vec<StreamInfo>>,
    /// Whether an output goes to a stream that is not in `streams`.
    has_unknown_stream: bool,
    breakers: Breakers,
    subjects: SubjectBreakers,
    duplicates: Duplicates,
    /// The highest acked sequence of each stream.
    highest_sequences: HashMap<String, u64>,
    /// Time from which on the order in memory is valid.
    order_since: Option<Instant>,
    /// Number of the current connection for publishing.
    connection: watch::Receiver<u64>,
    /// Start of the wait for the stream check.
    repair_wait_since: Option<Instant>,
    /// Whether an output with waiters was published. A poll right after its record finds the
    /// waiters sooner than the next tick.
    has_waiters: bool,
    traces: Traces,
}

/// An output with the result of its publish.
struct FinishedPublish {
    output: LeasedOutput,
    /// Name of its stream, if known.
    stream: Option<String>,
    /// The highest sequence of that stream at the time of sending.
    highest_sequence: u64,
    result: PublishResult,
    /// Its span, if its trace is recorded.
    trace: Option<RunningPublish>,
}

type InFlightPublishes = FuturesUnordered<BoxFuture<'static, FinishedPublish>>;

impl Relay {
    /// Creates the relay, its handle for lanes, and the channels of the WAL reader.
    pub fn new(
        store: Arc<Store>,
        bus: Bus,
        metrics: Arc<Metrics>,
        state: Arc<RelayState>,
        traces: Traces,
    ) -> (Self, RelayHandle, WalChannels) {
        let (sender, handed_over) = mpsc::channel(HAND_OVER_MAX);
        let (to_relay, from_wal) = mpsc::channel(1);
        let (outcome_sender, outcomes) = mpsc::unbounded_channel();
        let (accepting_sender, accepting) = watch::channel(true);
        let relay_handle = RelayHandle {
            store: Arc::clone(&store),
            state: Arc::clone(&state),
            sender,
            accepting,
        };
        let relay = Relay {
            recorder: Recorder::new(Arc::clone(&store), outcome_sender),
            connection: bus.publish_connection(),
            duplicates: Duplicates::new(bus.clone()),
            store,
            bus,
            metrics,
            breakers: Breakers::new(Arc::clone(&state)),
            subjects: SubjectBreakers::new(Arc::clone(&state), Instant::now()),
            state,
            handed_over,
            from_wal,
            key_queues: KeyQueues::default(),
            streams: Arc::default(),
            has_unknown_stream: false,
            highest_sequences: HashMap::new(),
            order_since: None,
            repair_wait_since: None,
            has_waiters: false,
            traces,
        };
        (
            relay,
            relay_handle,
            WalChannels {
                to_relay,
                outcomes,
                accepting: accepting_sender,
            },
        )
    }

    /// Runs until all lanes and the WAL reader have ended and their outputs are published. After
    /// `stopping` there are no more polls. Unpublished outputs stay in the outbox for the next
    /// host.
    pub async fn run(mut self, stopping: Stopping) {
        let mut in_flight = InFlightPublishes::new();
        let mut polling: Option<BoxFuture<'static, Result<OutputBatch, StoreError>>> = None;
        let (mut polled_at, mut poll_at) = (Instant::now(), Instant::now());
        let mut poll_once_written = false;
        let (mut has_lanes_closed, mut has_reader_closed) = (false, false);
        loop {
            // Send, and record outcomes.
            self.send(&mut in_flight).await;
            if self.recorder.start_write() {
                poll_once_written = std::mem::take(&mut self.has_waiters);
            }
            self.state
                .has_unwritten
                .store(!self.recorder.is_empty(), Ordering::Relaxed);

            // End when everything is recorded.
            if has_lanes_closed
                && has_reader_closed
                && self.key_queues.is_empty()
                && self.recorder.is_empty()
                && polling.is_none()
            {
                return;
            }

            // Wait for the next event.
            let waits =
                self.waits_for_repair() || (!self.has_lease() && !self.key_queues.is_empty());
            let may_poll = polling.is_none() && !stopping.is_stopping();
            // Not biased, so that no branch blocks another.
            tokio::select! {
                Some(publish) = in_flight.next(), if !in_flight.is_empty() => {
                    self.on_publish_result(publish);
                    while let Some(Some(publish)) = in_flight.next().now_or_never() {
                        self.on_publish_result(publish);
                    }
                }
                () = self.recorder.written(), if self.recorder.is_writing() => {
                    if std::mem::take(&mut poll_once_written) {
                        poll_at = poll_at.min(polled_at + POLL_INTERVAL_MIN);
                    }
                }
                leased = self.handed_over.recv(), if !has_lanes_closed && self.key_queues.len() < OUTPUTS_MAX => match leased {
                    Some(HandedOverOutputs { rows, group_members, already_published, since }) => {
                        self.recorder.track_groups(&group_members);
                        self.take_published(already_published);
                        self.take(rows, since);
                    }
                    None => has_lanes_closed = true,
                },
                from_wal = self.from_wal.recv(), if !has_reader_closed && self.key_queues.len() < OUTPUTS_MAX => match from_wal {
                    Some(from_wal) => self.take_from_wal(from_wal),
                    None => has_reader_closed = true,
                },
                polled = finished(&mut polling), if polling.is_some() => {
                    let is_full = self.take_polled(polled);
                    poll_at = Instant::now()
                        + match is_full {
                            _ if self.state.is_suspended() => SUSPENDED_RETRY_DELAY,
                            true => Duration::ZERO,
                            false => POLL_INTERVAL,
                        };
                }
                () = tokio::time::sleep(REPAIR_POLL_INTERVAL), if waits => {}
                () = tokio::time::sleep_until(poll_at.into()), if may_poll => {
                    polling = self.begin_poll();
                    polled_at = Instant::now();
                    poll_at = polled_at + POLL_INTERVAL;
                }
                else => return,
            }
        }
    }

    /// Takes outputs into memory. Those that are blocked by outputs elsewhere are released at once.
    fn take(&mut self, rows: Vec<OutboxRow>, since: Instant) {
        self.apply_order_change();
        if self.is_outdated(since) {
            return self
                .recorder
                .unpublished(rows.iter().map(|row| (row.seq, retry_now())));
        }
        let blocked = self.key_queues.take(rows, since);
        self.recorder.unpublished(blocked);
    }

    /// Records outputs that are already on their streams.
    fn take_published(&mut self, already_published: Vec<Published>) {
        for published in already_published {
            self.key_queues.remember_published(published.seq);
            self.has_waiters = true;
            self.recorder.published(published);
        }
    }

    /// Takes outputs from the WAL. They are in the order of their commits. Their blockers were
    /// read, except outputs that failed since then.
    fn take_from_wal(&mut self, from_wal: WalOutputs) {
        self.apply_order_change();
        self.recorder
            .on_recorded(from_wal.recorded, from_wal.is_first);
        let is_outdated = self.is_outdated(from_wal.since);
        for (row, action) in from_wal.rows {
            if self.key_queues.contains(row.seq) {
                // An earlier reader of this host received it, and the new one gets its outcome.
                self.recorder.track(row.seq, key_queues::key(&row));
                continue;
            }
            let blocked_by = self.recorder.track(row.seq, key_queues::key(&row));
            match (action, blocked_by) {
                (WalAction::Published(published), _) => self.recorder.published(published),
                (WalAction::Poll(outcome), _) => self.recorder.unpublished([(row.seq, outcome)]),
                (WalAction::Publish, Some(before)) => {
                    self.recorder
                        .unpublished([(row.seq, key_queues::wait_for_output(row.seq, before))]);
                }
                (WalAction::Publish, None) if is_outdated => {
                    self.recorder.unpublished([(row.seq, retry_now())])
                }
                (WalAction::Publish, None) => drop(self.key_queues.take(vec![row], from_wal.since)),
            }
        }
    }

    /// Whether publishing has to wait for the stream check. After a new connection a stream may
    /// have lost its tail. Republished outputs precede new ones, so that keys keep their order.
    fn waits_for_repair(&mut self) -> bool {
        let connection = *self.connection.borrow();
        // Without a connection outputs fail at once and are released.
        if !self.bus.can_publish() || self.state.checked_connection() >= connection {
            self.repair_wait_since = None;
            return false;
        }
        let now = Instant::now();
        let since = *self.repair_wait_since.get_or_insert(now);
        now.duration_since(since) < REPAIR_TIMEOUT
    }

    /// Releases all outputs after a stream has lost messages, so that the order is read from the
    /// database again. After a new connection another host may have detected the loss.
    fn apply_order_change(&mut self) {
        let order_since = self.state.order_since();
        if std::mem::replace(&mut self.order_since, order_since) != order_since {
            self.recorder.unpublished(
                self.key_queues
                    .reset()
                    .into_iter()
                    .map(|seq| (seq, retry_now())),
            );
        }
    }

    /// Whether blockers that were read at this time may be outdated.
    fn is_outdated(&self, since: Instant) -> bool {
        Some(since) < self.order_since
    }

    /// Sends the outputs that may be sent now.
    async fn send(&mut self, in_flight: &mut InFlightPublishes) {
        let mut has_sent = false;
        // If the connection changes in the meantime, these outputs are not sent over the new one.
        let connection = *self.connection.borrow();
        if self.waits_for_repair() {
            // The check covers only recorded outputs.
            self.recorder.dissolve_groups();
            return;
        }
        self.apply_order_change();
        while in_flight.len() < IN_FLIGHT_MAX
            && let Some(leased_since) = self.state.lease_since(Instant::now())
            && let Some(output) = self.key_queues.next()
        {
            let now = Instant::now();
            if output.since < leased_since {
                // The lease of this host expired in the meantime. Another host may have the output.
                // If not, the next poll finds it.
                self.release(&output.row, retry_now());
                continue;
            }
            if output.is_late(now) {
                // Its lease is about to expire. Later outputs of its key wait for the next host
                // that leases it.
                self.recorder
                    .unpublished(self.key_queues.unpublished(&output.row));
                if self.recorder.needs_outcome(output.row.seq) {
                    self.recorder.unpublished([(output.row.seq, retry_now())]);
                }
                continue;
            }

            // Wait while the database and NATS disagree.
            if self.state.is_suspended_for(&output.row.subject) {
                self.release(
                    &output.row,
                    Unpublished::Later {
                        after: SUSPENDED_RETRY_DELAY,
                        error: None,
                    },
                );
                continue;
            }

            // Respect the breakers.
            let stream = stream_for_subject(&self.streams, &output.row.subject)
                .map(|stream| stream.name.clone());
            self.has_unknown_stream |= stream.is_none();
            if let Some(after) = self.delay(&output.row.subject, stream.as_deref(), now) {
                self.release(&output.row, Unpublished::Later { after, error: None });
                continue;
            }

            // Send it.
            if !has_sent {
                fault::point(fault::BEFORE_PUBLISH);
            }
            has_sent = true;
            let highest_sequence = stream
                .as_ref()
                .and_then(|stream| self.highest_sequences.get(stream))
                .copied()
                .unwrap_or_default();
            let trace = RunningPublish::start(&self.traces, &output.row);
            let ack = self.bus.begin_publish(outgoing(&output.row), connection);
            let duplicates = self.duplicates.clone();
            let span = tracing::debug_span!(
                "publish",
                worker = output.row.worker,
                output = output.row.id,
                subject = output.row.subject,
                stream,
            );
            let publish = async move {
                let result = duplicates.confirm(&output.row, ack.await).await;
                FinishedPublish {
                    output,
                    stream,
                    highest_sequence,
                    result,
                    trace,
                }
            };
            in_flight.push(Box::pin(publish.instrument(span)));
        }
        if has_sent {
            fault::point(fault::PUBLISH_SENT);
        }
    }

    /// Delay of an output because its subject or its stream is currently refused. `None` to send it
    /// now.
    fn delay(&mut self, subject: &str, stream: Option<&str>, now: Instant) -> Option<Duration> {
        if let Some(after) = self.subjects.delay(subject, now) {
            return Some(after);
        }
        let after = self.breakers.delay(stream, now)?;
        self.subjects.inconclusive(subject, now);
        Some(after)
    }

    /// Handles the result of a publish. A failure counts against its most specific cause: the
    /// output, its subject, its stream or the connection.
    fn on_publish_result(&mut self, publish: FinishedPublish) {
        let FinishedPublish {
            output: LeasedOutput { row, .. },
            stream,
            highest_sequence,
            result,
            trace,
        } = publish;
        if let Some(trace) = trace {
            trace.finish(&self.traces, &row, &result);
        }
        let now = Instant::now();
        let error = match result {
            Ok(ack) => return self.published(&row, ack, highest_sequence),
            Err(error) => error,
        };
        let after = retry_after(row.failures);
        match error {
            PublishError::Refused(reason) => {
                self.breakers.inconclusive(stream.as_deref());
                self.subjects.inconclusive(&row.subject, now);
                self.park(&row, reason);
            }
            PublishError::RetryLater(why) | PublishError::NoConnection(why) => {
                self.breakers.inconclusive(stream.as_deref());
                self.subjects.inconclusive(&row.subject, now);
                self.retry_later(&row, after, why);
            }
            PublishError::Unroutable(why) => {
                self.subject_refused(&row, stream.as_deref(), Refusal::NoStream, why)
            }
            PublishError::SubjectFull(why) => {
                self.subject_refused(&row, stream.as_deref(), Refusal::Full, why)
            }
            PublishError::Unavailable(why) => {
                self.breakers.failed(stream.as_deref(), &why);
                self.subjects.inconclusive(&row.subject, now);
                // Other outputs probe the stream before this one is retried, because this output
                // may be the cause.
                let others = self.breakers.open_for(stream.as_deref(), now).mul_f64(1.5);
                self.retry_later(&row, after.max(others), why);
            }
            PublishError::IdTaken(why) => {
                self.breakers.inconclusive(stream.as_deref());
                self.subjects.inconclusive(&row.subject, now);
                let outcome = duplicates::retry_with_next_id(&row, why, &self.metrics);
                self.release(&row, outcome);
            }
        }
    }

    /// Handles a refused subject of a stream that may accept others. After a timeout the output is
    /// parked.
    fn subject_refused(
        &mut self,
        row: &OutboxRow,
        stream: Option<&str>,
        reason: Refusal,
        why: String,
    ) {
        self.breakers.inconclusive(stream);
        if self
            .subjects
            .refused(&row.subject, reason, &why, Instant::now())
        {
            self.park(row, why);
        } else {
            self.retry_later(row, retry_after(row.failures), why);
        }
    }

    fn retry_later(&mut self, row: &OutboxRow, after: Duration, why: String) {
        self.metrics.output(&row.worker, OutputOutcome::Failed);
        self.release(
            row,
            Unpublished::Later {
                after,
                error: Some(why),
            },
        );
    }

    /// Parks an output until an operator retries or drops it.
    fn park(&mut self, row: &OutboxRow, reason: String) {
        self.metrics.output(&row.worker, OutputOutcome::Parked);
        tracing::error!(
            worker = row.worker,
            number = row.seq,
            subject = row.subject,
            reason,
            "output parked until an operator retries or drops it"
        );
        self.release(row, Unpublished::Parked { reason });
    }

    fn published(&mut self, row: &OutboxRow, ack: PublishAck, highest_sequence: u64) {
        self.breakers.succeeded(&ack.stream);
        self.subjects.succeeded(&row.subject);
        self.state.published.fetch_add(1, Ordering::Relaxed);
        if ack.duplicate {
            fault::witness(fault::DUPLICATE_OUTPUT);
            self.metrics.output(&row.worker, OutputOutcome::Duplicate);
        } else {
            self.metrics.output(&row.worker, OutputOutcome::Published);
            if ack.sequence <= highest_sequence {
                self.state.add_suspect(&ack.stream);
                self.highest_sequences.remove(&ack.stream);
            }
            let highest = self
                .highest_sequences
                .entry(ack.stream.clone())
                .or_default();
            *highest = ack.sequence.max(*highest);
        }
        self.has_waiters |= row.failures > 0 || self.may_block_key(row);
        self.key_queues.published(row);
        self.recorder.published(Published {
            seq: row.seq,
            stream: ack.stream,
            stream_sequence: ack.sequence,
        });
    }

    /// Whether outputs of its key may be left to the poller and wait for this one. Applies in WAL
    /// mode.
    fn may_block_key(&self, row: &OutboxRow) -> bool {
        let is_wal_mode = || {
            matches!(
                self.state.relay_mode(),
                Some(RelayMode::Wal | RelayMode::Leaving)
            )
        };
        row.ordering_key.is_some() && !self.recorder.is_from_wal(row.seq) && is_wal_mode()
    }

    /// Releases an unpublished output, together with later ones of its key.
    fn release(&mut self, row: &OutboxRow, outcome: Unpublished) {
        let blocked = self.key_queues.unpublished(row);
        self.recorder.unpublished([(row.seq, outcome)]);
        self.recorder.unpublished(blocked);
    }

    /// Whether the lease of this host is valid, so that no other host can take over its outputs.
    fn has_lease(&self) -> bool {
        self.state.lease_since(Instant::now()).is_some()
    }

    /// Starts a poll, if there is capacity, a connection and a valid lease.
    fn begin_poll(&mut self) -> Option<BoxFuture<'static, Result<OutputBatch, StoreError>>> {
        let capacity = OUTPUTS_MAX
            .saturating_sub(self.key_queues.len())
            .min(POLL_BATCH_MAX);
        if capacity == 0 || !self.bus.can_publish() || !self.has_lease() {
            return None;
        }
        let (store, bus, metrics) = (
            Arc::clone(&self.store),
            self.bus.clone(),
            Arc::clone(&self.metrics),
        );
        let state = Arc::clone(&self.state);
        let streams_max_age = if std::mem::take(&mut self.has_unknown_stream) {
            STREAMS_MAX_AGE_ON_MISS
        } else {
            STREAMS_MAX_AGE
        };
        Some(Box::pin(async move {
            // A database operation must run to completion, even when this host ends.
            let polled = tokio::spawn(poller::poll(
                store,
                bus,
                metrics,
                state,
                capacity as u32,
                streams_max_age,
            ))
            .await;
            polled.unwrap_or_else(|error| Err(StoreError::Unavailable(error.into())))
        }))
    }

    /// Takes the result of a poll. Returns whether more outputs may be due.
    fn take_polled(&mut self, polled: Result<OutputBatch, StoreError>) -> bool {
        let batch = match polled {
            Ok(batch) => batch,
            Err(error) => {
                tracing::debug!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "outbox poll failed, retrying"
                );
                return false;
            }
        };
        if !batch.streams.is_empty() {
            self.streams = batch.streams;
        }
        self.recorder.track_groups(&batch.group_members);
        self.take_published(batch.already_published);
        self.recorder.unpublished(batch.unpublished);
        self.take(batch.rows, batch.since);
        batch.is_full
    }
}

/// Waits for a future and removes it.
async fn finished<T>(in_flight: &mut Option<BoxFuture<'static, T>>) -> T {
    let done = match in_flight {
        Some(future) => future.await,
        None => std::future::pending().await,
    };
    *in_flight = None;
    done
}

/// Due at once, as far as the database permits.
fn retry_now() -> Unpublished {
    Unpublished::Later {
        after: Duration::ZERO,
        error: None,
    }
}

/// Delay after one more failure. Uniform between half of the delay and all of it.
fn retry_after(failures: u32) -> Duration {
    let most = RETRY_DELAY_MIN
        .saturating_mul(2_u32.saturating_pow(failures))
        .min(RETRY_DELAY_MAX);
    most / 2 + (most / 2).mul_f64(rand::random())
}

fn outgoing(row: &OutboxRow) -> OutgoingMessage {
    OutgoingMessage {
        subject: row.subject.clone(),
        headers: row.headers.clone(),
        id: row.id.clone(),
        body: row.body.clone(),
    }
}
