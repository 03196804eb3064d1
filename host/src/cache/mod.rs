//! The cache for reads: this process, then Redis if there is one, then whoever loads the value.
//!
//! A value has tags. Invalidating a tag makes every value that has it invalid, those included that are being loaded just
//! then: a value is only as good as the moment *before* its load started, so whoever read the database before a commit can
//! never leave the old value behind after it. What an invalidation misses, the time to live ends.
//!
//! Nothing here is ever an error for whoever reads: without Redis, or with a slow one, it is as if it had nothing.

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

/// For how long it is remembered which invalidations were applied here, and how many of them.
const APPLIED_TTL: Duration = Duration::from_secs(10 * 60);
const APPLIED_MAX: u64 = 100_000;

/// The cache of one host. Cheap to clone.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    local: Local,
    shared: Option<Arc<Shared>>,
    single_flight: SingleFlight,
    /// Ids of invalidations: what this host committed it hears of, too.
    applied: moka::sync::Cache<String, ()>,
    metrics: Arc<Metrics>,
}

/// Where a value stands. Values of different workers, and of different kinds, never meet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CacheKey {
    pub worker: String,
    key: String,
}

impl CacheKey {
    /// What a handler calls `key`.
    pub fn value(worker: &str, key: &str) -> Self {
        CacheKey {
            worker: worker.to_owned(),
            key: format!("v:{key}"),
        }
    }

    /// An HTTP response; `key` says everything that it depends on.
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
    /// How long it is as good as new; up to a tenth less, so that what was loaded together does not expire together.
    pub ttl: Duration,
    /// For how long after that it is still an answer, while it is loaded anew in the background.
    pub stale: Duration,
}

/// A value that was loaded.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub value: Bytes,
    /// What it depends on, besides everything of its worker.
    pub tags: Vec<String>,
    /// None for a value that is for whoever had it loaded, and for nobody else.
    pub policy: Option<Policy>,
}

/// A value, and where it comes from.
#[derive(Debug, Clone)]
pub struct Cached {
    pub value: Bytes,
    pub tags: Arc<[String]>,
    /// Since its load started.
    pub age: Duration,
    /// Whether it is beyond its time to live, and being loaded anew.
    pub is_stale: bool,
    pub layer: Layer,
}

/// What answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// This process.
    Local,
    /// Redis.
    Shared,
    /// It was loaded.
    Loaded,
}

impl Layer {
    pub fn as_str(self) -> &'static str {
        match self {
            Layer::Local => "local",
            Layer::Shared => "shared",
            Layer::Loaded => "loaded",
        }
    }
}

/// A point in the order of invalidations. A value that is read after it is valid until one of its tags is invalidated later.
#[derive(Debug, Clone, Copy)]
pub struct ReadVersion {
    local: u64,
    shared: u64,
}

/// Why a value could not be loaded; the same for all who waited for it.
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
    /// What the load itself said.
    pub fn cause(&self) -> &anyhow::Error {
        &self.0
    }
}

type Load = Box<dyn FnOnce() -> BoxFuture<'static, anyhow::Result<Loaded>> + Send>;

impl Cache {
    /// A cache as it is configured. Redis may be out of reach; it is used once it answers.
    pub fn open(settings: &CacheSettings, metrics: Arc<Metrics>) -> anyhow::Result<Cache> {
        let shared = settings
            .shared
            .as_ref()
            .map(|url| Shared::open(url, Arc::clone(&metrics)));
        Ok(Cache(Arc::new(Inner {
            local: Local::new(settings.size),
            shared: shared
                .transpose()
                .context("get ready to use the shared cache")?
                .map(Arc::new),
            single_flight: SingleFlight::default(),
            applied: moka::sync::Cache::builder()
                .max_capacity(APPLIED_MAX)
                .time_to_live(APPLIED_TTL)
                .build(),
            metrics,
        })))
    }

    /// To be called before what a value is made of is read; see [`ReadVersion`]. Costs nothing.
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

    /// The value under a key; if nobody has it, `load` is called, once for all who ask at the same time on this host. What is
    /// beyond its time to live is answered at once, and loaded in the background. The load runs to its end even when all who
    /// wait for it are gone.
    ///
    /// Whoever calls this after an invalidation on this host is never answered with what was loaded before it.
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
                // That is not for us.
                LoadOutcome::Uncached(_) => return inner.load_uncached(key, load).await,
                // It took off before an invalidation after which we came.
                LoadOutcome::Cached(entry, _)
                    if entry.read_version < started && !inner.local.is_valid(key, entry) => {}
                _ => return inner.resolve(key, &outcome, true),
            }
        }
    }

    /// Keeps a value that was read after `read_version`, here and in Redis.
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

    /// Applies what a transaction that just committed left for the cache: first its invalidations, then what it put, which it
    /// read after `read_version`. `id` is that of the [`Invalidation`] that tells other hosts.
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
        if !tags.is_empty() {
            id.inspect(|id| inner.applied.insert((*id).to_owned(), ()));
            inner.counts().invalidated(worker, tags.len());
            inner
                .local
                .tag_versions
                .invalidate_keeping(worker, tags, &mut puts);
        }
        if let Some(shared) = &inner.shared {
            let shared_puts = puts
                .iter()
                .map(|(key, entry)| SharedPut::new(key, entry))
                .collect();
            shared
                .commit(worker, id, tags, shared_puts, read_version.shared)
                .await;
            // Somebody may have taken the old value over from there in the meantime.
            inner
                .local
                .tag_versions
                .invalidate_keeping(worker, tags, &mut puts);
        }
        for (key, entry) in puts {
            inner.local.insert(&key, Arc::new(entry));
        }
    }

    /// Applies what another host invalidated. Harmless when it was applied before.
    pub async fn apply_invalidation(&self, invalidation: &Invalidation) {
        let inner = &self.0;
        if inner.applied.contains_key(&invalidation.id) {
            return;
        }
        inner
            .local
            .tag_versions
            .invalidate(&invalidation.worker, &invalidation.tags);
        if let Some(shared) = &inner.shared {
            // The host that committed has done this, unless it could not reach Redis or is no more.
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
        inner.applied.insert(invalidation.id.clone(), ());
        inner
            .counts()
            .invalidated(&invalidation.worker, invalidation.tags.len());
        // Clocks may run apart.
        let after = Duration::try_from(Timestamp::now().duration_since(invalidation.at))
            .unwrap_or_default();
        inner
            .counts()
            .invalidation_applied(&invalidation.worker, after);
    }

    /// Invalidates tags of a worker here and in Redis; other hosts are not told.
    pub async fn invalidate(&self, worker: &str, tags: impl IntoIterator<Item = String>) {
        let mut writes = CacheWrites::default();
        writes.invalidate(tags);
        self.commit(worker, &writes, self.read_version(worker), None)
            .await;
    }

    /// Forgets everything in this process: invalidations may have gone by unheard.
    pub fn clear_local(&self) {
        self.0.local.tag_versions.invalidate_all();
    }

    /// What `/metrics` shows.
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

    /// What a flight brought for one of its passengers.
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

    /// Looks in Redis, and takes what is there over. With it a point before anything else is read.
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

    /// The one who looks and loads for all who ask for a key.
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

    /// Loads a value in the background, unless somebody does.
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
                    "a stale value could not be loaded anew: {:#}",
                    error.cause()
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

    /// Loads a value for one reader alone, because others' are not for it. In a task: no load is dropped half-way.
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

    /// Keeps a value here and in Redis, unless it is too large.
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
    /// A value for all who ask.
    pub fn cacheable(value: Bytes, tags: Vec<String>, policy: Policy) -> Self {
        Loaded {
            value,
            tags,
            policy: Some(policy),
        }
    }

    /// A value for whoever had it loaded, and for nobody else.
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
