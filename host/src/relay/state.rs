//! What the relay's parts tell each other, and people.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::breaker::{Breaker, State};

/// What people see of the breaker of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakerState {
    pub stream: String,
    pub state: State,
    /// The last failure.
    pub why: String,
}

/// What the relay's parts tell each other, and people.
#[derive(Default)]
pub struct RelayState {
    breakers: Mutex<BTreeMap<String, BreakerState>>,
    /// When the streams were looked at for losses the last time, and after which connection to NATS.
    looked: Mutex<Option<Look>>,
    /// Streams that answered with a sequence they had given before.
    suspects: Mutex<BTreeSet<String>>,
    pub(super) suspicion: Notify,
    /// How often streams were found to have lost something.
    pub(super) losses: AtomicU64,
    /// Whether something is published that the database does not know of yet.
    pub(super) unwritten: AtomicBool,
}

/// A look at the streams that found all of them well, or mended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    pub connection: u64,
    pub began: Instant,
}

impl RelayState {
    /// The breakers of all streams that this host published to.
    pub fn breakers(&self) -> Vec<BreakerState> {
        self.breakers.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(super) fn show(&self, stream: &str, breaker: &Breaker) {
        let mut shown = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.get(stream).is_none_or(|shown| shown.state != breaker.state()) {
            let (stream, state, why) = (stream.to_owned(), breaker.state(), breaker.why().to_owned());
            shown.insert(stream.clone(), BreakerState { stream, state, why });
        }
    }

    pub(super) fn looked(&self, look: Look) {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Some(look);
    }

    pub(super) fn last_look(&self) -> Option<Look> {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn suspect(&self, stream: &str) {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).insert(stream.to_owned());
        self.suspicion.notify_one();
    }

    pub(super) fn is_suspect(&self, stream: &str) -> bool {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).contains(stream)
    }

    pub(super) fn clear(&self, stream: &str) {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner).remove(stream);
    }
}
