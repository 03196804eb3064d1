//! Subjects that a server does not let this login publish to. Its error text is the only sign: such a message gets no answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many of them are remembered, and for how long: more than can be under way in that time, so that none counts as
/// its stream's trouble.
const DENIALS_MAX: usize = 1 << 16;
const DENIAL_TTL: Duration = Duration::from_secs(30);

/// The subjects denied lately, each with when. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Denials(Arc<Mutex<HashMap<String, Instant>>>);

impl Denials {
    /// Takes note of what the server says, if it denies a publication.
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
