//! Holds: held money cannot be spent, and a hold ends once.

use super::*;

async fn hold(world: &World, key: &str, amount: i64) -> Result<String> {
    let hold = post(world, key, "/holds", &order("alice", "bob", amount), None)
        .await?
        .is(201)?;
    Ok(hold["id"].as_str().context("read the id")?.to_owned())
}

async fn end(world: &World, key: &str, id: &str, how: &str) -> Result<TestResponse> {
    post(world, key, &format!("/holds/{id}/{how}"), &json!({}), None).await
}

both!(a_held_amount_cannot_be_spent, |kind: Kind| async move {
    let world = start_with(kind, &["alice", "bob"]).await?;
    let id = hold(&world, "hold", 600).await?;
    assert_eq!(hold(&world, "hold", 600).await?, id);
    assert_eq!(
        transfer(&world, "much", "alice", "bob", 401)
            .await?
            .problem(),
        (422, "insufficient-funds")
    );
    assert_eq!(
        post(&world, "more", "/holds", &order("alice", "bob", 401), None)
            .await?
            .problem(),
        (422, "insufficient-funds")
    );
    assert_eq!(balance(&world, "alice").await?, 1000);
    let captured = end(&world, "capture", &id, "capture").await?.is(201)?;
    assert_eq!(
        (&captured["kind"], &captured["hold"]),
        (&json!("capture"), &json!(id))
    );
    assert_eq!(
        (
            balance(&world, "alice").await?,
            balance(&world, "bob").await?
        ),
        (400, 1600)
    );
    for how in ["capture", "release"] {
        assert_eq!(
            end(&world, &format!("{how}-again"), &id, how)
                .await?
                .problem(),
            (409, "hold-not-open")
        );
    }
    let other = hold(&world, "other", 400).await?;
    assert_eq!(
        end(&world, "release", &other, "release").await?.is(200)?["state"],
        "released"
    );
    transfer(&world, "all", "alice", "bob", 400)
        .await?
        .is(201)?;
    check_books(&world.database).await?;
    check_totals(&world).await
});

both!(
    a_hold_ended_concurrently_ends_once,
    |kind: Kind| async move {
        let world = start_with(kind, &["alice", "bob"]).await?;
        for round in 0..3 {
            let id = hold(&world, &format!("hold-{round}"), 100).await?;
            let responses: Vec<TestResponse> = stream::iter(0..8)
                .map(|n| {
                    let (world, id) = (&world, &id);
                    let how = if n % 2 == 0 { "capture" } else { "release" };
                    async move { end(world, &format!("end-{round}-{n}"), id, how).await }
                })
                .buffer_unordered(8)
                .try_collect()
                .await?;
            let ended = responses
                .iter()
                .filter(|response| response.status < 300)
                .count();
            assert_eq!(ended, 1, "{responses:?}");
            for response in responses.iter().filter(|response| response.status >= 300) {
                assert_eq!(response.problem(), (409, "hold-not-open"));
            }
        }
        check_books(&world.database).await?;
        check_totals(&world).await
    }
);
