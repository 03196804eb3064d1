//! Tag versions: the last invalidation of each tag in this process, counted in invalidations.
//!
//! A value records the count before its load started. It is valid as long as none of its tags was
//! invalidated after that. Its tags therefore need not be known before the load.

use std::collections::{BTreeSet, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::CacheKey;
use super::local::Entry;
use crate::model::cache_writes::EVERYTHING;

/// How many tags are remembered. Beyond that the older half is evicted, and all values as old as
/// that become invalid.
const TAG_VERSIONS_MAX: usize = 200_000;

#[derive(Default)]
pub(super) struct TagVersions(RwLock<Inner>);

#[derive(Default)]
struct Inner {
    /// The number of invalidations so far.
    current: u64,
    /// Everything read before this is invalid, whatever its tags.
    valid_from: u64,
    /// The last invalidation of each tag, by worker.
    by_worker: HashMap<String, HashMap<String, u64>>,
    tags: usize,
}

impl TagVersions {
    /// The current point in the order of invalidations.
    pub fn current(&self) -> u64 {
        self.read().current
    }

    /// Whether none of `tags` was invalidated after `read_version`.
    pub fn is_valid(&self, worker: &str, tags: &[String], read_version: u64) -> bool {
        self.read().is_valid(worker, tags, read_version)
    }

    /// Invalidates tags.
    pub fn invalidate(&self, worker: &str, tags: &BTreeSet<String>) {
        self.write().invalidate(worker, tags);
    }

    /// Invalidates tags and keeps the `puts` of the same transaction that were valid before; the
    /// others are removed. One lock covers both, so that no other invalidation can fall in between.
    pub fn invalidate_keeping(
        &self,
        worker: &str,
        tags: &BTreeSet<String>,
        puts: &mut Vec<(CacheKey, Entry)>,
    ) {
        let mut inner = self.write();
        puts.retain(|(_, entry)| inner.is_valid(worker, &entry.tags, entry.read_version));
        inner.invalidate(worker, tags);
        for (_, entry) in puts {
            entry.read_version = inner.current;
        }
    }

    /// Invalidates everything read before.
    pub fn invalidate_all(&self) {
        let mut inner = self.write();
        let current = inner.current + 1;
        *inner = Inner {
            current,
            valid_from: current,
            ..Inner::default()
        };
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn is_valid(&self, worker: &str, tags: &[String], read_version: u64) -> bool {
        if read_version < self.valid_from {
            return false;
        }
        let Some(versions) = self.by_worker.get(worker) else {
            return true;
        };
        let tag_versions = tags.iter().filter_map(|tag| versions.get(tag));
        tag_versions
            .chain(versions.get(EVERYTHING))
            .all(|version| *version <= read_version)
    }

    fn invalidate(&mut self, worker: &str, tags: &BTreeSet<String>) {
        if tags.is_empty() {
            return;
        }
        self.current += 1;
        let versions = self.by_worker.entry(worker.to_owned()).or_default();
        for tag in tags {
            self.tags += usize::from(versions.insert(tag.clone(), self.current).is_none());
        }
        if self.tags > TAG_VERSIONS_MAX {
            self.evict_older_half();
        }
    }

    fn evict_older_half(&mut self) {
        let mut versions: Vec<u64> = self
            .by_worker
            .values()
            .flat_map(HashMap::values)
            .copied()
            .collect();
        let middle = versions.len() / 2;
        let (_, median, _) = versions.select_nth_unstable(middle);
        let valid_from = *median;
        self.valid_from = self.valid_from.max(valid_from);
        self.by_worker
            .values_mut()
            .for_each(|versions| versions.retain(|_, version| *version > valid_from));
        self.by_worker.retain(|_, versions| !versions.is_empty());
        self.tags = self.by_worker.values().map(HashMap::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(tags: &[&str]) -> Vec<String> {
        tags.iter().map(|&tag| tag.to_owned()).collect()
    }

    fn invalidate(versions: &TagVersions, worker: &str, tag: &str) {
        versions.invalidate(worker, &BTreeSet::from([tag.to_owned()]));
    }

    #[test]
    fn is_valid_until_a_tag_is_invalidated_after_the_read() {
        let versions = TagVersions::default();
        invalidate(&versions, "shop", "a");
        let read_version = versions.current();
        let is_valid = |of: &[&str]| versions.is_valid("shop", &tags(of), read_version);
        invalidate(&versions, "shop", "b");
        invalidate(&versions, "other", "c");
        assert!(is_valid(&["a", "c"]) && is_valid(&[]));
        assert!(!is_valid(&["a", "b"]));
        assert!(versions.is_valid("shop", &tags(&["b"]), versions.current()));
        invalidate(&versions, "shop", EVERYTHING);
        assert!(!is_valid(&[]) && !is_valid(&["a"]));
        let read_version = versions.current();
        versions.invalidate_all();
        assert!(!versions.is_valid("fourth", &[], read_version));
        assert!(versions.is_valid("fourth", &[], versions.current()));
    }

    #[test]
    fn a_value_with_evicted_tags_is_not_valid() {
        let versions = TagVersions::default();
        let read_version = versions.current();
        invalidate(&versions, "shop", "first");
        for n in 0..TAG_VERSIONS_MAX {
            invalidate(&versions, "shop", &format!("tag {n}"));
        }
        assert!(
            versions.read().tags <= TAG_VERSIONS_MAX / 2 + 1,
            "{}",
            versions.read().tags
        );
        assert!(!versions.is_valid("shop", &tags(&["first"]), read_version));
        let last = format!("tag {}", TAG_VERSIONS_MAX - 1);
        assert!(!versions.is_valid("shop", &tags(&[&last]), versions.current() - 1));
        assert!(versions.is_valid("shop", &tags(&["first", &last]), versions.current()));
    }
}
