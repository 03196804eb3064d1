//! Event ids and output ids against publishers and workers that choose ids freely.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use oncely::model::message::{Output, OutputKind, output_id};
use oncely::model::output_ids::{OUTPUT_ID_HEADER, OutputIds};
use support::database::Kind;
use support::guests;
use support::nats::{NewMessage, Stored};
use support::world::{QUICK_RETRIES, World, manifest};

/// A second worker `other`, which consumes only `in.other` and publishes to the same stream.
fn with_other(settings: &str) -> Result<String> {
    let component = guests::component()?;
    Ok(format!(
        "{}\n[[worker]]\nname = \"other\"\ncomponent = \"{}\"\nstream = \"IN\"\nsubjects = [\"in.other\"]\n\
         outputs = [\"out.>\"]\n{settings}",
        manifest(&format!("subjects = [\"in.x\"]\n{settings}"))?,
        component.display()
    ))
}

/// A message with exactly these headers, plus its behaviour.
fn with_headers(headers: &[(&str, &str)], behaviour: &str, options: &str) -> NewMessage {
    let headers = headers.iter().copied().chain([("do", behaviour)]);
    NewMessage {
        subject: "in.x".to_owned(),
        headers: headers
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        body: options.as_bytes().to_vec(),
    }
}

async fn until_stored(world: &World, stream: &str, count: usize) -> Result<()> {
    world
        .eventually(format!("{stream} has {count} messages"), || async {
            let stored = world.nats.read_stream(stream).await?.len();
            ensure!(stored == count, "it has {stored}");
            Ok(Some(()))
        })
        .await
}

both!(
    a_forged_pointer_runs_no_dead_letter_of_another_worker,
    |kind: Kind| async move {
        let world = World::start(kind, &with_other(QUICK_RETRIES)?).await?;
        world
            .nats
            .publish_all(vec![NewMessage::new(
                "in.x",
                "e1",
                "fail",
                r#"{"after_ms": "#,
            )])
            .await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where state = 'open'",
                1,
            )
            .await?;

        // Corrected and redriven, the message waits a minute for its second attempt.
        let corrected = world.folder.path().join("corrected.json");
        std::fs::write(&corrected, r#"{"after_ms": 60000}"#)?;
        let path = corrected.display().to_string();
        world
            .oncely(&[
                "dlq",
                "edit",
                "1",
                "--body",
                &path,
                "--note",
                "truncated body",
            ])
            .await?;
        world
            .oncely(&["dlq", "redrive", "1", "--wait", "0s"])
            .await?;
        world
            .until(
                "select count(*) from oncely.attempt where error like '%with a delay%'",
                1,
            )
            .await?;
        let pointer = |worker: &str, dead_letter: &str, generation: &str| NewMessage {
            subject: format!("oncely.redrive.{worker}"),
            headers: [
                ("Oncely-Dead-Letter", dead_letter),
                ("Oncely-Generation", generation),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
            body: Vec::new(),
        };

        // Forged pointers are sent to the other worker.
        let forged = [
            ("1", "1"),
            ("01", "1"),
            ("1", "2"),
            ("2", "1"),
            ("x", "1"),
            ("1", ""),
        ];
        world
            .nats
            .publish_all(
                forged
                    .map(|(dead_letter, generation)| pointer("other", dead_letter, generation))
                    .to_vec(),
            )
            .await?;

        // The queue keeps the valid pointer, to the dead letter's own worker.
        until_stored(&world, "ONCELY_REDRIVE", 1).await?;
        assert_eq!(
            world
                .database
                .rows("select distinct worker from oncely.attempt")
                .await?,
            [["test"]]
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter where state = 'redriven'")
                .await?,
            1
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox where worker = 'other'")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    an_empty_ce_id_falls_back_to_the_next_id_source,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        let empty = |id: &str, n: u32| {
            let headers = [("ce-id", ""), ("ce-source", "/shop"), ("Nats-Msg-Id", id)];
            with_headers(&headers, "insert", &format!(r#"{{"delta": {n}}}"#))
        };
        let without_any = |n: u32| {
            let headers = [("ce-id", ""), ("ce-source", "/shop"), ("Nats-Msg-Id", "")];
            with_headers(&headers, "insert", &format!(r#"{{"delta": {n}}}"#))
        };
        world
            .nats
            .publish_all(vec![
                empty("m1", 1),
                empty("m2", 2),
                without_any(3),
                without_any(4),
            ])
            .await?;
        world.quiet(4).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            0
        );
        let named = "select event_id from oncely.inbox where event_id in ('m1', 'm2') order by 1";
        assert_eq!(world.database.rows(named).await?, [["m1"], ["m2"]]);
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox where event_id like 'IN@%'")
                .await?,
            2
        );
        Ok(())
    }
);

both!(
    a_position_id_cannot_be_claimed_in_advance,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        world
            .nats
            .publish_all(vec![with_headers(&[], "insert", r#"{"n": 1}"#)])
            .await?;
        world.quiet(1).await?;
        let place = world
            .database
            .rows("select event_id from oncely.inbox")
            .await?[0][0]
            .clone();
        let (stream, _) = place.rsplit_once(':').unwrap_or_default();
        let taken = |sequence: u64| format!("{stream}:{sequence}");

        // Used in every id header, before the messages that will have these positions.
        let strangers = vec![
            with_headers(&[("Nats-Msg-Id", &taken(5))], "insert", r#"{"n": 0}"#),
            with_headers(&[("ce-id", &taken(6))], "insert", r#"{"n": 0}"#),
            with_headers(
                &[("ce-id", &taken(7)), ("ce-source", "")],
                "insert",
                r#"{"n": 0}"#,
            ),
        ];
        world.nats.publish_all(strangers).await?;
        world
            .nats
            .publish_all(
                (5..8)
                    .map(|_| with_headers(&[], "insert", r#"{"n": 1}"#))
                    .collect(),
            )
            .await?;
        world.quiet(7).await?;
        let reasons = "select reason, count(*) from oncely.dead_letter group by reason";
        assert_eq!(world.database.rows(reasons).await?, [["invalid-id", "3"]]);
        for sequence in 5..8 {
            let settled = format!(
                "select count(*) from oncely.inbox where event_id like 'IN@%:{sequence}' and state = 'done'"
            );
            assert_eq!(world.database.number(&settled).await?, 1);
        }

        // The host refuses to publish under reserved or empty ids.
        let refused = world
            .oncely(&["publish", "in.x", "{}", "--id", &taken(9)])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("reserved for messages without an id"),
            "{refused}"
        );
        assert!(
            world
                .oncely(&["publish", "in.x", "{}", "--id", ""])
                .await
                .is_err()
        );
        Ok(())
    }
);

/// A stranger's message under an id, with its own body.
fn stranger(subject: &str, id: &str) -> NewMessage {
    NewMessage {
        subject: subject.to_owned(),
        headers: vec![
            ("Nats-Msg-Id".to_owned(), id.to_owned()),
            (OUTPUT_ID_HEADER.to_owned(), id.to_owned()),
        ],
        body: b"of a stranger".to_vec(),
    }
}

fn header<'s>(stored: &'s Stored, name: &str) -> &'s str {
    stored
        .headers
        .get(name)
        .map(String::as_str)
        .unwrap_or_default()
}

/// The host's own messages on a stream, with their readable ids.
async fn host_messages(world: &World, stream: &str) -> Result<Vec<(String, Stored)>> {
    let stored = world.nats.read_stream(stream).await?;
    let own = stored
        .into_iter()
        .filter(|stored| stored.body != b"of a stranger");
    Ok(own
        .map(|stored| (header(&stored, OUTPUT_ID_HEADER).to_owned(), stored))
        .collect())
}

both!(
    outputs_are_published_even_if_their_ids_are_taken,
    |kind: Kind| async move {
        let downstream = format!(
            "[[worker]]\nname = \"downstream\"\ncomponent = \"{}\"\nstream = \"OUT\"\nsubjects = [\"out.x\"]\n\
         [worker.retry]\nattempts = 1",
            guests::component()?.display()
        );
        let world = World::start(
            kind,
            &format!("{}\n{downstream}", with_other(QUICK_RETRIES)?),
        )
        .await?;
        let published = world.database.published("worker <> 'downstream'");

        // Messages from a publisher, another worker and the worker itself, the last two through
        // `outbox.send`.
        let emit = |subject: &str, event: &str, id: &str| {
            NewMessage::new(
                subject,
                event,
                "emit",
                &format!(r#"{{"subject": "out.y", "exact_id": "{id}"}}"#),
            )
        };
        world
            .nats
            .publish_all(vec![stranger("out.x", "test:EVT-9:0")])
            .await?;
        let taken = vec![
            emit("in.other", "o1", "test:EVT-9:0"),
            emit("in.x", "t1", "test:EVT-9:0"),
            emit("in.other", "o2", "chosen"),
        ];
        world.nats.publish_all(taken).await?;
        world.until(&published, 3).await?;
        world
            .nats
            .publish_all(vec![
                NewMessage::new("in.x", "EVT-9", "emit", "{}"),
                emit("in.x", "t2", "chosen"),
            ])
            .await?;
        world.until(&published, 5).await?;
        let own = host_messages(&world, "OUT").await?;
        let mut readable: Vec<&str> = own.iter().map(|(id, _)| id.as_str()).collect();
        readable.sort_unstable();
        assert_eq!(
            readable,
            [
                "chosen",
                "chosen",
                "test:EVT-9:0",
                "test:EVT-9:0",
                "test:EVT-9:0"
            ]
        );

        // Downstream, each output has the id it was published with. The stranger's message keeps
        // its own.
        let (_, output) = own
            .iter()
            .find(|(_, stored)| stored.subject == "out.x")
            .context("find the output")?;
        let events = "select event_id from oncely.inbox where worker = 'downstream' order by stream_sequence";
        world
            .until(
                "select count(*) from oncely.inbox where worker = 'downstream'",
                2,
            )
            .await?;
        assert_eq!(
            world.database.rows(events).await?,
            [["test:EVT-9:0"], [header(output, "Nats-Msg-Id")]]
        );

        // An author's own id still identifies the same message, independent of its source.
        world
            .nats
            .publish_all(vec![emit("in.other", "o3", "chosen")])
            .await?;
        world.until(&published, 6).await?;
        assert_eq!(host_messages(&world, "OUT").await?.len(), 5);
        Ok(())
    }
);

both!(
    guessed_ids_cannot_block_the_hosts_own_messages,
    |kind: Kind| async move {
        let settings = "[worker.retry]\nattempts = 1\n[worker.alarm]\ndead_letters = 1";
        let world = World::start(kind, &manifest(settings)?).await?;
        let dying = NewMessage::new("in.x", "e1", "fail", "{}");
        let digest = {
            let message = oncely::model::message::Message {
                event_id: "e1".to_owned(),
                subject: dying.subject.clone(),
                headers: Vec::new(),
                body: dying.body.clone().into(),
                origin: None,
                redriven: None,
            };
            hex::encode(message.payload_sha256())
        };

        // Take the guessable ids
        let taken = vec![
            stranger("oncely.dlq.test", &format!("dlq:{}:test:e1", &digest[..16])),
            stranger(
                "oncely.dlq.test",
                &format!("dlq:{}:test:e1:r1", &digest[..16]),
            ),
            stranger("oncely.redrive.test", "test:e1:r1"),
            stranger("oncely.alarm.test", "alarm:test:dead-letters:1:raised"),
        ];
        world.nats.publish_all(taken).await?;

        // The host's own messages are published under other ids.
        world.nats.publish_all(vec![dying]).await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where state = 'open'",
                1,
            )
            .await?;
        assert_eq!(
            world.oncely(&["dlq", "redrive", "1"]).await?.trim(),
            "redriven: 1; succeeded: 0; failed again: 1"
        );
        world
            .eventually("the notices and the alarm are published", || async {
                let notices = host_messages(&world, "ONCELY_DLQ").await?;
                let alarms = host_messages(&world, "ONCELY_ALARM").await?;
                let ids = |messages: Vec<(String, Stored)>| -> Vec<String> {
                    messages.into_iter().map(|(id, _)| id).collect()
                };
                let (notices, alarms) = (ids(notices), ids(alarms));
                let is_raised = alarms
                    .iter()
                    .any(|id| id == "alarm:test:dead-letters:1:raised");
                ensure!(notices.len() == 2 && is_raised, "{notices:?} {alarms:?}");
                Ok(Some(()))
            })
            .await
    }
);

/// The output ids of this installation, for a stranger with more information than a real one.
async fn installation_output_ids(world: &World, kind: Kind) -> Result<OutputIds> {
    let sql = match kind {
        Kind::Sqlite => "select lower(hex(key)) from oncely_output_key",
        _ => "select encode(key, 'hex') from oncely.output_key",
    };
    let rows = world.database.rows(sql).await?;
    let key = rows
        .first()
        .and_then(|row| row.first())
        .context("find the id key")?;
    Ok(OutputIds::new(&hex::decode(key)?))
}

/// The published id of the first output of an event.
fn first_output_id(ids: &OutputIds, event_id: &str) -> String {
    let output = Output {
        kind: OutputKind::Derived,
        id: output_id("test", event_id, 0),
        event_id: event_id.to_owned(),
        ordinal: 0,
        subject: String::new(),
        headers: Vec::new(),
        body: Bytes::new(),
        ordering_key: None,
        delay: Duration::ZERO,
    };
    ids.id_of("test", &output)
}

/// Publishes under the ids of future outputs, has the events handled, and checks that each output
/// is on the stream.
async fn check_outputs_with_taken_ids(world: &World, kind: Kind) -> Result<()> {
    let ids = installation_output_ids(world, kind).await?;
    let with_body = |subject: &str, id: &str, body: &str| NewMessage {
        headers: vec![("Nats-Msg-Id".to_owned(), id.to_owned())],
        body: body.as_bytes().to_vec(),
        ..stranger(subject, id)
    };
    let second = ids.next_id(&first_output_id(&ids, "twice"));
    let taken = vec![
        with_body("out.x", &first_output_id(&ids, "body"), "of a stranger"),
        with_body("out.other", &first_output_id(&ids, "subject"), "0"),
        with_body("out.x", &first_output_id(&ids, "twice"), "of a stranger"),
        with_body("out.x", &second, "of a stranger"),
        // Identical to the future output: it cannot be distinguished, and no output is lost.
        with_body("out.x", &first_output_id(&ids, "same"), "0"),
    ];
    let strangers = taken.len();
    world.nats.publish_all(taken).await?;

    // The host publishes under the next free ids.
    let events = ["body", "subject", "twice", "same", "free"];
    let emit = |event: &&str| NewMessage::new("in.x", event, "emit", r#"{"ordering_key": "k"}"#);
    world
        .nats
        .publish_all(events.iter().map(emit).collect())
        .await?;
    until_stored(world, "OUT", strangers + 4).await?;
    world
        .until(world.database.unpublished_except_alarms(), 0)
        .await?;
    let stored = world.nats.read_stream("OUT").await?;
    let mut own = Vec::new();
    for stored in &stored[strangers..] {
        assert_eq!(
            (stored.subject.as_str(), stored.body.as_slice()),
            ("out.x", &b"0"[..])
        );
        own.push((
            header(stored, OUTPUT_ID_HEADER),
            header(stored, "Nats-Msg-Id"),
        ));
    }

    // In the order of their key, each once.
    let after = |event: &str| ids.next_id(&first_output_id(&ids, event));
    assert_eq!(
        own,
        [
            ("test:body:0", after("body").as_str()),
            ("test:subject:0", after("subject").as_str()),
            ("test:twice:0", ids.next_id(&second).as_str()),
            ("test:free:0", first_output_id(&ids, "free").as_str()),
        ]
    );
    let changed = world
        .database
        .rows("select ids_taken from oncely.outbox where subject = 'out.x' order by seq")
        .await?;
    assert_eq!(changed.concat(), ["1", "1", "2", "0", "0"]);
    Ok(())
}

both!(
    a_duplicate_ack_counts_only_if_the_stream_has_that_output,
    |kind: Kind| async move {
        let world = World::start(
            kind,
            &manifest("concurrency = 1\n[worker.alarm]\nclear_after = \"0s\"")?,
        )
        .await?;
        check_outputs_with_taken_ids(&world, kind).await?;
        world
            .eventually("the alarm is raised", || async {
                let alarms = host_messages(&world, "ONCELY_ALARM").await?;
                let is_raised = alarms
                    .iter()
                    .any(|(id, _)| id == "alarm:test:id-taken:1:raised");
                Ok(is_raised.then_some(()))
            })
            .await?;
        let log = world.host_log();
        assert!(
            log.contains("id taken, publishing under another one"),
            "{log}"
        );
        Ok(())
    }
);

both!(
    a_polled_output_with_a_taken_id_blocks_its_key,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("concurrency = 1")?).await?;

        // Such a short duplicate window that each polled output is verified.
        world
            .nats
            .make_stream("OUT", "out.>", Duration::from_millis(100))
            .await?;
        world.start_host().await?;
        let ids = installation_output_ids(&world, kind).await?;
        let taken = NewMessage {
            headers: vec![("Nats-Msg-Id".to_owned(), first_output_id(&ids, "late"))],
            body: b"of a stranger".to_vec(),
            ..stranger("out.x", "late")
        };
        world.nats.publish_all(vec![taken]).await?;
        let late = r#"{"n": 4, "ordering_key": "k", "delay_ms": 1200}"#;
        world
            .nats
            .publish_all(vec![NewMessage::new("in.x", "late", "emit", late)])
            .await?;
        until_stored(&world, "OUT", 5).await?;
        let bodies: Vec<String> = world.nats.read_stream("OUT").await?[1..]
            .iter()
            .map(|stored| String::from_utf8_lossy(&stored.body).into_owned())
            .collect();
        assert_eq!(bodies, ["0", "1", "2", "3"]);
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicate_acks_are_verified_in_wal_mode() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest("concurrency = 1")?).await?;
    world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
    world.start_host().await?;
    world
        .until("select count(*) from oncely.relay where mode = 'wal'", 1)
        .await?;
    check_outputs_with_taken_ids(&world, Kind::Postgres).await?;

    // Outputs with taken ids, and later outputs of their key, have left WAL mode by now.
    world
        .nats
        .publish_all(vec![NewMessage::new(
            "in.x",
            "later",
            "emit",
            r#"{"ordering_key": "other"}"#,
        )])
        .await?;
    world
        .until(
            "select count(*) from oncely.outbox where via = 'wal' and event_id = 'later'",
            1,
        )
        .await
}
