//! Publishing: order of keys despite failures, parked outputs, and delays.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use bytes::Bytes;
use oncely::model::message::OutputKind;
use oncely::store::{Output, PostgresStore, Store};
use support::counting::{check_order, counting_messages, published_values};
use support::database::Kind;
use support::eventually::{eventually, until_at_least};
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

use crate::relay_modes::{
    RelayMode, order_across_hosts, order_when_the_broker_dies, order_when_the_host_is_killed,
    publish_parked_output, world_with_parked_output,
};

both!(
    outputs_of_a_key_keep_their_order_when_the_broker_dies,
    |kind: Kind| async move {
        let settings = format!("batch = 8\nconcurrency = 4\nack_wait = \"2s\"\n{QUICK_RETRIES}");
        order_when_the_broker_dies(RelayMode::Poll(kind), &settings, Duration::ZERO).await
    }
);

both!(
    outputs_of_a_key_keep_their_order_when_their_host_is_killed,
    |kind: Kind| async move {
        let settings = format!("batch = 8\nconcurrency = 4\nack_wait = \"1s\"\n{QUICK_RETRIES}");
        order_when_the_host_is_killed(RelayMode::Poll(kind), &settings).await
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_of_a_key_keep_their_order_across_hosts() -> Result<()> {
    let settings = format!("batch = 4\nconcurrency = 2\nack_wait = \"2s\"\n{QUICK_RETRIES}");
    order_across_hosts(RelayMode::Poll(Kind::Postgres), &settings).await
}

/// The number of the only parked output.
async fn parked_number(world: &World) -> Result<String> {
    let list = world.oncely_json(&["outbox", "list", "--json"]).await?;
    let number = list[0]["number"].as_i64().context("find a parked output")?;
    Ok(number.to_string())
}

both!(
    an_oversized_output_is_parked_and_published_on_retry,
    |kind: Kind| async move {
        let world = world_with_parked_output(RelayMode::Poll(kind)).await?;
        let number = parked_number(&world).await?;
        let list = world.oncely(&["outbox", "list"]).await?;
        assert!(
            list.lines().count() == 2
                && list.contains("parked")
                && list.contains("exceeds maximum"),
            "{list}"
        );
        assert_eq!(
            world
                .oncely(&["outbox", "list", "--unpublished"])
                .await?
                .lines()
                .count(),
            5
        );
        let shown = world.oncely(&["outbox", "show", &number]).await?;
        for expected in [
            "state: parked",
            "blocks: 3",
            "ordering key: held",
            "last error: ",
            "body (6",
        ] {
            assert!(shown.contains(expected), "`{expected}` is not in:\n{shown}");
        }
        let status = world.oncely_json(&["status", "--json"]).await?;
        assert_eq!(status.pointer("/totals/0/parked"), Some(&1.into()));
        assert_eq!(status.pointer("/totals/0/unpublished"), Some(&4.into()));

        // The output is still too large.
        world.oncely(&["outbox", "retry", &number]).await?;
        world
            .until(
                "select count(*) from oncely.outbox where failures = 2 and parked_at is not null",
                1,
            )
            .await?;
        publish_parked_output(&world).await?;
        let missing = world
            .oncely(&["outbox", "show", "9999"])
            .await
            .map_err(|error| error.to_string());
        assert!(missing.is_err_and(|error| error.contains("hint: oncely outbox list")));
        Ok(())
    }
);

both!(
    outbox_drop_confirms_frees_the_key_and_is_recorded,
    |kind: Kind| async move {
        let world = world_with_parked_output(RelayMode::Poll(kind)).await?;
        let number = parked_number(&world).await?;
        let refused = world
            .oncely(&["outbox", "drop", "--all"])
            .await
            .map_err(|error| error.to_string());
        assert_eq!(
            refused.map(drop),
            Err(
                "error: refusing to drop 1 output without confirmation\nhint: confirm with --yes"
                    .to_owned()
            )
        );
        world
            .oncely(&["outbox", "drop", &number, "--yes", "--note", "sent by hand"])
            .await?;
        world.quiet(8).await?;
        assert_eq!(published_values(&world).await?["held"], [1, 3, 4, 5]);
        let dropped = world.oncely(&["outbox", "list", "--dropped"]).await?;
        assert!(dropped.contains("sent by hand"), "{dropped}");
        let again = world
            .oncely(&["outbox", "drop", &number, "--yes"])
            .await
            .map_err(|error| error.to_string());
        assert_eq!(
            again.map(drop),
            Err("error: 1 output is not parked".to_owned())
        );
        assert_eq!(
            world.oncely_json(&["outbox", "list", "--json"]).await?,
            serde_json::json!([])
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_of_a_missing_stream_are_retried_and_then_parked() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("concurrency = 1")?).await?;
    world.nats.publish_all(counting_messages(0, 1)).await?;
    world.quiet(1).await?;
    let context = jetstream::new(world.nats.client().await?);
    let config = context
        .get_stream("OUT")
        .await?
        .cached_info()
        .config
        .clone();
    context.delete_stream("OUT").await?;
    world.nats.publish_all(counting_messages(1, 12)).await?;

    // The stream may return: no output is parked yet. Outputs of the deleted stream may be among
    // them by now.
    world
        .until_at_least(
            "select count(*) from oncely.outbox where failures > 1 and parked_at is null",
            5,
        )
        .await?;

    // One parked output per key; the others are blocked by it. Outputs of the deleted stream are
    // republished, too.
    world
        .until(
            "select count(*) from oncely.outbox where parked_at is not null",
            6,
        )
        .await?;
    let shown = world.oncely(&["outbox", "list"]).await?;
    assert!(
        shown.contains("no stream accepts the subject out.state"),
        "{shown}"
    );
    context.create_stream(config).await?;
    world.oncely(&["outbox", "retry", "--all"]).await?;
    world.quiet(12).await?;

    // Outputs of the first stream are republished after those that waited for the second one.
    until_at_least("outputs on the stream", 12, || async {
        let published = published_values(&world).await?;
        Ok(published.values().map(Vec::len).sum::<usize>())
    })
    .await
    .map(drop)
}

both!(
    a_breaker_opens_for_a_silent_stream_and_closes_by_itself,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("batch = 8\nconcurrency = 4")?).await?;
        world.nats.publish_all(counting_messages(0, 12)).await?;
        world.quiet(12).await?;

        // A full stream refuses every message but is available.
        let context = jetstream::new(world.nats.client().await?);
        let mut config = context
            .get_stream("OUT")
            .await?
            .cached_info()
            .config
            .clone();
        let max_messages = config.max_messages;
        config.max_messages = 12;
        context.update_stream(&config).await?;
        world.nats.publish_all(counting_messages(12, 60)).await?;
        let open = until_status(&world, "open").await?;
        assert!(open.contains("maximum messages exceeded"), "{open}");
        let shown = world.oncely(&["status"]).await?;
        assert!(shown.contains("publishing: not to OUT: "), "{shown}");
        config.max_messages = max_messages;
        context.update_stream(&config).await?;
        world.quiet(60).await?;
        until_status(&world, "closed").await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.outbox where parked_at is not null")
                .await?,
            0
        );
        check_order(&world, 60).await
    }
);

both!(
    a_full_subject_does_not_block_others_of_its_stream,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("concurrency = 1")?).await?;
        world
            .nats
            .make_one_per_subject_stream("OUT", "out.>")
            .await?;
        world.start_host().await?;
        let emit = |event: &str, subject: &str, count: u32| {
            NewMessage::new(
                "in.x",
                event,
                "emit",
                &format!(r#"{{"subject": "{subject}", "n": {count}}}"#),
            )
        };

        // One output fits. The others are refused, far more often than opens a breaker.
        world
            .nats
            .publish_all(vec![emit("fill", "out.full", 60)])
            .await?;
        world
            .until("select count(*) from oncely.outbox where failures > 0", 59)
            .await?;

        // Outputs to other subjects are published meanwhile.
        let began = Instant::now();
        for n in 0..8 {
            world
                .nats
                .publish_all(vec![emit(&format!("free{n}"), &format!("out.free{n}"), 1)])
                .await?;
            let free = world.database.published("subject like 'out.free%'");
            world.until(&free, n + 1).await?;
        }
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "other subjects were blocked: {:?} for eight outputs",
            began.elapsed()
        );
        let shown = world.oncely(&["status"]).await?;
        assert!(
            shown.contains("not to out.full: ") && !shown.contains("not to OUT"),
            "{shown}"
        );

        // Its consumers free space for one more message, and one more is published.
        world.nats.purge_subject("OUT", "out.full").await?;
        world.until(&world.database.published("true"), 10).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.outbox where parked_at is not null")
                .await?,
            0
        );
        Ok(())
    }
);

/// Waits until the breaker of OUT has a state, and returns its error.
async fn until_status(world: &World, state: &str) -> Result<String> {
    eventually(format!("the breaker is {state}"), || async {
        let status = world.oncely_json(&["status", "--json"]).await?;
        let breakers = status["breakers"].as_array().cloned().unwrap_or_default();
        let mut breakers = breakers.iter();
        let out = breakers.find(|breaker| breaker["stream"] == "OUT");
        let out = out.filter(|out| out["state"] == state);
        Ok(out.map(|out| out["error"].as_str().unwrap_or_default().to_owned()))
    })
    .await
}

both!(
    a_delay_is_honoured_within_a_second_despite_kills,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("batch = 8")?).await?;
        let delayed = |n: u64| {
            let options = format!(r#"{{"n": 2, "delay_ms": {}}}"#, 4_000 + n * 150);
            NewMessage::new("in.x", &format!("e{n}"), "emit", &options)
        };
        world
            .nats
            .publish_all((0..20).map(delayed).collect())
            .await?;
        world.until("select count(*) from oncely.inbox", 20).await?;
        world.kill_host()?;
        assert_eq!(
            world
                .database
                .number(&world.database.published("true"))
                .await?,
            0
        );
        world.start_host().await?;
        world.quiet(20).await?;
        let (early, late) = match kind {
            Kind::Sqlite => ("min(published_at - due_at)", "max(published_at - due_at)"),
            _ => (
                "(extract(epoch from min(published_at - due_at)) * 1000000)::bigint",
                "(extract(epoch from max(published_at - due_at)) * 1000000)::bigint",
            ),
        };
        let early = world
            .database
            .number(&format!("select {early} from oncely.outbox"))
            .await?;
        let late = world
            .database
            .number(&format!("select {late} from oncely.outbox"))
            .await?;
        assert!(
            early >= 0 && late < 1_000_000,
            "published from {early} to {late} microseconds after they were due"
        );
        assert_eq!(world.nats.read_stream("OUT").await?.len(), 40);
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_output_groups_is_published_by_the_next_host() -> Result<()> {
    const GROUPS: u32 = 8;
    const SIZE: u32 = 500;
    let mut world = World::start(Kind::Postgres, &manifest("")?).await?;
    world.stop_host().await?;
    let store = PostgresStore::connect(&world.database.url(), 2).await?;
    let store: Store = store.into();
    for group in 0..GROUPS {
        let output = |ordinal| Output {
            kind: OutputKind::Derived,
            id: format!("test:e{group}:{ordinal}"),
            event_id: format!("e{group}"),
            ordinal,
            subject: "out.x".to_owned(),
            headers: Vec::new(),
            body: Bytes::from_static(b"{}"),
            ordering_key: None,
            delay: Duration::ZERO,
        };
        let outputs: Vec<Output> = (0..SIZE).map(output).collect();
        let mut tx = store.begin("test", Duration::from_secs(20)).await?;
        let appended = tx.append_outputs(&outputs, Duration::ZERO).await?;
        assert!(appended.iter().all(|row| row.group.is_some()));
        tx.commit().await?;
    }
    world.start_host().await?;
    world.until(world.database.unpublished(), 0).await?;
    let published = world.nats.read_stream("OUT").await?.len();
    assert_eq!(published, (GROUPS * SIZE) as usize);
    Ok(())
}
