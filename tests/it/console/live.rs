//! Live data of the hosts: lanes, held keys, times of calls, relays, streams.

use async_nats::jetstream;
use support::production::RunningHost;

use super::*;
use crate::relay_modes::RelayMode;

both!(
    a_worker_shows_its_lanes_and_held_keys,
    |kind: Kind| async move {
        let settings = "ordering_key = \"subject:2\"\non_failure = \"hold\"\nconcurrency = 2";
        let world = World::start(kind, &manifest(settings)?).await?;
        let options = r#"{"attempt": 2, "after_ms": 6000, "n": 1}"#;
        let slow = NewMessage::new("in.<key>", "slow", "fail_until,insert", options);
        world.nats.publish_all(vec![slow]).await?;
        let visit = Visit::log_in(&world).await?;
        let lanes = "/hosts/0/status/lanes";
        let view = world
            .eventually("a key is held", || async {
                let view = visit.json("/workers/test").await?;
                let held = view.pointer(&format!("{lanes}/held"));
                Ok((held == Some(&1.into())).then_some(view))
            })
            .await?;
        let lanes = view.pointer(lanes).context("find the lanes")?;
        assert_eq!(
            (&lanes["lanes"], &lanes["limit"], &lanes["busy"]),
            (&2.into(), &2.into(), &0.into())
        );
        let held = &lanes["held_keys"][0];
        assert_eq!(
            (&held["key"], &held["event_id"], &held["attempt"]),
            (&"<key>".into(), &"slow".into(), &1.into())
        );
        let page = visit.page("/workers/test").await?;
        assert!(
            page.text.contains("Held keys") && page.text.contains("&lt;key&gt;"),
            "{}",
            page.text
        );
        assert!(
            page.text.contains("requested failure of attempt 1"),
            "{}",
            page.text
        );

        // After the event took effect, nothing is held.
        world
            .until("select count(*) from oncely.inbox where state = 'done'", 1)
            .await?;
        world
            .eventually("no key is held", || async {
                let view = visit.json("/workers/test").await?;
                let held = view.pointer("/hosts/0/status/lanes/held");
                Ok((held == Some(&0.into())).then_some(()))
            })
            .await?;
        let page = visit.page("/workers/test").await?;
        assert!(!page.text.contains("Next attempt"), "{}", page.text);
        Ok(())
    }
);

both!(
    charts_have_times_of_calls_and_marks_of_deployments,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world.write_manifest(&manifest("[worker.retry]\nattempts = 7")?)?;
        world.oncely(&["deploy"]).await?;
        world.oncely(&["rollback", "test", "--to", "1"]).await?;
        let messages: Vec<NewMessage> = (1..=5).map(NewMessage::insert).collect();
        let pause = NewMessage::new("in.x", "slow", "sleep", r#"{"sleep_ms": 300}"#);
        world.nats.publish_all(messages).await?;
        world.nats.publish_all(vec![pause]).await?;
        let visit = Visit::log_in(&world).await?;
        let timed = || async {
            let view = visit.json("/workers/test").await?;
            let points = view["history"].as_array().cloned().unwrap_or_default();
            let done: u64 = points
                .iter()
                .filter_map(|point| point["done"].as_u64())
                .sum();
            Ok((done == 6).then_some((view, points)))
        };
        let (view, points) = world.eventually("six calls are counted", timed).await?;
        let point = points.last().context("find the last point")?;
        let time = |name: &str| point[name].as_u64().unwrap_or_default();
        assert!((1..300_000).contains(&time("p50_us")), "{point}");
        assert!((300_000..1_000_000).contains(&time("p99_us")), "{point}");
        let marks: Vec<_> = view["marks"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|mark| (mark["version"].as_u64(), mark["is_rollback"].as_bool()))
            .collect();
        let expected = [(1, true), (2, false), (1, false)];
        assert_eq!(
            marks,
            expected.map(|(version, is_back)| (Some(version), Some(is_back)))
        );
        let page = visit.page("/workers/test").await?;
        assert!(page.text.contains("99 of 100 within"), "{}", page.text);
        assert_eq!(
            page.text.matches("<line class=\"mark\"").count(),
            9,
            "{}",
            page.text
        );

        // Counts of several writes, and of several hosts, are added up.
        let stored = "select calls from oncely.worker_history where done > 0 limit 1";
        let before = world.database.rows(stored).await?.concat().concat();
        let before: Vec<u64> = serde_json::from_str(&before)?;
        assert_eq!(before.iter().sum::<u64>(), 6, "{before:?}");
        world.nats.publish_all(vec![NewMessage::insert(9)]).await?;
        let all = || async {
            let rows = world
                .database
                .rows("select calls from oncely.worker_history")
                .await?;
            let counts: Vec<Vec<u64>> = rows
                .concat()
                .iter()
                .map(|row| serde_json::from_str(row))
                .collect::<Result<_, _>>()?;
            let sum: u64 = counts.iter().flatten().sum();
            Ok((sum == 7).then_some(()))
        };
        world.eventually("the seventh call is added", all).await
    }
);

both!(
    outputs_are_listed_by_their_stream,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
        world.quiet(1).await?;
        let polled = match kind {
            Kind::Sqlite => "",
            _ => "via = 'poll', ",
        };
        let park = format!(
            "update oncely.outbox set {polled}published_at = null, stream = null, stream_sequence = null,
                 parked_at = created_at, last_error = 'too large' where subject = 'out.effect'"
        );
        world.database.execute(&park).await?;
        let visit = Visit::log_in(&world).await?;
        let listed = async |path: &str| -> Result<Option<usize>> {
            Ok(visit.json(path).await?["outputs"].as_array().map(Vec::len))
        };
        assert_eq!(listed("/outputs?stream=OUT").await?, Some(1));
        assert_eq!(listed("/outputs?stream=OUT&worker=other").await?, Some(0));
        assert_eq!(listed("/outputs?stream=IN").await?, Some(0));
        assert_eq!(listed("/outputs?unpublished=1&stream=OUT").await?, Some(1));
        let missing = Page::of(visit.get("/outputs?stream=NONE")).await?;
        assert_eq!(missing.status, StatusCode::NOT_FOUND);
        let of_stream = ["outbox", "list", "--stream", "OUT", "--json"];
        let of_stream = world.oncely_json(&of_stream).await?;
        assert_eq!(of_stream.as_array().map(Vec::len), Some(1));
        let page = visit.page("/outputs?stream=OUT").await?;
        assert!(
            page.text.contains("oncely outbox list --stream OUT"),
            "{}",
            page.text
        );
        assert!(page.text.contains("<option selected>OUT"), "{}", page.text);
        assert!(
            page.text.contains("Relay mode") && page.text.contains("all closed"),
            "{}",
            page.text
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repairs_of_streams_are_shown_with_their_host() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("concurrency = 1")?).await?;
    let messages = (1..=10).map(NewMessage::insert).collect();
    world.nats.publish_all(messages).await?;
    world.quiet(10).await?;
    let context = jetstream::new(world.nats.client().await?);
    let stream = context.get_stream("OUT").await?;
    let config = stream.cached_info().config.clone();
    context.delete_stream("OUT").await?;
    context.create_stream(config).await?;
    world.nats.publish_all(vec![NewMessage::insert(11)]).await?;
    let visit = Visit::log_in(&world).await?;
    let repaired = || async {
        let view = visit.json("/outputs").await?;
        let repair = view.pointer("/relays/0/1/repairs/0").cloned();
        Ok(repair)
    };
    let repair = world.eventually("a repair is shown", repaired).await?;
    assert_eq!(
        (&repair["stream"], &repair["outputs"]),
        (&"OUT".into(), &10.into())
    );
    let page = visit.page("/outputs").await?;
    assert!(
        page.text.contains("10 lost outputs published again"),
        "{}",
        page.text
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_have_the_advice_of_the_doctor() -> Result<()> {
    let slow = "[worker.retry]\nattempts = 3\nbackoff = \"10m\"\nbackoff_max = \"10m\"";
    let world = World::start(Kind::Sqlite, &manifest(slow)?).await?;
    // Its messages expire before their retries end.
    let context = jetstream::new(world.nats.client().await?);
    let mut stream = context.get_stream("IN").await?;
    let mut config = stream.info().await?.config.clone();
    config.max_age = std::time::Duration::from_secs(200);
    context.update_stream(config).await?;
    let visit = Visit::log_in(&world).await?;
    let view = visit.json("/streams").await?;
    let advice = view["advice"].as_array().context("read the advice")?;
    let report = visit.http.get(format!("{}/v1/doctor", visit.base));
    let report = Page::of(report.bearer_auth(world.token()?)).await?.text;
    for finding in advice {
        let found = finding["found"].to_string();
        assert!(report.contains(&found), "{found}: {report}");
    }
    let found: Vec<&str> = advice
        .iter()
        .filter_map(|one| one["found"].as_str())
        .collect();
    assert!(
        found
            .iter()
            .any(|found| found.contains("on a single server")),
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|found| found.contains("the stream IN keeps messages for")),
        "{found:?}"
    );
    let page = visit.page("/streams").await?;
    assert!(
        page.text.contains("nats stream edit IN --max-age"),
        "{}",
        page.text
    );
    let stream = &view["streams"][0];
    assert_eq!(
        (&stream["name"], &stream["replicas"]),
        (&"IN".into(), &1.into())
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_show_the_slot_and_the_host_that_reads_it() -> Result<()> {
    let mode = RelayMode::Wal;
    let mut world = mode.world("").await?;
    mode.start(&mut world).await?;
    world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
    world.quiet(1).await?;
    let visit = Visit::log_in(&world).await?;
    let reader = || async {
        let view = visit.json("/outputs").await?;
        let reads = view.pointer("/relays/0/1/reads_wal") == Some(&true.into());
        Ok((reads && view["wal"]["slot"]["active"] == true).then_some(()))
    };
    world.eventually("the reader is shown", reader).await?;
    let page = visit.page("/outputs").await?;
    for shown in [
        "reads the WAL",
        "Lag behind the commits",
        "read by a host",
        "WAL retained",
    ] {
        assert!(page.text.contains(shown), "{shown}: {}", page.text);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_host_shows_the_lanes_and_relays_of_all() -> Result<()> {
    let world = World::start(Kind::Postgres, &manifest("concurrency = 3")?).await?;
    let _second = RunningHost::start(&world, "second").await?;
    let visit = Visit::log_in(&world).await?;
    let both = || async {
        let view = visit.json("/workers/test").await?;
        let hosts = view["hosts"].as_array().cloned().unwrap_or_default();
        let lanes = hosts
            .iter()
            .filter(|on| on["status"]["lanes"]["limit"] == 3);
        Ok((lanes.count() == 2).then_some(hosts))
    };
    let hosts = world
        .eventually("both hosts report their lanes", both)
        .await?;
    assert_ne!(hosts[0]["host"], hosts[1]["host"]);
    let relays = visit.json("/outputs").await?;
    assert_eq!(
        relays["relays"].as_array().map(Vec::len),
        Some(2),
        "{relays}"
    );
    Ok(())
}
