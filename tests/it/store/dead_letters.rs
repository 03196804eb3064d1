//! A message is done or dead: never both, never neither.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oncely::model::message::Redriven;
use oncely::model::verdict::{DeadLetter, Reason};
use oncely::store::{
    Attribution, Claim, Claimed, DeadLetterAction, DeadLetterFilter, DeadLetterState,
    FailedAttempt, Redrive, RedriveLookup,
};

use super::retention::retire_everything;
use super::{WORKER, World, new_claim, new_dead_letter};

on_every_database!(
    a_message_is_dead_lettered_once_with_its_notice,
    a_done_event_cannot_be_dead_lettered,
    a_reused_event_id_is_dead_lettered_beside_its_owner,
    a_dead_letter_shows_its_attempts,
    dead_letters_are_listed_newest_first_with_filters,
    a_dead_letter_is_redriven_once_by_concurrent_calls,
    a_redriven_message_is_read_until_it_is_out_of_date,
    a_dead_letter_is_read_for_its_own_worker_only,
    a_message_that_dies_again_is_the_same_dead_letter,
    a_redriven_event_id_is_refused_for_other_bodies,
    a_dead_letter_in_flight_closes_only_without_an_effect,
    a_crash_marker_counts_until_it_is_cleared,
);

fn all() -> DeadLetterFilter {
    DeadLetterFilter {
        limit: 100,
        ..DeadLetterFilter::default()
    }
}

async fn a_message_is_dead_lettered_once_with_its_notice(world: World) {
    let dead_letters = [
        new_dead_letter("e1", b"body", Reason::Rejected),
        new_dead_letter("e2", b"body", Reason::Rejected),
    ];
    let (settled, notices) = world.dead_letter(&dead_letters).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 2));
    assert_eq!(notices[0].output_id(), dead_letters[0].1.id);
    let (settled, notices) = world
        .dead_letter(&[dead_letters[0].clone(), dead_letters[0].clone()])
        .await
        .unwrap();
    assert_eq!((settled.len(), notices.len()), (2, 0));
    let (_, notices) = world
        .dead_letter(&vec![new_dead_letter("e3", b"body", Reason::Rejected); 2])
        .await
        .unwrap();
    assert_eq!(notices.len(), 1);
    assert_eq!(world.store.dead_letters(&all()).await.unwrap().len(), 3);
    assert!(
        world
            .store
            .lease_outputs(100, super::LEASE)
            .await
            .unwrap()
            .is_empty()
    );
    let mut tx = world.begin().await;
    let mut claim = new_claim("e1", 0);
    claim.payload_sha256 = dead_letters[0].0.message.payload_sha256();
    assert!(matches!(
        tx.claim(&[claim]).await.unwrap()[0],
        Claimed::Settled(_)
    ));
    tx.rollback().await;
}

async fn a_done_event_cannot_be_dead_lettered(world: World) {
    let dead_letter = new_dead_letter("e1", b"body", Reason::AttemptsExhausted);
    let mut claim = new_claim("e1", 0);
    claim.payload_sha256 = dead_letter.0.message.payload_sha256();
    let mut tx = world.begin().await;
    tx.claim(&[claim]).await.unwrap();
    tx.commit().await.unwrap();
    let (settled, notices) = world.dead_letter(&[dead_letter]).await.unwrap();
    assert_eq!((settled.len(), notices.len()), (1, 0));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead), (1, 0));
}

async fn a_reused_event_id_is_dead_lettered_beside_its_owner(world: World) {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    let reuse = [
        new_dead_letter("e1", b"one", Reason::IdReuse),
        new_dead_letter("e1", b"two", Reason::IdReuse),
    ];
    assert_eq!(world.dead_letter(&reuse).await.unwrap().1.len(), 2);
    assert_eq!(world.dead_letter(&reuse).await.unwrap().1.len(), 0);
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Settled(_)
    ));
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead), (1, 2));
}

async fn a_dead_letter_shows_its_attempts(world: World) {
    let attempt = |error: &str| FailedAttempt {
        event_id: "e1".to_owned(),
        version: 3,
        code: Some("card-declined".to_owned()),
        error: error.to_owned(),
        logs: "line".to_owned(),
        recording: None,
    };
    world
        .store
        .count_attempts(WORKER, &[attempt("first")])
        .await
        .unwrap();
    world
        .store
        .count_attempts(WORKER, &[attempt("second")])
        .await
        .unwrap();
    let (dead_lettered, notice) = new_dead_letter("e1", b"\x00\xff", Reason::AttemptsExhausted);
    world
        .dead_letter(&[(dead_lettered.clone(), notice)])
        .await
        .unwrap();
    let id = world.store.dead_letters(&all()).await.unwrap()[0].id;
    let dead_letter = world.store.find_dead_letter(id).await.unwrap().unwrap();
    assert_eq!(
        (dead_letter.headers, dead_letter.body),
        (dead_lettered.message.headers, dead_lettered.message.body)
    );
    assert_eq!(
        (
            dead_letter.summary.stream.as_deref(),
            dead_letter.summary.stream_sequence
        ),
        (Some("ORDERS"), Some(9))
    );
    assert_eq!(
        (
            dead_letter.summary.reason.as_str(),
            dead_letter.summary.attempts
        ),
        ("attempts-exhausted", 2)
    );
    assert_eq!(dead_letter.summary.detail, "the card was declined\u{fffd}");
    let attempts: Vec<_> = dead_letter
        .attempts
        .iter()
        .map(|attempt| (attempt.attempt, attempt.error.as_str()))
        .collect();
    assert_eq!(attempts, [(1, "first"), (2, "second")]);
    assert!(
        world
            .store
            .find_dead_letter(id + 1)
            .await
            .unwrap()
            .is_none()
    );
}

async fn dead_letters_are_listed_newest_first_with_filters(world: World) {
    for (event_id, reason) in [
        ("e1", Reason::Rejected),
        ("e2", Reason::IdReuse),
        ("e3", Reason::Rejected),
    ] {
        world
            .dead_letter(&[new_dead_letter(event_id, b"", reason)])
            .await
            .unwrap();
    }
    let ids = async |filter: DeadLetterFilter| {
        let dead_letters = world.store.dead_letters(&filter).await.unwrap();
        dead_letters
            .into_iter()
            .map(|dead_letter| dead_letter.event_id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(all()).await, ["e3", "e2", "e1"]);
    assert_eq!(
        ids(DeadLetterFilter { limit: 2, ..all() }).await,
        ["e3", "e2"]
    );
    assert_eq!(
        ids(DeadLetterFilter {
            reason: Some("rejected".to_owned()),
            ..all()
        })
        .await,
        ["e3", "e1"]
    );
    assert_eq!(
        ids(DeadLetterFilter {
            worker: Some("another".to_owned()),
            ..all()
        })
        .await,
        [""; 0]
    );
}

async fn a_crash_marker_counts_until_it_is_cleared(world: World) {
    for before in 0..3 {
        assert_eq!(
            world.store.write_crash_marker(WORKER, "e1").await.unwrap(),
            before
        );
    }
    assert_eq!(
        world
            .store
            .write_crash_marker("another", "e1")
            .await
            .unwrap(),
        0
    );
    world.store.clear_crash_marker(WORKER, "e1").await.unwrap();
    assert_eq!(
        world.store.write_crash_marker(WORKER, "e1").await.unwrap(),
        0
    );
}

fn ada() -> Attribution {
    Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: Some("why".to_owned()),
    }
}

fn redrive_of(id: i64) -> Redrive {
    Redrive {
        id,
        generation: None,
        again: false,
    }
}

/// Dead-letters `e1` and returns its id and the claim of its redriven message.
async fn dead_lettered(world: &World) -> (i64, Claim) {
    let dead_letter = new_dead_letter("e1", b"body", Reason::Rejected);
    let payload_sha256 = dead_letter.0.message.payload_sha256();
    world.dead_letter(&[dead_letter]).await.unwrap();
    let id = world.store.dead_letters(&all()).await.unwrap()[0].id;
    (
        id,
        Claim {
            payload_sha256,
            redriven: true,
            ..new_claim("e1", 0)
        },
    )
}

async fn state(world: &World, id: i64) -> DeadLetterState {
    world
        .store
        .find_dead_letter(id)
        .await
        .unwrap()
        .unwrap()
        .summary
        .state
}

async fn a_dead_letter_is_redriven_once_by_concurrent_calls(world: World) {
    let (id, claim) = dead_lettered(&world).await;
    let (one, other) = tokio::join!(
        async {
            world
                .store
                .redrive(&[redrive_of(id)], &ada())
                .await
                .unwrap()
        },
        async {
            world
                .store
                .redrive(&[redrive_of(id)], &ada())
                .await
                .unwrap()
        }
    );
    let mut refused: Vec<_> = [&one, &other]
        .iter()
        .map(|(moved, _)| moved[0].refused.clone())
        .collect();
    refused.sort();
    assert_eq!(
        refused,
        [None, Some("its redrive is in progress".to_owned())]
    );
    let rows: Vec<_> = one.1.into_iter().chain(other.1).collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (rows[0].output_id(), rows[0].subject.as_str()),
        ("payments:e1:r1", "oncely.redrive.payments")
    );
    let mut tx = world.begin().await;
    assert!(matches!(
        tx.claim(&[claim]).await.unwrap()[0],
        Claimed::Fresh { .. }
    ));
    tx.rollback().await;
    let (moved, _) = world
        .store
        .redrive(
            &[Redrive {
                generation: Some(7),
                again: true,
                id,
            }],
            &ada(),
        )
        .await
        .unwrap();
    assert_eq!(moved[0].refused.as_deref(), Some("it was redriven since"));
    let (moved, _) = world
        .store
        .redrive(&[redrive_of(999)], &ada())
        .await
        .unwrap();
    assert_eq!(moved[0].refused.as_deref(), Some("no such dead letter"));
    let audit = world
        .store
        .find_dead_letter(id)
        .await
        .unwrap()
        .unwrap()
        .audit;
    assert_eq!(
        (
            audit.len(),
            audit[0].actor.as_str(),
            audit[0].note.as_deref()
        ),
        (1, "ada", Some("why"))
    );
}

async fn a_redriven_message_is_read_until_it_is_out_of_date(world: World) {
    let (id, claim) = dead_lettered(&world).await;
    let attempt = FailedAttempt {
        event_id: "e1".to_owned(),
        version: 3,
        code: None,
        error: "no".to_owned(),
        logs: String::new(),
        recording: None,
    };
    world
        .store
        .count_attempts(WORKER, &[attempt.clone(), attempt])
        .await
        .unwrap();
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 0).await.unwrap(),
        RedriveLookup::OutOfDate(_)
    ));
    world
        .store
        .update_dead_letters(
            &[id],
            &DeadLetterAction::Edit(Bytes::from_static(b"better")),
            &ada(),
        )
        .await
        .unwrap();
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();
    let found = world.store.redriven_message(WORKER, id, 1).await.unwrap();
    let RedriveLookup::Message(message, _) = found else {
        panic!("the pointer is out of date")
    };
    assert_eq!(
        (message.event_id.as_str(), message.body.as_ref()),
        ("e1", &b"better"[..])
    );
    assert_eq!(message.payload_sha256(), claim.payload_sha256);
    assert_eq!(message.attempts_before(), 2);
    assert_eq!(
        message.origin,
        new_dead_letter("e1", b"body", Reason::Rejected)
            .0
            .message
            .origin
    );
    let edit = world
        .store
        .update_dead_letters(&[id], &DeadLetterAction::Edit(Bytes::new()), &ada())
        .await
        .unwrap();
    assert_eq!(
        edit[0].refused.as_deref(),
        Some("its redrive is in progress")
    );
    world
        .store
        .redrive(
            &[Redrive {
                again: true,
                ..redrive_of(id)
            }],
            &ada(),
        )
        .await
        .unwrap();
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 1).await.unwrap(),
        RedriveLookup::OutOfDate(_)
    ));
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 2).await.unwrap(),
        RedriveLookup::Message(..)
    ));
}

async fn a_dead_letter_is_read_for_its_own_worker_only(world: World) {
    let (id, _) = dead_lettered(&world).await;
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();
    for other in ["other", "payment", "payments ", "PAYMENTS", "%", ""] {
        assert!(
            matches!(
                world.store.redriven_message(other, id, 1).await.unwrap(),
                RedriveLookup::OutOfDate(_)
            ),
            "{other}"
        );
    }
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 1).await.unwrap(),
        RedriveLookup::Message(..)
    ));
}

async fn a_message_that_dies_again_is_the_same_dead_letter(world: World) {
    let (id, _) = dead_lettered(&world).await;
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();
    let mut again = new_dead_letter("e1", b"body", Reason::AttemptsExhausted);
    again.0.attempts = 4;
    again.0.message.redriven = redriven_from(&again.0);
    let (_, notices) = world.dead_letter(&[again.clone()]).await.unwrap();
    assert_eq!(notices[0].output_id(), format!("{}:r1", again.1.id));
    let dead_letters = world.store.dead_letters(&all()).await.unwrap();
    assert_eq!(dead_letters.len(), 1);
    let dead_letter = &dead_letters[0];
    assert_eq!(
        (dead_letter.id, dead_letter.state, dead_letter.generation),
        (id, DeadLetterState::Open, 1)
    );
    assert_eq!(
        (dead_letter.reason.as_str(), dead_letter.attempts),
        ("attempts-exhausted", 4)
    );
    assert!(
        world
            .store
            .find_dead_letter(id)
            .await
            .unwrap()
            .unwrap()
            .first_died_at
            .unwrap()
            <= dead_letter.died_at
    );

    // Pointers to its earlier generation are out of date. Repeating the dead letter changes
    // nothing.
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 1).await.unwrap(),
        RedriveLookup::OutOfDate(_)
    ));
    assert_eq!(world.dead_letter(&[again]).await.unwrap().1.len(), 0);
}

async fn a_redriven_event_id_is_refused_for_other_bodies(world: World) {
    let (id, claim) = dead_lettered(&world).await;
    let claimed = |claim: Claim| {
        let world = &world;
        async move {
            let mut tx = world.begin().await;
            let claimed = tx.claim(&[claim]).await.unwrap().remove(0);
            tx.rollback().await;
            claimed
        }
    };
    let copy = || Claim {
        redriven: false,
        ..claim.clone()
    };
    let other = || Claim {
        payload_sha256: [9; 32],
        ..copy()
    };

    // A dead event cannot be claimed without a redrive, regardless of the claim.
    assert!(matches!(claimed(claim.clone()).await, Claimed::Settled(_)));
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();
    for failed_before in [false, true] {
        if failed_before {
            // Its neighbours in the batch take effect, the redriven message does not.
            let mut tx = world.begin().await;
            let claims = [new_claim("e2", 1), claim.clone()];
            assert!(
                tx.claim(&claims)
                    .await
                    .unwrap()
                    .iter()
                    .all(|claimed| matches!(claimed, Claimed::Fresh { .. }))
            );
            tx.release_claims(&["e1".to_owned()]).await.unwrap();
            tx.commit().await.unwrap();
        }
        assert!(matches!(claimed(other()).await, Claimed::OtherPayload));
        assert!(matches!(claimed(copy()).await, Claimed::Settled(_)));
        assert!(matches!(
            claimed(claim.clone()).await,
            Claimed::Fresh { .. }
        ));
    }

    // Another body, or a copy of it, cannot be dead-lettered under the same event id.
    world
        .dead_letter(&[
            new_dead_letter("e1", b"other", Reason::InvalidId),
            new_dead_letter("e1", b"body", Reason::InvalidId),
        ])
        .await
        .unwrap();
    assert_eq!(state(&world, id).await, DeadLetterState::Redriven);
    assert!(matches!(
        claimed(claim.clone()).await,
        Claimed::Fresh { .. }
    ));
    let mut tx = world.begin().await;
    tx.claim(std::slice::from_ref(&claim)).await.unwrap();
    tx.commit().await.unwrap();
    let mut late = new_dead_letter("e1", b"body", Reason::AttemptsExhausted);
    late.0.message.redriven = redriven_from(&late.0);
    assert_eq!(
        world.dead_letter(&[late]).await.unwrap().1.len(),
        0,
        "a done event was dead-lettered"
    );
    assert!(matches!(claimed(claim.clone()).await, Claimed::Settled(_)));
}

/// The redrive of a dead letter's message.
fn redriven_from(dead_letter: &DeadLetter) -> Option<Redriven> {
    Some(Redriven {
        attempts_before: 0,
        payload_sha256: dead_letter.message.payload_sha256(),
    })
}

async fn a_dead_letter_in_flight_closes_only_without_an_effect(world: World) {
    let (id, claim) = dead_lettered(&world).await;
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();

    // While a worker handles the message, closing the dead letter waits for the result.
    let mut tx = world.begin().await;
    tx.claim(std::slice::from_ref(&claim)).await.unwrap();
    let store = Arc::clone(&world.store);
    let closing = tokio::spawn(async move {
        store
            .update_dead_letters(&[id], &DeadLetterAction::Drop, &ada())
            .await
            .unwrap()
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    tx.commit().await.unwrap();
    assert_eq!(
        closing.await.unwrap()[0].refused.as_deref(),
        Some("it took effect since; nothing to do")
    );
    assert_eq!(state(&world, id).await, DeadLetterState::Done);
    assert!(world.store.dead_letters(&all()).await.unwrap().is_empty());

    // The final state is recorded before the inbox row expires.
    retire_everything(&world).await;
    assert_eq!(state(&world, id).await, DeadLetterState::Done);

    let other = new_dead_letter("e2", b"body", Reason::Rejected);
    world.dead_letter(&[other]).await.unwrap();
    let id = world.store.dead_letters(&all()).await.unwrap()[0].id;
    world
        .store
        .redrive(&[redrive_of(id)], &ada())
        .await
        .unwrap();
    assert_eq!(
        world
            .store
            .update_dead_letters(&[id], &DeadLetterAction::Resolve, &ada())
            .await
            .unwrap()[0]
            .refused,
        None
    );
    assert_eq!(state(&world, id).await, DeadLetterState::Resolved);
    assert!(matches!(
        world.store.redriven_message(WORKER, id, 1).await.unwrap(),
        RedriveLookup::OutOfDate(_)
    ));
    let mut tx = world.begin().await;
    let claim = Claim {
        event_id: "e2".to_owned(),
        ..claim
    };
    assert!(matches!(
        tx.claim(&[claim]).await.unwrap()[0],
        Claimed::Settled(_)
    ));
    tx.rollback().await;
}
