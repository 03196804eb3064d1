//! What the reader was told of and what became of it: how far everything is through, in the order of the commits.

use std::collections::{BTreeSet, HashMap, VecDeque};

use jiff::Timestamp;

use crate::store::{LogMark, LogRecord, Lsn, Published, Unpublished};

/// What became of an output from the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Published(Published),
    /// It is to go by polling. These are counted.
    Back {
        seq: i64,
        how: Unpublished,
        number: u64,
    },
}

/// How many marks are remembered at most; the older ones say the same with less.
const MARKS_MAX: usize = 256;

/// A transaction with outputs, or a place in the log with nothing before it that is not told.
#[derive(Default)]
struct Told {
    /// None while more of it may come.
    end: Option<Lsn>,
    at: Option<Timestamp>,
    left: usize,
    published: Vec<Published>,
    back: Vec<(i64, Unpublished)>,
    numbers: Vec<u64>,
}

/// All that is told and not recorded.
#[derive(Default)]
pub struct Tracker {
    told: VecDeque<Told>,
    /// How many left at the front.
    gone: u64,
    /// In which of all that was told, counted from the first, an output is that nothing is known of yet.
    open: HashMap<i64, u64>,
    /// Outcomes that ask for polling and are not recorded, by their numbers; and the highest number so far.
    unrecorded: BTreeSet<u64>,
    heard: u64,
    position: Lsn,
    until: Option<Timestamp>,
    marks: Marks,
}

impl Tracker {
    /// One more output of the transaction that is being told.
    pub fn output(&mut self, seq: i64) {
        if self.told.back().is_none_or(|told| told.end.is_some()) {
            self.told.push_back(Told::default());
        }
        let index = self.gone + self.told.len() as u64 - 1;
        if let Some(told) = self.told.back_mut()
            && self.open.insert(seq, index).is_none()
        {
            told.left += 1;
        }
    }

    /// The transaction is told.
    pub fn committed(&mut self, end: Lsn, at: Timestamp) {
        match self.told.back_mut() {
            Some(told) if told.end.is_none() => (told.end, told.at) = (Some(end), Some(at)),
            _ => self.passed(end),
        }
    }

    /// Whatever ended before was told.
    pub fn passed(&mut self, end: Lsn) {
        match self.told.back_mut() {
            // It says nothing of the transaction that is being told.
            Some(told) if told.end.is_none() => {}
            Some(told) if told.at.is_none() => told.end = told.end.max(Some(end)),
            _ => self.told.push_back(Told { end: Some(end), ..Told::default() }),
        }
    }

    /// What became of an output. Of one that is not known, it was told to an earlier reader.
    pub fn heard(&mut self, outcome: Outcome) {
        let seq = match &outcome {
            Outcome::Published(place) => place.seq,
            Outcome::Back { seq, .. } => *seq,
        };
        if let Outcome::Back { number, .. } = outcome {
            self.heard = self.heard.max(number);
        }
        let Some(index) = self.open.remove(&seq) else { return };
        let told = index.checked_sub(self.gone).and_then(|index| self.told.get_mut(usize::try_from(index).ok()?));
        let Some(told) = told else { return };
        told.left -= 1;
        match outcome {
            Outcome::Published(place) => told.published.push(place),
            Outcome::Back { seq, how, number } => {
                told.back.push((seq, how));
                told.numbers.push(number);
                self.unrecorded.insert(number);
            }
        }
    }

    /// Whether there are outputs to be recorded.
    pub fn has_outcomes(&self) -> bool {
        self.told.front().is_some_and(|told| told.is_through() && told.at.is_some())
    }

    /// How far everything is through.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// All outcomes that ask for polling are in the database up to this number.
    pub fn recorded(&self) -> u64 {
        self.unrecorded.first().map_or(self.heard, |first| first - 1)
    }

    /// Takes what is through, with as many outputs as go into a record; and the numbers for [`Tracker::written`].
    pub fn take(&mut self, most: usize) -> (LogRecord, Vec<u64>) {
        let mut record = LogRecord::default();
        let mut numbers = Vec::new();
        while record.published.len() + record.back.len() < most
            && self.told.front().is_some_and(Told::is_through)
            && let Some(mut told) = self.told.pop_front()
        {
            self.gone += 1;
            self.position = self.position.max(told.end.unwrap_or_default());
            self.until = self.until.max(told.at);
            record.published.append(&mut told.published);
            record.back.append(&mut told.back);
            numbers.append(&mut told.numbers);
        }
        record.position = self.position;
        (record.through, record.until) = self.marks.passed(self.position);
        record.until = record.until.max(self.until);
        (record, numbers)
    }

    /// A record is in the database, which was like this then.
    pub fn written(&mut self, numbers: &[u64], mark: LogMark) {
        for number in numbers {
            self.unrecorded.remove(number);
        }
        self.marks.add(mark);
    }
}

impl Told {
    fn is_through(&self) -> bool {
        self.end.is_some() && self.left == 0
    }
}

/// What was true of the database at several moments, and what follows for a position in the log.
#[derive(Default)]
struct Marks {
    /// What committed before a time stands before a place.
    times: VecDeque<(Timestamp, Lsn)>,
    /// Outputs with numbers up to the first are of transactions before the second.
    numbers: VecDeque<(i64, u64)>,
    /// Outputs with numbers up to the first stand before a place, or nowhere.
    placed: VecDeque<(i64, Lsn)>,
}

impl Marks {
    fn add(&mut self, mark: LogMark) {
        while let Some((number, _)) = self.numbers.front().copied().filter(|(_, next)| *next <= mark.ended) {
            self.numbers.pop_front();
            push(&mut self.placed, (number, mark.end));
        }
        push(&mut self.times, (mark.at, mark.end));
        push(&mut self.numbers, (mark.last_output, mark.next));
    }

    /// Which outputs are through, by number, and until which time.
    fn passed(&mut self, position: Lsn) -> (Option<i64>, Option<Timestamp>) {
        (take_passed(&mut self.placed, position), take_passed(&mut self.times, position))
    }
}

/// Adds a mark; of too many, one is as good as the one before.
fn push<T>(marks: &mut VecDeque<T>, mark: T) {
    if marks.len() >= MARKS_MAX {
        marks.pop_back();
    }
    marks.push_back(mark);
}

fn take_passed<T>(marks: &mut VecDeque<(T, Lsn)>, position: Lsn) -> Option<T> {
    let mut last = None;
    while marks.front().is_some_and(|(_, place)| *place <= position) {
        last = marks.pop_front().map(|(what, _)| what);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn published(seq: i64) -> Outcome {
        Outcome::Published(Published { seq, stream: "S".to_owned(), stream_sequence: seq as u64 })
    }

    fn back(seq: i64, number: u64) -> Outcome {
        Outcome::Back { seq, how: Unpublished::Behind(1), number }
    }

    fn mark(second: i64, end: Lsn, last_output: i64, ended: u64, next: u64) -> LogMark {
        LogMark { at: at(second), end, last_output, ended, next }
    }

    #[test]
    fn the_position_stops_before_the_first_output_without_an_answer() {
        let mut tracker = Tracker::default();
        for (seq, end) in [(1, 10), (2, 20), (3, 30)] {
            tracker.output(seq);
            tracker.committed(end, at(end as i64));
        }
        tracker.heard(published(1));
        tracker.heard(published(3));
        let (record, _) = tracker.take(100);
        assert_eq!((record.position, record.published.len(), record.until), (10, 1, Some(at(10))));
        assert!(!tracker.has_outcomes());
        tracker.heard(published(2));
        let (record, _) = tracker.take(100);
        assert_eq!((record.position, record.published.len(), tracker.open.len()), (30, 2, 0));
    }

    #[test]
    fn what_is_passed_counts_only_after_all_that_was_told_before() {
        let mut tracker = Tracker::default();
        tracker.passed(5);
        assert_eq!(tracker.take(100).0.position, 5);
        tracker.output(1);
        // In the middle of a transaction it says nothing of it.
        tracker.passed(9);
        tracker.committed(10, at(1));
        tracker.passed(15);
        tracker.passed(16);
        assert_eq!(tracker.take(100).0.position, 5);
        tracker.heard(published(1));
        assert_eq!(tracker.take(100).0.position, 16);
        // A transaction whose outputs were all through before.
        tracker.committed(20, at(2));
        assert_eq!(tracker.take(100).0.position, 20);
    }

    #[test]
    fn outcomes_that_ask_for_polling_are_known_once_all_before_them_are() {
        let mut tracker = Tracker::default();
        for (seq, end) in [(1, 10), (2, 20)] {
            tracker.output(seq);
            tracker.committed(end, at(1));
        }
        tracker.heard(back(2, 1));
        tracker.heard(back(1, 2));
        assert_eq!(tracker.recorded(), 0);
        let (record, numbers) = tracker.take(1);
        assert_eq!((record.back.len(), numbers.as_slice()), (1, [2].as_slice()));
        tracker.written(&numbers, mark(1, 1, 1, 1, 1));
        assert_eq!(tracker.recorded(), 0);
        let (_, numbers) = tracker.take(1);
        tracker.written(&numbers, mark(1, 1, 1, 1, 1));
        assert_eq!(tracker.recorded(), 2);
        // Of an output that an earlier reader was told of.
        tracker.heard(back(7, 3));
        assert_eq!(tracker.recorded(), 3);
    }

    #[test]
    fn numbers_are_through_once_whoever_was_given_one_has_ended_before_the_position() {
        let mut marks = Marks::default();
        marks.add(mark(1, 100, 7, 40, 50));
        assert_eq!(marks.passed(100), (None, Some(at(1))));
        // One of them still runs.
        marks.add(mark(2, 200, 9, 49, 60));
        assert_eq!(marks.passed(200), (None, Some(at(2))));
        marks.add(mark(3, 300, 9, 50, 70));
        assert_eq!(marks.passed(299), (None, None));
        assert_eq!(marks.passed(300), (Some(7), Some(at(3))));
    }

    #[test]
    fn too_many_marks_cost_precision_and_no_memory() {
        let mut marks = Marks::default();
        for number in 0..1_000 {
            marks.add(mark(number, 10_000 + number as u64, number, 0, 1));
        }
        assert_eq!((marks.numbers.len(), marks.times.len()), (MARKS_MAX, MARKS_MAX));
        marks.add(mark(1_000, 20_000, 1_000, 1, 2));
        assert_eq!(marks.passed(20_000).0, Some(999));
    }
}
