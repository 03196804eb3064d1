//! Keyed state of a worker while a batch runs: what was read, what each member changed, what is to be written.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::base64_text;

/// A value of keyed state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    #[serde(with = "base64_text")]
    pub value: Bytes,
    pub version: u64,
}

/// A key of keyed state: its value, and the version that its next change follows. Versions of a key only grow, also when it
/// is deleted and set again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateSlot {
    /// None when the key is not there.
    pub entry: Option<StateEntry>,
    /// The version of the entry, or of the deletion; where the database has no row, at least the last one the key ever had.
    pub version: u64,
    /// Whether the database has a row for the key, which it keeps for a while after a deletion.
    pub has_row: bool,
}

/// One change of keyed state, applied only where the key still has the version that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateWrite {
    pub key: String,
    /// The version of the row read in this transaction; none when there was no row.
    pub expected: Option<u64>,
    /// The new version, higher than all before.
    pub version: u64,
    /// The new value; none to delete the key.
    pub value: Option<Bytes>,
}

/// The state of one worker as the members of one batch see it, one after the other.
#[derive(Debug, Default)]
pub struct BatchState {
    /// What the transaction read, or found absent.
    read: HashMap<String, StateSlot>,
    /// What members that succeeded left.
    kept: BTreeMap<String, StateSlot>,
    /// What the running member changed.
    changed: BTreeMap<String, StateSlot>,
}

impl BatchState {
    /// The key as the running member sees it; none means it has not been read yet.
    pub fn slot(&self, key: &str) -> Option<&StateSlot> {
        self.changed
            .get(key)
            .or_else(|| self.kept.get(key))
            .or_else(|| self.read.get(key))
    }

    /// The entry of `key` as the running member sees it; the outer none means it has not been read yet.
    pub fn get(&self, key: &str) -> Option<Option<&StateEntry>> {
        self.slot(key).map(|slot| slot.entry.as_ref())
    }

    /// Keeps what the transaction read.
    pub fn record_read(&mut self, key: String, slot: StateSlot) {
        self.read.insert(key, slot);
    }

    /// Sets a key that has been read and returns its new version.
    pub fn set(&mut self, key: String, value: Bytes) -> u64 {
        let version = self.next_version(&key);
        self.change(key, Some(StateEntry { value, version }), version);
        version
    }

    /// Deletes a key that has been read; false when it was not there.
    pub fn delete(&mut self, key: String) -> bool {
        let was_there = self.get(&key).flatten().is_some();
        if was_there {
            let version = self.next_version(&key);
            self.change(key, None, version);
        }
        was_there
    }

    fn next_version(&self, key: &str) -> u64 {
        self.slot(key)
            .map_or(1, |slot| slot.version.saturating_add(1))
    }

    fn change(&mut self, key: String, entry: Option<StateEntry>, version: u64) {
        let has_row = self.slot(&key).is_some_and(|slot| slot.has_row);
        self.changed.insert(
            key,
            StateSlot {
                entry,
                version,
                has_row,
            },
        );
    }

    /// Keeps what the running member changed: it succeeded.
    pub fn keep(&mut self) {
        // Not `append`, which rebuilds the whole map for each member.
        self.kept.extend(std::mem::take(&mut self.changed));
    }

    /// Forgets what the running member changed: it failed.
    pub fn discard(&mut self) {
        self.changed.clear();
    }

    /// Keys that members that succeeded changed, with their entries as the transaction read them and as they are now.
    pub fn changes(&self) -> Vec<(String, Option<StateEntry>, Option<StateEntry>)> {
        let read = |key: &String| self.read.get(key).and_then(|slot| slot.entry.clone());
        let change =
            |(key, slot): (&String, &StateSlot)| (key.clone(), read(key), slot.entry.clone());
        self.kept
            .iter()
            .map(change)
            .filter(|(_, before, after)| before != after)
            .collect()
    }

    /// All changes of the members that succeeded, each against the version the transaction read. A key that was set and is
    /// gone again is written too: a member knows its version.
    pub fn writes(&self) -> Vec<StateWrite> {
        let version_read = |key: &str| {
            self.read
                .get(key)
                .filter(|slot| slot.has_row)
                .map(|slot| slot.version)
        };
        let write = |(key, slot): (&String, &StateSlot)| StateWrite {
            key: key.clone(),
            expected: version_read(key),
            version: slot.version,
            value: slot.entry.as_ref().map(|entry| entry.value.clone()),
        };
        self.kept.iter().map(write).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_sees_earlier_items_changes_but_not_a_failed_ones() {
        let mut state = BatchState::default();
        assert_eq!(state.get("a"), None);
        state.record_read("a".into(), StateSlot::default());
        assert_eq!(state.set("a".into(), Bytes::from_static(b"1")), 1);
        state.keep();
        assert_eq!(state.set("a".into(), Bytes::from_static(b"2")), 2);
        state.discard();
        assert_eq!(
            state.get("a").flatten().map(|entry| entry.value.clone()),
            Some(Bytes::from_static(b"1"))
        );
        assert_eq!(
            state.writes(),
            vec![StateWrite {
                key: "a".into(),
                expected: None,
                version: 1,
                value: Some(Bytes::from_static(b"1"))
            }]
        );
    }

    #[test]
    fn versions_grow_over_deletions_within_a_batch() {
        let mut state = BatchState::default();
        state.record_read("a".into(), StateSlot::default());
        assert_eq!(state.set("a".into(), Bytes::new()), 1);
        assert!(state.delete("a".into()));
        assert!(!state.delete("a".into()));
        state.keep();
        let deleted = StateWrite {
            key: "a".into(),
            expected: None,
            version: 2,
            value: None,
        };
        assert_eq!(state.writes(), [deleted]);
        assert_eq!(state.set("a".into(), Bytes::new()), 3);
    }

    #[test]
    fn a_recreated_key_continues_from_its_deletion_version() {
        let mut state = BatchState::default();
        state.record_read(
            "a".into(),
            StateSlot {
                entry: None,
                version: 7,
                has_row: true,
            },
        );
        assert_eq!(state.set("a".into(), Bytes::new()), 8);
        state.keep();
        let set = StateWrite {
            key: "a".into(),
            expected: Some(7),
            version: 8,
            value: Some(Bytes::new()),
        };
        assert_eq!(state.writes(), [set]);
    }

    #[test]
    fn deleting_a_missing_key_needs_no_write() {
        let mut state = BatchState::default();
        state.record_read("a".into(), StateSlot::default());
        assert!(!state.delete("a".into()));
        state.keep();
        assert!(state.writes().is_empty());
    }
}
