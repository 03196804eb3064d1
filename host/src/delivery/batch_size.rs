//! Adaptive batch size: the number of messages or requests of a transaction, and whether they get
//! savepoints.

use std::time::Duration;

use crate::delivery::Savepoints;

/// Number of batches with savepoints after a batch with items that failed after they ran SQL.
const SAVEPOINT_BATCHES: u32 = 16;

/// Target duration of a batch of messages. Longer ones would hold their locks for long and delay
/// their first message until the last one is done. Shorter ones would not make commits cheaper.
pub const BATCH_TIME: Duration = Duration::from_millis(500);

/// Target duration of the handlers of grouped requests, whose callers wait.
pub const REQUESTS_TIME: Duration = Duration::from_millis(10);

/// A batch size that adapts to the results of batches. It is halved after a batch with reruns,
/// grows by one after a batch without, and shrinks for slow handlers. It never makes a lane wait.
/// It only limits the number of available messages that a batch takes.
#[derive(Debug)]
pub struct AdaptiveBatchSize {
    size: usize,
    max: usize,
    /// The target duration.
    time: Duration,
    /// Number of messages that fit into the target duration, estimated from the last batches.
    fitting: f64,
    /// Number of remaining batches with savepoints.
    savepoint_batches: u32,
}

impl AdaptiveBatchSize {
    /// Starts at the maximum. Batches are to take `time` at most.
    pub fn new(max: usize, time: Duration) -> Self {
        AdaptiveBatchSize {
            size: max.max(1),
            max: max.max(1),
            time,
            fitting: max as f64,
            savepoint_batches: 0,
        }
    }

    /// The size of the next batch, at least 1.
    pub fn current(&self) -> usize {
        self.size.min(self.fitting.round() as usize).max(1)
    }

    /// Like [`AdaptiveBatchSize::current`], for a batch that may take longer than usual.
    pub fn within(&self, time: Duration) -> usize {
        let longer = time.as_secs_f64() / self.time.as_secs_f64();
        let fitting = self.fitting * longer.max(1.0);
        self.size.min(fitting.round() as usize).max(1)
    }

    /// How long one message or request is expected to take.
    pub fn expected(&self) -> Duration {
        self.time.div_f64(self.fitting.max(1e-3))
    }

    /// A savepoint per item while items are likely to fail after they ran SQL. It costs less than a
    /// rerun of the others.
    pub fn savepoints(&self) -> Savepoints {
        match self.savepoint_batches {
            0 => Savepoints::None,
            _ => Savepoints::PerItem,
        }
    }

    /// Records the duration of a batch of `messages`.
    pub fn record_time(&mut self, messages: usize, time: Duration) {
        let fitting = messages as f64 * self.time.as_secs_f64() / time.as_secs_f64().max(1e-6);
        // Shrinks quickly and grows slowly, because one quick batch among slow ones is weak
        // evidence.
        let weight = if fitting < self.fitting { 0.5 } else { 0.1 };
        self.fitting += (fitting.min(self.max as f64) - self.fitting) * weight;
    }

    /// Records the number of reruns of a batch, and of items that were rolled back to a savepoint.
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
        let mut batch_size = AdaptiveBatchSize::new(32, BATCH_TIME);
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
        let mut batch_size = AdaptiveBatchSize::new(32, BATCH_TIME);
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
        let within = |time| batch_size.within(Duration::from_millis(time));
        assert_eq!([within(100), within(1_000), within(9_000)], [10, 20, 32]);
        assert_eq!(each(&mut batch_size, Duration::from_secs(3)), 1);
        assert_eq!(each(&mut batch_size, Duration::from_micros(10)), 32);
    }

    #[test]
    fn savepoints_are_used_for_a_while_after_an_item_failed() {
        let mut batch_size = AdaptiveBatchSize::new(32, BATCH_TIME);
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
