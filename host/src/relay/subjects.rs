//! Subjects that their stream refuses while it takes others: a subject that is full, denied, or in no stream.
//!
//! Each has a breaker of its own, so that outputs to it neither wait for each other's refusals nor hold up the stream.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RelayState;
use crate::breaker::{Breaker, Permit};

/// For how long no stream takes a subject before outputs to it are set aside. Streams may be on their way back.
pub const NO_PLACE_FOR: Duration = Duration::from_secs(20);

/// For how long a subject is full, without one message less, before outputs to it are set aside. Until then its consumers
/// may make room.
pub const FULL_FOR: Duration = Duration::from_secs(15 * 60);

/// After how long without another refusal a subject is in trouble no more. Outputs are tried more often than this.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// The subjects that are refused at present.
pub struct Subjects {
    refused: HashMap<String, Refusals>,
    /// When those that are over were removed last.
    tidied: Instant,
    state: Arc<RelayState>,
}

/// What is known of one subject.
struct Refusals {
    breaker: Breaker,
    since: Instant,
    last: Instant,
}

impl Subjects {
    pub fn new(state: Arc<RelayState>, now: Instant) -> Self {
        Subjects { refused: HashMap::new(), tidied: now, state }
    }

    /// How long not to publish to a subject; none to go on.
    pub fn wait(&mut self, subject: &str, now: Instant) -> Option<Duration> {
        match self.refused.get_mut(subject)?.breaker.permit(now) {
            Permit::Yes => None,
            // Not all of them at the same moment.
            Permit::NotFor(wait) => Some(wait + wait.mul_f64(rand::random::<f64>() / 4.0)),
        }
    }

    /// A subject was refused. Returns for how long it has been, without a message that was taken.
    pub fn refused(&mut self, subject: &str, why: &str, now: Instant) -> Duration {
        self.tidy(now);
        let new = || Refusals { breaker: Breaker::new(now), since: now, last: now };
        let refusals = self.refused.entry(subject.to_owned()).or_insert_with(new);
        refusals.last = now;
        if refusals.breaker.failed(now, rand::random(), why) {
            self.state.show_refused(subject, why);
        }
        now.duration_since(refusals.since)
    }

    /// A message to a subject was stored.
    pub fn took(&mut self, subject: &str) {
        if self.refused.remove(subject).is_some() {
            self.state.show_taken(subject);
        }
    }

    /// An output failed for a reason that says nothing about its subject.
    pub fn undecided(&mut self, subject: &str, now: Instant) {
        if let Some(refusals) = self.refused.get_mut(subject) {
            refusals.breaker.undecided(now);
        }
    }

    /// Forgets subjects that no output goes to any more.
    fn tidy(&mut self, now: Instant) {
        if now.duration_since(self.tidied) < FORGOTTEN_AFTER {
            return;
        }
        self.tidied = now;
        let state = &self.state;
        self.refused.retain(|subject, refusals| {
            let is_recent = now.duration_since(refusals.last) < FORGOTTEN_AFTER;
            if !is_recent {
                state.show_taken(subject);
            }
            is_recent
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects(now: Instant) -> (Subjects, Arc<RelayState>) {
        let state = Arc::new(RelayState::default());
        (Subjects::new(Arc::clone(&state), now), state)
    }

    #[test]
    fn a_refused_subject_waits_and_others_go_on() {
        let now = Instant::now();
        let (mut subjects, state) = subjects(now);
        for _ in 0..5 {
            assert_eq!(subjects.wait("out.full", now), None);
            subjects.refused("out.full", "it is full", now);
        }
        assert!(subjects.wait("out.full", now).is_some());
        assert_eq!(subjects.wait("out.free", now), None);
        assert_eq!(state.refused_subjects().len(), 1);
        subjects.took("out.full");
        assert_eq!(subjects.wait("out.full", now), None);
        assert!(state.refused_subjects().is_empty());
    }

    #[test]
    fn one_output_at_a_time_probes_a_refused_subject() {
        let mut now = Instant::now();
        let (mut subjects, _) = subjects(now);
        for _ in 0..5 {
            subjects.refused("out.full", "it is full", now);
        }
        now += Duration::from_secs(1);
        assert_eq!(subjects.wait("out.full", now), None);
        assert!(subjects.wait("out.full", now).is_some(), "two probes at a time");
        // The stream's own trouble says nothing about the subject.
        subjects.undecided("out.full", now);
        assert_eq!(subjects.wait("out.full", now), None);
    }

    #[test]
    fn a_subject_that_takes_nothing_is_refused_since_its_first_refusal() {
        let mut now = Instant::now();
        let (mut subjects, _) = subjects(now);
        for second in 0..30_u64 {
            assert_eq!(subjects.refused("out.full", "it is full", now), Duration::from_secs(second));
            now += Duration::from_secs(1);
        }
        subjects.took("out.full");
        assert_eq!(subjects.refused("out.full", "it is full", now), Duration::ZERO);
    }

    #[test]
    fn subjects_that_nothing_goes_to_are_forgotten() {
        let mut now = Instant::now();
        let (mut subjects, state) = subjects(now);
        for _ in 0..5 {
            subjects.refused("out.full", "it is full", now);
        }
        now += FORGOTTEN_AFTER;
        subjects.refused("out.other", "it is full", now);
        assert_eq!((subjects.refused.len(), state.refused_subjects().len()), (1, 0));
    }
}
