//! Requests over HTTP: a retry gets the first response, and one effect remains despite failures.
//!
//! `docs/http.md` has a table of the rules of the IETF draft and of Stripe for idempotency keys.
//! Each row has a test here.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use support::database::Kind;
use support::eventually::{eventually, eventually_within};
use support::guests;
use support::metrics;
use support::nats::Stored;
use support::world::{PATIENCE, World, http_manifest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

mod cached;
mod callers;
mod crashes;
mod groups;
mod heads;
mod keys;
mod refused;
mod routes;
mod slow;

/// A worker below `/do` whose behaviour is determined by each request.
fn manifest(route: &str) -> Result<String> {
    let route = format!("\n[[worker.route]]\npath = \"/do/{{*what}}\"\n{route}");
    http_manifest("2s", &route)
}

/// A complete response.
#[derive(Debug, Clone, PartialEq)]
struct TestResponse {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// The deterministic status, headers and body of a response.
type StableParts = (StatusCode, Vec<(String, Vec<u8>)>, Vec<u8>);

impl TestResponse {
    fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("read {self:?}"))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    fn replayed(&self) -> bool {
        self.header("idempotent-replayed") == Some("true")
    }

    /// The code of a problem.
    fn code(&self) -> String {
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        let problem = self.json().unwrap();
        assert_eq!(problem["status"], self.status.as_u16(), "{problem}");
        assert!(
            problem["type"]
                .as_str()
                .unwrap()
                .starts_with("urn:oncely:problem:"),
            "{problem}"
        );
        problem["code"].as_str().unwrap().to_owned()
    }

    /// The parts of a replayed response that must be identical.
    fn stable_parts(&self) -> StableParts {
        let of_the_moment = ["date", "idempotent-replayed"];
        let headers = self
            .headers
            .iter()
            .filter(|(name, _)| !of_the_moment.contains(&name.as_str()));
        let headers = headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
        (self.status, headers.collect(), self.body.clone())
    }
}

async fn send(request: reqwest::RequestBuilder) -> Result<TestResponse> {
    let response = request.timeout(Duration::from_secs(30)).send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    Ok(TestResponse {
        status,
        headers,
        body: response.bytes().await?.to_vec(),
    })
}

/// Sends raw bytes, and returns the status and all bytes received until the host closed the
/// connection.
async fn send_raw(world: &World, request: &[u8]) -> Result<(u16, String)> {
    let address = world.ingress_url()?.replace("http://", "");
    let mut stream = TcpStream::connect(address)
        .await
        .context("connect to the host")?;
    stream.write_all(request).await.context("send a request")?;
    let mut response = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut response))
        .await?
        .context("read a response")?;
    let response = String::from_utf8_lossy(&response).into_owned();
    let status = response
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok((
        status.with_context(|| format!("no status in `{response}`"))?,
        response,
    ))
}

/// Posts `what` with a key.
async fn post(world: &World, key: &str, what: &Value) -> Result<TestResponse> {
    let url = format!("{}/do/it", world.ingress_url()?);
    send(
        reqwest::Client::new()
            .post(url)
            .header("Idempotency-Key", key)
            .json(what),
    )
    .await
}

/// Waits until the host handles a request.
async fn until_in_flight(world: &World) -> Result<()> {
    eventually("a request is in flight", || async {
        let text = metrics::scrape(world).await?;
        let series = r#"oncely_in_flight_messages{worker="test"}"#;
        Ok((metrics::value(&text, series) == Some(1.0)).then_some(()))
    })
    .await
}

/// The number of attempts with effects of an event, and the number of rows.
async fn effects(world: &World, event: &str) -> Result<(i64, i64)> {
    let count =
        |what: &str| format!("select count({what}) from app.effect where event_id = '{event}'");
    let attempts = world
        .database
        .number(&count("distinct attempt_nonce"))
        .await?;
    Ok((attempts, world.database.number(&count("*")).await?))
}

/// The output stream, once it has `count` messages.
async fn stored(world: &World, count: usize) -> Result<Vec<Stored>> {
    let stored = eventually(format!("OUT has {count} messages"), || async {
        let stored = world.nats.read_stream("OUT").await?;
        ensure!(stored.len() >= count, "it has {}", stored.len());
        Ok(Some(stored))
    })
    .await?;
    assert_eq!(stored.len(), count);
    Ok(stored)
}

fn everything(event: &str) -> Value {
    json!({ "event": event, "do": ["effect", "state", "send"] })
}

both!(
    a_retry_gets_the_first_response_and_no_second_effect,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let first = post(&world, "key-1", &everything("e1")).await?;
        assert_eq!(first.status, StatusCode::OK, "{first:?}");
        assert!(!first.replayed());
        let again = post(&world, "\"key-1\"", &everything("e1")).await?;
        assert!(again.replayed(), "{again:?}");
        assert_eq!(again.stable_parts(), first.stable_parts());
        assert_eq!(
            again.headers.get("x-odd").map(|value| value.as_bytes()),
            Some(&b"a\xe9"[..])
        );
        assert_eq!(effects(&world, "e1").await?, (1, 2));
        let count = world.oncely(&["state", "get", "test", "count"]).await?;
        assert!(count.contains('1'), "{count}");
        stored(&world, 1).await?;

        // Another key is another operation.
        post(&world, "key-2", &everything("e1")).await?;
        assert_eq!(effects(&world, "e1").await?, (2, 4));
        stored(&world, 2).await?;
        Ok(())
    }
);

both!(
    an_error_response_rolls_back_all_effects_and_is_kept,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        for (status, steps) in [
            (409, json!(["effect", "state", "send"])),
            (500, json!(["effect", "violate"])),
        ] {
            let event = format!("e{status}");
            let what = json!({ "event": event, "do": steps, "status": status, "say": "no" });
            let first = post(&world, &event, &what).await?;
            assert_eq!(
                (first.status.as_u16(), first.body.as_slice()),
                (status, &b"no"[..])
            );
            let again = post(&world, &event, &what).await?;
            assert!(again.replayed());
            assert_eq!(again.stable_parts(), first.stable_parts());
            assert_eq!(effects(&world, &event).await?, (0, 0));
        }
        assert!(
            world
                .oncely(&["state", "get", "test", "count"])
                .await
                .is_err()
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.outbox")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    a_failed_statement_cannot_be_swallowed,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let swallowed = post(
            &world,
            "key",
            &json!({ "event": "e", "do": ["effect", "swallow"] }),
        )
        .await?;
        assert_eq!(
            (swallowed.status.as_u16(), swallowed.code().as_str()),
            (500, "handler-failed")
        );
        assert_eq!(effects(&world, "e").await?, (0, 0));
        Ok(())
    }
);

both!(
    a_get_cannot_write_and_needs_no_key,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        post(&world, "key", &everything("e")).await?;
        let get =
            |query: &str| Ok::<_, anyhow::Error>(format!("{}/do/it?{query}", world.ingress_url()?));
        let client = reqwest::Client::new();
        let read = send(client.get(get("event=e")?).header("Idempotency-Key", "key")).await?;
        assert_eq!(
            (read.status, read.json()?),
            (StatusCode::OK, json!({ "rows": 2 }))
        );
        let head = send(client.head(get("event=e")?)).await?;
        assert_eq!((head.status, head.body.len()), (StatusCode::OK, 0));
        assert_eq!(
            head.header("content-length"),
            Some(read.body.len().to_string().as_str())
        );
        let wrote = send(client.get(get("event=e&write")?)).await?;
        assert_eq!(wrote.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(
            world
                .database
                .number("select count(*) from app.once")
                .await?,
            0
        );
        Ok(())
    }
);
