//! Batch handlers, and instances shared by a batch.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use support::books;
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest, manifest_of};

fn batch_manifest(settings: &str) -> Result<String> {
    Ok(manifest_of(&guests::batch_component()?, settings))
}

fn good(event: &str) -> NewMessage {
    NewMessage::new("in.x", event, "insert", "{}")
}

/// Starts a host with all messages already on the stream, so that they form full batches.
async fn settled(
    kind: Kind,
    manifest: &str,
    messages: Vec<NewMessage>,
    events: i64,
) -> Result<World> {
    let mut world = World::start(kind, manifest).await?;
    world.stop_host().await?;
    world.nats.publish_all(messages).await?;
    world.start_host().await?;
    world.quiet(events).await?;
    Ok(world)
}

both!(
    a_batch_handler_has_one_effect_and_output_id_per_message,
    |kind: Kind| async move {
        let mut messages: Vec<NewMessage> = (0..100).map(|n| good(&format!("e{n:03}"))).collect();
        messages.extend((0..20).map(|n| good(&format!("e{n:03}"))));
        let manifest = batch_manifest("concurrency = 1\nbatch = 20")?;
        let world = settled(kind, &manifest, messages, 100).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.outputs), (100, 100));
        let stored = world.nats.read_stream("OUT").await?;
        let ids: BTreeSet<&str> = stored
            .iter()
            .filter_map(|message| message.headers.get("Oncely-Output-Id").map(String::as_str))
            .collect();
        assert!(
            ids.contains("test:e000:0") && ids.contains("test:e099:0"),
            "{ids:?}"
        );
        let together = |message: &support::nats::Stored| {
            serde_json::from_slice::<serde_json::Value>(&message.body)
                .ok()
                .and_then(|body| body["batch"].as_u64())
        };
        assert_eq!(stored.iter().filter_map(together).max(), Some(20));
        Ok(())
    }
);

/// Behaviour, reason of the dead letter, part of its detail, and number of attempts.
const BAD: &[(&str, &str, &str, i64)] = &[
    ("reject", "rejected", "requested reject", 1),
    ("late-reject", "rejected", "requested late reject", 1),
    ("fail", "attempts-exhausted", "requested failure", 3),
    ("trap", "attempts-exhausted", "panicked", 3),
    ("violate", "attempts-exhausted", "a statement failed", 3),
    ("uncaused", "output-refused", "which message caused it", 1),
    (
        "short",
        "attempts-exhausted",
        "received 1 messages and returned 0 results",
        3,
    ),
];

both!(
    failing_items_of_a_batch_handler_cost_others_no_attempt,
    |kind: Kind| async move {
        let mut messages = Vec::new();
        for (n, (behaviour, ..)) in BAD.iter().enumerate() {
            messages.extend((0..10).map(|m| good(&format!("good{n}-{m}"))));
            messages.push(NewMessage::new("in.x", behaviour, behaviour, "{}"));
        }
        let manifest = batch_manifest(&format!("concurrency = 1\nbatch = 32\n{QUICK_RETRIES}"))?;
        let world = settled(kind, &manifest, messages, BAD.len() as i64 * 11).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs),
            (BAD.len() * 10, BAD.len() * 10)
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt where event_id like 'good%'")
                .await?,
            0
        );
        for (behaviour, reason, says, attempts) in BAD {
            let sql = format!(
                "select reason, detail, attempts from oncely.dead_letter where event_id = '{behaviour}'"
            );
            let rows = world.database.rows(&sql).await?;
            let row = rows
                .first()
                .with_context(|| format!("{behaviour} has no dead letter"))?;
            assert_eq!(
                (row[0].as_str(), row[2].as_str()),
                (*reason, attempts.to_string().as_str()),
                "{behaviour}"
            );
            assert!(
                row[1].contains(says),
                "{behaviour}: `{}` does not contain `{says}`",
                row[1]
            );
        }
        Ok(())
    }
);

both!(
    with_isolation_batch_an_instance_lives_until_an_item_fails,
    |kind: Kind| async move {
        let mut messages: Vec<NewMessage> = (0..40)
            .map(|n| NewMessage::new("in.x", &format!("e{n}"), "calls,insert", "{}"))
            .collect();
        messages.insert(10, NewMessage::new("in.x", "bad", "calls,reject", "{}"));
        let manifest = manifest("concurrency = 1\nbatch = 41\nisolation = \"batch\"")?;
        let world = settled(kind, &manifest, messages, 41).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 40);
        let stored = world.nats.read_stream("OUT").await?;
        let call_of = |message: &support::nats::Stored| -> Option<(String, u64)> {
            let call = serde_json::from_slice(&message.body)
                .ok()
                .filter(|_| message.subject == "out.calls")?;
            Some((message.headers.get("Oncely-Output-Id")?.clone(), call))
        };
        let calls: Vec<(String, u64)> = stored.iter().filter_map(call_of).collect();
        assert_eq!(calls.len(), 40);
        for pair in calls.windows(2) {
            assert!(pair[1].1 == 1 || pair[1].1 == pair[0].1 + 1, "{pair:?}");
        }

        // In every batching, most messages shared an instance. The one after the failure did not.
        assert!(
            calls.iter().filter(|(_, call)| *call > 1).count() > 20,
            "{calls:?}"
        );
        assert!(calls.contains(&("test:e10:0".to_owned(), 1)), "{calls:?}");
        Ok(())
    }
);
