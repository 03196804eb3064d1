//! The invalidation feed: every commit of one host reaches the others, despite failures in between.

use std::time::Instant;

use oncely::bus::{Bus, FeedEvent, StreamSpec};
use oncely::cache::feed as cache_feed;
use oncely::config::Nats;
use oncely::drain::Stop;
use oncely::model::invalidation::{CACHE_STREAM, CACHE_SUBJECTS};
use support::database::Kind;
use support::eventually::eventually;
use support::nats::{NatsServer, NewMessage};
use support::world::{PATIENCE, World, manifest};

use super::*;

/// Maximum time after a write in which another host may still return the old value, without
/// failures.
const BOUND: Duration = Duration::from_secs(2);

async fn bus(nats: &NatsServer) -> Result<Bus> {
    let servers = vec![nats.url()];
    Bus::connect(&Nats {
        servers,
        ..Nats::default()
    })
    .await
}

/// The cache of a second host in the test process, subscribed like a host's.
async fn second_host(world: &World, redis: Option<&Redis>, stop: &Stop) -> Result<Cache> {
    let cache = host(redis)?;
    let feed = bus(&world.nats).await?.feed(CACHE_STREAM).await?;
    tokio::spawn(cache_feed::listen(feed, cache.clone(), stop.stopping()));
    Ok(cache)
}

/// Caches a value of the worker `test`.
async fn keep(cache: &Cache, name: &str) {
    let loaded = Loaded::cacheable(Bytes::from_static(b"old"), tags(&[name]), LONG);
    cache
        .put(
            &CacheKey::value("test", name),
            loaded,
            cache.read_version("test"),
        )
        .await;
}

/// Waits until a cache has no value.
async fn until_forgotten(cache: &Cache, name: &str) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while cache.get(&CacheKey::value("test", name)).await.is_some() {
        anyhow::ensure!(Instant::now() < end, "`{name}` is still cached");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

fn to_invalidate(event_id: &str, behaviour: &str, tag: &str) -> NewMessage {
    NewMessage::new(
        "in.x",
        event_id,
        behaviour,
        &format!(r#"{{"cache": ["invalidate"], "tags": ["{tag}"], "ms": 1000}}"#),
    )
}

both!(
    a_write_is_seen_on_other_hosts_within_the_bound,
    |kind: Kind| async move {
        let redis = Redis::start().await?;
        for shared in [None, Some(&redis)] {
            let mut world = World::without_host(kind, &manifest("")?).await?;
            world
                .host_env
                .extend(shared.map(|redis| ("ONCELY_CACHE_URL".to_owned(), redis.url())));
            world.start_host().await?;
            let stop = Stop::new();
            let other = second_host(&world, shared, &stop).await?;
            let mut slowest = Duration::ZERO;
            for n in 0..20 {
                let name = format!("k{n}");
                keep(&other, &name).await;
                world
                    .nats
                    .publish_all(vec![to_invalidate(&name, "cached", &name)])
                    .await?;
                world
                    .until(
                        &format!("select count(*) from oncely.inbox where event_id = '{name}'"),
                        1,
                    )
                    .await?;
                let committed = Instant::now();
                until_forgotten(&other, &name).await?;
                slowest = slowest.max(committed.elapsed());
            }
            println!(
                "with Redis: {}: {slowest:?} at most after the commit was seen",
                shared.is_some()
            );
            assert!(slowest < BOUND, "{slowest:?}");
            // A value that was not invalidated stays.
            keep(&other, "untouched").await;
            world
                .nats
                .publish_all(vec![to_invalidate("last", "cached", "something")])
                .await?;
            world.quiet(21).await?;
            assert!(
                other
                    .get(&CacheKey::value("test", "untouched"))
                    .await
                    .is_some()
            );
            stop.now();
            world.stop_host().await?;
        }
        Ok(())
    }
);

both!(
    an_invalidation_survives_the_host_that_committed_it,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("")?).await?;
        let stop = Stop::new();
        let other = second_host(&world, None, &stop).await?;
        keep(&other, "k").await;
        world
            .nats
            .publish_all(vec![to_invalidate("e1", "slow,cached", "k")])
            .await?;

        // Pause the broker while the handler runs, so that nothing can be published. Then kill the
        // host.
        eventually("the handler begins", || async {
            let text = support::metrics::scrape(&world).await?;
            let in_flight = r#"oncely_in_flight_messages{worker="test"}"#;
            Ok((support::metrics::value(&text, in_flight) == Some(1.0)).then_some(()))
        })
        .await?;
        world.nats.pause()?;
        world
            .until("select count(*) from oncely.inbox where event_id = 'e1'", 1)
            .await?;
        world.kill_host()?;
        assert!(
            other.get(&CacheKey::value("test", "k")).await.is_some(),
            "the invalidation arrived before its publication"
        );
        world.nats.resume()?;
        world.start_host().await?;
        until_forgotten(&other, "k").await?;
        stop.now();
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feed_resumes_at_its_position_and_reports_a_gap() -> Result<()> {
    let mut nats = NatsServer::start().await?;
    let listens = bus(&nats).await?;
    let spec = StreamSpec::new(CACHE_STREAM, &[CACHE_SUBJECTS]);
    listens.ensure_stream(&spec).await?;
    let publish = async |nats: &NatsServer, body: &str| {
        let message = NewMessage {
            subject: "oncely.cache.test".into(),
            headers: Vec::new(),
            body: body.into(),
        };
        nats.publish_all(vec![message]).await
    };
    publish(&nats, "before").await?;
    let mut feed = listens.feed(CACHE_STREAM).await?;
    let mut next_message = async || loop {
        // Like a host, retry on errors.
        match tokio::time::timeout(PATIENCE, feed.next()).await? {
            Ok(received) => return anyhow::Ok(received),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let message = |body: &'static str| FeedEvent::Message(Bytes::from_static(body.as_bytes()));

    // Resume after a restart of the broker
    publish(&nats, "1").await?;
    assert_eq!(next_message().await?, message("1"));
    nats.kill()?;
    nats.restart().await?;
    publish(&nats, "2").await?;
    publish(&nats, "3").await?;
    assert_eq!(
        (next_message().await?, next_message().await?),
        (message("2"), message("3"))
    );

    // The messages published meanwhile are gone before the feed reconnects.
    nats.kill()?;
    nats.restart().await?;
    let context = async_nats::jetstream::new(nats.client().await?);
    publish(&nats, "4").await?;
    context.get_stream(CACHE_STREAM).await?.purge().await?;
    publish(&nats, "5").await?;
    let received = next_message().await?;
    assert!(
        received == message("4") || received == FeedEvent::Gap,
        "{received:?}"
    );

    // Report a gap after the stream was recreated
    context.delete_stream(CACHE_STREAM).await?;
    listens.ensure_stream(&spec).await?;
    publish(&nats, "6").await?;
    let until_known = async {
        loop {
            match next_message().await? {
                FeedEvent::Gap => return anyhow::Ok(()),
                FeedEvent::Message(_) => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, until_known)
        .await
        .context("wait for the gap event")??;
    publish(&nats, "7").await?;
    while next_message().await? != message("7") {}
    Ok(())
}
