//! The cache that all hosts share: one Redis or Valkey.
//!
//! The rules of `tag_versions.rs` apply here too, with a version per worker that is kept in Redis.
//! An invalidation's version is one more than the last, or the Redis time in microseconds if that
//! is higher. A Redis that lost all data therefore never issues the same version twice. A value is
//! valid as long as no tag was invalidated after the version current when the value was read. If
//! Redis loses versions, values are loaded again.
//!
//! A slow or failing request is abandoned. Invalidations that could not be applied are pending, and
//! nothing is read until they are applied.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Script, ScriptInvocation};

use super::CacheKey;
use super::local::{Entry, jittered};
use crate::config::CacheUrl;
use crate::metrics::Metrics;
use crate::model::breaker::{Breaker, Permit, State};
use crate::model::cache_writes::EVERYTHING;

/// The longest wait for a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(100);

/// How long connecting may take. A caller still waits no longer than for a response.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the version of a tag without values is kept, in milliseconds: longer than any load.
const TAG_VERSION_TTL_MS: u64 = 60 * 60 * 1_000;

/// How long the ids of applied invalidations are kept, in milliseconds.
const APPLIED_TTL_MS: u64 = 10 * 60 * 1_000;

/// The maximum number of pending tags per worker; beyond that everything of the worker is
/// invalidated.
const PENDING_TAGS_MAX: usize = 10_000;

/// The size of one store request in bytes. The last value may exceed it.
const STORE_SIZE_MAX: usize = 1 << 20;

pub(super) struct Shared {
    manager: ConnectionManager,
    breaker: Mutex<Breaker>,
    /// The last version read, by worker.
    last_seen: Mutex<HashMap<String, u64>>,
    /// Tags still to be invalidated, by worker.
    pending: Mutex<HashMap<String, BTreeSet<String>>>,
    has_pending: AtomicBool,
    /// Held by the task that flushes pending invalidations.
    flushing: tokio::sync::Mutex<()>,
    metrics: Arc<Metrics>,
}

static GET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("get.lua")));
static INVALIDATE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("invalidate.lua")));
static STORE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("store.lua")));

/// A value as stored in Redis.
pub(super) struct SharedEntry {
    value: Bytes,
    tags: Vec<String>,
    age: Duration,
    /// The remaining time for which it is fresh.
    fresh_for: Duration,
    /// The remaining time for which it is served, fresh and then stale.
    expires_in: Duration,
}

/// A value to store.
#[derive(Clone)]
pub(super) struct SharedPut {
    key: String,
    value: Bytes,
    /// One tag per line.
    tags: String,
    loaded_at: Instant,
    fresh_until: Instant,
    expires_at: Instant,
}

impl SharedPut {
    pub fn new(key: &CacheKey, entry: &Entry) -> Self {
        SharedPut {
            key: redis_key(&key.worker, &key.key),
            value: entry.value.clone(),
            tags: entry.tags.join("\n"),
            loaded_at: entry.loaded_at,
            fresh_until: entry.fresh_until,
            expires_at: entry.expires_at,
        }
    }
}

impl SharedEntry {
    /// The same value in this process, read after `read_version`. With jitter, so that hosts do not
    /// expire it at the same time.
    pub fn into_entry(self, read_version: u64) -> Entry {
        let now = Instant::now();
        let fresh = jittered(self.fresh_for);
        Entry {
            value: self.value,
            tags: self.tags.into(),
            read_version,
            loaded_at: now.checked_sub(self.age).unwrap_or(now),
            fresh_until: now + fresh,
            expires_at: now + self.expires_in,
        }
    }
}

/// A Redis key. All keys of a worker have the same hash tag, so they are on one node of a cluster.
fn redis_key(worker: &str, rest: &str) -> String {
    format!("oncely:{{{worker}}}:{rest}")
}

impl Shared {
    pub fn open(url: &CacheUrl, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let client = redis::Client::open(url.reveal())
            .with_context(|| format!("parse {}", url.redacted()))?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_number_of_retries(0);
        let manager = client
            .get_connection_manager_lazy(config)
            .with_context(|| format!("connect to {}", url.redacted()))?;
        Ok(Shared {
            manager,
            breaker: Mutex::new(Breaker::new(Instant::now())),
            last_seen: Mutex::default(),
            pending: Mutex::default(),
            has_pending: AtomicBool::new(false),
            flushing: tokio::sync::Mutex::default(),
            metrics,
        })
    }

    /// Whether reads and writes reach Redis now.
    pub fn is_up(&self) -> bool {
        lock(&self.breaker).state() == State::Closed && !self.has_pending.load(Ordering::Acquire)
    }

    /// The last version read; there may be a later one.
    pub fn last_seen(&self, worker: &str) -> u64 {
        lock(&self.last_seen)
            .get(worker)
            .copied()
            .unwrap_or_default()
    }

    /// The value of a key, if it is valid, and a version from before any other read.
    pub async fn get(&self, key: &CacheKey) -> (Option<SharedEntry>, u64) {
        type Reply = (
            u64,
            Option<Vec<u8>>,
            Option<String>,
            Option<u64>,
            Option<u64>,
            Option<u64>,
        );
        let worker = key.worker.as_str();
        if !self.acquire().await {
            return (None, self.last_seen(worker));
        }
        let mut get = GET.key(redis_key(worker, &key.key));
        get.key(redis_key(worker, "version"))
            .arg(redis_key(worker, "t:"));
        let Some((version, value, tags, left, ttl, stale)) = self.run::<Reply>(get).await else {
            return (None, self.last_seen(worker));
        };
        self.set_last_seen(worker, version);
        let found = value.zip(left).map(|(value, left)| SharedEntry {
            value: Bytes::from(value),
            tags: tags
                .unwrap_or_default()
                .lines()
                .map(str::to_owned)
                .collect(),
            age: Duration::from_millis(ttl.unwrap_or_default().saturating_sub(left)),
            fresh_for: Duration::from_millis(left.saturating_sub(stale.unwrap_or_default())),
            expires_in: Duration::from_millis(left),
        });
        (found, version)
    }

    /// Invalidates tags, then stores the values of a transaction, which it read at `read_version`.
    /// The invalidation `id` is applied once. On failure the tags stay pending.
    pub async fn commit(
        &self,
        worker: &str,
        id: Option<&str>,
        tags: &BTreeSet<String>,
        puts: Vec<SharedPut>,
        read_version: u64,
    ) {
        if tags.is_empty() {
            return self.store(worker, puts, read_version).await;
        }
        if !self.acquire().await {
            return self.defer(worker, tags);
        }
        let script = Self::invalidation_script(worker, id, tags, &puts, read_version);
        let Some(response) = self.run::<Vec<u64>>(script).await else {
            return self.defer(worker, tags);
        };
        let Some((&version, is_valid)) = response.split_first() else {
            return;
        };
        self.set_last_seen(worker, version);
        let puts = puts
            .into_iter()
            .zip(is_valid)
            .filter(|(_, is_valid)| **is_valid == 1)
            .map(|(put, _)| put)
            .collect();
        self.store(worker, puts, version).await;
    }

    /// Stores values that were read at `read_version` and are still valid.
    pub async fn store(&self, worker: &str, puts: Vec<SharedPut>, read_version: u64) {
        let mut puts = puts.into_iter().peekable();
        while puts.peek().is_some() {
            if !self.acquire().await {
                return;
            }
            let mut store = STORE.arg(redis_key(worker, ""));
            store.arg(read_version);
            let (mut size, now) = (0, Instant::now());
            while size < STORE_SIZE_MAX
                && let Some(put) = puts.next()
            {
                size += put.value.len();
                let ms = |from: Instant, to: Instant| {
                    to.saturating_duration_since(from).as_millis() as u64
                };
                store
                    .arg(put.key)
                    .arg(ms(now, put.expires_at))
                    .arg(ms(put.loaded_at, put.expires_at));
                store
                    .arg(ms(put.fresh_until, put.expires_at))
                    .arg(put.tags)
                    .arg(put.value.as_ref());
            }
            let Some(version) = self.run::<u64>(store).await else {
                return;
            };
            self.set_last_seen(worker, version);
        }
    }

    fn invalidation_script(
        worker: &str,
        id: Option<&str>,
        tags: &BTreeSet<String>,
        puts: &[SharedPut],
        read_version: u64,
    ) -> ScriptInvocation<'static> {
        let mut script = INVALIDATE.arg(redis_key(worker, ""));
        script
            .arg(id.unwrap_or_default())
            .arg(TAG_VERSION_TTL_MS)
            .arg(APPLIED_TTL_MS)
            .arg(read_version)
            .arg(tags.len());
        for tag in tags {
            script.arg(tag);
        }
        for put in puts {
            script.arg(put.tags.as_str());
        }
        script
    }

    /// Acquires a permit of the circuit breaker for one request, and flushes pending invalidations.
    /// False if there is no permit or some remain pending.
    async fn acquire(&self) -> bool {
        let permit = lock(&self.breaker).permit(Instant::now());
        permit == Permit::Granted
            && (!self.has_pending.load(Ordering::Acquire) || self.flush_pending().await)
    }

    fn defer(&self, worker: &str, tags: &BTreeSet<String>) {
        let mut pending = lock(&self.pending);
        let worker_tags = pending.entry(worker.to_owned()).or_default();
        worker_tags.extend(tags.iter().cloned());
        if worker_tags.len() > PENDING_TAGS_MAX {
            *worker_tags = BTreeSet::from([EVERYTHING.to_owned()]);
        }
        self.has_pending.store(true, Ordering::Release);
    }

    /// Applies pending invalidations; false if some remain.
    async fn flush_pending(&self) -> bool {
        let Ok(_flushing) = self.flushing.try_lock() else {
            lock(&self.breaker).inconclusive(Instant::now());
            return false;
        };
        loop {
            let next = lock(&self.pending)
                .iter()
                .next()
                .map(|(worker, tags)| (worker.clone(), tags.clone()));
            let Some((worker, tags)) = next else { break };
            let script = Self::invalidation_script(&worker, None, &tags, &[], 0);
            if self.run::<Vec<u64>>(script).await.is_none() {
                return false;
            }
            let mut pending = lock(&self.pending);
            if let Some(left) = pending.get_mut(&worker) {
                left.retain(|tag| !tags.contains(tag));
            }
            pending.retain(|_, tags| !tags.is_empty());
        }
        let pending = lock(&self.pending);
        self.has_pending
            .store(!pending.is_empty(), Ordering::Release);
        pending.is_empty()
    }

    fn set_last_seen(&self, worker: &str, version: u64) {
        let mut last_seen = lock(&self.last_seen);
        match last_seen.get_mut(worker) {
            Some(last_seen) => *last_seen = version,
            None => drop(last_seen.insert(worker.to_owned(), version)),
        }
    }

    /// Runs a script; `None` if it fails or takes too long. Runs in a task, so that a connection is
    /// completed even after the caller has stopped waiting.
    async fn run<T>(&self, script: ScriptInvocation<'static>) -> Option<T>
    where
        T: redis::FromRedisValue + Send + 'static,
    {
        let mut manager = self.manager.clone();
        let task = tokio::spawn(async move { script.invoke_async::<T>(&mut manager).await });
        let why = match tokio::time::timeout(RESPONSE_TIMEOUT, task).await {
            Ok(Ok(Ok(response))) => {
                if lock(&self.breaker).succeeded() {
                    tracing::info!("shared cache available again");
                }
                return Some(response);
            }
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no response within {RESPONSE_TIMEOUT:?}"),
        };
        self.metrics.cache.shared_failed();
        let mut breaker = lock(&self.breaker);
        let was_closed = breaker.state() == State::Closed;
        if breaker.failed(Instant::now(), rand::random(), &why) && was_closed {
            tracing::warn!(error = why, "shared cache unavailable, not used for now");
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
