//! Keyed state of a worker while a batch runs: what was read, what each member changed, what is to be written.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::base64_text;

/// A value of keyed state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    #[serde(with = "base64_text")]
    pub value: Bytes,
    pub version: u64,
}

/// One change of keyed state, applied only where the key still has the version that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateWrite {
    pub key: String,
    /// The version read in this transaction; none when the key was not there.
    pub expected: Option<u64>,
    /// The new entry; none to delete the key.
    pub entry: Option<StateEntry>,
}

/// The state of one worker as the members of one batch see it, one after the other.
#[derive(Debug, Default)]
pub struct BatchState {
    /// What the transaction read, or found absent.
    read: HashMap<String, Option<StateEntry>>,
    /// What members that succeeded left.
    left: BTreeMap<String, Option<StateEntry>>,
    /// What the running member changed.
    changed: BTreeMap<String, Option<StateEntry>>,
}

impl BatchState {
    /// The entry of `key` as the running member sees it; the outer none means it has not been read yet.
    pub fn get(&self, key: &str) -> Option<Option<&StateEntry>> {
        let seen = self.changed.get(key).or_else(|| self.left.get(key)).or_else(|| self.read.get(key));
        seen.map(Option::as_ref)
    }

    /// Keeps what the transaction read.
    pub fn remember(&mut self, key: String, entry: Option<StateEntry>) {
        self.read.insert(key, entry);
    }

    /// Sets a key that has been read and returns its new version.
    pub fn set(&mut self, key: String, value: Bytes) -> u64 {
        let version = self.get(&key).flatten().map_or(1, |entry| entry.version + 1);
        self.changed.insert(key, Some(StateEntry { value, version }));
        version
    }

    /// Deletes a key that has been read; false when it was not there.
    pub fn delete(&mut self, key: String) -> bool {
        let was_there = self.get(&key).flatten().is_some();
        self.changed.insert(key, None);
        was_there
    }

    /// Keeps what the running member changed: it succeeded.
    pub fn keep(&mut self) {
        // Not `append`, which rebuilds the whole map for each member.
        self.left.extend(std::mem::take(&mut self.changed));
    }

    /// Forgets what the running member changed: it failed.
    pub fn discard(&mut self) {
        self.changed.clear();
    }

    /// Keys that members that succeeded changed, with their entries as the transaction read them and as they are now.
    pub fn changes(&self) -> Vec<(String, Option<StateEntry>, Option<StateEntry>)> {
        let read = |key: &String| self.read.get(key).cloned().flatten();
        let change = |(key, entry): (&String, &Option<StateEntry>)| (key.clone(), read(key), entry.clone());
        self.left.iter().map(change).filter(|(_, before, after)| before != after).collect()
    }

    /// All changes of the members that succeeded, each against the version the transaction read.
    pub fn writes(&self) -> Vec<StateWrite> {
        let version_read = |key: &str| self.read.get(key).and_then(Option::as_ref).map(|entry| entry.version);
        self.left
            .iter()
            .map(|(key, entry)| StateWrite { key: key.clone(), expected: version_read(key), entry: entry.clone() })
            // A key that was absent and is absent again needs no write.
            .filter(|write| write.expected.is_some() || write.entry.is_some())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_sees_what_the_one_before_it_left_and_not_what_a_failed_one_changed() {
        let mut state = BatchState::default();
        assert_eq!(state.get("a"), None);
        state.remember("a".into(), None);
        assert_eq!(state.set("a".into(), Bytes::from_static(b"1")), 1);
        state.keep();
        assert_eq!(state.set("a".into(), Bytes::from_static(b"2")), 2);
        state.discard();
        assert_eq!(state.get("a").flatten().map(|entry| entry.value.clone()), Some(Bytes::from_static(b"1")));
        assert_eq!(
            state.writes(),
            vec![StateWrite {
                key: "a".into(),
                expected: None,
                entry: Some(StateEntry { value: Bytes::from_static(b"1"), version: 1 })
            }]
        );
    }

    #[test]
    fn a_key_set_and_deleted_within_a_batch_needs_no_write() {
        let mut state = BatchState::default();
        state.remember("a".into(), None);
        state.set("a".into(), Bytes::new());
        assert!(state.delete("a".into()));
        state.keep();
        assert!(state.writes().is_empty());
    }
}
