//! The read cache: this process, then Redis if configured, then the load.
//!
//! A value has tags. Invalidating a tag invalidates every value with that tag, including values
//! that are being loaded. A value is only as recent as the moment *before* its load started. A load
//! that read the database before a commit can therefore never leave the old value in the cache
//! after it. The time to live bounds missed invalidations.
//!
//! The cache never fails a read: without Redis, or with a slow one, the read is a miss.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::Timestamp;

use crate::config::CacheSettings;
use crate::metrics::{CacheMetrics, MeasuredCache, Metrics};
use crate::model::cache_writes::{CacheWrites, VALUE_MAX};
use crate::model::invalidation::Invalidation;

pub mod feed;
mod local;
mod shared;
mod single_flight;
mod tag_versions;

use local::{Entry, Local};
use shared::{Shared, SharedPut};
use single_flight::{FlightRole, LoadOutcome, SingleFlight, SingleFlightGuard};

/// How long the ids of applied invalidations are remembered, and how many of them.
const APPLIED_TTL: Duration = Duration::from_secs(10 * 60);
const APPLIED_MAX: u64 = 100_000;

/// The cache of one host. Cheap to clone.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    local: Local,
    shared: Option<Arc<Shared>>,
    single_flight: SingleFlight,
    /// Ids of applied invalidations. A host also receives its own.
    applied: moka::sync::Cache<String, ()>,
    metrics: Arc<Metrics>,
}

/// The key of a value. Keys of different workers, or of different kinds, never collide.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// The worker whose cache holds the value.
    pub worker: String,
    key: String,
}

impl CacheKey {
    /// The key of a value that a handler stores under `key`.
    pub fn value(worker: &str, key: &str) -> Self {
        CacheKey {
            worker: worker.to_owned(),
            key: format!("v:{key}"),
        }
    }

    /// The key of an HTTP response; `key` contains everything that the response depends on.
    pub fn response(worker: &str, key: &str) -> Self {
        CacheKey {
            worker: worker.to_owned(),
            key: format!("r:{key}"),
        }
    }
}

/// How long a value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long a value is fresh. Shortened at random by up to a tenth, so that values loaded
    /// together do not expire together.
    pub ttl: Duration,
    /// How long after that a value is still served, while it is reloaded in the background.
    pub stale: Duration,
}

/// A loaded value.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The bytes to cache and to return.
    pub value: Bytes,
    /// Its tags, besides the implicit tag for everything of its worker.
    pub tags: Vec<String>,
    /// `None` for a value that only its own caller may receive.
    pub policy: Option<Policy>,
}

/// A value and its source.
#[derive(Debug, Clone)]
pub struct Cached {
    /// The bytes that were loaded.
    pub value: Bytes,
    /// Its tags, besides the implicit tag for everything of its worker.
    pub tags: Arc<[String]>,
    /// The time since its load started.
    pub age: Duration,
    /// Whether it is past its time to live and being reloaded.
    pub is_stale: bool,
    /// Where the value was found.
    pub layer: Layer,
}

/// The source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// This process.
    Local,
    /// Redis.
    Shared,
    /// A fresh load.
    Loaded,
}

impl Layer {
    /// The value of a metric's label: `local`, `shared` or `loaded`.
    pub fn as_str(self) -> &'static str {
        match self {
            Layer::Local => "local",
            Layer::Shared => "shared",
            Layer::Loaded => "loaded",
        }
    }
}

/// A point in the order of invalidations. A value read after it is valid until one of its tags is
/// invalidated later.
#[derive(Debug, Clone, Copy)]
pub struct ReadVersion {
    local: u64,
    shared: u64,
}

/// The reason why a load failed, shared by all callers that waited for it.
#[derive(Debug, Clone)]
pub struct LoadError(Arc<anyhow::Error>);

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl LoadError {
    /// The error of the load itself.
    pub fn cause(&self) -> &anyhow::Error {
        &self.0
    }
}

type Load = Box<dyn FnOnce() -> BoxFuture<'static, anyhow::Result<Loaded>> + Send>;

impl Cache {
    /// Opens the cache as configured. Redis may be unreachable; it is used as soon as it answers.
    ///
    /// # Errors
    /// The URL of the shared cache is invalid.
    pub fn open(settings: &CacheSettings, metrics: Arc<Metrics>) -> anyhow::Result<Cache> {
        let shared = settings
            .shared
            .as_ref()
            .map(|url| Shared::open(url, Arc::clone(&metrics)));
        Ok(Cache(Arc::new(Inner {
            local: Local::new(settings.size),
            shared: shared
                .transpose()
                .context("open the shared cache")?
                .map(Arc::new),
            single_flight: SingleFlight::default(),
            applied: moka::sync::Cache::builder()
                .max_capacity(APPLIED_MAX)
                .time_to_live(APPLIED_TTL)
                .build(),
            metrics,
        })))
    }

    /// The current read version. To be taken before the data for a value is read; see
    /// [`ReadVersion`]. Makes no request.
    pub fn read_version(&self, worker: &str) -> ReadVersion {
        let shared = self
            .0
            .shared
            .as_ref()
            .map(|shared| shared.last_seen(worker))
            .unwrap_or_default();
        ReadVersion {
            local: self.0.local.tag_versions.current(),
            shared,
        }
    }

    /// The value under a key, if this process or Redis has it.
    pub async fn get(&self, key: &CacheKey) -> Option<Cached> {
        let inner = &self.0;
        let found = match inner.local.get(key) {
            Some(entry) => Some(entry.to_cached(Layer::Local)),
            None => inner
                .fetch(key)
                .await
                .0
                .map(|entry| entry.to_cached(Layer::Shared)),
        };
        match &found {
            Some(cached) => inner.count_hit(key, cached),
            None => inner.counts().miss(&key.worker),
        }
        found
    }

    /// The value under a key; on a miss, `load` runs once for all concurrent callers on this host.
    /// A stale value is returned at once and reloaded in the background. The load runs to its end
    /// even if all callers are gone.
    ///
    /// A call after an invalidation on this host never returns a value loaded before it.
    ///
    /// # Errors
    /// The load failed.
    pub async fn get_or_load<F, L>(&self, key: &CacheKey, load: F) -> Result<Cached, LoadError>
    where
        F: FnOnce() -> L + Send + 'static,
        L: Future<Output = anyhow::Result<Loaded>> + Send + 'static,
    {
        let inner = &self.0;
        let started = inner.local.tag_versions.current();
        let load: Load = Box::new(|| load().boxed());
        loop {
            if let Some(entry) = inner.local.get(key) {
                let cached = entry.to_cached(Layer::Local);
                inner.count_hit(key, &cached);
                if cached.is_stale {
                    inner.refresh(key, load);
                }
                return Ok(cached);
            }
            let mut waiter = match inner.single_flight.join(key) {
                FlightRole::Leader(guard, mut waiter) => {
                    tokio::spawn(Arc::clone(inner).fetch_or_load(key.clone(), guard, load));
                    let outcome = waiter.wait().await?;
                    return inner.resolve(key, &outcome, false);
                }
                FlightRole::Follower(waiter) => waiter,
            };
            let outcome = waiter.wait().await?;
            match &outcome {
                // The value is only for the caller that loaded it.
                LoadOutcome::Uncached(_) => return inner.load_uncached(key, load).await,
                // The load started before an invalidation that precedes this call.
                LoadOutcome::Cached(entry, _)
                    if entry.read_version < started && !inner.local.is_valid(key, entry) => {}
                _ => return inner.resolve(key, &outcome, true),
            }
        }
    }

    /// Stores a value that was read after `read_version`, here and in Redis.
    pub async fn put(&self, key: &CacheKey, loaded: Loaded, read_version: ReadVersion) {
        if let Some(policy) = loaded.policy {
            let entry = Entry::new(
                loaded.value,
                loaded.tags,
                policy,
                read_version.local,
                Instant::now(),
            );
            self.0.insert(key, &Arc::new(entry), read_version).await;
        }
    }

    /// Applies the cache writes of a transaction that just committed: first its invalidations, then
    /// its values, which it read after `read_version`. `id` is that of the [`Invalidation`] for
    /// other hosts.
    pub async fn commit(
        &self,
        worker: &str,
        writes: &CacheWrites,
        read_version: ReadVersion,
        id: Option<&str>,
    ) {
        let inner = &self.0;
        if writes.is_empty() {
            return;
        }
        let tags = writes.tags();
        let mut puts: Vec<(CacheKey, Entry)> = writes
            .puts()
            .map(|(key, put)| {
                (
                    CacheKey::value(worker, key),
                    Entry::from_put(put, read_version.local),
                )
            })
            .collect();

        // Invalidate here.
        if !tags.is_empty() {
            id.inspect(|id| inner.applied.insert((*id).to_owned(), ()));
            inner.counts().invalidated(worker, tags.len());
            inner
                .local
                .tag_versions
                .invalidate_keeping(worker, tags, &mut puts);
        }

        // Invalidate and store in Redis.
        if let Some(shared) = &inner.shared {
            let shared_puts = puts
                .iter()
                .map(|(key, entry)| SharedPut::new(key, entry))
                .collect();
            shared
                .commit(worker, id, tags, shared_puts, read_version.shared)
                .await;
            // Another task may have copied the old value from there in the meantime.
            inner
                .local
                .tag_versions
                .invalidate_keeping(worker, tags, &mut puts);
        }

        // Store the values that are still valid here.
        for (key, entry) in puts {
            inner.local.insert(&key, Arc::new(entry));
        }
    }

    /// Applies an invalidation of another host. Idempotent.
    pub async fn apply_invalidation(&self, invalidation: &Invalidation) {
        let inner = &self.0;
        if inner.applied.contains_key(&invalidation.id) {
            return;
        }
        inner
            .local
            .tag_versions
            .invalidate(&invalidation.worker, &invalidation.tags);

        // Invalidate in Redis too.
        if let Some(shared) = &inner.shared {
            // The committing host has done this already, unless it crashed or could not reach
            // Redis.
            shared
                .commit(
                    &invalidation.worker,
                    Some(&invalidation.id),
                    &invalidation.tags,
                    Vec::new(),
                    0,
                )
                .await;
            inner
                .local
                .tag_versions
                .invalidate(&invalidation.worker, &invalidation.tags);
        }

        // Record and count it.
        inner.applied.insert(invalidation.id.clone(), ());
        inner
            .counts()
            .invalidated(&invalidation.worker, invalidation.tags.len());
        // Clocks may differ, so this can be negative.
        let after = Duration::try_from(Timestamp::now().duration_since(invalidation.at))
            .unwrap_or_default();
        inner
            .counts()
            .invalidation_applied(&invalidation.worker, after);
    }

    /// Invalidates tags of a worker here and in Redis, without notifying other hosts.
    pub async fn invalidate(&self, worker: &str, tags: impl IntoIterator<Item = String>) {
        let mut writes = CacheWrites::default();
        writes.invalidate(tags);
        self.commit(worker, &writes, self.read_version(worker), None)
            .await;
    }

    /// Drops everything in this process, because invalidations may have been missed.
    pub fn clear_local(&self) {
        self.0.local.tag_versions.invalidate_all();
    }

    /// The current measurements for `/metrics`.
    pub fn measure(&self) -> MeasuredCache {
        let (entries, size) = self.0.local.measure();
        MeasuredCache {
            entries,
            size,
            is_shared_up: self.0.shared.as_ref().is_some_and(|shared| shared.is_up()),
        }
    }
}

impl Inner {
    fn counts(&self) -> &CacheMetrics {
        &self.metrics.cache
    }

    fn count_hit(&self, key: &CacheKey, cached: &Cached) {
        self.counts()
            .hit(&key.worker, cached.layer.as_str(), cached.age);
        if cached.is_stale {
            self.counts().stale(&key.worker);
        }
    }

    /// The result of a flight for one of its callers.
    fn resolve(
        &self,
        key: &CacheKey,
        outcome: &LoadOutcome,
        is_follower: bool,
    ) -> Result<Cached, LoadError> {
        let cached = match outcome {
            LoadOutcome::Cached(entry, layer) => entry.to_cached(*layer),
            LoadOutcome::Uncached(value) => Cached::just_loaded(value.clone()),
            LoadOutcome::Failed(error) => return Err(error.clone()),
        };
        match cached.layer {
            Layer::Loaded if is_follower => self.counts().wait(&key.worker),
            Layer::Loaded => self.counts().miss(&key.worker),
            _ => self.count_hit(key, &cached),
        }
        Ok(cached)
    }

    /// Fetches a value from Redis and copies it to this process. The read version was taken before
    /// any other read.
    async fn fetch(&self, key: &CacheKey) -> (Option<Arc<Entry>>, ReadVersion) {
        let local = self.local.tag_versions.current();
        let Some(shared) = &self.shared else {
            return (None, ReadVersion { local, shared: 0 });
        };
        let (found, version) = shared.get(key).await;
        let entry = found.map(|found| Arc::new(found.into_entry(local)));
        let entry = entry.filter(|entry| self.local.is_valid(key, entry));
        if let Some(entry) = &entry {
            self.local.insert(key, Arc::clone(entry));
        }
        (
            entry,
            ReadVersion {
                local,
                shared: version,
            },
        )
    }

    /// Fetches or loads a value as the leader, for all callers of the key.
    async fn fetch_or_load(self: Arc<Self>, key: CacheKey, guard: SingleFlightGuard, load: Load) {
        let (found, read_version) = self.fetch(&key).await;
        let Some(entry) = found else {
            let outcome = self.load(&key, load, read_version).await;
            return guard.finish(outcome);
        };
        let is_stale = entry.is_stale(Instant::now());
        guard.finish(LoadOutcome::Cached(entry, Layer::Shared));
        if is_stale {
            self.refresh(&key, load);
        }
    }

    /// Reloads a value in the background, unless that is already happening.
    fn refresh(self: &Arc<Self>, key: &CacheKey, load: Load) {
        let FlightRole::Leader(guard, _) = self.single_flight.join(key) else {
            return;
        };
        let (this, key) = (Arc::clone(self), key.clone());
        tokio::spawn(async move {
            let (found, read_version) = this.fetch(&key).await;
            let outcome = match found.filter(|entry| !entry.is_stale(Instant::now())) {
                // Another host was faster.
                Some(entry) => LoadOutcome::Cached(entry, Layer::Shared),
                None => this.load(&key, load, read_version).await,
            };
            if let LoadOutcome::Failed(error) = &outcome {
                tracing::warn!(
                    worker = key.worker,
                    error = format!("{:#}", error.cause()),
                    "reload of a stale value failed"
                );
            }
            guard.finish(outcome);
        });
    }

    async fn load(&self, key: &CacheKey, load: Load, read_version: ReadVersion) -> LoadOutcome {
        self.counts().load(&key.worker);
        let loaded_at = Instant::now();
        match load().await {
            Ok(Loaded {
                value,
                tags,
                policy: Some(policy),
            }) => {
                let entry = Arc::new(Entry::new(
                    value,
                    tags,
                    policy,
                    read_version.local,
                    loaded_at,
                ));
                self.insert(key, &entry, read_version).await;
                LoadOutcome::Cached(entry, Layer::Loaded)
            }
            Ok(loaded) => LoadOutcome::Uncached(loaded.value),
            Err(error) => LoadOutcome::Failed(LoadError(Arc::new(error))),
        }
    }

    /// Loads a value for one caller alone, because those of others are not for it. Runs in a task,
    /// so no load is dropped halfway.
    async fn load_uncached(
        self: &Arc<Self>,
        key: &CacheKey,
        load: Load,
    ) -> Result<Cached, LoadError> {
        self.counts().load(&key.worker);
        self.counts().miss(&key.worker);
        let loaded = tokio::spawn(async move { load().await }).await;
        let loaded = loaded.context("load a value").and_then(|loaded| loaded);
        loaded
            .map(|loaded| Cached::just_loaded(loaded.value))
            .map_err(|error| LoadError(Arc::new(error)))
    }

    /// Stores a value here and in Redis, unless it is too large.
    async fn insert(&self, key: &CacheKey, entry: &Arc<Entry>, read_version: ReadVersion) {
        if entry.value.len() > VALUE_MAX {
            return;
        }
        self.local.insert(key, Arc::clone(entry));
        if let Some(shared) = &self.shared {
            shared
                .store(
                    &key.worker,
                    vec![SharedPut::new(key, entry)],
                    read_version.shared,
                )
                .await;
        }
    }
}

impl Loaded {
    /// A value for all callers.
    pub fn cacheable(value: Bytes, tags: Vec<String>, policy: Policy) -> Self {
        Loaded {
            value,
            tags,
            policy: Some(policy),
        }
    }

    /// A value for its own caller only.
    pub fn uncacheable(value: Bytes) -> Self {
        Loaded {
            value,
            tags: Vec::new(),
            policy: None,
        }
    }
}

impl Cached {
    fn just_loaded(value: Bytes) -> Self {
        Cached {
            value,
            tags: Arc::new([]),
            age: Duration::ZERO,
            is_stale: false,
            layer: Layer::Loaded,
        }
    }
}
