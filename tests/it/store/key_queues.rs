//! Per-key queues: order, blocking, and decisions about parked outputs.

use std::time::Duration;

use oncely::store::{OutboxRow, Output, OutputFilter, Published, Unpublished};

use super::{LEASE, World, new_claim, new_output};

const NOW: Duration = Duration::ZERO;
const SHORT: Duration = Duration::from_millis(1);

on_every_database!(
    append_outputs_returns_the_unpublished_predecessors,
    a_poll_leases_a_key_up_to_the_first_unavailable_output,
    outputs_after_a_failed_one_wait_until_it_is_published,
    an_output_blocked_by_another_waits_for_it,
    a_long_queue_is_left_to_the_poller,
    a_delayed_output_is_not_queued_before_it_is_due,
    a_parked_output_blocks_its_key_until_it_is_retried,
    a_dropped_output_frees_its_key_and_leaves_a_record,
    only_parked_outputs_are_retried_or_dropped,
    concurrent_polls_keep_the_order_of_every_key,
    outputs_lost_by_a_stream_are_unpublished_again,
    a_deep_queue_is_drained_in_order_and_in_time,
    outbox_lag_is_the_age_of_publishable_outputs,
);

fn keyed(event_id: &str, ordinal: u32, key: &str) -> Output {
    Output {
        ordering_key: Some(key.to_owned()),
        ..new_output(event_id, ordinal, NOW)
    }
}

/// Commits outputs of a new event.
async fn append(world: &World, outputs: &[Output], lease: Duration) -> Vec<OutboxRow> {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim(&outputs[0].event_id, 1)])
        .await
        .unwrap();
    let rows = tx.append_outputs(outputs, lease).await.unwrap();
    tx.commit().await.unwrap();
    rows
}

async fn append_one(world: &World, event_id: &str, key: &str, lease: Duration) -> OutboxRow {
    append(world, &[keyed(event_id, 0, key)], lease)
        .await
        .remove(0)
}

async fn publish(world: &World, row: &OutboxRow) {
    let place = Published {
        seq: row.seq,
        stream: "OUT".to_owned(),
        stream_sequence: row.seq.unsigned_abs(),
    };
    world.store.mark_published(&[place]).await.unwrap();
}

/// The events of the outputs that a poll leases now.
async fn poll(world: &World) -> Vec<String> {
    events(&world.store.lease_outputs(100, LEASE).await.unwrap())
}

fn events(rows: &[OutboxRow]) -> Vec<String> {
    rows.iter()
        .map(|row| row.output_id().split(':').nth(1).unwrap().to_owned())
        .collect()
}

async fn park(world: &World, row: &OutboxRow) {
    let how = Unpublished::Parked {
        reason: "too large\0".to_owned(),
    };
    world
        .store
        .release_outputs(&[(row.seq, how)])
        .await
        .unwrap();
}

async fn until_leases_expire() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

async fn append_outputs_returns_the_unpublished_predecessors(world: World) {
    let first = append(
        &world,
        &[
            keyed("a", 0, "k"),
            keyed("a", 1, "k"),
            keyed("a", 2, "other"),
        ],
        LEASE,
    )
    .await;
    assert_eq!(
        (&first[0].blocked_by, &first[2].blocked_by),
        (&vec![], &vec![])
    );
    assert_eq!(
        first[1].blocked_by,
        [first[0].seq],
        "the first of the same batch is before the second"
    );
    let mut second = append(
        &world,
        &[
            keyed("b", 0, "k"),
            keyed("b", 1, "k"),
            new_output("b", 2, NOW),
        ],
        LEASE,
    )
    .await;
    second[0].blocked_by.sort_unstable();
    assert_eq!(second[0].blocked_by, [first[0].seq, first[1].seq]);
    assert_eq!(
        (&second[1].blocked_by, &second[2].blocked_by),
        (&vec![second[0].seq], &vec![])
    );
    publish(&world, &first[0]).await;
    publish(&world, &first[1]).await;
    publish(&world, &second[0]).await;
    assert_eq!(
        append_one(&world, "c", "k", LEASE).await.blocked_by,
        [second[1].seq]
    );
}

async fn a_poll_leases_a_key_up_to_the_first_unavailable_output(world: World) {
    for event in ["a", "b", "c", "d"] {
        append_one(&world, event, "k", LEASE).await;
    }
    append_one(&world, "x", "other", LEASE).await;

    // As after a crash: all leases except that of `c` have expired.
    let due = "update oncely.outbox set leased_until = created_at where event_id <> 'c'";
    world.execute_directly(due).await;
    assert_eq!(poll(&world).await, ["a", "b", "x"]);
    assert!(poll(&world).await.is_empty());
    world
        .execute_directly(
            "update oncely.outbox set leased_until = created_at where event_id in ('a', 'b', 'c')",
        )
        .await;

    // `d` is blocked by `c`, which is unpublished.
    assert_eq!(poll(&world).await, ["a", "b", "c"]);
    let c = world
        .store
        .outputs(&unpublished())
        .await
        .unwrap()
        .into_iter()
        .find(|output| output.event_id == "c");
    let c = c.unwrap();
    assert_eq!(c.waiting, 1);
    world
        .store
        .mark_published(&[Published {
            seq: c.number,
            stream: "OUT".to_owned(),
            stream_sequence: 1,
        }])
        .await
        .unwrap();

    // `a` and `b` are unpublished and block it.
    assert!(poll(&world).await.is_empty());
}

fn unpublished() -> OutputFilter {
    OutputFilter {
        unpublished: true,
        limit: 100,
        ..OutputFilter::default()
    }
}

async fn outputs_after_a_failed_one_wait_until_it_is_published(world: World) {
    let first = append_one(&world, "a", "k", LEASE).await;
    let failed = Unpublished::Later {
        after: Duration::from_secs(3600),
        error: Some("no answer".to_owned()),
    };
    world
        .store
        .release_outputs(&[(first.seq, failed)])
        .await
        .unwrap();
    assert!(
        append(&world, &[keyed("b", 0, "k"), keyed("b", 1, "k")], LEASE)
            .await
            .is_empty()
    );
    let others = append(
        &world,
        &[
            keyed("c", 0, "k"),
            keyed("c", 1, "other"),
            new_output("c", 2, NOW),
        ],
        LEASE,
    )
    .await;
    assert_eq!(
        others.iter().map(OutboxRow::output_id).collect::<Vec<_>>(),
        ["payments:c:1", "payments:c:2"]
    );
    assert!(poll(&world).await.is_empty());
    publish(&world, &first).await;
    assert_eq!(poll(&world).await, ["b", "b", "c"]);
    assert!(poll(&world).await.is_empty());
}

async fn an_output_blocked_by_another_waits_for_it(world: World) {
    let first = append_one(&world, "a", "k", LEASE).await;
    let second = append_one(&world, "b", "k", LEASE).await;
    world
        .store
        .release_outputs(&[(second.seq, Unpublished::BlockedBy(first.seq))])
        .await
        .unwrap();
    assert!(
        append(&world, &[keyed("c", 0, "k")], LEASE)
            .await
            .is_empty()
    );
    assert!(poll(&world).await.is_empty());
    publish(&world, &first).await;
    assert_eq!(poll(&world).await, ["b", "c"]);

    // Unblocking an output that is already published changes nothing.
    world
        .store
        .release_outputs(&[(first.seq, Unpublished::BlockedBy(second.seq))])
        .await
        .unwrap();
    assert_eq!(
        world
            .store
            .output(first.seq)
            .await
            .unwrap()
            .unwrap()
            .summary
            .state,
        "published"
    );
}

async fn a_long_queue_is_left_to_the_poller(world: World) {
    let many: Vec<_> = (0..300).map(|ordinal| keyed("a", ordinal, "k")).collect();
    let first = append(&world, &many, LEASE).await;
    assert_eq!(first.len(), 300);
    for event in ["b", "c", "d"] {
        assert!(
            append(&world, &[keyed(event, 0, "k")], LEASE)
                .await
                .is_empty()
        );
    }
    let last = first.last().unwrap();
    let waits: Vec<_> = world
        .store
        .outputs(&OutputFilter {
            limit: 1_000,
            ..unpublished()
        })
        .await
        .unwrap();
    assert!(
        waits
            .iter()
            .skip(300)
            .all(|waiting| waiting.blocked_by == Some(last.seq)),
        "an output is blocked by another predecessor"
    );
    for row in &first {
        publish(&world, row).await;
    }
    assert_eq!(poll(&world).await, ["b", "c", "d"]);
}

async fn a_delayed_output_is_not_queued_before_it_is_due(world: World) {
    let delayed = Output {
        delay: Duration::from_millis(400),
        ..keyed("a", 0, "k")
    };
    assert!(append(&world, &[delayed], LEASE).await.is_empty());
    assert!(
        append_one(&world, "b", "k", LEASE)
            .await
            .blocked_by
            .is_empty()
    );
    tokio::time::sleep(Duration::from_millis(450)).await;
    assert_eq!(poll(&world).await, ["a"]);
}

async fn a_parked_output_blocks_its_key_until_it_is_retried(world: World) {
    let first = append_one(&world, "a", "k", LEASE).await;
    park(&world, &first).await;
    assert!(
        append(&world, &[keyed("b", 0, "k")], LEASE)
            .await
            .is_empty()
    );
    append_one(&world, "c", "other", SHORT).await;
    until_leases_expire().await;
    assert_eq!(poll(&world).await, ["c"]);
    let list = world
        .store
        .outputs(&OutputFilter {
            limit: 10,
            ..OutputFilter::default()
        })
        .await
        .unwrap();
    assert_eq!(list.len(), 1);
    let listed = &list[0];
    assert_eq!(
        (listed.number, listed.state.as_str(), listed.waiting),
        (first.seq, "parked", 1)
    );
    assert_eq!(
        (listed.failures, listed.error.as_deref()),
        (1, Some("too large\u{fffd}"))
    );
    assert!(listed.parked_at.is_some());
    assert_eq!(world.store.totals().await.unwrap()[0].parked, 1);

    assert_eq!(world.store.retry_outputs(&[first.seq]).await.unwrap(), 1);
    assert_eq!(poll(&world).await, ["a"]);
    assert!(poll(&world).await.is_empty());
    publish(&world, &first).await;
    assert_eq!(poll(&world).await, ["b"]);
}

async fn a_dropped_output_frees_its_key_and_leaves_a_record(world: World) {
    let first = append_one(&world, "a", "k", LEASE).await;
    park(&world, &first).await;
    assert!(
        append(&world, &[keyed("b", 0, "k")], LEASE)
            .await
            .is_empty()
    );
    assert_eq!(
        world
            .store
            .drop_outputs(&[first.seq], "not needed\0")
            .await
            .unwrap(),
        1
    );
    assert_eq!(poll(&world).await, ["b"]);
    let dropped = OutputFilter {
        dropped: true,
        limit: 10,
        ..OutputFilter::default()
    };
    let dropped = world.store.outputs(&dropped).await.unwrap();
    assert_eq!(dropped.len(), 1);
    let record = world.store.output(first.seq).await.unwrap().unwrap();
    assert_eq!(record.summary, dropped[0]);
    assert_eq!((record.headers, record.body), (first.headers, first.body));
    assert_eq!(
        (
            record.summary.state.as_str(),
            record.summary.note.as_deref()
        ),
        ("dropped", Some("not needed\u{fffd}"))
    );
    assert!(record.summary.dropped_at.is_some());
}

async fn only_parked_outputs_are_retried_or_dropped(world: World) {
    let row = append_one(&world, "a", "k", LEASE).await;
    assert_eq!(
        world
            .store
            .drop_outputs(&[row.seq, row.seq + 99], "")
            .await
            .unwrap(),
        0
    );
    assert_eq!(world.store.retry_outputs(&[row.seq]).await.unwrap(), 0);
    publish(&world, &row).await;
    assert_eq!(world.store.drop_outputs(&[row.seq], "").await.unwrap(), 0);
    assert!(world.store.output(row.seq + 99).await.unwrap().is_none());
}

async fn concurrent_polls_keep_the_order_of_every_key(world: World) {
    for event in 0..40 {
        let outputs: Vec<_> = (0..4)
            .map(|key| keyed(&format!("{event:02}"), key, &format!("k{key}")))
            .collect();
        append(&world, &outputs, SHORT).await;
    }
    until_leases_expire().await;
    let (sender, mut published) = tokio::sync::mpsc::unbounded_channel();
    let polls: Vec<_> = (0..4)
        .map(|_| {
            let (store, sender) = (std::sync::Arc::clone(&world.store), sender.clone());
            tokio::spawn(async move {
                loop {
                    let rows = store.lease_outputs(7, LEASE).await.unwrap();
                    for row in rows {
                        let place = Published {
                            seq: row.seq,
                            stream: "OUT".to_owned(),
                            stream_sequence: 1,
                        };
                        sender.send(row).unwrap();
                        store.mark_published(&[place]).await.unwrap();
                    }
                    if store.outbox_lag().await.unwrap().is_empty() {
                        return;
                    }
                }
            })
        })
        .collect();
    for poll in polls {
        poll.await.unwrap();
    }
    drop(sender);
    let mut of_keys: std::collections::BTreeMap<Option<String>, Vec<i64>> =
        std::collections::BTreeMap::new();
    while let Some(row) = published.recv().await {
        of_keys.entry(row.ordering_key).or_default().push(row.seq);
    }
    assert_eq!(of_keys.values().map(Vec::len).collect::<Vec<_>>(), [40; 4]);
    for (key, seqs) in of_keys {
        assert!(seqs.is_sorted(), "{key:?}: {seqs:?}");
    }
}

async fn outputs_lost_by_a_stream_are_unpublished_again(world: World) {
    let mut rows = Vec::new();
    for (at, event) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let row = append_one(&world, event, "k", LEASE).await;
        let stream = if event == "b" { "ELSEWHERE" } else { "OUT" };
        let place = Published {
            seq: row.seq,
            stream: stream.to_owned(),
            stream_sequence: 10 + at as u64,
        };
        world.store.mark_published(&[place]).await.unwrap();
        rows.push(row);
    }
    let last = world.store.last_published(LEASE).await.unwrap();
    let last: Vec<_> = last
        .iter()
        .map(|last| (last.stream.as_str(), last.stream_sequence, last.id.as_str()))
        .collect();
    assert_eq!(
        last,
        [
            ("ELSEWHERE", 11, rows[1].id.as_str()),
            ("OUT", 13, rows[3].id.as_str())
        ]
    );
    assert!(
        world
            .store
            .last_published(Duration::ZERO)
            .await
            .unwrap()
            .is_empty()
    );
    let on = world.store.published_to("OUT").await.unwrap();
    assert_eq!(
        on.iter().map(|on| on.stream_sequence).collect::<Vec<_>>(),
        [10, 12, 13]
    );
    assert_eq!(world.store.republish(&on[1..]).await.unwrap(), 2);
    assert_eq!(world.store.republish(&on[1..]).await.unwrap(), 0);
    let again = world.store.lease_outputs(100, LEASE).await.unwrap();
    assert_eq!(events(&again), ["c", "d"]);
    assert_eq!(again[0].first_attempt_at, rows[2].first_attempt_at);
}

async fn outbox_lag_is_the_age_of_publishable_outputs(world: World) {
    assert!(world.store.outbox_lag().await.unwrap().is_empty());
    let first = append_one(&world, "a", "k", LEASE).await;
    park(&world, &first).await;
    append(&world, &[keyed("b", 0, "k")], LEASE).await;
    let lag = world.store.outbox_lag().await.unwrap().remove(0);
    assert_eq!(
        (lag.unpublished, lag.oldest_ms, lag.parked, lag.blocked),
        (2, None, 1, 1)
    );
    append(
        &world,
        &[new_output("c", 0, NOW), new_output("c", 1, LEASE)],
        LEASE,
    )
    .await;
    until_leases_expire().await;
    let lag = world.store.outbox_lag().await.unwrap().remove(0);
    assert_eq!((lag.unpublished, lag.parked, lag.blocked), (3, 1, 1));
    assert!(
        lag.oldest_ms.is_some_and(|ms| (20..10_000).contains(&ms)),
        "{lag:?}"
    );
}

async fn a_deep_queue_is_drained_in_order_and_in_time(world: World) {
    const DEPTH: u32 = 6_000;
    let first = append_one(&world, "a", "k", LEASE).await;
    park(&world, &first).await;
    let many: Vec<_> = (0..DEPTH).map(|ordinal| keyed("b", ordinal, "k")).collect();
    assert!(append(&world, &many, LEASE).await.is_empty());
    world.store.drop_outputs(&[first.seq], "").await.unwrap();
    let began = std::time::Instant::now();
    let mut published = Vec::new();
    while published.len() < DEPTH as usize {
        let rows = world.store.lease_outputs(1_000, LEASE).await.unwrap();
        // Another host polls while these outputs are being published.
        assert!(
            world
                .store
                .lease_outputs(1_000, LEASE)
                .await
                .unwrap()
                .is_empty()
        );
        let place = |row: &OutboxRow| Published {
            seq: row.seq,
            stream: "OUT".to_owned(),
            stream_sequence: 1,
        };
        world
            .store
            .mark_published(&rows.iter().map(place).collect::<Vec<_>>())
            .await
            .unwrap();
        published.extend(rows.into_iter().map(|row| row.seq));
    }
    assert!(published.is_sorted());
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "the drain took {:?}",
        began.elapsed()
    );
}
