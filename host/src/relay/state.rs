//! What the relay's parts tell each other, and people.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::model::breaker::{Breaker, State};
use crate::store::{LEASE_SAFE_FOR, RelayMode, WalState};

/// What people see of the breaker of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakerState {
    pub stream: String,
    pub state: State,
    /// The last failure.
    pub error: String,
}

/// A subject that its stream refuses while it may take others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedSubject {
    pub subject: String,
    /// The last refusal that opened its breaker.
    pub error: String,
}

/// How many refused subjects are shown.
const REFUSED_SUBJECTS_MAX: usize = 20;

/// What the relay's parts tell each other, and people.
#[derive(Default)]
pub struct RelayState {
    breakers: Mutex<BTreeMap<String, BreakerState>>,
    /// By subject, with why.
    refused: Mutex<BTreeMap<String, String>>,
    /// The number of the connection after which all streams were found well, or mended; 0 before that.
    checked_connection: AtomicU64,
    /// When the order of the outputs was last read from the database again.
    order_since: Mutex<Option<Instant>>,
    /// Streams that answered with a sequence they had given before.
    suspects: Mutex<BTreeSet<String>>,
    pub(super) suspect_added: Notify,
    /// How often streams were found to have lost something.
    pub(super) losses: AtomicU64,
    /// Whether something is published that the database does not know of yet.
    pub(super) has_unwritten: AtomicBool,
    /// How outputs go, as it was seen the last time; none where there is no log to read.
    wal: Mutex<Option<WalState>>,
    /// Whether this host reads the log, and whether it writes down just now what was published from it.
    pub(super) is_reading: AtomicBool,
    pub(super) is_recording: AtomicBool,
    lease: Mutex<Option<Lease>>,
    /// Whether nothing but alarms is sent, because database and broker disagree.
    held: AtomicBool,
    /// Whether a recovery found outputs on their streams, which are not to be sent again.
    recovered: AtomicBool,
    /// How many outputs this host has published.
    pub(super) published: AtomicU64,
}

/// The host's lease in the database: before its end no other host takes over what this one leased.
#[derive(Debug, Clone, Copy)]
struct Lease {
    /// Since when it was never in doubt.
    since: Instant,
    /// When its last renewal began.
    renewed: Instant,
}

impl RelayState {
    /// The breakers of all streams that this host published to.
    pub fn breakers(&self) -> Vec<BreakerState> {
        self.breakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    pub(super) fn set_breaker(&self, stream: &str, breaker: &Breaker) {
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        if breakers
            .get(stream)
            .is_none_or(|known| known.state != breaker.state())
        {
            let (stream, state, error) = (
                stream.to_owned(),
                breaker.state(),
                breaker.last_error().to_owned(),
            );
            breakers.insert(
                stream.clone(),
                BreakerState {
                    stream,
                    state,
                    error,
                },
            );
        }
    }

    /// Subjects that outputs wait for at present, the first few of them.
    pub fn refused_subjects(&self) -> Vec<RefusedSubject> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused
            .iter()
            .map(|(subject, error)| RefusedSubject {
                subject: subject.clone(),
                error: error.clone(),
            })
            .collect()
    }

    pub(super) fn add_refused_subject(&self, subject: &str, error: &str) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() < REFUSED_SUBJECTS_MAX || refused.contains_key(subject) {
            refused.insert(subject.to_owned(), error.to_owned());
        }
    }

    pub(super) fn remove_refused_subject(&self, subject: &str) {
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(subject);
    }

    /// The host's lease was renewed, by an operation that began then.
    pub fn lease_renewed(&self, began: Instant) {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        let since = match *lease {
            Some(lease) if began.duration_since(lease.renewed) < LEASE_SAFE_FOR => lease.since,
            _ => began,
        };
        *lease = Some(Lease {
            since,
            renewed: began,
        });
    }

    /// Since when the host has had its lease without a gap; none while it may have run out: others may be sending what was
    /// leased to this host.
    pub fn lease_since(&self, now: Instant) -> Option<Instant> {
        let lease = *self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease
            .filter(|lease| now.duration_since(lease.renewed) < LEASE_SAFE_FOR)
            .map(|lease| lease.since)
    }

    /// Has the relay send nothing but alarms, or everything.
    pub fn set_held(&self, is_held: bool) {
        self.held.store(is_held, Ordering::SeqCst);
    }

    /// Whether nothing but alarms is sent.
    pub(super) fn is_holding(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// Whether an output to a subject has to wait until database and broker agree. That they do not has to be told.
    pub(super) fn is_held(&self, subject: &str) -> bool {
        self.is_holding() && !subject.starts_with("oncely.alarm.")
    }

    /// Has the relay look up every output among those that a recovery found, or none.
    pub fn set_check_recovered(&self, is_on: bool) {
        self.recovered.store(is_on, Ordering::SeqCst);
    }

    pub(super) fn checks_recovered(&self) -> bool {
        self.recovered.load(Ordering::SeqCst)
    }

    /// How many outputs this host has published since it started.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// All streams were found well, or mended, after the connection of this number.
    pub(super) fn set_checked_connection(&self, connection: u64) {
        // Another host may have been the one to mend them.
        if self.checked_connection() != connection {
            self.invalidate_order();
        }
        self.checked_connection.store(connection, Ordering::SeqCst);
    }

    /// What a stream had lost is to be published again, before all that comes after it.
    pub(super) fn on_loss(&self) {
        self.losses.fetch_add(1, Ordering::SeqCst);
        self.invalidate_order();
    }

    fn invalidate_order(&self) {
        *self
            .order_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Since when the database's word holds on who goes before whom; none when it always did.
    pub(super) fn order_since(&self) -> Option<Instant> {
        *self
            .order_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// After which connection the streams were looked at the last time; 0 for never.
    pub(super) fn checked_connection(&self) -> u64 {
        self.checked_connection.load(Ordering::SeqCst)
    }

    /// How outputs go and how far the reader of the log is; none where there is no log to read.
    pub fn wal(&self) -> Option<WalState> {
        self.wal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether this host reads the log.
    pub fn reads_wal(&self) -> bool {
        self.is_reading.load(Ordering::Relaxed)
    }

    pub(super) fn set_wal(&self, wal: WalState) {
        *self.wal.lock().unwrap_or_else(PoisonError::into_inner) = Some(wal);
    }

    pub(super) fn relay_mode(&self) -> Option<RelayMode> {
        self.wal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|wal| wal.mode)
    }

    pub(super) fn add_suspect(&self, stream: &str) {
        self.suspects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(stream.to_owned());
        self.suspect_added.notify_one();
    }

    pub(super) fn suspects(&self) -> BTreeSet<String> {
        self.suspects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn has_suspects(&self) -> bool {
        !self
            .suspects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    /// Whether something that was published, and before the streams are looked at, is on its way into the database.
    pub(super) fn is_writing(&self) -> bool {
        self.has_unwritten.load(Ordering::SeqCst) || self.is_recording.load(Ordering::SeqCst)
    }

    pub(super) fn is_suspect(&self, stream: &str) -> bool {
        self.suspects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(stream)
    }

    pub(super) fn remove_suspect(&self, stream: &str) {
        self.suspects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_since_restarts_after_a_late_renewal() {
        let state = RelayState::default();
        let start = Instant::now();
        assert_eq!(state.lease_since(start), None);
        state.lease_renewed(start);
        let soon = start + LEASE_SAFE_FOR / 2;
        state.lease_renewed(soon);
        assert_eq!(state.lease_since(soon + LEASE_SAFE_FOR / 2), Some(start));
        let late = soon + LEASE_SAFE_FOR;
        assert_eq!(state.lease_since(late), None);
        state.lease_renewed(late);
        assert_eq!(state.lease_since(late), Some(late));
    }
}
