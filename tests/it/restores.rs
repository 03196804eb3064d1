//! Restores of a database or stream to an earlier time: the host detects them and waits.
//!
//! After `oncely recover` it continues, with no effect lost or repeated.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use async_nats::jetstream::stream::{Config, RetentionPolicy};
use serde_json::Value;
use support::books;
use support::database::{Database, Kind};
use support::nats::{NatsServer, NewMessage};
use support::production::RunningHost;
use support::world::{World, manifest};

/// A message without an id from its publisher; its stream position is its id.
fn without_id() -> NewMessage {
    let headers = vec![("do".to_owned(), "insert".to_owned())];
    NewMessage {
        subject: "in.x".to_owned(),
        headers,
        body: br#"{"n": 1}"#.to_vec(),
    }
}

/// Waits until a watermark records the ack floor.
async fn until_watermark(world: &World, floor: u64) -> Result<()> {
    let sql = format!(
        "select count(*) from oncely.watermark where stream_sequence is not null and broker_state like '%\"sequence\":{floor},%'"
    );
    world.until_at_least(&sql, 1).await.map(drop)
}

/// Publishes events and waits until `settled` messages are settled, and a watermark records their
/// ack.
async fn settle_events(world: &World, events: Range<u64>, settled: u64) -> Result<()> {
    world
        .nats
        .publish_all(events.map(NewMessage::insert).collect())
        .await?;
    world.quiet(i64::try_from(settled)?).await?;
    until_watermark(world, settled).await
}

/// Copies the database; the host continues afterwards.
async fn back_up_database(world: &mut World) -> Result<Database> {
    world.stop_host().await?;
    let backup = world.database.copy(world.folder.path()).await?;
    world.start_host().await?;
    Ok(backup)
}

/// Handles messages without ids, copies their stream, and handles as many more.
async fn publish_beyond_a_stream_copy(world: &mut World, messages: u64) -> Result<()> {
    let publish = async |world: &World| {
        world
            .nats
            .publish_all((0..messages).map(|_| without_id()).collect())
            .await
    };
    publish(world).await?;
    world.quiet(i64::try_from(messages)?).await?;
    world.nats.kill()?;
    world.nats.copy_stream("IN")?;
    world.nats.restart().await?;
    publish(world).await?;
    world.quiet(i64::try_from(2 * messages)?).await?;
    until_watermark(world, 2 * messages).await
}

/// Restores the stream from that copy.
async fn restore_stream(world: &mut World) -> Result<()> {
    world.nats.kill()?;
    world.nats.roll_back_stream("IN")?;
    world.nats.restart().await
}

/// The ids of the outputs on a stream, with repetitions.
async fn outputs(world: &World, stream: &str) -> Result<Vec<String>> {
    let stored = world.nats.read_stream(stream).await?;
    Ok(stored
        .iter()
        .map(|message| message.headers["Nats-Msg-Id"].clone())
        .collect())
}

/// Checks that each event took effect once and has its one output, the one from before the restore
/// if there was one.
async fn check_effects_and_outputs(world: &World, events: i64) -> Result<()> {
    // Each event has two rows.
    assert_eq!(
        world
            .database
            .number("select count(*) from app.effect")
            .await?,
        2 * events
    );
    assert_eq!(
        world
            .database
            .number("select count(distinct event_id) from app.effect")
            .await?,
        events
    );
    let outputs = outputs(world, "OUT").await?;
    assert_eq!(
        outputs.len() as i64,
        events,
        "outputs were repeated or lost"
    );
    assert_eq!(outputs.iter().collect::<BTreeSet<_>>().len(), outputs.len());
    Ok(())
}

/// A world whose output stream has a tiny duplicate window, so that only Oncely knows its contents.
async fn world(kind: Kind) -> Result<World> {
    let mut world = World::without_host(kind, &manifest("ack_wait = \"2s\"\nbatch = 4")?).await?;
    world
        .nats
        .make_stream("OUT", "out.>", Duration::from_millis(100))
        .await?;
    world.start_host().await?;
    Ok(world)
}

// The streams have no last message at the time of the backup.
both!(
    a_backup_from_before_the_first_message_is_recovered,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        let watermark = "select count(*) from oncely.watermark where stream_sequence is not null and broker_state like '%\"IN\"%'";
        world.until_at_least(watermark, 1).await?;
        let backup = back_up_database(&mut world).await?;
        settle_events(&world, 0..10, 10).await?;
        world.stop_host().await?;

        world.database = backup;
        world.spawn_host()?;
        world
            .not_ready("the database was restored to an earlier time than NATS")
            .await?;
        let done = world.oncely_json(&["recover", "--json"]).await?;
        assert_eq!(done["done"], true, "{done}");
        world.ready().await?;
        world.quiet(10).await?;
        check_effects_and_outputs(&world, 10).await
    }
);

both!(
    a_restored_database_is_detected_and_recovered,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        world
            .nats
            .publish_all((0..20).map(NewMessage::insert).collect())
            .await?;

        // A dead letter that is redriven at the time of the copy. Its pointer is gone before the
        // restore.
        world
            .nats
            .publish_all(vec![NewMessage::new("in.x", "poison", "reject", "{}")])
            .await?;
        world.quiet(21).await?;
        until_watermark(&world, 21).await?;
        world.stop_host().await?;
        let dead_letter = world
            .database
            .number("select id from oncely.dead_letter")
            .await?;
        world
            .database
            .execute(
                "update oncely.dead_letter set state = 'redriven', generation = generation + 1",
            )
            .await?;
        let backup = world.database.copy(world.folder.path()).await?;
        world
            .database
            .execute("update oncely.dead_letter set state = 'open', generation = generation - 1")
            .await?;

        world.start_host().await?;
        settle_events(&world, 20..40, 41).await?;
        world.stop_host().await?;

        world.database = backup;
        world.spawn_host()?;
        let why = world
            .not_ready("the database was restored to an earlier time than NATS")
            .await?;
        assert!(why.contains("oncely recover --dry-run"), "{why}");
        let workers = world.oncely_json(&["workers", "--json"]).await?;
        assert_eq!(workers[0]["state"], "held", "{workers}");
        world
            .nats
            .publish_all((40..45).map(NewMessage::insert).collect())
            .await?;
        let alarm =
            "select count(*) from oncely.alarm where kind = 'restored' and cleared_at is null";
        world.until(alarm, 1).await?;
        let alarms = world
            .database
            .published("subject like 'oncely.alarm.%' and event_id like '%restored%'");
        world.until(&alarms, 1).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox")
                .await?,
            21
        );
        let before = outputs(&world, "OUT").await?;
        assert_eq!(before.len(), 40);

        let plan = world
            .oncely_json(&["recover", "--dry-run", "--json"])
            .await?;
        assert_eq!(
            (&plan["done"], &plan["dead_letters"]),
            (&Value::Bool(false), &Value::from(1)),
            "{plan}"
        );
        let place = &plan["consumers"][0];
        assert_eq!(
            (&place["worker"], &place["from"]),
            (&Value::from("test"), &Value::from(22)),
            "{plan}"
        );
        assert_eq!(place["acknowledged"], 41, "{plan}");
        world
            .not_ready("the database was restored to an earlier time than NATS")
            .await?;
        let shown = world.oncely(&["recover", "--dry-run"]).await?;
        assert!(shown.contains("nothing was changed"), "{shown}");

        let done = world.oncely_json(&["recover", "--json"]).await?;
        assert_eq!(done["done"], true, "{done}");
        world.ready().await?;
        world.quiet(46).await?;
        world
            .until(
                &format!(
                    "select count(*) from oncely.dead_letter where id = {dead_letter} and state = 'open'"
                ),
                1,
            )
            .await?;
        check_effects_and_outputs(&world, 45).await?;

        // Nothing is left to recover, also after another start.
        let again = world.oncely(&["recover"]).await?;
        assert!(again.contains("nothing to recover"), "{again}");
        until_watermark(&world, 46).await?;
        world.stop_host().await?;
        world.start_host().await
    }
);

both!(
    a_restored_database_is_detected_by_the_ack_floor_alone,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        settle_events(&world, 0..10, 10).await?;
        world.stop_host().await?;

        // Lose the last moments before a failover: less than the interval between watermarks.
        world
        .database
        .execute("update oncely.watermark set broker_state = replace(broker_state, '\"sequence\":10', '\"sequence\":9')")
        .await?;
        world
            .database
            .execute("delete from oncely.inbox where event_id = 'e9'")
            .await?;
        world
            .database
            .execute("delete from app.effect where event_id = 'e9'")
            .await?;
        world
            .database
            .execute("delete from oncely.outbox where event_id = 'e9'")
            .await?;
        world.spawn_host()?;
        world.not_ready("has acknowledged message 10 of IN").await?;
        world.oncely(&["recover"]).await?;
        world.ready().await?;
        world.quiet(10).await?;
        check_effects_and_outputs(&world, 10).await
    }
);

both!(
    a_restored_stream_is_detected_and_recovered,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        publish_beyond_a_stream_copy(&mut world, 10).await?;
        restore_stream(&mut world).await?;
        world
            .not_ready(
                "the stream IN was restored to an earlier time than the database: it ends at 10, but ended at 20 before",
            )
            .await?;

        // New messages take sequences of handled messages.
        world
            .nats
            .publish_all((0..15).map(|_| without_id()).collect())
            .await?;
        world.oncely(&["recover"]).await?;
        world.ready().await?;
        world.quiet(35).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs, books.dead.len()),
            (35, 35, 0)
        );
        assert_eq!(outputs(&world, "OUT").await?.len(), 35);
        Ok(())
    }
);

both!(
    a_restored_stream_with_new_messages_is_detected,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        publish_beyond_a_stream_copy(&mut world, 5).await?;
        world.stop_host().await?;
        restore_stream(&mut world).await?;
        world
            .nats
            .publish_all((0..9).map(|_| without_id()).collect())
            .await?;
        world.spawn_host()?;
        world
            .not_ready("the stream IN holds a different message at 10 than before")
            .await?;
        world.oncely(&["recover"]).await?;
        world.ready().await?;
        world.quiet(19).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 19);
        Ok(())
    }
);

both!(
    a_broker_without_a_watermark_is_detected,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        settle_events(&world, 0..5, 5).await?;
        world.stop_host().await?;
        world.nats = NatsServer::start().await?;
        world.nats_url = world.nats.url();
        world.spawn_host()?;
        world
            .not_ready("NATS was restored to an earlier time than the database, or is another one: it has no watermark")
            .await?;
        world
            .nats
            .publish_all((5..8).map(NewMessage::insert).collect())
            .await?;
        world.oncely(&["recover"]).await?;
        world.ready().await?;
        world.until("select count(*) from oncely.inbox", 8).await?;
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_host_waits_for_the_recovery_and_resumes() -> Result<()> {
    let mut world = world(Kind::Postgres).await?;
    settle_events(&world, 0..10, 10).await?;
    let backup = back_up_database(&mut world).await?;
    settle_events(&world, 10..20, 20).await?;
    world.stop_host().await?;
    world.database = backup;
    world.spawn_host()?;
    let mut rival = world.spawn_rival()?;
    world
        .not_ready("restored to an earlier time than NATS")
        .await?;
    world
        .nats
        .publish_all((20..60).map(NewMessage::insert).collect())
        .await?;
    world.oncely(&["recover"]).await?;
    world.ready().await?;
    world.quiet(60).await?;
    rival.kill()?;
    rival.wait()?;
    check_effects_and_outputs(&world, 60).await
}

both!(forged_watermarks_block_no_host, |kind: Kind| async move {
    let mut world = world(kind).await?;
    settle_events(&world, 0..3, 3).await?;
    let watermarks = world.nats.read_stream("ONCELY_WATERMARKS").await?;
    let own = watermarks
        .last()
        .map(|watermark| watermark.subject.clone())
        .unwrap_or_default();
    for subject in [own.as_str(), "oncely.watermark.0", "oncely.watermark.a.b"] {
        for text in [
            "x",
            "x y",
            "00112233445566778899aabbccddeeff 00112233445566778899aabbccddeeff",
        ] {
            let (headers, body) = (Vec::new(), text.as_bytes().to_vec());
            world
                .nats
                .publish_all(vec![NewMessage {
                    subject: subject.to_owned(),
                    headers,
                    body,
                }])
                .await?;
        }
    }
    world
        .nats
        .publish_all((3..6).map(NewMessage::insert).collect())
        .await?;
    world.quiet(6).await?;
    until_watermark(&world, 6).await?;
    world.stop_host().await?;
    world.start_host().await
});

/// On these streams, acknowledged messages are deleted: they cannot be redelivered, and waiting
/// messages must not be lost.
async fn check_recovery_with_retention(kind: Kind, retention: RetentionPolicy) -> Result<()> {
    let mut world = World::without_host(kind, &manifest("ack_wait = \"2s\"\nbatch = 4")?).await?;
    let context = async_nats::jetstream::new(world.nats.client().await?);
    let queue = Config {
        name: "IN".to_owned(),
        subjects: vec!["in.>".to_owned()],
        retention,
        allow_direct: true,
        ..Config::default()
    };
    context.create_stream(queue).await?;
    world
        .nats
        .make_stream("OUT", "out.>", Duration::from_millis(100))
        .await?;
    world.start_host().await?;
    settle_events(&world, 0..10, 10).await?;
    let backup = back_up_database(&mut world).await?;
    settle_events(&world, 10..20, 20).await?;
    world.stop_host().await?;
    world
        .nats
        .publish_all((20..25).map(NewMessage::insert).collect())
        .await?;
    world.database = backup;
    world.spawn_host()?;
    world
        .not_ready("restored to an earlier time than NATS")
        .await?;
    let done = world.oncely_json(&["recover", "--json"]).await?;
    let place = &done["consumers"][0];
    assert_eq!(
        (&place["from"], place["note"].is_string()),
        (&Value::Null, true),
        "{done}"
    );
    world.ready().await?;
    world.quiet(15).await?;
    assert_eq!(
        world
            .database
            .number("select count(distinct event_id) from app.effect")
            .await?,
        15
    );
    assert_eq!(outputs(&world, "OUT").await?.len(), 25);
    Ok(())
}

both!(
    messages_on_a_work_queue_survive_a_recovery,
    |kind: Kind| async move { check_recovery_with_retention(kind, RetentionPolicy::WorkQueue).await }
);

both!(
    messages_on_an_interest_stream_survive_a_recovery,
    |kind: Kind| async move { check_recovery_with_retention(kind, RetentionPolicy::Interest).await }
);

/// The restored database is older than the worker's deployment. After a new deployment, every
/// message is redelivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_deployed_after_a_recovery_starts_from_scratch() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest("batch = 4")?).await?;
    world
        .nats
        .make_stream("OUT", "out.>", Duration::from_millis(100))
        .await?;
    let path = world.folder.path().join("oncely.toml");
    let host = RunningHost::start(&world, "first").await?;
    world
        .until_at_least(
            "select count(*) from oncely.watermark where stream_sequence is not null",
            1,
        )
        .await?;
    drop(host);
    let backup = world.database.copy(world.folder.path()).await?;
    let host = RunningHost::start(&world, "first").await?;
    host.oncely(&["deploy", &path.display().to_string()])?;
    settle_events(&world, 0..10, 10).await?;
    drop(host);
    world.database = backup;
    let mut host = RunningHost::spawn(&world, "second")?;
    host.eventually("the restore is detected", || async {
        let status = host.oncely(&["status", "--json"])?;
        ensure!(
            status.contains("restored to an earlier time than NATS"),
            "{status}"
        );
        Ok(Some(()))
    })
    .await?;
    host.oncely(&["recover"])?;
    host.ready().await?;
    host.oncely(&["deploy", &path.display().to_string()])?;
    world.quiet(10).await?;
    check_effects_and_outputs(&world, 10).await
}

// A worker that adds subjects has not lost messages, although some are below its ack floor.
both!(
    a_worker_with_added_subjects_is_no_sign_of_a_restore,
    |kind: Kind| async move {
        let of = |subjects: &str| manifest(&format!("batch = 4\nsubjects = [{subjects}]"));
        let mut world = World::without_host(kind, &of("\"in.a\"")?).await?;
        world.start_host().await?;
        let to = |subject: &str, n: u64| NewMessage {
            subject: subject.to_owned(),
            ..NewMessage::insert(n)
        };
        for n in 0..6 {
            world
                .nats
                .publish_all(vec![to("in.a", 2 * n), to("in.b", 2 * n + 1)])
                .await?;
        }
        world.quiet(6).await?;
        world.write_manifest(&of("\"in.a\", \"in.b\"")?)?;
        world.oncely(&["deploy", "oncely.toml"]).await?;

        // A watermark with the new subjects is written before the first message under them.
        world
            .until_at_least(
                "select count(*) from oncely.watermark where broker_state like '%in.b%'",
                1,
            )
            .await?;
        let end = Instant::now() + Duration::from_secs(8);
        let mut n = 20;
        while Instant::now() < end {
            world
                .nats
                .publish_all(vec![to("in.b", n), to("in.a", n + 1)])
                .await?;
            n += 2;
            let status = world.oncely_json(&["status", "--json"]).await?;
            let why = status["not_ready"].as_str().unwrap_or_default();
            ensure!(!why.contains("disagree"), "{why}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        world.ready().await
    }
);

// A message with an unreadable subject is a dead letter, not a sign of a restore.
both!(
    a_non_utf_8_subject_is_no_sign_of_a_restore,
    |kind: Kind| async move {
        let mut world = world(kind).await?;
        settle_events(&world, 0..3, 3).await?;
        let headers = b"NATS/1.0\r\nNats-Msg-Id: odd\r\n\r\n";
        world.nats.publish_raw(b"in.\xff\xfe", headers, b"{}")?;
        world.quiet(4).await?;
        until_watermark(&world, 4).await?;
        world.ready().await
    }
);
