//! Requests that the ingress refuses, such as unpublishable messages, and requests that it accepts.

use support::world;

use super::*;

fn publish(world: &World, key: &str, subject: &str) -> Result<reqwest::RequestBuilder> {
    let url = format!("{}/publish/{subject}", world.ingress_url()?);
    Ok(reqwest::Client::new()
        .post(url)
        .header("Idempotency-Key", key))
}

/// The maximum payload of the test's server.
const MAX_PAYLOAD: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unpublishable_message_is_refused_before_its_key_claim() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &world::manifest("")?).await?;
    world.host_env = vec![(
        "ONCELY_HTTP_PUBLISH".to_owned(),
        "out.>,nowhere.>".to_owned(),
    )];
    world.start_host().await?;
    let long = "x".repeat(7_000);
    for (name, headers, body) in [
        ("body", 0, MAX_PAYLOAD),
        ("id", 0, MAX_PAYLOAD - 10),
        ("headers", 3, MAX_PAYLOAD - 3 * 7_000),
    ] {
        let mut request = publish(&world, name, "out.a")?;
        for n in 0..headers {
            request = request.header(format!("X-Message-H{n}"), &long);
        }
        let response = send(request.body(vec![b'x'; body])).await?;
        assert_eq!(
            (response.status.as_u16(), response.code().as_str()),
            (413, "body-too-large"),
            "{name}: {response:?}"
        );
    }

    // The keys are still free for other messages, and the largest possible message is accepted.
    let response =
        send(publish(&world, "body", "out.a")?.body(vec![b'x'; MAX_PAYLOAD - 400])).await?;
    assert_eq!(response.status, StatusCode::ACCEPTED, "{response:?}");
    stored(&world, 1).await?;
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where parked_at is not null")
            .await?,
        0
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subject_without_a_stream_is_refused_until_it_has_one() -> Result<()> {
    let world = World::start(Kind::Sqlite, &world::manifest("")?).await?;

    // The host permits publishing to `in.>` and `out.>`. While it remembers the stream it accepts
    // messages, and a key of an accepted message always gets that response: each try has its own.
    world.nats.delete_stream("OUT").await?;
    let end = Instant::now() + PATIENCE;
    let mut tries = 0;
    let response = loop {
        tries += 1;
        let key = format!("k{tries}");
        let response = send(publish(&world, &key, "out.a")?.body("x")).await?;
        if response.status != StatusCode::ACCEPTED || Instant::now() > end {
            break response;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(
        (response.status.as_u16(), response.code().as_str()),
        (404, "no-stream"),
        "{response:?}"
    );
    world
        .nats
        .make_stream("OUT", "out.>", Duration::from_secs(120))
        .await?;
    let key = format!("k{tries}");
    let response = send(publish(&world, &key, "out.a")?.body("x")).await?;
    assert_eq!(response.status, StatusCode::ACCEPTED, "{response:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn safe_methods_ignore_the_idempotency_key() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let url = format!("{}/do/it", world.ingress_url()?);
    let long = "k".repeat(300);
    for key in ["\"abc", "", &long] {
        for method in [reqwest::Method::GET, reqwest::Method::HEAD] {
            let request = reqwest::Client::new()
                .request(method.clone(), &url)
                .header("Idempotency-Key", key);
            let response = send(request).await?;
            assert_ne!(
                response.status.as_u16(),
                400,
                "{method} with `{key}`: {response:?}"
            );
        }
        let response = send(
            reqwest::Client::new()
                .post(&url)
                .header("Idempotency-Key", key)
                .body("{}"),
        )
        .await?;
        assert_eq!(
            (response.status.as_u16(), response.code().as_str()),
            (400, "idempotency-key-invalid")
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_without_methods_accepts_standard_methods_only() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    for method in ["TRACE", "CONNECT", "BREW", "get"] {
        let target = if method == "CONNECT" {
            "a:80"
        } else {
            "/do/it"
        };
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n");
        let (status, response) = send_raw(&world, request.as_bytes()).await?;
        assert!([400, 404, 405].contains(&status), "{method}: {response}");
    }
    let options = send(reqwest::Client::new().request(
        reqwest::Method::OPTIONS,
        format!("{}/do/it", world.ingress_url()?),
    ));
    assert_ne!(options.await?.status.as_u16(), 405);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wildcard_may_be_empty_and_an_escape_is_the_same_path() -> Result<()> {
    let routes = manifest("")?.replace("path = \"/do/{*what}\"", "path = \"/{*what}\"")
        + "\n[[worker.route]]\npath = \"/all/{event}\"\nmethods = [\"GET\"]\ncache = \"1h\"\ncache_scope = \"shared\"\n";
    let world = World::start(Kind::Sqlite, &routes).await?;
    let get = |path: &str| {
        let url = world.ingress_url().map(|base| format!("{base}{path}"));
        async move { send(reqwest::Client::new().get(url?)).await }
    };
    assert_ne!(get("/").await?.status.as_u16(), 404);
    let ask = |path: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").into_bytes()
    };
    let (_, response) = send_raw(&world, &ask("/all/7?echo")).await?;
    assert!(response.contains("fwd=miss"), "{response}");
    for same in ["/all/%37?echo", "/all/7?%65cho", "/%61ll/7?echo"] {
        let (_, response) = send_raw(&world, &ask(same)).await?;
        assert!(response.contains("hit"), "{same}: {response}");
    }
    Ok(())
}
