//! Keyed state is written with optimistic concurrency.

use bytes::Bytes;
use oncely::store::{RetentionPolicy, STATE_PREVIEW, StateSlot, StateWrite, StoreError};

use super::{TIME, World};

on_every_database!(
    state_is_stored_changed_and_deleted,
    versions_of_a_key_grow_over_deletions,
    versions_grow_after_a_deletion_was_purged,
    a_concurrently_deleted_key_is_a_conflict,
    a_changed_key_is_a_conflict_and_nothing_is_written,
    one_of_two_concurrent_changes_of_a_key_is_a_conflict,
    state_entry_is_complete_and_lists_filter_by_prefix,
);

fn set(key: &str, expected: Option<u64>, value: &str) -> StateWrite {
    let value = Some(Bytes::copy_from_slice(value.as_bytes()));
    StateWrite {
        key: key.to_owned(),
        expected,
        version: expected.unwrap_or(0) + 1,
        value,
    }
}

fn delete(key: &str, expected: Option<u64>) -> StateWrite {
    StateWrite {
        key: key.to_owned(),
        expected,
        version: expected.unwrap_or(0) + 1,
        value: None,
    }
}

async fn slots(world: &World, keys: &[&str]) -> Vec<(String, StateSlot)> {
    let mut tx = world.begin().await;
    let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
    let mut slots = tx.load_state(&keys).await.unwrap();
    tx.rollback().await;
    slots.sort_by(|a, b| a.0.cmp(&b.0));
    slots
}

/// The version, whether there is a value, and whether there is a row.
async fn slot(world: &World, key: &str) -> (u64, bool, bool) {
    let (_, slot) = slots(world, &[key]).await.remove(0);
    (slot.version, slot.entry.is_some(), slot.has_row)
}

async fn load(world: &World) -> Vec<(String, String, u64)> {
    let slots = slots(world, &["a", "b", "c", "é\"'"]).await;
    let entry = |(key, slot): (String, StateSlot)| Some((key, slot.entry?));
    let entries = slots.into_iter().filter_map(entry);
    entries
        .map(|(key, e)| (key, String::from_utf8(e.value.to_vec()).unwrap(), e.version))
        .collect()
}

async fn save(world: &World, writes: &[StateWrite]) -> Result<(), StoreError> {
    let mut tx = world.begin().await;
    match tx.save_state(writes).await {
        Ok(()) => tx.commit().await.map(|_| ()),
        Err(error) => {
            tx.rollback().await;
            Err(error)
        }
    }
}

async fn state_is_stored_changed_and_deleted(world: World) {
    save(
        &world,
        &[
            set("b", None, "1"),
            set("a", None, "1"),
            set("é\"'", None, ""),
        ],
    )
    .await
    .unwrap();
    let expected = [("a", "1", 1), ("b", "1", 1), ("é\"'", "", 1)];
    assert_eq!(
        load(&world).await,
        expected.map(|(key, value, version)| (key.to_owned(), value.to_owned(), version))
    );
    save(
        &world,
        &[
            set("a", Some(1), "2"),
            delete("b", Some(1)),
            set("c", None, "1"),
        ],
    )
    .await
    .unwrap();
    let expected = [("a", "2", 2), ("c", "1", 1), ("é\"'", "", 1)];
    assert_eq!(
        load(&world).await,
        expected.map(|(key, value, version)| (key.to_owned(), value.to_owned(), version))
    );
    let mut other = world.store.begin("another", TIME).await.unwrap();
    let slots = other.load_state(&["a".to_owned()]).await.unwrap();
    assert_eq!(slots, [("a".to_owned(), StateSlot::default())]);
    other.rollback().await;
}

async fn versions_of_a_key_grow_over_deletions(world: World) {
    assert_eq!(slot(&world, "a").await, (0, false, false));
    save(&world, &[set("a", None, "1")]).await.unwrap();
    save(&world, &[delete("a", Some(1))]).await.unwrap();
    assert_eq!(slot(&world, "a").await, (2, false, true));
    assert_eq!(load(&world).await, []);
    assert_eq!(
        world.store.state_entry(super::WORKER, "a").await.unwrap(),
        None
    );
    assert!(
        world
            .store
            .state_entries(super::WORKER, "", 9)
            .await
            .unwrap()
            .is_empty()
    );
    for stale in [
        set("a", None, "x"),
        set("a", Some(1), "x"),
        delete("a", Some(1)),
    ] {
        let result = save(&world, std::slice::from_ref(&stale)).await;
        assert!(
            matches!(result, Err(StoreError::Conflict(_))),
            "{stale:?}: {result:?}"
        );
    }
    save(&world, &[set("a", Some(2), "3")]).await.unwrap();
    assert_eq!(slot(&world, "a").await, (3, true, true));

    // Set and deleted by items of one batch.
    save(
        &world,
        &[StateWrite {
            version: 2,
            ..delete("b", None)
        }],
    )
    .await
    .unwrap();
    assert_eq!(slot(&world, "b").await, (2, false, true));
}

async fn versions_grow_after_a_deletion_was_purged(world: World) {
    let kept = std::time::Duration::from_secs(3600);
    let policy = RetentionPolicy {
        outputs: kept,
        inbox: None,
        requests: kept,
        limit: 1,
        lock_timeout: std::time::Duration::from_secs(1),
        archive: None,
    };
    save(
        &world,
        &[
            set("a", None, "1"),
            set("b", None, "1"),
            set("c", None, "1"),
        ],
    )
    .await
    .unwrap();
    save(&world, &[set("a", Some(1), "2"), delete("b", Some(1))])
        .await
        .unwrap();
    save(&world, &[delete("a", Some(2))]).await.unwrap();
    while world.store.delete_expired(&policy).await.unwrap() {}
    assert_eq!(
        slot(&world, "a").await,
        (3, false, true),
        "the deletion was purged too early"
    );

    let long_ago = if world.is_postgres() {
        "now() - interval '25 hours'"
    } else {
        "0"
    };
    world
        .execute_directly(&format!("update oncely.state set updated_at = {long_ago}"))
        .await;
    while world.store.delete_expired(&policy).await.unwrap() {}
    assert_eq!(
        world.count_directly("oncely.state").await,
        1,
        "a value was removed, or a deletion is left"
    );
    for key in ["a", "b", "new"] {
        assert_eq!(slot(&world, key).await, (3, false, false), "{key}");
    }
    let mut other = world.store.begin("another", TIME).await.unwrap();
    assert_eq!(
        other.load_state(&["a".to_owned()]).await.unwrap(),
        [("a".to_owned(), StateSlot::default())]
    );
    other.rollback().await;
}

async fn a_concurrently_deleted_key_is_a_conflict(world: World) {
    save(&world, &[set("a", None, "1")]).await.unwrap();
    let read = slot(&world, "a").await;
    save(&world, &[delete("a", Some(1))]).await.unwrap();
    save(&world, &[set("a", Some(2), "3")]).await.unwrap();
    save(&world, &[delete("a", Some(3))]).await.unwrap();
    assert_eq!(read, (1, true, true));
    let result = save(&world, &[set("a", Some(1), "x")]).await;
    assert!(matches!(result, Err(StoreError::Conflict(_))), "{result:?}");
}

async fn a_changed_key_is_a_conflict_and_nothing_is_written(world: World) {
    save(&world, &[set("a", None, "1")]).await.unwrap();
    for moved in [
        set("a", None, "x"),
        set("a", Some(2), "x"),
        delete("a", Some(2)),
        set("c", Some(1), "x"),
        delete("c", Some(1)),
    ] {
        let result = save(&world, &[set("b", None, "x"), moved.clone()]).await;
        assert!(
            matches!(result, Err(StoreError::Conflict(_))),
            "{moved:?}: {result:?}"
        );
    }
    assert_eq!(load(&world).await, [("a".to_owned(), "1".to_owned(), 1)]);
}

async fn one_of_two_concurrent_changes_of_a_key_is_a_conflict(world: World) {
    save(&world, &[set("a", None, "1"), set("b", None, "1")])
        .await
        .unwrap();
    for round in 1..=10 {
        let lanes = [["a", "b"], ["b", "a"]].map(|keys| {
            let store = std::sync::Arc::clone(&world.store);
            tokio::spawn(async move {
                let mut tx = store.begin(super::WORKER, TIME).await.unwrap();
                let writes = keys.map(|key| set(key, Some(round), "x"));
                match tx.save_state(&writes).await {
                    Ok(()) => tx.commit().await.map(|_| ()),
                    Err(error) => {
                        tx.rollback().await;
                        Err(error)
                    }
                }
            })
        });
        let mut results = Vec::new();
        for lane in lanes {
            results.push(lane.await.unwrap());
        }
        assert_eq!(
            results.iter().filter(|result| result.is_ok()).count(),
            1,
            "{results:?}"
        );
        assert!(
            results
                .iter()
                .any(|result| matches!(result, Err(StoreError::Conflict(_)))),
            "{results:?}"
        );
    }
}

async fn state_entry_is_complete_and_lists_filter_by_prefix(world: World) {
    let long = "x".repeat(STATE_PREVIEW as usize + 9);
    let writes = [
        set("a_1", None, "1"),
        set("aZ", None, "2"),
        set("ab", None, &long),
        set("b%", None, "4"),
    ];
    save(&world, &writes).await.unwrap();
    save(&world, &[set("a_1", Some(1), "5")]).await.unwrap();

    // One entry
    let entry = world
        .store
        .state_entry(super::WORKER, "ab")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (entry.version, entry.size, entry.value.len()),
        (1, long.len() as u64, long.len())
    );
    let age = jiff::Timestamp::now().duration_since(entry.updated_at);
    assert!(age.as_secs().abs() < 60, "{}", entry.updated_at);
    assert_eq!(
        world.store.state_entry(super::WORKER, "a").await.unwrap(),
        None
    );
    assert_eq!(
        world.store.state_entry("another", "ab").await.unwrap(),
        None
    );

    // Lists
    let keys = async |prefix: &str, limit| {
        let entries = world
            .store
            .state_entries(super::WORKER, prefix, limit)
            .await
            .unwrap();
        entries
            .into_iter()
            .map(|entry| entry.key)
            .collect::<Vec<_>>()
    };

    // In byte order: upper case, `_`, lower case. SQL wildcards are literal.
    assert_eq!(keys("", 9).await, ["aZ", "a_1", "ab", "b%"]);
    assert_eq!(keys("a_", 9).await, ["a_1"]);
    assert_eq!(keys("b%", 9).await, ["b%"]);
    assert_eq!(keys("%", 9).await, [""; 0]);
    assert_eq!(keys("a", 2).await, ["aZ", "a_1"]);
    let beginning = world
        .store
        .state_entries(super::WORKER, "ab", 1)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(
        (beginning.size, beginning.value.len()),
        (long.len() as u64, STATE_PREVIEW as usize)
    );
}
