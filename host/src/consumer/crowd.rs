//! How many lanes of a worker deliver at the same time.
//!
//! A transaction holds the locks of its rows until it commits, so lanes whose batches meet at a few rows stand in each other's
//! way: they deadlock, are taken back and run again. Fewer lanes then do more. So each conflict halves how many of them deliver
//! at a time, and a while without one lets one more in.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// After how many batches without a conflict, for each lane that may deliver, one more may.
const CALM_BATCHES: usize = 8;

/// Lets lanes deliver, as many at a time as get on with each other.
pub struct Crowd {
    permits: Arc<Semaphore>,
    most: usize,
    state: Mutex<State>,
}

struct State {
    /// How many lanes may deliver at a time.
    allowed: usize,
    /// How many permits are to be taken out of circulation when they come back.
    surplus: usize,
    /// How many batches went through since the last conflict, or since one more lane was let in.
    calm: usize,
}

/// The right to deliver one batch, given back when it is dropped.
pub struct Turn<'c> {
    crowd: &'c Crowd,
    permit: Option<OwnedSemaphorePermit>,
}

impl Crowd {
    /// For this many lanes.
    pub fn new(most: usize) -> Self {
        let most = most.max(1);
        let state = Mutex::new(State { allowed: most, surplus: 0, calm: 0 });
        Crowd { permits: Arc::new(Semaphore::new(most)), most, state }
    }

    /// Waits until one more lane may deliver.
    pub async fn enter(&self) -> Turn<'_> {
        // Never closed.
        Turn { crowd: self, permit: Arc::clone(&self.permits).acquire_owned().await.ok() }
    }

    /// Whether a lane could enter at once.
    pub fn has_room(&self) -> bool {
        self.permits.available_permits() > 0
    }

    /// Learns how often other transactions stood in the way of a batch.
    pub fn learn(&self, conflicts: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if conflicts > 0 {
            let fewer = (state.allowed / 2).max(1);
            let leave = state.allowed - fewer;
            // Those that lanes hold leave when they come back.
            state.surplus += leave - self.permits.forget_permits(leave);
            (state.allowed, state.calm) = (fewer, 0);
            return;
        }
        state.calm += 1;
        if state.allowed < self.most && state.calm >= CALM_BATCHES * state.allowed {
            (state.allowed, state.calm) = (state.allowed + 1, 0);
            match state.surplus {
                0 => self.permits.add_permits(1),
                _ => state.surplus -= 1,
            }
        }
    }

    /// How many lanes may deliver at a time.
    #[cfg(test)]
    fn allowed(&self) -> usize {
        self.state.lock().unwrap().allowed
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.crowd.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(permit), true) = (self.permit.take(), state.surplus > 0) {
            state.surplus -= 1;
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn conflicts_leave_fewer_lanes_and_calm_brings_them_back() {
        let crowd = Crowd::new(4);
        let mut turns: Vec<Turn> = Vec::new();
        for _ in 0..4 {
            turns.push(crowd.enter().await);
        }
        assert!(crowd.enter().now_or_never().is_none());
        crowd.learn(1);
        assert_eq!(crowd.allowed(), 2);
        turns.truncate(2);
        assert!(crowd.enter().now_or_never().is_none(), "two are as many as may be");
        crowd.learn(3);
        crowd.learn(1);
        assert_eq!(crowd.allowed(), 1, "one always may");
        turns.clear();
        let only = crowd.enter().await;
        assert!(crowd.enter().now_or_never().is_none());
        drop(only);
        for _ in 0..CALM_BATCHES * (1 + 2 + 3) {
            crowd.learn(0);
        }
        assert_eq!(crowd.allowed(), 4);
        let all: Vec<_> = (0..4).map(|_| crowd.enter().now_or_never()).collect();
        assert!(all.iter().all(Option::is_some) && crowd.enter().now_or_never().is_none());
    }

    #[tokio::test]
    async fn what_came_back_into_circulation_meanwhile_does_not_leave_it() {
        let crowd = Crowd::new(2);
        let turns = (crowd.enter().await, crowd.enter().await);
        crowd.learn(1);
        for _ in 0..CALM_BATCHES {
            crowd.learn(0);
        }
        assert_eq!(crowd.allowed(), 2);
        drop(turns);
        let again = (crowd.enter().now_or_never(), crowd.enter().now_or_never());
        assert!(again.0.is_some() && again.1.is_some());
    }
}
