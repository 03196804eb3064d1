//! Operations wait for an unavailable database, and nothing is lost or repeated.

use std::time::{Duration, Instant};

use oncely::store::{Claimed, PostgresStore, SqliteStore, Store, StoreError};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Executor};
use support::postgres::Cluster;

use super::{TIME, WORKER, World, claim, new_claim};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_postgres_is_unavailable_and_work_resumes_by_itself() {
    let mut cluster = Cluster::start().unwrap();
    let store = PostgresStore::connect(&cluster.url("postgres"), 4)
        .await
        .map(Store::from)
        .unwrap();
    let mut settled = store.begin(WORKER, TIME).await.unwrap();
    claim(&mut settled, "settled", 1).await;
    settled.commit().await.unwrap();
    let mut open = store.begin(WORKER, TIME).await.unwrap();
    claim(&mut open, "open", 1).await;
    let mut other = store.begin(WORKER, TIME).await.unwrap();
    claim(&mut other, "other", 1).await;
    store.ping().await.unwrap();

    // During the outage every operation fails fast as unavailable.
    cluster.stop().unwrap();
    assert!(matches!(
        open.commit().await,
        Err(StoreError::Unavailable(_))
    ));
    assert!(matches!(
        other.claim(&[new_claim("more", 1)]).await,
        Err(StoreError::Unavailable(_))
    ));
    other.rollback().await;
    let began = Instant::now();
    assert!(matches!(
        store.ping().await,
        Err(StoreError::Unavailable(_))
    ));
    assert!(matches!(
        store.begin(WORKER, TIME).await.err(),
        Some(StoreError::Unavailable(_))
    ));
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );

    // After the restart only the committed claim is settled.
    cluster.start_again().unwrap();
    let mut tx = store.begin(WORKER, TIME).await.unwrap();
    let claims = [
        new_claim("settled", 1),
        new_claim("open", 1),
        new_claim("other", 1),
    ];
    let claimed = tx.claim(&claims).await.unwrap();
    assert!(
        matches!(
            claimed.as_slice(),
            [
                Claimed::Settled(_),
                Claimed::Fresh { .. },
                Claimed::Fresh { .. }
            ]
        ),
        "{claimed:?}"
    );
    tx.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_connection_costs_only_its_transaction() {
    for world in [World::postgres().await, World::pgbouncer().await] {
        let mut tx = world.begin().await;
        claim(&mut tx, "e1", 1).await;
        // Except PgBouncer's connection for password lookups: without it a login fails once.
        let terminate = "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name like 'oncely%' and pid <> pg_backend_pid()";
        world.connect().await.execute(terminate).await.unwrap();
        let result = tx.commit().await;
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
        assert!(matches!(
            world.claim_and_roll_back("e1", 1).await,
            Claimed::Fresh { .. }
        ));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sqlite_write_by_another_process_is_a_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("oncely.db");
    let store = SqliteStore::open(&path).await.map(Store::from).unwrap();
    let mut other = SqliteConnectOptions::new()
        .filename(&path)
        .connect()
        .await
        .unwrap();
    other.execute("begin immediate").await.unwrap();
    assert!(matches!(
        store.begin(WORKER, TIME).await.err(),
        Some(StoreError::Conflict(_))
    ));
    store.ping().await.unwrap();
    other.execute("rollback").await.unwrap();
    let mut tx = store.begin(WORKER, TIME).await.unwrap();
    claim(&mut tx, "e1", 1).await;
    tx.commit().await.unwrap();
}
