//! Order per key, of effects and of outputs, with failing items in between.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use base64::Engine as _;
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

const KEYS: usize = 5;

/// The behaviour of a successful message: two rows, a position in the order of its key, and
/// outputs.
const EFFECT: &str = "insert,state_append";

fn keyed(key: usize, event: &str, behaviour: &str) -> NewMessage {
    let options = format!(r#"{{"list": "key{key}", "n": 2, "attempt": 3}}"#);
    NewMessage::new(&format!("in.key{key}"), event, behaviour, &options)
}

/// `count` messages for each key, alternating. Some fail before and some after SQL, some always.
fn workload(count: usize) -> Vec<(String, String, NewMessage)> {
    let mut messages = Vec::new();
    for n in 0..count {
        for key in 0..KEYS {
            let (kind, behaviour) = match (n + key * 3) % 10 {
                2 => ("late", format!("fail_until,{EFFECT}")),
                4 => ("late", format!("{EFFECT},fail_once")),
                6 => ("dead", format!("{EFFECT},trap")),
                8 => ("dead", "reject".to_owned()),
                _ => ("good", EFFECT.to_owned()),
            };
            let event = format!("key{key}-{n:03}-{kind}");
            messages.push((
                format!("key{key}"),
                event.clone(),
                keyed(key, &event, &behaviour),
            ));
        }
    }
    messages
}

/// The ids of the messages with effects by key, in the order of effects.
async fn effects(world: &World) -> Result<BTreeMap<String, Vec<String>>> {
    let mut effects = BTreeMap::new();
    for key in 0..KEYS {
        let key = format!("key{key}");
        effects.insert(key.clone(), effects_of(world, &key).await?);
    }
    Ok(effects)
}

async fn effects_of(world: &World, key: &str) -> Result<Vec<String>> {
    let entry = world
        .oncely_json(&["state", "get", "test", key, "--json"])
        .await?;
    let value = entry["value"]
        .as_str()
        .context("read the value of the entry")?;
    Ok(serde_json::from_slice(
        &base64::engine::general_purpose::STANDARD.decode(value)?,
    )?)
}

/// The ids of the messages with outputs by key, in stream order.
async fn outputs(world: &World) -> Result<BTreeMap<String, Vec<String>>> {
    let mut outputs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for message in world.nats.read_stream("OUT").await? {
        let body: serde_json::Value = serde_json::from_slice(&message.body)?;
        let event = body["event_id"]
            .as_str()
            .context("read the event id of the output")?
            .to_owned();
        let key = event.split('-').next().unwrap_or_default().to_owned();
        let events = outputs.entry(key).or_default();
        if body["ordinal"] == 0 {
            events.push(event);
        } else {
            assert_eq!(
                events.last(),
                Some(&event),
                "outputs of two messages of a key are interleaved"
            );
        }
    }
    Ok(outputs)
}

/// The workload's ids by key in stream order, without these kinds.
fn expected(count: usize, leave_out: &[&str]) -> BTreeMap<String, Vec<String>> {
    let mut expected: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, event, _) in workload(count) {
        expected.entry(key).or_default().push(event);
    }
    without(expected, leave_out)
}

fn without(ids: BTreeMap<String, Vec<String>>, kinds: &[&str]) -> BTreeMap<String, Vec<String>> {
    let kept = |ids: Vec<String>| {
        ids.into_iter()
            .filter(|id| kinds.iter().all(|kind| !id.ends_with(kind)))
            .collect()
    };
    ids.into_iter().map(|(key, ids)| (key, kept(ids))).collect()
}

/// Handles the workload in full batches.
async fn settled(kind: Kind, settings: &str, count: usize) -> Result<World> {
    let settings = format!(
        "ordering_key = \"subject:2\"\nconcurrency = 2\nbatch = 16\n{settings}\n{QUICK_RETRIES}"
    );
    let mut world = World::start(kind, &manifest(&settings)?).await?;
    world.stop_host().await?;
    world
        .nats
        .publish_all(
            workload(count)
                .into_iter()
                .map(|(_, _, message)| message)
                .collect(),
        )
        .await?;
    world.start_host().await?;
    world.quiet((count * KEYS) as i64).await?;
    let books = books::check(&world).await?;
    assert_eq!(
        books.effects.len(),
        expected(count, &["dead"])
            .values()
            .map(Vec::len)
            .sum::<usize>()
    );
    Ok(world)
}

both!(
    with_skip_failed_messages_come_later_and_others_in_order,
    |kind: Kind| async move {
        let count = 40;
        let world = settled(kind, "", count).await?;
        let (effects, outputs) = (effects(&world).await?, outputs(&world).await?);
        assert_eq!(
            without(effects.clone(), &["dead", "late"]),
            expected(count, &["dead", "late"])
        );
        assert_eq!(effects, outputs);
        // Later messages did not wait for failing ones.
        assert_ne!(effects, expected(count, &["dead"]));
        Ok(())
    }
);

both!(
    with_hold_every_key_takes_effect_in_stream_order,
    |kind: Kind| async move {
        let count = 40;
        let world = settled(kind, "on_failure = \"hold\"", count).await?;
        assert_eq!(effects(&world).await?, expected(count, &["dead"]));
        assert_eq!(outputs(&world).await?, expected(count, &["dead"]));
        // Waiting for another message is not an attempt.
        let spent = "select count(*) from oncely.attempt where event_id like '%-good'";
        assert_eq!(world.database.number(spent).await?, 0);
        Ok(())
    }
);

/// A message that fails, requests a long delay, and succeeds at its second attempt.
fn slow_to_recover(key: usize, event: &str, wait_ms: u64) -> NewMessage {
    let options = format!(r#"{{"list": "key{key}", "attempt": 2, "after_ms": {wait_ms}}}"#);
    NewMessage::new(
        &format!("in.key{key}"),
        event,
        &format!("fail_until,{EFFECT}"),
        &options,
    )
}

both!(
    a_held_key_waits_in_the_host_while_others_continue,
    |kind: Kind| async move {
        // One lane, with redelivery much sooner than the delay: the hold must extend `ack_wait`.
        let settings = "ordering_key = \"subject:2\"\non_failure = \"hold\"\nconcurrency = 1\nack_wait = \"1s\"";
        let world = World::start(kind, &manifest(settings)?).await?;
        let mut messages = vec![slow_to_recover(0, "key0-first", 4_000)];
        for n in 0..20 {
            messages.push(keyed(0, &format!("key0-{n:03}"), EFFECT));
            messages.push(keyed(1, &format!("key1-{n:03}"), EFFECT));
        }
        world.nats.publish_all(messages).await?;
        world
            .until(
                "select count(*) from oncely.inbox where event_id like 'key1-%'",
                20,
            )
            .await?;

        // Attempts are counted after the batch is committed.
        world
            .until("select count(*) from oncely.attempt", 1)
            .await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox where event_id like 'key0-%'")
                .await?,
            0
        );
        world.quiet(41).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt")
                .await?,
            1
        );
        let held = effects_of(&world, "key0").await?;
        assert_eq!(held.first().map(String::as_str), Some("key0-first"));
        assert!(
            held.is_sorted_by_key(|id| id.replace("first", "")),
            "{held:?}"
        );
        let status = world.oncely_json(&["workers", "--json"]).await?;
        assert_eq!(
            status.pointer("/0/duplicates"),
            Some(&0.into()),
            "a held message was redelivered: {status}"
        );
        Ok(())
    }
);

both!(
    a_held_key_keeps_its_order_when_the_host_stops_or_is_killed,
    |kind: Kind| async move {
        for kill in [false, true] {
            let settings =
                "ordering_key = \"subject:2\"\non_failure = \"hold\"\nbatch = 4\nack_wait = \"2s\"";
            let mut world = World::start(kind, &manifest(settings)?).await?;
            let mut messages = vec![slow_to_recover(0, "key0-000", 3_600_000)];
            messages.extend((1..30).map(|n| keyed(0, &format!("key0-{n:03}"), EFFECT)));
            world.nats.publish_all(messages).await?;
            world
                .until("select count(*) from oncely.attempt", 1)
                .await?;
            if kill {
                world.kill_host()?;
            } else {
                world.stop_host().await?;
            }
            // More messages are on the stream before the next host starts.
            world
                .nats
                .publish_all(
                    (30..60)
                        .map(|n| keyed(0, &format!("key0-{n:03}"), EFFECT))
                        .collect(),
                )
                .await?;
            world.start_host().await?;
            world.quiet(60).await?;
            let expected: Vec<String> = (0..60).map(|n| format!("key0-{n:03}")).collect();
            assert_eq!(
                effects_of(&world, "key0").await?,
                expected,
                "killed: {kill}"
            );
        }
        Ok(())
    }
);
