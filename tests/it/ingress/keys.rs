//! The table of idempotency keys, row by row.

use super::*;

both!(
    a_key_is_required_unless_the_route_makes_it_optional,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let url = format!("{}/do/it", world.ingress_url()?);
        let client = reqwest::Client::new();
        for request in [client.post(&url), client.patch(&url)] {
            let missing = send(request.json(&everything("e"))).await?;
            assert_eq!(
                (missing.status.as_u16(), missing.code().as_str()),
                (400, "idempotency-key-missing")
            );
        }

        // These methods are idempotent by definition.
        for request in [client.put(&url), client.delete(&url)] {
            assert_eq!(
                send(request.json(&everything("e"))).await?.status,
                StatusCode::OK
            );
        }
        assert_eq!(effects(&world, "e").await?, (2, 4));
        Ok(())
    }
);

both!(a_route_may_do_without_keys, |kind: Kind| async move {
    let world = World::start(kind, &manifest("idempotency_key = \"optional\"")?).await?;
    let url = format!("{}/do/it", world.ingress_url()?);
    for _ in 0..2 {
        let response = send(reqwest::Client::new().post(&url).json(&everything("e"))).await?;
        assert_eq!(response.status, StatusCode::OK);
        assert!(!response.replayed());
    }
    assert_eq!(effects(&world, "e").await?, (2, 4));
    Ok(())
});

both!(a_malformed_key_is_refused, |kind: Kind| async move {
    let world = World::start(kind, &manifest("")?).await?;
    for key in ["", "\"\"", "\"open", &"x".repeat(256)] {
        let refused = post(&world, key, &everything("e")).await?;
        assert_eq!(
            (refused.status.as_u16(), refused.code().as_str()),
            (400, "idempotency-key-invalid"),
            "{key}"
        );
    }
    assert_eq!(
        post(&world, &"x".repeat(255), &everything("e"))
            .await?
            .status,
        StatusCode::OK
    );
    assert_eq!(effects(&world, "e").await?, (1, 2));
    Ok(())
});

both!(a_key_belongs_to_one_request, |kind: Kind| async move {
    let world = World::start(kind, &manifest("")?).await?;
    post(&world, "key", &everything("e")).await?;
    let client = reqwest::Client::new();
    let url = |path: &str| Ok::<_, anyhow::Error>(format!("{}{path}", world.ingress_url()?));
    let body = everything("e").to_string();
    let with_key = |request: reqwest::RequestBuilder| request.header("Idempotency-Key", "key");
    let json_type =
        |request: reqwest::RequestBuilder| request.header("Content-Type", "application/json");
    let others = [
        json_type(client.post(url("/do/it")?)).body(everything("other").to_string()),
        json_type(client.post(url("/do/it?more")?)).body(body.clone()),
        json_type(client.post(url("/do/other")?)).body(body.clone()),
        json_type(client.put(url("/do/it")?)).body(body.clone()),
        client
            .post(url("/do/it")?)
            .header("Content-Type", "text/plain")
            .body(body.clone()),
    ];
    for other in others {
        let refused = send(with_key(other)).await?;
        assert_eq!(
            (refused.status.as_u16(), refused.code().as_str()),
            (422, "idempotency-key-reused")
        );
    }
    // Headers that are not part of the operation may differ.
    let same = with_key(json_type(client.post(url("/do/it")?)))
        .header("User-Agent", "another")
        .body(body);
    assert!(send(same).await?.replayed());
    assert_eq!(effects(&world, "e").await?, (1, 2));
    assert_eq!(effects(&world, "other").await?, (0, 0));
    Ok(())
});

both!(keys_are_scoped_to_their_caller, |kind: Kind| async move {
    let world = World::start(kind, &manifest("")?).await?;
    let url = format!("{}/do/it", world.ingress_url()?);
    for caller in ["Bearer alice", "Bearer bob", "Bearer alice"] {
        let request = reqwest::Client::new()
            .post(&url)
            .header("Authorization", caller);
        send(
            request
                .header("Idempotency-Key", "key")
                .json(&everything("e")),
        )
        .await?;
    }
    assert_eq!(effects(&world, "e").await?, (2, 4));
    Ok(())
});

both!(
    concurrent_requests_with_one_key_share_one_response,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("wait = \"10s\"")?).await?;
        let slow = json!({ "event": "e", "do": ["effect", "slow"], "ms": 100 });
        let responses =
            futures::future::join_all((0..20).map(|_| post(&world, "key", &slow))).await;
        let responses: Vec<TestResponse> = responses.into_iter().collect::<Result<_>>()?;
        assert!(
            responses
                .iter()
                .all(|response| response.stable_parts() == responses[0].stable_parts()),
            "{responses:?}"
        );
        assert_eq!(
            responses
                .iter()
                .filter(|response| !response.replayed())
                .count(),
            1
        );
        assert_eq!(effects(&world, "e").await?, (1, 2));
        Ok(())
    }
);

both!(
    a_request_longer_than_wait_is_reported_in_progress,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("wait = \"20ms\"")?).await?;
        let slow = json!({ "event": "e", "do": ["effect", "slow"], "ms": 400 });
        let first = tokio::spawn({
            let (url, slow) = (format!("{}/do/it", world.ingress_url()?), slow.clone());
            async move {
                send(
                    reqwest::Client::new()
                        .post(url)
                        .header("Idempotency-Key", "key")
                        .json(&slow),
                )
                .await
            }
        });
        until_in_flight(&world).await?;
        let mut codes = Vec::new();
        while !first.is_finished() {
            // A request with another body is refused before it waits.
            let other = post(&world, "key", &everything("other")).await?;
            let same = post(&world, "key", &slow).await?;
            if same.status == StatusCode::CONFLICT {
                assert_eq!(same.header("retry-after"), Some("1"), "{same:?}");
                codes.push((other.code(), same.code()));
            }
        }
        assert_eq!(first.await??.status, StatusCode::OK);
        let problem = (
            "idempotency-key-reused".to_owned(),
            "request-in-progress".to_owned(),
        );
        assert!(codes.contains(&problem), "{codes:?}");
        assert!(post(&world, "key", &slow).await?.replayed());
        assert_eq!(effects(&world, "e").await?, (1, 2));
        Ok(())
    }
);

both!(
    a_key_is_forgotten_after_its_window,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        post(&world, "key", &everything("e")).await?;
        let past = match kind {
            Kind::Sqlite => "update oncely.request set expires_at = 0",
            _ => "update oncely.request set expires_at = 'epoch'",
        };
        world.database.execute(past).await?;
        let again = post(&world, "key", &everything("e")).await?;
        assert!(!again.replayed());
        assert_eq!(effects(&world, "e").await?, (2, 4));
        assert!(post(&world, "key", &everything("e")).await?.replayed());
        Ok(())
    }
);

/// Two hosts on one database see each other's requests in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_are_known_to_other_hosts() -> Result<()> {
    use support::production::RunningHost;

    let world = World::start(Kind::Postgres, &manifest("wait = \"20ms\"")?).await?;
    let rival = RunningHost::start(&world, "rival").await?;
    let slow = json!({ "event": "e", "do": ["effect", "slow"], "ms": 400 });
    let first = tokio::spawn({
        let (url, slow) = (format!("{}/do/it", world.ingress_url()?), slow.clone());
        async move {
            send(
                reqwest::Client::new()
                    .post(url)
                    .header("Idempotency-Key", "key")
                    .json(&slow),
            )
            .await
        }
    });
    let there = format!("{}/do/it", rival.ingress_url()?);
    let send_again = |what: &Value| {
        send(
            reqwest::Client::new()
                .post(&there)
                .header("Idempotency-Key", "key")
                .json(what),
        )
    };
    let claims = "select count(*) from pg_locks where locktype = 'advisory' and objsubid = 2";
    world.until(claims, 1).await?;
    let mut codes = Vec::new();
    while !first.is_finished() {
        let same = send_again(&slow).await?;
        if same.status == StatusCode::CONFLICT {
            codes.push((send_again(&everything("other")).await?.code(), same.code()));
        }
    }
    assert_eq!(first.await??.status, StatusCode::OK);
    let problem = (
        "idempotency-key-reused".to_owned(),
        "request-in-progress".to_owned(),
    );
    assert!(codes.contains(&problem), "{codes:?}");
    let again = send_again(&slow).await?;
    assert!(again.replayed(), "{again:?}");
    assert_eq!(effects(&world, "e").await?, (1, 2));
    Ok(())
}
