//! Counts for operators.

use std::time::Duration;

use oncely::model::verdict::Reason;
use oncely::store::WorkerTotals;

use super::{LEASE, WORKER, World, new_claim, new_dead_letter, new_output};

on_every_database!(totals_count_the_work_of_each_worker);

async fn totals_count_the_work_of_each_worker(world: World) {
    world.migrate("1.sql", "create table t (a integer)").await;
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1), new_claim("e2", 1)])
        .await
        .unwrap();
    let outputs = [
        new_output("e1", 0, Duration::ZERO),
        new_output("e1", 1, Duration::from_secs(60)),
    ];
    tx.append_outputs(&outputs, LEASE).await.unwrap();
    tx.commit().await.unwrap();
    let mut dead_letter = new_dead_letter("e3", b"", Reason::Rejected);
    dead_letter.0.worker = "another".to_owned();
    world.dead_letter(&[dead_letter]).await.unwrap();
    let mut totals = world.store.totals().await.unwrap();
    for total in &mut totals {
        assert!(total.oldest_unpublished_ms.take().unwrap() < 20_000);
    }
    let another = WorkerTotals {
        worker: "another".to_owned(),
        dead: 1,
        outputs: 1,
        unpublished: 1,
        ..WorkerTotals::default()
    };
    let payments = WorkerTotals {
        worker: WORKER.to_owned(),
        done: 2,
        outputs: 2,
        unpublished: 2,
        ..WorkerTotals::default()
    };
    assert_eq!(totals, [another, payments]);
}
