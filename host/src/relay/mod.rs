//! The relay: publishes what committed.
//!
//! On the happy path committed outputs come from memory. What a crash, an outage or a delay left behind is found by a
//! sweep over what is due and unpublished; there is no cursor that could skip a row. Rows are leased in the database,
//! so that hosts do not publish the same row twice; the row is marked only with the broker's acknowledgement.
//!
//! One loop: answers, records in the database and sweeps are under way at the same time, but of each key one output.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::{mpsc, watch};

use crate::bus::{Answer, Bus, Outgoing, PublishError, PublishedAt, StreamInfo, stream_of};
use crate::drain::Stopping;
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Published, RelayMode, Store, StoreError, Unpublished};

mod breakers;
mod duplicates;
mod ordering;
mod poller;
mod recorder;
mod recovered;
mod repair;
mod state;
mod subjects;
mod wal;

use breakers::Breakers;
use duplicates::Duplicates;
use ordering::{Held, Lines};
use poller::Swept;
use recorder::Ledger;
pub use repair::Repair;
pub use state::{BreakerState, RefusedSubject, RelayState};
use subjects::{Refusal, Subjects};
use wal::{Fate, FromLog};
pub use wal::{LogEnds, LogKeeper, LogRelay};

/// Batches of outputs that wait for the relay; lanes wait when it is full, so effects and publishing cannot drift apart.
const HAND_OVER_MAX: usize = 64;

/// How many outputs the relay holds before it takes no more.
const HELD_MAX: usize = 4_000;

/// How many outputs are under way at a time.
const UNDER_WAY_MAX: usize = 1_000;

/// How many outputs a sweep takes.
const SWEEP_MAX: usize = 1_000;

/// How often the sweep looks for what is due. Delays are honoured within this time.
const SWEEP_EVERY: Duration = Duration::from_millis(250);

/// How long after one sweep the next begins at the earliest when others wait for what was published since.
const SWEEP_SOON: Duration = Duration::from_millis(20);

/// How long publishing waits after a new connection until the streams are looked at; after that it goes on without.
const REPAIR_WITHIN: Duration = Duration::from_secs(10);

/// How often it looks whether that is done.
const LOOKED_AT_YET: Duration = Duration::from_millis(5);

/// How old the list of streams may be that says where outputs go, and how old when it lacks one.
const STREAMS_AS_OF: Duration = Duration::from_secs(10);
const STREAMS_AS_OF_AT_LEAST: Duration = Duration::from_secs(1);

/// When it is looked again whether outputs may be sent that wait until database and broker agree.
const HELD_FOR: Duration = Duration::from_secs(5);

/// How long an output waits after its first failure; twice that after the second, and so on.
const RETRY_FIRST: Duration = Duration::from_millis(250);

/// Where that doubling ends.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// What lanes hold of the relay. Cheap to clone.
#[derive(Clone)]
pub struct HandOver {
    store: Arc<dyn Store>,
    state: Arc<RelayState>,
    sender: mpsc::Sender<Leased>,
    /// Closed while the reader of the database's log is far behind.
    gate: watch::Receiver<bool>,
}

/// Outputs that this host committed, and a time before which their leases did not begin.
struct Leased {
    rows: Vec<OutboxRow>,
    /// On their streams already.
    there: Vec<Published>,
    since: Instant,
}

impl HandOver {
    /// Hands committed outputs over, whose leases began at `since` or later; waits while the relay is behind. If the relay
    /// is gone, a sweep finds them.
    pub async fn hand_over(&self, rows: Vec<OutboxRow>, since: Instant) {
        let _ = self.gate.clone().wait_for(|is_open| *is_open).await;
        if rows.is_empty() {
            return;
        }
        match recovered::sort_out(&*self.store, &self.state, rows).await {
            Ok((rows, there)) => drop(self.sender.send(Leased { rows, there, since }).await),
            // A sweep finds them once their lease is over.
            Err(error) => tracing::debug!("outputs are left to a sweep: {:#}", anyhow::Error::from(error)),
        }
    }
}

/// The one task that publishes.
pub struct Relay {
    store: Arc<dyn Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    handed_over: mpsc::Receiver<Leased>,
    from_log: mpsc::Receiver<FromLog>,
    lines: Lines,
    ledger: Ledger,
    streams: Arc<Vec<StreamInfo>>,
    /// An output goes to a stream that is not among these.
    knows_too_little: bool,
    breakers: Breakers,
    subjects: Subjects,
    duplicates: Duplicates,
    /// The highest sequence each stream answered with.
    tops: HashMap<String, u64>,
    /// Since when the database's word on who goes before whom holds for all that is in memory.
    decided: Option<Instant>,
    /// The number of the connection that outputs go over.
    over: watch::Receiver<u64>,
    /// Since when nothing is sent because the streams are yet to be looked at.
    waits_since: Option<Instant>,
    /// Something that others may wait for was published: there may be more to do than the next tick would find in time. The
    /// sweep finds it once that is in the database.
    others_wait: bool,
}

/// An output whose answer is there.
struct Answered {
    held: Held,
    /// The name of the stream it went to, as far as that is known.
    stream: Option<String>,
    /// The highest sequence of that stream when it was sent.
    top: u64,
    answer: Answer,
}

type UnderWay = FuturesUnordered<BoxFuture<'static, Answered>>;

impl Relay {
    pub fn new(
        store: Arc<dyn Store>,
        bus: Bus,
        metrics: Arc<Metrics>,
        state: Arc<RelayState>,
    ) -> (Self, HandOver, LogEnds) {
        let (sender, handed_over) = mpsc::channel(HAND_OVER_MAX);
        let (to_relay, from_log) = mpsc::channel(1);
        let (heard, outcomes) = mpsc::unbounded_channel();
        let (opens, gate) = watch::channel(true);
        let hand_over = HandOver { store: Arc::clone(&store), state: Arc::clone(&state), sender, gate };
        let relay = Relay {
            ledger: Ledger::new(Arc::clone(&store), heard),
            over: bus.publishing_over(),
            duplicates: Duplicates::new(bus.clone()),
            store,
            bus,
            metrics,
            breakers: Breakers::new(Arc::clone(&state)),
            subjects: Subjects::new(Arc::clone(&state), Instant::now()),
            state,
            handed_over,
            from_log,
            lines: Lines::default(),
            streams: Arc::default(),
            knows_too_little: false,
            tops: HashMap::new(),
            decided: None,
            waits_since: None,
            others_wait: false,
        };
        (relay, hand_over, LogEnds { to_relay, outcomes, gate: opens })
    }

    /// Runs until all lanes and the reader of the log are gone and what they handed over is published. After `stopping` there are no more sweeps:
    /// what is not published stays in the outbox for the next host.
    pub async fn run(mut self, stopping: Stopping) {
        let mut under_way = UnderWay::new();
        let mut sweeping: Option<BoxFuture<'static, Result<Swept, StoreError>>> = None;
        let (mut swept_at, mut sweep_at) = (Instant::now(), Instant::now());
        let mut sweep_once_written = false;
        let (mut lanes_are_gone, mut reader_is_gone) = (false, false);
        loop {
            self.send(&mut under_way).await;
            if self.ledger.write() {
                sweep_once_written = std::mem::take(&mut self.others_wait);
            }
            self.state.unwritten.store(!self.ledger.is_empty(), Ordering::Relaxed);
            if lanes_are_gone && reader_is_gone && self.lines.is_empty() && self.ledger.is_empty() && sweeping.is_none()
            {
                return;
            }
            let waits = self.waits_for_repair() || (!self.has_lease() && !self.lines.is_empty());
            let is_time_to_sweep = sweeping.is_none() && !stopping.is_stopping();
            // Whichever is ready: none of them may starve another.
            tokio::select! {
                Some(answered) = under_way.next(), if !under_way.is_empty() => {
                    self.hear(answered);
                    while let Some(Some(answered)) = under_way.next().now_or_never() {
                        self.hear(answered);
                    }
                }
                () = self.ledger.written(), if self.ledger.is_writing() => {
                    if std::mem::take(&mut sweep_once_written) {
                        sweep_at = sweep_at.min(swept_at + SWEEP_SOON);
                    }
                }
                leased = self.handed_over.recv(), if !lanes_are_gone && self.lines.len() < HELD_MAX => match leased {
                    Some(Leased { rows, there, since }) => {
                        self.take_there(there);
                        self.take(rows, since);
                    }
                    None => lanes_are_gone = true,
                },
                from_log = self.from_log.recv(), if !reader_is_gone && self.lines.len() < HELD_MAX => match from_log {
                    Some(from_log) => self.take_from_log(from_log),
                    None => reader_is_gone = true,
                },
                swept = finished(&mut sweeping), if sweeping.is_some() => {
                    let is_full = self.take_swept(swept);
                    sweep_at = Instant::now()
                        + match is_full {
                            _ if self.state.holds() => HELD_FOR,
                            true => Duration::ZERO,
                            false => SWEEP_EVERY,
                        };
                }
                () = tokio::time::sleep(LOOKED_AT_YET), if waits => {}
                () = tokio::time::sleep_until(sweep_at.into()), if is_time_to_sweep => {
                    sweeping = self.begin_sweep();
                    swept_at = Instant::now();
                    sweep_at = swept_at + SWEEP_EVERY;
                }
                else => return,
            }
        }
    }

    /// Takes outputs into memory. Those that have to wait for others that are not here go back at once.
    fn take(&mut self, rows: Vec<OutboxRow>, since: Instant) {
        self.mind_losses();
        if self.is_outdated(since) {
            return self.ledger.put_back(rows.iter().map(|row| (row.seq, due())));
        }
        let back = self.lines.take(rows, since);
        self.ledger.put_back(back);
    }

    /// Takes note of outputs that are on their streams already.
    fn take_there(&mut self, there: Vec<Published>) {
        for place in there {
            self.lines.remember(place.seq);
            self.others_wait = true;
            self.ledger.published(place);
        }
    }

    /// Takes outputs from the database's log. They are in the order of their commits, and whoever goes by polling and is in
    /// line before one of them was looked for; but for those that came into trouble meanwhile.
    fn take_from_log(&mut self, from_log: FromLog) {
        self.mind_losses();
        self.ledger.knows(from_log.recorded, from_log.is_first);
        let is_outdated = self.is_outdated(from_log.since);
        for (row, fate) in from_log.rows {
            if self.lines.holds(row.seq) {
                // An earlier reader here was told of it. What becomes of it the new one will hear.
                self.ledger.admit(row.seq, ordering::key(&row));
                continue;
            }
            let in_trouble = self.ledger.admit(row.seq, ordering::key(&row));
            match (fate, in_trouble) {
                (Fate::There(place), _) => self.ledger.published(place),
                (Fate::Back(how), _) => self.ledger.put_back([(row.seq, how)]),
                (Fate::ToSend, Some(before)) => {
                    self.ledger.put_back([(row.seq, ordering::wait_for(row.seq, before))]);
                }
                (Fate::ToSend, None) if is_outdated => self.ledger.put_back([(row.seq, due())]),
                (Fate::ToSend, None) => drop(self.lines.take(vec![row], from_log.since)),
            }
        }
    }

    /// After a new connection a stream may have lost its tail. What is published again goes before what is new, so that
    /// keys keep their order.
    fn waits_for_repair(&mut self) -> bool {
        let over = *self.over.borrow();
        // Without a connection outputs fail at once and are put back.
        if !self.bus.can_publish() || self.state.looked_after() >= over {
            self.waits_since = None;
            return false;
        }
        let now = Instant::now();
        let since = *self.waits_since.get_or_insert(now);
        now.duration_since(since) < REPAIR_WITHIN
    }

    /// When a stream has lost something, the database says anew who goes first. After a new connection another host may
    /// have been the one to find it.
    fn mind_losses(&mut self) {
        let decided = self.state.decided();
        if std::mem::replace(&mut self.decided, decided) != decided {
            self.ledger.put_back(self.lines.start_over().into_iter().map(|seq| (seq, due())));
        }
    }

    /// Whether what the database said at this time of who goes before whom may hold no more.
    fn is_outdated(&self, since: Instant) -> bool {
        Some(since) < self.decided
    }

    /// Sends what may be sent now.
    async fn send(&mut self, under_way: &mut UnderWay) {
        let mut has_sent = false;
        // Should there be another connection by now, nothing of this goes over it.
        let over = *self.over.borrow();
        if self.waits_for_repair() {
            return;
        }
        self.mind_losses();
        while under_way.len() < UNDER_WAY_MAX
            && let Some(leased_since) = self.state.lease_since(Instant::now())
            && let Some(held) = self.lines.next()
        {
            let now = Instant::now();
            if held.since < leased_since {
                // The host's own lease had run out since: another host may have this one, and if not, the next sweep has.
                self.give_up(&held.row, due());
                continue;
            }
            if held.is_late(now) {
                // Its lease runs out by itself; what is behind it has to wait for whoever has it next.
                self.ledger.put_back(self.lines.not_published(&held.row));
                if self.ledger.is_from_log(held.row.seq) {
                    self.ledger.put_back([(held.row.seq, due())]);
                }
                continue;
            }
            if self.state.is_held(&held.row.subject) {
                self.give_up(&held.row, Unpublished::Later { after: HELD_FOR, error: None });
                continue;
            }
            let stream = stream_of(&self.streams, &held.row.subject).map(|stream| stream.name.clone());
            self.knows_too_little |= stream.is_none();
            if let Some(after) = self.wait(&held.row.subject, stream.as_deref(), now) {
                self.give_up(&held.row, Unpublished::Later { after, error: None });
                continue;
            }
            if !has_sent {
                fault::point(fault::BEFORE_PUBLISH);
            }
            has_sent = true;
            self.be_a_mutant(&held.row).await;
            let top = stream.as_ref().and_then(|stream| self.tops.get(stream)).copied().unwrap_or_default();
            let answer = self.bus.begin_publish(outgoing(&held.row), over);
            let duplicates = self.duplicates.clone();
            under_way.push(Box::pin(async move {
                let answer = duplicates.confirm(&held.row, answer.await).await;
                Answered { held, stream, top, answer }
            }));
        }
        if has_sent {
            fault::point(fault::PUBLISH_SENT);
        }
    }

    /// How long an output has to wait because its subject or its stream is refused at present; none to go on.
    fn wait(&mut self, subject: &str, stream: Option<&str>, now: Instant) -> Option<Duration> {
        if let Some(after) = self.subjects.wait(subject, now) {
            return Some(after);
        }
        let after = self.breakers.wait(stream, now)?;
        self.subjects.undecided(subject, now);
        Some(after)
    }

    /// Records the answer to an output. A failure counts against the output, its subject, its stream or the connection:
    /// whichever it is about, and nothing larger.
    fn hear(&mut self, answered: Answered) {
        let Answered { held: Held { row, .. }, stream, top, answer } = answered;
        let now = Instant::now();
        let error = match answer {
            Ok(place) => return self.published(&row, place, top),
            Err(error) => error,
        };
        let after = retry_after(row.failures);
        match error {
            PublishError::Refused(reason) => {
                self.breakers.undecided(stream.as_deref());
                self.subjects.undecided(&row.subject, now);
                self.set_aside(&row, reason);
            }
            PublishError::NotNow(why) | PublishError::NoConnection(why) => {
                self.breakers.undecided(stream.as_deref());
                self.subjects.undecided(&row.subject, now);
                self.try_again(&row, after, why);
            }
            PublishError::NoPlace(why) => self.subject_refused(&row, stream.as_deref(), Refusal::NoPlace, why),
            PublishError::SubjectFull(why) => self.subject_refused(&row, stream.as_deref(), Refusal::Full, why),
            PublishError::Unavailable(why) => {
                self.breakers.failed(stream.as_deref(), &why);
                self.subjects.undecided(&row.subject, now);
                // Others probe the stream before this one does again: the fault may be its own after all.
                let others = self.breakers.open_for(stream.as_deref(), now).mul_f64(1.5);
                self.try_again(&row, after.max(others), why);
            }
            PublishError::IdTaken(why) => {
                self.breakers.undecided(stream.as_deref());
                self.subjects.undecided(&row.subject, now);
                let how = duplicates::under_next_id(&row, why, &self.metrics);
                self.give_up(&row, how);
            }
        }
    }

    /// A stream does not take a subject, and may take all others. After a while the output waits for a person.
    fn subject_refused(&mut self, row: &OutboxRow, stream: Option<&str>, reason: Refusal, why: String) {
        self.breakers.undecided(stream);
        if self.subjects.refused(&row.subject, reason, &why, Instant::now()) {
            self.set_aside(row, why);
        } else {
            self.try_again(row, retry_after(row.failures), why);
        }
    }

    fn try_again(&mut self, row: &OutboxRow, after: Duration, why: String) {
        self.metrics.output(&row.worker, OutputOutcome::Failed);
        self.give_up(row, Unpublished::Later { after, error: Some(why) });
    }

    fn set_aside(&mut self, row: &OutboxRow, reason: String) {
        self.metrics.output(&row.worker, OutputOutcome::SetAside);
        tracing::error!(
            worker = row.worker,
            number = row.seq,
            "an output to {} is set aside until somebody retries or drops it (oncely outbox): {reason}",
            row.subject
        );
        self.give_up(row, Unpublished::Aside { reason });
    }

    fn published(&mut self, row: &OutboxRow, place: PublishedAt, top: u64) {
        self.breakers.succeeded(&place.stream);
        self.subjects.took(&row.subject);
        self.state.published.fetch_add(1, Ordering::Relaxed);
        if place.duplicate {
            fault::witness(fault::DUPLICATE_OUTPUT);
            self.metrics.output(&row.worker, OutputOutcome::Duplicate);
        } else {
            self.metrics.output(&row.worker, OutputOutcome::Published);
            if place.sequence <= top {
                self.state.suspect(&place.stream);
                self.tops.remove(&place.stream);
            }
            let highest = self.tops.entry(place.stream.clone()).or_default();
            *highest = place.sequence.max(*highest);
        }
        self.others_wait |= row.failures > 0 || self.may_hold_its_key(row);
        self.lines.published(row);
        self.ledger.published(Published { seq: row.seq, stream: place.stream, stream_sequence: place.sequence });
    }

    /// Whether others of its key go by polling because this one did, and wait for it: while outputs go by the log.
    fn may_hold_its_key(&self, row: &OutboxRow) -> bool {
        let log_is_used = || matches!(self.state.log_mode(), Some(RelayMode::Wal | RelayMode::Leaving));
        row.ordering_key.is_some() && !self.ledger.is_from_log(row.seq) && log_is_used()
    }

    /// An output leaves unpublished, and those behind it with it.
    fn give_up(&mut self, row: &OutboxRow, how: Unpublished) {
        let behind = self.lines.not_published(row);
        self.ledger.put_back([(row.seq, how)]);
        self.ledger.put_back(behind);
    }

    /// Whether no other host can have taken over what this one leases now.
    fn has_lease(&self) -> bool {
        self.state.lease_since(Instant::now()).is_some()
    }

    fn begin_sweep(&mut self) -> Option<BoxFuture<'static, Result<Swept, StoreError>>> {
        let room = HELD_MAX.saturating_sub(self.lines.len()).min(SWEEP_MAX);
        if room == 0 || !self.bus.can_publish() || !self.has_lease() {
            return None;
        }
        let (store, bus, metrics) = (Arc::clone(&self.store), self.bus.clone(), Arc::clone(&self.metrics));
        let state = Arc::clone(&self.state);
        let streams_as_of =
            if std::mem::take(&mut self.knows_too_little) { STREAMS_AS_OF_AT_LEAST } else { STREAMS_AS_OF };
        Some(Box::pin(async move {
            // No operation of the database is dropped half-way, not even when this host ends.
            let swept = tokio::spawn(poller::sweep(store, bus, metrics, state, room as u32, streams_as_of)).await;
            swept.unwrap_or_else(|error| Err(StoreError::Unavailable(error.into())))
        }))
    }

    /// Takes what a sweep found. Returns whether there may be more.
    fn take_swept(&mut self, swept: Result<Swept, StoreError>) -> bool {
        let swept = match swept {
            Ok(swept) => swept,
            Err(error) => {
                tracing::debug!("sweep again soon: {:#}", anyhow::Error::from(error));
                return false;
            }
        };
        if !swept.streams.is_empty() {
            self.streams = swept.streams;
        }
        self.take_there(swept.there);
        self.ledger.put_back(swept.back);
        self.take(swept.rows, swept.since);
        swept.is_full
    }

    async fn be_a_mutant(&self, row: &OutboxRow) {
        if fault::mutant(fault::CURSOR_BY_SEQ) {
            fault::is_behind(row.seq);
        }
        if fault::mutant(fault::MARK_BEFORE_PUBACK) {
            let place = Published { seq: row.seq, stream: String::new(), stream_sequence: 0 };
            let _ = self.store.mark_published(&[place]).await;
        }
    }
}

/// Waits for what is under way, and takes it out.
async fn finished<T>(under_way: &mut Option<BoxFuture<'static, T>>) -> T {
    let done = match under_way {
        Some(future) => future.await,
        None => std::future::pending().await,
    };
    *under_way = None;
    done
}

/// It may go at once, as far as the database allows.
fn due() -> Unpublished {
    Unpublished::Later { after: Duration::ZERO, error: None }
}

/// How long an output waits after one more failure; the upper half is random.
fn retry_after(failures: u32) -> Duration {
    let most = RETRY_FIRST.saturating_mul(2_u32.saturating_pow(failures)).min(RETRY_MAX);
    most / 2 + (most / 2).mul_f64(rand::random())
}

fn outgoing(row: &OutboxRow) -> Outgoing {
    Outgoing { subject: row.subject.clone(), headers: row.headers.clone(), id: row.id.clone(), body: row.body.clone() }
}
