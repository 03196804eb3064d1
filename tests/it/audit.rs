//! `oncely audit`: damage that is planted by hand is found, and an undamaged system under load has
//! no difference.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, consumer};
use futures::StreamExt as _;
use oncely::store::{Cursor, PostgresStore, Store};
use serde_json::Value;
use support::database::{Database, Kind};
use support::eventually::eventually;
use support::guests;
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::world::{QUICK_RETRIES, World, manifest};

use crate::relay_modes::RelayMode;

/// The report of an audit, with its exit code.
struct Report {
    exit: Option<i32>,
    json: Value,
}

impl Report {
    fn total(&self) -> u64 {
        self.json["total"].as_u64().unwrap_or(u64::MAX)
    }

    /// The kinds with the event or the dead letter of each difference.
    fn differences(&self) -> Vec<(String, String)> {
        let list = self.json["differences"].as_array();
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let pair = |one: &Value| {
            let place = ["event_id", "output", "dead_letter"];
            let place = place.map(|key| text(&one[key]));
            let place = place.into_iter().find(|place| !place.is_empty());
            (text(&one["kind"]), place.unwrap_or_default())
        };
        list.into_iter().flatten().map(pair).collect()
    }

    fn count(&self, part: &str, key: &str) -> u64 {
        self.json[part][key].as_u64().unwrap_or(u64::MAX)
    }

    fn worker(&self, key: &str) -> u64 {
        self.json["workers"][0][key].as_u64().unwrap_or(u64::MAX)
    }
}

/// Runs `oncely audit --json` with these arguments.
async fn audit(world: &World, arguments: &[&str]) -> Result<Report> {
    let mut command = std::process::Command::new(guests::oncely()?);
    command
        .args(["audit", "--json"])
        .args(arguments)
        .current_dir(world.folder.path())
        .env_remove("ONCELY_HOST")
        .env_remove("ONCELY_TOKEN");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout).with_context(|| stderr)?;
    let exit = output.status.code();
    let report = Report { exit, json };
    let left = report.total() - report.json["repaired"].as_u64().unwrap_or_default();
    assert_eq!(exit, Some(if left == 0 { 0 } else { 7 }), "{}", report.json);
    Ok(report)
}

/// Shortens the dedupe windows, within which a stream refuses removed messages.
async fn shorten_windows(world: &World) -> Result<jetstream::Context> {
    let context = jetstream::new(world.nats.client().await?);
    for name in ["OUT", "ONCELY_DLQ"] {
        let mut config = context.get_stream(name).await?.cached_info().config.clone();
        config.duplicate_window = Duration::from_millis(500);
        context.update_stream(config).await?;
    }
    Ok(context)
}

fn message(event: &str, behaviour: &str) -> NewMessage {
    NewMessage::new("in.x", event, behaviour, r#"{"n": 1}"#)
}

/// Waits until an audit counts this many messages and dead letters, and returns it.
async fn settled(world: &World, messages: u64, dead_letters: u64) -> Result<Report> {
    world
        .eventually("all messages are acknowledged", || async {
            let report = audit(world, &[]).await?;
            ensure!(report.worker("messages") == messages, "{}", report.json);
            ensure!(
                report.count("dead_letters", "notices") == dead_letters,
                "{}",
                report.json
            );
            Ok(Some(report))
        })
        .await
}

both!(
    an_undamaged_system_under_load_has_no_difference,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        shorten_windows(&world).await?;
        let load = async {
            for round in 0..20 {
                let mut messages = Vec::new();
                for n in 0..50 {
                    let event = format!("r{round}-{n}");
                    messages.push(message(
                        &event,
                        if n % 10 == 3 { "reject" } else { "insert" },
                    ));
                    if n % 7 == 0 {
                        messages.push(message(&event, "insert"));
                    }
                }
                messages.push(message(&format!("late-{round}"), "insert,fail_once"));
                world.nats.publish_all(messages).await?;
            }
            anyhow::Ok(())
        };
        let audits = async {
            for _ in 0..8 {
                let report = audit(&world, &[]).await?;
                ensure!(report.total() == 0, "{}", report.json);
            }
            anyhow::Ok(())
        };
        let (loaded, audited) = tokio::join!(load, audits);
        loaded?;
        audited?;

        // 8 of 50 messages are published twice; the copy of a rejected one is another payload.
        let report = settled(&world, 20 * 59, 20 * 5).await?;
        ensure!(report.total() == 0, "{}", report.json);
        let [done, duplicates, dead] = ["done", "duplicates", "dead"].map(|key| report.worker(key));
        assert_eq!(done + duplicates + dead, 20 * 59, "{}", report.json);
        assert_eq!(dead, 20 * 5, "{}", report.json);
        world.until(world.database.unpublished(), 0).await?;
        let report = audit(&world, &[]).await?;
        assert_eq!(
            report.count("outputs", "published"),
            report.count("outputs", "found"),
            "{}",
            report.json
        );
        ensure!(
            report.count("outputs", "found") >= 20 * 45,
            "{}",
            report.json
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_of_the_wal_are_audited_and_repaired() -> Result<()> {
    let mode = RelayMode::Wal;
    let mut world = mode.world(QUICK_RETRIES).await?;
    mode.start(&mut world).await?;
    shorten_windows(&world).await?;
    let mut messages: Vec<NewMessage> = (0..50).map(NewMessage::insert).collect();
    messages.push(message("bad", "reject"));
    world.nats.publish_all(messages).await?;
    world.quiet(51).await?;
    let report = settled(&world, 51, 1).await?;
    ensure!(report.total() == 0, "{}", report.json);
    let (published, found) = (
        report.count("outputs", "published"),
        report.count("outputs", "found"),
    );
    ensure!(published == found && found >= 51, "{}", report.json);

    // The id of an output is changed.
    world
        .database
        .execute("update oncely.outbox set id = 'another' where event_id = 'e7'")
        .await?;
    let repaired = audit(&world, &["--repair"]).await?;
    assert_eq!(repaired.total(), 1, "{}", repaired.json);
    assert_eq!(repaired.exit, Some(0));
    world
        .eventually("the output is on the stream", || async {
            let report = audit(&world, &[]).await?;
            let outputs = report.count("outputs", "found");
            Ok((report.total() == 0 && outputs == published).then_some(()))
        })
        .await
}

/// A world in which twenty events are done and three are dead.
async fn small_world(kind: Kind) -> Result<(World, jetstream::Context)> {
    let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
    let context = shorten_windows(&world).await?;
    let mut messages: Vec<NewMessage> = (0..20)
        .map(|n| message(&format!("e{n}"), "insert"))
        .collect();
    messages.extend((1..=3).map(|n| message(&format!("bad{n}"), "reject")));
    world.nats.publish_all(messages).await?;
    world.quiet(23).await?;
    let report = settled(&world, 23, 3).await?;
    ensure!(report.total() == 0, "{}", report.json);
    Ok((world, context))
}

/// Requires that an audit finds a difference, and no other kind than before.
async fn require(world: &World, kind: &str, place: &str) -> Result<()> {
    let wanted = (kind.to_owned(), place.to_owned());
    let found = audit(world, &[]).await?;
    ensure!(
        found.differences().contains(&wanted),
        "no {kind} of {place}: {}",
        found.json
    );
    assert_eq!(found.exit, Some(7));
    Ok(())
}

both!(each_planted_damage_is_found, |kind: Kind| async move {
    let (world, context) = small_world(kind).await?;
    let database = &world.database;
    let id_of = async |event: &str| -> Result<String> {
        let sql = format!("select id from oncely.dead_letter where event_id = '{event}'");
        let rows = database.rows(&sql).await?;
        Ok(rows.concat().concat())
    };
    let output_of = async |event: &str| -> Result<String> {
        let sql = format!("select seq from oncely.outbox where event_id = '{event}'");
        Ok(database.rows(&sql).await?.concat().concat())
    };
    let bad = [
        id_of("bad1").await?,
        id_of("bad2").await?,
        id_of("bad3").await?,
    ];

    // The inbox: a row is gone, there twice, dead, or done.
    database
        .execute("delete from oncely.inbox where event_id = 'e0'")
        .await?;
    require(&world, "message-without-outcome", "e0").await?;
    if kind == Kind::Postgres {
        let copy = "insert into oncely.inbox
            select worker, event_id, state, payload_sha256, stream, stream_sequence, settled_at, (partition + 1) % 4
            from oncely.inbox where event_id = 'e1'";
        database.execute(copy).await?;
        require(&world, "settled-twice", "e1").await?;
    }
    database
        .execute("update oncely.inbox set state = 'dead' where event_id = 'e2'")
        .await?;
    require(&world, "dead-without-letter", "e2").await?;
    database
        .execute("update oncely.inbox set state = 'done' where event_id = 'bad1'")
        .await?;
    require(&world, "done-and-dead", "bad1").await?;
    database
        .execute("delete from oncely.inbox where event_id = 'bad2'")
        .await?;
    require(&world, "letter-without-outcome", "bad2").await?;

    // Dead letters: the row is gone, the notice is gone, and a notice is forged.
    let notices = world.nats.read_stream("ONCELY_DLQ").await?;
    let notice = notices
        .iter()
        .find(|stored| stored.headers.get("Oncely-Dead-Letter") == bad.first())
        .context("find a notice")?;
    let dlq = context.get_stream("ONCELY_DLQ").await?;
    dlq.delete_message(notice.sequence).await?;
    require(&world, "notice-missing", "bad1").await?;
    database
        .execute("delete from oncely.dead_letter where event_id = 'bad3'")
        .await?;
    require(&world, "dead-without-letter", "bad3").await?;
    require(&world, "notice-without-letter", &bad[2]).await?;
    let mut headers = HeaderMap::new();
    headers.insert("Oncely-Dead-Letter", "4711");
    context
        .publish_with_headers("oncely.dlq.test", headers, "".into())
        .await?
        .await?;
    require(&world, "notice-without-letter", "4711").await?;

    // Outputs: another position, another id, a second copy.
    let (e3, e5, e6) = (
        output_of("e3").await?,
        output_of("e5").await?,
        output_of("e6").await?,
    );
    if kind == Kind::Postgres {
        // Outputs of groups have their places in the records of the relay.
        let into_rows = "update oncely.outbox
             set via = 'poll', published_at = recorded.published_at, stream = recorded.stream,
                 stream_sequence = recorded.stream_sequence
             from (select seq, (oncely.find_relay_record(seq)).* from oncely.outbox where via = 'group') as recorded
             where outbox.seq = recorded.seq";
        database.execute(into_rows).await?;
    }
    let moved = "update oncely.outbox set stream_sequence =
        (select stream_sequence from oncely.outbox where event_id = 'e4') where event_id = 'e3'";
    database.execute(moved).await?;
    require(&world, "output-lost", &e3).await?;
    database
        .execute("update oncely.outbox set id = 'another' where event_id = 'e5'")
        .await?;
    require(&world, "output-lost", &e5).await?;
    let id = database
        .rows("select id from oncely.outbox where event_id = 'e6'")
        .await?
        .concat()
        .concat();
    eventually("the stream takes a second copy", || async {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id.as_str());
        let sent = context
            .publish_with_headers("out.copy", headers, "{}".into())
            .await?;
        Ok((!sent.await?.duplicate).then_some(()))
    })
    .await?;
    require(&world, "output-twice", &e6).await?;

    // A message that another client acknowledged.
    let stolen = steal(&world, &context).await?;
    world
        .eventually("the stolen message is found", || async {
            Ok(require(&world, "message-without-outcome", &stolen)
                .await
                .ok())
        })
        .await?;

    // The stream of the outputs is gone.
    let before = audit(&world, &[]).await?;
    ensure!(
        before
            .differences()
            .iter()
            .all(|(kind, _)| kind != "output-stream-missing")
    );
    context.delete_stream("OUT").await?;
    require(&world, "output-stream-missing", "").await
});

/// Acknowledges a message of the worker's consumer like another program, and returns its event.
async fn steal(world: &World, context: &jetstream::Context) -> Result<String> {
    let stream = context.get_stream("IN").await?;
    let consumer: PullConsumer = stream
        .get_consumer::<consumer::pull::Config>("oncely-test")
        .await
        .map_err(|error| anyhow::anyhow!(error))?;
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(1)
        .messages()
        .await?;
    // The host and this client take turns.
    for n in 0..100 {
        let event = format!("stolen{n}");
        world
            .nats
            .publish_all(vec![message(&event, "insert")])
            .await?;
        let next = tokio::time::timeout(Duration::from_millis(500), messages.next()).await;
        if let Ok(Some(taken)) = next {
            let taken = taken?;
            let headers = taken.headers.clone().context("read the headers")?;
            let event = headers.get("ce-id").context("find the event")?.to_string();
            taken.ack().await.map_err(|error| anyhow::anyhow!(error))?;
            return Ok(event);
        }
    }
    anyhow::bail!("the host took every message")
}

both!(
    lost_outputs_and_missing_notices_are_repaired,
    |kind: Kind| async move {
        let (world, context) = small_world(kind).await?;
        let database = &world.database;
        database
            .execute("update oncely.outbox set id = 'another' where event_id = 'e5'")
            .await?;
        let dlq = context.get_stream("ONCELY_DLQ").await?;
        let first = dlq.cached_info().state.first_sequence;
        dlq.delete_message(first).await?;
        let found = audit(&world, &[]).await?;
        assert_eq!(found.total(), 2, "{}", found.json);
        ensure!(found.json["repaired"] == 0, "{}", found.json);

        let repaired = audit(&world, &["--repair"]).await?;
        assert_eq!(repaired.json["repaired"], 2, "{}", repaired.json);
        assert_eq!(repaired.exit, Some(0));
        world
            .eventually("nothing is left to repair", || async {
                let report = audit(&world, &[]).await?;
                let is_complete = report.count("dead_letters", "notices") == 3;
                Ok((report.total() == 0 && is_complete).then_some(()))
            })
            .await?;

        // The notice is complete, and is the only one of its dead letter.
        let notices = world.nats.read_stream("ONCELY_DLQ").await?;
        assert_eq!(notices.len(), 3);
        let resent = notices.last().context("find the notice")?;
        assert_eq!(
            resent.headers.get("Oncely-Reason").map(String::as_str),
            Some("rejected")
        );
        ensure!(
            resent.headers.contains_key("Oncely-Group"),
            "{:?}",
            resent.headers
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_before_the_rows_are_kept_is_shortened() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let report = audit(&world, &["--since", "30d"]).await?;
    let notes = report.json["notes"].to_string();
    ensure!(notes.contains("outputs are kept for 15m"), "{notes}");
    ensure!(report.total() == 0, "{}", report.json);
    let unknown = world.oncely(&["audit", "--worker", "nobody"]).await;
    let unknown = unknown.unwrap_err().to_string();
    ensure!(unknown.contains("there is no worker `nobody`"), "{unknown}");
    ensure!(unknown.contains("hint: oncely workers"), "{unknown}");
    Ok(())
}

/// Rows of an hour in a large database.
const MANY_ROWS: &str = "
    insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
    select 'test', 'e' || n, 'done', '\\x00', 'IN', n, 0 from generate_series(1, 200000) as n;
    insert into oncely.outbox (id, worker, event_id, ordinal, subject, headers, body, leased_until,
        published_at, stream, stream_sequence, partition)
    select 'id' || n, 'test', 'e' || n, 0, 'out.x', '[]', '', now(),
        now() - n * interval '10 milliseconds', 'OUT', n, 0 from generate_series(1, 200000) as n;
    insert into oncely.dead_letter (worker, event_id, payload_sha256, reason, detail, attempts, version,
        subject, headers, body, died_at)
    select 'test', 'd' || n, '\\x00', 'rejected', '', 1, 1, 'in.x', '[]', '',
        now() - n * interval '1 second' from generate_series(1, 50000) as n;
    analyze;";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_reads_no_whole_table() -> Result<()> {
    let cluster = Cluster::start()?;
    let database = Database::on(&cluster).await?;
    let store = Store::from(PostgresStore::connect(&database.direct_url(), 8).await?);
    database.execute(MANY_ROWS).await?;
    let read = "select coalesce(sum(seq_tup_read), 0) from pg_stat_user_tables
        where schemaname = 'oncely' and (relname like 'inbox%' or relname like 'outbox%' or relname = 'dead_letter')";
    let indexed = "select coalesce(sum(idx_tup_fetch), 0) from pg_stat_user_tables where schemaname = 'oncely'";
    let (before, indexed_before) = (
        database.number(read).await?,
        database.number(indexed).await?,
    );

    // Pages of the newest rows.
    let now = jiff::Timestamp::now();
    let minute = Cursor::at(now - jiff::SignedDuration::from_mins(1));
    let ids: Vec<String> = (100_000..105_000).map(|n| format!("e{n}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    assert_eq!(store.outcomes("test", &ids).await?.len(), 5_000);
    let (outputs, _) = store.published_by_age(minute, 20_000, false).await?;
    ensure!(
        (4_000..=6_000).contains(&outputs.len()),
        "{}",
        outputs.len()
    );
    let (from_wal, _) = store.published_by_age(minute, 20_000, true).await?;
    ensure!(from_wal.is_empty());
    let letters = store.dead_letters_by_age(minute, now, 20_000).await?;
    ensure!((40..=70).contains(&letters.len()), "{}", letters.len());
    let numbers: Vec<i64> = outputs.iter().map(|output| output.seq).collect();
    assert_eq!(
        store.recorded_outputs("OUT", &numbers).await?.len(),
        numbers.len()
    );
    ensure!(store.unpublished_notices().await?.is_empty());
    store.close().await;

    // The statistics of the sessions arrive when these end.
    let (read, fetched) = eventually("the rows are counted", || async {
        let fetched = database.number(indexed).await? - indexed_before;
        let read = database.number(read).await? - before;
        ensure!(fetched >= 14_000, "{fetched} by index, {read} without");
        Ok(Some((read, fetched)))
    })
    .await?;
    ensure!(fetched < 60_000, "{fetched} rows were fetched");
    ensure!(read < 1_000, "{read} rows were read without an index");
    Ok(())
}

/// The messages and the outputs of the measured window, and the older rows of the inbox.
const MEASURED: usize = 1_000_000;
const OLDER: usize = 4_000_000;

/// Stores messages on a stream without waiting for each.
async fn store_messages(world: &World, subject: &str, stream: &str, prefix: &str) -> Result<()> {
    let client = world.nats.client().await?;
    for chunk in 0..MEASURED / 10_000 {
        for n in chunk * 10_000..(chunk + 1) * 10_000 {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Msg-Id", format!("{prefix}{}", n + 1).as_str());
            client
                .publish_with_headers(subject.to_owned(), headers, "{}".into())
                .await?;
        }
        client.flush().await?;
        // The server drops messages of a client that is too fast.
        let context = jetstream::new(client.clone());
        eventually("the stream has stored them", || async {
            let mut stream = context.get_stream(stream).await?;
            let stored = stream.info().await?.state.last_sequence;
            Ok((stored >= (chunk as u64 + 1) * 10_000).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, which takes minutes"]
async fn measure_an_audit_of_a_million_messages() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest("")?).await?;
    let cluster = Cluster::start_durable()?;
    world.database = Database::on(&cluster).await?;
    world.start_host().await?;
    world.stop_host().await?;

    // A window in which a million messages were handled, each with an output.
    store_messages(&world, "in.x", "IN", "m").await?;
    store_messages(&world, "out.x", "OUT", "o").await?;
    let rows = format!(
        "insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
         select 'test', 'm' || n, 'done', decode(repeat('00', 32), 'hex'), 'IN', n, 0 from generate_series(1, {MEASURED}) as n;
         insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, settled_at, partition)
         select 'test', 'old' || n, 'done', decode(repeat('00', 32), 'hex'), 'IN', null, now() - interval '2 days', 0
         from generate_series(1, {OLDER}) as n;
         insert into oncely.outbox (id, worker, event_id, ordinal, subject, headers, body, leased_until,
             published_at, stream, stream_sequence, partition)
         select 'o' || n, 'test', 'm' || n, 0, 'out.x', '[]', '', now(), now(), 'OUT', n, 0
         from generate_series(1, {MEASURED}) as n;
         analyze;"
    );
    world.database.execute(&rows).await?;

    // The consumer has acknowledged all of them.
    let context = jetstream::new(world.nats.client().await?);
    let stream = context.get_stream("IN").await?;
    let before = stream.consumer_info("oncely-test").await?.config;
    stream.delete_consumer("oncely-test").await?;
    let moved = consumer::pull::Config {
        durable_name: Some("oncely-test".to_owned()),
        deliver_policy: consumer::DeliverPolicy::ByStartSequence {
            start_sequence: MEASURED as u64 + 1,
        },
        ack_policy: before.ack_policy,
        ack_wait: before.ack_wait,
        max_ack_pending: before.max_ack_pending,
        metadata: before.metadata,
        ..consumer::pull::Config::default()
    };
    stream.create_consumer(moved).await?;
    world.start_host().await?;

    let began = std::time::Instant::now();
    let report = audit(&world, &[]).await?;
    let took = began.elapsed();
    assert_eq!(report.worker("done"), MEASURED as u64, "{}", report.json);
    assert_eq!(
        report.count("outputs", "found"),
        MEASURED as u64,
        "{}",
        report.json
    );
    ensure!(report.total() == 0, "{}", report.json);
    let pid = world.host_pid().context("find the host")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let memory = status.lines().find(|line| line.starts_with("VmHWM"));
    println!("audit of {MEASURED} messages and outputs: {took:?}, {memory:?}");
    Ok(())
}
