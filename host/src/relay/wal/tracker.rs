//! Tracker of the WAL reader: the position in commit order up to which all outputs have an outcome.

use std::collections::{BTreeSet, HashMap, VecDeque};

use jiff::Timestamp;

use crate::store::{Lsn, Published, Unpublished, WalRecord, WalSnapshot};

/// The outcome of an output from the WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalOutcome {
    Published(Published),
    /// Left to the poller. These outcomes are numbered.
    Poll {
        seq: i64,
        outcome: Unpublished,
        number: u64,
    },
}

/// Maximum number of snapshots. Further ones replace the newest.
const SNAPSHOTS_MAX: usize = 256;

/// A transaction with outputs, or a WAL position without outputs before it.
#[derive(Default)]
struct TrackedTransaction {
    /// `None` while the transaction is incomplete.
    end: Option<Lsn>,
    at: Option<Timestamp>,
    open_count: usize,
    published: Vec<Published>,
    unpublished: Vec<(i64, Unpublished)>,
    numbers: Vec<u64>,
}

/// All received transactions that are not recorded.
#[derive(Default)]
pub struct Tracker {
    transactions: VecDeque<TrackedTransaction>,
    /// Number of transactions removed at the front.
    removed: u64,
    /// Open outputs by number, with the index of their transaction, counted from the first one ever
    /// received.
    open: HashMap<i64, u64>,
    /// Unrecorded polling outcomes by their numbers, and the highest number so far.
    unrecorded: BTreeSet<u64>,
    highest_number: u64,
    position: Lsn,
    until: Option<Timestamp>,
    snapshots: Snapshots,
}

impl Tracker {
    /// Adds an output of the current transaction.
    pub fn output(&mut self, seq: i64) {
        if self
            .transactions
            .back()
            .is_none_or(|transaction| transaction.end.is_some())
        {
            self.transactions.push_back(TrackedTransaction::default());
        }
        let index = self.removed + self.transactions.len() as u64 - 1;
        if let Some(transaction) = self.transactions.back_mut()
            && self.open.insert(seq, index).is_none()
        {
            transaction.open_count += 1;
        }
    }

    /// Completes the current transaction.
    pub fn committed(&mut self, end: Lsn, at: Timestamp) {
        match self.transactions.back_mut() {
            Some(transaction) if transaction.end.is_none() => {
                (transaction.end, transaction.at) = (Some(end), Some(at))
            }
            _ => self.passed(end),
        }
    }

    /// All transactions that end before this position were received.
    pub fn passed(&mut self, end: Lsn) {
        match self.transactions.back_mut() {
            // The position says nothing about the current transaction.
            Some(transaction) if transaction.end.is_none() => {}
            Some(transaction) if transaction.at.is_none() => {
                transaction.end = transaction.end.max(Some(end))
            }
            _ => self.transactions.push_back(TrackedTransaction {
                end: Some(end),
                ..TrackedTransaction::default()
            }),
        }
    }

    /// Applies an outcome. An unknown output was received by an earlier reader.
    pub fn on_outcome(&mut self, outcome: WalOutcome) {
        let seq = match &outcome {
            WalOutcome::Published(published) => published.seq,
            WalOutcome::Poll { seq, .. } => *seq,
        };
        if let WalOutcome::Poll { number, .. } = outcome {
            self.highest_number = self.highest_number.max(number);
        }
        let Some(index) = self.open.remove(&seq) else {
            return;
        };
        let transaction = index
            .checked_sub(self.removed)
            .and_then(|index| self.transactions.get_mut(usize::try_from(index).ok()?));
        let Some(transaction) = transaction else {
            return;
        };
        transaction.open_count -= 1;
        match outcome {
            WalOutcome::Published(published) => transaction.published.push(published),
            WalOutcome::Poll {
                seq,
                outcome,
                number,
            } => {
                transaction.unpublished.push((seq, outcome));
                transaction.numbers.push(number);
                self.unrecorded.insert(number);
            }
        }
    }

    /// Whether there are outcomes to record.
    pub fn has_outcomes(&self) -> bool {
        self.transactions
            .front()
            .is_some_and(|transaction| transaction.is_complete() && transaction.at.is_some())
    }

    /// The position up to which all outputs have an outcome.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The number up to which all polling outcomes are recorded.
    pub fn recorded(&self) -> u64 {
        self.unrecorded
            .first()
            .map_or(self.highest_number, |first| first - 1)
    }

    /// Takes completed transactions until the record has at least `max` outputs. Also returns the
    /// numbers for [`Tracker::written`].
    pub fn take(&mut self, max: usize) -> (WalRecord, Vec<u64>) {
        let mut record = WalRecord::default();
        let mut numbers = Vec::new();
        while record.published.len() + record.released.len() < max
            && self
                .transactions
                .front()
                .is_some_and(TrackedTransaction::is_complete)
            && let Some(mut transaction) = self.transactions.pop_front()
        {
            self.removed += 1;
            self.position = self.position.max(transaction.end.unwrap_or_default());
            self.until = self.until.max(transaction.at);
            record.published.append(&mut transaction.published);
            record.released.append(&mut transaction.unpublished);
            numbers.append(&mut transaction.numbers);
        }
        record.position = self.position;
        (record.through, record.until) = self.snapshots.passed(self.position);
        record.until = record.until.max(self.until);
        (record, numbers)
    }

    /// Confirms a record. The snapshot is the state of the database at that time.
    pub fn written(&mut self, numbers: &[u64], snapshot: WalSnapshot) {
        for number in numbers {
            self.unrecorded.remove(number);
        }
        self.snapshots.add(snapshot);
    }
}

impl TrackedTransaction {
    fn is_complete(&self) -> bool {
        self.end.is_some() && self.open_count == 0
    }
}

/// Snapshots of the database at several times, and the conclusions for a position in the WAL.
#[derive(Default)]
struct Snapshots {
    /// Commits before a time have WAL positions before the given one.
    times: VecDeque<(Timestamp, Lsn)>,
    /// Outputs up to a number belong to transactions before the given id.
    numbers: VecDeque<(i64, u64)>,
    /// Outputs up to a number have WAL positions before the given one, or were rolled back.
    placed: VecDeque<(i64, Lsn)>,
}

impl Snapshots {
    fn add(&mut self, snapshot: WalSnapshot) {
        while let Some((number, _)) = self
            .numbers
            .front()
            .copied()
            .filter(|(_, next)| *next <= snapshot.ended)
        {
            self.numbers.pop_front();
            push(&mut self.placed, (number, snapshot.end));
        }
        push(&mut self.times, (snapshot.at, snapshot.end));
        push(&mut self.numbers, (snapshot.last_output, snapshot.next));
    }

    /// The output number and the time up to which all outputs have an outcome.
    fn passed(&mut self, position: Lsn) -> (Option<i64>, Option<Timestamp>) {
        (
            take_passed(&mut self.placed, position),
            take_passed(&mut self.times, position),
        )
    }
}

/// Adds an entry. A full list drops its newest one, because the new entry covers it.
fn push<T>(entries: &mut VecDeque<T>, entry: T) {
    if entries.len() >= SNAPSHOTS_MAX {
        entries.pop_back();
    }
    entries.push_back(entry);
}

fn take_passed<T>(entries: &mut VecDeque<(T, Lsn)>, position: Lsn) -> Option<T> {
    let mut last = None;
    while entries.front().is_some_and(|(_, end)| *end <= position) {
        last = entries.pop_front().map(|(value, _)| value);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn published(seq: i64) -> WalOutcome {
        WalOutcome::Published(Published {
            seq,
            stream: "S".to_owned(),
            stream_sequence: seq as u64,
        })
    }

    fn poll_outcome(seq: i64, number: u64) -> WalOutcome {
        WalOutcome::Poll {
            seq,
            outcome: Unpublished::BlockedBy(1),
            number,
        }
    }

    fn snapshot(second: i64, end: Lsn, last_output: i64, ended: u64, next: u64) -> WalSnapshot {
        WalSnapshot {
            at: at(second),
            end,
            last_output,
            ended,
            next,
        }
    }

    #[test]
    fn position_stops_before_the_first_open_output() {
        let mut tracker = Tracker::default();
        for (seq, end) in [(1, 10), (2, 20), (3, 30)] {
            tracker.output(seq);
            tracker.committed(end, at(end as i64));
        }
        tracker.on_outcome(published(1));
        tracker.on_outcome(published(3));
        let (record, _) = tracker.take(100);
        assert_eq!(
            (record.position, record.published.len(), record.until),
            (10, 1, Some(at(10)))
        );
        assert!(!tracker.has_outcomes());
        tracker.on_outcome(published(2));
        let (record, _) = tracker.take(100);
        assert_eq!(
            (record.position, record.published.len(), tracker.open.len()),
            (30, 2, 0)
        );
    }

    #[test]
    fn passed_positions_wait_for_earlier_transactions() {
        let mut tracker = Tracker::default();
        tracker.passed(5);
        assert_eq!(tracker.take(100).0.position, 5);
        tracker.output(1);
        // Within a transaction it says nothing about it.
        tracker.passed(9);
        tracker.committed(10, at(1));
        tracker.passed(15);
        tracker.passed(16);
        assert_eq!(tracker.take(100).0.position, 5);
        tracker.on_outcome(published(1));
        assert_eq!(tracker.take(100).0.position, 16);
        // A transaction whose outputs all had an outcome before.
        tracker.committed(20, at(2));
        assert_eq!(tracker.take(100).0.position, 20);
    }

    #[test]
    fn recorded_stops_before_the_first_unrecorded_outcome() {
        let mut tracker = Tracker::default();
        for (seq, end) in [(1, 10), (2, 20)] {
            tracker.output(seq);
            tracker.committed(end, at(1));
        }
        tracker.on_outcome(poll_outcome(2, 1));
        tracker.on_outcome(poll_outcome(1, 2));
        assert_eq!(tracker.recorded(), 0);
        let (record, numbers) = tracker.take(1);
        assert_eq!(
            (record.released.len(), numbers.as_slice()),
            (1, [2].as_slice())
        );
        tracker.written(&numbers, snapshot(1, 1, 1, 1, 1));
        assert_eq!(tracker.recorded(), 0);
        let (_, numbers) = tracker.take(1);
        tracker.written(&numbers, snapshot(1, 1, 1, 1, 1));
        assert_eq!(tracker.recorded(), 2);
        // For an output of an earlier reader.
        tracker.on_outcome(poll_outcome(7, 3));
        assert_eq!(tracker.recorded(), 3);
    }

    #[test]
    fn numbers_are_complete_once_their_transactions_ended() {
        let mut snapshots = Snapshots::default();
        snapshots.add(snapshot(1, 100, 7, 40, 50));
        assert_eq!(snapshots.passed(100), (None, Some(at(1))));
        // One transaction is still running.
        snapshots.add(snapshot(2, 200, 9, 49, 60));
        assert_eq!(snapshots.passed(200), (None, Some(at(2))));
        snapshots.add(snapshot(3, 300, 9, 50, 70));
        assert_eq!(snapshots.passed(299), (None, None));
        assert_eq!(snapshots.passed(300), (Some(7), Some(at(3))));
    }

    #[test]
    fn snapshots_are_bounded() {
        let mut snapshots = Snapshots::default();
        for number in 0..1_000 {
            snapshots.add(snapshot(number, 10_000 + number as u64, number, 0, 1));
        }
        assert_eq!(
            (snapshots.numbers.len(), snapshots.times.len()),
            (SNAPSHOTS_MAX, SNAPSHOTS_MAX)
        );
        snapshots.add(snapshot(1_000, 20_000, 1_000, 1, 2));
        assert_eq!(snapshots.passed(20_000).0, Some(999));
    }
}
