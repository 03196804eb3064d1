//! Adaptive limit of the lanes of a worker that deliver at the same time.
//!
//! A transaction holds its row locks until it commits. Lanes whose batches write the same rows
//! deadlock, roll back and run again. Fewer lanes then have a higher throughput. Therefore each
//! conflict halves the limit, and a period without conflicts raises it by one. PostgreSQL takes a
//! second to find a deadlock, so a rise that fails is expensive: after each one, the next rise
//! waits twice as long.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Number of batches without a conflict, multiplied by the limit, that raises the limit by one: at
/// first, and at most.
const PATIENCE_MIN: usize = 8;
const PATIENCE_MAX: usize = 4_096;

/// Limits the number of lanes that deliver at the same time.
pub struct ConcurrencyLimit {
    permits: Arc<Semaphore>,
    max: usize,
    state: Mutex<State>,
}

struct State {
    /// Current limit.
    limit: usize,
    /// Number of permits to remove when lanes return them.
    excess: usize,
    /// Number of batches since the last conflict or the last increase.
    calm_batches: usize,
    /// Calm batches per lane before the next increase. Conflicts double it, calm at the maximum
    /// halves it.
    patience: usize,
}

/// Permission to deliver one batch, until dropped.
pub struct Permit<'c> {
    concurrency_limit: &'c ConcurrencyLimit,
    permit: Option<OwnedSemaphorePermit>,
}

impl ConcurrencyLimit {
    /// A limit that starts at `max` lanes, which is also its maximum.
    pub fn new(max: usize) -> Self {
        let max = max.max(1);
        let state = Mutex::new(State {
            limit: max,
            excess: 0,
            calm_batches: 0,
            patience: PATIENCE_MIN,
        });
        ConcurrencyLimit {
            permits: Arc::new(Semaphore::new(max)),
            max,
            state,
        }
    }

    /// Waits until one more lane may deliver.
    pub async fn acquire(&self) -> Permit<'_> {
        // The semaphore is never closed.
        Permit {
            concurrency_limit: self,
            permit: Arc::clone(&self.permits).acquire_owned().await.ok(),
        }
    }

    /// Whether a permit is available at once.
    pub fn has_permit(&self) -> bool {
        self.permits.available_permits() > 0
    }

    /// Records the number of conflicts of a batch.
    pub fn record_conflicts(&self, conflicts: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if conflicts > 0 {
            let fewer = (state.limit / 2).max(1);
            let leave = state.limit - fewer;
            // Permits that lanes hold are removed when they are returned.
            state.excess += leave - self.permits.forget_permits(leave);
            // A conflict of a single lane is one with another host, or of a lane that still ran.
            if leave > 0 {
                state.patience = (state.patience * 2).min(PATIENCE_MAX);
            }
            (state.limit, state.calm_batches) = (fewer, 0);
            return;
        }

        state.calm_batches += 1;
        if state.calm_batches < state.patience * state.limit {
            return;
        }
        state.calm_batches = 0;
        if state.limit == self.max {
            state.patience = (state.patience / 2).max(PATIENCE_MIN);
            return;
        }
        state.limit += 1;
        match state.excess {
            0 => self.permits.add_permits(1),
            _ => state.excess -= 1,
        }
    }

    /// The current limit, and how many lanes deliver.
    pub fn usage(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let issued = state.limit + state.excess;
        (
            state.limit,
            issued.saturating_sub(self.permits.available_permits()),
        )
    }

    /// The current limit.
    #[cfg(test)]
    fn limit(&self) -> usize {
        self.state.lock().unwrap().limit
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = self
            .concurrency_limit
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let (Some(permit), true) = (self.permit.take(), state.excess > 0) {
            state.excess -= 1;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn conflicts_halve_the_limit_and_calm_batches_raise_it() {
        let concurrency_limit = ConcurrencyLimit::new(4);
        let mut permits: Vec<Permit> = Vec::new();
        for _ in 0..4 {
            permits.push(concurrency_limit.acquire().await);
        }
        assert!(concurrency_limit.acquire().now_or_never().is_none());
        assert_eq!(concurrency_limit.usage(), (4, 4));
        concurrency_limit.record_conflicts(1);
        assert_eq!(concurrency_limit.usage(), (2, 4), "four still deliver");
        permits.truncate(2);
        assert_eq!(concurrency_limit.usage(), (2, 2));
        assert!(
            concurrency_limit.acquire().now_or_never().is_none(),
            "a third lane delivers"
        );
        concurrency_limit.record_conflicts(3);
        concurrency_limit.record_conflicts(1);
        assert_eq!(concurrency_limit.limit(), 1, "the minimum is one lane");
        permits.clear();
        let only = concurrency_limit.acquire().await;
        assert!(concurrency_limit.acquire().now_or_never().is_none());
        drop(only);
        let calm = |batches: usize| {
            (0..batches).for_each(|_| concurrency_limit.record_conflicts(0));
            concurrency_limit.limit()
        };
        // Two of the conflicts lowered the limit, so each rise takes four times as long.
        assert_eq!(calm(4 * PATIENCE_MIN - 1), 1);
        assert_eq!(calm(1), 2);
        assert_eq!(calm(4 * PATIENCE_MIN * (2 + 3)), 4);
        let all: Vec<_> = (0..4)
            .map(|_| concurrency_limit.acquire().now_or_never())
            .collect();
        assert!(
            all.iter().all(Option::is_some) && concurrency_limit.acquire().now_or_never().is_none()
        );
    }

    #[tokio::test]
    async fn permits_added_back_stay_in_circulation() {
        let concurrency_limit = ConcurrencyLimit::new(2);
        let permits = (
            concurrency_limit.acquire().await,
            concurrency_limit.acquire().await,
        );
        concurrency_limit.record_conflicts(1);
        for _ in 0..2 * PATIENCE_MIN {
            concurrency_limit.record_conflicts(0);
        }
        assert_eq!(concurrency_limit.limit(), 2);
        drop(permits);
        let again = (
            concurrency_limit.acquire().now_or_never(),
            concurrency_limit.acquire().now_or_never(),
        );
        assert!(again.0.is_some() && again.1.is_some());
    }

    #[tokio::test]
    async fn calm_at_the_maximum_makes_rises_quick_again() {
        let concurrency_limit = ConcurrencyLimit::new(2);
        let calm = |batches: usize| {
            (0..batches).for_each(|_| concurrency_limit.record_conflicts(0));
            concurrency_limit.limit()
        };
        concurrency_limit.record_conflicts(1);
        assert_eq!(calm(2 * PATIENCE_MIN), 2);
        // The patience is back at its minimum after as many calm batches of two lanes.
        calm(2 * 2 * PATIENCE_MIN);
        concurrency_limit.record_conflicts(1);
        assert_eq!((calm(2 * PATIENCE_MIN - 1), calm(1)), (1, 2));
    }
}
