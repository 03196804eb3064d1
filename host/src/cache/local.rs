//! The cache of this process, bounded by size and time to live. Frequently used values stay (moka's
//! TinyLFU).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use moka::Expiry;
use moka::ops::compute::Op;
use moka::sync::Cache as Moka;

use super::tag_versions::TagVersions;
use super::{CacheKey, Cached, Layer, Policy};
use crate::model::cache_writes::{CachePut, TTL_MAX};

/// The approximate overhead of an entry besides its text, in bytes.
const ENTRY_SIZE: usize = 300;

/// The largest random reduction of a time to live, as a fraction.
const JITTER: f64 = 0.1;

pub(super) struct Local {
    values: Moka<CacheKey, Arc<Entry>>,
    pub tag_versions: TagVersions,
}

/// A cached value with its tags and times.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub value: Bytes,
    pub tags: Arc<[String]>,
    /// The read version of this process, taken before the value was read.
    pub read_version: u64,
    /// When its load started.
    pub loaded_at: Instant,
    pub fresh_until: Instant,
    /// From here on it is no longer served.
    pub expires_at: Instant,
}

impl Entry {
    pub fn new(
        value: Bytes,
        tags: Vec<String>,
        policy: Policy,
        read_version: u64,
        loaded_at: Instant,
    ) -> Self {
        let fresh_until = loaded_at + jittered(policy.ttl.min(TTL_MAX));
        let expires_at = fresh_until + policy.stale.min(TTL_MAX);
        Entry {
            value,
            tags: tags.into(),
            read_version,
            loaded_at,
            fresh_until,
            expires_at,
        }
    }

    /// The entry for a value put by a handler. It has no load, so it is never served stale.
    pub fn from_put(put: &CachePut, read_version: u64) -> Self {
        let policy = Policy {
            ttl: put.ttl,
            stale: Duration::ZERO,
        };
        Entry::new(
            put.value.clone(),
            put.tags.clone(),
            policy,
            read_version,
            Instant::now(),
        )
    }

    pub fn is_stale(&self, now: Instant) -> bool {
        now >= self.fresh_until
    }

    pub fn to_cached(&self, layer: Layer) -> Cached {
        let now = Instant::now();
        Cached {
            value: self.value.clone(),
            tags: Arc::clone(&self.tags),
            age: now.saturating_duration_since(self.loaded_at),
            is_stale: self.is_stale(now),
            layer,
        }
    }

    fn size(&self, key: &CacheKey) -> usize {
        let tags: usize = self
            .tags
            .iter()
            .map(|tag| tag.len() + size_of::<String>())
            .sum();
        ENTRY_SIZE + key.worker.len() + key.key.len() + self.value.len() + tags
    }
}

/// A randomly reduced time to live. It is never extended, because it is a guaranteed maximum.
pub(super) fn jittered(ttl: Duration) -> Duration {
    ttl.mul_f64(1.0 - JITTER * rand::random::<f64>())
}

/// The expiry times of entries.
struct EntryExpiry;

impl Expiry<CacheKey, Arc<Entry>> for EntryExpiry {
    fn expire_after_create(
        &self,
        _: &CacheKey,
        entry: &Arc<Entry>,
        now: Instant,
    ) -> Option<Duration> {
        Some(entry.expires_at.saturating_duration_since(now))
    }

    fn expire_after_update(
        &self,
        _: &CacheKey,
        entry: &Arc<Entry>,
        now: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(entry.expires_at.saturating_duration_since(now))
    }
}

impl Local {
    /// A cache of at most `size` bytes.
    pub fn new(size: u64) -> Self {
        let values = Moka::builder()
            .max_capacity(size)
            .weigher(|key: &CacheKey, entry: &Arc<Entry>| {
                u32::try_from(entry.size(key)).unwrap_or(u32::MAX)
            })
            .expire_after(EntryExpiry)
            .build();
        Local {
            values,
            tag_versions: TagVersions::default(),
        }
    }

    /// The entry of a key, if it is valid.
    pub fn get(&self, key: &CacheKey) -> Option<Arc<Entry>> {
        let entry = self.values.get(key)?;
        if entry.expires_at > Instant::now() && self.is_valid(key, &entry) {
            return Some(entry);
        }
        None
    }

    pub fn is_valid(&self, key: &CacheKey, entry: &Entry) -> bool {
        self.tag_versions
            .is_valid(&key.worker, &entry.tags, entry.read_version)
    }

    /// Stores an entry, unless the current one was read later.
    pub fn insert(&self, key: &CacheKey, entry: Arc<Entry>) {
        self.values
            .entry_by_ref(key)
            .and_compute_with(|current| match current {
                Some(current) if current.value().read_version > entry.read_version => Op::Nop,
                _ => Op::Put(entry),
            });
    }

    /// The number of entries and their approximate size in bytes.
    pub fn measure(&self) -> (u64, u64) {
        self.values.run_pending_tasks();
        (self.values.entry_count(), self.values.weighted_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insert_keeps_the_later_read_and_the_size_is_bounded() {
        let local = Local::new(100_000);
        let policy = Policy {
            ttl: Duration::from_secs(60),
            stale: Duration::ZERO,
        };
        let entry = |text: &str, read_version| {
            let value = Bytes::copy_from_slice(text.as_bytes());
            Arc::new(Entry::new(
                value,
                Vec::new(),
                policy,
                read_version,
                Instant::now(),
            ))
        };
        let key = CacheKey::value("shop", "a");
        local.insert(&key, entry("new", 2));
        local.insert(&key, entry("old", 1));
        assert_eq!(local.get(&key).unwrap().value, "new");
        for n in 0..1_000 {
            local.insert(
                &CacheKey::value("shop", &n.to_string()),
                entry(&"x".repeat(1_000), 2),
            );
        }
        let (entries, size) = local.measure();
        assert!(
            entries < 80 && size <= 100_000,
            "{entries} entries of {size} bytes"
        );
    }

    #[test]
    fn jittered_ttl_varies_and_is_never_longer_than_asked() {
        let ttls: Vec<Duration> = (0..1_000)
            .map(|_| jittered(Duration::from_secs(10)))
            .collect();
        let (least, most) = (ttls.iter().min().unwrap(), ttls.iter().max().unwrap());
        assert!(*least >= Duration::from_secs(9) && *most <= Duration::from_secs(10));
        assert!(*most - *least > Duration::from_millis(500));
    }
}
