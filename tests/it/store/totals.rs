//! Counts for people, and rows that have had their time.

use std::time::Duration;

use oncely::store::{Claimed, FailedAttempt, Published, WorkerTotals};
use oncely::verdict::Reason;

use super::{LEASE, WORKER, World, a_claim, a_letter, an_output};

on_every_database!(totals_count_what_each_worker_did, pruning_takes_what_is_old_and_leaves_the_dead);

async fn totals_count_what_each_worker_did(world: World) {
    world.migrate("1.sql", "create table t (a integer)").await;
    let mut tx = world.begin().await;
    tx.claim(&[a_claim("e1", 1), a_claim("e2", 1)]).await.unwrap();
    let outputs = [an_output("e1", 0, Duration::ZERO), an_output("e1", 1, Duration::from_secs(60))];
    tx.append_outputs(&outputs, LEASE).await.unwrap();
    tx.commit().await.unwrap();
    let mut letter = a_letter("e3", b"", Reason::Rejected);
    letter.0.worker = "another".to_owned();
    world.bury(&[letter]).await.unwrap();
    let mut totals = world.store.totals().await.unwrap();
    for total in &mut totals {
        assert!(total.oldest_unpublished_ms.take().unwrap() < 20_000);
    }
    let another =
        WorkerTotals { worker: "another".to_owned(), dead: 1, outputs: 1, unpublished: 1, ..WorkerTotals::default() };
    let payments =
        WorkerTotals { worker: WORKER.to_owned(), done: 2, outputs: 2, unpublished: 2, ..WorkerTotals::default() };
    assert_eq!(totals, [another, payments]);
}

async fn pruning_takes_what_is_old_and_leaves_the_dead(world: World) {
    let failed = |event_id: &str| FailedAttempt {
        event_id: event_id.to_owned(),
        version: 1,
        code: None,
        error: String::new(),
        logs: String::new(),
    };
    world.store.count_attempts(WORKER, &[failed("e1"), failed("dead")]).await.unwrap();
    let mut tx = world.begin().await;
    tx.claim(&[a_claim("e1", 1), a_claim("e2", 1), a_claim("e3", 1)]).await.unwrap();
    let outputs = [an_output("e1", 0, Duration::ZERO), an_output("e1", 1, Duration::ZERO)];
    let rows = tx.append_outputs(&outputs, LEASE).await.unwrap();
    tx.commit().await.unwrap();
    let (_, notices) = world.bury(&[a_letter("dead", b"", Reason::Rejected)]).await.unwrap();
    let place = |seq| Published { seq, stream: "PAYMENTS".to_owned(), stream_sequence: 1 };
    world.store.mark_published(&[place(rows[0].seq), place(notices[0].seq)]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;

    let hour = Duration::from_secs(3600);
    assert_eq!(world.store.prune(hour, hour, 100).await.unwrap(), 0);
    let soon = Duration::from_millis(1);
    assert_eq!(world.store.prune(soon, soon, 2).await.unwrap(), 4);
    assert_eq!(world.store.prune(soon, soon, 2).await.unwrap(), 1);
    assert_eq!(world.store.prune(soon, soon, 2).await.unwrap(), 0);
    let totals = world.store.totals().await.unwrap();
    assert_eq!((totals[0].done, totals[0].dead, totals[0].outputs), (0, 1, 1));
    assert!(matches!(world.look("e1", 1).await, Claimed::Fresh { attempts: 0 }));
    assert!(matches!(world.look("dead", 1).await, Claimed::OtherPayload));
}
