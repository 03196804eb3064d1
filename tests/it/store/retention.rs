//! Only expired rows are deleted, and event ids stay unique meanwhile.

use std::sync::Arc;
use std::time::Duration;

use oncely::model::message::Headers;
use oncely::model::verdict::Reason;
use oncely::store::{
    Attribution, Claim, Claimed, DeadLetterFilter, FailedAttempt, OutboxRow, Published, Redrive,
    RetentionPolicy, StoreError,
};

use super::{
    LEASE, TIME, WORKER, World, append_singly, claim, new_claim, new_dead_letter, new_output,
};

on_every_database!(
    expired_rows_are_deleted_and_dead_letters_stay,
    event_ids_stay_unique_during_partition_rotation,
    a_rotation_waits_briefly_for_claims_in_flight,
    events_settled_in_an_earlier_partition_stay_settled,
    unpublished_outputs_outlast_their_partition,
    a_dead_letter_can_be_redriven_after_the_retention,
    an_emptied_partition_frees_its_disk_space,
    the_archive_contains_exactly_the_deleted_rows,
    nothing_is_deleted_if_the_archive_cannot_be_written,
);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Keeps everything for a day.
const FOR_A_DAY: RetentionPolicy = RetentionPolicy {
    outputs: DAY,
    inbox: Some(DAY),
    requests: DAY,
    limit: 100,
    lock_timeout: Duration::from_millis(300),
    archive: None,
};

/// Deletes everything that may be deleted.
pub(super) async fn retire_everything(world: &World) {
    let now = RetentionPolicy {
        outputs: Duration::ZERO,
        inbox: Some(Duration::ZERO),
        ..FOR_A_DAY
    };
    for _ in 0..8 {
        world.store.delete_expired(&now).await.unwrap();
    }
}

/// Ages the current partition by half a day and runs the due rotation.
async fn rotate(world: &World) -> Result<bool, StoreError> {
    if world.is_postgres() {
        let half_a_day =
            "update oncely.partition_rotation set opened_at = opened_at - interval '12 hours'";
        world.execute_directly(half_a_day).await;
    }
    world.store.delete_expired(&FOR_A_DAY).await
}

async fn settle(world: &World, event_id: &str) {
    let mut tx = world.begin().await;
    assert!(
        matches!(claim(&mut tx, event_id, 1).await, Claimed::Fresh { .. }),
        "{event_id}"
    );
    tx.commit().await.unwrap();
}

async fn expired_rows_are_deleted_and_dead_letters_stay(world: World) {
    let failed = |event_id: &str| FailedAttempt {
        event_id: event_id.to_owned(),
        version: 1,
        code: None,
        error: String::new(),
        logs: String::new(),
        recording: None,
    };

    // One row of each kind
    world
        .store
        .count_attempts(WORKER, &[failed("e1"), failed("dead")])
        .await
        .unwrap();
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1), new_claim("e2", 1), new_claim("e3", 1)])
        .await
        .unwrap();
    let outputs = [
        new_output("e1", 0, Duration::ZERO),
        new_output("e1", 1, Duration::ZERO),
    ];
    let rows = append_singly(&mut tx, &outputs, LEASE).await;
    tx.commit().await.unwrap();
    let (_, notices) = world
        .dead_letter(&[new_dead_letter("dead", b"", Reason::Rejected)])
        .await
        .unwrap();
    let place = |seq| Published {
        seq,
        stream: "PAYMENTS".to_owned(),
        stream_sequence: 1,
    };
    world
        .store
        .mark_published(&[place(rows[0].seq), place(notices[0].seq)])
        .await
        .unwrap();

    // Nothing has expired.
    world.store.delete_expired(&FOR_A_DAY).await.unwrap();
    let totals = world.store.totals().await.unwrap();
    assert_eq!(
        (totals[0].done, totals[0].dead, totals[0].outputs),
        (3, 1, 3)
    );

    // The inbox has no limit.
    let for_ever = RetentionPolicy {
        outputs: Duration::ZERO,
        inbox: None,
        ..FOR_A_DAY
    };
    for _ in 0..8 {
        world.store.delete_expired(&for_ever).await.unwrap();
    }
    assert!(
        matches!(
            world.claim_and_roll_back("e1", 1).await,
            Claimed::Settled(_)
        ),
        "the inbox row expired without a limit"
    );

    // Everything expires except dead letters.
    retire_everything(&world).await;
    let totals = world.store.totals().await.unwrap();
    assert_eq!(
        (totals[0].done, totals[0].dead, totals[0].outputs),
        (0, 1, 1)
    );
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { attempts: 0 }
    ));
    assert!(matches!(
        world.claim_and_roll_back("dead", 1).await,
        Claimed::OtherPayload
    ));
}

async fn event_ids_stay_unique_during_partition_rotation(world: World) {
    const CLAIMERS: usize = 4;
    const BATCHES: usize = 40;
    let claimers: Vec<_> = (0..CLAIMERS)
        .map(|claimer| {
            let store = Arc::clone(&world.store);
            tokio::spawn(async move {
                let mut fresh = 0;
                for batch in 0..BATCHES {
                    let ids =
                        (0..10).map(|id| new_claim(&format!("{batch}-{}", (id + claimer) % 10), 1));
                    let claims: Vec<_> = ids.collect();
                    let mut tx = store.begin(WORKER, TIME).await.unwrap();
                    let claimed = tx.claim(&claims).await.unwrap();
                    fresh += claimed
                        .iter()
                        .filter(|claimed| matches!(claimed, Claimed::Fresh { .. }))
                        .count();
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    tx.commit().await.unwrap();
                }
                fresh
            })
        })
        .collect();
    let mut rotations = 0;
    while rotations < 3 {
        // A rotation that waited too long for open transactions is retried.
        match rotate(&world).await {
            Ok(_) => rotations += 1,
            Err(StoreError::Conflict(_)) => {}
            Err(error) => panic!("{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut fresh = 0;
    for claimer in claimers {
        fresh += claimer.await.unwrap();
    }
    assert_eq!(fresh, BATCHES * 10);
    assert_eq!(
        world.store.totals().await.unwrap()[0].done,
        (BATCHES * 10) as u64
    );
}

async fn a_rotation_waits_briefly_for_claims_in_flight(world: World) {
    if !world.is_postgres() {
        return;
    }
    let mut under_way = world.begin().await;
    claim(&mut under_way, "e1", 1).await;
    assert!(matches!(rotate(&world).await, Err(StoreError::Conflict(_))));

    // The rotation gave up, so other claims continue.
    settle(&world, "e2").await;
    let (world, under_way) = (Arc::new(world), under_way);
    let waiting = {
        let world = Arc::clone(&world);
        let patient = RetentionPolicy {
            lock_timeout: Duration::from_secs(20),
            ..FOR_A_DAY
        };
        tokio::spawn(async move { world.store.delete_expired(&patient).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    let held_up = {
        let world = Arc::clone(&world);
        tokio::spawn(async move { world.claim_and_roll_back("e1", 1).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    under_way.commit().await.unwrap();
    assert!(waiting.await.unwrap().unwrap());
    assert!(
        matches!(held_up.await.unwrap(), Claimed::Settled(_)),
        "claimed twice, in two partitions"
    );
}

async fn events_settled_in_an_earlier_partition_stay_settled(world: World) {
    settle(&world, "e1").await;
    let dead_letter = new_dead_letter("dead", b"body", Reason::Rejected);
    world
        .dead_letter(std::slice::from_ref(&dead_letter))
        .await
        .unwrap();
    for _ in 0..2 {
        rotate(&world).await.unwrap();
        assert!(matches!(
            world.claim_and_roll_back("e1", 1).await,
            Claimed::Settled(_)
        ));
        assert!(matches!(
            world.claim_and_roll_back("e1", 2).await,
            Claimed::OtherPayload
        ));
        assert!(matches!(
            world.claim_and_roll_back("dead", 1).await,
            Claimed::OtherPayload
        ));
        assert_eq!(
            world.store.done_events(WORKER, &["e1"]).await.unwrap(),
            ["e1"]
        );
        // Dead-lettering a done or dead event changes nothing.
        let again = [
            new_dead_letter("e1", b"body", Reason::Rejected),
            dead_letter.clone(),
        ];
        assert!(
            world
                .dead_letter(&again)
                .await
                .unwrap()
                .1
                .iter()
                .all(|notice| notice.output_id() != dead_letter.1.id)
        );
    }

    // Releasing a claim does not unsettle a settled event.
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1), new_claim("new", 1)])
        .await
        .unwrap();
    tx.release_claims(&["e1".to_owned(), "new".to_owned()])
        .await
        .unwrap();
    tx.commit().await.unwrap();
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Settled(_)
    ));
    assert!(matches!(
        world.claim_and_roll_back("new", 1).await,
        Claimed::Fresh { .. }
    ));
    assert_eq!(world.store.totals().await.unwrap()[0].done, 1);
}

async fn unpublished_outputs_outlast_their_partition(world: World) {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    let outputs: Vec<_> = (0..4)
        .map(|ordinal| new_output("e1", ordinal, Duration::ZERO))
        .collect();
    let rows = append_singly(&mut tx, &outputs, Duration::from_millis(1)).await;
    tx.commit().await.unwrap();
    let place = |seq| Published {
        seq,
        stream: "PAYMENTS".to_owned(),
        stream_sequence: 1,
    };
    world
        .store
        .mark_published(&[place(rows[0].seq), place(rows[1].seq)])
        .await
        .unwrap();

    // A limit of one row per call moves nothing yet.
    let few = RetentionPolicy {
        outputs: Duration::ZERO,
        inbox: None,
        limit: 1,
        ..FOR_A_DAY
    };
    for _ in 0..8 {
        world.store.delete_expired(&few).await.unwrap();
    }
    if world.is_postgres() {
        assert_eq!(
            world.store.totals().await.unwrap()[0].outputs,
            4,
            "more outputs moved than the limit"
        );
    }

    // The partition is dropped, the unpublished outputs are kept.
    retire_everything(&world).await;
    assert_eq!(world.store.totals().await.unwrap()[0].outputs, 2);
    let leased = world.store.lease_outputs(10, LEASE).await.unwrap();
    let ids: Vec<&str> = leased.iter().map(OutboxRow::output_id).collect();
    assert_eq!(ids, ["payments:e1:2", "payments:e1:3"]);
    let expected: Headers = new_output("e1", 2, Duration::ZERO).headers;
    assert_eq!(leased[0].headers[..expected.len()], expected);
    world
        .store
        .mark_published(&[place(leased[0].seq), place(leased[1].seq)])
        .await
        .unwrap();

    // They expire after their publication.
    retire_everything(&world).await;
    assert_eq!(
        world
            .store
            .totals()
            .await
            .unwrap()
            .iter()
            .map(|totals| totals.outputs)
            .sum::<u64>(),
        0
    );
}

async fn a_dead_letter_can_be_redriven_after_the_retention(world: World) {
    world
        .dead_letter(&[new_dead_letter("dead", b"body", Reason::Rejected)])
        .await
        .unwrap();
    retire_everything(&world).await;
    assert!(matches!(
        world.claim_and_roll_back("dead", 1).await,
        Claimed::OtherPayload
    ));
    let dead_letter = world
        .store
        .dead_letters(&DeadLetterFilter {
            limit: 10,
            ..DeadLetterFilter::default()
        })
        .await
        .unwrap()
        .remove(0);
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    let back = Redrive {
        id: dead_letter.id,
        generation: None,
        again: false,
    };
    let (moved, pointers) = world.store.redrive(&[back], &by).await.unwrap();
    assert_eq!((moved[0].refused.as_deref(), pointers.len()), (None, 1));
    let payload_sha256 = new_dead_letter("dead", b"body", Reason::Rejected)
        .0
        .message
        .payload_sha256();
    let mut tx = world.begin().await;
    tx.claim(&[Claim {
        payload_sha256,
        redriven: true,
        ..new_claim("dead", 1)
    }])
    .await
    .unwrap();
    tx.commit().await.unwrap();
    retire_everything(&world).await;
    let dead_letter = world
        .store
        .find_dead_letter(dead_letter.id)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(dead_letter.summary.state.as_str(), "done");
}

/// A done event, a dead event, and a published output of the first.
async fn rows_in_every_table(world: &World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    let outputs = [
        new_output("e1", 0, Duration::ZERO),
        new_output("e1", 1, Duration::ZERO),
    ];
    let rows = append_singly(&mut tx, &outputs, LEASE).await;
    tx.commit().await.unwrap();
    world
        .dead_letter(&[new_dead_letter("dead", b"", Reason::Rejected)])
        .await
        .unwrap();
    let place = Published {
        seq: rows[0].seq,
        stream: "PAYMENTS".to_owned(),
        stream_sequence: 41,
    };
    world.store.mark_published(&[place]).await.unwrap();
}

async fn the_archive_contains_exactly_the_deleted_rows(world: World) {
    rows_in_every_table(&world).await;
    let archive = world.folder.path().join("archive");
    std::fs::create_dir(&archive).unwrap();
    let now = RetentionPolicy {
        outputs: Duration::ZERO,
        inbox: Some(Duration::ZERO),
        archive: Some(archive.clone()),
        ..FOR_A_DAY
    };
    for _ in 0..8 {
        world.store.delete_expired(&now).await.unwrap();
    }

    // Read the archive files
    let (mut records, mut outputs) = (Vec::new(), Vec::new());
    for file in std::fs::read_dir(&archive).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.ends_with("Z.jsonl.gz"), "{name}");
        let text = std::io::read_to_string(flate2::read::GzDecoder::new(
            std::fs::File::open(&path).unwrap(),
        ))
        .unwrap();
        let rows = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        if name.starts_with("inbox-") {
            records.extend(rows)
        } else {
            outputs.extend(rows)
        }
    }

    // Compare with the deleted rows
    assert_eq!(
        (records.len(), outputs.len()),
        (1, 1),
        "{records:?} {outputs:?}"
    );
    let payload = format!("\\x{}", "01".repeat(32));
    assert_eq!(
        (&records[0]["event_id"], &records[0]["payload_sha256"]),
        (&"e1".into(), &payload.into())
    );
    assert_eq!(
        (
            outputs[0]["id"].as_str().map(str::len),
            &outputs[0]["stream_sequence"]
        ),
        (Some(32), &41.into())
    );
    assert_eq!(outputs[0]["body"], "\\x00ff626f6479");
    let headers = outputs[0]["headers"].as_str().unwrap();
    assert!(
        headers.contains("Ce-Type") && headers.contains("\"payments:e1:0\""),
        "{headers}"
    );
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { .. }
    ));
}

async fn nothing_is_deleted_if_the_archive_cannot_be_written(world: World) {
    rows_in_every_table(&world).await;
    let gone = Some(world.folder.path().join("no such folder"));
    let now = RetentionPolicy {
        outputs: Duration::ZERO,
        inbox: Some(Duration::ZERO),
        archive: gone,
        ..FOR_A_DAY
    };
    let mut failed = None;
    for _ in 0..8 {
        failed = world.store.delete_expired(&now).await.err().or(failed);
    }
    let failed = format!(
        "{:#}",
        anyhow::Error::from(failed.expect("the deletion succeeded"))
    );
    assert!(
        failed.contains("write the archive") && failed.contains("no such folder"),
        "{failed}"
    );
    assert_eq!(
        world.store.totals().await.unwrap()[0].outputs,
        3,
        "with the notice of the dead letter"
    );
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Settled(_)
    ));
}

async fn an_emptied_partition_frees_its_disk_space(world: World) {
    if !world.is_postgres() {
        return;
    }
    let size = async || {
        let mut around = world.connect().await;
        let size = "select sum(pg_total_relation_size(c.oid))::bigint from pg_class as c
             where relname ~ '^(inbox|outbox)_[0-3]$' and relnamespace = 'oncely'::regnamespace";
        sqlx::query_scalar::<_, i64>(size)
            .fetch_one(&mut around)
            .await
            .unwrap()
    };
    let before = size().await;
    for batch in 0..20 {
        let mut tx = world.begin().await;
        let claims: Vec<_> = (0..100)
            .map(|id| new_claim(&format!("{batch}-{id}"), 1))
            .collect();
        tx.claim(&claims).await.unwrap();
        tx.commit().await.unwrap();
    }
    assert!(size().await > before);
    retire_everything(&world).await;
    assert_eq!(size().await, before);
}
