//! Heads of requests and responses: hosts, bytes of header values, statuses.

use support::nats::NewMessage;
use support::world;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_must_name_exactly_one_host() -> Result<()> {
    let routes = manifest("")?
        + "\n[[worker.route]]\npath = \"/all/{event}\"\nmethods = [\"GET\"]\ncache = \"1h\"\n";
    let world = World::start(Kind::Sqlite, &(routes + "cache_scope = \"shared\"\n")).await?;
    let ask = |target: &str, version: &str, hosts: &[&str]| {
        let hosts: String = hosts
            .iter()
            .map(|host| format!("Host: {host}\r\n"))
            .collect();
        format!("GET {target} HTTP/{version}\r\n{hosts}Connection: close\r\n\r\n").into_bytes()
    };
    for (target, hosts) in [
        ("/all/e?echo", &[][..]),
        ("/all/e?echo", &["good.example", "evil.example"]),
        ("/all/e?echo", &["evil/example"]),
        ("http://evil.example/all/e?echo", &["good.example"]),
        ("http://good.example/all/e?echo", &[]),
    ] {
        let (status, response) = send_raw(&world, &ask(target, "1.1", hosts)).await?;
        assert!(
            status == 400 && response.contains("host-refused"),
            "{target} {hosts:?}: {response}"
        );
    }
    let (status, response) = send_raw(
        &world,
        &ask("http://good.example/all/e?echo", "1.1", &["good.example"]),
    )
    .await?;
    assert!(status == 200 && response.contains("fwd=miss"), "{response}");
    let (_, response) = send_raw(&world, &ask("/all/e?echo", "1.1", &["good.example"])).await?;
    assert!(response.contains("hit"), "{response}");
    let (_, response) = send_raw(&world, &ask("/all/e?echo", "1.1", &["other.example"])).await?;
    assert!(response.contains("fwd=miss"), "{response}");
    assert_eq!(
        send_raw(&world, &ask("/all/e?echo", "1.0", &[])).await?.0,
        200
    );
    Ok(())
}

both!(
    utf_8_in_message_headers_is_published_byte_by_byte,
    |kind: Kind| async move {
        let world = World::start(kind, &world::manifest("")?).await?;
        let customer = "J\u{fc}rgen M\u{fc}ller \u{20ac}";
        let publish = |key: &str, subject: &str, lines: &[(&str, &[u8])]| {
            let mut request =
                reqwest::Client::new().post(format!("{}/publish/{subject}", world.ingress_url()?));
            for (name, value) in lines {
                request = request.header(*name, reqwest::header::HeaderValue::from_bytes(value)?);
            }
            Ok::<_, anyhow::Error>(send(request.header("Idempotency-Key", key)))
        };

        // Valid UTF-8 passes through HTTP and the CLI.
        let accepted =
            publish("a", "out.a", &[("X-Message-Customer", customer.as_bytes())])?.await?;
        assert_eq!(accepted.status, StatusCode::ACCEPTED, "{accepted:?}");
        let header = format!("Customer: {customer}");
        world
            .oncely(&["publish", "--http", "--header", &header, "out.b", "hello"])
            .await?;
        for stored in stored(&world, 2).await? {
            assert_eq!(
                stored.headers.get("customer").map(String::as_str),
                Some(customer),
                "{stored:?}"
            );
        }

        // Other bytes and reserved headers are refused.
        for (name, value) in [
            ("X-Message-Customer", &b"J\xfcrgen"[..]),
            ("X-Message-ce-id", b"\xc3"),
            ("Content-Type", b"text/\xff"),
            ("X-Message-Nats-Msg-Id", b"1"),
            ("X-Message-Oncely-Dead-Letter", b"1"),
        ] {
            let refused = publish("b", "out.c", &[(name, value)])?.await?;
            assert_eq!(
                (refused.status.as_u16(), refused.code().as_str()),
                (400, "header-refused"),
                "{name}"
            );
        }
        let refused = publish("b", "out.%FF", &[])?.await?;
        assert_eq!(
            (refused.status.as_u16(), refused.code().as_str()),
            (400, "subject-refused")
        );

        // One event through HTTP and NATS has one effect.
        let (id, source) = ("\u{e9}v\u{e8}nement-1", "/caf\u{e9}");
        let over_http = [
            ("X-Message-ce-id", id.as_bytes()),
            ("X-Message-ce-source", source.as_bytes()),
            ("X-Message-do", b"insert"),
        ];
        assert_eq!(
            publish("c", "in.e", &over_http)?.await?.status,
            StatusCode::ACCEPTED
        );
        world.until("select count(*) from oncely.inbox", 1).await?;
        let mut over_nats = NewMessage::new("in.e", id, "insert", "");
        over_nats
            .headers
            .push(("ce-source".to_owned(), source.to_owned()));
        world.nats.publish_all(vec![over_nats]).await?;
        eventually("the message is a duplicate", || async {
            let text = metrics::scrape(&world).await?;
            let duplicates = r#"oncely_messages_total{worker="test",verdict="duplicate"}"#;
            ensure!(metrics::value(&text, duplicates) == Some(1.0), "{text}");
            Ok(Some(()))
        })
        .await?;
        assert_eq!(effects(&world, &format!("{source}|{id}")).await?, (1, 2));
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    a_status_below_200_or_above_599_is_the_handlers_failure,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        for status in [100, 101, 103, 199, 600, 999] {
            let event = format!("e{status}");
            let began = Instant::now();
            let response = post(
                &world,
                &event,
                &json!({ "event": event, "do": ["effect", "send"], "status": status }),
            )
            .await?;
            assert_eq!(
                (response.status.as_u16(), response.code().as_str()),
                (500, "handler-failed"),
                "{status}"
            );
            // It is not mistaken for an outage, which would be retried for three seconds.
            assert!(
                began.elapsed() < Duration::from_millis(2500),
                "{status} took {:?}",
                began.elapsed()
            );
            let url = format!("{}/do/it?status={status}", world.ingress_url()?);
            let read = send(reqwest::Client::new().get(url)).await?;
            assert_eq!(
                (read.status.as_u16(), read.code().as_str()),
                (500, "handler-failed"),
                "{status}"
            );
            assert_eq!(effects(&world, &event).await?, (0, 0));
        }
        for status in [200, 299, 599] {
            let event = format!("e{status}");
            assert_eq!(
                post(&world, &event, &json!({ "event": event, "status": status }))
                    .await?
                    .status
                    .as_u16(),
                status
            );
        }
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.request")
                .await?,
            3
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_message_headers_keep_their_case() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let head = "POST /publish/out.a HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nConnection: close\r\nContent-Length: 2\r\n\
        X-Message-CustomerName: a\r\nX-MESSAGE-ce-ID: \u{e9}\r\nx-message-Twice: 1\r\nX-Message-twice: 2\r\n\r\nhi";
    let (status, response) = send_raw(&world, head.as_bytes()).await?;
    assert_eq!(status, 202, "{response}");
    let stored = stored(&world, 1).await?;
    let mut names: Vec<&str> = stored[0].headers.keys().map(String::as_str).collect();
    names.retain(|name| !name.starts_with("Nats-") && !name.starts_with("Oncely-"));
    names.sort_unstable();
    assert_eq!(
        names,
        ["CustomerName", "Twice", "ce-ID", "twice"],
        "{stored:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn responses_without_content_end_after_their_head() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    for status in [204, 205, 304] {
        let head =
            format!("GET /do/it?status={status} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let (answered, response) = send_raw(&world, head.as_bytes()).await?;
        assert_eq!(answered, status);
        assert!(
            response.ends_with("\r\n\r\n") && !response.contains("rows"),
            "{response}"
        );
    }
    // Only the host may mark a response as replayed.
    let url = format!("{}/do/it?h=Idempotent-Replayed:true", world.ingress_url()?);
    assert!(!send(reqwest::Client::new().get(url)).await?.replayed());
    Ok(())
}
