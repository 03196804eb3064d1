//! Tests of a listener with small limits against slow, idle and numerous clients.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::drain::Stop;

const LIMITS: HttpLimits = HttpLimits {
    connections: 100,
    memory: 1 << 20,
    head_timeout: Duration::from_millis(300),
    body_timeout: Duration::from_millis(300),
    idle_timeout: Duration::from_millis(600),
};

/// The timeout for an expected event.
const PATIENCE: Duration = Duration::from_secs(20);

struct Listener {
    address: SocketAddr,
    stop: Stop,
    serving: JoinHandle<()>,
    /// Permits that let requests of `/wait` finish.
    may_end: Arc<Semaphore>,
}

/// Answers with the length of the body.
async fn length(request: axum::extract::Request) -> (StatusCode, String) {
    let memory = request.extensions().get::<BodyMemory>().cloned();
    let read = axum::body::to_bytes(request.into_body(), usize::MAX).await;
    drop(memory);
    match read {
        Ok(body) => (StatusCode::OK, body.len().to_string()),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()),
    }
}

async fn wait(State(may_end): State<Arc<Semaphore>>) -> &'static str {
    may_end.acquire().await.unwrap().forget();
    "waited"
}

async fn start(limits: HttpLimits) -> Listener {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop, may_end) = (
        listener.local_addr().unwrap(),
        Stop::new(),
        Arc::new(Semaphore::new(0)),
    );
    let router = Router::new()
        .route("/length", post(length))
        .route("/wait", get(wait))
        .route(
            "/large",
            get(|| async { Bytes::from(vec![b'x'; 64 << 20]) }),
        )
        .with_state(Arc::clone(&may_end));
    let serving = tokio::spawn(serve("test", listener, router, limits, stop.stopping()));
    Listener {
        address,
        stop,
        serving,
        may_end,
    }
}

impl Listener {
    async fn connect(&self, bytes: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        stream
    }
}

fn upload(length: usize) -> String {
    format!("POST /length HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
}

const WAIT: &str = "GET /wait HTTP/1.1\r\nHost: a\r\n\r\n";

/// Everything received until the connection is closed, and the time that took.
async fn read_to_end(stream: &mut TcpStream) -> (String, Duration) {
    let (began, mut bytes) = (Instant::now(), Vec::new());
    // A connection that is closed with unread bytes is reset.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes))
        .await
        .unwrap();
    (
        String::from_utf8_lossy(&bytes).into_owned(),
        began.elapsed(),
    )
}

/// The response up to and including a text.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(text) {
        let read = timeout(PATIENCE, stream.read_buf(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_ne!(
            read,
            0,
            "no `{text}` in `{}`",
            String::from_utf8_lossy(&bytes)
        );
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn silent_and_slow_heads_and_idle_connections_are_closed() {
    let listener = start(LIMITS).await;
    let mut silent = listener.connect("").await;
    let mut half = listener
        .connect("POST /length HTTP/1.1\r\nHost: a\r\nX-")
        .await;
    let mut idle = listener.connect(&(upload(1) + "x")).await;
    assert!(
        read_until(&mut idle, "\r\n\r\n1")
            .await
            .starts_with("HTTP/1.1 200")
    );
    // Bytes that trickle in do not extend the timeout of a head.
    let trickling = async {
        let mut stream = listener
            .connect("POST /length HTTP/1.1\r\nHost: a\r\nX-")
            .await;
        let began = Instant::now();
        while stream.write_all(b"x").await.is_ok() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        began.elapsed()
    };
    let (silent, half, idle, trickled) = tokio::join!(
        read_to_end(&mut silent),
        read_to_end(&mut half),
        read_to_end(&mut idle),
        trickling
    );
    assert!(silent.0.is_empty() && half.0.is_empty() && idle.0.is_empty());
    for took in [silent.1, half.1, idle.1, trickled] {
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
    // It received its response before its own, longer idle timeout.
    assert!(idle.1 > LIMITS.head_timeout, "{idle:?}");
}

#[tokio::test]
async fn bodies_may_be_long_but_not_slow() {
    let listener = start(LIMITS).await;
    let mut slow = listener.connect(&(upload(1000) + "x")).await;
    let (answer, took) = read_to_end(&mut slow).await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("http_body_timeout"),
        "{answer}"
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
    // Longer than the timeout, but not below the lowest rate.
    let mut steady = listener.connect(&upload(64 << 10)).await;
    for _ in 0..16 {
        steady.write_all(&[b'x'; 4 << 10]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        read_until(&mut steady, "65536")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn an_unread_response_ends_its_connection() {
    let listener = start(LIMITS).await;
    let mut reader = listener
        .connect("GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        .await;
    tokio::time::sleep(LIMITS.body_timeout * 4).await;
    let (answer, _) = read_to_end(&mut reader).await;
    assert!(answer.len() < 64 << 20, "{} bytes received", answer.len());
    // A response that is read arrives whole, whatever its length.
    let mut reader = listener
        .connect("GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(read_to_end(&mut reader).await.0.len() > 64 << 20);
}

#[tokio::test]
async fn the_connection_limit_closes_idle_connections_only() {
    let patient = HttpLimits {
        head_timeout: PATIENCE,
        idle_timeout: PATIENCE,
        connections: 3,
        ..LIMITS
    };
    let listener = start(patient).await;
    let mut busy = listener.connect(WAIT).await;
    let mut idle = Vec::new();
    for _ in 0..10 {
        idle.push(listener.connect("").await);
    }
    for _ in 0..10 {
        let mut stream = listener.connect(&(upload(1) + "x")).await;
        assert!(
            read_until(&mut stream, "\r\n\r\n1")
                .await
                .starts_with("HTTP/1.1 200")
        );
        idle.push(stream);
    }
    listener.may_end.add_permits(1);
    assert!(
        read_until(&mut busy, "waited")
            .await
            .starts_with("HTTP/1.1 200")
    );

    // While all are busy, the next one waits.
    let mut all = [
        listener.connect(WAIT).await,
        listener.connect(WAIT).await,
        listener.connect(WAIT).await,
    ];
    let mut next = listener.connect(&(upload(1) + "x")).await;
    let early = timeout(Duration::from_millis(300), next.read_u8()).await;
    assert!(early.is_err(), "{early:?}");
    listener.may_end.add_permits(3);
    for stream in &mut all {
        read_until(stream, "waited").await;
    }
    read_until(&mut next, "\r\n\r\n1").await;
}

#[tokio::test]
async fn bodies_in_memory_are_bounded() {
    let patient = HttpLimits {
        body_timeout: PATIENCE,
        ..LIMITS
    };
    let listener = start(patient).await;
    // Neither is complete; together they exceed the limit.
    let mut first = listener
        .connect(&(upload(700 << 10) + &"x".repeat(600 << 10)))
        .await;
    let mut second = TcpStream::connect(listener.address).await.unwrap();
    let _ = second
        .write_all((upload(700 << 10) + &"x".repeat(600 << 10)).as_bytes())
        .await;
    let refused = async { read_until(&mut second, "http_memory").await };
    let refused = async { timeout(PATIENCE, refused).await.unwrap() };
    assert!(refused.await.starts_with("HTTP/1.1 400"));
    first
        .write_all("x".repeat(100 << 10).as_bytes())
        .await
        .unwrap();
    assert!(
        read_until(&mut first, "716800")
            .await
            .starts_with("HTTP/1.1 200")
    );
    // Both are done, and the memory is free again.
    let mut third = listener
        .connect(&(upload(900 << 10) + &"x".repeat(900 << 10)))
        .await;
    assert!(
        read_until(&mut third, "921600")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn shutdown_finishes_requests_and_closes_idle_connections() {
    let patient = HttpLimits {
        head_timeout: PATIENCE,
        idle_timeout: PATIENCE,
        ..LIMITS
    };
    let listener = start(patient).await;
    let mut silent = listener.connect("").await;
    let mut idle = listener.connect(&(upload(1) + "x")).await;
    read_until(&mut idle, "\r\n\r\n1").await;
    let mut busy = listener.connect(WAIT).await;
    // It is busy once the listener has read it.
    tokio::time::sleep(Duration::from_millis(100)).await;
    listener.stop.now();
    read_to_end(&mut idle).await;
    read_to_end(&mut silent).await;
    assert!(!listener.serving.is_finished());
    listener.may_end.add_permits(1);
    assert!(read_to_end(&mut busy).await.0.ends_with("waited"));
    timeout(PATIENCE, listener.serving).await.unwrap().unwrap();
}
