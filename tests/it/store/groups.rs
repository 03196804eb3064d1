//! On PostgreSQL, outputs that one transaction appends share a lease, and their outcomes are
//! recorded together.

use std::time::Duration;

use oncely::store::{
    GroupOutcome, OutboxRow, Output, OutputFilter, PostgresStore, Published, Store, Unpublished,
};

use super::{LEASE, World, new_claim, new_output};

const SHORT: Duration = Duration::from_millis(1);

/// Another host on the same database.
async fn another(world: &World) -> Store {
    let url = world.store_url.as_ref().unwrap();
    PostgresStore::connect(url, 4).await.unwrap().into()
}

/// Appends outputs of one transaction.
async fn append(world: &World, outputs: &[Output], lease: Duration) -> Vec<OutboxRow> {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    let rows = tx.append_outputs(outputs, lease).await.unwrap();
    tx.commit().await.unwrap();
    rows
}

fn outputs(count: u32) -> Vec<Output> {
    (0..count)
        .map(|ordinal| new_output("e1", ordinal, Duration::ZERO))
        .collect()
}

/// The group of several rows.
fn group_of(rows: &[OutboxRow]) -> i64 {
    let number = rows[0].group.expect("a group");
    assert_eq!(number, rows[0].seq);
    assert!(rows.iter().all(|row| row.group == Some(number)));
    number
}

fn place(row: &OutboxRow) -> Published {
    Published {
        seq: row.seq,
        stream: "PAYMENTS".to_owned(),
        stream_sequence: 100 + u64::try_from(row.seq).unwrap(),
    }
}

fn published(rows: &[OutboxRow]) -> GroupOutcome {
    GroupOutcome {
        number: group_of(rows),
        published: rows.iter().map(place).collect(),
        unpublished: Vec::new(),
        leased: Vec::new(),
    }
}

/// The state of each output, and its sequence on the stream.
async fn states(world: &World, rows: &[OutboxRow]) -> Vec<(String, Option<u64>)> {
    let mut states = Vec::new();
    for row in rows {
        let found = world.store.output(row.seq).await.unwrap().unwrap();
        states.push((
            found.summary.state,
            found.place.map(|(_, sequence)| sequence),
        ));
    }
    states
}

/// Leases what is due now.
async fn lease(world: &World) -> Vec<OutboxRow> {
    tokio::time::sleep(Duration::from_millis(20)).await;
    world.store.lease_outputs(100, LEASE).await.unwrap()
}

/// Rows with leases of their own.
fn singly(rows: &[OutboxRow]) -> Vec<OutboxRow> {
    let alone = |row: &OutboxRow| OutboxRow {
        group: None,
        ..row.clone()
    };
    rows.iter().map(alone).collect()
}

async fn unpublished(world: &World) -> (u64, Option<u64>) {
    let totals = world.store.totals().await.unwrap();
    (totals[0].unpublished, totals[0].oldest_unpublished_ms)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_outputs_of_a_group_are_recorded_without_a_change_of_their_rows() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(3), LEASE).await;
    group_of(&rows);
    assert_eq!(unpublished(&world).await.0, 3);
    assert_eq!(
        states(&world, &rows).await,
        vec![("leased".to_owned(), None); 3]
    );
    let all = OutputFilter {
        unpublished: true,
        limit: 100,
        ..OutputFilter::default()
    };
    assert_eq!(world.store.outputs(&all).await.unwrap().len(), 3);

    // Recorded twice, as after a commit whose result was lost.
    let unchanged = "oncely.outbox where via = 'group' and published_at is null";
    for unchanged_rows in [3, 0] {
        let outcome = published(&rows);
        world.store.record_groups(&[outcome]).await.unwrap();
        let expected = |row: &OutboxRow| ("published".to_owned(), Some(place(row).stream_sequence));
        assert_eq!(
            states(&world, &rows).await,
            rows.iter().map(expected).collect::<Vec<_>>()
        );
        assert_eq!(world.count_directly(unchanged).await, unchanged_rows);
        assert_eq!(unpublished(&world).await, (0, None));
        assert_eq!(lease(&world).await, []);
        assert_eq!(world.count_directly("oncely.outbox_group").await, 0);
    }
    assert_eq!(world.count_directly("oncely.relay_record").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_alone_delayed_or_with_a_key_have_no_group() {
    let world = World::postgres().await;
    let alone = append(&world, &outputs(1), LEASE).await;
    let with_delayed = [
        new_output("e1", 1, Duration::ZERO),
        new_output("e1", 2, Duration::from_secs(600)),
    ];
    let with_delayed = append(&world, &with_delayed, LEASE).await;
    let mut keyed = outputs(3);
    keyed[1].ordering_key = Some("k".to_owned());
    let keyed = append(&world, &keyed, LEASE).await;
    for row in [alone, with_delayed, keyed].concat() {
        assert_eq!(row.group, None);
    }
    assert_eq!(world.count_directly("oncely.outbox_group").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_whose_lease_ended_is_leased_by_another_host() {
    for world in [World::postgres().await, World::pgbouncer().await] {
        world.store.renew_lease().await.unwrap();
        let rows = append(&world, &outputs(3), SHORT).await;
        group_of(&rows);
        let other = another(&world).await;
        other.renew_lease().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), rows);
        assert_eq!(lease(&world).await, []);

        // The late host published one of them, and has no say about the others.
        let late = GroupOutcome {
            number: group_of(&rows),
            published: vec![place(&rows[0])],
            unpublished: vec![(rows[1].seq, Unpublished::BlockedBy(rows[0].seq))],
            leased: vec![rows[2].seq],
        };
        world.store.record_groups(&[late]).await.unwrap();
        let states = states(&world, &rows).await;
        let states: Vec<&str> = states.iter().map(|(state, _)| state.as_str()).collect();
        assert_eq!(states, ["published", "leased", "leased"]);

        other.record_groups(&[published(&rows)]).await.unwrap();
        assert_eq!(unpublished(&world).await, (0, None));
        other.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_outputs_of_the_group_of_a_dead_host_are_released() {
    let world = World::postgres().await;
    world.store.renew_lease().await.unwrap();
    let rows = append(&world, &outputs(4), SHORT).await;
    let spoil = format!(
        "update oncely.outbox set headers = '[[1]]' where seq = {}",
        rows[3].seq
    );
    world.run_directly(&spoil).await;
    let other = another(&world).await;
    other.renew_lease().await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), rows[..3]);
    let later = Unpublished::Later {
        after: Duration::ZERO,
        error: None,
    };
    let outcome = GroupOutcome {
        number: group_of(&rows),
        published: vec![place(&rows[0])],
        unpublished: vec![(rows[1].seq, later)],
        leased: vec![rows[2].seq],
    };
    other.record_groups(&[outcome]).await.unwrap();
    let states = states(&world, &rows[..3]).await;
    let states: Vec<&str> = states.iter().map(|(state, _)| state.as_str()).collect();
    assert_eq!(states, ["published", "due", "leased"]);
    let parked = OutputFilter {
        limit: 100,
        ..OutputFilter::default()
    };
    let parked = world.store.outputs(&parked).await.unwrap();
    assert_eq!(parked[0].number, rows[3].seq);
    assert_eq!(lease(&world).await, singly(&rows[1..2]));
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_leases_whole_groups_up_to_its_limit() {
    let world = World::postgres().await;
    let mut groups = Vec::new();
    for _ in 0..4 {
        groups.push(append(&world, &outputs(3), SHORT).await);
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let leased = world.store.lease_outputs(5, LEASE).await.unwrap();
    assert_eq!(leased, groups[..2].concat());
    let leased = world.store.lease_outputs(100, LEASE).await.unwrap();
    assert_eq!(leased, groups[2..].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_row_is_parked_and_its_group_is_leased() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(3), SHORT).await;
    let spoil = format!(
        "update oncely.outbox set headers = '[[1]]' where seq = {}",
        rows[1].seq
    );
    world.run_directly(&spoil).await;
    let readable = [rows[0].clone(), rows[2].clone()];
    assert_eq!(lease(&world).await, readable);
    assert_eq!(states(&world, &rows[..1]).await[0].0, "leased");
    world
        .store
        .record_groups(&[published(&readable)])
        .await
        .unwrap();
    let parked = OutputFilter {
        limit: 100,
        ..OutputFilter::default()
    };
    let parked = world.store.outputs(&parked).await.unwrap();
    assert_eq!(parked[0].number, rows[1].seq);
    assert_eq!(unpublished(&world).await.0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_of_a_group_have_different_outcomes() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(4), LEASE).await;
    let failed = Unpublished::Later {
        after: SHORT,
        error: Some("no answer".to_owned()),
    };
    let refused = Unpublished::Parked {
        reason: "too large".to_owned(),
    };
    let outcome = GroupOutcome {
        number: group_of(&rows),
        published: vec![place(&rows[0])],
        unpublished: vec![(rows[1].seq, failed), (rows[2].seq, refused)],
        leased: vec![rows[3].seq],
    };
    world.store.record_groups(&[outcome]).await.unwrap();
    assert_eq!(world.count_directly("oncely.outbox_group").await, 0);

    // The failed one is due again, the last one is still leased.
    let leased = lease(&world).await;
    let expected = OutboxRow {
        group: None,
        failures: 1,
        ..rows[1].clone()
    };
    assert_eq!(leased, [expected]);
    let states = states(&world, &rows).await;
    let states: Vec<&str> = states.iter().map(|(state, _)| state.as_str()).collect();
    assert_eq!(states, ["published", "leased", "parked", "leased"]);
    assert_eq!(unpublished(&world).await.0, 3);
    world
        .store
        .mark_published(&[place(&rows[3])])
        .await
        .unwrap();
    assert_eq!(unpublished(&world).await.0, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_without_outputs_is_deleted() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(3), SHORT).await;
    // As after the record of a late host, output by output.
    let places: Vec<Published> = rows.iter().map(place).collect();
    world.store.mark_published(&places).await.unwrap();
    assert_eq!(unpublished(&world).await.0, 3);
    assert_eq!(lease(&world).await, []);
    assert_eq!(world.count_directly("oncely.outbox_group").await, 0);
    assert_eq!(unpublished(&world).await, (0, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_of_a_stopped_host_are_released() {
    let world = World::postgres().await;
    world.store.renew_lease().await.unwrap();
    let rows = append(&world, &outputs(3), LEASE).await;
    let other = another(&world).await;
    other.renew_lease().await.unwrap();
    assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), []);
    world.store.close().await;
    assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), rows);
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_outputs_of_a_group_are_published_again() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(3), LEASE).await;
    world
        .store
        .record_groups(&[published(&rows)])
        .await
        .unwrap();
    let hour = Duration::from_secs(3600);
    let last = world.store.last_published(hour).await.unwrap();
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].seq, rows[2].seq);
    let all = world.store.published_to("PAYMENTS").await.unwrap();
    assert_eq!(
        all.iter().map(|output| output.seq).collect::<Vec<_>>(),
        rows.iter().map(|row| row.seq).collect::<Vec<_>>()
    );
    assert_eq!(world.store.republish(&all[1..]).await.unwrap(), 2);
    assert_eq!(lease(&world).await, singly(&rows[1..]));
    assert_eq!(states(&world, &rows[..1]).await[0].0, "published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_with_an_open_group_is_kept() {
    let world = World::postgres().await;
    let rows = append(&world, &outputs(3), LEASE).await;
    super::retention::retire_everything(&world).await;
    assert_eq!(world.count_directly("oncely.outbox").await, 3);
    world
        .store
        .record_groups(&[published(&rows)])
        .await
        .unwrap();
    super::retention::retire_everything(&world).await;
    assert_eq!(world.count_directly("oncely.outbox").await, 0);
}
