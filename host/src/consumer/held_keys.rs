//! The keys that a worker holds in this host, for its report.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// How many held keys a report names.
const REPORTED_MAX: usize = 10;

/// The longest key in a report, in characters.
const KEY_MAX: usize = 200;

/// A key whose later messages wait, because an earlier one failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct HeldKey {
    /// The beginning of the key, at most 200 characters.
    pub key: String,
    /// The event that failed.
    pub event_id: String,
    /// The number of its last attempt, from 1.
    pub attempt: u32,
    /// When it failed for the first time here.
    #[schemars(with = "crate::model::schema::Time")]
    pub since: Timestamp,
    /// When its next attempt is due.
    #[schemars(with = "crate::model::schema::Time")]
    pub due: Timestamp,
}

/// The held keys of all lanes of a worker. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct HeldKeys {
    keys: Arc<Mutex<HashMap<String, HeldKey>>>,
    /// Their number, so that a message that succeeds takes no lock while none is held.
    number: Arc<AtomicUsize>,
}

impl HeldKeys {
    /// Records that `key` is held until the next attempt of an event.
    pub(super) fn hold(&self, key: &str, event_id: &str, attempt: u32, after: Duration) {
        let now = Timestamp::now();
        let after = SignedDuration::try_from(after).unwrap_or_default();
        let due = now.checked_add(after).unwrap_or(now);
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let held = keys.entry(key.to_owned()).or_insert_with(|| HeldKey {
            key: key.chars().take(KEY_MAX).collect(),
            event_id: event_id.to_owned(),
            attempt,
            since: now,
            due,
        });
        if held.event_id != event_id {
            (held.event_id, held.since) = (event_id.to_owned(), now);
        }
        (held.attempt, held.due) = (attempt, due);
        self.number.store(keys.len(), Ordering::Relaxed);
    }

    /// Records that an event does not hold its key any more.
    pub(super) fn release(&self, key: &str, event_id: &str) {
        if self.number.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.get(key).is_some_and(|held| held.event_id == event_id) {
            keys.remove(key);
        }
        self.number.store(keys.len(), Ordering::Relaxed);
    }

    /// The number of held keys, and those that are held for the longest time.
    pub(super) fn report(&self) -> (usize, Vec<HeldKey>) {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let mut longest: Vec<&HeldKey> = keys.values().collect();
        longest.sort_by_key(|held| held.since);
        let longest = longest.into_iter().take(REPORTED_MAX).cloned();
        (keys.len(), longest.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_held_until_its_event_is_settled() {
        let held = HeldKeys::default();
        let second = Duration::from_secs(1);
        held.release("a", "e1");
        held.hold("a", "e1", 1, second);
        let since = held.report().1[0].since;
        held.hold("a", "e1", 2, second);
        // A copy of another message of the key changes nothing.
        held.release("a", "e0");
        let (number, keys) = held.report();
        assert_eq!((number, keys[0].attempt, keys[0].since), (1, 2, since));
        held.release("a", "e1");
        assert_eq!(held.report(), (0, Vec::new()));
    }

    #[test]
    fn a_report_names_the_keys_that_are_held_longest() {
        let held = HeldKeys::default();
        for n in 0..REPORTED_MAX + 5 {
            held.hold(&"k".repeat(n + 300), &format!("e{n}"), 1, Duration::ZERO);
        }
        let (number, keys) = held.report();
        assert_eq!((number, keys.len()), (REPORTED_MAX + 5, REPORTED_MAX));
        assert!(keys.iter().all(|held| held.key.chars().count() == KEY_MAX));
        assert!(keys.is_sorted_by_key(|held| held.since));
    }
}
