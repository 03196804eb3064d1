//! Redis as the layer behind all hosts: what it does while it is there, and that nobody notices when it is not.

use std::time::Instant;

use oncely::model::invalidation::Invalidation;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_host_loaded_another_finds_in_redis_and_is_as_old_there() -> Result<()> {
    let redis = Redis::start().await?;
    let (one, two) = (host(Some(&redis))?, host(Some(&redis))?);
    assert_eq!(read(&one, "k", "v").await?.layer, Layer::Loaded);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let found = read(&two, "k", "wrong").await?;
    assert_eq!((text(&found), found.layer), ("v", Layer::Shared));
    assert!(found.age >= Duration::from_millis(150) && found.age < Duration::from_secs(30), "{:?}", found.age);
    assert_eq!(read(&two, "k", "wrong").await?.layer, Layer::Local);
    // Tags of other workers are others.
    one.invalidate("other", tags(&["t"])).await;
    assert_eq!(read(&host(Some(&redis))?, "k", "wrong").await?.layer, Layer::Shared);
    one.invalidate("shop", tags(&["t"])).await;
    assert_eq!(read(&host(Some(&redis))?, "k", "new").await?.layer, Layer::Loaded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_loses_things_costs_loads_and_never_brings_back_what_was_invalidated() -> Result<()> {
    let redis = Redis::start().await?;
    let cache = host(Some(&redis))?;
    cache.invalidate("shop", tags(&["t"])).await;
    // Marks that are gone, of a tag or of the worker.
    for mark in ["oncely:{shop}:t:t", "oncely:{shop}:t:"] {
        read(&cache, "k", "v").await?;
        assert_eq!(read(&host(Some(&redis))?, "k", "v").await?.layer, Layer::Shared);
        redis.ask(&["DEL", mark]).await?;
        assert_eq!(read(&host(Some(&redis))?, "k", "v").await?.layer, Layer::Loaded, "without {mark}");
        cache.invalidate("shop", tags(&["t"])).await;
    }
    // Everything gone while somebody loads: the invalidation that it had went with it.
    let parked = Parked::with(&cache, "old").await?.until_it_read().await?;
    host(Some(&redis))?.invalidate("shop", tags(&["t"])).await;
    redis.ask(&["FLUSHALL"]).await?;
    assert_eq!(parked.land().await?, "old");
    assert_eq!(read(&host(Some(&redis))?, "k", "new").await?.layer, Layer::Loaded);
    Ok(())
}

/// How long it takes to read keys that nobody has, one after the other.
async fn time_of_reads(cache: &Cache, name: &str, count: usize) -> Result<Duration> {
    let began = Instant::now();
    for n in 0..count {
        read(cache, &format!("{name}{n}"), "v").await?;
    }
    Ok(began.elapsed())
}

/// Reads keys that nobody has until Redis is in use again.
async fn until_shared(cache: &Cache, redis: &Redis) -> Result<()> {
    let again = async {
        for n in 0.. {
            read(cache, &format!("again{n}"), "v").await?;
            if cache.measure().shared_is_up && redis.keys("*again*").await? > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), again).await.context("Redis is not used again")?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_is_killed_or_silent_costs_next_to_nothing_and_is_used_again_when_it_is_back() -> Result<()> {
    let mut redis = Redis::start().await?;
    let cache = host(Some(&redis))?;
    read(&cache, "k", "v").await?;
    assert!(cache.measure().shared_is_up);

    redis.kill()?;
    let took = time_of_reads(&cache, "killed", 1_000).await?;
    assert!(took < Duration::from_secs(3), "1000 reads without Redis took {took:?}");
    assert!(!cache.measure().shared_is_up);
    assert_eq!(read(&cache, "k", "wrong").await?.layer, Layer::Local);
    redis.restart().await?;
    until_shared(&cache, &redis).await?;

    redis.pause()?;
    let took = time_of_reads(&cache, "paused", 1_000).await?;
    assert!(took < Duration::from_secs(4), "1000 reads with a silent Redis took {took:?}");
    assert!(!cache.measure().shared_is_up);
    redis.resume()?;
    until_shared(&cache, &redis).await?;

    // A host that starts without Redis uses it once it is there.
    redis.kill()?;
    let late = host(Some(&redis))?;
    assert_eq!(read(&late, "k", "v").await?.layer, Layer::Loaded);
    redis.restart().await?;
    until_shared(&late, &redis).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_invalidated_while_redis_took_nothing_is_not_read_from_it_afterwards() -> Result<()> {
    let redis = Redis::start().await?;
    for many in [false, true] {
        let cache = host(Some(&redis))?;
        read(&cache, "k", "old").await?;
        assert_eq!(text(&read(&host(Some(&redis))?, "k", "wrong").await?), "old");
        redis.ask(&["ACL", "SETUSER", "default", "-@scripting"]).await?;
        let began = Instant::now();
        cache.invalidate("shop", tags(&["t"])).await;
        assert!(began.elapsed() < Duration::from_secs(1), "an invalidation took {:?}", began.elapsed());
        assert!(!cache.measure().shared_is_up);
        assert_eq!(text(&read(&cache, "k", "new").await?), "new");
        // More of them than are remembered one by one.
        for n in 0..if many { 20 } else { 0 } {
            cache.invalidate("shop", (0..1_000).map(|tag| format!("{n}/{tag}"))).await;
        }
        redis.ask(&["ACL", "SETUSER", "default", "+@all"]).await?;
        until_shared(&cache, &redis).await?;
        let found = read(&host(Some(&redis))?, "k", "newer").await?;
        assert_eq!(text(&found), "newer", "it is back from Redis");
        redis.ask(&["FLUSHALL"]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidation_that_redis_did_not_take_from_one_host_it_takes_from_another() -> Result<()> {
    let redis = Redis::start().await?;
    let (writer, other) = (host(None)?, host(Some(&redis))?);
    read(&other, "k", "old").await?;
    // The writer cannot reach Redis; the other hears of it, and twice.
    let told = Invalidation::new("shop", tags(&["t"]).into_iter().collect(), jiff::Timestamp::now());
    writer.invalidate("shop", tags(&["t"])).await;
    other.hear(&told).await;
    let third = host(Some(&redis))?;
    assert_eq!(text(&read(&third, "k", "new").await?), "new");
    other.hear(&told).await;
    third.hear(&told).await;
    // It was applied to Redis before: what was loaded after it stays there.
    let found = read(&host(Some(&redis))?, "k", "newer").await?;
    assert_eq!((text(&found), found.layer), ("new", Layer::Shared));
    Ok(())
}
