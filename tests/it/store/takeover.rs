//! A host's leases pass to other hosts after its own lease has expired, and not before.

use std::time::{Duration, Instant};

use oncely::store::{
    HOST_LEASE, OutboxRow, PostgresStore, SqliteStore, Store, TakenOver, Unpublished,
};

use super::{LEASE, World, append_singly, new_claim, new_output};

on_every_database!(
    leases_of_a_dead_host_are_released,
    a_stopping_host_releases_its_leases
);

/// Another host on the same database.
async fn another(world: &World) -> Store {
    match &world.store_url {
        Some(url) => PostgresStore::connect(url, 4).await.unwrap().into(),
        None => {
            let file = world.folder.path().join("oncely.db");
            SqliteStore::open(&file).await.unwrap().into()
        }
    }
}

async fn append(world: &World) -> Vec<OutboxRow> {
    let mut tx = world.begin().await;
    tx.claim(&[new_claim("e1", 1)]).await.unwrap();
    let outputs = [Duration::ZERO, Duration::ZERO, Duration::from_secs(20)];
    let outputs: Vec<_> = (0..)
        .zip(outputs)
        .map(|(ordinal, delay)| new_output("e1", ordinal, delay))
        .collect();
    let rows = append_singly(&mut tx, &outputs, LEASE).await;
    tx.commit().await.unwrap();
    rows
}

/// Renews the lease of a host until it takes over from another one.
async fn take_over(store: &Store) -> TakenOver {
    loop {
        let taken_over = store.renew_lease().await.unwrap();
        if let Some(taken_over) = taken_over
            .into_iter()
            .find(|taken_over| taken_over.outputs.is_some())
        {
            return taken_over;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn leases_of_a_dead_host_are_released(world: World) {
    world.store.renew_lease().await.unwrap();
    let rows = append(&world).await;
    let gone_at = Instant::now();
    let other = another(&world).await;
    if world.is_postgres() {
        assert!(other.renew_lease().await.unwrap().is_empty());
        assert!(other.lease_outputs(100, LEASE).await.unwrap().is_empty());
    }
    assert_eq!(take_over(&other).await.outputs, Some(2));
    let took = gone_at.elapsed();
    assert!(took < HOST_LEASE + Duration::from_secs(4), "{took:?}");
    assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), rows);
    if world.is_postgres() {
        // The host is back and drops its lost leases.
        assert!(world.store.renew_lease().await.unwrap().is_empty());
        let back = Unpublished::Later {
            after: Duration::ZERO,
            error: None,
        };
        world
            .store
            .release_outputs(&[(rows[0].seq, back.clone())])
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
        other.release_outputs(&[(rows[0].seq, back)]).await.unwrap();
        assert_eq!(
            world.store.lease_outputs(100, LEASE).await.unwrap(),
            rows[..1]
        );
    }
    other.close().await;
}

async fn a_stopping_host_releases_its_leases(world: World) {
    world.store.renew_lease().await.unwrap();
    let rows = append(&world).await;
    world.store.close().await;
    let other = another(&world).await;
    other.renew_lease().await.unwrap();
    assert_eq!(other.lease_outputs(100, LEASE).await.unwrap(), rows);
    other.close().await;
}

/// On PostgreSQL, transactions of a dead host are ended with their locks. Those of a live host
/// stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_of_a_dead_host_are_ended() {
    for world in [World::postgres().await, World::pgbouncer().await] {
        let other = another(&world).await;
        world.store.renew_lease().await.unwrap();
        other.renew_lease().await.unwrap();
        let mut frozen = world.begin().await;
        frozen.claim(&[new_claim("e1", 1)]).await.unwrap();
        let began = Instant::now();
        while began.elapsed() < HOST_LEASE + Duration::from_secs(1) {
            other.renew_lease().await.unwrap();
            world.store.renew_lease().await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        frozen
            .load_state(&["a".to_owned()])
            .await
            .expect("load state in the transaction of a live host");

        let taken_over = take_over(&other);
        let mut tx = other
            .begin(super::WORKER, Duration::from_secs(30))
            .await
            .unwrap();
        let claims = [new_claim("e1", 1)];
        let (_, claimed) = tokio::join!(taken_over, tx.claim(&claims));
        claimed.expect("claim the released event");
        tx.commit().await.unwrap();
        assert!(
            frozen.commit().await.is_err(),
            "a transaction continued after its takeover"
        );
        other.close().await;
    }
}
