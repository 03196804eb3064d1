//! Idempotency keys: a key belongs to one request, is answered once, and expires.

use std::time::Duration;

use oncely::model::request::{HttpResponse, RequestKey};
use oncely::store::{ClaimedRequest, KeptResponse, RetentionPolicy, StoreError, Tx};

use super::{TIME, WORKER, World};

on_every_database!(
    a_stored_response_is_returned_again,
    a_key_belongs_to_one_request,
    a_rolled_back_request_leaves_its_key_fresh,
    a_key_is_free_after_its_window,
    concurrent_claims_never_both_get_the_key,
    several_keys_are_claimed_and_answered_together,
    keys_are_kept_across_partition_rotations,
    a_read_only_transaction_cannot_write,
);

const HOUR: Duration = Duration::from_secs(3_600);

fn key(name: &str, fingerprint: u8) -> RequestKey {
    let (route, caller) = ("/transfers".to_owned(), String::new());
    RequestKey {
        route,
        caller,
        key: name.to_owned(),
        fingerprint: [fingerprint; 32],
    }
}

fn response(body: &'static [u8]) -> HttpResponse {
    let headers = vec![
        ("x-odd".to_owned(), "caf\u{e9}".to_owned()),
        ("x-odd".to_owned(), "2".to_owned()),
    ];
    HttpResponse {
        status: 201,
        headers,
        body: body.into(),
    }
}

async fn claim_in(tx: &mut Tx, key: &RequestKey) -> ClaimedRequest {
    let claimed = tx.claim_requests(&[key]).await.unwrap();
    claimed.into_iter().next().unwrap()
}

async fn claim(world: &World, key: &RequestKey) -> ClaimedRequest {
    let mut tx = world.begin().await;
    let claimed = claim_in(&mut tx, key).await;
    tx.rollback().await;
    claimed
}

async fn store_in(
    tx: &mut Tx,
    request: &RequestKey,
    body: &'static [u8],
    keep: Duration,
) -> Result<(), StoreError> {
    let response = &response(body);
    let kept = KeptResponse {
        request,
        response,
        keep,
    };
    tx.store_responses(&[kept]).await
}

async fn settle(world: &World, key: &RequestKey, body: &'static [u8], keep: Duration) {
    let mut tx = world.begin().await;
    assert_eq!(claim_in(&mut tx, key).await, ClaimedRequest::Fresh);
    store_in(&mut tx, key, body, keep).await.unwrap();
    tx.commit().await.unwrap();
}

async fn a_stored_response_is_returned_again(world: World) {
    settle(&world, &key("a", 1), b"\x00body", HOUR).await;
    assert_eq!(
        claim(&world, &key("a", 1)).await,
        ClaimedRequest::Answered(response(b"\x00body"))
    );
    let others = [
        RequestKey {
            route: "/other".to_owned(),
            ..key("a", 1)
        },
        RequestKey {
            caller: "another".to_owned(),
            ..key("a", 1)
        },
        key("b", 1),
    ];
    for other in others {
        assert_eq!(
            claim(&world, &other).await,
            ClaimedRequest::Fresh,
            "{other:?}"
        );
    }
    let mut tx = world.store.begin("another-worker", TIME).await.unwrap();
    assert_eq!(claim_in(&mut tx, &key("a", 1)).await, ClaimedRequest::Fresh);
    tx.rollback().await;
}

async fn a_key_belongs_to_one_request(world: World) {
    settle(&world, &key("a", 1), b"", HOUR).await;
    assert_eq!(
        claim(&world, &key("a", 2)).await,
        ClaimedRequest::OtherRequest
    );
}

async fn a_rolled_back_request_leaves_its_key_fresh(world: World) {
    let mut tx = world.begin().await;
    assert_eq!(claim_in(&mut tx, &key("a", 1)).await, ClaimedRequest::Fresh);
    store_in(&mut tx, &key("a", 1), b"", HOUR).await.unwrap();
    tx.rollback().await;
    assert_eq!(claim(&world, &key("a", 2)).await, ClaimedRequest::Fresh);
}

async fn a_key_is_free_after_its_window(world: World) {
    settle(&world, &key("a", 1), b"first", Duration::ZERO).await;
    settle(&world, &key("a", 2), b"second", HOUR).await;
    assert_eq!(
        claim(&world, &key("a", 2)).await,
        ClaimedRequest::Answered(response(b"second"))
    );
}

/// On SQLite the second request waits for the first. On PostgreSQL it is refused at once, with a
/// distinct result for another fingerprint.
async fn concurrent_claims_never_both_get_the_key(world: World) {
    if !world.is_postgres() {
        return;
    }
    let mut first = world.begin().await;
    assert_eq!(
        claim_in(&mut first, &key("a", 1)).await,
        ClaimedRequest::Fresh
    );
    assert_eq!(claim(&world, &key("a", 1)).await, ClaimedRequest::InFlight);
    assert_eq!(
        claim(&world, &key("a", 2)).await,
        ClaimedRequest::OtherRequest
    );
    assert_eq!(claim(&world, &key("b", 1)).await, ClaimedRequest::Fresh);
    store_in(&mut first, &key("a", 1), b"", HOUR).await.unwrap();
    assert_eq!(claim(&world, &key("a", 1)).await, ClaimedRequest::InFlight);
    first.commit().await.unwrap();
    assert_eq!(
        claim(&world, &key("a", 1)).await,
        ClaimedRequest::Answered(response(b""))
    );
}

fn kept<'a>(request: &'a RequestKey, response: &'a HttpResponse) -> KeptResponse<'a> {
    KeptResponse {
        request,
        response,
        keep: HOUR,
    }
}

async fn several_keys_are_claimed_and_answered_together(world: World) {
    settle(&world, &key("answered", 1), b"before", HOUR).await;
    let keys = [
        key("a", 1),
        key("answered", 1),
        key("b", 2),
        key("answered", 3),
    ];
    let mut tx = world.begin().await;
    let claimed = tx.claim_requests(&keys.each_ref()).await.unwrap();
    let expected = [
        ClaimedRequest::Fresh,
        ClaimedRequest::Answered(response(b"before")),
        ClaimedRequest::Fresh,
        ClaimedRequest::OtherRequest,
    ];
    assert_eq!(claimed, expected);
    let [a, _, b, _] = &keys;
    let (first, second) = (response(b"a"), response(b"b"));
    let responses = [kept(a, &first), kept(b, &second)];
    tx.store_responses(&responses).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(claim(&world, a).await, ClaimedRequest::Answered(first));
    assert_eq!(claim(&world, b).await, ClaimedRequest::Answered(second));

    // None of several responses is stored beside an answered one.
    let mut tx = world.begin().await;
    let (free, response) = (key("c", 1), response(b"c"));
    let responses = [kept(&free, &response), kept(a, &response)];
    let refused = tx.store_responses(&responses).await;
    assert!(
        matches!(refused, Err(StoreError::Conflict(_))),
        "{refused:?}"
    );
    assert!(tx.commit().await.is_err());
    assert_eq!(claim(&world, &free).await, ClaimedRequest::Fresh);
}

async fn keys_are_kept_across_partition_rotations(world: World) {
    settle(&world, &key("long", 1), b"long", 30 * HOUR).await;
    settle(&world, &key("short", 1), b"short", Duration::ZERO).await;
    let day = 24 * HOUR;
    let retire = RetentionPolicy {
        outputs: day,
        inbox: Some(day),
        requests: day,
        limit: 100,
        lock_timeout: Duration::from_secs(20),
        archive: None,
    };
    for _ in 0..8 {
        if world.is_postgres() {
            let later = "update oncely.partition_rotation set opened_at = opened_at - interval '12 hours', \
                         closed_at = array(select at - interval '12 hours' from unnest(closed_at) as at) \
                         where table_name = 'request'";
            world.execute_directly(later).await;
        }
        while world.store.delete_expired(&retire).await.unwrap() {}
        assert_eq!(
            claim(&world, &key("long", 1)).await,
            ClaimedRequest::Answered(response(b"long"))
        );
        assert_eq!(
            claim(&world, &key("long", 2)).await,
            ClaimedRequest::OtherRequest
        );
    }
    let count = if world.is_postgres() {
        "oncely.request"
    } else {
        "oncely_request"
    };
    assert_eq!(
        world.count_directly(count).await,
        1,
        "an expired key still exists"
    );
}

async fn a_read_only_transaction_cannot_write(world: World) {
    let table = if world.is_postgres() {
        "create table thing (id bigint)"
    } else {
        "create table thing (id integer)"
    };
    world.migrate("thing", table).await;
    let mut tx = world.store.begin_read_only(WORKER, TIME).await.unwrap();
    let read = tx
        .query("select count(*) from thing", &[], super::LIMITS)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(read.rows.len(), 1);

    // A writer does not wait for it.
    let mut writer = world.begin().await;
    writer
        .execute("insert into thing (id) values (1)", &[])
        .await
        .unwrap()
        .unwrap();
    writer.commit().await.unwrap();
    let wrote = tx.execute("insert into thing (id) values (2)", &[]).await;
    assert!(!matches!(wrote, Ok(Ok(_))), "{wrote:?}");
    tx.rollback().await;
    assert_eq!(world.rows("select count(*) from thing").await.len(), 1);
    let mut tx = world.store.begin_read_only(WORKER, TIME).await.unwrap();
    let again = tx
        .query("select id from thing", &[], super::LIMITS)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(again.rows.len(), 1);
    tx.rollback().await;
}
