//! Random kills of the host, and redeliveries of messages in progress.

use std::time::Duration;

use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

/// `count` events, every tenth of them twice; some fail once, some never succeed.
fn workload(count: usize) -> Vec<NewMessage> {
    let mut messages = Vec::new();
    for n in 0..count {
        let behaviour = match n % 50 {
            7 => "fail_once,insert",
            23 => "insert,trap",
            41 => "reject",
            _ => "insert",
        };
        messages.push(NewMessage::new(
            "in.x",
            &format!("e{n}"),
            behaviour,
            r#"{"n": 1}"#,
        ));
        if n % 10 == 0 {
            messages.push(NewMessage::new(
                "in.x",
                &format!("e{n}"),
                behaviour,
                r#"{"n": 1}"#,
            ));
        }
    }
    messages
}

both!(
    every_event_takes_effect_once_under_random_kills,
    |kind: Kind| async move {
        let count = 1_000;
        let mut world = World::start(
            kind,
            &manifest(&format!("ack_wait = \"2s\"\nbatch = 16\n{QUICK_RETRIES}"))?,
        )
        .await?;
        world.nats.publish_all(workload(count)).await?;
        for round in 1..=6_u64 {
            // A random point between the claim and the publication.
            tokio::time::sleep(Duration::from_millis(
                40 * round + u64::from(std::process::id()) % 30,
            ))
            .await;
            world.kill_host()?;
            world.start_host().await?;
        }
        world.quiet(count as i64).await?;
        let books = books::check(&world).await?;
        let dead = count / 50 * 2;
        assert_eq!(
            (books.effects.len(), books.dead.len(), books.outputs),
            (count - dead, dead, count - dead)
        );
        Ok(())
    }
);

both!(
    a_redelivery_storm_changes_nothing,
    |kind: Kind| async move {
        // The work takes longer than `ack_wait`, and the paused host cannot extend it.
        let settings = format!("ack_wait = \"1s\"\nbatch = 4\nconcurrency = 2\n{QUICK_RETRIES}");
        let world = World::start(kind, &manifest(&settings)?).await?;
        let messages = (0..24)
            .map(|n| {
                NewMessage::new(
                    "in.x",
                    &format!("e{n}"),
                    "insert,slow",
                    r#"{"n": 1, "ms": 400}"#,
                )
            })
            .collect();
        world.nats.publish_all(messages).await?;
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            let pid = world.host_pid().unwrap_or_default();
            support::world::signal(pid, "STOP")?;
            tokio::time::sleep(Duration::from_millis(2_500)).await;
            support::world::signal(pid, "CONT")?;
        }
        world.quiet(24).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs, books.dead.len()),
            (24, 24, 0)
        );
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
    a_stopping_host_finishes_messages_in_flight,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("batch = 4\nconcurrency = 2")?).await?;
        let messages = (0..200)
            .map(|n| {
                NewMessage::new(
                    "in.x",
                    &format!("e{n}"),
                    "insert,slow",
                    r#"{"n": 1, "ms": 5}"#,
                )
            })
            .collect();
        world.nats.publish_all(messages).await?;
        world
            .until_at_least("select count(*) from oncely.inbox", 1)
            .await?;
        world.stop_host().await?;

        // No half work: every settled message is published.
        assert_eq!(
            world.database.number(world.database.unpublished()).await?,
            0
        );
        books::check(&world).await?;
        world.start_host().await?;
        world.quiet(200).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 200);
        Ok(())
    }
);

both!(
    a_message_that_repeatedly_crashes_hosts_is_dead_lettered,
    |kind: Kind| async move {
        let settings =
            "ack_wait = \"1s\"\nbatch = 8\nconcurrency = 1\n[worker.limits]\ntime = \"20s\"";
        let mut world = World::without_host(kind, &manifest(settings)?).await?;
        world.start_host().await?;
        let killer = NewMessage::new("in.x", "killer", "slow", r#"{"ms": 15000}"#);
        let neighbours =
            (0..5).map(|n| NewMessage::new("in.x", &format!("e{n}"), "insert", r#"{"n": 1}"#));

        // Every host that handles the killer is killed while its handler runs.
        world
            .nats
            .publish_all(std::iter::once(killer).chain(neighbours).collect())
            .await?;
        let dead_letters = "select count(*) from oncely.dead_letter where reason = 'crashed-host' and event_id = 'killer'";
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            if world.database.number(dead_letters).await? == 1 {
                break;
            }
            world.kill_host()?;
            world.start_host().await?;
        }
        world.quiet(6).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.dead),
            (5, ["killer".to_owned()].into())
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.crash_marker")
                .await?,
            0
        );
        Ok(())
    }
);
