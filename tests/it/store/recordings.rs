//! The recording of an event's last failed attempt is kept and compared with the previous one.

use bytes::Bytes;
use oncely::model::verdict::Reason;
use oncely::store::{
    Attribution, Claim, CountedAttempt, DeadLetterAction, DeadLetterFilter, DeadLetterState,
    FailedAttempt, Redrive, StoredRecording,
};

use super::retention::retire_everything;
use super::{WORKER, World, new_claim, new_dead_letter};

on_every_database!(
    the_last_recording_is_kept_and_compared_with_the_previous,
    attempts_counted_together_are_compared_with_earlier_ones,
    a_recording_is_deleted_with_its_dead_letter,
    a_recording_is_deleted_when_its_redrive_took_effect,
    a_recording_is_deleted_with_the_attempts_of_a_done_event,
);

/// A failed attempt with the recording `json` and a proof of this number; or without a recording.
fn failed(event_id: &str, record: Option<(&'static str, Option<u8>)>) -> FailedAttempt {
    let kept = |(json, proof): (&'static str, Option<u8>)| StoredRecording {
        json: Bytes::from_static(json.as_bytes()),
        digest: proof.map(|proof| [proof; 32]),
    };
    FailedAttempt {
        event_id: event_id.to_owned(),
        version: 1,
        code: None,
        error: "failed".to_owned(),
        logs: String::new(),
        recording: record.map(kept),
    }
}

impl World {
    async fn count(&self, failed: &[FailedAttempt]) -> Vec<(u32, bool)> {
        let counted = self.store.count_attempts(WORKER, failed).await.unwrap();
        counted
            .into_iter()
            .map(
                |CountedAttempt {
                     attempt,
                     is_repeat: repeats,
                 }| (attempt, repeats),
            )
            .collect()
    }

    async fn recording(&self, event_id: &str) -> Option<String> {
        let json = self
            .store
            .attempt_recording(WORKER, event_id)
            .await
            .unwrap();
        json.map(|json| String::from_utf8(json.to_vec()).unwrap())
    }
}

async fn the_last_recording_is_kept_and_compared_with_the_previous(world: World) {
    for (record, repeats) in [
        (Some(("one", Some(1))), false),
        (Some(("two", Some(1))), true),
        (Some(("three", Some(2))), false),
        (Some(("four", None)), false),
        (Some(("five", None)), false),
        (Some(("six", Some(2))), false),
        (None, false),
        // After a gap, there is no recording for comparison.
        (Some(("eight", Some(2))), false),
        (Some(("nine", Some(2))), true),
    ] {
        let counted = world.count(&[failed("e1", record)]).await;
        assert_eq!(counted[0].1, repeats, "{record:?}");
        assert_eq!(
            world.recording("e1").await.as_deref(),
            record.map(|(json, _)| json)
        );
    }
    assert_eq!(world.recording("e2").await, None);

    // Another worker's attempts are separate.
    let other = world
        .store
        .count_attempts("another", &[failed("e1", Some(("nine", Some(2))))])
        .await
        .unwrap();
    assert_eq!(
        other,
        [CountedAttempt {
            attempt: 1,
            is_repeat: false
        }]
    );
}

async fn attempts_counted_together_are_compared_with_earlier_ones(world: World) {
    let first = [
        failed("a", Some(("a1", Some(1)))),
        failed("b", Some(("b1", Some(2)))),
        failed("c", None),
    ];
    assert_eq!(
        world.count(&first).await,
        [(1, false), (1, false), (1, false)]
    );
    let second = [
        failed("c", Some(("c2", Some(3)))),
        failed("b", Some(("b2", Some(9)))),
        failed("a", Some(("a2", Some(1)))),
        failed("d", Some(("d1", None))),
    ];
    assert_eq!(
        world.count(&second).await,
        [(2, false), (2, false), (2, true), (1, false)]
    );
    for (event_id, record) in [("a", "a2"), ("b", "b2"), ("c", "c2"), ("d", "d1")] {
        assert_eq!(world.recording(event_id).await.as_deref(), Some(record));
    }

    // Large ones, too.
    let large: &'static str = Box::leak("x".repeat(3 << 20).into_boxed_str());
    assert_eq!(
        world.count(&[failed("a", Some((large, Some(1))))]).await,
        [(3, true)]
    );
    assert_eq!(
        world.recording("a").await.map(|record| record.len()),
        Some(large.len())
    );
}

async fn a_recording_is_deleted_with_its_dead_letter(world: World) {
    for event_id in ["resolved", "dropped", "open"] {
        world.count(&[failed(event_id, Some(("it", None)))]).await;
        world
            .dead_letter(&[new_dead_letter(
                event_id,
                b"body",
                Reason::AttemptsExhausted,
            )])
            .await
            .unwrap();
    }

    // A dead letter for a reused event id has no attempts of its own.
    world
        .dead_letter(&[new_dead_letter("open", b"another body", Reason::IdReuse)])
        .await
        .unwrap();

    // Only closing a dead letter deletes its recording.
    let filter = DeadLetterFilter {
        limit: 10,
        ..DeadLetterFilter::default()
    };
    let dead_letters = world.store.dead_letters(&filter).await.unwrap();
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    for dead_letter in dead_letters {
        let (what, closes) = match (dead_letter.event_id.as_str(), dead_letter.reason.as_str()) {
            ("resolved", _) => (DeadLetterAction::Resolve, true),
            ("dropped", _) => (DeadLetterAction::Drop, true),
            (_, "id-reuse") => (DeadLetterAction::Resolve, false),
            _ => (
                DeadLetterAction::Edit(Bytes::from_static(b"corrected")),
                false,
            ),
        };
        let moved = world
            .store
            .update_dead_letters(&[dead_letter.id], &what, &by)
            .await
            .unwrap();
        assert!(
            moved
                .iter()
                .all(|moved| moved.refused.is_none() || dead_letter.reason == "id-reuse"),
            "{moved:?}"
        );
        assert_eq!(
            world.recording(&dead_letter.event_id).await.is_none(),
            closes,
            "{} {}",
            dead_letter.event_id,
            dead_letter.reason
        );
    }
}

async fn a_recording_is_deleted_when_its_redrive_took_effect(world: World) {
    world.count(&[failed("e1", Some(("it", None)))]).await;
    let dead_letter = new_dead_letter("e1", b"", Reason::AttemptsExhausted);
    let payload = dead_letter.0.message.payload_sha256();
    world.dead_letter(&[dead_letter]).await.unwrap();
    let filter = DeadLetterFilter {
        limit: 10,
        ..DeadLetterFilter::default()
    };
    let id = world.store.dead_letters(&filter).await.unwrap()[0].id;
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    world
        .store
        .redrive(
            &[Redrive {
                id,
                generation: None,
                again: false,
            }],
            &by,
        )
        .await
        .unwrap();
    assert!(world.recording("e1").await.is_some());
    let mut tx = world.begin().await;
    tx.claim(&[Claim {
        payload_sha256: payload,
        redriven: true,
        ..new_claim("e1", 1)
    }])
    .await
    .unwrap();
    tx.commit().await.unwrap();
    retire_everything(&world).await;
    assert_eq!(world.recording("e1").await, None);
    let dead_letter = world.store.find_dead_letter(id).await.unwrap().unwrap();
    assert_eq!(
        (dead_letter.summary.state, dead_letter.attempts.len()),
        (DeadLetterState::Done, 1)
    );
}

async fn a_recording_is_deleted_with_the_attempts_of_a_done_event(world: World) {
    world
        .count(&[
            failed("e1", Some(("it", None))),
            failed("e2", Some(("it", None))),
        ])
        .await;
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    tx.commit().await.unwrap();
    assert!(world.recording("e1").await.is_some());
    world
        .dead_letter(&[new_dead_letter("e2", b"", Reason::AttemptsExhausted)])
        .await
        .unwrap();
    retire_everything(&world).await;
    assert_eq!(
        (world.recording("e1").await, world.recording("e2").await),
        (None, Some("it".to_owned()))
    );
}
