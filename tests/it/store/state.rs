//! Keyed state is written where nobody was faster.

use bytes::Bytes;
use oncely::store::{STATE_PREVIEW, StateEntry, StateWrite, StoreError};

use super::{TIME, World};

on_every_database!(
    state_is_kept_changed_and_deleted,
    a_key_that_moved_is_a_conflict_and_nothing_is_written,
    of_two_batches_that_change_a_key_at_once_one_is_a_conflict,
    people_read_one_value_whole_and_lists_by_prefix,
);

fn set(key: &str, expected: Option<u64>, value: &str) -> StateWrite {
    let entry = StateEntry { value: Bytes::copy_from_slice(value.as_bytes()), version: expected.unwrap_or(0) + 1 };
    StateWrite { key: key.to_owned(), expected, entry: Some(entry) }
}

fn delete(key: &str, expected: Option<u64>) -> StateWrite {
    StateWrite { key: key.to_owned(), expected, entry: None }
}

async fn load(world: &World) -> Vec<(String, String, u64)> {
    let mut tx = world.begin().await;
    let keys = ["a", "b", "c", "é\"'"].map(str::to_owned);
    let mut entries = tx.load_state(&keys).await.unwrap();
    tx.rollback().await;
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries.into_iter().map(|(key, e)| (key, String::from_utf8(e.value.to_vec()).unwrap(), e.version)).collect()
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

async fn state_is_kept_changed_and_deleted(world: World) {
    save(&world, &[set("b", None, "1"), set("a", None, "1"), set("é\"'", None, "")]).await.unwrap();
    let expected = [("a", "1", 1), ("b", "1", 1), ("é\"'", "", 1)];
    assert_eq!(load(&world).await, expected.map(|(key, value, version)| (key.to_owned(), value.to_owned(), version)));
    save(&world, &[set("a", Some(1), "2"), delete("b", Some(1)), set("c", None, "1"), delete("x", None)])
        .await
        .unwrap();
    let expected = [("a", "2", 2), ("c", "1", 1), ("é\"'", "", 1)];
    assert_eq!(load(&world).await, expected.map(|(key, value, version)| (key.to_owned(), value.to_owned(), version)));
    let mut other = world.store.begin("another", TIME).await.unwrap();
    assert!(other.load_state(&["a".to_owned()]).await.unwrap().is_empty());
    other.rollback().await;
}

async fn a_key_that_moved_is_a_conflict_and_nothing_is_written(world: World) {
    save(&world, &[set("a", None, "1")]).await.unwrap();
    for moved in [
        set("a", None, "x"),
        set("a", Some(2), "x"),
        delete("a", Some(2)),
        set("c", Some(1), "x"),
        delete("c", Some(1)),
    ] {
        let result = save(&world, &[set("b", None, "x"), moved.clone()]).await;
        assert!(matches!(result, Err(StoreError::Conflict(_))), "{moved:?}: {result:?}");
    }
    assert_eq!(load(&world).await, [("a".to_owned(), "1".to_owned(), 1)]);
}

async fn of_two_batches_that_change_a_key_at_once_one_is_a_conflict(world: World) {
    save(&world, &[set("a", None, "1"), set("b", None, "1")]).await.unwrap();
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
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        assert!(results.iter().any(|result| matches!(result, Err(StoreError::Conflict(_)))), "{results:?}");
    }
}

async fn people_read_one_value_whole_and_lists_by_prefix(world: World) {
    let long = "x".repeat(STATE_PREVIEW as usize + 9);
    let writes = [set("a_1", None, "1"), set("aZ", None, "2"), set("ab", None, &long), set("b%", None, "4")];
    save(&world, &writes).await.unwrap();
    save(&world, &[set("a_1", Some(1), "5")]).await.unwrap();

    let entry = world.store.state_entry(super::WORKER, "ab").await.unwrap().unwrap();
    assert_eq!((entry.version, entry.size, entry.value.len()), (1, long.len() as u64, long.len()));
    let age = jiff::Timestamp::now().duration_since(entry.updated_at);
    assert!(age.as_secs().abs() < 60, "{}", entry.updated_at);
    assert_eq!(world.store.state_entry(super::WORKER, "a").await.unwrap(), None);
    assert_eq!(world.store.state_entry("another", "ab").await.unwrap(), None);

    let keys = async |prefix: &str, limit| {
        let entries = world.store.state_entries(super::WORKER, prefix, limit).await.unwrap();
        entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>()
    };
    // By their bytes: upper case comes before `_`, and `_` before lower case. Wildcards of SQL mean nothing.
    assert_eq!(keys("", 9).await, ["aZ", "a_1", "ab", "b%"]);
    assert_eq!(keys("a_", 9).await, ["a_1"]);
    assert_eq!(keys("b%", 9).await, ["b%"]);
    assert_eq!(keys("%", 9).await, [""; 0]);
    assert_eq!(keys("a", 2).await, ["aZ", "a_1"]);
    let beginning = world.store.state_entries(super::WORKER, "ab", 1).await.unwrap().remove(0);
    assert_eq!((beginning.size, beginning.value.len()), (long.len() as u64, STATE_PREVIEW as usize));
}
