//! A stream that lost acknowledged outputs gets them again.

use std::collections::BTreeSet;

use anyhow::Result;
use async_nats::jetstream;
use support::counting::counting_messages;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

use crate::relay_modes::{RelayMode, lost_outputs_are_published_again, output_ids, until_stored};

both!(
    lost_outputs_are_published_again_in_order,
    |kind: Kind| async move {
        let mode = RelayMode::Poll(kind);
        let world = lost_outputs_are_published_again(mode, "concurrency = 1").await?;
        assert!(
            world
                .host_log()
                .contains("republishing outputs stream=\"OUT\" last_sequence=100"),
            "{}",
            world.host_log()
        );
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
        let before: BTreeSet<String> = output_ids(&world).await?.into_iter().collect();
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
    let before = output_ids(&world).await?;
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
