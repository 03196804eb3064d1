//! Cache writes of a handler, buffered until its transaction commits, and the limits of the cache.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

/// The longest key or tag, in bytes.
pub const NAME_MAX: usize = 255;

/// The largest value, in bytes.
pub const VALUE_MAX: usize = 1 << 20;

/// The largest total of the values that one handler call puts, in bytes.
pub const PUTS_SIZE_MAX: usize = 4 << 20;

/// The most tags of one value.
pub const TAGS_MAX: usize = 32;

/// The most values that one handler call puts, and the most tags that it invalidates.
pub const WRITES_MAX: usize = 1_000;

/// The longest time to live.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The tag that every value of a worker has besides its own. Invalidating it clears the worker's
/// cache.
pub const EVERYTHING: &str = "";

/// A value to put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachePut {
    /// The bytes to store.
    pub value: Bytes,
    /// How long the value is kept, at most [`TTL_MAX`].
    pub ttl: Duration,
    /// Invalidating one of these tags removes the value.
    pub tags: Vec<String>,
}

/// The puts and invalidations of one call, or of the items of a batch in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheWrites {
    puts: BTreeMap<String, CachePut>,
    tags: BTreeSet<String>,
    puts_size: usize,
    puts_count: usize,
}

impl CacheWrites {
    /// Whether there are neither puts nor invalidations.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.tags.is_empty()
    }

    /// The values to put, by key.
    pub fn puts(&self) -> impl Iterator<Item = (&str, &CachePut)> {
        self.puts.iter().map(|(key, put)| (key.as_str(), put))
    }

    /// The tags to invalidate.
    pub fn tags(&self) -> &BTreeSet<String> {
        &self.tags
    }

    /// The value put under a key.
    pub fn pending_put(&self, key: &str) -> Option<&CachePut> {
        self.puts.get(key)
    }

    /// Whether one of these tags was invalidated.
    pub fn invalidates(&self, tags: &[String]) -> bool {
        tags.iter().any(|tag| self.tags.contains(tag))
    }

    /// The number of puts, including overwritten and invalidated ones.
    pub fn puts_count(&self) -> usize {
        self.puts_count
    }

    /// The total size of these puts, in bytes.
    pub fn puts_size(&self) -> usize {
        self.puts_size
    }

    /// Puts a value, which replaces an earlier one under the same key.
    pub fn put(&mut self, key: String, put: CachePut) {
        self.puts_size += put.value.len();
        self.puts_count += 1;
        self.puts.insert(key, put);
    }

    /// Invalidates tags. Earlier puts with one of these tags are dropped.
    pub fn invalidate(&mut self, tags: impl IntoIterator<Item = String>) {
        self.tags.extend(tags);
        let invalid = &self.tags;
        self.puts
            .retain(|_, put| !put.tags.iter().any(|tag| invalid.contains(tag)));
    }

    /// Appends the writes of a later item.
    pub fn extend(&mut self, later: CacheWrites) {
        let CacheWrites {
            puts,
            tags,
            puts_size,
            puts_count,
        } = later;
        // Only the tags of the later item: a value put after an earlier item invalidated its tag
        // stays.
        self.puts
            .retain(|_, put| !put.tags.iter().any(|tag| tags.contains(tag)));
        self.tags.extend(tags);
        self.puts.extend(puts);
        self.puts_size += puts_size;
        self.puts_count += puts_count;
    }
}

/// Checks a key or a tag: 1 to [`NAME_MAX`] bytes without control characters.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(format!(
            "a {what} has 1 to {NAME_MAX} bytes and no control characters"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(text: &'static str, tags: &[&str]) -> CachePut {
        let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        CachePut {
            value: Bytes::from_static(text.as_bytes()),
            ttl: Duration::from_secs(1),
            tags,
        }
    }

    fn invalidate(writes: &mut CacheWrites, tag: &str) {
        writes.invalidate([tag.to_owned()]);
    }

    #[test]
    fn invalidate_drops_earlier_puts_and_keeps_later_ones() {
        let mut writes = CacheWrites::default();
        writes.put("before".to_owned(), put("1", &["t"]));
        writes.put("other".to_owned(), put("2", &["u"]));
        invalidate(&mut writes, "t");
        writes.put("after".to_owned(), put("3", &["t"]));
        let keys: Vec<&str> = writes.puts().map(|(key, _)| key).collect();
        assert_eq!(keys, ["after", "other"]);
    }

    #[test]
    fn extend_invalidates_earlier_puts() {
        let (mut first, mut second) = (CacheWrites::default(), CacheWrites::default());
        invalidate(&mut first, "t");
        first.put("a".to_owned(), put("1", &["t"]));
        first.put("b".to_owned(), put("1", &["u"]));
        invalidate(&mut second, "u");
        second.put("a".to_owned(), put("2", &["t", "u"]));
        first.extend(second);
        let values: Vec<_> = first
            .puts()
            .map(|(key, put)| (key, put.value.clone()))
            .collect();
        assert_eq!(values, [("a", Bytes::from_static(b"2"))]);
        assert_eq!(first.tags().len(), 2);
    }

    #[test]
    fn puts_count_includes_invalidated_puts() {
        let mut writes = CacheWrites::default();
        for _ in 0..3 {
            writes.put("same".to_owned(), put("abcd", &["t"]));
        }
        invalidate(&mut writes, "t");
        assert_eq!(
            (
                writes.puts().count(),
                writes.puts_count(),
                writes.puts_size()
            ),
            (0, 3, 12)
        );
    }
}
