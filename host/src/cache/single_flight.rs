//! Single flight: of all concurrent misses of a key one caller loads, and the others wait for its
//! outcome.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::local::Entry;
use super::{CacheKey, Layer, LoadError};

#[derive(Clone, Default)]
pub(super) struct SingleFlight(Arc<Mutex<InFlight>>);

#[derive(Default)]
struct InFlight {
    next: u64,
    by_key: HashMap<CacheKey, (u64, FlightWaiter)>,
}

/// The outcome of a flight.
#[derive(Debug, Clone)]
pub(super) enum LoadOutcome {
    Cached(Arc<Entry>, Layer),
    /// For the leader alone.
    Uncached(Bytes),
    Failed(LoadError),
}

/// The role of a caller in the flight of a key.
pub(super) enum FlightRole {
    /// No flight was open: the caller has to fetch or load.
    Leader(SingleFlightGuard, FlightWaiter),
    Follower(FlightWaiter),
}

/// Waits for the outcome of a flight.
#[derive(Clone)]
pub(super) struct FlightWaiter(watch::Receiver<Option<LoadOutcome>>);

/// An open flight, which ends with [`SingleFlightGuard::finish`] or on drop.
pub(super) struct SingleFlightGuard {
    single_flight: SingleFlight,
    key: CacheKey,
    number: u64,
    sender: watch::Sender<Option<LoadOutcome>>,
}

impl SingleFlight {
    pub fn join(&self, key: &CacheKey) -> FlightRole {
        let mut in_flight = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, waiter)) = in_flight.by_key.get(key) {
            return FlightRole::Follower(waiter.clone());
        }
        let (sender, receiver) = watch::channel(None);
        let (number, waiter) = (in_flight.next, FlightWaiter(receiver));
        in_flight.next += 1;
        in_flight
            .by_key
            .insert(key.clone(), (number, waiter.clone()));
        FlightRole::Leader(
            SingleFlightGuard {
                single_flight: self.clone(),
                key: key.clone(),
                number,
                sender,
            },
            waiter,
        )
    }
}

impl SingleFlightGuard {
    /// Ends the flight. Its value is stored by now, so a later caller finds it or opens another
    /// flight.
    pub fn finish(self, outcome: LoadOutcome) {
        self.remove();
        self.sender.send_replace(Some(outcome));
    }

    fn remove(&self) {
        let mut in_flight = self
            .single_flight
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if in_flight
            .by_key
            .get(&self.key)
            .is_some_and(|(number, _)| *number == self.number)
        {
            in_flight.by_key.remove(&self.key);
        }
    }
}

impl Drop for SingleFlightGuard {
    fn drop(&mut self) {
        self.remove();
    }
}

impl FlightWaiter {
    /// Waits for the outcome.
    ///
    /// # Errors
    /// The load panicked.
    pub async fn wait(&mut self) -> Result<LoadOutcome, LoadError> {
        match self
            .0
            .wait_for(Option::is_some)
            .await
            .map(|outcome| outcome.clone())
        {
            Ok(Some(outcome)) => Ok(outcome),
            _ => Err(LoadError(Arc::new(anyhow::anyhow!(
                "the load of a cached value panicked"
            )))),
        }
    }
}
