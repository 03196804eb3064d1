//! Slow, silent and too many clients.

use super::*;

/// A host with these settings.
async fn host_with(settings: &[(&str, &str)]) -> Result<World> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let variable = |(name, value): &(&str, &str)| (format!("ONCELY_{name}"), (*value).to_owned());
    world.host_env.extend(settings.iter().map(variable));
    world.start_host().await?;
    Ok(world)
}

async fn connect(url: &str, bytes: &[u8]) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(url.replace("http://", ""))
        .await
        .context("connect to the host")?;
    stream.write_all(bytes).await.context("send bytes")?;
    Ok(stream)
}

/// The head of a request with a key and a body of this length.
fn head(key: &str, length: usize) -> String {
    format!(
        "POST /do/it HTTP/1.1\r\nHost: a\r\nIdempotency-Key: {key}\r\nContent-Length: {length}\r\n\r\n"
    )
}

/// The status of the next response.
async fn status(stream: &mut TcpStream) -> Result<u16> {
    let mut response = Vec::new();
    while !response.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut response))
            .await?
            .context("read a response")?;
        ensure!(read > 0, "the connection was closed");
    }
    let response = String::from_utf8_lossy(&response).into_owned();
    response
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("read `{response}`"))
}

/// Waits until the host closes a connection without a response.
async fn closed(stream: &mut TcpStream) -> Result<()> {
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest))
        .await
        .context("wait for the host to close the connection")?;
    ensure!(
        rest.is_empty(),
        "the host answered {}",
        String::from_utf8_lossy(&rest)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_timeouts_end_slow_heads_bodies_and_idle_connections() -> Result<()> {
    let settings = [
        ("HTTP_HEAD_TIMEOUT", "300ms"),
        ("HTTP_BODY_TIMEOUT", "300ms"),
        ("HTTP_IDLE_TIMEOUT", "400ms"),
    ];
    let world = host_with(&settings).await?;
    let requests = world.ingress_url()?;
    let mut silent = connect(&requests, b"").await?;
    let mut half = connect(&requests, b"POST /do/it HTTP/1.1\r\nHost: a\r\nX-").await?;
    let mut slow = connect(&requests, (head("slow", 100) + "{").as_bytes()).await?;
    let what = everything("e").to_string();
    let mut idle = connect(&requests, (head("idle", what.len()) + &what).as_bytes()).await?;
    assert_eq!(
        (status(&mut slow).await?, status(&mut idle).await?),
        (408, 200)
    );
    for stream in [&mut silent, &mut half] {
        closed(stream).await?;
    }
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, idle.read_to_end(&mut rest))
        .await?
        .context("read the rest of a response")?;
    assert_eq!(effects(&world, "e").await?, (1, 2));
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.request")
            .await?,
        1
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_memory_bounds_unfinished_bodies() -> Result<()> {
    let world = host_with(&[("HTTP_MEMORY", "1MiB")]).await?;
    let (requests, half) = (world.ingress_url()?, "x".repeat(600 << 10));
    let mut first = connect(&requests, (head("first", 700 << 10) + &half).as_bytes()).await?;

    // The body that the host reads last exceeds the remaining memory.
    let mut second = connect(&requests, head("second", 700 << 10).as_bytes()).await?;

    // The host may close the connection before it has read everything.
    let _ = second.write_all(half.as_bytes()).await;
    let refused = tokio::select! {
        refused = status(&mut first) => refused?,
        refused = status(&mut second) => refused?,
    };
    assert_eq!(refused, 503);
    drop((first, second));
    let end = Instant::now() + PATIENCE;
    loop {
        let what = json!({ "event": "e", "do": ["effect"], "say": half });
        match post(&world, "third", &what).await {
            Ok(response) if response.status == StatusCode::OK => break,
            Ok(response) => assert_eq!(
                (response.code().as_str(), response.header("retry-after")),
                ("busy", Some("1"))
            ),
            Err(_) => {}
        }
        ensure!(
            Instant::now() < end,
            "the memory of a closed connection is still reserved"
        );
    }
    assert_eq!(effects(&world, "e").await?, (1, 2));
    Ok(())
}

/// 140 connections and 128 files: the control API has its own share, and idle connections are
/// closed on each listener.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_over_the_file_limit_do_not_block_the_host() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let script = world.folder.path().join("limited");
    let program = guests::oncely()?;
    std::fs::write(
        &script,
        format!(
            "#!/bin/sh\nulimit -n 128\nexec '{}' \"$@\"\n",
            program.display()
        ),
    )?;
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    world.program = Some(script);
    world.start_host().await?;
    let (requests, control) = (world.ingress_url()?, world.control_url()?);

    // Fill each listener, then send probes and a request
    let mut open = Vec::new();
    for url in [&requests, &control] {
        for number in 0..140 {
            let bytes: &[u8] = if number % 2 == 0 {
                b""
            } else {
                b"GET /livez HTTP/1.1\r\nHost: a\r\nX-"
            };
            open.push(connect(url, bytes).await?);
        }
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(10))
            .build()?;
        let began = Instant::now();
        let alive = client
            .get(format!("{control}/livez"))
            .send()
            .await
            .context("request `/livez`")?;
        assert_eq!(alive.status(), StatusCode::OK);
        let ready = client
            .get(format!("{control}/readyz"))
            .send()
            .await
            .context("request `/readyz`")?;
        assert_eq!(ready.status(), StatusCode::OK, "{}", ready.text().await?);
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "the probes took {:?}",
            began.elapsed()
        );
        let event = format!("e{}", open.len());
        assert_eq!(
            post(&world, &event, &everything(&event)).await?.status,
            StatusCode::OK
        );
        assert_eq!(effects(&world, &event).await?, (1, 2));
    }

    // The host stayed below its file limit.
    let pid = world.host_pid().context("find the host")?;
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .context("count the host's open files")?
        .count();
    assert!(files < 128, "{files}");
    assert!(
        !world.host_log().contains("Too many open files"),
        "{}",
        world.host_log()
    );
    Ok(())
}
