//! How many messages a lane puts into one transaction, and how carefully.

use std::time::Duration;

use crate::delivery::Savepoints;

/// For how many batches a lane stays careful after one that had members which failed after they ran SQL.
const SAVEPOINT_BATCHES: u32 = 16;

/// How long a transaction may take. Longer ones would hold their locks for long, and the first of its messages would wait for
/// the last; shorter ones would not make commits any cheaper.
const TRANSACTION_TIME: Duration = Duration::from_millis(500);

/// A batch size that follows what batches come to: half as many after one that had to be run again because of some of its
/// members, one more after one that went well, and fewer where handlers are slow. It never makes a lane wait: it only bounds
/// what is taken of what is there.
#[derive(Debug)]
pub struct AdaptiveBatchSize {
    size: usize,
    max: usize,
    /// How many messages fit into the time of a transaction, by what the last batches took.
    fitting: f64,
    /// How many more batches to be careful with.
    savepoint_batches: u32,
}

impl AdaptiveBatchSize {
    pub fn new(max: usize) -> Self {
        AdaptiveBatchSize {
            size: max.max(1),
            max: max.max(1),
            fitting: max as f64,
            savepoint_batches: 0,
        }
    }

    pub fn current(&self) -> usize {
        self.size.min(self.fitting.round() as usize).max(1)
    }

    /// A savepoint per item while items are likely to fail after they ran SQL: it costs less than another run of their
    /// neighbours.
    pub fn savepoints(&self) -> Savepoints {
        match self.savepoint_batches {
            0 => Savepoints::None,
            _ => Savepoints::PerItem,
        }
    }

    /// Learns how long a batch of `messages` took.
    pub fn record_time(&mut self, messages: usize, time: Duration) {
        let fitting =
            messages as f64 * TRANSACTION_TIME.as_secs_f64() / time.as_secs_f64().max(1e-6);
        // Quick to shrink, slow to grow: one quick batch among slow ones says little.
        let weight = if fitting < self.fitting { 0.5 } else { 0.1 };
        self.fitting += (fitting.min(self.max as f64) - self.fitting) * weight;
    }

    /// Learns how often members of a batch had to be run again, and how many were taken back to a savepoint.
    pub fn record_reruns(&mut self, reruns: u32, undone: u32) {
        self.size = match reruns {
            0 => (self.size + 1).min(self.max),
            _ => (self.size / 2).max(1),
        };
        self.savepoint_batches = match reruns + undone {
            0 => self.savepoint_batches.saturating_sub(1),
            _ => SAVEPOINT_BATCHES,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_by_half_and_grow_by_one() {
        let mut batch_size = AdaptiveBatchSize::new(32);
        let mut after = |reruns| {
            batch_size.record_reruns(reruns, 0);
            batch_size.current()
        };
        assert_eq!(
            [after(0), after(1), after(0), after(3), after(0)],
            [32, 16, 17, 8, 9]
        );
        assert_eq!((0..5).map(|_| after(1)).last(), Some(1));
        assert_eq!((0..99).map(|_| after(0)).last(), Some(32));
    }

    #[test]
    fn batch_size_follows_the_time_of_handlers() {
        let mut batch_size = AdaptiveBatchSize::new(32);
        let each = |batch_size: &mut AdaptiveBatchSize, time: Duration| {
            for _ in 0..100 {
                batch_size.record_time(
                    batch_size.current(),
                    time * u32::try_from(batch_size.current()).unwrap(),
                );
            }
            batch_size.current()
        };
        assert_eq!(each(&mut batch_size, Duration::from_millis(1)), 32);
        assert_eq!(each(&mut batch_size, Duration::from_millis(50)), 10);
        assert_eq!(each(&mut batch_size, Duration::from_secs(3)), 1);
        assert_eq!(each(&mut batch_size, Duration::from_micros(10)), 32);
    }

    #[test]
    fn savepoints_are_used_for_a_while_after_an_item_failed() {
        let mut batch_size = AdaptiveBatchSize::new(32);
        let mut after = |reruns, undone| {
            batch_size.record_reruns(reruns, undone);
            batch_size.savepoints()
        };
        assert_eq!(
            [after(0, 0), after(1, 0), after(0, 0), after(0, 2)],
            [
                Savepoints::None,
                Savepoints::PerItem,
                Savepoints::PerItem,
                Savepoints::PerItem
            ]
        );
        assert_eq!(
            (0..16)
                .filter(|_| after(0, 0) == Savepoints::PerItem)
                .count(),
            15
        );
    }
}
