//! Outputs without an ordering key are handed over on PostgreSQL, and leased row by row on SQLite.
//! Each of them is recorded as published, or due for the poller, whatever happens in between.

use std::collections::BTreeSet;
use std::time::Duration;

use oncely::store::{OutboxRow, Output, Published, Unpublished};

use super::{LEASE, World, new_claim, new_output};

const NOW: Duration = Duration::ZERO;
const SHORT: Duration = Duration::from_millis(1);

/// The outputs that are not known to be published.
const UNPUBLISHED: &str = "oncely.output where published_at is null";

on_every_database!(
    outputs_of_a_transaction_share_a_handover,
    a_mixed_transaction_hands_over_the_outputs_without_a_key,
    a_failed_output_leaves_its_handover,
    what_is_not_recorded_is_taken_over,
    a_late_record_counts_after_a_takeover,
    records_and_takeovers_lose_no_output,
);

async fn append(
    world: &World,
    event_id: &str,
    outputs: &[Output],
    lease: Duration,
) -> Vec<OutboxRow> {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim(event_id, 1)]).await.unwrap();
    let rows = tx.append_outputs(outputs, lease).await.unwrap();
    tx.commit().await.unwrap();
    rows
}

fn outputs(event_id: &str, count: u32) -> Vec<Output> {
    let each = |ordinal| new_output(event_id, ordinal, NOW);
    (0..count).map(each).collect()
}

fn places(rows: &[OutboxRow]) -> Vec<Published> {
    let each = |row: &OutboxRow| Published::new(row, "OUT", row.seq.unsigned_abs());
    rows.iter().map(each).collect()
}

fn handovers(rows: &[OutboxRow]) -> Vec<i64> {
    let numbers: BTreeSet<i64> = rows.iter().filter_map(|row| row.handover).collect();
    numbers.into_iter().collect()
}

fn numbers(rows: &[OutboxRow]) -> Vec<i64> {
    let mut numbers: Vec<i64> = rows.iter().map(|row| row.seq).collect();
    numbers.sort_unstable();
    numbers
}

async fn lease(world: &World) -> Vec<OutboxRow> {
    tokio::time::sleep(Duration::from_millis(20)).await;
    world.store.lease_outputs(1_000, LEASE).await.unwrap()
}

/// The number of hand-overs in the database; none on SQLite.
async fn open_handovers(world: &World) -> i64 {
    match world.is_postgres() {
        true => world.count_directly("oncely.handover").await,
        false => 0,
    }
}

async fn outputs_of_a_transaction_share_a_handover(world: World) {
    let rows = append(&world, "e1", &outputs("e1", 3), LEASE).await;
    let shared = handovers(&rows);
    assert_eq!(shared.len(), usize::from(world.is_postgres()));
    assert_eq!(open_handovers(&world).await, shared.len() as i64);
    assert!(lease(&world).await.is_empty());

    // Two of three are recorded, then the last one.
    let places = places(&rows);
    world.store.mark_published(&places[..2], &[]).await.unwrap();
    assert_eq!(open_handovers(&world).await, shared.len() as i64);
    let lag = world.store.outbox_lag().await.unwrap();
    assert_eq!(lag[0].unpublished, 1);
    world
        .store
        .mark_published(&places[2..], &shared)
        .await
        .unwrap();
    assert_eq!(open_handovers(&world).await, 0);
    assert!(world.store.outbox_lag().await.unwrap().is_empty());
    assert_eq!(world.count_directly(UNPUBLISHED).await, 0);
    assert!(lease(&world).await.is_empty());
}

async fn a_mixed_transaction_hands_over_the_outputs_without_a_key(world: World) {
    let mut outputs = outputs("e1", 5);
    outputs[1].ordering_key = Some("k".to_owned());
    outputs[3].ordering_key = Some("k".to_owned());
    outputs[4].delay = Duration::from_secs(3600);
    let rows = append(&world, "e1", &outputs, LEASE).await;
    let handed_over: Vec<bool> = rows.iter().map(|row| row.handover.is_some()).collect();
    match world.is_postgres() {
        true => assert_eq!(handed_over, [true, false, true, false]),
        false => assert_eq!(handed_over, [false; 4]),
    }
    world
        .store
        .mark_published(&places(&rows), &handovers(&rows))
        .await
        .unwrap();
    assert_eq!(
        world.count_directly(UNPUBLISHED).await,
        1,
        "the delayed one"
    );
    assert_eq!(open_handovers(&world).await, 0);
}

async fn a_failed_output_leaves_its_handover(world: World) {
    let rows = append(&world, "e1", &outputs("e1", 3), LEASE).await;
    let later = Unpublished::Later {
        after: SHORT,
        error: Some("no answer".to_owned()),
    };
    world
        .store
        .release_outputs(&[(rows[1].seq, later)], &[])
        .await
        .unwrap();
    let leased = lease(&world).await;
    assert_eq!(numbers(&leased), [rows[1].seq]);
    assert_eq!((leased[0].failures, leased[0].handover), (1, None));

    // The others are not released with it, and its own record is that of a row.
    let rest = [rows[0].clone(), rows[2].clone()];
    world
        .store
        .mark_published(&places(&rest), &handovers(&rows))
        .await
        .unwrap();
    world
        .store
        .mark_published(&places(&leased), &[])
        .await
        .unwrap();
    assert_eq!(world.count_directly(UNPUBLISHED).await, 0);
}

async fn what_is_not_recorded_is_taken_over(world: World) {
    let rows = append(&world, "e1", &outputs("e1", 3), SHORT).await;
    world
        .store
        .mark_published(&places(&rows[1..2]), &[])
        .await
        .unwrap();
    let leased = lease(&world).await;
    assert_eq!(numbers(&leased), [rows[0].seq, rows[2].seq]);
    assert_eq!(leased[0].first_attempt_at, rows[0].first_attempt_at);
    assert_eq!(open_handovers(&world).await, 0);
    world
        .store
        .mark_published(&places(&leased), &[])
        .await
        .unwrap();
    assert_eq!(world.count_directly(UNPUBLISHED).await, 0);
}

/// A slow host publishes outputs that another one has taken over.
async fn a_late_record_counts_after_a_takeover(world: World) {
    let rows = append(&world, "e1", &outputs("e1", 2), SHORT).await;
    assert_eq!(lease(&world).await.len(), 2);
    world
        .store
        .mark_published(&places(&rows), &handovers(&rows))
        .await
        .unwrap();
    assert_eq!(world.count_directly(UNPUBLISHED).await, 0);
    assert!(lease(&world).await.is_empty());
}

/// While leases run out, one task records what it can and another takes over the rest.
async fn records_and_takeovers_lose_no_output(world: World) {
    let mut all = Vec::new();
    for event in 0..40 {
        let event_id = format!("e{event}");
        let rows = append(&world, &event_id, &outputs(&event_id, 3), SHORT).await;
        let (store, recorded) = (world.store.clone(), places(&rows[..2]));
        let record = async move { store.mark_published(&recorded, &[]).await.unwrap() };
        let take_over = async { world.store.lease_outputs(1_000, LEASE).await.unwrap() };
        let ((), mut leased) = tokio::join!(record, take_over);
        leased.extend(lease(&world).await);

        // The last output is only taken over, and each of the others recorded, whoever came first.
        assert!(numbers(&leased).contains(&rows[2].seq), "{event_id}");
        let left = world.count_directly(UNPUBLISHED).await;
        assert_eq!(left, 1, "{event_id}");
        world
            .store
            .mark_published(&places(&leased), &[])
            .await
            .unwrap();
        all.extend(rows);
    }
    assert_eq!(world.count_directly(UNPUBLISHED).await, 0);
    assert_eq!(open_handovers(&world).await, 0);
    assert_eq!(all.len(), 120);
}
