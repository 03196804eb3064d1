//! Single flight per idempotency key.
//!
//! A concurrent request with the same key waits in memory, without a connection to the database.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::request::RequestKey;

/// Worker, route, caller and key.
type FlightKey = (String, String, String, String);

#[derive(Default, Clone)]
pub(super) struct SingleFlight(Arc<Mutex<HashMap<FlightKey, InFlightRequest>>>);

struct InFlightRequest {
    fingerprint: [u8; 32],
    /// Closed when the request has ended.
    done: watch::Receiver<()>,
}

/// The result of acquiring a key.
pub(super) enum SingleFlightEntry {
    /// The key was free.
    Acquired(SingleFlightGuard),
    /// The same request holds the key, and did not end within the wait.
    InProgress,
    /// A different request holds the key.
    OtherRequest,
}

/// Holds the key of a request until dropped.
pub(super) struct SingleFlightGuard {
    key: FlightKey,
    single_flight: SingleFlight,
    _done: watch::Sender<()>,
}

impl SingleFlight {
    /// Acquires a key. Waits up to `wait` while the same request holds it.
    pub(super) async fn acquire(
        &self,
        worker: &str,
        key: &RequestKey,
        wait: Duration,
    ) -> SingleFlightEntry {
        let flight_key = (
            worker.to_owned(),
            key.route.clone(),
            key.caller.clone(),
            key.key.clone(),
        );
        let end = Instant::now() + wait;
        loop {
            let mut done = match self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(flight_key.clone())
            {
                Entry::Vacant(vacant) => {
                    let (sender, done) = watch::channel(());
                    vacant.insert(InFlightRequest {
                        fingerprint: key.fingerprint,
                        done,
                    });
                    return SingleFlightEntry::Acquired(SingleFlightGuard {
                        key: flight_key,
                        single_flight: self.clone(),
                        _done: sender,
                    });
                }
                Entry::Occupied(in_flight) if in_flight.get().fingerprint != key.fingerprint => {
                    return SingleFlightEntry::OtherRequest;
                }
                Entry::Occupied(in_flight) => in_flight.get().done.clone(),
            };
            // Nothing is ever sent: the channel changes when its sender is dropped.
            if tokio::time::timeout_at(end, done.changed()).await.is_err() {
                return SingleFlightEntry::InProgress;
            }
        }
    }
}

impl Drop for SingleFlightGuard {
    fn drop(&mut self) {
        self.single_flight
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.key);
    }
}
