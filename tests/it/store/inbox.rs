//! Event ids are claimed once.

use std::sync::Arc;
use std::time::Duration;

use oncely::store::{Claimed, CountedAttempt, FailedAttempt, StoreError};

use super::{TIME, WORKER, World, claim, execute, new_claim};

on_every_database!(
    a_claim_is_fresh_until_its_commit_and_settled_after,
    an_event_id_is_held_for_its_payload,
    claims_are_returned_in_order,
    a_second_claim_waits_and_then_sees_the_first_settled,
    a_second_claim_waits_and_is_fresh_if_the_first_rolls_back,
    batches_that_overlap_never_deadlock,
    a_rollback_leaves_nothing,
    a_dropped_transaction_leaves_no_effect_and_no_open_session,
    released_claims_are_not_kept,
    attempts_are_counted_and_returned_by_the_next_claim,
    event_ids_of_up_to_255_bytes_are_distinct,
    empty_calls_succeed,
);

async fn a_claim_is_fresh_until_its_commit_and_settled_after(world: World) {
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { attempts: 0 }
    ));
    let mut tx = world.begin().await;
    assert!(matches!(
        claim(&mut tx, "e1", 1).await,
        Claimed::Fresh { attempts: 0 }
    ));
    tx.commit().await.unwrap();
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Settled(_)
    ));
    let mut other_worker = world.store.begin("another", TIME).await.unwrap();
    assert!(matches!(
        claim(&mut other_worker, "e1", 1).await,
        Claimed::Fresh { .. }
    ));
    other_worker.rollback().await;
}

async fn an_event_id_is_held_for_its_payload(world: World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    tx.commit().await.unwrap();
    assert!(matches!(
        world.claim_and_roll_back("e1", 2).await,
        Claimed::OtherPayload
    ));
}

async fn claims_are_returned_in_order(world: World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "b", 1).await;
    tx.commit().await.unwrap();
    let mut tx = world.begin().await;
    let mut no_origin = new_claim("a", 1);
    no_origin.origin = None;
    let claimed = tx
        .claim(&[
            new_claim("c", 1),
            new_claim("b", 1),
            no_origin,
            new_claim("B", 1),
        ])
        .await
        .unwrap();
    let fresh: Vec<bool> = claimed
        .iter()
        .map(|claimed| matches!(claimed, Claimed::Fresh { .. }))
        .collect();
    assert_eq!(fresh, [true, false, true, true]);
    tx.rollback().await;
}

async fn a_second_claim_waits_and_then_sees_the_first_settled(world: World) {
    let mut first = world.begin().await;
    claim(&mut first, "e1", 1).await;
    let store = Arc::clone(&world.store);
    let mut second = tokio::spawn(async move {
        let mut second = store.begin(WORKER, TIME).await.unwrap();
        let claimed = second
            .claim(&[new_claim("e0", 1), new_claim("e1", 1), new_claim("e2", 1)])
            .await
            .unwrap();
        second.rollback().await;
        claimed
    });
    assert!(
        tokio::time::timeout(Duration::from_millis(300), &mut second)
            .await
            .is_err(),
        "the second claim did not wait"
    );
    first.commit().await.unwrap();
    let claimed = second.await.unwrap();
    assert!(
        matches!(
            claimed.as_slice(),
            [
                Claimed::Fresh { .. },
                Claimed::Settled(_),
                Claimed::Fresh { .. }
            ]
        ),
        "{claimed:?}"
    );
}

async fn a_second_claim_waits_and_is_fresh_if_the_first_rolls_back(world: World) {
    let mut first = world.begin().await;
    claim(&mut first, "e1", 1).await;
    let store = Arc::clone(&world.store);
    let mut second = tokio::spawn(async move {
        let mut second = store.begin(WORKER, TIME).await.unwrap();
        let claimed = claim(&mut second, "e1", 2).await;
        second.commit().await.unwrap();
        claimed
    });
    assert!(
        tokio::time::timeout(Duration::from_millis(300), &mut second)
            .await
            .is_err(),
        "the second claim did not wait"
    );
    first.rollback().await;
    assert!(matches!(second.await.unwrap(), Claimed::Fresh { .. }));
    assert!(matches!(
        world.claim_and_roll_back("e1", 2).await,
        Claimed::Settled(_)
    ));
}

async fn batches_that_overlap_never_deadlock(world: World) {
    let ids: Vec<String> = (0..40).map(|n| format!("e{n}")).collect();
    let lanes: Vec<_> = (0..4)
        .map(|lane| {
            let (store, mut ids) = (Arc::clone(&world.store), ids.clone());
            tokio::spawn(async move {
                ids.rotate_left(lane * 10);
                if lane % 2 == 1 {
                    ids.reverse();
                }
                let mut fresh = 0;
                for round in 0..10 {
                    let mut tx = store.begin(WORKER, TIME).await.unwrap();
                    let claims: Vec<_> = ids
                        .iter()
                        .map(|id| new_claim(&format!("{round}{id}"), 1))
                        .collect();
                    let claimed = tx.claim(&claims).await.unwrap();
                    fresh += claimed
                        .iter()
                        .filter(|claimed| matches!(claimed, Claimed::Fresh { .. }))
                        .count();
                    tx.commit().await.unwrap();
                }
                fresh
            })
        })
        .collect();
    let mut fresh = 0;
    for lane in lanes {
        fresh += lane.await.unwrap();
    }
    assert_eq!(fresh, 400);
}

async fn a_rollback_leaves_nothing(world: World) {
    world.migrate("1.sql", "create table t (a integer)").await;
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    assert_eq!(
        execute(&mut tx, "insert into t values (1), (2)", &[]).await,
        2
    );
    tx.append_outputs(&[super::new_output("e1", 0, Duration::ZERO)], super::LEASE)
        .await
        .unwrap();
    tx.rollback().await;
    assert!(world.rows("select * from t").await.is_empty());
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { .. }
    ));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].outputs), (0, 0));
}

async fn a_dropped_transaction_leaves_no_effect_and_no_open_session(world: World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    drop(tx);
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { .. }
    ));
    if world.is_postgres() {
        let mut around = world.connect().await;
        let idle = "select count(*) from pg_stat_activity
             where datname = current_database() and state like 'idle in transaction%'";
        let until_none = async {
            while sqlx::query_scalar::<_, i64>(idle)
                .fetch_one(&mut around)
                .await
                .unwrap()
                > 0
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), until_none)
            .await
            .expect("wait until all connections are idle");
    }
}

async fn released_claims_are_not_kept(world: World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "settled", 1).await;
    tx.commit().await.unwrap();
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("a", 1), new_claim("b", 1), new_claim("c", 1)])
        .await
        .unwrap();
    tx.release_claims(&["a", "c", "settled"].map(str::to_owned))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    assert!(matches!(
        world.claim_and_roll_back("settled", 1).await,
        Claimed::Settled(_)
    ));
    assert!(matches!(
        world.claim_and_roll_back("a", 1).await,
        Claimed::Fresh { .. }
    ));
    assert!(matches!(
        world.claim_and_roll_back("b", 1).await,
        Claimed::Settled(_)
    ));
    assert!(matches!(
        world.claim_and_roll_back("c", 1).await,
        Claimed::Fresh { .. }
    ));
}

async fn attempts_are_counted_and_returned_by_the_next_claim(world: World) {
    let failed = |event_id: &str| FailedAttempt {
        event_id: event_id.to_owned(),
        version: 1,
        code: None,
        error: "the card service is down\0".to_owned(),
        logs: "one\ntwo".to_owned(),
        recording: None,
    };
    let counted = |attempt: u32| CountedAttempt {
        attempt,
        is_repeat: false,
    };

    // Counts within a call, over calls, and in the next claim
    let counts = world
        .store
        .count_attempts(WORKER, &[failed("b"), failed("a"), failed("b")])
        .await
        .unwrap();
    assert_eq!(counts, [counted(1), counted(1), counted(2)]);
    assert_eq!(
        world
            .store
            .count_attempts(WORKER, &[failed("b")])
            .await
            .unwrap(),
        [counted(3)]
    );
    assert!(matches!(
        world.claim_and_roll_back("b", 1).await,
        Claimed::Fresh { attempts: 3 }
    ));
    assert!(matches!(
        world.claim_and_roll_back("a", 1).await,
        Claimed::Fresh { attempts: 1 }
    ));

    // Two hosts that count the same event at once may get a conflict, but never lose a count.
    let counting: Vec<_> = (0..8)
        .map(|_| {
            let (store, failed) = (Arc::clone(&world.store), failed("a"));
            tokio::spawn(async move {
                loop {
                    match store
                        .count_attempts(WORKER, std::slice::from_ref(&failed))
                        .await
                    {
                        Ok(counts) => return counts[0].attempt,
                        Err(StoreError::Conflict(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
            })
        })
        .collect();
    let mut counts = Vec::new();
    for count in counting {
        counts.push(count.await.unwrap());
    }
    counts.sort_unstable();
    assert_eq!(counts, (2..10).collect::<Vec<_>>());
}

async fn event_ids_of_up_to_255_bytes_are_distinct(world: World) {
    let longest = "é".repeat(127) + "x";
    let ids = [
        "a",
        "A",
        " a",
        "a ",
        "ä",
        "a\u{308}",
        "'; drop table t --",
        "\"\\u0061\"",
        "123",
        "1.0",
        "null",
        "\u{1F4B6}",
        &longest,
    ];
    let claims: Vec<_> = ids.iter().map(|id| new_claim(id, 1)).collect();
    let mut tx = world.begin().await;
    let claimed = tx.claim(&claims).await.unwrap();
    assert!(
        claimed
            .iter()
            .all(|claimed| matches!(claimed, Claimed::Fresh { .. })),
        "{claimed:?}"
    );
    tx.commit().await.unwrap();
    let mut tx = world.begin().await;
    let claimed = tx.claim(&claims).await.unwrap();
    assert!(
        claimed
            .iter()
            .all(|claimed| matches!(claimed, Claimed::Settled(_))),
        "{claimed:?}"
    );
    tx.rollback().await;
}

async fn empty_calls_succeed(world: World) {
    let mut tx = world.begin().await;
    assert!(tx.claim(&[]).await.unwrap().is_empty());
    tx.release_claims(&[]).await.unwrap();
    assert!(tx.load_state(&[]).await.unwrap().is_empty());
    tx.save_state(&[]).await.unwrap();
    assert!(tx.append_outputs(&[], TIME).await.unwrap().is_empty());
    tx.commit().await.unwrap();
    assert!(
        world
            .store
            .count_attempts(WORKER, &[])
            .await
            .unwrap()
            .is_empty()
    );
    assert!(world.dead_letter(&[]).await.unwrap().1.is_empty());
    world.store.mark_published(&[]).await.unwrap();
    world.store.release_outputs(&[]).await.unwrap();
    world.store.ping().await.unwrap();
}
