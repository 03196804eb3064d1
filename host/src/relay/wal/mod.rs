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

use super::poller::Swept;
use super::{RelayState, recovered};
use crate::bus::Bus;
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::Metrics;
use crate::store::{
    LogEvent, LogReader, LogState, Lsn, OutboxRow, OutputLog, Published, RelayMode, Step, Store, StoreError,
    Unpublished,
};

mod tracker;

pub use tracker::Outcome;
use tracker::Tracker;

/// How often a host looks how outputs go and how far the reader is.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How soon it takes the next step when others have to end something first.
const STEP_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How far publishing may be behind the commits until lanes wait, and when they go on.
const BEHIND_MAX: Duration = Duration::from_secs(2);
const BEHIND_NO_MORE: Duration = Duration::from_secs(1);

/// How many outputs are handed to the relay at a time.
const HAND_MAX: usize = 500;

/// How soon it is looked again whether everybody can see what was told, the first time and later.
const SEEN_AGAIN_AFTER: Duration = Duration::from_millis(1);
const SEEN_AGAIN_AFTER_MAX: Duration = Duration::from_millis(20);

/// How often outcomes are recorded, how many at a time, and how often the position is when there are none.
const RECORD_EVERY: Duration = Duration::from_millis(20);
const RECORD_MAX: usize = 2_000;
const BEAT_EVERY: Duration = Duration::from_millis(250);

/// For how long a host that stops goes on publishing what its lanes committed.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(5);

/// How old the list of streams may be that says where outputs go.
const STREAMS_AS_OF: Duration = Duration::from_secs(10);

/// How much of what the slot may keep is worth a warning: half of it.
const WARN_AT: u64 = 2;

/// Outputs from the log, on their way to the relay.
pub struct FromLog {
    /// From a reader that has just begun.
    pub is_first: bool,
    pub rows: Vec<(OutboxRow, Fate)>,
    /// Not later than it was looked who is before them.
    pub since: Instant,
    /// Which of the relay's wishes for polling were in the database by then.
    pub recorded: u64,
}

/// What is to become of an output from the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    ToSend,
    /// It is on its stream already.
    There(Published),
    Back(Unpublished),
}

/// The ends of the relay's two channels that the reader holds.
pub struct LogEnds {
    pub(super) to_relay: mpsc::Sender<FromLog>,
    pub(super) outcomes: mpsc::UnboundedReceiver<Outcome>,
    pub(super) gate: watch::Sender<bool>,
}

/// Looks how outputs go, and sees to it that they go as is asked for.
pub struct LogKeeper {
    log: Arc<dyn OutputLog>,
    state: Arc<RelayState>,
    gate: watch::Sender<bool>,
    /// What was told of the last time.
    told: Option<(RelayMode, Option<String>)>,
    is_warned: bool,
}

impl LogKeeper {
    pub fn new(log: Arc<dyn OutputLog>, state: Arc<RelayState>, ends: &LogEnds) -> Self {
        LogKeeper { log, state, gate: ends.gate.clone(), told: None, is_warned: false }
    }

    /// Runs until it is time to stop; then lanes need not wait any more.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            let wait = match self.look_and_step().await {
                Ok(Step::More) => Duration::ZERO,
                Ok(Step::Wait) => STEP_AGAIN_AFTER,
                Ok(Step::Done) => LOOK_EVERY,
                Err(error) => {
                    tracing::warn!("looking how outputs go again soon: {:#}", anyhow::Error::from(error));
                    LOOK_EVERY * 4
                }
            };
            if stopping.wait(wait).await {
                self.gate.send_replace(true);
                return;
            }
        }
    }

    async fn look_and_step(&mut self) -> Result<Step, StoreError> {
        let look = self.log.look().await?;
        self.tell(&look);
        self.hold_lanes(&look);
        self.state.show_log(look);
        // No operation of the database is dropped half-way.
        self.log.step().await
    }

    /// Lanes wait while the reader is far behind, so that effects and publishing cannot drift apart.
    fn hold_lanes(&self, look: &LogState) {
        let is_open = *self.gate.borrow();
        let opens = look.behind <= if is_open { BEHIND_MAX } else { BEHIND_NO_MORE };
        if opens != is_open {
            tracing::debug!("lanes {}: publishing is {:?} behind", if opens { "go on" } else { "wait" }, look.behind);
            self.gate.send_replace(opens);
        }
    }

    fn tell(&mut self, look: &LogState) {
        let now = (look.mode, look.why.clone());
        if self.told.as_ref() != Some(&now) {
            match (look.mode, &look.why) {
                (RelayMode::Wal, _) => tracing::info!("outputs are published from the database's log"),
                (RelayMode::Leaving, Some(why)) => {
                    tracing::error!("outputs are no longer published from the database's log: {why}")
                }
                (RelayMode::Poll, Some(why)) => tracing::warn!("outputs are published by polling, because {why}"),
                (RelayMode::Poll, None) if self.told.is_some() => tracing::info!("outputs are published by polling"),
                _ => {}
            }
            self.told = Some(now);
        }
        let Some(slot) = &look.slot else { return };
        let is_large = slot.retained > slot.retained_max / WARN_AT;
        if is_large && !self.is_warned {
            tracing::error!(
                "the replication slot keeps {} MiB of the database's log; at {} MiB outputs go by polling again",
                slot.retained >> 20,
                slot.retained_max >> 20
            );
        }
        self.is_warned = is_large;
    }
}

/// Reads the log when no other host does.
pub struct LogRelay {
    store: Arc<dyn Store>,
    log: Arc<dyn OutputLog>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    ends: LogEnds,
}

impl LogRelay {
    pub fn new(
        store: Arc<dyn Store>,
        log: Arc<dyn OutputLog>,
        bus: Bus,
        metrics: Arc<Metrics>,
        state: Arc<RelayState>,
        ends: LogEnds,
    ) -> Self {
        LogRelay { store, log, bus, metrics, state, ends }
    }

    /// Runs until the lanes are gone, and a little longer: what they committed is published first.
    pub async fn run(mut self, stopping: Stopping) {
        loop {
            if self.state.log_mode() == Some(RelayMode::Wal)
                && let Err(error) = self.read(&stopping).await
            {
                tracing::warn!("reading the database's log again soon: {:#}", anyhow::Error::from(error));
            }
            self.state.reads.store(false, Ordering::Relaxed);
            if stopping.wait(LOOK_EVERY).await {
                return;
            }
        }
    }

    async fn read(&mut self, stopping: &Stopping) -> Result<(), StoreError> {
        let Some(reader) = self.log.read().await? else { return Ok(()) };
        tracing::info!("this host reads the database's log");
        self.state.reads.store(true, Ordering::Relaxed);
        let broker = self.broker();
        // What an earlier reader here was to hear.
        while self.ends.outcomes.try_recv().is_ok() {}
        let reading = Reading {
            reader,
            tracker: Tracker::default(),
            broker,
            is_in_doubt: false,
            gathered: Told::default(),
            handing: None,
            is_first: true,
            recorded_at: Instant::now(),
            last_words: None,
        };
        reading.run(self, stopping).await
    }

    fn broker(&self) -> Broker {
        Broker { connection: *self.bus.publishing_over().borrow(), losses: self.state.losses.load(Ordering::SeqCst) }
    }

    /// Looks who is before outputs and which of them are on their streams already, and hands them to the relay.
    fn hand(&self, told: Told, is_first: bool, recorded: u64) -> BoxFuture<'static, Result<(), StoreError>> {
        let (log, bus, metrics) = (Arc::clone(&self.log), self.bus.clone(), Arc::clone(&self.metrics));
        let (store, state, to_relay) = (Arc::clone(&self.store), Arc::clone(&self.state), self.ends.to_relay.clone());
        let task = async move {
            // The relay may be full.
            let Ok(room) = to_relay.reserve().await else { return Ok(()) };
            let Look { since, behind } = told.look_once_seen(&*log).await?;
            let rows = told.rows;
            let streams = bus.streams(STREAMS_AS_OF).await.unwrap_or_default();
            let free = rows.iter().zip(&behind).filter(|(_, behind)| behind.is_none()).map(|(row, _)| row.clone());
            let (free, there) = recovered::sort_out(&*store, &state, free.collect()).await?;
            let mut swept = Swept { rows: free, since, there, back: Vec::new(), is_full: false, streams };
            swept.look_up_the_old(&bus, &metrics).await;
            let rows = with_fates(rows, &behind, swept);
            fault::point(fault::LOG_READ);
            room.send(FromLog { is_first, rows, since, recorded });
            Ok(())
        };
        // A task of its own: no operation of the database is dropped half-way.
        Box::pin(
            async move { tokio::spawn(task).await.unwrap_or_else(|error| Err(StoreError::Unavailable(error.into()))) },
        )
    }
}

/// Outputs the reader was told, and the transactions they are of.
#[derive(Default)]
struct Told {
    rows: Vec<OutboxRow>,
    transactions: Vec<u32>,
}

impl Told {
    fn push(&mut self, row: OutboxRow, transaction: u32) {
        self.rows.push(row);
        if self.transactions.last() != Some(&transaction) {
            self.transactions.push(transaction);
        }
    }

    /// Looks who is before these outputs, once everybody can see their effects: the server sends a transaction as soon as it
    /// is in the log, a moment before others can see it, or long before if it waits for a standby then.
    async fn look_once_seen(&self, log: &dyn OutputLog) -> Result<Look, StoreError> {
        let mut pause = SEEN_AGAIN_AFTER;
        loop {
            let since = Instant::now();
            if let Some(behind) = log.in_line(&self.rows, &self.transactions).await? {
                return Ok(Look { since, behind });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SEEN_AGAIN_AFTER_MAX);
        }
    }
}

/// Who is before each of some outputs, and when that was looked, at the earliest.
struct Look {
    since: Instant,
    behind: Vec<Option<i64>>,
}

/// All of them, in their order, with what was found.
fn with_fates(rows: Vec<OutboxRow>, behind: &[Option<i64>], swept: Swept) -> Vec<(OutboxRow, Fate)> {
    let there = swept.there.into_iter().map(|place| (place.seq, Fate::There(place)));
    let back = swept.back.into_iter().map(|(seq, how)| (seq, Fate::Back(how)));
    let mut fates: HashMap<i64, Fate> = there.chain(back).collect();
    let behind = behind.iter().map(|behind| behind.map(|before| Fate::Back(Unpublished::Behind(before))));
    let fate = |(row, behind): (OutboxRow, Option<Fate>)| {
        let fate = behind.or_else(|| fates.remove(&row.seq)).unwrap_or(Fate::ToSend);
        (row, fate)
    };
    rows.into_iter().zip(behind).map(fate).collect()
}

/// Since when the broker has kept what it acknowledged, as far as anybody knows: after which connection, and after how many
/// losses that were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Broker {
    connection: u64,
    losses: u64,
}

/// One time as the reader.
struct Reading {
    reader: Box<dyn LogReader>,
    tracker: Tracker,
    broker: Broker,
    /// A stream was seen to give a sequence a second time.
    is_in_doubt: bool,
    /// Told, and not on the way to the relay.
    gathered: Told,
    handing: Option<BoxFuture<'static, Result<(), StoreError>>>,
    is_first: bool,
    recorded_at: Instant,
    /// Once the host stops: until where it goes on, and for how long.
    last_words: Option<(Lsn, Instant)>,
}

impl Reading {
    /// Reads until another host is the reader, nothing goes by the log any more, the broker may have lost something, or the
    /// host stops.
    async fn run(mut self, relay: &mut LogRelay, stopping: &Stopping) -> Result<(), StoreError> {
        loop {
            if self.handing.is_none() && !self.gathered.rows.is_empty() {
                let told = std::mem::take(&mut self.gathered);
                let is_first = std::mem::take(&mut self.is_first);
                self.handing = Some(relay.hand(told, is_first, self.tracker.recorded()));
            }
            if self.is_time_to_record() && !self.record(relay, stopping).await? {
                // What comes from an earlier reader comes before all from the next one.
                return match self.handing.take() {
                    Some(handing) => handing.await,
                    None => Ok(()),
                };
            }
            if self.has_said_all() {
                return Ok(());
            }
            // Without a connection nothing could be sent.
            let takes_more = self.gathered.rows.len() < HAND_MAX && relay.bus.can_publish();
            let has_outcomes = self.tracker.has_outcomes();
            let record_at = self.recorded_at + if has_outcomes { RECORD_EVERY } else { BEAT_EVERY };
            // Whichever is ready: none of them may starve another.
            tokio::select! {
                event = self.reader.next(), if takes_more => self.take(event?),
                Some(outcome) = relay.ends.outcomes.recv() => {
                    self.tracker.heard(outcome);
                    while let Ok(outcome) = relay.ends.outcomes.try_recv() {
                        self.tracker.heard(outcome);
                    }
                }
                handed = super::finished(&mut self.handing), if self.handing.is_some() => handed?,
                () = tokio::time::sleep_until(record_at.into()) => {}
            }
        }
    }

    fn take(&mut self, event: LogEvent) {
        match event {
            LogEvent::Output { row, transaction } => {
                self.tracker.output(row.seq);
                self.gathered.push(row, transaction);
            }
            LogEvent::Committed { end, at } => self.tracker.committed(end, at),
            LogEvent::Passed(end) => self.tracker.passed(end),
        }
    }

    fn is_time_to_record(&self) -> bool {
        let since = self.recorded_at.elapsed();
        since >= BEAT_EVERY || (since >= RECORD_EVERY && self.tracker.has_outcomes())
    }

    /// Writes down how far everything is through. False when that is no longer this host's to say, or when nobody knows: after a
    /// new connection, or a loss, a stream may lack what it acknowledged before. What is recorded by then is looked for;
    /// what is not, the next reader is told again, and streams notice what they have.
    async fn record(&mut self, relay: &LogRelay, stopping: &Stopping) -> Result<bool, StoreError> {
        // In this order: whoever looks at the streams waits for a record that began before.
        relay.state.records.store(true, Ordering::SeqCst);
        let is_suspicious = relay.state.has_suspects();
        self.is_in_doubt |= is_suspicious;
        let recorded = if is_suspicious {
            self.recorded_at = Instant::now();
            Ok(true)
        } else if self.is_in_doubt || relay.broker() != self.broker {
            tracing::debug!("reading the database's log again from where everything is known to be published");
            Ok(false)
        } else {
            self.write(stopping).await
        };
        relay.state.records.store(false, Ordering::SeqCst);
        recorded
    }

    async fn write(&mut self, stopping: &Stopping) -> Result<bool, StoreError> {
        let (record, numbers) = self.tracker.take(RECORD_MAX);
        let has_outcomes = !record.published.is_empty() || !record.back.is_empty();
        super::recorder::tell(&record.back);
        if has_outcomes {
            fault::point(fault::BEFORE_LOG_RECORD);
        }
        let Some(mark) = self.reader.record(&record).await? else {
            tracing::info!("this host reads the database's log no more");
            return Ok(false);
        };
        if has_outcomes {
            fault::point(fault::AFTER_LOG_RECORD);
        }
        self.recorded_at = Instant::now();
        self.tracker.written(&numbers, mark);
        if stopping.is_stopping() && self.last_words.is_none() {
            self.last_words = Some((mark.end, Instant::now() + LAST_WORDS_WITHIN));
        }
        Ok(true)
    }

    /// Whether the host stops, and what its lanes committed is through or has to wait for the next host.
    fn has_said_all(&self) -> bool {
        self.last_words.is_some_and(|(end, at_last)| self.tracker.position() >= end || Instant::now() >= at_last)
    }
}
