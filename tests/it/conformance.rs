//! One suite of messages for the handlers of every language: each has the same results.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{World, manifest_of};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_rust_conform() -> Result<()> {
    conforms(&guests::component()?).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_python_conform() -> Result<()> {
    conforms(&guests::python_component()?).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_javascript_conform() -> Result<()> {
    let world = conforms(&guests::js_component()?).await?;
    let logs = "select string_agg(logs, ' ') from oncely.attempt where event_id = 'panics'";
    let logs = world.database.rows(logs).await?.concat().concat();
    ensure!(
        logs.contains("at panic (") && logs.contains("app.js:"),
        "{logs}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_c_conform() -> Result<()> {
    conforms(&guests::c_component()?).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_in_go_conform() -> Result<()> {
    conforms(&guests::go_component()?).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_in_c_keeps_no_memory() -> Result<()> {
    an_instance_keeps_no_memory(&guests::c_component()?, "4MiB").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_in_go_keeps_no_memory() -> Result<()> {
    an_instance_keeps_no_memory(&guests::go_component()?, "32MiB").await
}

/// Messages that share an instance do not need more memory than one of them.
async fn an_instance_keeps_no_memory(component: &Path, memory: &str) -> Result<()> {
    let settings = format!(
        r#"
isolation = "batch"
[worker.limits]
memory = "{memory}"
"#
    );
    let manifest = manifest_of(component, &settings);
    let world = World::start(Kind::Postgres, &manifest).await?;
    let large = |number| {
        let event_id = format!("large-{number}");
        let mut message = NewMessage::new("in.x", &event_id, "insert,echo", "");
        message.body = vec![b'x'; 900_000];
        message
    };
    world.nats.publish_all((0..24).map(large).collect()).await?;
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, 24).await?;
    let failed = "select event_id, code, error, logs from oncely.attempt";
    assert_eq!(
        world.database.rows(failed).await?,
        Vec::<Vec<String>>::new()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_handler_in_c_returns_a_result_for_each_message() -> Result<()> {
    let manifest = manifest_of(&guests::c_batch_component()?, "");
    let world = World::start(Kind::Postgres, &manifest).await?;
    for event_id in ["one", "two", "empty", "three"] {
        let mut message = NewMessage::new("in.x", event_id, "", "");
        if event_id != "empty" {
            message.body = format!("\"{event_id}\"").into_bytes();
        }
        world.nats.publish_all(vec![message]).await?;
    }
    let found = outputs(&world, "out.batch", 3).await?;
    assert_eq!(found.len(), 3);
    let dead =
        "select count(*) from oncely.dead_letter where event_id = 'empty' and code = 'empty'";
    world.until(dead, 1).await
}

/// Few lanes, because an instance of an interpreter is large.
const SETTINGS: &str = r#"
concurrency = 2
[worker.retry]
attempts = 3
backoff = "50ms"
backoff_max = "200ms"
[worker.limits]
time = "20s"
memory = "128MiB"
"#;

async fn conforms(component: &Path) -> Result<World> {
    let world = World::start(Kind::Postgres, &manifest_of(component, SETTINGS)).await?;
    effects_happen_once(&world).await?;
    failures_are_classified(&world).await?;
    every_value_keeps_its_type(&world).await?;
    state_has_versions(&world).await?;
    outputs_keep_what_was_sent(&world).await?;
    deferred_statements_belong_to_the_message(&world).await?;
    Ok(world)
}

async fn deferred_statements_belong_to_the_message(world: &World) -> Result<()> {
    let once = |id: &str| json!({ "sql": "insert into once (id) values ($1)", "params": [id] });
    let good = json!({ "statements": [once("a"), once("b"), once("c"), once("d"), once("e")] });
    publish(world, "deferred", "defer", &good).await?;
    let bad = json!({ "statements": [once("f"), once("f")] });
    publish(world, "violates", "defer", &bad).await?;
    let dead = "select count(*) from oncely.dead_letter
        where event_id = 'violates' and code = 'constraint-violation'";
    world.until(dead, 1).await?;
    let ids = world
        .database
        .rows("select id from app_default.once order by 1");
    assert_eq!(ids.await?, [["a"], ["b"], ["c"], ["d"], ["e"]]);
    Ok(())
}

async fn publish(world: &World, event_id: &str, behaviour: &str, options: &Value) -> Result<()> {
    let options = options.to_string();
    let message = NewMessage::new("in.x", event_id, behaviour, &options);
    world.nats.publish_all(vec![message]).await
}

/// The bodies of the outputs on a subject, as JSON, by the event that caused them.
async fn outputs(world: &World, subject: &str, count: usize) -> Result<Vec<Value>> {
    world
        .eventually(format!("{count} messages on {subject}"), || async {
            let stored = world.nats.read_stream("OUT").await?;
            let found: Vec<Value> = stored
                .iter()
                .filter(|stored| stored.subject == subject)
                .map(|stored| serde_json::from_slice(&stored.body))
                .collect::<std::result::Result<_, _>>()?;
            Ok((found.len() == count).then_some(found))
        })
        .await
}

async fn effects_happen_once(world: &World) -> Result<()> {
    for event_id in ["plain", "twice", "twice", "größe|ключ-鍵"] {
        publish(world, event_id, "insert", &json!({})).await?;
    }
    outputs(world, "out.effect", 3).await?;
    let effects = "select count(distinct event_id), count(*) from app_default.effect";
    assert_eq!(world.database.rows(effects).await?, [["3", "6"]]);

    // No two instances begin with the same state of a random number generator.
    let nonces = "select count(distinct attempt_nonce) from app_default.effect";
    assert_eq!(world.database.number(nonces).await?, 3);
    let unicode = "select count(*) from oncely.inbox where event_id = 'größe|ключ-鍵'";
    world.until(unicode, 1).await
}

async fn failures_are_classified(world: &World) -> Result<()> {
    publish(world, "retried", "insert,fail_until", &json!({})).await?;
    let began = Instant::now();
    let later = json!({ "attempt": 2, "after_ms": 1_500 });
    publish(world, "later", "fail_until", &later).await?;
    publish(world, "rejected", "insert,reject", &json!({})).await?;
    publish(world, "panics", "panic", &json!({})).await?;

    // Retries succeed, no earlier than requested.
    for event_id in ["retried", "later"] {
        let done = format!(
            "select count(*) from oncely.inbox where state = 'done' and event_id = '{event_id}'"
        );
        world.until(&done, 1).await?;
    }
    ensure!(began.elapsed() >= Duration::from_millis(1_500), "too early");
    let attempts = "select event_id, code from oncely.attempt where event_id in ('retried', 'later') order by 1";
    assert_eq!(
        world.database.rows(attempts).await?,
        [
            ["later", "requested-failure"],
            ["retried", "requested-failure"]
        ]
    );

    // Dead letters name the failure, and leave no effect.
    world
        .until("select count(*) from oncely.dead_letter", 2)
        .await?;
    let dead =
        "select event_id, reason, coalesce(code, ''), detail from oncely.dead_letter order by 1";
    let dead = world.database.rows(dead).await?;
    let [panics, rejected] = dead.as_slice() else {
        anyhow::bail!("{dead:?}");
    };
    assert_eq!(
        rejected[1..],
        ["rejected", "requested-reject", "requested reject"]
    );
    // An interpreter may ask for the time while it fails, so no two of its attempts are identical.
    ensure!(
        ["deterministic-failure", "attempts-exhausted"].contains(&panics[1].as_str()),
        "{panics:?}"
    );
    ensure!(panics[3].contains("requested panic"), "{panics:?}");
    let effects = "select count(*) from app_default.effect where event_id = 'rejected'";
    assert_eq!(world.database.number(effects).await?, 0);
    Ok(())
}

/// A literal of each kind, and its text.
const VALUES: [(&str, &str, &str); 16] = [
    ("nothing", "null::text", "text"),
    ("truth", "true", "boolean"),
    ("int64", "(-9223372036854775807 - 1)::bigint", "bigint"),
    // The first integer that a double cannot hold
    ("beyond", "9007199254740993::bigint", "bigint"),
    ("float64", "0.1::float8", "float8"),
    ("whole", "-0.0::float8", "float8"),
    ("amount", "12345678901234567890.1200::numeric", "numeric"),
    ("words", "'größe ''鍵'' ' || chr(10)", "text"),
    // A byte order mark is part of a text.
    ("marked", "chr(65279) || 'x'", "text"),
    ("bytes", "'\\x00ff10'::bytea", "bytea"),
    ("id", "'7d444840-9dc0-11d1-b245-5ffdce74fad2'::uuid", "uuid"),
    ("doc", "'{\"a\": [1, \"x\"]}'::jsonb", "jsonb"),
    (
        "moment",
        "'2026-02-28 23:59:59.123456+00'::timestamptz",
        "timestamptz",
    ),
    (
        "before",
        "'1969-12-31 23:59:59.999999+00'::timestamptz",
        "timestamptz",
    ),
    ("day", "'2026-02-28'::date", "date"),
    ("clock", "'13:05:59.25'::time", "time"),
];

/// The host returns each kind of value to the handler, which passes it back as a parameter.
async fn every_value_keeps_its_type(world: &World) -> Result<()> {
    let select: Vec<String> = VALUES
        .iter()
        .map(|(name, literal, _)| format!("{literal} as {name}"))
        .collect();
    let as_text: Vec<String> = (1..)
        .zip(VALUES)
        .map(|(at, (name, _, kind))| format!("(${at}::{kind})::text as {name}"))
        .collect();
    let options = json!({
        "select": format!("select {}", select.join(", ")),
        "as_text": format!("select {}", as_text.join(", ")),
    });
    publish(world, "values", "sql_values", &options).await?;
    let found = outputs(world, "out.values", 1).await?;
    let found: BTreeMap<String, Option<String>> =
        serde_json::from_value(found.into_iter().next().context("no output")?)?;
    for (name, literal, _) in VALUES {
        let expected = world
            .database
            .rows(&format!("select coalesce(({literal})::text, 'null')"))
            .await?;
        let found = found.get(name).cloned().flatten();
        assert_eq!(found.as_deref().unwrap_or("null"), expected[0][0], "{name}");
    }
    Ok(())
}

async fn state_has_versions(world: &World) -> Result<()> {
    publish(world, "count-1", "state_counter", &json!({})).await?;
    outputs(world, "out.state", 1).await?;
    publish(world, "count-2", "state_counter", &json!({})).await?;
    publish(world, "cas-1", "state_cas", &json!({})).await?;
    let found = outputs(world, "out.state", 3).await?;
    ensure!(found.iter().any(|output| output["value"] == 2), "{found:?}");
    publish(world, "cas-2", "state_cas", &json!({})).await?;
    let mismatch = "select count(*) from oncely.dead_letter where event_id = 'cas-2' and code = 'version-mismatch'";
    world.until(mismatch, 1).await
}

async fn outputs_keep_what_was_sent(world: &World) -> Result<()> {
    // A delay and a key
    let began = Instant::now();
    let options = json!({ "subject": "out.later", "ordering_key": "k", "delay_ms": 1_500 });
    publish(world, "delayed", "emit", &options).await?;
    outputs(world, "out.later", 1).await?;
    ensure!(began.elapsed() >= Duration::from_millis(1_500), "too early");
    let keys = "select ordering_key from oncely.outbox where subject = 'out.later'";
    assert_eq!(world.database.rows(keys).await?, [["k"]]);

    // Bytes of any kind, and headers that repeat
    let mut message = NewMessage::new("in.x", "large", "echo", "");
    message.body = (0..900_000_u32).map(|n| (n % 251) as u8).collect();
    for (name, value) in [("Tag", "one"), ("Tag", "two ü"), ("Mark", "\u{feff}three")] {
        message.headers.push((name.to_owned(), value.to_owned()));
    }
    let body = message.body.clone();
    world.nats.publish_all(vec![message]).await?;
    let echo = world
        .eventually("the echo", || async {
            let stored = world.nats.read_stream("OUT").await?;
            Ok(stored
                .into_iter()
                .find(|stored| stored.subject == "out.echo"))
        })
        .await?;
    ensure!(echo.body == body, "the body differs");
    let headers = "select headers from oncely.outbox where subject = 'out.echo'";
    let headers = world.database.rows(headers).await?;
    for pairs in [
        "[\"Tag\",\"one\"],[\"Tag\",\"two ü\"]",
        "[\"Mark\",\"\u{feff}three\"]",
    ] {
        ensure!(headers[0][0].contains(pairs), "{headers:?}");
    }
    Ok(())
}
