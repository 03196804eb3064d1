//! Subjects that are refused while others of their stream are taken: a subject that is full, denied, or in no stream.
//!
//! A full subject has a breaker of its own, so that its outputs are not all tried again and again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RelayState;
use crate::model::breaker::{Breaker, Permit};

/// For how long no stream takes a subject before outputs to it are set aside. Streams may be on their way back.
const NO_STREAM_TIMEOUT: Duration = Duration::from_secs(20);

/// For how long a subject is full, without one message less, before outputs to it are set aside. Until then its consumers
/// may make room.
const FULL_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// After how long without another refusal a subject is in trouble no more. Outputs are tried more often than this.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// The subjects that are refused at present.
pub struct SubjectBreakers {
    refused: HashMap<String, Refusals>,
    /// When those that are over were removed last.
    pruned_at: Instant,
    state: Arc<RelayState>,
}

/// Why a subject is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No stream takes it, as streams and permissions are.
    NoStream,
    /// Its stream holds as many messages of it as it may.
    Full,
}

impl Refusal {
    /// For how long outputs are tried again before they are set aside.
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
    /// Whether outputs to the subject are to be set aside.
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

    /// How long not to publish to a subject; none to go on. A hopeless one is tried with each output, which is then set aside.
    pub fn delay(&mut self, subject: &str, now: Instant) -> Option<Duration> {
        let refusals = self.refused.get_mut(subject)?;
        if refusals.last_reason == Refusal::NoStream || refusals.is_expired(now) {
            return None;
        }
        match refusals.breaker.permit(now) {
            Permit::Granted => None,
            // Not all of them at the same moment.
            Permit::Denied(wait) => Some(wait + wait.mul_f64(rand::random::<f64>() / 4.0)),
        }
    }

    /// An output was refused because of its subject. Returns whether it is to be set aside: the subject took nothing for so
    /// long.
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

    /// An output failed for a reason that says nothing about its subject.
    pub fn undecided(&mut self, subject: &str, now: Instant) {
        if let Some(refusals) = self.refused.get_mut(subject) {
            refusals.breaker.inconclusive(now);
        }
    }

    /// Forgets subjects that no output goes to any more.
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
            "two probes at a time"
        );
        // The stream's own trouble says nothing about the subject.
        subjects.undecided("out.full", now);
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
            // The others follow without waiting for each other.
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
