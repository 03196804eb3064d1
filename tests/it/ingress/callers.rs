//! A caller never gets another caller's response, neither cached nor stored under a key.

use reqwest::header::HeaderValue;

use super::*;

/// Routes of [`manifest`], and a cached one.
fn cached(terms: &str) -> Result<String> {
    Ok(manifest("")?
        + "\n[[worker.route]]\npath = \"/mine/{event}\"\nmethods = [\"GET\"]\ncache = \"1h\"\n"
        + terms)
}

/// A host that identifies its callers by a header of the proxy, such as `X-User`.
async fn behind_a_proxy(manifest: &str, caller: &str) -> Result<World> {
    let mut world = World::without_host(Kind::Sqlite, manifest).await?;
    world
        .host_env
        .push(("ONCELY_HTTP_CALLER".to_owned(), caller.to_owned()));
    world.start_host().await?;
    Ok(world)
}

type Lines<'a> = &'a [(&'a str, &'a [u8])];

fn with(mut request: reqwest::RequestBuilder, lines: Lines<'_>) -> Result<reqwest::RequestBuilder> {
    for (name, value) in lines {
        request = request.header(*name, HeaderValue::from_bytes(value)?);
    }
    Ok(request)
}

/// Reads a path with these headers: the response, and whether it came from the cache.
async fn read(world: &World, path: &str, lines: Lines<'_>) -> Result<(TestResponse, bool)> {
    let response = send(with(
        reqwest::Client::new().get(format!("{}{path}", world.ingress_url()?)),
        lines,
    )?)
    .await?;
    assert_eq!(response.status, StatusCode::OK, "{response:?}");
    let is_hit = response
        .header("cache-status")
        .unwrap_or_default()
        .contains("hit");
    Ok((response, is_hit))
}

/// Checks that the first headers are answered from the cache when repeated, and the others are not.
async fn check_cached_separately(
    world: &World,
    path: &str,
    one: Lines<'_>,
    other: Lines<'_>,
) -> Result<()> {
    let (first, is_hit) = read(world, path, one).await?;
    assert!(!is_hit, "{path} {one:?}");
    let (again, is_hit) = read(world, path, one).await?;
    assert!(is_hit && again.body == first.body, "{path} {one:?}");
    let (others, is_hit) = read(world, path, other).await?;
    assert!(!is_hit, "{path} {one:?} {other:?}: {others:?}");
    assert_ne!(others.body, first.body, "{path} {one:?} {other:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cached_responses_depend_on_all_caller_header_values() -> Result<()> {
    let plain = World::start(Kind::Sqlite, &cached("")?).await?;
    let proxied = behind_a_proxy(&cached("")?, "X-User").await?;
    let theme: (&str, &[u8]) = ("cookie", b"theme=dark");
    let pairs: &[(&World, Lines<'_>, Lines<'_>)] = &[
        (
            &plain,
            &[theme, ("cookie", b"session=ALICE")],
            &[theme, ("cookie", b"session=BOB")],
        ),
        (&plain, &[theme, ("cookie", b"session=ALICE")], &[theme]),
        (&plain, &[theme], &[theme, ("cookie", b"session=ALICE")]),
        (
            &plain,
            &[("authorization", b"alice")],
            &[("cookie", b"alice")],
        ),
        (
            &plain,
            &[("authorization", b"alice"), ("cookie", b"bob")],
            &[("authorization", b"bob"), ("cookie", b"alice")],
        ),
        (&plain, &[("authorization", b"alice")], &[]),
        (&plain, &[("authorization", b"")], &[]),
        (
            &plain,
            &[("authorization", b"Basic \xe9")],
            &[("authorization", b"Basic \xe8")],
        ),
        (
            &plain,
            &[("accept", b"text/html"), ("accept", b"text/css")],
            &[("accept", b"text/html")],
        ),
        (
            &plain,
            &[("accept-language", b"\xe9")],
            &[("accept-language", b"\xe8")],
        ),
        (&proxied, &[("x-user", b"alice")], &[("cookie", b"alice")]),
        (
            &proxied,
            &[("x-user", b"alice")],
            &[("authorization", b"alice")],
        ),
        (
            &proxied,
            &[("x-user", b"p"), ("authorization", b"alice")],
            &[("x-user", b"p"), ("authorization", b"bob")],
        ),
        (
            &proxied,
            &[("authorization", b"alice")],
            &[("authorization", b"bob")],
        ),
    ];

    for (number, (world, one, other)) in pairs.iter().enumerate() {
        check_cached_separately(world, &format!("/mine/{number}?echo"), one, other).await?;
    }

    // Front ends may split cookies differently each time.
    let joined: Lines<'_> = &[("cookie", b"theme=dark; session=EVE")];
    assert!(!read(&plain, "/mine/joined?echo", joined).await?.1);
    assert!(
        read(
            &plain,
            "/mine/joined?echo",
            &[theme, ("cookie", b"session=EVE")]
        )
        .await?
        .1
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_vary_and_cache_control_line_is_respected() -> Result<()> {
    let world = World::start(Kind::Sqlite, &cached("")?).await?;
    let for_all = World::start(Kind::Sqlite, &cached("cache_scope = \"shared\"")?).await?;
    let (alice, bob): (Lines<'_>, Lines<'_>) = (&[("x-tenant", b"alice")], &[("x-tenant", b"bob")]);
    let not_kept = [
        (&world, "h=vary:x-tenant"),
        (&world, "h=vary:accept&h=vary:X-Tenant"),
        (&world, "h=vary:accept,X-Tenant"),
        (&world, "h=vary:*"),
        (
            &world,
            "h=cache-control:max-age=60&h=cache-control:no-store",
        ),
        (&world, "h=cache-control:no-cache"),
        (&for_all, "h=vary:origin"),
        (&for_all, "h=vary:cookie"),
        (&for_all, "h=vary:authorization"),
        (
            &for_all,
            "h=cache-control:max-age=60&h=cache-control:private",
        ),
        (&for_all, "h=cache-control:private=x-tenant"),
    ];
    for (number, (world, headers)) in not_kept.iter().enumerate() {
        let path = format!("/mine/{number}?echo&{headers}");
        for lines in [alice, bob, alice] {
            let (response, is_hit) = read(world, &path, lines).await?;
            let tenant = String::from_utf8_lossy(lines[0].1).into_owned();
            assert!(
                !is_hit && String::from_utf8_lossy(&response.body).contains(&tenant),
                "{headers}: {response:?}"
            );
        }
    }
    for (number, headers) in [
        "h=vary:cookie,accept",
        "h=vary:Authorization",
        "h=cache-control:private",
    ]
    .iter()
    .enumerate()
    {
        let path = format!("/mine/kept{number}?echo&{headers}");
        assert!(!read(&world, &path, alice).await?.1, "{headers}");
        assert!(read(&world, &path, alice).await?.1, "{headers}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_route_refuses_a_body() -> Result<()> {
    let world = World::start(Kind::Sqlite, &cached("cache_scope = \"shared\"")?).await?;
    let url = format!("{}/mine/e?echo", world.ingress_url()?);
    let sized = send(reqwest::Client::new().get(&url).body("EVIL")).await?;
    assert_eq!(
        (sized.status.as_u16(), sized.code().as_str()),
        (400, "body-refused")
    );
    let chunked = |path: &str, body: &str| {
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        head + body
    };
    let (status, _) = send_raw(
        &world,
        chunked("/mine/e?echo", "4\r\nEVIL\r\n0\r\n\r\n").as_bytes(),
    )
    .await?;
    assert_eq!(status, 400);
    let (status, response) =
        send_raw(&world, chunked("/mine/e?echo", "0\r\n\r\n").as_bytes()).await?;
    assert!(
        status == 200 && response.contains("fwd=miss") && !response.contains("EVIL"),
        "{response}"
    );

    // Also if a response is cached.
    let sized = send(reqwest::Client::new().get(&url).body("EVIL")).await?;
    assert_eq!(sized.status, StatusCode::BAD_REQUEST);
    Ok(())
}

both!(
    a_doubled_caller_header_is_refused,
    |kind: Kind| async move {
        let world = World::start(kind, &cached("")?).await?;
        let client = reqwest::Client::new();
        let url = format!("{}/do/it", world.ingress_url()?);
        for caller in ["ALICE", "BOB"] {
            let request = client
                .post(&url)
                .header("Authorization", "proxy")
                .header("Authorization", caller);
            let refused = send(
                request
                    .header("Idempotency-Key", "key")
                    .json(&everything("e")),
            )
            .await?;
            assert_eq!(
                (refused.status.as_u16(), refused.code().as_str()),
                (400, "caller-ambiguous")
            );
        }
        let request = client
            .post(&url)
            .header("Idempotency-Key", "key")
            .header("Idempotency-Key", "key");
        let refused = send(request.json(&everything("e"))).await?;
        assert_eq!(
            (refused.status.as_u16(), refused.code().as_str()),
            (400, "idempotency-key-invalid")
        );
        let reads = client.get(format!("{}/mine/e", world.ingress_url()?));
        let refused = send(
            reads
                .header("Authorization", "proxy")
                .header("Authorization", "ALICE"),
        )
        .await?;
        assert_eq!(refused.code(), "caller-ambiguous");
        assert_eq!(effects(&world, "e").await?, (0, 0));
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_caller_may_name_cookies_and_separates_callers() -> Result<()> {
    let by_cookie = behind_a_proxy(&manifest("")?, "Cookie").await?;
    let by_user = behind_a_proxy(&manifest("")?, "X-User").await?;
    let ask = |world: &World, event: &str, lines: Lines<'_>| {
        let request = reqwest::Client::new().post(format!("{}/do/it", world.ingress_url()?));
        let what = json!({ "event": event, "do": ["effect"] });
        Ok::<_, anyhow::Error>(send(
            with(request, lines)?
                .header("Idempotency-Key", "key")
                .json(&what),
        ))
    };
    let alice: Lines<'_> = &[("cookie", b"theme=dark"), ("cookie", b"session=ALICE")];
    assert!(!ask(&by_cookie, "e", alice)?.await?.replayed());
    assert!(
        !ask(
            &by_cookie,
            "e",
            &[("cookie", b"theme=dark"), ("cookie", b"session=BOB")]
        )?
        .await?
        .replayed()
    );
    assert!(
        !ask(&by_cookie, "e", &[("cookie", b"theme=dark")])?
            .await?
            .replayed()
    );

    // The same cookies on one line identify the same caller.
    assert!(
        ask(&by_cookie, "e", &[("cookie", b"theme=dark; session=ALICE")])?
            .await?
            .replayed()
    );
    assert_eq!(effects(&by_cookie, "e").await?, (3, 6));
    let refused = ask(&by_user, "e", &[("x-user", b"proxy"), ("x-user", b"alice")])?.await?;
    assert_eq!(refused.code(), "caller-ambiguous");
    assert!(
        !ask(&by_user, "e", &[("x-user", b"alice")])?
            .await?
            .replayed()
    );
    assert!(!ask(&by_user, "e", &[("x-user", b"bob")])?.await?.replayed());
    assert!(
        ask(&by_user, "e", &[("x-user", b"alice")])?
            .await?
            .replayed()
    );
    Ok(())
}
