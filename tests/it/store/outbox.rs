//! Outputs are leased once, and leased again if they were not published.

use std::time::Duration;

use oncely::store::{OutboxRow, Output, OutputFilter, Published, Unpublished};

use super::{LEASE, World, append_singly, new_claim, new_output};

const NOW: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(1);

on_every_database!(
    an_output_with_a_taken_id_gets_the_next_id,
    appended_outputs_are_leased_to_the_committing_host,
    an_expired_lease_is_leased_again_with_its_first_attempt,
    delayed_outputs_are_left_to_the_poller,
    published_outputs_are_never_leased_again,
    missing_outputs_cannot_be_marked_published,
    a_deferred_output_is_due_later_with_one_more_failure,
    two_polls_never_lease_the_same_output,
    an_unreadable_row_does_not_break_the_list,
    an_unreadable_row_blocks_no_other_key,
    an_unreadable_row_blocks_later_outputs_of_its_key,
);

async fn append(world: &World, outputs: &[Output], lease: Duration) -> Vec<OutboxRow> {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    let rows = append_singly(&mut tx, outputs, lease).await;
    tx.commit().await.unwrap();
    rows
}

fn place(seq: i64) -> Published {
    Published {
        seq,
        stream: "PAYMENTS".to_owned(),
        stream_sequence: 41,
    }
}

/// Leases until an output is due.
async fn lease(world: &World, lease: Duration) -> Vec<OutboxRow> {
    let until_due = async {
        loop {
            let rows = world.store.lease_outputs(100, lease).await.unwrap();
            if !rows.is_empty() {
                return rows;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), until_due)
        .await
        .expect("wait for a due output")
}

async fn appended_outputs_are_leased_to_the_committing_host(world: World) {
    let outputs: Vec<_> = (0..20)
        .map(|ordinal| new_output("e1", ordinal, NOW))
        .collect();
    let before = jiff::Timestamp::now();
    let rows = append(&world, &outputs, LEASE).await;
    assert_eq!(rows.len(), 20);
    for (row, output) in rows.iter().zip(&outputs) {
        assert_eq!(
            (row.output_id(), &row.body),
            (output.id.as_str(), &output.body)
        );
        assert_eq!(row.headers[..output.headers.len()], output.headers);
        assert_eq!(
            row.id,
            world.store.output_ids().id_of(super::WORKER, output)
        );
        assert_eq!((row.worker.as_str(), row.failures), (super::WORKER, 0));
        assert!(
            row.first_attempt_at.duration_since(before).abs() < jiff::SignedDuration::from_secs(10)
        );
    }
    assert!(rows.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert!(
        world
            .store
            .lease_outputs(100, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
}

async fn an_expired_lease_is_leased_again_with_its_first_attempt(world: World) {
    let committed = append(
        &world,
        &[new_output("e1", 0, NOW), new_output("e1", 1, NOW)],
        SHORT,
    )
    .await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(
        world.store.lease_outputs(1, LEASE).await.unwrap(),
        committed[..1]
    );
    assert_eq!(
        world.store.lease_outputs(100, LEASE).await.unwrap(),
        committed[1..]
    );
    assert!(
        world
            .store
            .lease_outputs(100, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
}

async fn delayed_outputs_are_left_to_the_poller(world: World) {
    let outputs = [
        new_output("e1", 0, LONG),
        new_output("e1", 1, NOW),
        new_output("e1", 2, Duration::from_millis(300)),
    ];
    let due = append(&world, &outputs, LEASE).await;
    assert_eq!(
        due.iter().map(OutboxRow::output_id).collect::<Vec<_>>(),
        [outputs[1].id.as_str()]
    );
    assert!(
        world
            .store
            .lease_outputs(100, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    let leased = lease(&world, LEASE).await;
    assert_eq!(
        leased.iter().map(OutboxRow::output_id).collect::<Vec<_>>(),
        [outputs[2].id.as_str()]
    );
    assert!(leased[0].first_attempt_at > due[0].first_attempt_at);
}

async fn published_outputs_are_never_leased_again(world: World) {
    let rows = append(
        &world,
        &[new_output("e1", 0, NOW), new_output("e1", 1, NOW)],
        SHORT,
    )
    .await;
    world
        .store
        .mark_published(&[place(rows[1].seq), place(rows[0].seq)])
        .await
        .unwrap();

    // A slow relay may record it again.
    world
        .store
        .mark_published(&[place(rows[0].seq)])
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(
        world
            .store
            .lease_outputs(100, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    let totals = world.store.totals().await.unwrap();
    assert_eq!(
        (
            totals[0].outputs,
            totals[0].unpublished,
            totals[0].oldest_unpublished_ms
        ),
        (2, 0, None)
    );
}

async fn missing_outputs_cannot_be_marked_published(world: World) {
    let rows = append(&world, &[new_output("e1", 0, NOW)], SHORT).await;
    assert!(
        world
            .store
            .mark_published(&[place(rows[0].seq), place(rows[0].seq + 1)])
            .await
            .is_err()
    );
    assert_eq!(lease(&world, LEASE).await.len(), 1);
}

async fn a_deferred_output_is_due_later_with_one_more_failure(world: World) {
    let rows = append(
        &world,
        &[new_output("e1", 0, NOW), new_output("e1", 1, NOW)],
        LEASE,
    )
    .await;
    let later = |after, error: &str| Unpublished::Later {
        after,
        error: Some(error.to_owned()),
    };
    let back = [
        (rows[0].seq, later(SHORT, "no answer\0")),
        (rows[1].seq, later(LONG, "no answer")),
    ];
    world.store.release_outputs(&back).await.unwrap();
    let leased = lease(&world, LEASE).await;
    assert_eq!(
        leased,
        [OutboxRow {
            failures: 1,
            ..rows[0].clone()
        }]
    );
}

fn unpublished() -> OutputFilter {
    OutputFilter {
        unpublished: true,
        limit: 100,
        ..OutputFilter::default()
    }
}

async fn an_unreadable_row_does_not_break_the_list(world: World) {
    let years = Duration::from_secs(55_000 * 366 * 24 * 60 * 60);
    let outputs = [
        new_output("e1", 0, LONG),
        new_output("e1", 1, years),
        new_output("e1", 2, LONG),
    ];
    append(&world, &outputs, LEASE).await;
    let listed = world.store.outputs(&unpublished()).await.unwrap();
    assert_eq!(
        listed
            .iter()
            .map(|output| output.state.as_str())
            .collect::<Vec<_>>(),
        ["delayed"; 3]
    );
    assert_eq!(listed[1].due_at, jiff::Timestamp::MAX);
    let record = world.store.output(listed[1].number).await.unwrap().unwrap();
    assert_eq!(
        (record.summary.id, record.summary.due_at),
        (outputs[1].id.clone(), jiff::Timestamp::MAX)
    );
}

async fn an_unreadable_row_blocks_no_other_key(world: World) {
    let rows = append(
        &world,
        &[
            new_output("e1", 0, NOW),
            new_output("e1", 1, NOW),
            new_output("e1", 2, NOW),
        ],
        SHORT,
    )
    .await;
    world
        .execute_directly(&format!(
            "update oncely.outbox set headers = '[[1]]' where seq = {}",
            rows[1].seq
        ))
        .await;
    let leased = lease(&world, LEASE).await;
    assert_eq!(leased, [rows[0].clone(), rows[2].clone()]);
    let listed = world
        .store
        .outputs(&OutputFilter {
            limit: 100,
            ..OutputFilter::default()
        })
        .await
        .unwrap();
    let aside: Vec<_> = listed
        .iter()
        .map(|output| (output.number, output.state.as_str()))
        .collect();
    assert_eq!(aside, [(rows[1].seq, "parked")]);
    let error = listed[0].error.clone().unwrap_or_default();
    assert!(error.contains("the row is unreadable"), "{error}");
}

async fn an_unreadable_row_blocks_later_outputs_of_its_key(world: World) {
    let keyed = |ordinal, key: &str| Output {
        ordering_key: Some(key.to_owned()),
        ..new_output("e1", ordinal, Duration::from_millis(100))
    };
    append(
        &world,
        &[
            keyed(0, "k"),
            keyed(1, "k"),
            keyed(2, "other"),
            keyed(3, "k"),
        ],
        SHORT,
    )
    .await;
    let mut numbers: Vec<i64> = world
        .store
        .outputs(&unpublished())
        .await
        .unwrap()
        .iter()
        .map(|output| output.number)
        .collect();
    numbers.sort_unstable();
    world
        .execute_directly(&format!(
            "update oncely.outbox set headers = '[[1]]' where seq = {}",
            numbers[1]
        ))
        .await;

    // All of them are due and leased in one poll.
    tokio::time::sleep(Duration::from_millis(150)).await;
    let leased: Vec<i64> = lease(&world, LEASE)
        .await
        .iter()
        .map(|row| row.seq)
        .collect();
    assert_eq!(leased, [numbers[0], numbers[2]]);
    let listed = world.store.outputs(&unpublished()).await.unwrap();
    let last = listed
        .iter()
        .find(|output| output.number == numbers[3])
        .unwrap();
    assert_eq!(
        (last.state.as_str(), last.blocked_by),
        ("blocked", Some(numbers[1]))
    );
}

async fn two_polls_never_lease_the_same_output(world: World) {
    let outputs: Vec<_> = (0..60)
        .map(|ordinal| new_output("e1", ordinal, NOW))
        .collect();
    append(&world, &outputs, SHORT).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let polls: Vec<_> = (0..4)
        .map(|_| {
            let store = std::sync::Arc::clone(&world.store);
            tokio::spawn(async move {
                let mut seqs = Vec::new();
                for _ in 0..20 {
                    let rows = store.lease_outputs(7, LEASE).await.unwrap();
                    seqs.extend(rows.into_iter().map(|row| row.seq));
                }
                seqs
            })
        })
        .collect();
    let mut seqs = Vec::new();
    for poll in polls {
        seqs.extend(poll.await.unwrap());
    }
    assert_eq!(seqs.len(), 60);
    seqs.sort_unstable();
    seqs.dedup();
    assert_eq!(seqs.len(), 60);
}

async fn an_output_with_a_taken_id_gets_the_next_id(world: World) {
    let row = append(&world, &[new_output("e1", 0, NOW)], LEASE)
        .await
        .remove(0);
    let taken = |id: &str| {
        (
            row.seq,
            Unpublished::IdTaken {
                taken: id.to_owned(),
                error: "taken".to_owned(),
            },
        )
    };

    // The next id
    world
        .store
        .release_outputs(&[taken(&row.id)])
        .await
        .unwrap();
    let second = lease(&world, LEASE).await.remove(0);
    let ids = world.store.output_ids();
    assert_eq!(
        (second.id.as_str(), second.output_id()),
        (ids.next_id(&row.id).as_str(), "payments:e1:0")
    );
    assert_eq!((second.seq, second.failures), (row.seq, 1));

    // A host that detects it late changes nothing.
    world
        .store
        .release_outputs(&[taken(&row.id)])
        .await
        .unwrap();
    assert!(
        world
            .store
            .lease_outputs(100, LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    let listed = world.store.output(row.seq).await.unwrap().unwrap().summary;
    assert_eq!(
        (listed.id.as_str(), listed.message_id),
        ("payments:e1:0", second.id.clone())
    );
    assert_eq!(
        world.store.taken_ids().await.unwrap(),
        [(super::WORKER.to_owned(), 1)].into()
    );

    // A published output keeps its id.
    let place = Published {
        seq: row.seq,
        stream: "OUT".to_owned(),
        stream_sequence: 1,
    };
    world.store.mark_published(&[place]).await.unwrap();
    world
        .store
        .release_outputs(&[taken(&second.id)])
        .await
        .unwrap();
    assert_eq!(
        world
            .store
            .output(row.seq)
            .await
            .unwrap()
            .unwrap()
            .summary
            .message_id,
        second.id
    );
}
