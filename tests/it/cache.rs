//! The read cache: single flight, no stale value after an invalidation, operation without Redis.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use oncely::cache::{Cache, CacheKey, Cached, Layer, Loaded, Policy};
use oncely::config::{CacheSettings, HostConfig, HostFlags};
use support::redis::Redis;

mod feed;
mod handlers;
mod shared;
mod zipf;

const LONG: Policy = Policy {
    ttl: Duration::from_secs(600),
    stale: Duration::ZERO,
};

/// The cache of another host, on this Redis if given.
fn host(redis: Option<&Redis>) -> Result<Cache> {
    Cache::open(&settings(redis)?, Arc::default())
}

fn settings(redis: Option<&Redis>) -> Result<CacheSettings> {
    let flags = HostFlags {
        cache_url: redis.map(Redis::url),
        ..HostFlags::default()
    };
    Ok(HostConfig::resolve(&flags, &|_| None)?.cache)
}

fn key(name: &str) -> CacheKey {
    CacheKey::value("shop", name)
}

fn tags(tags: &[&str]) -> Vec<String> {
    tags.iter().map(|&tag| tag.to_owned()).collect()
}

fn text(cached: &Cached) -> &str {
    std::str::from_utf8(&cached.value).unwrap_or_default()
}

/// Reads a key with the value `value` and the tag `t`.
async fn read(cache: &Cache, name: &str, value: &str) -> Result<Cached> {
    let loaded = Loaded::cacheable(Bytes::copy_from_slice(value.as_bytes()), tags(&["t"]), LONG);
    Ok(cache
        .get_or_load(&key(name), move || async { Ok(loaded) })
        .await?)
}

/// A load that pauses between its read and its return.
struct PausedLoad {
    read: tokio::sync::oneshot::Receiver<()>,
    resume: tokio::sync::oneshot::Sender<()>,
    reader: tokio::task::JoinHandle<Result<Cached, oncely::cache::LoadError>>,
}

impl PausedLoad {
    /// Starts a reader of `k` that finds this value in the database.
    async fn start(cache: &Cache, value: &'static str) -> Result<PausedLoad> {
        let (has_read, read) = tokio::sync::oneshot::channel();
        let (resume, paused) = tokio::sync::oneshot::channel::<()>();
        let cache = cache.clone();
        let reader = tokio::spawn(async move {
            let load = move || async move {
                let _ = has_read.send(());
                let _ = paused.await;
                Ok(Loaded::cacheable(
                    Bytes::from_static(value.as_bytes()),
                    tags(&["t"]),
                    LONG,
                ))
            };
            cache.get_or_load(&key("k"), load).await
        });
        Ok(PausedLoad {
            read,
            resume,
            reader,
        })
    }

    async fn until_loading(mut self) -> Result<PausedLoad> {
        (&mut self.read)
            .await
            .context("wait for the load to begin")?;
        Ok(self)
    }

    /// Resumes the load and returns the reader's result.
    async fn finish(self) -> Result<String> {
        let _ = self.resume.send(());
        Ok(text(&self.reader.await??).to_owned())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_readers_of_a_key_load_it_once() -> Result<()> {
    let cache = host(None)?;
    let loads = Arc::new(AtomicUsize::new(0));
    let readers = (0..200).map(|_| {
        let (cache, loads) = (cache.clone(), Arc::clone(&loads));
        tokio::spawn(async move {
            let load = move || async move {
                loads.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(200)).await;
                Ok(Loaded::cacheable(
                    Bytes::from_static(b"v"),
                    tags(&["t"]),
                    LONG,
                ))
            };
            cache.get_or_load(&key("k"), load).await
        })
    });
    for reader in futures::future::join_all(readers).await {
        assert_eq!(text(&reader??), "v");
    }
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    assert_eq!(read(&cache, "k", "other").await?.layer, Layer::Local);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_before_a_commit_does_not_cache_the_old_value() -> Result<()> {
    let redis = Redis::start().await?;
    for redis in [None, Some(&redis)] {
        let (cache, other) = (host(redis)?, host(redis)?);
        cache.invalidate("shop", tags(&["t"])).await;
        let paused = PausedLoad::start(&cache, "old")
            .await?
            .until_loading()
            .await?;
        // The writer commits and invalidates.
        cache.invalidate("shop", tags(&["t"])).await;
        // A later reader does not wait for a load that began before the invalidation.
        let late = tokio::spawn({
            let cache = cache.clone();
            async move { read(&cache, "k", "new").await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        // The first reader came before the commit: both values are correct.
        assert_eq!(paused.finish().await?, "old");
        assert_eq!(
            text(&late.await??),
            "new",
            "with Redis: {}",
            redis.is_some()
        );
        assert_eq!(text(&read(&cache, "k", "newer").await?), "new");
        if redis.is_some() {
            let found = read(&other, "k", "wrong").await?;
            assert_eq!((text(&found), found.layer), ("new", Layer::Shared));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_the_invalidation_caches_no_old_value() -> Result<()> {
    let redis = Redis::start().await?;
    let (writer, reader, third) = (
        host(Some(&redis))?,
        host(Some(&redis))?,
        host(Some(&redis))?,
    );
    let paused = PausedLoad::start(&reader, "old")
        .await?
        .until_loading()
        .await?;
    writer.invalidate("shop", tags(&["t"])).await;
    assert_eq!(paused.finish().await?, "old");
    let found = read(&third, "k", "new").await?;
    assert_eq!((text(&found), found.layer), ("new", Layer::Loaded));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_value_is_served_while_one_reload_runs() -> Result<()> {
    let cache = host(None)?;
    let policy = Policy {
        ttl: Duration::from_millis(300),
        stale: Duration::from_secs(600),
    };
    let loads = Arc::new(AtomicUsize::new(0));
    let ask = || {
        let loads = Arc::clone(&loads);
        let load = move || async move {
            let n = loads.fetch_add(1, Ordering::Relaxed) + 1;
            if n == 2 {
                anyhow::bail!("the database is unavailable");
            }
            Ok(Loaded::cacheable(
                Bytes::from(n.to_string()),
                tags(&["t"]),
                policy,
            ))
        };
        let cache = cache.clone();
        async move { cache.get_or_load(&key("k"), load).await }
    };
    assert_eq!(text(&ask().await?), "1");
    tokio::time::sleep(policy.ttl).await;

    // The first background load fails, and the value stays. The next load replaces it.
    for _ in 0..2 {
        let stale = ask().await?;
        assert!(
            stale.is_stale && text(&stale) == "1" && stale.age >= Duration::from_millis(270),
            "{stale:?}"
        );
        let before = loads.load(Ordering::Relaxed);
        tokio::time::timeout(Duration::from_secs(10), async {
            while loads.load(Ordering::Relaxed) == before.min(1) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let fresh = ask().await?;
    assert_eq!(
        (text(&fresh), fresh.is_stale, loads.load(Ordering::Relaxed)),
        ("3", false, 3)
    );

    // An invalidated value is never returned, however fresh it is.
    cache.invalidate("shop", tags(&["t"])).await;
    assert_eq!(text(&ask().await?), "4");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn per_reader_values_and_errors_are_not_shared() -> Result<()> {
    let cache = host(None)?;
    let readers = (0..20).map(|n: usize| {
        let cache = cache.clone();
        let load = move || async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok(Loaded::uncacheable(Bytes::from(n.to_string())))
        };
        async move { (n, cache.get_or_load(&key("k"), load).await) }
    });
    for (n, answer) in futures::future::join_all(readers).await {
        assert_eq!(text(&answer?), n.to_string());
    }
    let failed = cache
        .get_or_load(&key("k"), || async {
            anyhow::bail!("the database is unavailable")
        })
        .await;
    assert_eq!(
        failed.err().context("the load succeeded")?.to_string(),
        "the database is unavailable"
    );
    assert_eq!(text(&read(&cache, "k", "v").await?), "v");
    let panicked = cache
        .get_or_load(&key("other"), || async { panic!("a load that panics") })
        .await;
    assert!(panicked.is_err());
    assert_eq!(text(&read(&cache, "other", "v").await?), "v");
    Ok(())
}
