//! Requests that share a transaction.

use futures::future::{join_all, try_join_all};
use reqwest::Client;

use super::*;

/// A host with a number of lanes for requests, and a time limit that a busy machine keeps.
async fn start(kind: Kind, lanes: u32) -> Result<World> {
    let route = "\n[[worker.route]]\npath = \"/do/{*what}\"\n";
    let name = "name = \"test\"\n";
    let manifest = http_manifest("12s", route)?;
    let manifest = manifest.replace(name, &format!("{name}concurrency = {lanes}\n"));
    World::start(kind, &manifest).await
}

/// A host with one lane: requests gather while it is busy.
async fn start_with_one_lane(kind: Kind) -> Result<World> {
    start(kind, 1).await
}

/// Posts requests at once, each with its event as its key, behind one that takes a while. Returns
/// the responses with their times.
async fn post_together(world: &World, requests: &[Value]) -> Result<Vec<(TestResponse, Duration)>> {
    let client = Client::new();
    let url = format!("{}/do/it", world.ingress_url()?);
    let post = |what: Value| {
        let key = what["event"].as_str().unwrap_or_default().to_owned();
        let request = client.post(&url).header("Idempotency-Key", key).json(&what);
        async move {
            let began = Instant::now();
            anyhow::Ok((send(request).await?, began.elapsed()))
        }
    };
    let first = tokio::spawn(post(json!({ "event": "first", "do": ["slow"], "ms": 600 })));
    until_in_flight(world).await?;
    let responses = try_join_all(requests.iter().cloned().map(post)).await?;
    let (first, _) = first.await??;
    assert_eq!(first.status, StatusCode::OK, "{first:?}");
    Ok(responses)
}

both!(
    requests_in_flight_share_a_transaction,
    |kind: Kind| async move {
        let world = start_with_one_lane(kind).await?;
        let requests: Vec<Value> = (0..40).map(|n| everything(&format!("e{n}"))).collect();
        let responses = post_together(&world, &requests).await?;
        for (n, (response, _)) in responses.iter().enumerate() {
            assert_eq!(response.status, StatusCode::OK, "{response:?}");
            let event = format!("e{n}");
            assert_eq!(response.json()?["event"], event, "the response of another");
            assert_eq!(effects(&world, &event).await?, (1, 2));
            let again = post(&world, &event, &everything(&event)).await?;
            assert!(again.replayed());
            assert_eq!(again.stable_parts(), response.stable_parts());
        }
        stored(&world, requests.len()).await?;
        let count = world.oncely(&["state", "get", "test", "count"]).await?;
        assert!(count.contains("40"), "{count}");
        if kind != Kind::Sqlite {
            // Effects may have ids of subtransactions; responses are stored after all of them.
            let transactions =
                "select count(distinct xmin::text) from oncely.request where key like 'e%'";
            let transactions = world.database.number(transactions).await?;
            assert!(transactions <= 10, "{transactions} transactions");
        }
        Ok(())
    }
);

both!(
    failing_requests_cost_the_others_nothing,
    |kind: Kind| async move {
        let world = start_with_one_lane(kind).await?;
        let steps = |n: usize| match n % 6 {
            0 => (409, json!(["effect", "state", "send"])),
            1 => (409, json!(["effect", "violate"])),
            2 => (200, json!(["effect", "swallow"])),
            3 => (200, json!(["effect", "state", "send", "trap"])),
            _ => (200, json!(["effect", "state", "send"])),
        };
        let requests: Vec<Value> = (0..30)
            .map(|n| {
                let (status, steps) = steps(n);
                json!({ "event": format!("e{n}"), "do": steps, "status": status })
            })
            .collect();
        let responses = post_together(&world, &requests).await?;
        let mut handled = 0;
        for (n, (response, _)) in responses.iter().enumerate() {
            let event = format!("e{n}");
            let (status, rows) = match n % 6 {
                0 | 1 => (409, (0, 0)),
                2 | 3 => (500, (0, 0)),
                _ => (200, (1, 2)),
            };
            assert_eq!(response.status.as_u16(), status, "{event}: {response:?}");
            assert_eq!(effects(&world, &event).await?, rows, "{event}");
            handled += usize::from(status == 200);
            // A response is stored, the failure of a stopped handler is not.
            if status == 409 {
                let again = post(&world, &event, &requests[n]).await?;
                assert!(again.replayed(), "{event}");
                assert_eq!(again.stable_parts(), response.stable_parts());
            }
        }
        stored(&world, handled).await?;
        let count = world.oncely(&["state", "get", "test", "count"]).await?;
        assert!(count.contains(&handled.to_string()), "{count}");
        Ok(())
    }
);

both!(
    a_slow_request_does_not_hold_up_its_group,
    |kind: Kind| async move {
        let world = start(kind, 2).await?;
        let mut requests: Vec<Value> = (0..20).map(|n| everything(&format!("e{n}"))).collect();
        // It is stopped after twelve seconds.
        requests.insert(5, json!({ "event": "slow", "do": ["effect", "spin"] }));
        let responses = post_together(&world, &requests).await?;
        for (n, (response, time)) in responses.iter().enumerate() {
            let event = requests[n]["event"].as_str().unwrap_or_default();
            if event == "slow" {
                assert!(response.status.is_server_error(), "{response:?}");
                assert_eq!(effects(&world, event).await?, (0, 0));
                continue;
            }
            assert_eq!(response.status, StatusCode::OK, "{response:?}");
            assert_eq!(effects(&world, event).await?, (1, 2), "{event}");
            assert!(*time < Duration::from_secs(10), "{event}: {time:?}");
        }
        stored(&world, requests.len() - 1).await?;
        Ok(())
    }
);

both!(
    a_refused_commit_fails_one_request_of_its_group,
    |kind: Kind| async move {
        let world = start_with_one_lane(kind).await?;
        let mut requests: Vec<Value> = (0..10).map(|n| everything(&format!("e{n}"))).collect();
        requests.insert(
            4,
            json!({ "event": "refused", "do": ["effect", "promise"] }),
        );
        let responses = post_together(&world, &requests).await?;
        for (n, (response, _)) in responses.iter().enumerate() {
            let event = requests[n]["event"].as_str().unwrap_or_default();
            let (status, rows) = match event {
                "refused" => (StatusCode::INTERNAL_SERVER_ERROR, (0, 0)),
                _ => (StatusCode::OK, (1, 2)),
            };
            assert_eq!(response.status, status, "{event}: {response:?}");
            assert_eq!(effects(&world, event).await?, rows, "{event}");
        }
        stored(&world, requests.len() - 1).await?;
        Ok(())
    }
);

both!(
    a_killed_host_answers_each_request_of_a_group_once,
    |kind: Kind| async move {
        let mut world = start_with_one_lane(kind).await?;
        for round in 0..4_u32 {
            let requests: Vec<Value> = (0..20)
                .map(|n| everything(&format!("r{round}e{n}")))
                .collect();
            let client = Client::new();
            let url = format!("{}/do/it", world.ingress_url()?);
            let first: Vec<_> = requests
                .iter()
                .map(|what| {
                    let key = what["event"].as_str().unwrap_or_default().to_owned();
                    let request = client.post(&url).header("Idempotency-Key", key).json(what);
                    tokio::spawn(send(request))
                })
                .collect();
            tokio::time::sleep(Duration::from_millis(10 * u64::from(round))).await;
            world.kill_host()?;
            let first = join_all(first).await;
            world.start_host().await?;
            for (what, first) in requests.iter().zip(first) {
                let event = what["event"].as_str().unwrap_or_default();
                let again = post(&world, event, what).await?;
                assert_eq!(again.status, StatusCode::OK, "{again:?}");
                if let Ok(first) = first? {
                    assert_eq!(again.stable_parts(), first.stable_parts());
                }
                assert_eq!(effects(&world, event).await?, (1, 2), "{event}");
            }
        }
        stored(&world, 80).await?;
        Ok(())
    }
);

/// A request that no lane takes for ten seconds is refused, and was not handled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waits_too_long_is_refused() -> Result<()> {
    let world = start_with_one_lane(Kind::Sqlite).await?;
    let url = format!("{}/do/it", world.ingress_url()?);
    let spin = json!({ "event": "spin", "do": ["spin"] });
    let request = Client::new().post(url).header("Idempotency-Key", "spin");
    let spinning = tokio::spawn(send(request.json(&spin)));
    until_in_flight(&world).await?;
    let refused = post(&world, "e", &everything("e")).await?;
    assert_eq!(
        (refused.status.as_u16(), refused.code().as_str()),
        (503, "busy")
    );
    assert_eq!(spinning.await??.code(), "handler-timeout");
    assert_eq!(effects(&world, "e").await?, (0, 0));
    let handled = post(&world, "e", &everything("e")).await?;
    assert!(handled.status == StatusCode::OK && !handled.replayed());
    Ok(())
}
