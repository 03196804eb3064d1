//! When tags were invalidated in this process, counted in invalidations.
//!
//! A value remembers how many there had been before its load began, and is valid as long as none of its tags was invalidated
//! since. So nobody has to know a value's tags before it is loaded.

use std::collections::{BTreeSet, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::CacheKey;
use super::local::Entry;
use crate::model::cache_writes::EVERYTHING;

/// How many tags are remembered. With more, the older half is forgotten, and with it everything that is as old.
const MARKS_MAX: usize = 200_000;

#[derive(Default)]
pub(super) struct Marks(RwLock<Book>);

#[derive(Default)]
struct Book {
    /// How many invalidations there have been.
    now: u64,
    /// What began before this is invalid, whatever its tags.
    floor: u64,
    /// The last invalidation of each tag, by worker.
    of_worker: HashMap<String, HashMap<String, u64>>,
    tags: usize,
}

impl Marks {
    /// A point in the order of invalidations.
    pub fn now(&self) -> u64 {
        self.read().now
    }

    /// Whether none of `tags` was invalidated since.
    pub fn is_valid(&self, worker: &str, tags: &[String], since: u64) -> bool {
        self.read().is_valid(worker, tags, since)
    }

    /// Invalidates tags.
    pub fn invalidate(&self, worker: &str, tags: &BTreeSet<String>) {
        self.write().invalidate(worker, tags);
    }

    /// Lets `puts` of a transaction pass its own invalidations: those that are valid before them are valid after them, the
    /// others are out. At once, so that nobody else's invalidation can slip in between.
    pub fn pass(&self, worker: &str, tags: &BTreeSet<String>, puts: &mut Vec<(CacheKey, Entry)>) {
        let mut book = self.write();
        puts.retain(|(_, entry)| book.is_valid(worker, &entry.tags, entry.since));
        book.invalidate(worker, tags);
        for (_, entry) in puts {
            entry.since = book.now;
        }
    }

    /// Makes everything invalid that was read before.
    pub fn forget_all(&self) {
        let mut book = self.write();
        let now = book.now + 1;
        *book = Book { now, floor: now, ..Book::default() };
    }

    fn read(&self) -> RwLockReadGuard<'_, Book> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Book> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn is_valid(&self, worker: &str, tags: &[String], since: u64) -> bool {
        if since < self.floor {
            return false;
        }
        let Some(marks) = self.of_worker.get(worker) else { return true };
        let of_tags = tags.iter().filter_map(|tag| marks.get(tag));
        of_tags.chain(marks.get(EVERYTHING)).all(|mark| *mark <= since)
    }

    fn invalidate(&mut self, worker: &str, tags: &BTreeSet<String>) {
        if tags.is_empty() {
            return;
        }
        self.now += 1;
        let marks = self.of_worker.entry(worker.to_owned()).or_default();
        for tag in tags {
            self.tags += usize::from(marks.insert(tag.clone(), self.now).is_none());
        }
        if self.tags > MARKS_MAX {
            self.forget_older_half();
        }
    }

    fn forget_older_half(&mut self) {
        let mut marks: Vec<u64> = self.of_worker.values().flat_map(HashMap::values).copied().collect();
        let middle = marks.len() / 2;
        let (_, median, _) = marks.select_nth_unstable(middle);
        let floor = *median;
        self.floor = self.floor.max(floor);
        self.of_worker.values_mut().for_each(|marks| marks.retain(|_, mark| *mark > floor));
        self.of_worker.retain(|_, marks| !marks.is_empty());
        self.tags = self.of_worker.values().map(HashMap::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(tags: &[&str]) -> Vec<String> {
        tags.iter().map(|&tag| tag.to_owned()).collect()
    }

    fn invalidate(marks: &Marks, worker: &str, tag: &str) {
        marks.invalidate(worker, &BTreeSet::from([tag.to_owned()]));
    }

    #[test]
    fn a_value_is_valid_until_one_of_its_tags_is_invalidated_after_it_began() {
        let marks = Marks::default();
        invalidate(&marks, "shop", "a");
        let began = marks.now();
        let is_valid = |of: &[&str]| marks.is_valid("shop", &tags(of), began);
        invalidate(&marks, "shop", "b");
        invalidate(&marks, "other", "c");
        assert!(is_valid(&["a", "c"]) && is_valid(&[]));
        assert!(!is_valid(&["a", "b"]));
        assert!(marks.is_valid("shop", &tags(&["b"]), marks.now()));
        invalidate(&marks, "shop", EVERYTHING);
        assert!(!is_valid(&[]) && !is_valid(&["a"]));
        let began = marks.now();
        marks.forget_all();
        assert!(!marks.is_valid("fourth", &[], began));
        assert!(marks.is_valid("fourth", &[], marks.now()));
    }

    #[test]
    fn what_is_forgotten_of_tags_is_never_taken_for_valid() {
        let marks = Marks::default();
        let began = marks.now();
        invalidate(&marks, "shop", "first");
        for n in 0..MARKS_MAX {
            invalidate(&marks, "shop", &format!("tag {n}"));
        }
        assert!(marks.read().tags <= MARKS_MAX / 2 + 1, "{}", marks.read().tags);
        assert!(!marks.is_valid("shop", &tags(&["first"]), began));
        let last = format!("tag {}", MARKS_MAX - 1);
        assert!(!marks.is_valid("shop", &tags(&[&last]), marks.now() - 1));
        assert!(marks.is_valid("shop", &tags(&["first", &last]), marks.now()));
    }
}
