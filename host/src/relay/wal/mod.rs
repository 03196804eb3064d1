//! Publishing from the write-ahead log (WAL). Every host polls the relay mode and takes the next
//! step towards the requested one. One host is the reader.
//!
//! The reader receives outputs in the order of their commits and hands them to the relay. It
//! regularly records the position up to which all outputs are published or left to the poller. The
//! poller handles all retries. A failing output therefore never delays the position.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use super::poller::OutputBatch;
use super::{RelayState, recovered};
use crate::bus::Bus;
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::Metrics;
use crate::store::{
    Lsn, OutboxRow, OutputWal, Published, RelayMode, Store, StoreError, SwitchProgress,
    Unpublished, WalEvent, WalReader, WalState,
};

mod tracker;

use tracker::Tracker;
pub use tracker::WalOutcome;

/// Interval at which a host polls the relay mode and the position of the reader.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Delay before the next step when other hosts have to finish something first.
const STEP_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Lag of publishing behind the commits at which lanes are paused, and at which they resume.
const LAG_MAX: Duration = Duration::from_secs(2);
const LAG_RESUME: Duration = Duration::from_secs(1);

/// Maximum number of outputs that are handed to the relay at once.
const BATCH_MAX: usize = 500;

/// Delays before the visibility of transactions is checked again: the first one and the maximum.
const VISIBILITY_RETRY_DELAY: Duration = Duration::from_millis(1);
const VISIBILITY_RETRY_DELAY_MAX: Duration = Duration::from_millis(20);

/// Interval at which outcomes are recorded, their maximum number at once, and the interval at which
/// the position is recorded without outcomes.
const RECORD_INTERVAL: Duration = Duration::from_millis(20);
const RECORD_MAX: usize = 2_000;
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);

/// How long a stopping host continues to publish the commits of its lanes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum age of the list of streams that maps outputs to streams.
const STREAMS_MAX_AGE: Duration = Duration::from_secs(10);

/// Divisor of the WAL limit of the slot from which on a warning is logged: half of it.
const WARN_DIVISOR: u64 = 2;

/// Outputs from the WAL, in transit to the relay.
pub struct WalOutputs {
    /// Whether they are the first of a new reader.
    pub is_first: bool,
    pub rows: Vec<(OutboxRow, WalAction)>,
    /// A time before their blockers were read.
    pub since: Instant,
    /// The number up to which the polling requests of the relay were recorded by then.
    pub recorded: u64,
}

/// The next action for an output from the WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalAction {
    Publish,
    /// The output is already on its stream.
    Published(Published),
    Poll(Unpublished),
}

/// The reader ends of the channels between relay and reader.
pub struct WalChannels {
    pub(super) to_relay: mpsc::Sender<WalOutputs>,
    pub(super) outcomes: mpsc::UnboundedReceiver<WalOutcome>,
    pub(super) accepting: watch::Sender<bool>,
}

/// Polls the relay mode and switches to the requested one.
pub struct RelayModeController {
    wal: Arc<dyn OutputWal>,
    state: Arc<RelayState>,
    accepting: watch::Sender<bool>,
    /// The last logged mode and reason.
    logged: Option<(RelayMode, Option<String>)>,
    has_warned: bool,
}

impl RelayModeController {
    pub fn new(wal: Arc<dyn OutputWal>, state: Arc<RelayState>, channels: &WalChannels) -> Self {
        RelayModeController {
            wal,
            state,
            accepting: channels.accepting.clone(),
            logged: None,
            has_warned: false,
        }
    }

    /// Runs until the stop signal, and then releases paused lanes.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            let wait = match self.poll_and_step().await {
                Ok(SwitchProgress::More) => Duration::ZERO,
                Ok(SwitchProgress::Wait) => STEP_RETRY_DELAY,
                Ok(SwitchProgress::Done) => POLL_INTERVAL,
                Err(error) => {
                    tracing::warn!(
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "failed to read the relay mode, retrying"
                    );
                    POLL_INTERVAL * 4
                }
            };
            if stopping.wait(wait).await {
                self.accepting.send_replace(true);
                return;
            }
        }
    }

    async fn poll_and_step(&mut self) -> Result<SwitchProgress, StoreError> {
        let state = self.wal.state().await?;
        self.log_changes(&state);
        self.apply_backpressure(&state);
        self.state.set_wal(state);
        // A database operation must run to completion.
        self.wal.step().await
    }

    /// Pauses the lanes while the reader is far behind, so that effects and publishing do not drift
    /// apart.
    fn apply_backpressure(&self, state: &WalState) {
        let is_open = *self.accepting.borrow();
        let should_open = state.lag <= if is_open { LAG_MAX } else { LAG_RESUME };
        if should_open != is_open {
            tracing::debug!(
                accepting = should_open,
                lag = ?state.lag,
                "lane backpressure changed"
            );
            self.accepting.send_replace(should_open);
        }
    }

    /// Logs changes of the relay mode, and warns once when the slot retains much WAL.
    fn log_changes(&mut self, state: &WalState) {
        let now = (state.mode, state.fallback_reason.clone());
        if self.logged.as_ref() != Some(&now) {
            match (state.mode, &state.fallback_reason) {
                (RelayMode::Wal, _) => {
                    tracing::info!("publishing outputs from the WAL")
                }
                (RelayMode::Leaving, Some(why)) => {
                    tracing::error!(
                        reason = why,
                        "leaving WAL mode, outputs will be published by polling"
                    )
                }
                (RelayMode::Poll, Some(why)) => {
                    tracing::warn!(
                        reason = why,
                        "WAL mode unavailable, publishing outputs by polling"
                    )
                }
                (RelayMode::Poll, None) if self.logged.is_some() => {
                    tracing::info!("publishing outputs by polling")
                }
                _ => {}
            }
            self.logged = Some(now);
        }
        let Some(slot) = &state.slot else { return };
        let is_large = slot.retained > slot.retained_max / WARN_DIVISOR;
        if is_large && !self.has_warned {
            tracing::error!(
                retained_mib = slot.retained >> 20,
                retained_max_mib = slot.retained_max >> 20,
                "replication slot retains over half of its WAL limit, leaving WAL mode at the limit"
            );
        }
        self.has_warned = is_large;
    }
}

/// Reads the WAL when no other host does.
pub struct WalRelay {
    store: Arc<Store>,
    wal: Arc<dyn OutputWal>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    channels: WalChannels,
}

impl WalRelay {
    pub fn new(
        store: Arc<Store>,
        wal: Arc<dyn OutputWal>,
        bus: Bus,
        metrics: Arc<Metrics>,
        state: Arc<RelayState>,
        channels: WalChannels,
    ) -> Self {
        WalRelay {
            store,
            wal,
            bus,
            metrics,
            state,
            channels,
        }
    }

    /// Runs until the lanes have ended, and then until their commits are published or the drain
    /// times out.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            if self.state.relay_mode() == Some(RelayMode::Wal)
                && let Err(error) = self.read(&stopping).await
            {
                tracing::warn!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "WAL read failed, retrying"
                );
            }
            self.state.is_reading.store(false, Ordering::Relaxed);
            if stopping.wait(POLL_INTERVAL).await {
                return;
            }
        }
    }

    /// Reads the WAL if this host becomes the reader.
    async fn read(&mut self, stopping: &Stopping) -> Result<(), StoreError> {
        let Some(reader) = self.wal.become_reader().await? else {
            return Ok(());
        };
        tracing::info!("started as the WAL reader");
        self.state.is_reading.store(true, Ordering::Relaxed);
        let broker_epoch = self.broker_epoch();
        // Discard outcomes for an earlier reader of this host.
        while self.channels.outcomes.try_recv().is_ok() {}
        let session = WalSession {
            reader,
            tracker: Tracker::default(),
            broker_epoch,
            is_in_doubt: false,
            pending: WalBatch::default(),
            handover: None,
            is_first: true,
            recorded_at: Instant::now(),
            drain_until: None,
        };
        session.run(self, stopping).await
    }

    fn broker_epoch(&self) -> BrokerEpoch {
        BrokerEpoch {
            connection: *self.bus.publish_connection().borrow(),
            losses: self.state.losses.load(Ordering::SeqCst),
        }
    }

    /// Reads the blockers of outputs, finds those that are already on their streams, and hands all
    /// of them to the relay.
    fn hand_to_relay(
        &self,
        batch: WalBatch,
        is_first: bool,
        recorded: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let (wal, bus, metrics) = (
            Arc::clone(&self.wal),
            self.bus.clone(),
            Arc::clone(&self.metrics),
        );
        let (store, state, to_relay) = (
            Arc::clone(&self.store),
            Arc::clone(&self.state),
            self.channels.to_relay.clone(),
        );
        let task = async move {
            // The relay may be full, or gone.
            let Ok(permit) = to_relay.reserve().await else {
                return Ok(());
            };
            let Blockers { since, blocked_by } = batch.read_blockers(&*wal).await?;
            let rows = batch.rows;
            let streams = bus.streams(STREAMS_MAX_AGE).await.unwrap_or_default();
            let free = rows
                .iter()
                .zip(&blocked_by)
                .filter(|(_, blocked_by)| blocked_by.is_none())
                .map(|(row, _)| row.clone());
            let (free, already_published) =
                recovered::split(&store, &state, free.collect()).await?;
            let mut outputs = OutputBatch {
                rows: free,
                group_members: Vec::new(),
                since,
                already_published,
                unpublished: Vec::new(),
                is_full: false,
                streams,
            };
            outputs.look_up_published(&bus, &metrics).await;
            let rows = with_actions(rows, &blocked_by, outputs);
            fault::point(fault::WAL_READ);
            permit.send(WalOutputs {
                is_first,
                rows,
                since,
                recorded,
            });
            Ok(())
        };
        // A task of its own, because a database operation must run to completion.
        Box::pin(async move {
            tokio::spawn(task)
                .await
                .unwrap_or_else(|error| Err(StoreError::Unavailable(error.into())))
        })
    }
}

/// Outputs that the reader received, and their transactions.
#[derive(Default)]
struct WalBatch {
    rows: Vec<OutboxRow>,
    transactions: Vec<u32>,
}

impl WalBatch {
    fn push(&mut self, row: OutboxRow, transaction: u32) {
        self.rows.push(row);
        if self.transactions.last() != Some(&transaction) {
            self.transactions.push(transaction);
        }
    }

    /// Reads the blockers of these outputs, once their transactions are visible.
    ///
    /// The server sends a transaction as soon as it is in the WAL. Other sessions see it a moment
    /// later, or much later if it waits for a standby.
    ///
    /// # Errors
    /// The database cannot be read.
    async fn read_blockers(&self, wal: &dyn OutputWal) -> Result<Blockers, StoreError> {
        let mut pause = VISIBILITY_RETRY_DELAY;
        loop {
            let since = Instant::now();
            if let Some(blocked_by) = wal.blocked_by(&self.rows, &self.transactions).await? {
                return Ok(Blockers { since, blocked_by });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(VISIBILITY_RETRY_DELAY_MAX);
        }
    }
}

/// The blocker of each output, and a time before they were read.
struct Blockers {
    since: Instant,
    blocked_by: Vec<Option<i64>>,
}

/// All outputs in their order, each with its action.
fn with_actions(
    rows: Vec<OutboxRow>,
    blocked_by: &[Option<i64>],
    outputs: OutputBatch,
) -> Vec<(OutboxRow, WalAction)> {
    let published = outputs
        .already_published
        .into_iter()
        .map(|published| (published.seq, WalAction::Published(published)));
    let unpublished = outputs
        .unpublished
        .into_iter()
        .map(|(seq, outcome)| (seq, WalAction::Poll(outcome)));
    let mut actions: HashMap<i64, WalAction> = published.chain(unpublished).collect();
    let blocked_by = blocked_by
        .iter()
        .map(|blocked_by| blocked_by.map(|before| WalAction::Poll(Unpublished::BlockedBy(before))));
    let action = |(row, blocked_by): (OutboxRow, Option<WalAction>)| {
        let action = blocked_by
            .or_else(|| actions.remove(&row.seq))
            .unwrap_or(WalAction::Publish);
        (row, action)
    };
    rows.into_iter().zip(blocked_by).map(action).collect()
}

/// The period for which the broker is assumed to have kept its acknowledged messages: the
/// connection, and the number of detected losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BrokerEpoch {
    connection: u64,
    losses: u64,
}

/// The session of a WAL reader.
struct WalSession {
    reader: Box<dyn WalReader>,
    tracker: Tracker,
    broker_epoch: BrokerEpoch,
    /// A stream assigned a sequence twice, so it may have lost messages.
    is_in_doubt: bool,
    /// Received outputs that are not yet handed to the relay.
    pending: WalBatch,
    handover: Option<BoxFuture<'static, Result<(), StoreError>>>,
    is_first: bool,
    recorded_at: Instant,
    /// Set when the host stops: the position up to which it continues, and the deadline.
    drain_until: Option<(Lsn, Instant)>,
}

impl WalSession {
    /// Reads until one of these events: another host becomes the reader, WAL mode ends, the broker
    /// may have lost messages, or the host stops.
    ///
    /// # Errors
    /// The replication connection or the database failed.
    async fn run(mut self, relay: &mut WalRelay, stopping: &Stopping) -> Result<(), StoreError> {
        loop {
            // Hand over received outputs.
            if self.handover.is_none() && !self.pending.rows.is_empty() {
                let batch = std::mem::take(&mut self.pending);
                let is_first = std::mem::take(&mut self.is_first);
                self.handover = Some(relay.hand_to_relay(batch, is_first, self.tracker.recorded()));
            }

            // Record the position.
            if self.should_record() && !self.record(relay, stopping).await? {
                // Outputs of this reader must precede those of the next one.
                return match self.handover.take() {
                    Some(handover) => handover.await,
                    None => Ok(()),
                };
            }
            if self.is_drained() {
                return Ok(());
            }
            // Without a connection nothing can be published.
            let takes_more = self.pending.rows.len() < BATCH_MAX && relay.bus.can_publish();
            let has_outcomes = self.tracker.has_outcomes();
            let record_at = self.recorded_at
                + if has_outcomes {
                    RECORD_INTERVAL
                } else {
                    HEARTBEAT_INTERVAL
                };
            // Not biased, so that no branch blocks another.
            tokio::select! {
                event = self.reader.next(), if takes_more => self.take(event?),
                Some(outcome) = relay.channels.outcomes.recv() => {
                    self.tracker.on_outcome(outcome);
                    while let Ok(outcome) = relay.channels.outcomes.try_recv() {
                        self.tracker.on_outcome(outcome);
                    }
                }
                handed = super::finished(&mut self.handover), if self.handover.is_some() => handed?,
                () = tokio::time::sleep_until(record_at.into()) => {}
            }
        }
    }

    /// Applies an event of the WAL.
    fn take(&mut self, event: WalEvent) {
        match event {
            WalEvent::Output { row, transaction } => {
                self.tracker.output(row.seq);
                self.pending.push(*row, transaction);
            }
            WalEvent::Committed { end, at } => self.tracker.committed(end, at),
            WalEvent::Passed(end) => self.tracker.passed(end),
        }
    }

    fn should_record(&self) -> bool {
        let since = self.recorded_at.elapsed();
        since >= HEARTBEAT_INTERVAL || (since >= RECORD_INTERVAL && self.tracker.has_outcomes())
    }

    /// Records the position up to which all outputs have an outcome.
    ///
    /// Returns false when this host is no longer the reader, or when the state of the broker is
    /// unknown. After a new connection or a loss, a stream may lack messages that it acknowledged
    /// before. The stream repair finds recorded ones. Unrecorded ones are read from the WAL again
    /// by the next reader, and the streams drop those that they have.
    async fn record(&mut self, relay: &WalRelay, stopping: &Stopping) -> Result<bool, StoreError> {
        // This order matters: a stream check waits for a record that began before it.
        relay.state.is_recording.store(true, Ordering::SeqCst);
        let is_suspicious = relay.state.has_suspects();
        self.is_in_doubt |= is_suspicious;
        let recorded = if is_suspicious {
            self.recorded_at = Instant::now();
            Ok(true)
        } else if self.is_in_doubt || relay.broker_epoch() != self.broker_epoch {
            tracing::debug!(
                "broker state unknown, reading the WAL again from the recorded position"
            );
            Ok(false)
        } else {
            self.write_record(stopping).await
        };
        relay.state.is_recording.store(false, Ordering::SeqCst);
        recorded
    }

    async fn write_record(&mut self, stopping: &Stopping) -> Result<bool, StoreError> {
        let (record, numbers) = self.tracker.take(RECORD_MAX);
        let has_outcomes = !record.published.is_empty() || !record.released.is_empty();
        super::recorder::log_errors(&record.released);
        if has_outcomes {
            fault::point(fault::BEFORE_WAL_RECORD);
        }
        let Some(snapshot) = self.reader.record(&record).await? else {
            tracing::info!("stopped as the WAL reader");
            return Ok(false);
        };
        if has_outcomes {
            fault::point(fault::AFTER_WAL_RECORD);
        }
        self.recorded_at = Instant::now();
        self.tracker.written(&numbers, snapshot);
        if stopping.is_stopping() && self.drain_until.is_none() {
            self.drain_until = Some((snapshot.end, Instant::now() + DRAIN_TIMEOUT));
        }
        Ok(true)
    }

    /// Whether a stopping host has published the commits of its lanes, or has to leave them to the
    /// next host.
    fn is_drained(&self) -> bool {
        self.drain_until.is_some_and(|(end, deadline)| {
            self.tracker.position() >= end || Instant::now() >= deadline
        })
    }
}
