//! Watermarks are readable once written, and recovered positions are kept.

use oncely::store::{AckFloor, BrokerState, RecoveredOutput, StreamEnd};

use super::{WORKER, World, new_claim};

on_every_database!(
    an_installation_keeps_its_id,
    a_watermark_is_known_once_it_is_written,
    old_watermarks_are_deleted,
    recovered_outputs_are_found_at_their_first_position,
    events_are_known_once_they_are_settled,
);

fn seen(sequence: u64) -> BrokerState {
    let mut seen = BrokerState::default();
    let stored_at = Some(jiff::Timestamp::from_nanosecond(1_795_915_819_192_864_123).unwrap());
    let end = StreamEnd {
        created: jiff::Timestamp::UNIX_EPOCH,
        last_sequence: sequence,
        stored_at,
    };
    seen.streams.insert("IN".to_owned(), end);
    let subjects = vec!["in.>".to_owned()];
    seen.consumers.insert(
        "worker".to_owned(),
        AckFloor {
            stream: "IN".to_owned(),
            sequence,
            subjects,
            skipped_up_to: 1,
        },
    );
    seen
}

async fn an_installation_keeps_its_id(world: World) {
    let id = world.store.installation().to_owned();
    assert!(
        id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{id}"
    );
    let world = world.without_filter().await;
    assert_eq!(world.store.installation(), id);
}

async fn a_watermark_is_known_once_it_is_written(world: World) {
    let watermarks = world.store.watermarks(Some("a")).await.unwrap();
    assert_eq!(
        (
            watermarks.last,
            watermarks.acknowledged,
            watermarks.requested_written_at,
            watermarks.has_recovered
        ),
        (None, None, None, false)
    );
    world.store.write_watermark("a", &seen(1)).await.unwrap();
    world.store.acknowledge_watermark("a", 7).await.unwrap();
    world.store.write_watermark("b", &seen(2)).await.unwrap();
    let watermarks = world.store.watermarks(Some("a")).await.unwrap();
    let last = watermarks.last.unwrap();
    assert_eq!((last.name.as_str(), last.seen), ("b", seen(2)));
    assert_eq!(
        watermarks.acknowledged.map(|(_, sequence)| sequence),
        Some(7)
    );
    assert!(
        watermarks
            .requested_written_at
            .is_some_and(|written_at| written_at <= last.written_at)
    );
    assert!(
        world
            .store
            .watermarks(Some("c"))
            .await
            .unwrap()
            .requested_written_at
            .is_none()
    );
    assert!(
        world
            .store
            .watermarks(None)
            .await
            .unwrap()
            .requested_written_at
            .is_none()
    );
}

async fn old_watermarks_are_deleted(world: World) {
    world.store.write_watermark("0", &seen(0)).await.unwrap();
    world.store.acknowledge_watermark("0", 1).await.unwrap();
    for n in 1..105 {
        world
            .store
            .write_watermark(&n.to_string(), &seen(n))
            .await
            .unwrap();
    }

    // While NATS does not accept a watermark, the present one stays valid.
    assert!(
        world
            .store
            .watermarks(Some("0"))
            .await
            .unwrap()
            .requested_written_at
            .is_some()
    );
    world.store.acknowledge_watermark("104", 2).await.unwrap();
    world
        .store
        .write_watermark("105", &seen(105))
        .await
        .unwrap();
    assert!(
        world
            .store
            .watermarks(Some("5"))
            .await
            .unwrap()
            .requested_written_at
            .is_none()
    );
    assert!(
        world
            .store
            .watermarks(Some("6"))
            .await
            .unwrap()
            .requested_written_at
            .is_some()
    );
}

async fn recovered_outputs_are_found_at_their_first_position(world: World) {
    let output = |id: &str, stream_sequence| RecoveredOutput {
        id: id.to_owned(),
        stream: "OUT".to_owned(),
        stream_sequence,
    };
    let found = [output("a", 5), output("b", 6), output("a", 3)];
    world.store.save_recovered(&found).await.unwrap();
    world.store.save_recovered(&[output("c", 9)]).await.unwrap();
    assert!(world.store.watermarks(None).await.unwrap().has_recovered);
    let places = world.store.find_recovered(&["a", "c", "d"]).await.unwrap();
    assert_eq!(places.len(), 2);
    assert_eq!(
        (&places["a"], &places["c"]),
        (&("OUT".to_owned(), 3), &("OUT".to_owned(), 9))
    );
    assert!(world.store.find_recovered(&[]).await.unwrap().is_empty());

    // After another restore, one output was found elsewhere; then it was lost.
    world.store.save_recovered(&[output("a", 2)]).await.unwrap();
    assert_eq!(world.store.find_recovered(&["a"]).await.unwrap()["a"].1, 2);
    world
        .store
        .delete_recovered(&["a", "b", "c"])
        .await
        .unwrap();
    assert!(!world.store.watermarks(None).await.unwrap().has_recovered);
}

async fn events_are_known_once_they_are_settled(world: World) {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(
        world
            .store
            .known_events(WORKER, &["e1", "e2"])
            .await
            .unwrap(),
        ["e1"]
    );
    assert!(
        world
            .store
            .known_events("other", &["e1"])
            .await
            .unwrap()
            .is_empty()
    );
}
