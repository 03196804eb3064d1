//! Publishing from the database's log: every host looks how outputs go and takes steps towards what is asked for; one of them
//! is the reader.
//!
//! The reader is told outputs in the order of their commits, hands them to the relay like any others, and writes down now and
//! then how far everything is through. What fails on the way goes by polling from then on, with all that the sweep knows
//! to do; so the position never waits for anybody's trouble.

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

/// How often a host looks how outputs go and how far the reader is.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// How soon it takes the next step when others have to end something first.
const STEP_RETRY_DELAY: Duration = Duration::from_millis(50);

/// How far publishing may be behind the commits until lanes wait, and when they go on.
const LAG_MAX: Duration = Duration::from_secs(2);
const LAG_RESUME: Duration = Duration::from_secs(1);

/// How many outputs are handed to the relay at a time.
const BATCH_MAX: usize = 500;

/// How soon it is looked again whether everybody can see what was told, the first time and later.
const VISIBILITY_RETRY_DELAY: Duration = Duration::from_millis(1);
const VISIBILITY_RETRY_DELAY_MAX: Duration = Duration::from_millis(20);

/// How often outcomes are recorded, how many at a time, and how often the position is when there are none.
const RECORD_INTERVAL: Duration = Duration::from_millis(20);
const RECORD_MAX: usize = 2_000;
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);

/// For how long a host that stops goes on publishing what its lanes committed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How old the list of streams may be that says where outputs go.
const STREAMS_MAX_AGE: Duration = Duration::from_secs(10);

/// How much of what the slot may keep is worth a warning: half of it.
const WARN_DIVISOR: u64 = 2;

/// Outputs from the log, on their way to the relay.
pub struct WalOutputs {
    /// From a reader that has just begun.
    pub is_first: bool,
    pub rows: Vec<(OutboxRow, WalAction)>,
    /// Not later than it was looked who is before them.
    pub since: Instant,
    /// Which of the relay's wishes for polling were in the database by then.
    pub recorded: u64,
}

/// What is to become of an output from the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalAction {
    Publish,
    /// It is on its stream already.
    Published(Published),
    Poll(Unpublished),
}

/// The ends of the relay's two channels that the reader holds.
pub struct WalChannels {
    pub(super) to_relay: mpsc::Sender<WalOutputs>,
    pub(super) outcomes: mpsc::UnboundedReceiver<WalOutcome>,
    pub(super) accepting: watch::Sender<bool>,
}

/// Looks how outputs go, and sees to it that they go as is asked for.
pub struct RelayModeController {
    wal: Arc<dyn OutputWal>,
    state: Arc<RelayState>,
    accepting: watch::Sender<bool>,
    /// What was told of the last time.
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

    /// Runs until it is time to stop; then lanes need not wait any more.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            let wait = match self.poll_and_step().await {
                Ok(SwitchProgress::More) => Duration::ZERO,
                Ok(SwitchProgress::Wait) => STEP_RETRY_DELAY,
                Ok(SwitchProgress::Done) => POLL_INTERVAL,
                Err(error) => {
                    tracing::warn!(
                        "looking how outputs go again soon: {:#}",
                        anyhow::Error::from(error)
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
        // No operation of the database is dropped half-way.
        self.wal.step().await
    }

    /// Lanes wait while the reader is far behind, so that effects and publishing cannot drift apart.
    fn apply_backpressure(&self, state: &WalState) {
        let is_open = *self.accepting.borrow();
        let should_open = state.lag <= if is_open { LAG_MAX } else { LAG_RESUME };
        if should_open != is_open {
            tracing::debug!(
                "lanes {}: publishing is {:?} behind",
                if should_open { "go on" } else { "wait" },
                state.lag
            );
            self.accepting.send_replace(should_open);
        }
    }

    fn log_changes(&mut self, state: &WalState) {
        let now = (state.mode, state.fallback_reason.clone());
        if self.logged.as_ref() != Some(&now) {
            match (state.mode, &state.fallback_reason) {
                (RelayMode::Wal, _) => {
                    tracing::info!("outputs are published from the database's log")
                }
                (RelayMode::Leaving, Some(why)) => {
                    tracing::error!(
                        "outputs are no longer published from the database's log: {why}"
                    )
                }
                (RelayMode::Poll, Some(why)) => {
                    tracing::warn!("outputs are published by polling, because {why}")
                }
                (RelayMode::Poll, None) if self.logged.is_some() => {
                    tracing::info!("outputs are published by polling")
                }
                _ => {}
            }
            self.logged = Some(now);
        }
        let Some(slot) = &state.slot else { return };
        let is_large = slot.retained > slot.retained_max / WARN_DIVISOR;
        if is_large && !self.has_warned {
            tracing::error!(
                "the replication slot keeps {} MiB of the database's log; at {} MiB outputs go by polling again",
                slot.retained >> 20,
                slot.retained_max >> 20
            );
        }
        self.has_warned = is_large;
    }
}

/// Reads the log when no other host does.
pub struct WalRelay {
    store: Arc<dyn Store>,
    wal: Arc<dyn OutputWal>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    channels: WalChannels,
}

impl WalRelay {
    pub fn new(
        store: Arc<dyn Store>,
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

    /// Runs until the lanes are gone, and a little longer: what they committed is published first.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            if self.state.relay_mode() == Some(RelayMode::Wal)
                && let Err(error) = self.read(&stopping).await
            {
                tracing::warn!(
                    "reading the database's log again soon: {:#}",
                    anyhow::Error::from(error)
                );
            }
            self.state.is_reading.store(false, Ordering::Relaxed);
            if stopping.wait(POLL_INTERVAL).await {
                return;
            }
        }
    }

    async fn read(&mut self, stopping: &Stopping) -> Result<(), StoreError> {
        let Some(reader) = self.wal.become_reader().await? else {
            return Ok(());
        };
        tracing::info!("this host reads the database's log");
        self.state.is_reading.store(true, Ordering::Relaxed);
        let broker_epoch = self.broker_epoch();
        // What an earlier reader here was to hear.
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

    /// Looks who is before outputs and which of them are on their streams already, and hands them to the relay.
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
            // The relay may be full.
            let Ok(room) = to_relay.reserve().await else {
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
                recovered::split(&*store, &state, free.collect()).await?;
            let mut outputs = OutputBatch {
                rows: free,
                since,
                already_published,
                unpublished: Vec::new(),
                is_full: false,
                streams,
            };
            outputs.look_up_published(&bus, &metrics).await;
            let rows = with_actions(rows, &blocked_by, outputs);
            fault::point(fault::WAL_READ);
            room.send(WalOutputs {
                is_first,
                rows,
                since,
                recorded,
            });
            Ok(())
        };
        // A task of its own: no operation of the database is dropped half-way.
        Box::pin(async move {
            tokio::spawn(task)
                .await
                .unwrap_or_else(|error| Err(StoreError::Unavailable(error.into())))
        })
    }
}

/// Outputs the reader was told, and the transactions they are of.
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

    /// Looks who is before these outputs, once everybody can see their effects: the server sends a transaction as soon as it
    /// is in the log, a moment before others can see it, or long before if it waits for a standby then.
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

/// Who is before each of some outputs, and when that was looked, at the earliest.
struct Blockers {
    since: Instant,
    blocked_by: Vec<Option<i64>>,
}

/// All of them, in their order, with what was found.
fn with_actions(
    rows: Vec<OutboxRow>,
    blocked_by: &[Option<i64>],
    outputs: OutputBatch,
) -> Vec<(OutboxRow, WalAction)> {
    let published = outputs
        .already_published
        .into_iter()
        .map(|place| (place.seq, WalAction::Published(place)));
    let unpublished = outputs
        .unpublished
        .into_iter()
        .map(|(seq, how)| (seq, WalAction::Poll(how)));
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

/// Since when the broker has kept what it acknowledged, as far as anybody knows: after which connection, and after how many
/// losses that were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BrokerEpoch {
    connection: u64,
    losses: u64,
}

/// One time as the reader.
struct WalSession {
    reader: Box<dyn WalReader>,
    tracker: Tracker,
    broker_epoch: BrokerEpoch,
    /// A stream was seen to give a sequence a second time.
    is_in_doubt: bool,
    /// Told, and not on the way to the relay.
    pending: WalBatch,
    handover: Option<BoxFuture<'static, Result<(), StoreError>>>,
    is_first: bool,
    recorded_at: Instant,
    /// Once the host stops: until where it goes on, and for how long.
    drain_until: Option<(Lsn, Instant)>,
}

impl WalSession {
    /// Reads until another host is the reader, nothing goes by the log any more, the broker may have lost something, or the
    /// host stops.
    async fn run(mut self, relay: &mut WalRelay, stopping: &Stopping) -> Result<(), StoreError> {
        loop {
            if self.handover.is_none() && !self.pending.rows.is_empty() {
                let batch = std::mem::take(&mut self.pending);
                let is_first = std::mem::take(&mut self.is_first);
                self.handover = Some(relay.hand_to_relay(batch, is_first, self.tracker.recorded()));
            }
            if self.should_record() && !self.record(relay, stopping).await? {
                // What comes from an earlier reader comes before all from the next one.
                return match self.handover.take() {
                    Some(handover) => handover.await,
                    None => Ok(()),
                };
            }
            if self.is_drained() {
                return Ok(());
            }
            // Without a connection nothing could be sent.
            let takes_more = self.pending.rows.len() < BATCH_MAX && relay.bus.can_publish();
            let has_outcomes = self.tracker.has_outcomes();
            let record_at = self.recorded_at
                + if has_outcomes {
                    RECORD_INTERVAL
                } else {
                    HEARTBEAT_INTERVAL
                };
            // Whichever is ready: none of them may starve another.
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

    fn take(&mut self, event: WalEvent) {
        match event {
            WalEvent::Output { row, transaction } => {
                self.tracker.output(row.seq);
                self.pending.push(row, transaction);
            }
            WalEvent::Committed { end, at } => self.tracker.committed(end, at),
            WalEvent::Passed(end) => self.tracker.passed(end),
        }
    }

    fn should_record(&self) -> bool {
        let since = self.recorded_at.elapsed();
        since >= HEARTBEAT_INTERVAL || (since >= RECORD_INTERVAL && self.tracker.has_outcomes())
    }

    /// Writes down how far everything is through. False when that is no longer this host's to say, or when nobody knows: after a
    /// new connection, or a loss, a stream may lack what it acknowledged before. What is recorded by then is looked for;
    /// what is not, the next reader is told again, and streams notice what they have.
    async fn record(&mut self, relay: &WalRelay, stopping: &Stopping) -> Result<bool, StoreError> {
        // In this order: whoever looks at the streams waits for a record that began before.
        relay.state.is_recording.store(true, Ordering::SeqCst);
        let is_suspicious = relay.state.has_suspects();
        self.is_in_doubt |= is_suspicious;
        let recorded = if is_suspicious {
            self.recorded_at = Instant::now();
            Ok(true)
        } else if self.is_in_doubt || relay.broker_epoch() != self.broker_epoch {
            tracing::debug!(
                "reading the database's log again from where everything is known to be published"
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
            tracing::info!("this host reads the database's log no more");
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

    /// Whether the host stops, and what its lanes committed is through or has to wait for the next host.
    fn is_drained(&self) -> bool {
        self.drain_until.is_some_and(|(end, deadline)| {
            self.tracker.position() >= end || Instant::now() >= deadline
        })
    }
}
