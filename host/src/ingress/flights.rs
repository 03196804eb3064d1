//! Requests with a key that this host is handling: who comes with the same key meanwhile waits for them, without a connection
//! to the database.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::request::RequestKey;

/// Worker, route, caller and key.
type Name = (String, String, String, String);

#[derive(Default, Clone)]
pub(super) struct Flights(Arc<Mutex<HashMap<Name, Flying>>>);

struct Flying {
    fingerprint: [u8; 32],
    /// Closed when it has landed.
    landed: watch::Receiver<()>,
}

/// What a request with a key met.
pub(super) enum Meeting {
    /// Nobody: it is in flight now.
    Alone(Flight),
    /// The same request, which took longer than it was waited for.
    Same,
    /// Another request with its key.
    Other,
}

/// One request in flight, until this is dropped.
pub(super) struct Flight {
    name: Name,
    flights: Flights,
    _landed: watch::Sender<()>,
}

impl Flights {
    /// Takes off, once nobody with the same key is in flight any more; waits for that no longer than `wait`.
    pub(super) async fn enter(&self, worker: &str, key: &RequestKey, wait: Duration) -> Meeting {
        let name = (worker.to_owned(), key.route.clone(), key.caller.clone(), key.key.clone());
        let end = Instant::now() + wait;
        loop {
            let mut landed = match self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()) {
                Entry::Vacant(vacant) => {
                    let (sender, landed) = watch::channel(());
                    vacant.insert(Flying { fingerprint: key.fingerprint, landed });
                    return Meeting::Alone(Flight { name, flights: self.clone(), _landed: sender });
                }
                Entry::Occupied(flying) if flying.get().fingerprint != key.fingerprint => return Meeting::Other,
                Entry::Occupied(flying) => flying.get().landed.clone(),
            };
            // Nothing is ever sent: an error says that the sender is gone.
            if tokio::time::timeout_at(end, landed.changed()).await.is_err() {
                return Meeting::Same;
            }
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}
