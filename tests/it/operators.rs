//! Commands of operators: workers are paused, drained and resumed, and backlogs are skipped.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, stream};
use serde_json::{Value, json};
use support::books;
use support::database::Kind;
use support::metrics;
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{QUICK_RETRIES, World, http_manifest, manifest};

fn inserts(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| NewMessage::new("in.x", &format!("e{n}"), "insert", r#"{"n": 1}"#))
        .collect()
}

/// A message whose handler runs for this long, and then has an effect.
fn slow(event: &str, ms: u64) -> NewMessage {
    NewMessage::new(
        "in.x",
        event,
        "slow,insert",
        &format!(r#"{{"n": 1, "ms": {ms}}}"#),
    )
}

/// The state of the worker `test` on the host.
async fn state(world: &World) -> Result<Value> {
    let workers = world.oncely_json(&["workers", "--json"]).await?;
    Ok(workers[0].clone())
}

const INBOX: &str = "select count(*) from oncely.inbox";

both!(
    a_paused_worker_handles_nothing_until_it_is_resumed,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        world.nats.publish_all(inserts(0, 5)).await?;
        world.quiet(5).await?;
        let said = world
            .oncely(&["pause", "test", "--note", "maintenance"])
            .await?;
        assert_eq!(said.trim(), "worker test is paused on 1 host");

        // Status, metrics and alarms show it. It is not broken, and the host stays ready.
        let shown = state(&world).await?;
        assert_eq!(
            (&shown["state"], &shown["error"], &shown["is_drained"]),
            (
                &"paused".into(),
                &"paused by host: maintenance".into(),
                &true.into()
            )
        );
        world.nats.publish_all(inserts(5, 10)).await?;
        let status = world
            .eventually("the backlog is counted", || async {
                let status = world.oncely_json(&["status", "--json"]).await?;
                let pending = &status["workers"][0]["pending"];
                Ok((*pending == json!(5)).then_some(status))
            })
            .await?;
        assert_eq!(
            (&status["ready"], &status["broken"]),
            (&true.into(), &json!([]))
        );
        let text = metrics::scrape(&world).await?;
        assert!(
            text.contains("oncely_worker_paused{worker=\"test\"} 1"),
            "{text}"
        );
        world
            .eventually("the alarm is raised", || async {
                let status = world.oncely_json(&["status", "--json"]).await?;
                let alarms = status["alarms"].to_string();
                Ok(alarms.contains("\"kind\":\"paused\"").then_some(()))
            })
            .await?;
        assert_eq!(world.database.number(INBOX).await?, 5);

        // The pause survives a restart and a new version.
        world.kill_host()?;
        world.write_manifest(&manifest(&format!(
            "{QUICK_RETRIES}\n[worker.config]\nlabel = \"two\""
        ))?)?;
        world.start_host().await?;
        let shown = state(&world).await?;
        assert_eq!(
            (&shown["state"], &shown["version"]),
            (&"paused".into(), &2.into())
        );
        world.nats.publish_all(inserts(10, 12)).await?;
        world
            .eventually("the backlog is counted", || async {
                let status = world.oncely_json(&["status", "--json"]).await?;
                Ok((status["workers"][0]["pending"] == json!(7)).then_some(()))
            })
            .await?;
        assert_eq!(world.database.number(INBOX).await?, 5);

        // Resumed, it handles its backlog.
        let said = world.oncely(&["resume", "test"]).await?;
        assert_eq!(said.trim(), "worker test is running on 1 host");
        world.quiet(12).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.outputs), (12, 12));
        let text = metrics::scrape(&world).await?;
        assert!(
            text.contains("oncely_worker_paused{worker=\"test\"} 0"),
            "{text}"
        );
        for command in ["pause", "resume", "drain"] {
            let missing = world
                .oncely(&[command, "missing"])
                .await
                .unwrap_err()
                .to_string();
            assert!(
                missing.contains("there is no worker `missing`"),
                "{missing}"
            );
        }
        Ok(())
    }
);

both!(
    a_drain_waits_for_the_messages_in_flight,
    |kind: Kind| async move {
        let settings =
            format!("batch = 1\nconcurrency = 1\n{QUICK_RETRIES}[worker.limits]\ntime = \"60s\"\n");
        let world = World::start(kind, &manifest(&settings)?).await?;
        world
            .nats
            .publish_all(vec![slow("e0", 8_000), slow("e1", 10)])
            .await?;
        world
            .eventually("a message is in flight", || async {
                Ok((state(&world).await?["in_flight"] != json!(0)).then_some(()))
            })
            .await?;

        // Too short a timeout: the exit code says so, and the worker stays paused.
        let drain = std::process::Command::new(support::guests::oncely()?)
            .args(["drain", "test", "--timeout", "100ms"])
            .current_dir(world.folder.path())
            .env_remove("ONCELY_HOST")
            .output()?;
        let said = String::from_utf8_lossy(&drain.stderr);
        assert_eq!(drain.status.code(), Some(8), "{said}");
        assert!(said.contains("is not drained after 100ms"), "{said}");

        // With enough time nothing is in flight, and the outputs are published.
        let said = world.oncely(&["drain", "test"]).await?;
        assert!(
            said.contains("worker test is drained: nothing is in flight on 1 host"),
            "{said}"
        );
        assert_eq!(state(&world).await?["in_flight"], 0);
        let handled = world.database.number(INBOX).await?;
        assert_eq!(world.nats.read_stream("OUT").await?.len() as i64, handled);

        // What was not begun is handled after the pause.
        world.oncely(&["resume", "test"]).await?;
        world.quiet(2).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 2);
        Ok(())
    }
);

both!(
    requests_to_a_paused_worker_get_503_with_retry_after,
    |kind: Kind| async move {
        let route = "\n[[worker.route]]\npath = \"/do/{*what}\"\n";
        let mut world = World::start(kind, &http_manifest("5s", route)?).await?;
        world.oncely(&["pause", "test"]).await?;
        for _ in 0..2 {
            let response = reqwest::Client::new()
                .post(format!("{}/do/echo", world.ingress_url()?))
                .body("{}")
                .send()
                .await?;
            let retry_after = response.headers().get("retry-after").cloned();
            assert_eq!(response.status(), 503);
            assert_eq!(
                retry_after.as_ref().and_then(|value| value.to_str().ok()),
                Some("10")
            );
            let problem: Value = serde_json::from_slice(&response.bytes().await?)?;
            assert_eq!(problem["code"], "paused", "{problem}");
            // The second time after a restart.
            world.kill_host()?;
            world.start_host().await?;
        }
        let said = world.oncely(&["drain", "test"]).await?;
        assert!(said.contains("is drained"), "{said}");
        world.oncely(&["resume", "test"]).await?;
        let response = reqwest::Client::new()
            .post(format!("{}/do/echo", world.ingress_url()?))
            .body("{}")
            .send()
            .await?;
        assert_ne!(response.status(), 503);
        Ok(())
    }
);

both!(
    a_skipped_backlog_is_never_handled_and_named_in_the_record,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        world.nats.publish_all(inserts(0, 3)).await?;
        world.quiet(3).await?;
        world.oncely(&["pause", "test"]).await?;
        world.nats.publish_all(inserts(3, 10)).await?;

        // The plan has a count and a sample, and changes nothing.
        let plan = world
            .oncely_json(&["skip", "test", "--to", "8", "--dry-run", "--json"])
            .await?;
        assert_eq!(
            json!([
                plan["from"],
                plan["to"],
                plan["messages_max"],
                plan["sample"][0]["event_id"]
            ]),
            json!([4, 8, 5, "e3"])
        );
        let unasked = world
            .oncely(&["skip", "test", "--to", "8"])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            unasked.contains("refusing to skip 5 messages without confirmation"),
            "{unasked}"
        );
        assert_eq!(world.database.number(INBOX).await?, 3);

        // The record names the sequences, the actor and the reason.
        let said = world
            .oncely(&["skip", "test", "--to", "8", "--yes", "--note", "poisoned"])
            .await?;
        assert!(
            said.contains("skipped: 5; settled before: 0; sequences of IN: 4-8"),
            "{said}"
        );
        let record = world
            .oncely_json(&["activity", "--verb", "skip", "--json"])
            .await?;
        assert_eq!(
            json!([
                record[0]["actor"],
                record[0]["worker"],
                record[0]["result"]["sequences"],
                record[0]["details"]["stream"],
                record[0]["details"]["note"]
            ]),
            json!(["host", "test", [[4, 8]], "IN", "poisoned"])
        );

        // A second time, nothing is left of it.
        let again = world
            .oncely(&["skip", "test", "--to", "8", "--yes"])
            .await?;
        assert!(again.contains("skipped: 0; settled before: 5"), "{again}");

        // Resumed, the worker handles the others only. A later copy changes nothing.
        world.oncely(&["resume", "test"]).await?;
        world.until(INBOX, 10).await?;
        let copy = NewMessage::new("in.x", "e5", "insert", r#"{"n": 1}"#);
        world.nats.publish_all(vec![copy]).await?;
        world.nats.publish_all(inserts(10, 11)).await?;
        world.quiet(11).await?;
        let books = books::check(&world).await?;
        let expected = ["e0", "e1", "e10", "e2", "e8", "e9"];
        assert_eq!(books.effects.iter().collect::<Vec<_>>(), expected);
        assert_eq!(
            world
                .database
                .rows("select state, count(*) from oncely.inbox group by state order by state")
                .await?,
            [["done", "6"], ["skipped", "5"]]
        );
        world
            .eventually("the whole stream is acknowledged", || async {
                let status = world.oncely_json(&["status", "--json"]).await?;
                Ok((status["workers"][0]["pending"] == json!(0)).then_some(()))
            })
            .await?;

        // The database and NATS agree: acknowledged messages without an effect are no restore.
        world
            .until_at_least(
                "select count(*) from oncely.watermark where broker_state like '%\"sequence\":12%'",
                1,
            )
            .await?;
        let status = world.oncely_json(&["status", "--json"]).await?;
        assert_eq!(status["ready"], true, "{status}");
        Ok(())
    }
);

both!(
    a_message_in_flight_is_handled_and_not_skipped,
    |kind: Kind| async move {
        let settings = format!("batch = 1\nconcurrency = 1\n{QUICK_RETRIES}");
        let world = World::start(kind, &manifest(&settings)?).await?;
        world.nats.publish_all(vec![slow("e0", 3_000)]).await?;
        world
            .eventually("a message is in flight", || async {
                Ok((state(&world).await?["in_flight"] != json!(0)).then_some(()))
            })
            .await?;
        world.nats.publish_all(inserts(1, 4)).await?;

        // The command pauses the worker itself.
        let said = world.oncely(&["skip", "test", "--all", "--yes"]).await?;
        let skipped = world
            .database
            .rows("select event_id from oncely.inbox where state = 'skipped' order by 1")
            .await?
            .concat();
        assert!(!skipped.contains(&"e0".to_owned()), "{said}");
        world.oncely(&["resume", "test"]).await?;
        world.quiet(4).await?;
        let books = books::check(&world).await?;
        assert!(books.effects.contains("e0"), "{:?}", books.effects);
        assert_eq!(books.effects.len() + skipped.len(), 4, "{said}");
        Ok(())
    }
);

both!(
    messages_are_skipped_by_their_time_and_on_work_queues,
    |kind: Kind| async move {
        let world = World::without_host(kind, &manifest(QUICK_RETRIES)?).await?;
        let queue = stream::Config {
            name: "IN".to_owned(),
            subjects: vec!["in.>".to_owned()],
            retention: stream::RetentionPolicy::WorkQueue,
            ..stream::Config::default()
        };
        let jetstream = jetstream::new(world.nats.client().await?);
        jetstream.create_stream(queue).await?;
        let mut world = world;
        world.start_host().await?;
        world.oncely(&["pause", "test"]).await?;
        world.nats.publish_all(inserts(0, 5)).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let time = jiff::Timestamp::now().to_string();
        tokio::time::sleep(Duration::from_millis(20)).await;
        world.nats.publish_all(inserts(5, 8)).await?;
        let said = world
            .oncely(&["skip", "test", "--until", &time, "--yes"])
            .await?;
        assert!(
            said.contains("skipped: 5; settled before: 0; sequences of IN: 1-5"),
            "{said}"
        );
        world.oncely(&["resume", "test"]).await?;
        world.quiet(8).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 3);
        world
            .eventually("the queue is empty", || async {
                let queue = jetstream.get_stream("IN").await?;
                Ok((queue.cached_info().state.messages == 0).then_some(()))
            })
            .await?;
        Ok(())
    }
);

/// A pause through one host applies to both, and so does its end. Nothing is lost or repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_applies_to_all_hosts() -> Result<()> {
    let settings = format!("ack_wait = \"2s\"\nbatch = 4\nconcurrency = 2\n{QUICK_RETRIES}");
    let world = World::without_host(Kind::Postgres, &manifest(&settings)?).await?;
    let one = RunningHost::start(&world, "pause-one").await?;
    let two = RunningHost::start(&world, "pause-two").await?;
    let path = world.folder.path().join("oncely.toml");
    let path = path.to_str().context("convert the manifest path")?;
    one.oncely(&["deploy", path])?;
    let messages = |from: usize, to: usize| -> Vec<NewMessage> {
        (from..to).map(|n| slow(&format!("e{n}"), 5)).collect()
    };
    world.nats.publish_all(messages(0, 300)).await?;
    world.until_at_least(INBOX, 20).await?;

    // Drained on both hosts: the inbox does not grow any more.
    let said = one.oncely(&["drain", "test", "--note", "two hosts"])?;
    assert!(
        said.contains("worker test is drained: nothing is in flight on 2 hosts"),
        "{said}"
    );
    let drained: Value = serde_json::from_str(&two.oncely(&["drain", "test", "--json"])?)?;
    assert_eq!(drained["unpublished"], 0, "{drained}");
    let handled = world.database.number(INBOX).await?;
    assert_eq!(world.nats.read_stream("OUT").await?.len() as i64, handled);
    world.nats.publish_all(messages(300, 320)).await?;

    // A host that starts meanwhile is paused, too.
    let three = RunningHost::start(&world, "pause-three").await?;
    let workers: Value = serde_json::from_str(&three.oncely(&["workers", "--json"])?)?;
    assert_eq!(workers[0]["state"], "paused", "{workers}");
    for host in [&one, &two, &three] {
        let workers: Value = serde_json::from_str(&host.oncely(&["workers", "--json"])?)?;
        ensure!(workers[0]["state"] == "paused", "{workers}");
    }
    assert_eq!(world.database.number(INBOX).await?, handled);

    // Resumed through another host, all continue.
    let said = two.oncely(&["resume", "test"])?;
    assert_eq!(said.trim(), "worker test is running on 3 hosts");
    world.quiet(320).await?;
    let books = books::check(&world).await?;
    assert_eq!((books.effects.len(), books.outputs), (320, 320));
    Ok(())
}

/// The host is killed while messages are skipped. The command is repeated through another host.
/// Each message is in exactly one record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_skip_is_repeated_without_a_gap_in_the_record() -> Result<()> {
    let world = World::without_host(Kind::Postgres, &manifest(QUICK_RETRIES)?).await?;
    let one = RunningHost::start(&world, "skip-one").await?;
    let path = world.folder.path().join("oncely.toml");
    one.oncely(&["deploy", &path.display().to_string()])?;
    one.oncely(&["pause", "test"])?;
    world.nats.publish_all(inserts(0, 3_500)).await?;

    // Killed after the first of its transactions.
    let mut client = std::process::Command::new(support::guests::oncely()?)
        .args(["skip", "test", "--to", "3400", "--yes"])
        .current_dir(one.folder())
        .env_remove("ONCELY_HOST")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    world.until_at_least(INBOX, 1).await?;
    drop(one);
    let _ = client.wait();
    let two = RunningHost::start(&world, "skip-two").await?;
    two.oncely(&["skip", "test", "--to", "3400", "--yes"])?;
    two.oncely(&["resume", "test"])?;
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, 100).await?;
    world.quiet(3_500).await?;
    assert_eq!(books::check(&world).await?.effects.len(), 100);

    // The records together name each skipped sequence once.
    let records: Value = serde_json::from_str(
        &two.oncely(&["activity", "--verb", "skip", "--limit", "1000", "--json"])?,
    )?;
    let ranges = records
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|record| record.pointer("/result/sequences")?.as_array())
        .flatten();
    let mut sequences: Vec<u64> = ranges
        .filter_map(|range| Some(range.get(0)?.as_u64()?..=range.get(1)?.as_u64()?))
        .flatten()
        .collect();
    sequences.sort_unstable();
    assert_eq!(sequences, (1..=3_400).collect::<Vec<_>>());
    Ok(())
}
