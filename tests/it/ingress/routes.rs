//! Routing of requests to workers, and refusals before routing.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_a_route_is_refused() -> Result<()> {
    let world = World::start(
        Kind::Sqlite,
        &manifest("methods = [\"POST\", \"GET\"]\nbody_size = \"1KiB\"")?,
    )
    .await?;
    let at = |path: &str| Ok::<_, anyhow::Error>(format!("{}{path}", world.ingress_url()?));
    let client = reqwest::Client::new();
    let nowhere = send(client.get(at("/nowhere")?)).await?;
    assert_eq!(
        (nowhere.status.as_u16(), nowhere.code().as_str()),
        (404, "no-such-route")
    );
    let other = send(client.delete(at("/do/it")?)).await?;
    assert_eq!(
        (other.status.as_u16(), other.code().as_str()),
        (405, "method-not-allowed")
    );
    assert_eq!(other.header("allow"), Some("POST, GET"));
    let large = send(
        client
            .post(at("/do/it")?)
            .header("Idempotency-Key", "a")
            .body("x".repeat(1025)),
    )
    .await?;
    assert_eq!(
        (large.status.as_u16(), large.code().as_str()),
        (413, "body-too-large")
    );
    let heavy = client
        .get(at("/do/it")?)
        .header("X-Heavy", "x".repeat(40 << 10));
    assert_eq!(send(heavy).await?.code(), "headers-too-large");
    Ok(())
}

/// A starting host has an ingress before its routes. A client would give up on a 404.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_starting_host_answers_503_until_its_routes_are_loaded() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    for round in 0..3 {
        world.kill_host()?;
        world.spawn_host()?;
        let (event, end) = (format!("e{round}"), Instant::now() + PATIENCE);
        loop {
            ensure!(
                Instant::now() < end,
                "the host did not start:\n{}",
                world.host_log()
            );
            // As soon as the ingress is open.
            match post(&world, &event, &json!({ "event": event, "do": ["effect"] })).await {
                Ok(response) if response.status == StatusCode::OK => break,
                Ok(response) => assert_eq!(
                    (response.status.as_u16(), response.code().as_str()),
                    (503, "starting")
                ),
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }
    Ok(())
}

both!(
    a_message_is_published_once_for_each_key,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let url = format!("{}/publish/out.something", world.ingress_url()?);
        let publish = |key: &str, body: &str| {
            let request = reqwest::Client::new()
                .post(&url)
                .header("Content-Type", "text/plain");
            send(
                request
                    .header("Idempotency-Key", key)
                    .header("X-Message-Kind", "test")
                    .body(body.to_owned()),
            )
        };
        let first = publish("key", "hello").await?;
        assert_eq!(first.status, StatusCode::ACCEPTED, "{first:?}");
        let again = publish("key", "hello").await?;
        assert!(again.replayed());
        assert_eq!(again.stable_parts(), first.stable_parts());
        assert_eq!(
            publish("key", "other").await?.status,
            StatusCode::UNPROCESSABLE_ENTITY
        );
        let stored = stored(&world, 1).await?;
        assert_eq!(stored[0].body, b"hello");
        assert_eq!(
            stored[0].headers.get("Nats-Msg-Id").map(String::as_str),
            first.json()?["id"].as_str()
        );
        assert_eq!(
            stored[0].headers.get("kind").map(String::as_str),
            Some("test")
        );
        let missing = send(reqwest::Client::new().post(&url).body("hello")).await?;
        assert_eq!(missing.code(), "idempotency-key-missing");
        let ungranted_url = format!("{}/publish/secret.subject", world.ingress_url()?);
        let refused = send(
            reqwest::Client::new()
                .post(ungranted_url)
                .header("Idempotency-Key", "a")
                .body("x"),
        )
        .await?;
        assert_eq!(
            (refused.status.as_u16(), refused.code().as_str()),
            (403, "subject-refused")
        );
        Ok(())
    }
);

both!(
    a_new_version_is_swapped_in_without_a_lost_request,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let asking = async {
            let mut versions = Vec::new();
            for round in 0..200 {
                let event = format!("e{round}");
                let response =
                    post(&world, &event, &json!({ "event": event, "do": ["effect"] })).await?;
                assert_eq!(response.status, StatusCode::OK, "{response:?}");
                versions.push(response.json()?["version"].as_u64().unwrap_or_default());
                if versions.last() == Some(&2) {
                    break;
                }
            }
            Ok::<_, anyhow::Error>(versions)
        };
        let deploying = async {
            world.write_manifest(&manifest("wait = \"2s\"")?)?;
            world.oncely(&["deploy", "oncely.toml"]).await
        };
        let (versions, deployed) = tokio::join!(asking, deploying);
        deployed?;
        let versions = versions?;
        assert!(
            versions.is_sorted() && versions.first() == Some(&1),
            "{versions:?}"
        );
        let again = post(&world, "e0", &json!({ "event": "e0", "do": ["effect"] })).await?;
        assert!(again.replayed());
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_component_must_match_the_routes_of_its_manifest() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let (http, messages) = (guests::http_component()?, guests::component()?);
    let text = manifest("")?.replace(&http.display().to_string(), &messages.display().to_string());
    world.write_manifest(&text)?;
    let refused = world
        .oncely(&["deploy", "oncely.toml"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("handles messages, and the manifest gives it routes"),
        "{refused}"
    );
    let other = manifest("")?.replace("name = \"test\"", "name = \"other\"");
    world.write_manifest(&other)?;
    let refused = world
        .oncely(&["deploy", "oncely.toml"])
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("overlap"), "{refused}");
    Ok(())
}

/// A component of another toolchain for plain `wasi:http`, with the same guarantees.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_wasi_http_component_in_python_is_served() -> Result<()> {
    let component = tokio::task::spawn_blocking(guests::python_http_component).await??;
    let manifest = format!(
        "[[worker]]\nname = \"python\"\ncomponent = \"{}\"\n[worker.limits]\nmemory = \"256MiB\"\ntime = \"20s\"\n\
         [[worker.route]]\npath = \"/python\"\n",
        component.display()
    );
    let world = World::start(Kind::Sqlite, &manifest).await?;
    let url = format!("{}/python", world.ingress_url()?);
    let ask = || {
        send(
            reqwest::Client::new()
                .post(&url)
                .header("Idempotency-Key", "key")
                .body("hello"),
        )
    };
    let first = ask().await?;
    assert_eq!(
        (first.status, first.body.as_slice()),
        (StatusCode::CREATED, &b"you said hello"[..]),
        "{first:?}"
    );
    assert_eq!(first.header("x-from"), Some("python"));
    let again = ask().await?;
    assert!(again.replayed());
    assert_eq!(again.stable_parts(), first.stable_parts());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_publish_command_over_http_stores_once_per_key() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let publish = [
        "publish",
        "--http",
        "--key",
        "p-1",
        "--header",
        "Kind: test",
        "out.something",
        "hello",
        "--json",
    ];
    let first = world.oncely(&publish).await?;
    assert_eq!(world.oncely(&publish).await?, first);
    let printed = world.oncely(&publish[..8]).await?;
    assert!(printed.contains("key p-1 (already accepted)"), "{printed}");
    let other = world
        .oncely(&[
            "publish",
            "--http",
            "--key",
            "p-1",
            "out.something",
            "other",
        ])
        .await;
    let refused = other.unwrap_err().to_string();
    assert!(
        refused.contains("the key \"p-1\" was used before"),
        "{refused}"
    );
    let stored = stored(&world, 1).await?;
    assert_eq!(
        (
            stored[0].body.as_slice(),
            stored[0].headers.get("kind").map(String::as_str)
        ),
        (&b"hello"[..], Some("test"))
    );
    Ok(())
}
