//! The cache of handlers: cache writes take effect with the commit, and only then.

use oncely::delivery::{BatchResult, Delivery, Savepoints};
use oncely::model::message::Message;
use oncely::model::verdict::Verdict;
use oncely::store::OutboxRow;
use support::database::Kind;

use super::*;
use crate::positions::{DeliveryHarness, message};

const TWO_ATTEMPTS: &str = "[worker.retry]\nattempts = 2\n";

/// A harness whose cache uses this Redis.
async fn harness(kind: Kind, redis: &Redis) -> Result<DeliveryHarness> {
    let mut harness = DeliveryHarness::new(kind, TWO_ATTEMPTS).await?;
    harness.delivery = Delivery {
        cache: host(Some(redis))?,
        ..harness.delivery
    };
    Ok(harness)
}

fn cached(event_id: &str, behaviour: &str, options: &str) -> Arc<Message> {
    message(event_id, behaviour, options)
}

async fn found(harness: &DeliveryHarness, name: &str) -> Option<String> {
    let found = harness
        .delivery
        .cache
        .get(&CacheKey::value("test", name))
        .await;
    found.map(|found| text(&found).to_owned())
}

/// The outputs of a delivery to `out.cached`.
fn echoes(delivered: &BatchResult) -> Vec<String> {
    let echoes = delivered
        .outputs
        .iter()
        .filter(|output| output.subject == "out.cached");
    echoes
        .map(|output| String::from_utf8_lossy(&output.body).into_owned())
        .collect()
}

fn invalidation_outputs(delivered: &BatchResult) -> Vec<&OutboxRow> {
    delivered
        .outputs
        .iter()
        .filter(|output| output.subject == "oncely.cache.test")
        .collect()
}

both!(
    cache_puts_and_invalidations_take_effect_at_the_commit,
    |kind: Kind| async move {
        let redis = Redis::start().await?;
        let harness = harness(kind, &redis).await?;
        let other = host(Some(&redis))?;
        let put =
            r#"{"cache": ["get", "put", "echo"], "key": "k", "value": "1", "tags": ["t", "u"]}"#;
        let delivered = harness
            .deliver(&[cached("put", "insert,cached", put)])
            .await?;
        assert_eq!(
            (echoes(&delivered), invalidation_outputs(&delivered).len()),
            (vec!["1".to_owned()], 0)
        );
        assert_eq!(found(&harness, "k").await.as_deref(), Some("1"));
        let on_the_other = other
            .get(&CacheKey::value("test", "k"))
            .await
            .context("find the value in Redis")?;
        assert_eq!(text(&on_the_other), "1");

        // A delivery sees its own invalidations and puts at once, other deliveries after its
        // commit.
        let both = r#"{"cache": ["invalidate", "echo", "put", "echo"], "key": "k", "value": "2", "tags": ["t"]}"#;
        let delivered = harness.deliver(&[cached("both", "cached", both)]).await?;
        assert_eq!(echoes(&delivered), ["", "2"]);
        assert_eq!(found(&harness, "k").await.as_deref(), Some("2"));
        assert_eq!(
            text(
                &host(Some(&redis))?
                    .get(&CacheKey::value("test", "k"))
                    .await
                    .context("find the value in Redis")?
            ),
            "2"
        );
        let [row] = invalidation_outputs(&delivered)[..] else {
            anyhow::bail!("{:?}", delivered.outputs)
        };
        let body: serde_json::Value = serde_json::from_slice(&row.body)?;
        assert_eq!(
            (&body["worker"], &body["tags"]),
            (&"test".into(), &serde_json::json!(["t"]))
        );

        // One message per transaction, for the invalidations of all its items.
        let batch: Vec<_> = (0..5)
            .map(|n| {
                cached(
                    &format!("b{n}"),
                    "cached",
                    &format!(r#"{{"cache": ["invalidate"], "tags": ["t{n}", "t"]}}"#),
                )
            })
            .collect();
        let delivered = harness.deliver(&batch).await?;
        let [row] = invalidation_outputs(&delivered)[..] else {
            anyhow::bail!("{:?}", delivered.outputs)
        };
        let body: serde_json::Value = serde_json::from_slice(&row.body)?;
        assert_eq!(
            body["tags"],
            serde_json::json!(["t", "t0", "t1", "t2", "t3", "t4"])
        );
        assert_eq!(found(&harness, "k").await, None);

        // Redelivered duplicates publish no second invalidation.
        let delivered = harness.deliver(&batch).await?;
        assert!(delivered.outputs.is_empty());
        Ok(())
    }
);

both!(
    a_failed_or_rolled_back_handler_leaves_no_cache_entry,
    |kind: Kind| async move {
        let redis = Redis::start().await?;
        let harness = harness(kind, &redis).await?;
        harness
            .deliver(&[cached(
                "first",
                "cached",
                r#"{"cache": ["put"], "key": "kept", "value": "1", "tags": ["t"]}"#,
            )])
            .await?;
        let options = |key: &str| {
            format!(
                r#"{{"cache": ["invalidate", "put"], "key": "{key}", "value": "2", "tags": ["t"], "n": 1, "sql": "select from from"}}"#
            )
        };
        let endings = [
            "cached,reject",
            "insert,cached,trap",
            "cached,sql_text",
            "insert,cached,emit_ungranted",
        ];

        // Beside a successful item, in both modes: with a rerun of the batch and with savepoints.
        // Then alone.
        for (round, savepoints) in [(0, Savepoints::None), (1, Savepoints::PerItem)] {
            let mut batch: Vec<_> = endings
                .iter()
                .enumerate()
                .map(|(n, ending)| {
                    cached(
                        &format!("{round}-{n}"),
                        ending,
                        &options(&format!("failed{n}")),
                    )
                })
                .collect();
            let good = format!(
                r#"{{"cache": ["put"], "key": "good{round}", "value": "3", "tags": ["u"], "n": 1}}"#
            );
            batch.insert(2, cached(&format!("{round}-good"), "insert,cached", &good));
            let delivered = harness.delivery.deliver(&batch, savepoints).await?;
            let done = delivered
                .verdicts
                .iter()
                .filter(|verdict| matches!(verdict, Verdict::Done(_)))
                .count();
            assert_eq!(
                (done, invalidation_outputs(&delivered).len()),
                (1, 0),
                "{:?}",
                delivered.verdicts
            );
            assert_eq!(
                found(&harness, &format!("good{round}")).await.as_deref(),
                Some("3")
            );
        }

        // The failing messages alone
        for (n, ending) in endings.iter().enumerate() {
            harness
                .deliver(&[cached(
                    &format!("alone-{n}"),
                    ending,
                    &options(&format!("failed{n}")),
                )])
                .await?;
            assert_eq!(
                found(&harness, &format!("failed{n}")).await,
                None,
                "{ending}"
            );
        }
        assert_eq!(found(&harness, "kept").await.as_deref(), Some("1"));
        assert_eq!(redis.keys("*:v:failed*").await?, 0);

        // A dry run changes nothing either.
        harness
            .delivery
            .dry_run(cached("dry-run", "cached", &options("failed0")), 10)
            .await?;
        assert_eq!(
            (
                found(&harness, "failed0").await,
                found(&harness, "kept").await.as_deref()
            ),
            (None, Some("1"))
        );
        Ok(())
    }
);

both!(
    a_value_derived_from_outdated_data_is_not_cached,
    |kind: Kind| async move {
        let redis = Redis::start().await?;
        let harness = harness(kind, &redis).await?;
        let other = host(Some(&redis))?;
        let slow = |event: &str| {
            let options =
                r#"{"cache": ["put"], "key": "k", "value": "old", "tags": ["t"], "ms": 500}"#;
            [cached(event, "slow,cached", options)]
        };

        // While the handler runs, a writer commits: first on this host, then on another host whose
        // invalidation has not arrived here.
        for (event, writer) in [("here", &harness.delivery.cache), ("there", &other)] {
            let messages = slow(event);
            let (delivered, ()) = tokio::join!(harness.deliver(&messages), async {
                tokio::time::sleep(Duration::from_millis(200)).await;
                writer.invalidate("test", tags(&["t"])).await;
            });
            assert!(matches!(delivered?.verdicts[..], [Verdict::Done(_)]));
            let third = host(Some(&redis))?;
            assert!(
                third.get(&CacheKey::value("test", "k")).await.is_none(),
                "the value is in Redis despite a write {event}"
            );
        }

        // Without a concurrent write the value is stored.
        harness.deliver(&slow("alone")).await?;
        assert_eq!(found(&harness, "k").await.as_deref(), Some("old"));
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_over_the_cache_limits_fails_without_a_trap() -> Result<()> {
    let redis = Redis::start().await?;
    let harness = harness(Kind::Sqlite, &redis).await?;
    let long = "x".repeat(256);
    let cases = [
        (
            "key",
            format!(r#"{{"cache": ["put", "get"], "key": "{long}"}}"#),
        ),
        (
            "tag",
            r#"{"cache": ["put", "invalidate"], "tags": [""]}"#.to_owned(),
        ),
        ("ttl", r#"{"cache": ["put"], "ttl_ms": 0}"#.to_owned()),
        (
            "day",
            r#"{"cache": ["put"], "ttl_ms": 86400001}"#.to_owned(),
        ),
        (
            "large",
            r#"{"cache": ["put_large"], "size": 1048577}"#.to_owned(),
        ),
        (
            "tags",
            format!(
                r#"{{"cache": ["put"], "tags": {:?}}}"#,
                (0..33).map(|n| n.to_string()).collect::<Vec<_>>()
            ),
        ),
        (
            "many",
            r#"{"cache": ["put_keys", "put"], "key": "refused", "size": 1000}"#.to_owned(),
        ),
    ];
    for (event, options) in &cases {
        let delivered = harness.deliver(&[cached(event, "cached", options)]).await?;
        assert!(
            matches!(delivered.verdicts[..], [Verdict::Done(_)]),
            "{event}"
        );
    }
    for name in [&long[..], "k", "refused"] {
        assert_eq!(found(&harness, name).await, None, "{name}");
    }
    assert_eq!(redis.keys("*:v:refused*").await?, 1_000);

    // Four values of a megabyte fit into the limit, five do not.
    let large = r#"{"cache": ["put_large", "put_large", "put_large", "put_large", "put"], "size": 1048576, "value": "fifth"}"#;
    harness.deliver(&[cached("five", "cached", large)]).await?;
    assert_eq!(
        found(&harness, "k").await.map(|value| value.len()),
        Some(1 << 20)
    );
    Ok(())
}
