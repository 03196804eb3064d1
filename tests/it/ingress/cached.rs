//! Cacheable routes.

use support::production::RunningHost;

use super::*;

/// A route that writes, and a route that reads.
fn cached(terms: &str) -> Result<String> {
    Ok(manifest("")?
        + "\n[[worker.route]]\npath = \"/events/{event}\"\nmethods = [\"GET\"]\ncache_tags = [\"event:{event}\"]\n"
        + terms)
}

async fn read(url: &str, caller: &str) -> Result<(Value, String)> {
    let response = send(
        reqwest::Client::new()
            .get(url)
            .header("Authorization", caller),
    )
    .await?;
    assert_eq!(response.status, StatusCode::OK, "{response:?}");
    Ok((
        response.json()?["rows"].clone(),
        response
            .header("cache-status")
            .unwrap_or_default()
            .to_owned(),
    ))
}

fn write(event: &str, invalidates: bool) -> Value {
    let steps = if invalidates {
        json!(["effect", "invalidate"])
    } else {
        json!(["effect"])
    };
    json!({ "event": event, "do": steps })
}

const HIT: &str = "oncely; hit; detail=local";
const MISS: &str = "oncely; fwd=miss";

both!(
    a_read_is_cached_until_a_writer_invalidates_it,
    |kind: Kind| async move {
        let world = World::start(kind, &cached("cache = \"1h\"")?).await?;
        let url = format!("{}/events/e", world.ingress_url()?);
        let found = |rows: i64, status: &str| (json!(rows), status.to_owned());
        assert_eq!(read(&url, "a").await?, found(0, MISS));
        assert_eq!(read(&url, "a").await?, found(0, HIT));

        // An invalidation by a failed request has no effect.
        let failed = json!({ "event": "e", "do": ["effect", "invalidate"], "status": 409 });
        assert_eq!(
            post(&world, "failed", &failed).await?.status,
            StatusCode::CONFLICT
        );
        post(&world, "quiet", &write("e", false)).await?;
        assert_eq!(read(&url, "a").await?, found(0, HIT));
        post(&world, "invalidating", &write("e", true)).await?;
        assert_eq!(read(&url, "a").await?, found(4, MISS));
        assert_eq!(read(&url, "a").await?, found(4, HIT));

        // Another caller or query has its own cache entry.
        assert_eq!(read(&url, "b").await?, found(4, MISS));
        assert_eq!(read(&format!("{url}?x"), "a").await?, found(4, MISS));
        let head = send(
            reqwest::Client::new()
                .head(&url)
                .header("Authorization", "a"),
        )
        .await?;
        assert_eq!(
            (head.header("cache-status"), head.body.len()),
            (Some(HIT), 0)
        );

        // A failure or a missing resource is not cached.
        let wrote = format!("{url}?write");
        for _ in 0..2 {
            let failed = send(reqwest::Client::new().get(&wrote)).await?;
            assert_eq!(
                (failed.status.as_u16(), failed.header("cache-status")),
                (500, Some(MISS))
            );
        }
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cache_for_everyone_reads_once_for_all_callers() -> Result<()> {
    let world = World::start(
        Kind::Sqlite,
        &cached("cache = \"1h\"\ncache_scope = \"shared\"")?,
    )
    .await?;
    let url = format!("{}/events/e", world.ingress_url()?);
    let readers = (0..50).map(|n| {
        let url = url.clone();
        async move { read(&url, &format!("caller {n}")).await }
    });
    let all: Vec<_> = futures::future::join_all(readers)
        .await
        .into_iter()
        .collect::<Result<_>>()?;
    assert!(all.iter().all(|(rows, _)| *rows == json!(0)), "{all:?}");
    assert_eq!(read(&url, "one more").await?.1, HIT);
    let text = support::metrics::scrape(&world).await?;
    assert_eq!(
        support::metrics::value(&text, r#"oncely_cache_misses_total{worker="test"}"#),
        Some(1.0),
        "{text}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_on_one_host_is_seen_on_the_other() -> Result<()> {
    let world = World::start(Kind::Postgres, &cached("cache = \"1h\"")?).await?;
    let rival = RunningHost::start(&world, "rival").await?;
    let there = format!("{}/events/e", rival.ingress_url()?);
    assert_eq!(read(&there, "a").await?.1, MISS);
    assert_eq!(read(&there, "a").await?.1, HIT);
    post(&world, "invalidating", &write("e", true)).await?;
    let limit = Duration::from_secs(10);
    eventually_within(limit, "the invalidation arrives", || async {
        let value = read(&there, "a").await?.0;
        Ok((value == json!(2)).then_some(()))
    })
    .await
}
