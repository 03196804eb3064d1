//! `oncely-client` against a real server whose responses are lost, late or errors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use oncely_client::{Builder, Client, Error, Failure, GiveUpReason};
use support::proxy::{Cut, Proxy};
use support::server::free_port;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The response to one try: status, headers, body.
type Reply = (u16, Vec<(&'static str, String)>, &'static str);

/// A received request: method, path, key, body.
type Arrived = (Method, String, Option<String>, Bytes);

/// A server with scripted responses that stores a response under each key.
struct Server {
    port: u16,
    shared: Arc<Shared>,
    serving: JoinHandle<std::io::Result<()>>,
}

struct Shared {
    /// The response to the try with this number, from 0.
    replies: Box<dyn Fn(usize) -> Reply + Send + Sync>,
    arrived: Mutex<Vec<Arrived>>,
    /// Per the IETF draft: the body that ran under a key, and its response.
    stored: Mutex<HashMap<String, (Bytes, String)>>,
}

impl Server {
    async fn start(replies: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("listen")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            replies: Box::new(replies),
            arrived: Mutex::default(),
            stored: Mutex::default(),
        });
        let router = Router::new()
            .fallback(reply)
            .with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Server {
            port,
            shared,
            serving,
        })
    }

    fn client(&self) -> Builder {
        quick(self.port)
    }

    fn arrived(&self) -> Vec<Arrived> {
        self.shared.arrived.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A client with short timeouts.
fn quick(port: u16) -> Builder {
    Client::builder(&format!("http://127.0.0.1:{port}"))
        .backoff(Duration::from_millis(1), Duration::from_millis(20))
}

/// A pseudo status: run the request once and store the response under its key.
const STORE: u16 = 0;

async fn reply(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let key = headers
        .get("idempotency-key")
        .map(|key| key.to_str().unwrap().to_owned());
    let number = {
        let mut arrived = shared.arrived.lock().unwrap();
        arrived.push((method, uri.to_string(), key.clone(), body.clone()));
        arrived.len() - 1
    };
    let (status, headers, text) = (shared.replies)(number);
    if status == STORE {
        return store(&shared, key.unwrap_or_default(), body);
    }
    let mut response = (StatusCode::from_u16(status).unwrap(), text).into_response();
    for (name, value) in headers {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    response
}

/// Runs a request once for its key and returns the stored response from then on.
fn store(shared: &Shared, key: String, body: Bytes) -> Response {
    let mut stored = shared.stored.lock().unwrap();
    let run = format!("run {}", stored.len() + 1);
    match stored.get(&key) {
        Some((before, _)) if *before != body => {
            let problem = r#"{"type":"https://example.com/idempotency","title":"Idempotency-Key is already used","status":422,"detail":"with another body"}"#;
            (
                StatusCode::UNPROCESSABLE_ENTITY,
                [("content-type", "application/problem+json")],
                problem,
            )
                .into_response()
        }
        Some((_, response)) => {
            ([("idempotency-replayed", "true")], response.clone()).into_response()
        }
        None => {
            stored.insert(key, (body, run.clone()));
            (StatusCode::CREATED, run).into_response()
        }
    }
}

fn ok() -> Reply {
    (200, vec![], "done")
}

fn status(status: u16) -> Reply {
    (status, vec![], "no")
}

fn gave_up(error: Error) -> Result<Box<oncely_client::GaveUp>> {
    match error {
        Error::GaveUp(gave_up) => Ok(gave_up),
        other => anyhow::bail!("expected the client to give up, got: {other}"),
    }
}

#[tokio::test]
async fn all_tries_of_an_operation_share_one_idempotency_key() -> Result<()> {
    let server = Server::start(|number| if number % 4 == 3 { ok() } else { status(503) }).await?;
    let client = server
        .client()
        .header("authorization", "Bearer t")
        .build()?;
    for _ in 0..2 {
        let response = client.publish("orders.placed", "o-1").send().await?;
        ensure!(
            response.tries == 4 && response.status == 200 && !response.replayed,
            "{response:?}"
        );
    }
    let arrived = server.arrived();
    ensure!(arrived.iter().all(|(method, path, _, body)| {
        (method, path.as_str(), &body[..]) == (&Method::POST, "/publish/orders.placed", b"o-1")
    }));
    let keys: Vec<_> = arrived
        .iter()
        .map(|(_, _, key, _)| key.clone().unwrap())
        .collect();
    ensure!(keys.len() == 8 && keys[..4].iter().all(|key| *key == keys[0]));
    ensure!(keys[4..].iter().all(|key| *key == keys[4]) && keys[0] != keys[4]);
    ensure!(
        keys[0].starts_with('"') && keys[0].len() == 38,
        "{}",
        keys[0]
    );
    Ok(())
}

#[tokio::test]
async fn a_lost_response_is_returned_as_a_replay() -> Result<()> {
    for cut in [Cut::HttpAnswerLost, Cut::HttpAnswerTorn] {
        let server = Server::start(|_| (STORE, vec![], "")).await?;
        let proxy = Proxy::start(server.port).await?;
        let client = quick(proxy.port()).build()?;
        let (cut_in_time, response) =
            tokio::join!(proxy.cut(cut, Duration::from_secs(10)), async {
                // After the cut is armed.
                tokio::task::yield_now().await;
                client
                    .publish("orders.placed", "o-1")
                    .key("order-1")
                    .send()
                    .await
            });
        let response = response?;
        ensure!(cut_in_time, "no opportunity for {cut:?}");
        ensure!(
            response.tries == 2 && response.replayed && response.text() == "run 1",
            "{cut:?}: {response:?}"
        );
        let keys: Vec<_> = server
            .arrived()
            .into_iter()
            .map(|(_, _, key, body)| (key, body))
            .collect();
        ensure!(
            keys == vec![(Some("\"order-1\"".to_owned()), Bytes::from("o-1")); 2],
            "{keys:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_key_reused_for_another_request_is_a_distinct_error() -> Result<()> {
    let server = Server::start(|_| (STORE, vec![], "")).await?;
    let client = server.client().build()?;
    client
        .publish("orders.placed", "o-1")
        .key("order-1")
        .send()
        .await?;
    let error = client
        .publish("orders.placed", "o-2")
        .key("order-1")
        .send()
        .await
        .unwrap_err();
    let Error::KeyReused(refused) = &error else {
        anyhow::bail!("{error}")
    };
    let problem = refused.response.problem().context("problem details")?;
    ensure!(
        problem.status == Some(422) && problem.detail.as_deref() == Some("with another body"),
        "{problem:?}"
    );
    ensure!(!error.is_unclear() && error.tries() == 1 && error.key() == Some("order-1"));
    ensure!(
        error
            .to_string()
            .contains("another operation needs another key"),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn an_unsafe_operation_is_tried_once() -> Result<()> {
    let server = Server::start(|_| status(503)).await?;
    let client = server
        .client()
        .deadline(Duration::from_millis(500))
        .budget(0.0, 1000)
        .build()?;
    let failed = client
        .call(Method::POST, "/transfers?dry=no")
        .without_key()
        .body("x")
        .send()
        .await;
    let gave_up = gave_up(failed.unwrap_err())?;
    ensure!(
        gave_up.reason == GiveUpReason::NotSafe
            && gave_up.tries == 1
            && gave_up.unclear
            && gave_up.key.is_none()
    );
    ensure!(server.arrived()[0].1 == "/transfers?dry=no" && server.arrived()[0].2.is_none());
    for method in [Method::GET, Method::PUT, Method::DELETE] {
        let failed = client
            .call(method.clone(), "/transfers")
            .send()
            .await
            .unwrap_err();
        ensure!(
            failed.tries() > 1 && failed.key().is_none(),
            "{method}: {failed}"
        );
        ensure!(
            failed.is_unclear() == (method != Method::GET),
            "{method}: {failed}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_refused_request_is_not_retried() -> Result<()> {
    let server =
        Server::start(|number| status([400, 401, 404, 409, 413, 501, 307][number])).await?;
    let client = server.client().build()?;
    for expected in [400, 401, 404, 409, 413, 501, 307] {
        let error = client
            .publish("orders.placed", "o-1")
            .send()
            .await
            .unwrap_err();
        let Error::Refused(refused) = &error else {
            anyhow::bail!("{error}")
        };
        ensure!(
            refused.response.status == expected && error.tries() == 1 && !error.is_unclear(),
            "{error}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_500_is_retried_until_it_is_a_replay() -> Result<()> {
    let replayed = || vec![("idempotency-replayed", "true".to_owned())];
    let server = Server::start(move |number| {
        if number == 0 {
            status(500)
        } else {
            (500, replayed(), "broken")
        }
    })
    .await?;
    let error = server
        .client()
        .build()?
        .publish("orders.placed", "o-1")
        .send()
        .await
        .unwrap_err();
    let Error::Refused(refused) = &error else {
        anyhow::bail!("{error}")
    };
    ensure!(
        error.tries() == 2 && refused.response.replayed && !error.is_unclear(),
        "{error}"
    );
    ensure!(
        error.to_string().contains("only another key runs it again"),
        "{error}"
    );
    Ok(())
}

#[tokio::test]
async fn retry_after_is_honoured_in_both_forms() -> Result<()> {
    for form in ["seconds", "date"] {
        let text = move || match form {
            "seconds" => "1".to_owned(),
            _ => httpdate(SystemTime::now() + Duration::from_secs(2)),
        };
        let server = Server::start(move |number| match number {
            0 => (409, vec![("retry-after", text())], "in flight"),
            _ => ok(),
        })
        .await?;
        let begun = Instant::now();
        let client = server.client().random(|| 0.0).build()?;
        let response = client.publish("orders.placed", "o-1").send().await?;
        let waited = begun.elapsed();
        ensure!(response.tries == 2, "{response:?}");
        ensure!(
            (Duration::from_millis(990)..Duration::from_secs(5)).contains(&waited),
            "{form}: {waited:?}"
        );
    }
    Ok(())
}

/// A time in HTTP format.
fn httpdate(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap();
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

#[tokio::test]
async fn a_retry_after_beyond_the_deadline_gives_up_at_once() -> Result<()> {
    let server = Server::start(|_| (503, vec![("retry-after", "60".to_owned())], "later")).await?;
    let client = server.client().deadline(Duration::from_secs(30)).build()?;
    let begun = Instant::now();
    let error = client
        .publish("orders.placed", "o-1")
        .send()
        .await
        .unwrap_err();
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "the client waited although the deadline was out of reach"
    );
    ensure!(
        error
            .response()
            .and_then(oncely_client::Response::retry_after)
            == Some(Duration::from_secs(60))
    );
    ensure!(gave_up(error)?.reason == GiveUpReason::Deadline(Duration::from_secs(30)));

    // A server that accepts connections and never responds.
    let silent = TcpListener::bind(("127.0.0.1", 0)).await?;
    let client = quick(silent.local_addr()?.port())
        .try_timeout(Duration::from_millis(100))
        .build()?;
    let begun = Instant::now();
    let error = client
        .publish("orders.placed", "o-1")
        .deadline(Duration::from_millis(500))
        .send()
        .await
        .unwrap_err();
    let gave_up = gave_up(error)?;
    ensure!(
        begun.elapsed() < Duration::from_secs(5) && begun.elapsed() > Duration::from_millis(300)
    );
    ensure!(
        matches!(gave_up.last, Failure::TimedOut(_)) && gave_up.tries > 1 && gave_up.unclear,
        "{gave_up:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_to_a_dead_server_stay_within_the_budget() -> Result<()> {
    let server = Server::start(|_| status(503)).await?;
    let (failing, gone) = (server.port, free_port()?);
    for port in [failing, gone] {
        let client = quick(port).build()?;
        let begun = Instant::now();
        let mut calls = tokio::task::JoinSet::new();
        for number in 0..1000 {
            // Clones share the budget.
            let client = client.clone();
            calls.spawn(async move {
                client
                    .publish("orders.placed", format!("o-{number}"))
                    .send()
                    .await
            });
        }
        let errors = calls
            .join_all()
            .await
            .into_iter()
            .map(|outcome| gave_up(outcome.unwrap_err()));
        let errors = errors.collect::<Result<Vec<_>>>()?;
        let tries: u32 = errors.iter().map(|error| error.tries).sum();
        // The reserve refills after ten seconds, which this test exceeds only on a slow machine.
        let reserves = 1 + u32::try_from(begun.elapsed().as_secs() / 9)?;
        ensure!(
            (1200..=1200 + 30 * reserves).contains(&tries),
            "{tries} tries"
        );
        ensure!(
            errors
                .iter()
                .filter(|error| error.reason == GiveUpReason::Budget)
                .count()
                > 700
        );
        // Without any connection it is clear that the request did not run.
        ensure!(
            errors
                .iter()
                .all(|error| error.unclear == (port == failing))
        );
    }
    ensure!(server.arrived().len() >= 1200);
    Ok(())
}

#[tokio::test]
async fn an_unsendable_request_is_an_error_and_no_panic() -> Result<()> {
    for base in [
        "",
        "example.com",
        "ftp://x",
        "https://example.com",
        "http://x?y=1",
        "http://x#y",
    ] {
        ensure!(
            matches!(Client::new(base), Err(Error::Invalid(_))),
            "{base:?}"
        );
    }
    let client = Client::new("http://127.0.0.1:9/prefix/")?;
    for subject in ["", "a..b", "a.*", ">", "a b", ".", "a\n"] {
        ensure!(
            matches!(
                client.publish(subject, "").send().await,
                Err(Error::Invalid(_))
            ),
            "{subject:?}"
        );
    }
    let get = || client.call(Method::GET, "/x");
    for request in [
        client.call(Method::GET, "x"),
        get().key(""),
        get().key("naïve"),
        get().header("a b", "c"),
        get().header("a", "b\n"),
        get().header("Idempotency-Key", "x"),
        get().json(&HashMap::from([((1, 2), 3)])),
    ] {
        let error = request.send().await.unwrap_err();
        ensure!(
            matches!(error, Error::Invalid(_))
                && error.to_string().starts_with("nothing was sent: "),
            "{error}"
        );
    }
    ensure!(
        Client::builder("http://x")
            .budget(f64::NAN, 1)
            .build()
            .is_err()
    );
    ensure!(
        Client::builder("http://x")
            .header("Idempotency-Key", "1")
            .build()
            .is_err()
    );
    Ok(())
}

#[tokio::test]
async fn subjects_and_paths_are_appended_to_the_base_url() -> Result<()> {
    let server = Server::start(|_| ok()).await?;
    let client = Client::new(&format!("http://127.0.0.1:{}/app/", server.port))?;
    client.publish("a.b/c?d#é%", "x").send().await?;
    client.call(Method::GET, "/x/y?z=1").send().await?;
    let paths: Vec<String> = server
        .arrived()
        .into_iter()
        .map(|(_, path, _, _)| path)
        .collect();
    ensure!(
        paths == ["/app/publish/a.b%2Fc%3Fd%23%C3%A9%25", "/app/x/y?z=1"],
        "{paths:?}"
    );
    Ok(())
}
