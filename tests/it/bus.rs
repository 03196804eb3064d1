//! The bus against a real nats-server: pull, ack, publish, and recovery from outages.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream;
use async_nats::jetstream::consumer::{FromConsumer as _, pull};
use futures::StreamExt as _;
use jiff::Timestamp;
use oncely::bus::{
    Bus, DeliveredMessage, EmbeddedServer, EnsuredStream, MessageComparison, OutgoingMessage,
    PublishError, PullConsumer, StreamSpec, Subscription,
};
use oncely::config::Nats;
use oncely::model::verdict::Settled;
use oncely::store::{Claim, SqliteStore, Store};
use support::eventually::eventually;
use support::nats::{NatsServer, NewMessage};
use tokio::time::timeout;

mod logins;

/// Timeout for an expected event.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time to wait for an event that must not happen.
const QUIET: Duration = Duration::from_millis(300);

/// A nats-server with the stream IN over `in.>`, and a bus connected to it.
async fn world() -> Result<(NatsServer, Bus)> {
    let nats = NatsServer::start().await?;
    let bus = Bus::connect(&at(&nats.url())).await?;
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    Ok((nats, bus))
}

fn at(url: &str) -> Nats {
    Nats {
        servers: vec![url.to_owned()],
        ..Nats::default()
    }
}

fn subscription(ack_wait: Duration) -> Subscription {
    Subscription {
        stream: "IN".to_owned(),
        durable: "worker".to_owned(),
        subjects: vec!["in.>".to_owned()],
        ack_wait,
        max_ack_pending: 1_000,
        metadata: HashMap::from([("oncely.worker".to_owned(), "worker".to_owned())]),
    }
}

async fn pull_from(bus: &Bus) -> Result<PullConsumer> {
    bus.subscribe(&subscription(Duration::from_secs(30))).await
}

async fn next(pull: &mut PullConsumer) -> Result<DeliveredMessage> {
    timeout(PATIENCE, pull.next(10))
        .await
        .context("wait for a message")?
}

/// A proof of settlement, created like in production by a commit of the store.
async fn proof() -> Result<Settled> {
    let folder = tempfile::tempdir()?;
    let store = Store::from(SqliteStore::open(&folder.path().join("proof.db")).await?);
    let mut tx = store.begin("worker", Duration::from_secs(5)).await?;
    tx.claim(&[Claim {
        event_id: "1".to_owned(),
        payload_sha256: [0; 32],
        origin: None,
        redriven: false,
    }])
    .await?;
    Ok(tx.commit().await?)
}

fn outgoing(subject: &str, id: &str) -> OutgoingMessage {
    OutgoingMessage {
        subject: subject.to_owned(),
        headers: Vec::new(),
        id: id.to_owned(),
        body: id.to_owned().into(),
    }
}

fn message(subject: &str, headers: &[(&str, &str)]) -> NewMessage {
    let headers = headers
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    NewMessage {
        subject: subject.to_owned(),
        headers,
        body: b"body".to_vec(),
    }
}

async fn context(nats: &NatsServer) -> Result<jetstream::Context> {
    Ok(jetstream::new(nats.client().await?))
}

#[tokio::test]
async fn an_acknowledged_message_is_gone_for_good() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    let mut pull = bus.subscribe(&subscription(Duration::from_secs(1))).await?;
    let probe = pull.probe();
    let pulled = next(&mut pull).await?;
    assert_eq!(
        (
            pulled.message.subject.as_str(),
            pulled.message.body.as_ref()
        ),
        ("in.a", b"body".as_slice())
    );
    assert_eq!(probe.backlog().await?.ack_pending, 1);
    pulled.receipt.ack(&proof().await?).await?;
    eventually("no ack is pending", || async {
        Ok((probe.backlog().await?.ack_pending == 0).then_some(()))
    })
    .await?;
    assert!(
        timeout(Duration::from_millis(1_500), pull.next(1))
            .await
            .is_err()
    );
    Ok(())
}

/// The server writes each update to disk, and a host may have a thousand workers.
#[tokio::test]
async fn an_unchanged_consumer_is_not_written_again() -> Result<()> {
    let (nats, bus) = world().await?;
    let client = nats.client().await?;
    let mut requests = client.subscribe("$JS.API.CONSUMER.CREATE.>").await?;
    client.flush().await?;
    let written = async |requests: &mut async_nats::Subscriber| {
        let mut count = 0;
        while let Ok(Some(_)) = timeout(QUIET, requests.next()).await {
            count += 1;
        }
        count
    };
    let (short, long) = (Duration::from_secs(1), Duration::from_secs(30));
    for (ack_wait, expected) in [(long, 1), (long, 0), (short, 1), (short, 0)] {
        drop(bus.subscribe(&subscription(ack_wait)).await?);
        assert_eq!(written(&mut requests).await, expected, "{ack_wait:?}");
    }

    // A configuration that another client has changed is corrected.
    let context = context(&nats).await?;
    let stream = context.get_stream("IN").await?;
    let info = stream.consumer_info("worker").await?;
    let mut config = pull::Config::try_from_consumer_config(info.config)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    config.max_ack_pending = 7;
    stream.update_consumer(config).await?;
    assert_eq!(written(&mut requests).await, 1);
    drop(bus.subscribe(&subscription(short)).await?);
    assert_eq!(written(&mut requests).await, 1);
    let info = stream.consumer_info("worker").await?;
    assert_eq!(info.config.max_ack_pending, 1_000);
    Ok(())
}

#[tokio::test]
async fn a_nacked_message_is_redelivered_after_its_delay() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    let mut pull = pull_from(&bus).await?;
    next(&mut pull)
        .await?
        .receipt
        .nack(Duration::from_millis(700))
        .await?;
    let nacked_at = Instant::now();
    let again = next(&mut pull).await?;
    assert_eq!(
        again
            .message
            .origin
            .context("read the stream position")?
            .sequence,
        1
    );
    let waited = nacked_at.elapsed();
    assert!((600..5_000).contains(&waited.as_millis()), "{waited:?}");
    Ok(())
}

#[tokio::test]
async fn a_message_in_progress_is_not_redelivered() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    let mut pull = bus.subscribe(&subscription(Duration::from_secs(1))).await?;
    let pulled = next(&mut pull).await?;
    let progress = pulled.receipt.progress();
    for _ in 0..8 {
        assert!(
            timeout(QUIET, pull.next(1)).await.is_err(),
            "the message was redelivered while in progress"
        );
        progress.send().await?;
    }
    next(&mut pull)
        .await
        .context("wait for the redelivery without progress")?;
    Ok(())
}

#[tokio::test]
async fn late_progress_does_not_delay_a_nacked_message() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    let mut pull = bus
        .subscribe(&subscription(Duration::from_secs(3600)))
        .await?;
    let pulled = next(&mut pull).await?;
    let progress = pulled.receipt.progress();
    pulled.receipt.nack(Duration::from_millis(200)).await?;
    progress.send().await?;
    next(&mut pull)
        .await
        .context("wait for the redelivery after the nack delay, not after `ack_wait`")?;
    Ok(())
}

#[tokio::test]
async fn a_pull_request_brings_no_more_than_the_free_capacity() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all((0..20).map(|_| message("in.a", &[])).collect())
        .await?;
    let mut pull = pull_from(&bus).await?;
    let probe = pull.probe();
    for taken in 1..=3 {
        timeout(PATIENCE, pull.next(1)).await??;
        assert_eq!(probe.backlog().await?.ack_pending, taken);
    }
    Ok(())
}

#[tokio::test]
async fn the_server_sees_a_subscription_after_its_first_pull() -> Result<()> {
    let (_nats, bus) = world().await?;
    let mut pull = pull_from(&bus).await?;
    let probe = pull.probe();
    assert!(!probe.is_seen_by_server().await?);
    assert!(timeout(QUIET, pull.next(5)).await.is_err());
    assert!(probe.is_seen_by_server().await?);
    assert_eq!(probe.backlog().await?.waiting, 1);
    Ok(())
}

#[tokio::test]
async fn a_subscription_is_updated_in_place_and_keeps_its_position() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![
        message("in.a", &[]),
        message("in.b", &[]),
        message("in.c", &[]),
    ])
    .await?;
    let mut pull = pull_from(&bus).await?;
    let first = timeout(PATIENCE, pull.next(1)).await??;
    assert_eq!(first.message.subject, "in.a");
    first.receipt.ack(&proof().await?).await?;
    drop(pull);
    let narrower = Subscription {
        subjects: vec!["in.a".to_owned(), "in.c".to_owned()],
        ack_wait: Duration::from_secs(1),
        ..subscription(Duration::ZERO)
    };
    let mut pull = bus.subscribe(&narrower).await?;
    assert_eq!(next(&mut pull).await?.message.subject, "in.c");
    Ok(())
}

#[tokio::test]
async fn event_ids_come_from_the_headers_else_from_the_position() -> Result<()> {
    let (nats, bus) = world().await?;
    let long = "x".repeat(256);
    nats.publish_all(vec![
        message("in.a", &[("Nats-Msg-Id", "m1")]),
        message("in.a", &[("ce-id", "7"), ("ce-source", "/shop")]),
        message("in.a", &[]),
        message("in.a", &[("Nats-Msg-Id", &long)]),
    ])
    .await?;
    let mut pull = pull_from(&bus).await?;
    let mut ids = Vec::new();
    for _ in 0..4 {
        let pulled = next(&mut pull).await?;
        ids.push((pulled.message.event_id, pulled.unusable.is_some()));
    }
    let mut places = Vec::new();
    for sequence in [3, 4] {
        let stored = bus
            .stored_at("IN", sequence)
            .await?
            .context("wait for the message")?
            .as_microsecond();
        places.push(format!("IN@{stored}:{sequence}"));
    }
    let expected = [
        ("m1", false),
        ("/shop|7", false),
        (places[0].as_str(), false),
        (places[1].as_str(), true),
    ];
    assert_eq!(
        ids,
        expected.map(|(id, is_unusable)| (id.to_owned(), is_unusable))
    );
    Ok(())
}

#[tokio::test]
async fn headers_keep_case_and_repeats_and_drop_transport_headers() -> Result<()> {
    let (nats, bus) = world().await?;
    let headers = [
        ("X-Two", "1"),
        ("Nats-Expected-Stream", "IN"),
        ("aB", "ü"),
        ("X-Two", "2"),
    ];
    nats.publish_all(vec![message("in.a", &headers)]).await?;
    let headers = next(&mut pull_from(&bus).await?).await?.message.headers;
    let headers: Vec<_> = headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    assert_eq!(headers, [("X-Two", "1"), ("X-Two", "2"), ("aB", "ü")]);
    Ok(())
}

#[tokio::test]
async fn publish_returns_the_sequence_and_the_duplicate_flag() -> Result<()> {
    let (_nats, bus) = world().await?;
    let answers = bus
        .publish(vec![
            outgoing("in.a", "1"),
            outgoing("in.b", "2"),
            outgoing("in.a", "1"),
        ])
        .await;
    let places: Vec<_> = answers
        .into_iter()
        .map(|answer| answer.map(|at| (at.sequence, at.duplicate)))
        .collect();
    assert_eq!(places, [Ok((1, false)), Ok((2, false)), Ok((1, true))]);
    Ok(())
}

#[tokio::test]
async fn messages_are_stored_in_the_order_they_are_published() -> Result<()> {
    let (nats, bus) = world().await?;
    let answers = bus
        .publish(
            (0..3_000)
                .map(|n| outgoing("in.a", &n.to_string()))
                .collect(),
        )
        .await;
    let sequences: Vec<u64> = answers
        .into_iter()
        .map(|answer| answer.map(|at| at.sequence))
        .collect::<Result<_, _>>()?;
    assert!(sequences.into_iter().eq(1..=3_000));
    let stored = nats.read_stream("IN").await?;
    assert!(
        stored
            .iter()
            .enumerate()
            .all(|(n, message)| message.body == n.to_string().into_bytes())
    );
    Ok(())
}

#[tokio::test]
async fn a_subject_denied_to_the_login_is_refused() -> Result<()> {
    let deny = r#"authorization { users: [{ user: u, password: p, permissions: { publish: { deny: ["in.secret"] } } }] }
        no_auth_user: u"#;
    let nats = NatsServer::start_with(deny).await?;
    nats.make_stream("IN", "in.>", Duration::from_secs(120))
        .await?;
    let bus = Bus::connect(&at(&nats.url())).await?;
    let answers = bus
        .publish(vec![outgoing("in.secret", "1"), outgoing("in.open", "2")])
        .await;
    assert!(
        matches!(&answers[0], Err(PublishError::Unroutable(why)) if why.contains("permission denied")),
        "{answers:?}"
    );
    assert_eq!(answers[1].as_ref().map(|at| at.sequence), Ok(1));
    Ok(())
}

#[tokio::test]
async fn an_unpublishable_message_is_refused_alone() -> Result<()> {
    let (_nats, bus) = world().await?;
    let with_header = |name: &str, value: &str| OutgoingMessage {
        headers: vec![(name.to_owned(), value.to_owned())],
        ..outgoing("in.a", "header")
    };
    let too_large = vec![0_u8; bus.max_payload()].into();
    let answers = bus
        .publish(vec![
            outgoing("in.a", "before"),
            with_header("x", "a\r\nNats-Rollup: all"),
            with_header("a:b", "c"),
            with_header("", "c"),
            outgoing("in.a", "id\nwith a line break"),
            OutgoingMessage {
                body: too_large,
                ..outgoing("in.a", "large")
            },
            outgoing("in.*", "wildcard"),
            outgoing("in.a b", "space"),
            outgoing("elsewhere.a", "no stream"),
            outgoing("in.a", "after"),
        ])
        .await;
    let (last, refused) = answers.split_last().context("split the answers")?;
    assert_eq!(refused[0].as_ref().map(|at| at.sequence), Ok(1));
    assert_eq!(last.as_ref().map(|at| at.sequence), Ok(2));
    for answer in &refused[1..] {
        assert!(
            matches!(
                answer,
                Err(PublishError::Refused(_) | PublishError::Unroutable(_))
            ),
            "{answer:?}"
        );
    }
    assert!(
        refused[5]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("max_payload")
    );
    assert!(
        refused[8]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("no stream accepts the subject elsewhere.a")
    );
    assert!(bus.is_connected());
    Ok(())
}

#[tokio::test]
async fn publishing_to_a_full_stream_is_unavailable() -> Result<()> {
    let (_nats, bus) = world().await?;
    let small = StreamSpec {
        max_bytes: Some(200),
        ..StreamSpec::new("SMALL", &["small.>"])
    };
    assert_eq!(bus.ensure_stream(&small).await?, EnsuredStream::Created);
    assert_eq!(
        bus.ensure_stream(&small).await?,
        EnsuredStream::AlreadyExists
    );
    let body = vec![0_u8; 100].into();
    let answers = bus
        .publish(vec![
            outgoing("small.a", "1"),
            OutgoingMessage {
                body,
                ..outgoing("small.a", "2")
            },
        ])
        .await;
    assert!(answers[0].is_ok());
    assert!(
        matches!(answers[1], Err(PublishError::Unavailable(_))),
        "{answers:?}"
    );
    Ok(())
}

#[tokio::test]
async fn publish_errors_of_a_server_have_the_right_scope() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.make_one_per_subject_stream("ONE", "one.>").await?;
    nats.make_narrow_stream("NARROW", "narrow.>", 100).await?;
    nats.make_stream("SEALED", "sealed.>", Duration::from_secs(120))
        .await?;
    let context = context(&nats).await?;
    let mut sealed = context
        .get_stream("SEALED")
        .await?
        .cached_info()
        .config
        .clone();
    sealed.sealed = true;
    context.update_stream(sealed).await?;
    let with_header = |name: &str, value: &str| OutgoingMessage {
        headers: vec![(name.to_owned(), value.to_owned())],
        ..outgoing("in.a", name)
    };
    let answers = bus
        .publish(vec![
            outgoing("one.a", "first"),
            outgoing("one.a", "second"),
            outgoing("one.b", "third"),
            OutgoingMessage {
                body: vec![0; 200].into(),
                ..outgoing("narrow.a", "large")
            },
            outgoing("sealed.a", "sealed"),
            with_header("Nats-Expected-Last-Sequence", "99"),
            with_header("Nats-Expected-Stream", "ELSE"),
            with_header("Nats-TTL", "10s"),
            with_header("Nats-Rollup", "all"),
        ])
        .await;
    assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
    assert!(
        matches!(answers[1], Err(PublishError::SubjectFull(_))),
        "{answers:?}"
    );
    assert!(
        matches!(answers[4], Err(PublishError::Unroutable(_))),
        "{answers:?}"
    );
    for answer in [3, 5, 6, 7, 8].map(|place| &answers[place]) {
        assert!(
            matches!(answer, Err(PublishError::Refused(_))),
            "{answer:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn stream_of_subject_finds_the_stream_by_its_subjects() -> Result<()> {
    let (_nats, bus) = world().await?;
    assert_eq!(
        bus.stream_name_for_subject("in.a.b").await?.as_deref(),
        Some("IN")
    );
    assert_eq!(
        bus.stream_name_for_subject("in.>").await?.as_deref(),
        Some("IN")
    );
    assert_eq!(bus.stream_name_for_subject(">").await?, None);
    assert_eq!(bus.stream_name_for_subject("out").await?, None);
    assert_eq!(bus.stream("NONE").await?, None);
    Ok(())
}

#[tokio::test]
async fn published_messages_are_found_by_id() -> Result<()> {
    let (_nats, bus) = world().await?;
    let start = Timestamp::now();
    let mut messages: Vec<_> = (0..2_500)
        .map(|n| outgoing("in.a", &format!("a{n}")))
        .collect();
    messages.push(outgoing("in.b", "elsewhere"));
    assert!(bus.publish(messages).await.iter().all(Result::is_ok));
    let ids = HashSet::from([
        "a0".to_owned(),
        "a2499".to_owned(),
        "elsewhere".to_owned(),
        "never".to_owned(),
    ]);
    let found = bus
        .find_published(
            "IN",
            &["in.a".to_owned()],
            start - Duration::from_secs(5),
            &ids,
        )
        .await?;
    assert_eq!(
        found,
        HashMap::from([("a0".to_owned(), 1), ("a2499".to_owned(), 2_500)])
    );
    let later = Timestamp::now() + Duration::from_secs(5);
    assert!(
        bus.find_published("IN", &["in.a".to_owned()], later, &ids)
            .await?
            .is_empty()
    );
    Ok(())
}

#[tokio::test]
async fn compare_distinguishes_same_other_and_missing_messages() -> Result<()> {
    let (nats, bus) = world().await?;
    let sent = OutgoingMessage {
        body: "body".into(),
        ..outgoing("in.a", "id")
    };
    assert!(bus.publish(vec![sent.clone()]).await[0].is_ok());
    let compare = async |stream: &str, sequence: u64, message: &OutgoingMessage| {
        bus.compare(stream, sequence, message).await
    };

    // The same subject, id and body count as the same message.
    assert_eq!(compare("IN", 1, &sent).await?, MessageComparison::Same);
    for other in [
        OutgoingMessage {
            body: "bodY".into(),
            ..sent.clone()
        },
        OutgoingMessage {
            body: "".into(),
            ..sent.clone()
        },
        OutgoingMessage {
            subject: "in.b".to_owned(),
            ..sent.clone()
        },
        OutgoingMessage {
            id: "other".to_owned(),
            ..sent.clone()
        },
    ] {
        assert_eq!(
            compare("IN", 1, &other).await?,
            MessageComparison::Different,
            "{other:?}"
        );
    }

    // A missing message or stream
    assert_eq!(compare("IN", 2, &sent).await?, MessageComparison::Gone);
    assert!(compare("NOWHERE", 1, &sent).await.is_err());

    // A stream that transforms subjects: id and body are compared.
    let config = jetstream::stream::Config {
        name: "MOVED".to_owned(),
        subjects: vec!["from.>".to_owned()],
        subject_transform: Some(jetstream::stream::SubjectTransform {
            source: "from.>".to_owned(),
            destination: "to.>".to_owned(),
        }),
        ..Default::default()
    };
    jetstream::new(nats.client().await?)
        .create_stream(config)
        .await?;
    let moved = OutgoingMessage {
        subject: "from.a".to_owned(),
        ..sent
    };
    assert!(bus.publish(vec![moved.clone()]).await[0].is_ok());
    assert_eq!(compare("MOVED", 1, &moved).await?, MessageComparison::Same);
    assert_eq!(
        compare(
            "MOVED",
            1,
            &OutgoingMessage {
                body: "x".into(),
                ..moved
            }
        )
        .await?,
        MessageComparison::Different
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pull_and_publish_resume_after_a_killed_broker() -> Result<()> {
    let (mut nats, bus) = world().await?;
    let mut pull = pull_from(&bus).await?;
    let pulling = tokio::spawn(async move { pull.next(10).await });
    nats.kill()?;
    eventually("the connection breaks", || async {
        Ok((!bus.is_connected()).then_some(()))
    })
    .await?;
    let answers = bus
        .publish(vec![outgoing("in.a", "1"), outgoing("in.a", "2")])
        .await;
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Err(PublishError::NoConnection(_)))),
        "{answers:?}"
    );
    nats.restart().await?;
    nats.publish_all(vec![message("in.a", &[("Nats-Msg-Id", "back")])])
        .await?;
    let published = Instant::now();
    let pulled = timeout(PATIENCE, pulling)
        .await
        .context("wait for a message")???;
    assert_eq!(pulled.message.event_id, "back");
    assert!(
        published.elapsed() < Duration::from_secs(8),
        "the reconnect took {:?}",
        published.elapsed()
    );
    eventually("publishing works again", || async {
        let answers = bus.publish(vec![outgoing("in.a", "1")]).await;
        Ok(answers[0].is_ok().then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_request_is_renewed_when_the_broker_falls_silent() -> Result<()> {
    let (nats, bus) = world().await?;
    let mut pull = pull_from(&bus).await?;
    assert!(timeout(QUIET, pull.next(10)).await.is_err());
    let pulling = tokio::spawn(async move { pull.next(10).await });
    nats.pause()?;
    // Longer than a pull request may remain without any message.
    tokio::time::sleep(Duration::from_secs(13)).await;
    nats.resume()?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    timeout(PATIENCE, pulling)
        .await
        .context("wait for a message")???;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_consumer_is_recreated() -> Result<()> {
    let (nats, bus) = world().await?;
    let mut pull = pull_from(&bus).await?;
    assert!(timeout(QUIET, pull.next(10)).await.is_err());
    context(&nats)
        .await?
        .delete_consumer_from_stream("worker", "IN")
        .await?;
    nats.publish_all(vec![message("in.a", &[("Nats-Msg-Id", "1")])])
        .await?;
    assert_eq!(next(&mut pull).await?.message.event_id, "1");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recreated_stream_never_repeats_an_event_id() -> Result<()> {
    let (nats, bus) = world().await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    let mut pull = pull_from(&bus).await?;
    let mut ids = HashSet::new();
    let old_message = next(&mut pull).await?;
    ids.insert(old_message.message.event_id);

    // With an open pull request, and no stream for a while.
    context(&nats).await?.delete_stream("IN").await?;
    assert!(timeout(QUIET, pull.next(1)).await.is_err());
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    nats.publish_all(vec![message("in.a", &[]), message("in.a", &[])])
        .await?;
    ids.insert(timeout(PATIENCE, pull.next(1)).await??.message.event_id);
    old_message.receipt.ack(&proof().await?).await?;
    bus.flush().await?;
    assert_eq!(
        pull.probe().backlog().await?.ack_pending,
        1,
        "a late ack settled another message with the same sequence"
    );

    // Without an open pull request, after another host recreated the consumer.
    context(&nats).await?.delete_stream("IN").await?;
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    let _other = pull_from(&bus).await?;
    nats.publish_all(vec![message("in.a", &[])]).await?;
    ids.insert(next(&mut pull).await?.message.event_id);
    assert_eq!(ids.len(), 3, "{ids:?}");
    Ok(())
}

#[tokio::test]
async fn an_unreachable_broker_is_reported_with_a_hint() -> Result<()> {
    let free = support::server::free_port()?;
    let Err(error) = Bus::connect(&at(&format!("nats://me:secret@127.0.0.1:{free}"))).await else {
        anyhow::bail!("connected without a server");
    };
    let text = format!("{error:#}");
    assert!(
        text.contains("connect to NATS at") && !text.contains("secret"),
        "{text}"
    );
    assert!(!oncely::model::hint::hints(&error).is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_server_is_reused_and_keeps_its_data() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let started = EmbeddedServer::start(folder.path(), None).await?;
    assert!(!started.was_running());
    let url = started.url();
    let bus = Bus::connect(&at(&url)).await?;
    bus.ensure_stream(&StreamSpec::new("KEPT", &["kept"]))
        .await?;
    assert!(bus.publish(vec![outgoing("kept", "1")]).await[0].is_ok());

    // Like a killed host.
    drop(started);
    let found = EmbeddedServer::start(folder.path(), None).await?;
    assert!(found.was_running());
    assert_eq!(found.url(), url);
    let other_port = support::server::free_port()?;
    assert!(
        EmbeddedServer::start(folder.path(), Some(other_port))
            .await
            .is_err()
    );
    found.stop().await?;
    assert!(async_nats::connect(&url).await.is_err());
    let again = EmbeddedServer::start(folder.path(), None).await?;
    assert!(!again.was_running());
    assert_eq!(again.url(), url, "the port is kept");
    let bus = Bus::connect(&at(&url)).await?;
    assert_eq!(
        bus.stream("KEPT")
            .await?
            .context("open the kept stream")?
            .messages,
        1
    );
    again.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_embedded_server_is_restarted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let killed = EmbeddedServer::start(folder.path(), None).await?;
    let pid = std::fs::read_to_string(folder.path().join("nats/server.pid"))?;
    support::world::signal(pid.trim().parse()?, "KILL")?;
    drop(killed);
    let server = EmbeddedServer::start(folder.path(), None).await?;
    assert!(!server.was_running());
    server.stop().await
}

#[tokio::test]
async fn a_port_in_use_is_reported_as_such() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let Err(error) = EmbeddedServer::start(folder.path(), Some(taken.local_addr()?.port())).await
    else {
        anyhow::bail!("started on a port in use");
    };
    assert!(
        format!("{error:#}").contains("address already in use"),
        "{error:#}"
    );
    Ok(())
}
