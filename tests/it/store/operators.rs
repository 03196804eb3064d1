//! Acts of operators: skipped messages, jobs, pauses, activities.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use oncely::model::verdict::Reason;
use oncely::store::{
    ActivityFilter, Actor, Attribution, Claim, Claimed, JobAction, JobState, NewActivity,
    NewJobItem, NewRedriveJob, StoreError,
};
use serde_json::json;

use super::{WORKER, World, claim, new_claim, new_dead_letter};

on_every_database!(
    a_skip_waits_for_a_claim_and_leaves_it,
    a_skipped_event_is_settled_and_recorded,
    a_chunk_of_a_job_is_run_by_its_leaseholder_once,
    a_job_refuses_dead_letters_redriven_since_its_creation,
    the_pause_of_a_worker_ends_with_its_retirement,
);

fn ada() -> Actor {
    Actor {
        name: "ada".to_owned(),
        token: None,
        stated_name: Some("Ada\0 L.".to_owned()),
    }
}

fn by_ada() -> Attribution {
    Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: Some("why".to_owned()),
    }
}

async fn begin_skip(world: &World) -> i64 {
    let activity = NewActivity {
        verb: "skip",
        worker: Some(WORKER.to_owned()),
        object: String::new(),
        details: json!({ "to": 9 }),
    };
    world.store.begin_activity(&ada(), &activity).await.unwrap()
}

/// A message at a sequence of the stream ORDERS.
fn message(event_id: &str, sequence: u64) -> Claim {
    Claim {
        origin: Some(("ORDERS".to_owned(), sequence)),
        ..new_claim(event_id, 1)
    }
}

async fn a_skip_waits_for_a_claim_and_leaves_it(world: World) {
    let activity = begin_skip(&world).await;
    let mut delivery = world.begin().await;
    claim(&mut delivery, "e2", 1).await;
    let store = Arc::clone(&world.store);
    let mut skip = tokio::spawn(async move {
        let messages = [message("e1", 1), message("e2", 2), message("e3", 3)];
        store.skip(activity, WORKER, "ORDERS", &messages).await
    });
    assert!(
        tokio::time::timeout(Duration::from_millis(300), &mut skip)
            .await
            .is_err(),
        "the skip did not wait"
    );
    delivery.commit().await.unwrap();
    let skipped = skip.await.unwrap().unwrap();
    assert_eq!(skipped.sequences, [(1, 1), (3, 3)]);
    assert_eq!((skipped.skipped, skipped.settled), (2, 1));
    for event_id in ["e1", "e2", "e3"] {
        assert!(matches!(
            world.claim_and_roll_back(event_id, 1).await,
            Claimed::Settled(_)
        ));
    }
}

async fn a_skipped_event_is_settled_and_recorded(world: World) {
    let (dead_letter, notice) = new_dead_letter("e4", b"dead", Reason::Rejected);
    world.dead_letter(&[(dead_letter, notice)]).await.unwrap();
    let activity = begin_skip(&world).await;
    // Two copies of an event, a dead one, and an id of another message.
    let messages = [
        message("e1", 1),
        message("e1", 2),
        message("e2", 3),
        message("e4", 4),
    ];
    let skipped = world
        .store
        .skip(activity, WORKER, "ORDERS", &messages)
        .await
        .unwrap();
    assert_eq!(skipped.sequences, [(1, 1), (3, 3)]);
    assert_eq!((skipped.skipped, skipped.settled), (2, 2));

    // No other body takes the event id, and a second skip adds nothing.
    assert!(matches!(
        world.claim_and_roll_back("e1", 2).await,
        Claimed::OtherPayload
    ));
    let again = begin_skip(&world).await;
    let skipped = world
        .store
        .skip(again, WORKER, "ORDERS", &messages)
        .await
        .unwrap();
    assert_eq!((skipped.skipped, skipped.settled), (0, 4));

    // The record has the exact sequences, and is written once.
    let filter = ActivityFilter {
        worker: Some(WORKER.to_owned()),
        limit: 10,
        ..ActivityFilter::default()
    };
    let recorded = world.store.activities(&filter).await.unwrap();
    assert_eq!(recorded.len(), 2);
    let first = &recorded[1];
    assert_eq!(
        (
            first.actor.as_str(),
            first.stated_name.as_deref(),
            first.outcome.as_deref()
        ),
        ("ada", Some("Ada\u{fffd} L."), Some("done"))
    );
    let result = first.result.clone().unwrap_or_default();
    assert_eq!(result["sequences"], json!([[1, 1], [3, 3]]));
    assert_eq!(world.count_directly("oncely.inbox").await, 3);
}

/// Writes dead letters, and creates a job for them.
async fn job_of(world: &World, events: &[&'static str]) -> i64 {
    for event_id in events {
        let (dead_letter, notice) =
            new_dead_letter(event_id, event_id.as_bytes(), Reason::Rejected);
        world.dead_letter(&[(dead_letter, notice)]).await.unwrap();
    }
    let count = i64::try_from(events.len()).unwrap();
    let job = NewRedriveJob {
        dead_letters: (1..=count)
            .map(|id| NewJobItem {
                id,
                generation: None,
                preconditions: None,
            })
            .collect(),
        rate: 0,
        again: false,
        note: None,
    };
    let created = world.store.create_redrive_job(&job, &ada()).await.unwrap();
    assert_eq!(
        (created.total, created.state),
        (events.len() as u64, JobState::Running)
    );
    created.id
}

async fn a_chunk_of_a_job_is_run_by_its_leaseholder_once(world: World) {
    let id = job_of(&world, &["e1", "e2", "e3"]).await;
    let leased = world.store.lease_redrive_job(7).await.unwrap().unwrap();
    assert_eq!(leased.id, id);
    let none = HashMap::new();

    // Another host runs nothing, and neither does anyone while the job is paused.
    let other = world.store.run_redrive_job(id, 8, &[0], &none).await;
    assert!(other.unwrap().is_none());
    let change = |action| world.store.change_redrive_job(id, action);
    change(JobAction::Pause).await.unwrap();
    let paused = world.store.run_redrive_job(id, 7, &[0], &none).await;
    assert!(paused.unwrap().is_none());
    change(JobAction::Resume).await.unwrap();

    // A chunk is redriven once, however often it is run.
    let leased = world.store.lease_redrive_job(7).await.unwrap();
    assert!(leased.is_some());
    for outputs in [2, 0] {
        let ran = world.store.run_redrive_job(id, 7, &[0, 1], &none).await;
        assert_eq!(ran.unwrap().map(|rows| rows.len()), Some(outputs));
    }
    let why = HashMap::from([(3, "it changed".to_owned())]);
    let ran = world.store.run_redrive_job(id, 7, &[2], &why).await;
    assert_eq!(ran.unwrap().map(|rows| rows.len()), Some(0));
    let job = world.store.redrive_job(id).await.unwrap().unwrap();
    assert_eq!(
        (job.state, job.redriven, job.refused),
        (JobState::Done, 2, 1)
    );
    let items = world.store.redrive_job_items(id, 0, 10).await.unwrap();
    let refused: Vec<Option<String>> = items
        .into_iter()
        .map(|item| item.result.and_then(|result| result.refused))
        .collect();
    assert_eq!(refused, [None, None, Some("it changed".to_owned())]);
    let ended = change(JobAction::Cancel).await;
    assert!(matches!(ended, Err(StoreError::Refused(_))));
    assert!(world.store.lease_redrive_job(7).await.unwrap().is_none());
}

async fn a_job_refuses_dead_letters_redriven_since_its_creation(world: World) {
    let id = job_of(&world, &["e1"]).await;
    world.store.lease_redrive_job(7).await.unwrap();
    let redrive = oncely::store::Redrive {
        id: 1,
        generation: None,
        again: false,
    };
    world.store.redrive(&[redrive], &by_ada()).await.unwrap();

    // It dies again before the job reaches it.
    let open = "update oncely.dead_letter set state = 'open'";
    world.execute_directly(open).await;
    let none = HashMap::new();
    let ran = world.store.run_redrive_job(id, 7, &[0], &none).await;
    assert_eq!(ran.unwrap().map(|rows| rows.len()), Some(0));
    let items = world.store.redrive_job_items(id, 0, 10).await.unwrap();
    let result = items[0].result.clone().unwrap();
    assert_eq!(result.refused.as_deref(), Some("it was redriven since"));
}

async fn the_pause_of_a_worker_ends_with_its_retirement(world: World) {
    let missing = world.store.pause_worker(WORKER, &by_ada()).await.unwrap();
    assert!(missing.is_none());
    world.migrate("1", "create table unused (id integer)").await;
    let paused = world.store.pause_worker(WORKER, &by_ada()).await.unwrap();
    let pause = paused.unwrap();
    assert_eq!(pause.to_string(), "paused by ada: why");

    // A second pause changes nothing, and neither does a new version.
    let again = world.store.pause_worker(WORKER, &by_ada()).await.unwrap();
    assert_eq!(again.as_ref(), Some(&pause));
    world.migrate("2", "create table other (id integer)").await;
    assert_eq!(
        world.store.pauses().await.unwrap(),
        [(WORKER.to_owned(), pause)]
    );
    world.store.retire_worker(WORKER).await.unwrap();
    assert!(world.store.pauses().await.unwrap().is_empty());
    assert!(!world.store.resume_worker(WORKER).await.unwrap());
}
