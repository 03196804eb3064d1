//! Redis as the shared layer behind all hosts, and operation without it.

use std::time::Instant;

use oncely::model::invalidation::Invalidation;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_loaded_by_one_host_is_found_in_redis_with_its_age() -> Result<()> {
    let redis = Redis::start().await?;
    let (one, two) = (host(Some(&redis))?, host(Some(&redis))?);
    assert_eq!(read(&one, "k", "v").await?.layer, Layer::Loaded);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let found = read(&two, "k", "wrong").await?;
    assert_eq!((text(&found), found.layer), ("v", Layer::Shared));
    assert!(
        found.age >= Duration::from_millis(150) && found.age < Duration::from_secs(30),
        "{:?}",
        found.age
    );
    assert_eq!(read(&two, "k", "wrong").await?.layer, Layer::Local);

    // Tags of other workers are separate.
    one.invalidate("other", tags(&["t"])).await;
    assert_eq!(
        read(&host(Some(&redis))?, "k", "wrong").await?.layer,
        Layer::Shared
    );
    one.invalidate("shop", tags(&["t"])).await;
    assert_eq!(
        read(&host(Some(&redis))?, "k", "new").await?.layer,
        Layer::Loaded
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_evicts_keys_never_revives_invalidated_values() -> Result<()> {
    let redis = Redis::start().await?;
    let cache = host(Some(&redis))?;
    cache.invalidate("shop", tags(&["t"])).await;

    // Evicted tag versions, of a tag or of the worker.
    for version_key in ["oncely:{shop}:t:t", "oncely:{shop}:t:"] {
        read(&cache, "k", "v").await?;
        assert_eq!(
            read(&host(Some(&redis))?, "k", "v").await?.layer,
            Layer::Shared
        );
        redis.command(&["DEL", version_key]).await?;
        assert_eq!(
            read(&host(Some(&redis))?, "k", "v").await?.layer,
            Layer::Loaded,
            "without {version_key}"
        );
        cache.invalidate("shop", tags(&["t"])).await;
    }

    // A flush during a load also removes the invalidation that came during the load.
    let paused = PausedLoad::start(&cache, "old")
        .await?
        .until_loading()
        .await?;
    host(Some(&redis))?.invalidate("shop", tags(&["t"])).await;
    redis.command(&["FLUSHALL"]).await?;
    assert_eq!(paused.finish().await?, "old");
    assert_eq!(
        read(&host(Some(&redis))?, "k", "new").await?.layer,
        Layer::Loaded
    );
    Ok(())
}

/// The time to read uncached keys one after the other.
async fn time_of_reads(cache: &Cache, name: &str, count: usize) -> Result<Duration> {
    let began = Instant::now();
    for n in 0..count {
        read(cache, &format!("{name}{n}"), "v").await?;
    }
    Ok(began.elapsed())
}

/// Reads uncached keys until Redis is in use again.
async fn until_shared(cache: &Cache, redis: &Redis) -> Result<()> {
    let again = async {
        for n in 0.. {
            read(cache, &format!("again{n}"), "v").await?;
            if cache.measure().is_shared_up && redis.keys("*again*").await? > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), again)
        .await
        .context("wait until Redis is used again")?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_or_silent_redis_costs_little_and_is_used_again() -> Result<()> {
    let mut redis = Redis::start().await?;
    let cache = host(Some(&redis))?;
    read(&cache, "k", "v").await?;
    assert!(cache.measure().is_shared_up);

    redis.kill()?;
    let took = time_of_reads(&cache, "killed", 1_000).await?;
    assert!(
        took < Duration::from_secs(3),
        "1000 reads without Redis took {took:?}"
    );
    assert!(!cache.measure().is_shared_up);
    assert_eq!(read(&cache, "k", "wrong").await?.layer, Layer::Local);
    redis.restart().await?;
    until_shared(&cache, &redis).await?;

    redis.pause()?;
    let took = time_of_reads(&cache, "paused", 1_000).await?;
    assert!(
        took < Duration::from_secs(4),
        "1000 reads with a silent Redis took {took:?}"
    );
    assert!(!cache.measure().is_shared_up);
    redis.resume()?;
    until_shared(&cache, &redis).await?;

    // A host that starts without Redis uses it as soon as it is available.
    redis.kill()?;
    let late = host(Some(&redis))?;
    assert_eq!(read(&late, "k", "v").await?.layer, Layer::Loaded);
    redis.restart().await?;
    until_shared(&late, &redis).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_invalidated_during_a_redis_outage_are_not_read() -> Result<()> {
    let redis = Redis::start().await?;
    for many in [false, true] {
        let cache = host(Some(&redis))?;
        read(&cache, "k", "old").await?;
        assert_eq!(
            text(&read(&host(Some(&redis))?, "k", "wrong").await?),
            "old"
        );
        redis
            .command(&["ACL", "SETUSER", "default", "-@scripting"])
            .await?;
        let began = Instant::now();
        cache.invalidate("shop", tags(&["t"])).await;
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "an invalidation took {:?}",
            began.elapsed()
        );
        assert!(!cache.measure().is_shared_up);
        assert_eq!(text(&read(&cache, "k", "new").await?), "new");
        // More invalidations than are remembered individually.
        for n in 0..if many { 20 } else { 0 } {
            cache
                .invalidate("shop", (0..1_000).map(|tag| format!("{n}/{tag}")))
                .await;
        }
        redis
            .command(&["ACL", "SETUSER", "default", "+@all"])
            .await?;
        until_shared(&cache, &redis).await?;
        let found = read(&host(Some(&redis))?, "k", "newer").await?;
        assert_eq!(
            text(&found),
            "newer",
            "an invalidated value came back from Redis"
        );
        redis.command(&["FLUSHALL"]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidation_reaches_redis_through_another_host() -> Result<()> {
    let redis = Redis::start().await?;
    let (writer, other) = (host(None)?, host(Some(&redis))?);
    read(&other, "k", "old").await?;
    // The writer cannot reach Redis. The other host receives the invalidation twice.
    let invalidation = Invalidation::new(
        "shop",
        tags(&["t"]).into_iter().collect(),
        jiff::Timestamp::now(),
    );
    writer.invalidate("shop", tags(&["t"])).await;
    other.apply_invalidation(&invalidation).await;
    let third = host(Some(&redis))?;
    assert_eq!(text(&read(&third, "k", "new").await?), "new");
    other.apply_invalidation(&invalidation).await;
    third.apply_invalidation(&invalidation).await;
    // The first one was applied to Redis: a value loaded after it stays there.
    let found = read(&host(Some(&redis))?, "k", "newer").await?;
    assert_eq!((text(&found), found.layer), ("new", Layer::Shared));
    Ok(())
}
