//! Savepoints: the work of one batch item is rolled back, and no other work.

use std::time::Duration;

use oncely::model::sql::{SqlError, Value};
use oncely::store::{Claimed, StoreError};

use super::{LIMITS, World, execute, new_claim, new_output, text};

on_every_database!(
    a_rollback_to_a_savepoint_undoes_only_later_writes,
    a_failed_statement_is_rolled_back_too,
    a_later_savepoint_replaces_an_earlier_one,
    a_lost_transaction_cannot_roll_back_to_a_savepoint,
);

const TABLE: &str = "create table effect (name text primary key)";
const INSERT: &str = "insert into effect values ($1)";

async fn names(world: &World) -> Vec<Vec<Value>> {
    world.rows("select name from effect order by name").await
}

async fn a_rollback_to_a_savepoint_undoes_only_later_writes(world: World) {
    world.migrate("1.sql", TABLE).await;
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("kept", 1), new_claim("undone", 1)])
        .await
        .unwrap();
    tx.savepoint().await.unwrap();
    execute(&mut tx, INSERT, &[text("kept")]).await;
    tx.savepoint().await.unwrap();
    execute(&mut tx, INSERT, &[text("undone")]).await;
    tx.rollback_to_savepoint().await.unwrap();
    tx.release_claims(&["undone".to_owned()]).await.unwrap();
    let rows = tx
        .append_outputs(
            &[new_output("kept", 0, Duration::ZERO)],
            Duration::from_secs(30),
        )
        .await
        .unwrap();
    assert_eq!(rows.len(), 1);
    tx.commit().await.unwrap();
    assert_eq!(names(&world).await, [[text("kept")]]);
    assert!(matches!(
        world.claim_and_roll_back("kept", 1).await,
        Claimed::Settled(_)
    ));
    assert!(matches!(
        world.claim_and_roll_back("undone", 1).await,
        Claimed::Fresh { .. }
    ));
}

async fn a_failed_statement_is_rolled_back_too(world: World) {
    world.migrate("1.sql", TABLE).await;
    let mut tx = world.begin().await;
    execute(&mut tx, INSERT, &[text("a")]).await;
    tx.savepoint().await.unwrap();
    let violated = tx.execute(INSERT, &[text("a")]).await.unwrap();
    assert!(
        matches!(violated, Err(SqlError::ConstraintViolation(_))),
        "{violated:?}"
    );
    let doomed = tx.query("select 1", &[], LIMITS).await.unwrap();
    assert!(
        matches!(doomed, Err(SqlError::TransactionFailed(_))),
        "{doomed:?}"
    );
    tx.rollback_to_savepoint().await.unwrap();
    execute(&mut tx, INSERT, &[text("b")]).await;

    // The savepoint can be used repeatedly.
    assert!(
        tx.execute("insert into nowhere values (1)", &[])
            .await
            .unwrap()
            .is_err()
    );
    tx.rollback_to_savepoint().await.unwrap();
    execute(&mut tx, INSERT, &[text("c")]).await;
    tx.commit().await.unwrap();
    assert_eq!(names(&world).await, [[text("a")], [text("c")]]);
}

async fn a_later_savepoint_replaces_an_earlier_one(world: World) {
    world.migrate("1.sql", TABLE).await;
    let mut tx = world.begin().await;
    for n in 0..100 {
        tx.savepoint().await.unwrap();
        execute(&mut tx, INSERT, &[text(&format!("{n:03}"))]).await;
        if n % 2 == 1 {
            tx.rollback_to_savepoint().await.unwrap();
        }
    }
    tx.commit().await.unwrap();
    assert_eq!(names(&world).await.len(), 50);
}

async fn a_lost_transaction_cannot_roll_back_to_a_savepoint(world: World) {
    let world = world.without_filter().await;
    world.migrate("1.sql", TABLE).await;
    let mut tx = world.begin().await;
    let never_made = tx.rollback_to_savepoint().await;
    assert!(
        matches!(never_made, Err(StoreError::Refused(_))),
        "{never_made:?}"
    );
    tx.rollback().await;
    let mut tx = world.begin().await;
    tx.savepoint().await.unwrap();
    execute(&mut tx, INSERT, &[text("a")]).await;
    let _ = tx.execute("rollback", &[]).await.unwrap();

    // SQLite's statement filter prevents it.
    let gone = tx.rollback_to_savepoint().await;
    match world.is_postgres() {
        true => assert!(matches!(gone, Err(StoreError::Refused(_))), "{gone:?}"),
        false => gone.unwrap(),
    }
    assert_eq!(tx.commit().await.is_ok(), !world.is_postgres());
    assert!(names(&world).await.is_empty());
}
