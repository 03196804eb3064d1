//! Alarms: raised and cleared once, sent to the log, metrics, stream and webhook, without blocking.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use support::books;
use support::database::Kind;
use support::eventually::{eventually, until_at_least};
use support::metrics::{scrape, value};
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{World, manifest};

/// A webhook receiver on this machine.
#[derive(Clone, Default)]
struct Receiver {
    received: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    /// The status of the answer; 0 for 204, 1 for no answer.
    mode: Arc<AtomicU16>,
    request_count: Arc<AtomicUsize>,
}

const ACCEPT: u16 = 0;
const HANG: u16 = 1;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

async fn receive(
    State(receiver): State<Receiver>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    receiver.request_count.fetch_add(1, Ordering::Relaxed);
    match receiver.mode.load(Ordering::Relaxed) {
        ACCEPT if uri == "/hook?token=t" => {
            receiver.received.lock().unwrap().push((headers, body));
            StatusCode::NO_CONTENT
        }
        ACCEPT => StatusCode::NOT_FOUND,
        HANG => std::future::pending().await,
        status => StatusCode::from_u16(status).unwrap(),
    }
}

impl Receiver {
    async fn listen(&self, port: u16) -> Result<u16> {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port))
            .await
            .context("bind the webhook receiver")?;
        let port = listener.local_addr()?.port();
        let app = axum::Router::new()
            .fallback(receive)
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(port)
    }

    /// Waits until `count` alarms were accepted and returns their bodies in that order.
    async fn until(&self, count: usize, world: &World) -> Result<Vec<Value>> {
        let description = format!("{count} alarms are received");
        let received = world
            .eventually(description, || async {
                let received = self.received.lock().unwrap().clone();
                ensure!(received.len() >= count, "received only {}", received.len());
                Ok(Some(received))
            })
            .await?;
        received
            .iter()
            .map(|(_, body)| Ok(serde_json::from_slice(body)?))
            .collect()
    }

    /// Switches the answer and waits until it was sent `times` times.
    async fn answer(&self, mode: u16, times: usize) -> Result<()> {
        self.mode.store(mode, Ordering::Relaxed);
        let before = self.request_count.load(Ordering::Relaxed);
        until_at_least("requests", before + times, || async {
            Ok(self.request_count.load(Ordering::Relaxed))
        })
        .await
        .map(drop)
    }
}

/// Settings of a worker with one attempt per message, and of its alarms.
fn settings(alarm: &str) -> String {
    format!("[worker.retry]\nattempts = 1\n[worker.alarm]\nclear_after = \"0s\"\n{alarm}")
}

async fn world(kind: Kind, settings: &str, webhook: Option<u16>) -> Result<World> {
    let mut world = World::without_host(kind, &manifest(settings)?).await?;
    if let Some(port) = webhook {
        world.host_env = vec![
            (
                "ONCELY_WEBHOOK".to_owned(),
                format!("http://127.0.0.1:{port}/hook?token=t"),
            ),
            ("ONCELY_WEBHOOK_SECRET".to_owned(), SECRET.to_owned()),
        ];
    }
    Ok(world)
}

fn poison(event: &str, code: &str) -> NewMessage {
    NewMessage::new("in.x", event, "reject", &format!(r#"{{"code": "{code}"}}"#))
}

/// Alarm and state of each notice on the alarm stream, in order.
async fn alarms_on_stream(world: &World) -> Result<Vec<String>> {
    let stored = world.nats.read_stream("ONCELY_ALARM").await?;
    let text = |headers: &HashMap<String, String>, name: &str| {
        headers.get(name).cloned().unwrap_or_default()
    };
    Ok(stored
        .iter()
        .map(|stored| {
            format!(
                "{} {}",
                text(&stored.headers, "Oncely-Alarm"),
                text(&stored.headers, "Oncely-State")
            )
        })
        .collect())
}

async fn until_alarms_on_stream(world: &World, expected: &[&str]) -> Result<()> {
    let description = format!("the alarm stream has {expected:?}");
    world
        .eventually(description, || async {
            let found = alarms_on_stream(world).await?;
            ensure!(found == expected, "found {found:?}");
            Ok(Some(()))
        })
        .await
}

async fn until_metric(world: &World, series: &str, expected: f64) -> Result<()> {
    eventually(format!("{series} is {expected}"), || async {
        let text = scrape(world).await?;
        ensure!(value(&text, series) == Some(expected), "{text}");
        Ok(Some(()))
    })
    .await
}

const RAISED: &str = r#"oncely_alarms{worker="test",alarm="new-failure"}"#;

both!(
    a_new_failure_is_announced_once_and_clears_when_closed,
    |kind: Kind| async move {
        let receiver = Receiver::default();
        let port = receiver.listen(0).await?;
        let mut world = world(kind, &settings(""), Some(port)).await?;
        world.start_host().await?;
        until_metric(&world, RAISED, 0.0).await?;

        // Raise
        world
            .nats
            .publish_all((0..5).map(|n| poison(&format!("e{n}"), "red")).collect())
            .await?;
        world.quiet(5).await?;
        let notices = receiver.until(1, &world).await?;
        assert_eq!(
            (
                &notices[0]["alarm"],
                &notices[0]["state"],
                &notices[0]["group"]["code"]
            ),
            (&"new-failure".into(), &"raised".into(), &"red".into())
        );
        check_signature(&receiver.received.lock().unwrap()[0])?;

        // Metrics, stream, log and status
        until_metric(&world, RAISED, 1.0).await?;
        until_alarms_on_stream(&world, &["new-failure raised"]).await?;
        assert_eq!(world.host_log().matches("alarm raised").count(), 1);
        let status = world.oncely_json(&["status", "--json"]).await?;
        assert_eq!(status["alarms"][0]["group"]["code"], "red");
        assert!(
            world
                .oncely(&["status"])
                .await?
                .contains("new-failure  test")
        );

        // The command in the hint finds the dead letters.
        let hint = notices[0]["hint"].as_str().context("read the hint")?;
        let list = format!("{hint} --json");
        let dead_letters = world
            .oncely_json(&list.split(' ').skip(1).collect::<Vec<_>>())
            .await?;
        assert_eq!(dead_letters.as_array().map(Vec::len), Some(5));
        let groups = world
            .oncely_json(&["dlq", "list", "--groups", "--json"])
            .await?;
        assert_eq!(
            (&groups[0]["dead_letters"], &groups[0]["group"]["id"]),
            (&5.into(), &notices[0]["group"]["id"])
        );
        assert!(
            world
                .oncely(&["dlq", "list", "--groups"])
                .await?
                .contains("GROUP")
        );

        // Clear
        let group = notices[0]["group"]["id"]
            .as_str()
            .context("read the group id")?
            .to_owned();
        let closed = world
            .oncely(&["dlq", "resolve", "--group", &group, "--note", "repaired"])
            .await?;
        assert_eq!(closed.trim(), "resolved: 5 of 5");
        let notices = receiver.until(2, &world).await?;
        assert_eq!(
            (&notices[1]["state"], &notices[1]["group"]["id"]),
            (&"cleared".into(), &group.into())
        );
        until_metric(&world, RAISED, 0.0).await?;
        until_alarms_on_stream(&world, &["new-failure raised", "new-failure cleared"]).await
    }
);

fn check_signature((headers, body): &(HeaderMap, Bytes)) -> Result<()> {
    let header = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
    assert!(
        id.starts_with("alarm:test:new-failure:") && id.ends_with(":1:raised"),
        "{id}"
    );
    let signed = format!("{id}.{timestamp}.{}", String::from_utf8_lossy(body));
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("signed");
    std::fs::write(&file, signed)?;
    let key = hex::encode(STANDARD.decode(SECRET.trim_start_matches("whsec_"))?);

    // An independent implementation, as a receiver would use.
    let output = std::process::Command::new("openssl")
        .args([
            "dgst",
            "-sha256",
            "-mac",
            "HMAC",
            "-macopt",
            &format!("hexkey:{key}"),
            "-binary",
        ])
        .arg(&file)
        .output()
        .context("run openssl")?;
    assert_eq!(
        header("webhook-signature"),
        format!("v1,{}", STANDARD.encode(output.stdout))
    );
    Ok(())
}

both!(
    a_broken_webhook_delays_only_its_own_notices,
    |kind: Kind| async move {
        let receiver = Receiver::default();

        // A port without a listener.
        let port = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await?
            .local_addr()?
            .port();
        let mut world = world(kind, &settings(""), Some(port)).await?;
        world.start_host().await?;

        // The webhook is unreachable, then fails, then hangs.
        let good = |from: usize| {
            (from..from + 100)
                .map(move |n| NewMessage::new("in.x", &format!("g{n}"), "insert", r#"{"n": 1}"#))
        };
        world
            .nats
            .publish_all(good(0).chain([poison("e1", "red")]).collect())
            .await?;
        world.quiet(101).await?;
        until_metric(
            &world,
            r#"oncely_webhook_posts_total{outcome="failed"}"#,
            1.0,
        )
        .await?;
        receiver.mode.store(500, Ordering::Relaxed);
        receiver.listen(port).await?;
        receiver.answer(500, 1).await?;
        world
            .nats
            .publish_all(good(100).chain([poison("e2", "blue")]).collect())
            .await?;
        world.quiet(202).await?;
        receiver.answer(HANG, 1).await?;
        world.nats.publish_all(good(200).collect()).await?;
        world.quiet(302).await?;
        assert!(receiver.received.lock().unwrap().is_empty());

        // Recovery
        receiver.mode.store(ACCEPT, Ordering::Relaxed);
        let notices = receiver.until(2, &world).await?;
        let codes: Vec<&str> = notices
            .iter()
            .filter_map(|notice| notice["group"]["code"].as_str())
            .collect();
        assert_eq!(codes, ["red", "blue"]);
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs, books.dead.len()),
            (300, 300, 2)
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt where code is null")
                .await?,
            0
        );

        // A lost answer is retried under the same id; a delivered one is not.
        assert_eq!(world.nats.read_stream("ONCELY_ALARM").await?.len(), 2);
        world.stop_host().await
    }
);

/// Two hosts check the same numbers; exactly one of them publishes each change.
async fn two_hosts(kind: Kind) -> Result<()> {
    let receiver = Receiver::default();
    let port = receiver.listen(0).await?;
    let settings = settings("dead_letters = 4\nnew_failures = 1");
    let world = world(kind, &settings, Some(port)).await?;
    let one = RunningHost::start(&world, "one").await?;
    let mut two = RunningHost::start(&world, "two").await?;
    let path = world.folder.path().join("oncely.toml");
    one.oncely(&[
        "deploy",
        path.to_str().context("convert the manifest path")?,
    ])?;
    two.until_version(1).await?;
    two.ready().await?;
    let dead_letters = (0..40).map(|n| poison(&format!("e{n}"), "red")).collect();
    world.nats.publish_all(dead_letters).await?;
    world.quiet(40).await?;
    until_alarms_on_stream(&world, &["new-failure raised", "dead-letters raised"]).await?;

    // Both hosts have checked again by then.
    tokio::time::sleep(Duration::from_secs(6)).await;
    until_alarms_on_stream(&world, &["new-failure raised", "dead-letters raised"]).await?;
    one.oncely(&["dlq", "resolve", "--all", "--note", "repaired"])?;
    let notices = receiver.until(4, &world).await?;
    let mut ids: Vec<&str> = notices
        .iter()
        .filter_map(|notice| notice["id"].as_str())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((notices.len(), ids.len()), (4, 4));
    assert_eq!(
        (notices[0]["state"].as_str(), notices[3]["state"].as_str()),
        (Some("raised"), Some("cleared"))
    );
    let said = format!("{}{}", one.log(), two.log());
    assert_eq!(
        (
            said.matches("alarm raised").count(),
            said.matches("alarm cleared").count()
        ),
        (2, 2),
        "{said}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hosts_announce_a_change_once_on_postgres() -> Result<()> {
    two_hosts(Kind::Postgres).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hosts_announce_a_change_once_behind_pgbouncer() -> Result<()> {
    two_hosts(Kind::Pgbouncer).await
}

both!(
    without_a_broker_logs_and_metrics_still_show_alarms,
    |kind: Kind| async move {
        let settings = format!(
            "batch = 4\nack_wait = \"2s\"\n{}",
            settings("unpublished_age = \"1s\"\nunhandled_age = 0")
        );
        let settings = settings.replace("unhandled_age = 0", "unhandled_age = \"0s\"");
        let mut world = world(kind, &settings, None).await?;
        world.start_host().await?;
        let slow = |n| {
            NewMessage::new(
                "in.x",
                &format!("e{n}"),
                "insert,slow",
                r#"{"n": 1, "ms": 5}"#,
            )
        };
        world.nats.publish_all((0..200).map(slow).collect()).await?;
        world
            .until_at_least("select count(*) from oncely.inbox", 1)
            .await?;
        world.nats.kill()?;
        until_metric(
            &world,
            r#"oncely_alarms{worker="test",alarm="unpublished-age"}"#,
            1.0,
        )
        .await?;
        assert!(
            world
                .host_log()
                .contains("an output of worker test has not been published for")
        );
        assert!(
            world
                .oncely(&["status"])
                .await?
                .contains("unpublished-age  test")
        );
        world.nats.restart().await?;
        until_alarms_on_stream(
            &world,
            &["unpublished-age raised", "unpublished-age cleared"],
        )
        .await?;
        world.quiet(200).await
    }
);

both!(
    long_waits_raise_alarms_that_clear_when_handled,
    |kind: Kind| async move {
        let settings = "[worker.retry]\nattempts = 2\nbackoff = \"20s\"\n[worker.alarm]\nclear_after = \"0s\"\n\
                    unhandled_age = \"1s\"\ndead_letters = 0\ndead_letter_age = \"1s\"\nnew_failures = 0";
        let mut world = world(kind, settings, None).await?;
        world.start_host().await?;
        let slow = NewMessage::new("in.x", "e1", "sleep", r#"{"sleep_ms": 8000}"#);
        world.nats.publish_all(vec![slow]).await?;
        until_alarms_on_stream(&world, &["unhandled-age raised", "unhandled-age cleared"]).await?;
        world.nats.publish_all(vec![poison("e2", "red")]).await?;
        until_alarms_on_stream(
            &world,
            &[
                "unhandled-age raised",
                "unhandled-age cleared",
                "dead-letter-age raised",
            ],
        )
        .await?;
        let raised = world.oncely_json(&["status", "--json"]).await?;
        assert_eq!(raised["alarms"].as_array().map(Vec::len), Some(1));

        // An alarm that a new version does not configure is cleared.
        let without =
            manifest(&settings.replace("dead_letter_age = \"1s\"", "dead_letter_age = \"0s\""))?;
        world.write_manifest(&without)?;
        world.oncely(&["deploy", "oncely.toml"]).await?;
        let over = [
            "unhandled-age raised",
            "unhandled-age cleared",
            "dead-letter-age raised",
            "dead-letter-age cleared",
        ];
        until_alarms_on_stream(&world, &over).await
    }
);

both!(
    messages_that_trap_are_grouped_by_trap_location,
    |kind: Kind| async move {
        let mut world = world(kind, &settings(""), None).await?;
        world.start_host().await?;
        let dies = |event: &str, behaviour: &str| NewMessage::new("in.x", event, behaviour, "{}");
        world
            .nats
            .publish_all(vec![
                dies("e1", "panic"),
                dies("e2", "trap"),
                dies("e3", "panic"),
            ])
            .await?;
        world.quiet(3).await?;
        let groups = world
            .oncely_json(&["dlq", "list", "--groups", "--json"])
            .await?;
        let places: Vec<(u64, &str)> = groups
            .as_array()
            .context("read the list of groups")?
            .iter()
            .map(|found| {
                (
                    found["dead_letters"].as_u64().unwrap_or_default(),
                    found["group"]["place"].as_str().unwrap_or_default(),
                )
            })
            .collect();
        assert!(
            places.len() == 2
                && places[0].0 == 2
                && places[0].1.starts_with("panic in guests/src/panic.rs"),
            "{places:?}"
        );
        assert!(!places[1].1.is_empty(), "{places:?}");
        world.stop_host().await
    }
);
