//! Subjects to which the server denies publishing. Its error text is the only sign: a denied
//! message gets no answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many subjects are remembered, and for how long. This covers all messages in flight, so that
/// no denial counts as a failure of its stream.
const DENIALS_MAX: usize = 1 << 16;
const DENIAL_TTL: Duration = Duration::from_secs(30);

/// The recently denied subjects, each with the time of its denial. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Denials(Arc<Mutex<HashMap<String, Instant>>>);

impl Denials {
    /// Records the subject of a server error that denies a publication.
    pub fn record(&self, error: &str) {
        let Some((_, rest)) = error.split_once("Permissions Violation for Publish to \"") else {
            return;
        };
        let Some((subject, _)) = rest.split_once('"') else {
            return;
        };
        let mut denied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if denied.len() >= DENIALS_MAX {
            denied.retain(|_, since| since.elapsed() < DENIAL_TTL);
        }
        if denied.len() < DENIALS_MAX {
            denied.insert(subject.to_owned(), Instant::now());
        }
    }

    pub fn contains(&self, subject: &str) -> bool {
        let denied = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        denied
            .get(subject)
            .is_some_and(|since| since.elapsed() < DENIAL_TTL)
    }
}
