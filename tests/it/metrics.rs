//! `/metrics`, and its agreement with the documents.

use std::collections::BTreeSet;

use anyhow::Result;
use oncely::metrics::Metrics;
use serde_json::Value;
use support::database::Kind;
use support::eventually::eventually;
use support::guests::repository;
use support::metrics::{scrape, value};
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

/// The names of all documented metrics.
fn documented() -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(repository().join("docs/metrics.md"))?;
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    Ok(rows
        .filter_map(|row| row.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_and_their_documentation_match() -> Result<()> {
    let names: BTreeSet<String> = Metrics::default().names().iter().cloned().collect();
    assert_eq!(names, documented()?);
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let text = scrape(&world).await?;
    let types = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    // Counters are exported with a suffix, which the documents include.
    let shown: BTreeSet<String> = types
        .map(|(name, kind)| {
            if kind == "counter" {
                format!("{name}_total")
            } else {
                name.to_owned()
            }
        })
        .collect();
    assert!(shown.len() > 3 && shown.is_subset(&names), "{shown:?}");
    Ok(())
}

both!(
    host_work_is_counted_and_its_backlog_is_measured,
    |kind: Kind| async move {
        let mut world = World::start(
            kind,
            &manifest(&format!(
                "batch = 4\n{QUICK_RETRIES}deterministic_failures = \"retry\"\n"
            ))?,
        )
        .await?;
        let message =
            |event: &str, behaviour: &str| NewMessage::new("in.x", event, behaviour, r#"{"n": 2}"#);
        let messages = [
            message("good", "insert"),
            message("good", "insert"),
            message("late", "insert,fail_once"),
            message("trap", "trap"),
            message("bad", "reject"),
        ];

        // Wait until the backlog is measured as empty.
        world.nats.publish_all(messages.to_vec()).await?;
        world.quiet(4).await?;
        let text = eventually("all messages are handled", || async {
            let text = scrape(&world).await?;
            let unhandled = value(&text, r#"oncely_unhandled_messages{worker="test"}"#);
            Ok((unhandled == Some(0.0)).then_some(text))
        })
        .await?;
        for (series, expected) in [
            (
                r#"oncely_messages_total{worker="test",verdict="done"}"#,
                2.0,
            ),
            (
                r#"oncely_messages_total{worker="test",verdict="dead"}"#,
                2.0,
            ),
            (
                r#"oncely_attempts_failed_total{worker="test",class="trap"}"#,
                3.0,
            ),
            (
                r#"oncely_dead_letters_total{worker="test",reason="rejected"}"#,
                1.0,
            ),
            (
                r#"oncely_dead_letters_total{worker="test",reason="attempts-exhausted"}"#,
                1.0,
            ),
            // Four outputs, two notices, and two new failures.
            (
                r#"oncely_outputs_total{worker="test",outcome="published"}"#,
                8.0,
            ),
            (
                r#"messaging_client_sent_messages_total{worker="test"}"#,
                8.0,
            ),
            (r#"oncely_breaker_state{stream="OUT"}"#, 0.0),
            (r#"oncely_unhandled_age_seconds{worker="test"}"#, 0.0),
            (r#"oncely_in_flight_messages{worker="test"}"#, 0.0),
            ("oncely_nats_connected", 1.0),
            ("oncely_database_writable", 1.0),
            ("oncely_unpublished_age_max_seconds", 0.0),
        ] {
            assert_eq!(value(&text, series), Some(expected), "{series}:\n{text}");
        }
        let consumed = value(
            &text,
            r#"messaging_client_consumed_messages_total{worker="test"}"#,
        );
        assert!(
            consumed.is_some_and(|consumed| consumed >= 8.0),
            "{consumed:?}"
        );
        assert!(
        text.contains(r#"messaging_process_duration_seconds_bucket{le="0.005",messaging_system="nats",worker="test"}"#),
        "{text}"
    );

        // A slow message is the oldest unhandled one.
        world
            .nats
            .publish_all(vec![NewMessage::new(
                "in.x",
                "slow",
                "slow",
                r#"{"ms": 4000}"#,
            )])
            .await?;
        eventually("the age is measured", || async {
            let text = scrape(&world).await?;
            let age = value(&text, r#"oncely_unhandled_age_seconds{worker="test"}"#);
            let max_age = value(&text, "oncely_unhandled_age_max_seconds");
            Ok((age > Some(1.0) && max_age == age).then_some(()))
        })
        .await?;
        let status = world.oncely_json(&["status", "--json"]).await?;
        assert!(
            status
                .pointer("/workers/0/oldest_pending_ms")
                .and_then(Value::as_u64)
                .is_some(),
            "{status}"
        );
        world.stop_host().await
    }
);
