//! Keyed state of a worker while a batch runs: slots read, changes of each item, pending writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::base64_text;

/// A value of keyed state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    /// The bytes that the handler stored.
    #[serde(with = "base64_text")]
    pub value: Bytes,
    /// The version of the key, higher than all before.
    pub version: u64,
}

/// A key of keyed state: its value, and the version that its next change follows. Versions of a key
/// only grow, also across a deletion.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateSlot {
    /// None if the key does not exist.
    pub entry: Option<StateEntry>,
    /// The version of the entry or of the deletion. If the database has no row, at least the last
    /// version that the key ever had.
    pub version: u64,
    /// Whether the database has a row for the key. The row outlives a deletion for a while.
    pub has_row: bool,
}

/// One change of keyed state, applied only if the key still has the version that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateWrite {
    /// The key, unique per worker.
    pub key: String,
    /// The version of the row read in this transaction; none if there was no row.
    pub expected: Option<u64>,
    /// The new version, higher than all before.
    pub version: u64,
    /// The new value; none deletes the key.
    pub value: Option<Bytes>,
}

/// The state of one worker as the items of one batch see it, in order.
#[derive(Debug, Clone, Default)]
pub struct BatchState {
    /// Slots that the transaction read, absent keys included.
    read: HashMap<String, StateSlot>,
    /// Slots changed by items that succeeded.
    kept: BTreeMap<String, StateSlot>,
    /// Slots changed by the running item.
    changed: BTreeMap<String, StateSlot>,
}

impl BatchState {
    /// The key as the running item sees it. None if it has not been read yet.
    pub fn slot(&self, key: &str) -> Option<&StateSlot> {
        self.changed
            .get(key)
            .or_else(|| self.kept.get(key))
            .or_else(|| self.read.get(key))
    }

    /// The entry of `key` as the running item sees it. The outer none means that it has not been
    /// read.
    pub fn get(&self, key: &str) -> Option<Option<&StateEntry>> {
        self.slot(key).map(|slot| slot.entry.as_ref())
    }

    /// A page of the keys as the running item sees them: `stored` keys of the transaction, which
    /// follow `after`, with the changes of this batch. A page that is not the `last` one ends at
    /// its last stored key.
    pub fn page(
        &self,
        prefix: &str,
        after: &str,
        stored: Vec<String>,
        is_last: bool,
    ) -> BTreeSet<String> {
        let end = stored.last().filter(|_| !is_last).cloned();
        let mut keys: BTreeSet<String> = stored.into_iter().collect();
        // Changes of the running item come last.
        for (key, slot) in self.kept.iter().chain(&self.changed) {
            let is_after_page = end.as_ref().is_some_and(|end| key > end);
            if !key.starts_with(prefix) || key.as_str() <= after || is_after_page {
                continue;
            }
            if slot.entry.is_some() {
                keys.insert(key.clone());
            } else {
                keys.remove(key);
            }
        }
        keys
    }

    /// Records a slot that the transaction read.
    pub fn record_read(&mut self, key: String, slot: StateSlot) {
        self.read.insert(key, slot);
    }

    /// Sets a key that has been read. Returns its new version.
    pub fn set(&mut self, key: String, value: Bytes) -> u64 {
        let version = self.next_version(&key);
        self.change(key, Some(StateEntry { value, version }), version);
        version
    }

    /// Deletes a key that has been read. Returns whether it existed.
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

    /// Keeps the changes of the running item, which succeeded.
    pub fn keep(&mut self) {
        // Not `append`, which rebuilds the whole map for each item.
        self.kept.extend(std::mem::take(&mut self.changed));
    }

    /// Discards the changes of the running item, which failed.
    pub fn discard(&mut self) {
        self.changed.clear();
    }

    /// The keys that successful items changed, with their entries as read and as they are now.
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

    /// All changes of successful items, each against the version that the transaction read. A key
    /// that was set and deleted again is written too, because an item has seen its version.
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
