//! Per-key queues: outputs in memory that may be sent now, and those blocked by others of their
//! key.
//!
//! One output of a key is in flight at a time. Otherwise a stream could refuse the first of two
//! outputs and accept the second. Outputs without a key have no order.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use crate::store::{OutboxRow, Unpublished};

/// How long after the start of its lease an output may still be sent. The lease is longer by the
/// time for an ack and its record.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(20);

/// Maximum number of published outputs that are kept. Outputs from memory check their blockers
/// against these.
const PUBLISHED_MAX: usize = 1 << 16;

/// An output in memory, leased to this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeasedOutput {
    pub row: OutboxRow,
    /// A time before its lease began.
    pub since: Instant,
}

/// Worker and ordering key.
pub type Key = (String, String);

/// The outputs that this host has leased, without an outcome yet.
#[derive(Default)]
pub struct KeyQueues {
    ready: VecDeque<LeasedOutput>,
    /// For each key with an output that is ready or in flight, the later ones.
    waiting: HashMap<Key, VecDeque<LeasedOutput>>,
    /// All outputs that are ready, waiting or in flight.
    leased: HashSet<i64>,
    published: HashSet<i64>,
    published_in_order: VecDeque<i64>,
}

impl KeyQueues {
    /// Number of outputs that are ready, waiting or in flight.
    pub fn len(&self) -> usize {
        self.leased.len()
    }

    pub fn is_empty(&self) -> bool {
        self.leased.is_empty()
    }

    /// Takes leased outputs, in order. Returns those that are blocked by an output of another host.
    /// Outputs with the same blocker continue together.
    pub fn take(&mut self, rows: Vec<OutboxRow>, since: Instant) -> Vec<(i64, Unpublished)> {
        let mut blocked = BTreeMap::new();
        for row in rows {
            match row
                .blocked_by
                .iter()
                .find(|blocker| !self.is_known(**blocker))
            {
                Some(missing) => {
                    let blocker = blocked.get(missing).unwrap_or(missing);
                    blocked.insert(row.seq, *blocker);
                }
                None => self.push(LeasedOutput { row, since }),
            }
        }
        blocked
            .into_iter()
            .map(|(seq, blocker)| (seq, Unpublished::BlockedBy(blocker)))
            .collect()
    }

    /// Whether an output is ready, waiting or in flight.
    pub fn contains(&self, seq: i64) -> bool {
        self.leased.contains(&seq)
    }

    /// Whether this host published an output, or will publish it before later ones of its key.
    fn is_known(&self, seq: i64) -> bool {
        self.leased.contains(&seq) || self.published.contains(&seq)
    }

    fn push(&mut self, output: LeasedOutput) {
        if !self.leased.insert(output.row.seq) {
            return;
        }
        match key(&output.row) {
            None => self.ready.push_back(output),
            Some(key) => match self.waiting.get_mut(&key) {
                Some(queue) => queue.push_back(output),
                None => {
                    self.waiting.insert(key, VecDeque::new());
                    self.ready.push_back(output);
                }
            },
        }
    }

    /// The next output to send. It is in flight until [`KeyQueues::published`] or
    /// [`KeyQueues::unpublished`].
    pub fn next(&mut self) -> Option<LeasedOutput> {
        self.ready.pop_front()
    }

    /// An output was published: the next one of its key becomes ready.
    pub fn published(&mut self, row: &OutboxRow) {
        self.leased.remove(&row.seq);
        let Some(key) = key(row) else { return };
        self.remember_published(row.seq);
        match self.waiting.get_mut(&key).and_then(VecDeque::pop_front) {
            Some(next) => self.ready.push_back(next),
            None => drop(self.waiting.remove(&key)),
        }
    }

    /// Records an output that was found on its stream without being in memory.
    pub fn remember_published(&mut self, seq: i64) {
        if self.published.insert(seq) {
            self.published_in_order.push_back(seq);
        }
        if self.published_in_order.len() > PUBLISHED_MAX
            && let Some(oldest) = self.published_in_order.pop_front()
        {
            self.published.remove(&oldest);
        }
    }

    /// Removes all outputs that are not in flight, and returns them. Used after a stream lost
    /// messages, when the order in memory is no longer valid.
    pub fn reset(&mut self) -> Vec<i64> {
        self.published.clear();
        self.published_in_order.clear();
        let mut left: Vec<i64> = Vec::new();
        for output in std::mem::take(&mut self.ready) {
            left.push(output.row.seq);
            let blocked = key(&output.row)
                .and_then(|key| self.waiting.remove(&key))
                .unwrap_or_default();
            left.extend(blocked.iter().map(|output| output.row.seq));
        }
        // Outputs blocked by one in flight.
        for queue in self.waiting.values_mut() {
            left.extend(std::mem::take(queue).iter().map(|output| output.row.seq));
        }
        for seq in &left {
            self.leased.remove(seq);
        }
        left
    }

    /// An output was not published: it and its blocked outputs are removed. Returns the blocked
    /// ones.
    pub fn unpublished(&mut self, row: &OutboxRow) -> Vec<(i64, Unpublished)> {
        self.leased.remove(&row.seq);
        let blocked = key(row)
            .and_then(|key| self.waiting.remove(&key))
            .unwrap_or_default();
        for output in &blocked {
            self.leased.remove(&output.row.seq);
        }
        blocked
            .into_iter()
            .map(|output| (output.row.seq, wait_for_output(output.row.seq, row.seq)))
            .collect()
    }
}

/// How an output waits for a failed one of its key. An output is blocked only by lower numbers. One
/// with a higher number was written concurrently, without knowledge of this one, and would also
/// wait for it.
pub fn wait_for_output(seq: i64, blocked_by: i64) -> Unpublished {
    if blocked_by < seq {
        Unpublished::BlockedBy(blocked_by)
    } else {
        Unpublished::Later {
            after: Duration::ZERO,
            error: None,
        }
    }
}

impl LeasedOutput {
    /// Whether its lease leaves no time to send it. Another host may lease it next.
    pub fn is_late(&self, now: Instant) -> bool {
        now.duration_since(self.since) > SEND_TIMEOUT
    }
}

/// The key of an output, if it has one.
pub fn key(row: &OutboxRow) -> Option<Key> {
    row.ordering_key
        .as_ref()
        .map(|key| (row.worker.clone(), key.clone()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use jiff::Timestamp;

    use super::*;

    fn row(seq: i64, key: Option<&str>, blocked_by: &[i64]) -> OutboxRow {
        OutboxRow {
            seq,
            id: seq.to_string(),
            worker: "w".to_owned(),
            subject: "out".to_owned(),
            headers: Vec::new(),
            body: Bytes::new(),
            ordering_key: key.map(str::to_owned),
            blocked_by: blocked_by.to_vec(),
            group: None,
            first_attempt_at: Timestamp::UNIX_EPOCH,
            failures: 0,
        }
    }

    fn ready(key_queues: &mut KeyQueues) -> Vec<OutboxRow> {
        std::iter::from_fn(|| key_queues.next())
            .map(|output| output.row)
            .collect()
    }

    fn seqs(rows: &[OutboxRow]) -> Vec<i64> {
        rows.iter().map(|row| row.seq).collect()
    }

    #[test]
    fn one_output_per_key_is_in_flight() {
        let mut key_queues = KeyQueues::default();
        let rows = vec![
            row(1, Some("a"), &[]),
            row(2, Some("a"), &[1]),
            row(3, None, &[]),
            row(4, Some("b"), &[]),
        ];
        assert!(key_queues.take(rows, Instant::now()).is_empty());
        let first = ready(&mut key_queues);
        assert_eq!(seqs(&first), [1, 3, 4]);
        key_queues.published(&first[0]);
        assert_eq!(seqs(&ready(&mut key_queues)), [2]);
        assert_eq!(key_queues.len(), 3);
    }

    #[test]
    fn a_failed_output_removes_later_ones_of_its_key() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(
            vec![
                row(1, Some("a"), &[]),
                row(2, Some("a"), &[1]),
                row(3, Some("a"), &[2]),
            ],
            Instant::now(),
        );
        let first = ready(&mut key_queues).remove(0);
        assert_eq!(
            key_queues.unpublished(&first),
            [
                (2, Unpublished::BlockedBy(1)),
                (3, Unpublished::BlockedBy(1))
            ]
        );
        assert!(key_queues.is_empty());
        // It was written before the database recorded the failure.
        let later = vec![row(4, Some("a"), &[3, 2, 1]), row(5, Some("a"), &[4])];
        assert_eq!(
            key_queues.take(later, Instant::now()),
            [
                (4, Unpublished::BlockedBy(3)),
                (5, Unpublished::BlockedBy(3))
            ]
        );
        assert!(ready(&mut key_queues).is_empty());
    }

    #[test]
    fn outputs_never_wait_for_a_higher_number() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(vec![row(6, Some("a"), &[])], Instant::now());
        key_queues.take(
            vec![row(5, Some("a"), &[]), row(7, Some("a"), &[6])],
            Instant::now(),
        );
        let first = ready(&mut key_queues).remove(0);
        let due = Unpublished::Later {
            after: Duration::ZERO,
            error: None,
        };
        assert_eq!(
            key_queues.unpublished(&first),
            [(5, due), (7, Unpublished::BlockedBy(6))]
        );
    }

    #[test]
    fn outputs_wait_for_other_hosts_but_not_for_published_ones() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(vec![row(1, Some("a"), &[])], Instant::now());
        let first = ready(&mut key_queues).remove(0);
        key_queues.published(&first);
        assert!(
            key_queues
                .take(vec![row(2, Some("a"), &[1])], Instant::now())
                .is_empty()
        );
        assert_eq!(seqs(&ready(&mut key_queues)), [2]);
        assert_eq!(
            key_queues.take(vec![row(7, Some("a"), &[2, 6])], Instant::now()),
            [(7, Unpublished::BlockedBy(6))]
        );
    }

    #[test]
    fn reset_keeps_only_outputs_in_flight() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(
            vec![
                row(1, Some("a"), &[]),
                row(2, Some("a"), &[1]),
                row(3, Some("b"), &[]),
            ],
            Instant::now(),
        );
        let in_flight = key_queues.next().unwrap().row;
        key_queues.take(
            vec![row(4, None, &[]), row(5, Some("b"), &[3])],
            Instant::now(),
        );
        let mut left = key_queues.reset();
        left.sort_unstable();
        assert_eq!(
            (in_flight.seq, left, key_queues.len()),
            (1, vec![2, 3, 4, 5], 1)
        );
        key_queues.published(&in_flight);
        assert!(key_queues.is_empty() && key_queues.next().is_none());
    }

    #[test]
    fn lost_outputs_do_not_wait_for_later_ones() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(vec![row(5, Some("a"), &[])], Instant::now());
        let in_flight = key_queues.next().unwrap().row;
        assert!(key_queues.reset().is_empty());
        key_queues.take(
            vec![row(2, Some("a"), &[]), row(9, Some("a"), &[2])],
            Instant::now(),
        );
        let due = Unpublished::Later {
            after: Duration::ZERO,
            error: None,
        };
        assert_eq!(
            key_queues.unpublished(&in_flight),
            [(2, due), (9, Unpublished::BlockedBy(5))]
        );
    }

    #[test]
    fn an_output_leased_twice_is_sent_once() {
        let mut key_queues = KeyQueues::default();
        key_queues.take(vec![row(1, None, &[])], Instant::now());
        key_queues.take(vec![row(1, None, &[])], Instant::now());
        assert_eq!(seqs(&ready(&mut key_queues)), [1]);
    }
}
