//! Successful messages and duplicates.

use std::collections::BTreeSet;

use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

fn insert(event: &str) -> NewMessage {
    NewMessage::new("in.x", event, "insert", r#"{"n": 2}"#)
}

both!(
    every_event_has_one_effect_and_one_output,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("batch = 16")?).await?;
        let mut messages: Vec<NewMessage> = (0..200).map(|n| insert(&format!("e{n}"))).collect();

        // Duplicates in the same batch as the original, and later.
        for n in 0..20 {
            messages.insert(n * 10, insert(&format!("e{}", n * 9)));
            messages.push(insert(&format!("e{n}")));
        }
        world.nats.publish_all(messages).await?;
        world.quiet(200).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            books.effects,
            (0..200).map(|n| format!("e{n}")).collect::<BTreeSet<_>>()
        );
        assert_eq!(books.outputs, 400);
        assert!(books.dead.is_empty());

        // A duplicate after everything is settled.
        world
            .nats
            .publish_all(vec![insert("e7"), insert("last")])
            .await?;
        world.quiet(201).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 201);
        Ok(())
    }
);

both!(
    a_failing_item_costs_other_items_no_attempt,
    |kind: Kind| async move {
        let mut world = World::without_host(
            kind,
            &manifest(&format!("concurrency = 1\nbatch = 32\n{QUICK_RETRIES}"))?,
        )
        .await?;
        world.start_host().await?;
        world.stop_host().await?;

        // All messages are on the stream before the host starts, so they form full batches.
        let mut messages: Vec<NewMessage> = (0..31).map(|n| insert(&format!("good{n}"))).collect();
        messages.insert(
            3,
            NewMessage::new("in.x", "bad-without-sql", "reject", "{}"),
        );
        messages.insert(
            20,
            NewMessage::new("in.x", "bad-after-sql", "insert,trap", "{}"),
        );
        world.nats.publish_all(messages).await?;
        world.start_host().await?;
        world.quiet(33).await?;
        let books = books::check(&world).await?;
        assert_eq!(books.effects.len(), 31);
        assert_eq!(
            books.dead,
            ["bad-after-sql", "bad-without-sql"]
                .map(str::to_owned)
                .into()
        );
        let attempts = world
            .database
            .rows("select event_id, count(*) from oncely.attempt group by event_id order by 1")
            .await?;
        assert_eq!(attempts, [["bad-after-sql", "3"], ["bad-without-sql", "1"]]);
        Ok(())
    }
);

both!(
    a_failure_is_retried_and_its_attempts_are_counted,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        world
            .nats
            .publish_all(vec![NewMessage::new(
                "in.x",
                "flaky",
                "fail_until,insert",
                r#"{"attempt": 3, "n": 1}"#,
            )])
            .await?;
        world.quiet(1).await?;
        let books = books::check(&world).await?;
        assert_eq!(books.effects.len(), 1);
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt")
                .await?,
            2
        );
        Ok(())
    }
);

both!(
    a_reused_event_id_is_dead_lettered_and_not_skipped,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        world.nats.publish_all(vec![insert("same")]).await?;
        world.quiet(1).await?;
        world
            .nats
            .publish_all(vec![NewMessage::new(
                "in.x",
                "same",
                "insert",
                r#"{"n": 1, "delta": 5}"#,
            )])
            .await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where reason = 'id-reuse'",
                1,
            )
            .await?;
        world.until(world.database.unpublished(), 0).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.outputs), (1, 2));
        Ok(())
    }
);

both!(
    messages_without_a_usable_id_are_not_lost,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let without = |headers: &[(&str, &str)]| NewMessage {
            subject: "in.x".to_owned(),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            body: br#"{"n": 0}"#.to_vec(),
        };
        let long = "x".repeat(300);
        let longest = "é".repeat(127);
        let messages = vec![
            without(&[("do", "insert")]),
            without(&[("do", "insert")]),
            without(&[("do", "insert"), ("ce-id", &long)]),
            without(&[("do", "insert"), ("ce-id", &longest)]),
        ];
        world.nats.publish_all(messages).await?;
        world.quiet(4).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.dead.len()), (3, 1));
        let reasons = world
            .database
            .rows("select reason, detail from oncely.dead_letter")
            .await?;
        assert_eq!(
            reasons,
            [[
                "invalid-id",
                "the event id has 300 bytes; at most 255 are allowed"
            ]]
        );
        Ok(())
    }
);

both!(
    keyed_state_counts_every_event_once,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("concurrency = 4\nbatch = 8")?).await?;

        // Without an ordering key the lanes conflict, but no increment may be lost.
        let messages = (0..100)
            .map(|n| NewMessage::new("in.x", &format!("s{n}"), "state_counter", "{}"))
            .collect();
        world.nats.publish_all(messages).await?;
        world.quiet(100).await?;
        let rows = world
            .database
            .rows("select version from oncely.state")
            .await?;
        assert_eq!(rows, [["100"]]);
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    no_guest_memory_survives_from_message_to_message,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("concurrency = 1")?).await?;
        let messages = (0..50)
            .map(|n| NewMessage::new("in.x", &format!("g{n}"), "global_counter", "{}"))
            .collect();
        world.nats.publish_all(messages).await?;
        world.quiet(50).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox where state = 'done'")
                .await?,
            50
        );
        Ok(())
    }
);

both!(
    a_delayed_output_is_published_on_time_after_a_restart,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("")?).await?;
        let started = std::time::Instant::now();
        world
            .nats
            .publish_all(vec![NewMessage::new(
                "in.x",
                "later",
                "emit",
                r#"{"n": 1, "delay_ms": 2500}"#,
            )])
            .await?;
        world.until("select count(*) from oncely.inbox", 1).await?;
        world.kill_host()?;
        world.start_host().await?;
        world.until(&world.database.published("true"), 1).await?;
        assert!(
            started.elapsed() >= std::time::Duration::from_millis(2400),
            "too early: {:?}",
            started.elapsed()
        );
        assert_eq!(world.nats.read_stream("OUT").await?.len(), 1);
        Ok(())
    }
);

both!(
    a_possibly_published_output_is_looked_up_on_the_stream,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("")?).await?;
        world
            .nats
            .make_stream("OUT", "out.>", std::time::Duration::from_millis(100))
            .await?;
        world.start_host().await?;
        world
            .nats
            .publish_all((0..20).map(|n| insert(&format!("e{n}"))).collect())
            .await?;
        world.quiet(20).await?;
        world.kill_host()?;

        // State of a host that published and died before recording it, long ago. Every second
        // output was never sent.
        let long_ago = match kind {
            Kind::Sqlite => "first_attempt_at - 600000000",
            _ => "first_attempt_at - interval '10 minutes'",
        };
        let due = match kind {
            Kind::Sqlite => "leased_until = 0",
            _ => "leased_until = 'epoch', via = 'poll'",
        };
        world
            .database
            .execute(&format!(
            "update oncely.outbox set published_at = null, stream = null, stream_sequence = null,
             {due}, first_attempt_at = {long_ago};
             update oncely.outbox set id = id || ':lost' where seq % 2 = 0"
        ))
            .await?;
        world.start_host().await?;
        world.quiet(20).await?;
        let stored = world.nats.read_stream("OUT").await?;
        let ids: BTreeSet<_> = stored
            .iter()
            .filter_map(|message| message.headers.get("Nats-Msg-Id"))
            .collect();
        assert_eq!(
            (stored.len(), ids.len()),
            (60, 60),
            "40 outputs, of which 20 got new ids and were never sent"
        );
        Ok(())
    }
);
