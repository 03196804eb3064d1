//! The cache that all hosts share: one Redis or Valkey.
//!
//! What is said of invalidations in `marks.rs` holds here, too, with a count of its own, kept there for each worker: the
//! number of an invalidation is one more than the last, or the time there if that is more, so that a Redis that lost
//! everything never counts the same twice. A value is valid as long as a mark is there for each of its tags and is no higher
//! than the count before it was read: marks that got lost cost a load, and nothing else.
//!
//! Whatever is slow or fails is given up. Invalidations that could not be applied are owed, and nothing is read until they are.

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

/// How long anybody waits for an answer.
const ANSWER_WITHIN: Duration = Duration::from_millis(100);

/// How long making a connection may take; nobody waits for that longer than for an answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// For how long a mark is kept of a tag that no value has: longer than any load takes, in milliseconds.
const MARK_KEPT_MS: u64 = 60 * 60 * 1_000;

/// For how long it is kept which invalidations were applied, in milliseconds.
const APPLIED_KEPT_MS: u64 = 10 * 60 * 1_000;

/// How many tags of a worker are owed; beyond that it is everything of that worker.
const OWED_MAX: usize = 10_000;

/// How much is sent at once, in bytes.
const STORE_SIZE_MAX: usize = 1 << 20;

pub(super) struct Shared {
    manager: ConnectionManager,
    breaker: Mutex<Breaker>,
    /// The highest count that was seen, by worker.
    seen: Mutex<HashMap<String, u64>>,
    /// Tags that are yet to be invalidated, by worker.
    owed: Mutex<HashMap<String, BTreeSet<String>>>,
    is_in_debt: AtomicBool,
    /// Whoever pays.
    paying: tokio::sync::Mutex<()>,
    metrics: Arc<Metrics>,
}

static GET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("get.lua")));
static MARK: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("mark.lua")));
static STORE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("store.lua")));

/// A value as it is kept there.
pub(super) struct Found {
    value: Bytes,
    tags: Vec<String>,
    age: Duration,
    /// How long it goes on being as good as new, and being an answer.
    fresh: Duration,
    left: Duration,
}

/// A value to be kept.
#[derive(Clone)]
pub(super) struct SharedPut {
    name: String,
    value: Bytes,
    /// One a line.
    tags: String,
    born: Instant,
    fresh_until: Instant,
    ends: Instant,
}

impl SharedPut {
    pub fn new(key: &CacheKey, entry: &Entry) -> Self {
        SharedPut {
            name: name(&key.worker, &key.key),
            value: entry.value.clone(),
            tags: entry.tags.join("\n"),
            born: entry.born,
            fresh_until: entry.fresh_until,
            ends: entry.ends,
        }
    }
}

impl Found {
    /// The same value in this process, read after the point `since`. Hosts do not all lose it at the same time.
    pub fn entry(self, since: u64) -> Entry {
        let now = Instant::now();
        let fresh = jittered(self.fresh);
        Entry {
            value: self.value,
            tags: self.tags.into(),
            since,
            born: now.checked_sub(self.age).unwrap_or(now),
            fresh_until: now + fresh,
            ends: now + self.left,
        }
    }
}

/// Everything of a worker has the same hash tag, so that it stands on one server of a cluster.
fn name(worker: &str, rest: &str) -> String {
    format!("oncely:{{{worker}}}:{rest}")
}

impl Shared {
    pub fn open(url: &CacheUrl, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let client = redis::Client::open(url.reveal()).with_context(|| format!("understand {}", url.shown()))?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN))
            .set_number_of_retries(0);
        let manager = client.get_connection_manager_lazy(config).with_context(|| format!("use {}", url.shown()))?;
        Ok(Shared {
            manager,
            breaker: Mutex::new(Breaker::new(Instant::now())),
            seen: Mutex::default(),
            owed: Mutex::default(),
            is_in_debt: AtomicBool::new(false),
            paying: tokio::sync::Mutex::default(),
            metrics,
        })
    }

    /// Whether it is in use.
    pub fn is_up(&self) -> bool {
        lock(&self.breaker).state() == State::Closed && !self.is_in_debt.load(Ordering::Acquire)
    }

    /// A count that was seen some time ago.
    pub fn seen(&self, worker: &str) -> u64 {
        lock(&self.seen).get(worker).copied().unwrap_or_default()
    }

    /// The value of a key, if it is valid, and the count before anything else is read.
    pub async fn get(&self, key: &CacheKey) -> (Option<Found>, u64) {
        type Answer = (u64, Option<Vec<u8>>, Option<String>, Option<u64>, Option<u64>, Option<u64>);
        let worker = key.worker.as_str();
        if !self.is_ready().await {
            return (None, self.seen(worker));
        }
        let mut get = GET.key(name(worker, &key.key));
        get.key(name(worker, "count")).arg(name(worker, "t:"));
        let Some((count, value, tags, left, life, stale)) = self.run::<Answer>(get).await else {
            return (None, self.seen(worker));
        };
        self.saw(worker, count);
        let found = value.zip(left).map(|(value, left)| Found {
            value: Bytes::from(value),
            tags: tags.unwrap_or_default().lines().map(str::to_owned).collect(),
            age: Duration::from_millis(life.unwrap_or_default().saturating_sub(left)),
            fresh: Duration::from_millis(left.saturating_sub(stale.unwrap_or_default())),
            left: Duration::from_millis(left),
        });
        (found, count)
    }

    /// Invalidates tags, then keeps values that a transaction put, which it read when the count was `began`. The invalidation
    /// `id` is applied once. What cannot be done now is owed.
    pub async fn commit(
        &self,
        worker: &str,
        id: Option<&str>,
        tags: &BTreeSet<String>,
        puts: Vec<SharedPut>,
        began: u64,
    ) {
        if tags.is_empty() {
            return self.store(worker, puts, began).await;
        }
        if !self.is_ready().await {
            return self.owe(worker, tags);
        }
        let mark = Self::mark(worker, id, tags, &puts, began);
        let Some(answer) = self.run::<Vec<u64>>(mark).await else { return self.owe(worker, tags) };
        let Some((&count, may_stay)) = answer.split_first() else { return };
        self.saw(worker, count);
        let puts = puts.into_iter().zip(may_stay).filter(|(_, may_stay)| **may_stay == 1).map(|(put, _)| put).collect();
        self.store(worker, puts, count).await;
    }

    /// Keeps values that were read when the count was `began`, as far as they are still valid.
    pub async fn store(&self, worker: &str, puts: Vec<SharedPut>, began: u64) {
        let mut puts = puts.into_iter().peekable();
        while puts.peek().is_some() {
            if !self.is_ready().await {
                return;
            }
            let mut store = STORE.arg(name(worker, ""));
            store.arg(began);
            let (mut size, now) = (0, Instant::now());
            while size < STORE_SIZE_MAX
                && let Some(put) = puts.next()
            {
                size += put.value.len();
                let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_millis() as u64;
                store.arg(put.name).arg(ms(now, put.ends)).arg(ms(put.born, put.ends));
                store.arg(ms(put.fresh_until, put.ends)).arg(put.tags).arg(put.value.as_ref());
            }
            let Some(count) = self.run::<u64>(store).await else { return };
            self.saw(worker, count);
        }
    }

    fn mark(
        worker: &str,
        id: Option<&str>,
        tags: &BTreeSet<String>,
        puts: &[SharedPut],
        began: u64,
    ) -> ScriptInvocation<'static> {
        let mut mark = MARK.arg(name(worker, ""));
        mark.arg(id.unwrap_or_default()).arg(MARK_KEPT_MS).arg(APPLIED_KEPT_MS).arg(began).arg(tags.len());
        for tag in tags {
            mark.arg(tag);
        }
        for put in puts {
            mark.arg(put.tags.as_str());
        }
        mark
    }

    /// Whether to try: it answers, as far as is known, and nothing is owed. Pays what is.
    async fn is_ready(&self) -> bool {
        let permit = lock(&self.breaker).permit(Instant::now());
        permit == Permit::Yes && (!self.is_in_debt.load(Ordering::Acquire) || self.pay().await)
    }

    fn owe(&self, worker: &str, tags: &BTreeSet<String>) {
        let mut owed = lock(&self.owed);
        let of_worker = owed.entry(worker.to_owned()).or_default();
        of_worker.extend(tags.iter().cloned());
        if of_worker.len() > OWED_MAX {
            *of_worker = BTreeSet::from([EVERYTHING.to_owned()]);
        }
        self.is_in_debt.store(true, Ordering::Release);
    }

    /// Applies the invalidations that are owed; false when there are still some.
    async fn pay(&self) -> bool {
        let Ok(_paying) = self.paying.try_lock() else {
            lock(&self.breaker).undecided(Instant::now());
            return false;
        };
        loop {
            let next = lock(&self.owed).iter().next().map(|(worker, tags)| (worker.clone(), tags.clone()));
            let Some((worker, tags)) = next else { break };
            let mark = Self::mark(&worker, None, &tags, &[], 0);
            if self.run::<Vec<u64>>(mark).await.is_none() {
                return false;
            }
            let mut owed = lock(&self.owed);
            if let Some(left) = owed.get_mut(&worker) {
                left.retain(|tag| !tags.contains(tag));
            }
            owed.retain(|_, tags| !tags.is_empty());
        }
        let owed = lock(&self.owed);
        self.is_in_debt.store(!owed.is_empty(), Ordering::Release);
        owed.is_empty()
    }

    fn saw(&self, worker: &str, count: u64) {
        let mut seen = lock(&self.seen);
        match seen.get_mut(worker) {
            Some(seen) => *seen = count,
            None => drop(seen.insert(worker.to_owned(), count)),
        }
    }

    /// Runs a script; none when that fails or takes too long. In a task, so that a connection is made even when nobody waits
    /// for it any more.
    async fn run<T>(&self, script: ScriptInvocation<'static>) -> Option<T>
    where
        T: redis::FromRedisValue + Send + 'static,
    {
        let mut manager = self.manager.clone();
        let task = tokio::spawn(async move { script.invoke_async::<T>(&mut manager).await });
        let why = match tokio::time::timeout(ANSWER_WITHIN, task).await {
            Ok(Ok(Ok(answer))) => {
                if lock(&self.breaker).succeeded() {
                    tracing::info!("the shared cache answers again");
                }
                return Some(answer);
            }
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {ANSWER_WITHIN:?}"),
        };
        self.metrics.cache.shared_failed();
        let mut breaker = lock(&self.breaker);
        let was_closed = breaker.state() == State::Closed;
        if breaker.failed(Instant::now(), rand::random(), &why) && was_closed {
            tracing::warn!("the shared cache is not used for the moment: {why}");
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
