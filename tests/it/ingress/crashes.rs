//! Aborted handlers, killed hosts and broken connections.

use super::*;

both!(
    a_crash_keeps_nothing_and_the_same_request_runs_again,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        for (step, status, code) in [
            ("trap", 500, "handler-failed"),
            ("spin", 504, "handler-timeout"),
        ] {
            let what = json!({ "event": step, "do": ["effect", "send", step] });
            for _ in 0..2 {
                let response = post(&world, step, &what).await?;
                assert_eq!(
                    (response.status.as_u16(), response.code().as_str()),
                    (status, code)
                );
                assert!(!response.replayed());
            }
            assert_eq!(effects(&world, step).await?, (0, 0));
        }
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.request")
                .await?,
            0
        );
        Ok(())
    }
);

both!(a_route_may_keep_crashes_too, |kind: Kind| async move {
    let world = World::start(kind, &manifest("store_failures = \"all\"")?).await?;
    let what = json!({ "event": "e", "do": ["effect", "trap"] });
    let first = post(&world, "key", &what).await?;
    assert_eq!(
        (first.status.as_u16(), first.code().as_str()),
        (500, "handler-failed")
    );
    let again = post(&world, "key", &what).await?;
    assert!(again.replayed());
    assert_eq!(again.stable_parts(), first.stable_parts());
    assert_eq!(effects(&world, "e").await?, (0, 0));
    Ok(())
});

both!(
    a_response_over_the_size_limit_fails_the_request,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let within = post(
            &world,
            "within",
            &json!({ "event": "e", "do": ["huge"], "ms": 3 }),
        )
        .await?;
        assert_eq!((within.status.as_u16(), within.body.len()), (200, 3 << 20));
        let beyond = post(
            &world,
            "beyond",
            &json!({ "event": "e", "do": ["effect", "huge"], "ms": 5 }),
        )
        .await?;
        assert_eq!(
            (beyond.status.as_u16(), beyond.code().as_str()),
            (500, "handler-failed")
        );
        assert_eq!(effects(&world, "e").await?, (0, 0));
        Ok(())
    }
);

both!(
    a_retry_after_a_killed_host_has_exactly_one_effect,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("")?).await?;
        for round in 0..6 {
            let event = format!("e{round}");
            let what = json!({ "event": event, "do": ["effect", "slow"], "ms": 20 });
            let first = tokio::spawn({
                let (url, what, event) = (
                    format!("{}/do/it", world.ingress_url()?),
                    what.clone(),
                    event.clone(),
                );
                async move {
                    send(
                        reqwest::Client::new()
                            .post(url)
                            .header("Idempotency-Key", event)
                            .json(&what),
                    )
                    .await
                }
            });
            tokio::time::sleep(Duration::from_millis(15 * round)).await;
            world.kill_host()?;
            let first = first.await?;
            world.start_host().await?;
            let again = post(&world, &event, &what).await?;
            assert_eq!(again.status, StatusCode::OK, "{again:?}");
            if let Ok(first) = first.as_ref() {
                assert_eq!(again.stable_parts(), first.stable_parts());
            }
            assert_eq!(effects(&world, &event).await?, (1, 2), "{event}");
        }
        Ok(())
    }
);

/// A disconnected caller cancels nothing: the response is stored for its retry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnected_caller_gets_its_response_on_retry() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("wait = \"10s\"")?).await?;
    let what = json!({ "event": "e", "do": ["effect", "slow"], "ms": 200 });
    let url = format!("{}/do/it", world.ingress_url()?);
    let request = reqwest::Client::new()
        .post(&url)
        .header("Idempotency-Key", "key")
        .json(&what);
    assert!(
        request
            .timeout(Duration::from_millis(60))
            .send()
            .await
            .is_err(),
        "the request was answered too soon"
    );
    let again = post(&world, "key", &what).await?;
    assert!(again.replayed(), "{again:?}");
    assert_eq!(effects(&world, "e").await?, (1, 2));
    Ok(())
}
