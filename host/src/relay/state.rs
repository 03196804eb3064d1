//! State that the parts of the relay share with each other and with the API.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::model::breaker::{Breaker, State};
use crate::store::{LEASE_SAFE_FOR, RelayMode, WalState};

/// Public state of the breaker of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BreakerState {
    pub stream: String,
    pub state: State,
    /// The last failure.
    pub error: String,
}

/// A repair of a stream: outputs that it had lost were published again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRepair {
    pub stream: String,
    pub at: Timestamp,
    /// How many outputs were published again.
    pub outputs: u64,
}

/// The relay of a host, as the host reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RelayReport {
    /// The breakers that are not closed, at most 20.
    pub breakers: Vec<BreakerState>,
    /// The last repairs of streams since the start of the host, newest first, at most 5.
    pub repairs: Vec<StreamRepair>,
    /// Whether this host publishes the outputs from the WAL.
    pub reads_wal: bool,
}

/// How many breakers and how many repairs a report has.
const REPORTED_BREAKERS_MAX: usize = 20;
const REPORTED_REPAIRS_MAX: usize = 5;

/// A subject that its stream refuses, although it may accept others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RefusedSubject {
    pub subject: String,
    /// The last refusal that opened its breaker.
    pub error: String,
}

/// Maximum number of refused subjects that are shown.
const REFUSED_SUBJECTS_MAX: usize = 20;

/// State that the parts of the relay share with each other and with the API.
#[derive(Default)]
pub struct RelayState {
    breakers: Mutex<BTreeMap<String, BreakerState>>,
    /// Refused subjects with their last errors.
    refused: Mutex<BTreeMap<String, String>>,
    /// Number of the connection after which all streams were last checked or repaired. 0 before the
    /// first check.
    checked_connection: AtomicU64,
    /// Time at which the order of outputs became invalid and has to be read from the database
    /// again.
    order_since: Mutex<Option<Instant>>,
    /// Streams that assigned a sequence twice.
    suspects: Mutex<BTreeSet<String>>,
    pub(super) suspect_added: Notify,
    /// The last repairs by this host, newest first.
    repairs: Mutex<VecDeque<StreamRepair>>,
    /// Number of detected losses.
    pub(super) losses: AtomicU64,
    /// Whether published outputs are not in the database yet.
    pub(super) has_unwritten: AtomicBool,
    /// The WAL state of the last poll. `None` on databases without WAL mode.
    wal: Mutex<Option<WalState>>,
    /// Whether this host is the WAL reader, and whether it is recording outcomes right now.
    pub(super) is_reading: AtomicBool,
    pub(super) is_recording: AtomicBool,
    lease: Mutex<Option<Lease>>,
    /// Whether only alarms are sent, because the database and NATS disagree.
    suspended: AtomicBool,
    /// Whether a recovery found outputs on their streams, which must not be sent again.
    recovered: AtomicBool,
    /// Number of outputs that this host has published.
    pub(super) published: AtomicU64,
}

/// The lease of this host in the database. Before it expires, no other host takes over the outputs
/// that this one leased.
#[derive(Debug, Clone, Copy)]
struct Lease {
    /// Start of its uninterrupted validity.
    since: Instant,
    /// Start of its last renewal.
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

    /// The first subjects that outputs currently wait for.
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

    /// Records a renewal of the lease, by an operation that started at `began`.
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

    /// Start of the uninterrupted lease of this host. `None` while it may have expired. Then other
    /// hosts may be sending the outputs that were leased to this one.
    pub fn lease_since(&self, now: Instant) -> Option<Instant> {
        let lease = *self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease
            .filter(|lease| now.duration_since(lease.renewed) < LEASE_SAFE_FOR)
            .map(|lease| lease.since)
    }

    /// Makes the relay send only alarms, or all outputs again.
    pub fn set_suspended(&self, is_suspended: bool) {
        self.suspended.store(is_suspended, Ordering::SeqCst);
    }

    /// Whether only alarms are sent.
    pub(super) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::SeqCst)
    }

    /// Whether an output has to wait until the database and NATS agree. Alarms do not wait, because
    /// they report the disagreement.
    pub(super) fn is_suspended_for(&self, subject: &str) -> bool {
        self.is_suspended() && !subject.starts_with("oncely.alarm.")
    }

    /// Makes the relay check each output against those that a recovery found, or stops that.
    pub fn set_check_recovered(&self, is_on: bool) {
        self.recovered.store(is_on, Ordering::SeqCst);
    }

    pub(super) fn checks_recovered(&self) -> bool {
        self.recovered.load(Ordering::SeqCst)
    }

    /// Number of outputs that this host has published since its start.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// All streams were checked or repaired after the connection with this number.
    pub(super) fn set_checked_connection(&self, connection: u64) {
        // Another host may have repaired them.
        if self.checked_connection() != connection {
            self.invalidate_order();
        }
        self.checked_connection.store(connection, Ordering::SeqCst);
    }

    /// A stream lost messages. They have to be published again before later ones.
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

    /// Time from which on the order read from the database is valid. `None` if it always was.
    pub(super) fn order_since(&self) -> Option<Instant> {
        *self
            .order_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of the connection after which the streams were last checked. 0 for never.
    pub(super) fn checked_connection(&self) -> u64 {
        self.checked_connection.load(Ordering::SeqCst)
    }

    /// The relay mode and the position of the WAL reader. `None` on databases without WAL mode.
    pub fn wal(&self) -> Option<WalState> {
        self.wal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The report of this host on its relay.
    pub fn report(&self) -> RelayReport {
        let mut breakers = self.breakers();
        breakers.retain(|breaker| breaker.state != State::Closed);
        breakers.truncate(REPORTED_BREAKERS_MAX);
        let repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        RelayReport {
            breakers,
            repairs: repairs.iter().cloned().collect(),
            reads_wal: self.reads_wal(),
        }
    }

    /// Records that lost outputs of a stream are published again.
    pub(super) fn record_repair(&self, stream: &str, outputs: u64) {
        let mut repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        repairs.push_front(StreamRepair {
            stream: stream.to_owned(),
            at: Timestamp::now(),
            outputs,
        });
        repairs.truncate(REPORTED_REPAIRS_MAX);
    }

    /// Whether this host is the WAL reader.
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

    /// Whether outputs that were published before a stream check are still being recorded.
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
