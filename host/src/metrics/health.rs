//! Whether the host can do its work, as far as it has found out: what every part may report to, and readiness follows.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A failure that no success and no other failure has followed for so long says nothing any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// The failures of the present.
#[derive(Debug, Default)]
pub struct Health {
    /// Of the transactions of deliveries, requests and burials.
    transactions: Mutex<Option<Failing>>,
    /// Of the small transaction that the host tries every other second.
    trial: Mutex<Option<Failing>>,
    /// Of the streams that are the installation's own.
    own_streams: Mutex<Option<Failing>>,
}

#[derive(Debug)]
struct Failing {
    why: String,
    since: Instant,
    last: Instant,
}

/// What may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Transactions,
    Trial,
    OwnStreams,
}

impl Health {
    /// Something worked, or failed for this reason.
    pub fn note(&self, part: Part, outcome: Result<(), String>) {
        let mut failing = self.of(part).lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        *failing =
            outcome.err().map(|why| Failing { why, since: failing.as_ref().map_or(now, |f| f.since), last: now });
    }

    /// Why the database does not take what the host writes; none when it does.
    pub fn database(&self) -> Option<String> {
        self.why(Part::Trial).or_else(|| self.why(Part::Transactions))
    }

    /// Why the host's own streams are not there; none when they are.
    pub fn own_streams(&self) -> Option<String> {
        self.why(Part::OwnStreams)
    }

    /// Since when the database has not taken what the host writes.
    pub fn database_since(&self) -> Option<Instant> {
        [Part::Trial, Part::Transactions].into_iter().find_map(|part| self.current(part, |failing| failing.since))
    }

    fn why(&self, part: Part) -> Option<String> {
        self.current(part, |failing| failing.why.clone())
    }

    fn current<T>(&self, part: Part, read: impl FnOnce(&Failing) -> T) -> Option<T> {
        let failing = self.of(part).lock().unwrap_or_else(PoisonError::into_inner);
        let is_current = |failing: &&Failing| part == Part::OwnStreams || failing.last.elapsed() < FORGOTTEN_AFTER;
        failing.as_ref().filter(is_current).map(read)
    }

    fn of(&self, part: Part) -> &Mutex<Option<Failing>> {
        match part {
            Part::Transactions => &self.transactions,
            Part::Trial => &self.trial,
            Part::OwnStreams => &self.own_streams,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_lasts_until_the_next_success() {
        let health = Health::default();
        assert_eq!(health.database(), None);
        health.note(Part::Transactions, Err("the disk is full".to_owned()));
        health.note(Part::Trial, Ok(()));
        assert_eq!(health.database().as_deref(), Some("the disk is full"));
        health.note(Part::Transactions, Ok(()));
        assert_eq!((health.database(), health.database_since()), (None, None));
        health.note(Part::OwnStreams, Err("gone".to_owned()));
        assert_eq!((health.database(), health.own_streams()), (None, Some("gone".to_owned())));
    }
}
