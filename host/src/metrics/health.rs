//! The host's health as recorded by its checks, from which readiness follows.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A failure without a later success or failure counts as outdated after this time.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// The current failures of a host.
#[derive(Debug, Default)]
pub struct Health {
    /// Transactions of deliveries, requests and dead-lettering.
    transactions: Mutex<Option<Failure>>,
    /// The small transaction that the host attempts every other second.
    write_probe: Mutex<Option<Failure>>,
    /// The installation's own streams.
    own_streams: Mutex<Option<Failure>>,
}

#[derive(Debug)]
struct Failure {
    why: String,
    since: Instant,
    last: Instant,
}

/// A check that may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthCheck {
    /// Transactions of deliveries, requests and dead-lettering.
    Transactions,
    /// The small transaction that the host attempts every other second.
    WriteProbe,
    /// The existence of the installation's own streams.
    OwnStreams,
}

impl Health {
    /// Records the success or failure of a check.
    pub fn record(&self, check: HealthCheck, outcome: Result<(), String>) {
        let mut failure = self
            .slot(check)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        *failure = outcome.err().map(|why| Failure {
            why,
            since: failure.as_ref().map_or(now, |f| f.since),
            last: now,
        });
    }

    /// The reason why the database does not accept writes; `None` if it does.
    pub fn database_error(&self) -> Option<String> {
        self.why(HealthCheck::WriteProbe)
            .or_else(|| self.why(HealthCheck::Transactions))
    }

    /// The reason why the host's own streams are missing; `None` if they exist.
    pub fn own_streams_error(&self) -> Option<String> {
        self.why(HealthCheck::OwnStreams)
    }

    /// Since when the database has not accepted writes.
    pub fn database_failing_since(&self) -> Option<Instant> {
        [HealthCheck::WriteProbe, HealthCheck::Transactions]
            .into_iter()
            .find_map(|check| self.current(check, |failure| failure.since))
    }

    fn why(&self, check: HealthCheck) -> Option<String> {
        self.current(check, |failure| failure.why.clone())
    }

    fn current<T>(&self, check: HealthCheck, read: impl FnOnce(&Failure) -> T) -> Option<T> {
        let failure = self
            .slot(check)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_current = |failure: &&Failure| {
            check == HealthCheck::OwnStreams || failure.last.elapsed() < STALE_AFTER
        };
        failure.as_ref().filter(is_current).map(read)
    }

    fn slot(&self, check: HealthCheck) -> &Mutex<Option<Failure>> {
        match check {
            HealthCheck::Transactions => &self.transactions,
            HealthCheck::WriteProbe => &self.write_probe,
            HealthCheck::OwnStreams => &self.own_streams,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_lasts_until_the_next_success() {
        let health = Health::default();
        assert_eq!(health.database_error(), None);
        health.record(
            HealthCheck::Transactions,
            Err("the disk is full".to_owned()),
        );
        health.record(HealthCheck::WriteProbe, Ok(()));
        assert_eq!(health.database_error().as_deref(), Some("the disk is full"));
        health.record(HealthCheck::Transactions, Ok(()));
        assert_eq!(
            (health.database_error(), health.database_failing_since()),
            (None, None)
        );
        health.record(HealthCheck::OwnStreams, Err("gone".to_owned()));
        assert_eq!(
            (health.database_error(), health.own_streams_error()),
            (None, Some("gone".to_owned()))
        );
    }
}
