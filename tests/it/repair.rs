//! A stream that lost acknowledged outputs gets them again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream;
use support::counting::{check_order, counting_messages};
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{PATIENCE, World, manifest};

/// The ids on the output stream, in order.
async fn ids(world: &World) -> Result<Vec<String>> {
    let stored = world.nats.read_stream("OUT").await?;
    stored
        .iter()
        .map(|message| {
            Ok(message
                .headers
                .get("Nats-Msg-Id")
                .context("read the id")?
                .clone())
        })
        .collect()
}

/// Waits until the output stream holds `count` messages and no output is unpublished.
async fn until_stored(world: &World, count: usize) -> Result<Vec<String>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let ids = ids(world).await?;
        if ids.len() == count {
            world
                .until(
                    "select count(*) from oncely.outbox where published_at is null",
                    0,
                )
                .await?;
            assert_eq!(
                ids.iter().collect::<BTreeSet<_>>().len(),
                count,
                "an output is on the stream twice"
            );
            return Ok(ids);
        }
        assert!(
            Instant::now() < end,
            "{} outputs, expected {count}:\n{}",
            ids.len(),
            world.host_log()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

both!(
    lost_outputs_are_published_again_in_order,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("concurrency = 1")?).await?;
        world.nats.publish_all(counting_messages(0, 100)).await?;
        world.quiet(100).await?;
        world.nats.kill()?;
        world.nats.copy_stream("OUT")?;
        world.nats.restart().await?;
        world.nats.publish_all(counting_messages(100, 250)).await?;
        world.quiet(250).await?;
        let before = ids(&world).await?;
        assert_eq!(before.len(), 250);

        // Restore an older store, as after a backup or a power cut.
        world.nats.kill()?;
        world.nats.roll_back_stream("OUT")?;
        world.nats.restart().await?;
        let after = until_stored(&world, 250).await?;
        assert_eq!(
            after.iter().collect::<BTreeSet<_>>(),
            before.iter().collect()
        );
        check_order(&world, 250).await?;
        assert!(
            world
                .host_log()
                .contains("republishing outputs stream=\"OUT\" last_sequence=100"),
            "{}",
            world.host_log()
        );

        // The relay continues.
        world.nats.publish_all(counting_messages(250, 260)).await?;
        world.quiet(260).await?;
        until_stored(&world, 260).await?;
        Ok(())
    }
);

both!(
    a_loss_is_found_after_a_filled_gap_and_a_restart,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("concurrency = 1")?).await?;
        world
            .nats
            .publish_all(vec![NewMessage::new("in.x", "bad", "reject", "{}")])
            .await?;
        world.nats.publish_all(counting_messages(0, 10)).await?;
        world.quiet(11).await?;

        // Redrive pointers are on a work queue, which cannot be read back.
        world
            .oncely(&["dlq", "redrive", "1", "--note", "once more"])
            .await?;
        world
            .until(
                "select count(*) from oncely.attempt where event_id = 'bad'",
                2,
            )
            .await?;
        world.quiet(11).await?;
        world.nats.kill()?;
        world.nats.copy_stream("OUT")?;
        world.nats.restart().await?;
        world.nats.publish_all(counting_messages(10, 20)).await?;
        world.quiet(21).await?;
        let before: BTreeSet<String> = ids(&world).await?.into_iter().collect();
        world.stop_host().await?;
        world.nats.kill()?;
        world.nats.roll_back_stream("OUT")?;
        world.nats.restart().await?;
        let others = (0..15)
            .map(|n| NewMessage::new("out.others", &format!("o{n}"), "", "{}"))
            .collect();
        world.nats.publish_all(others).await?;
        world.start_host().await?;
        let after: BTreeSet<String> = until_stored(&world, 35).await?.into_iter().collect();
        assert!(after.is_superset(&before));
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recreated_stream_gets_its_outputs_again() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("concurrency = 1")?).await?;
    world.nats.publish_all(counting_messages(0, 10)).await?;
    world.quiet(10).await?;
    let before = ids(&world).await?;
    let context = jetstream::new(world.nats.client().await?);
    let config = context
        .get_stream("OUT")
        .await?
        .cached_info()
        .config
        .clone();
    context.delete_stream("OUT").await?;
    context.create_stream(config).await?;
    // The next publication reveals the loss: the stream's sequences start at one again.
    world.nats.publish_all(counting_messages(10, 11)).await?;
    let after = until_stored(&world, 11).await?;
    assert!(before.iter().all(|id| after.contains(id)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_is_no_loss() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("concurrency = 1")?).await?;
    world.nats.publish_all(counting_messages(0, 10)).await?;
    world.quiet(10).await?;
    let context = jetstream::new(world.nats.client().await?);
    context.get_stream("OUT").await?.purge().await?;
    // The check at the start.
    world.stop_host().await?;
    world.start_host().await?;
    world.nats.publish_all(counting_messages(10, 12)).await?;
    world.quiet(12).await?;
    assert_eq!(until_stored(&world, 2).await?.len(), 2);
    assert!(
        !world.host_log().contains("stream lost"),
        "{}",
        world.host_log()
    );
    Ok(())
}
