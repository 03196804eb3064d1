//! Subjects that are refused while their stream accepts others: a subject is full, denied, or not
//! part of any stream.
//!
//! A full subject has its own breaker, so that its outputs are not all retried.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RelayState;
use crate::model::breaker::{Breaker, Permit};

/// How long a subject may have no stream before its outputs are parked. A stream may be about to
/// return.
const NO_STREAM_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a subject may stay full, without any accepted message, before its outputs are parked.
/// Its consumers may free space meanwhile.
const FULL_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// How long a subject stays tracked after its last refusal. Outputs are retried more often than
/// this.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// The subjects that are currently refused.
pub struct SubjectBreakers {
    refused: HashMap<String, Refusals>,
    /// Time of the last cleanup.
    pruned_at: Instant,
    state: Arc<RelayState>,
}

/// The reason why a subject is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No stream accepts it with the current streams and permissions.
    NoStream,
    /// Its stream holds the maximum number of its messages.
    Full,
}

impl Refusal {
    /// How long outputs are retried before they are parked.
    fn timeout(self) -> Duration {
        match self {
            Refusal::NoStream => NO_STREAM_TIMEOUT,
            Refusal::Full => FULL_TIMEOUT,
        }
    }
}

/// The refusals of one subject.
struct Refusals {
    last_reason: Refusal,
    breaker: Breaker,
    since: Instant,
    last: Instant,
}

impl Refusals {
    /// Whether outputs to the subject have to be parked.
    fn is_expired(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= self.last_reason.timeout()
    }
}

impl SubjectBreakers {
    pub fn new(state: Arc<RelayState>, now: Instant) -> Self {
        SubjectBreakers {
            refused: HashMap::new(),
            pruned_at: now,
            state,
        }
    }

    /// Delay before the next publish to a subject. `None` to publish now. A subject without a
    /// stream is always tried. After the timeout each output is tried once and then parked.
    pub fn delay(&mut self, subject: &str, now: Instant) -> Option<Duration> {
        let refusals = self.refused.get_mut(subject)?;
        if refusals.last_reason == Refusal::NoStream || refusals.is_expired(now) {
            return None;
        }
        match refusals.breaker.permit(now) {
            Permit::Granted => None,
            // Jitter, so that outputs do not return at the same moment.
            Permit::Denied(wait) => Some(wait + wait.mul_f64(rand::random::<f64>() / 4.0)),
        }
    }

    /// Records a refusal because of the subject. Returns whether the output has to be parked,
    /// because the subject accepted nothing during its timeout.
    pub fn refused(&mut self, subject: &str, reason: Refusal, why: &str, now: Instant) -> bool {
        self.prune(now);
        let new = || Refusals {
            last_reason: reason,
            breaker: Breaker::new(now),
            since: now,
            last: now,
        };
        let refusals = self.refused.entry(subject.to_owned()).or_insert_with(new);
        (refusals.last_reason, refusals.last) = (reason, now);
        if refusals.breaker.failed(now, rand::random(), why) {
            self.state.add_refused_subject(subject, why);
        }
        refusals.is_expired(now)
    }

    /// A message to a subject was stored.
    pub fn succeeded(&mut self, subject: &str) {
        if self.refused.remove(subject).is_some() {
            self.state.remove_refused_subject(subject);
        }
    }

    /// The outcome says nothing about the subject: the output failed for another reason, or was not
    /// sent.
    pub fn inconclusive(&mut self, subject: &str, now: Instant) {
        if let Some(refusals) = self.refused.get_mut(subject) {
            refusals.breaker.inconclusive(now);
        }
    }

    /// Removes subjects that no output goes to any more.
    fn prune(&mut self, now: Instant) {
        if now.duration_since(self.pruned_at) < FORGET_AFTER {
            return;
        }
        self.pruned_at = now;
        let state = &self.state;
        self.refused.retain(|subject, refusals| {
            let is_recent = now.duration_since(refusals.last) < FORGET_AFTER;
            if !is_recent {
                state.remove_refused_subject(subject);
            }
            is_recent
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects(now: Instant) -> (SubjectBreakers, Arc<RelayState>) {
        let state = Arc::new(RelayState::default());
        (SubjectBreakers::new(Arc::clone(&state), now), state)
    }

    #[test]
    fn a_full_subject_waits_and_others_continue() {
        let now = Instant::now();
        let (mut subjects, state) = subjects(now);
        for _ in 0..5 {
            assert_eq!(subjects.delay("out.full", now), None);
            assert!(!subjects.refused("out.full", Refusal::Full, "it is full", now));
        }
        assert!(subjects.delay("out.full", now).is_some());
        assert_eq!(subjects.delay("out.free", now), None);
        assert_eq!(state.refused_subjects().len(), 1);
        subjects.succeeded("out.full");
        assert_eq!(subjects.delay("out.full", now), None);
        assert!(state.refused_subjects().is_empty());
    }

    #[test]
    fn one_output_at_a_time_probes_a_full_subject() {
        let mut now = Instant::now();
        let (mut subjects, _) = subjects(now);
        for _ in 0..5 {
            subjects.refused("out.full", Refusal::Full, "it is full", now);
        }
        now += Duration::from_secs(1);
        assert_eq!(subjects.delay("out.full", now), None);
        assert!(
            subjects.delay("out.full", now).is_some(),
            "two probes at the same time"
        );
        // A failure of the stream is unrelated to the subject.
        subjects.inconclusive("out.full", now);
        assert_eq!(subjects.delay("out.full", now), None);
    }

    #[test]
    fn outputs_are_parked_once_their_subject_is_refused_too_long() {
        for (reason, timeout) in [
            (Refusal::NoStream, NO_STREAM_TIMEOUT),
            (Refusal::Full, FULL_TIMEOUT),
        ] {
            let mut now = Instant::now();
            let (mut subjects, _) = subjects(now);
            let end = now + timeout;
            while now < end {
                assert!(!subjects.refused("out.x", reason, "it is refused", now));
                now += Duration::from_secs(5);
            }
            assert!(subjects.refused("out.x", reason, "it is refused", now));
            // The other outputs are parked without waiting for each other.
            assert_eq!(subjects.delay("out.x", now), None);
            subjects.succeeded("out.x");
            assert!(!subjects.refused("out.x", reason, "it is refused", now));
        }
    }

    #[test]
    fn subjects_without_outputs_are_forgotten() {
        let mut now = Instant::now();
        let (mut subjects, state) = subjects(now);
        for _ in 0..5 {
            subjects.refused("out.full", Refusal::Full, "it is full", now);
        }
        now += FORGET_AFTER;
        subjects.refused("out.other", Refusal::NoStream, "no stream takes it", now);
        assert_eq!(
            (subjects.refused.len(), state.refused_subjects().len()),
            (1, 0)
        );
    }
}
