//! Components made for other hosts, and components of WASI 0.3, run unmodified.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::guests;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest_of};

const CONFIG: &str = r#"
[worker.config]
tariff = "night"
"#;

async fn messaging_world(kind: support::database::Kind) -> Result<World> {
    let component = guests::messaging_component()?;
    let settings = format!("{QUICK_RETRIES}{CONFIG}");
    World::start(kind, &manifest_of(&component, &settings)).await
}

/// The first output on a subject.
async fn output(world: &World, subject: &str) -> Result<Value> {
    let body = world
        .eventually(format!("a message on {subject}"), || async {
            let stored = world.nats.read_stream("OUT").await?;
            Ok(stored
                .into_iter()
                .find(|stored| stored.subject == subject)
                .map(|stored| stored.body))
        })
        .await?;
    serde_json::from_slice(&body).context("parse an output")
}

async fn done(world: &World, count: i64) -> Result<()> {
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, count).await
}

async fn dead(world: &World, count: i64) -> Result<()> {
    let dead = "select count(*) from oncely.dead_letter";
    world.until(dead, count).await
}

/// The event ids and details of all dead letters.
async fn dead_letters(world: &World) -> Result<Vec<Vec<String>>> {
    let dead = "select event_id, detail from oncely.dead_letter order by 1";
    world.database.rows(dead).await
}

fn message(subject: &str, id: &str, body: &str) -> NewMessage {
    NewMessage::new(subject, id, "", body)
}

// Each event is counted once in a bucket, with its output, although it is published twice.
both!(
    a_wasmcloud_handler_counts_each_event_once,
    |kind| async move {
        let world = messaging_world(kind).await?;
        let mut messages = Vec::new();
        for n in 0..30 {
            for _ in 0..2 {
                messages.push(message("in.count", &format!("e{n}"), "visits"));
            }
        }
        world.nats.publish_all(messages).await?;
        done(&world, 30).await?;
        let counts = world
            .eventually("30 outputs", || async {
                let stored = world.nats.read_stream("OUT").await?;
                let counts: Vec<Value> = stored
                    .iter()
                    .map(|stored| serde_json::from_slice(&stored.body))
                    .collect::<std::result::Result<_, _>>()?;
                Ok((counts.len() == 30).then_some(counts))
            })
            .await?;
        let mut counts: Vec<u64> = counts
            .iter()
            .filter_map(|count| count["count"].as_u64())
            .collect();
        counts.sort_unstable();
        assert_eq!(counts, (1..=30).collect::<Vec<_>>());
        let state = world
            .oncely(&["state", "get", "test", "default/visits"])
            .await?;
        ensure!(state.contains("30"), "{state}");
        Ok(())
    }
);

// A failed handler leaves no trace, and its text is the failure of the dead letter.
both!(
    a_failure_of_a_wasmcloud_handler_is_retried,
    |kind| async move {
        let world = messaging_world(kind).await?;
        world
            .nats
            .publish_all(vec![
                message("in.fail", "fails", "visits"),
                message("in.ungranted", "ungranted", ""),
                message("in.request", "requests", ""),
            ])
            .await?;
        dead(&world, 3).await?;
        let dead = dead_letters(&world).await?;
        let detail = |event: &str| {
            let found = dead.iter().find(|row| row[0] == event);
            found.map_or_else(String::new, |row| row[1].clone())
        };
        ensure!(detail("fails").contains("requested failure"), "{dead:?}");
        ensure!(detail("ungranted").contains("elsewhere.x"), "{dead:?}");
        ensure!(
            detail("requests").contains("wasmcloud:messaging/consumer.request"),
            "{dead:?}"
        );
        ensure!(world.nats.read_stream("OUT").await?.is_empty());
        Ok(())
    }
);

both!(
    both_drafts_of_keyvalue_work_on_keyed_state,
    |kind| async move {
        let world = messaging_world(kind).await?;
        let behaviours = ["keys", "cas", "odd", "config"];
        let messages = behaviours.map(|name| message(&format!("in.{name}"), name, ""));
        world.nats.publish_all(messages.to_vec()).await?;

        let keys = output(&world, "out.keys").await?;
        assert_eq!(
            keys,
            json!({
                "found": [["k00", [0]], null], "exists": [true, false], "get": [19],
                "count": 18, "cursor": null, "rest": ["k18", "k19"],
            })
        );
        let cas = output(&world, "out.cas").await?;
        assert_eq!(
            cas,
            json!({
                "current": b"one", "now": b"three", "sum": -2,
                "many": [["a", b"-2"], ["b", null]], "keys": ["a", "key"], "after": ["key"],
            })
        );
        let odd = output(&world, "out.odd").await?;
        assert_eq!(odd["slash"], "Error::NoSuchStore", "{odd}");
        assert_eq!(odd["no key"], Value::Null, "{odd}");
        for (name, part) in [
            ("long key", "1 to 255 bytes"),
            ("text", "not a number"),
            ("range", "out of range"),
        ] {
            ensure!(odd[name].to_string().contains(part), "{odd}");
        }
        let config = output(&world, "out.config").await?;
        assert_eq!(
            config,
            json!({
                "store": "night", "runtime": "night", "absent": null, "all": [["tariff", "night"]],
                "same": true,
            })
        );

        // In the next message, listed from the database.
        world
            .nats
            .publish_all(vec![message("in.keys", "again", "")])
            .await?;
        done(&world, 5).await
    }
);

both!(the_subject_for_replies_is_a_header, |kind| async move {
    let world = messaging_world(kind).await?;
    let mut asks = message("in.reply", "asks", "\"hello\"");
    asks.headers
        .push(("reply-to".to_owned(), "out.reply".to_owned()));
    world.nats.publish_all(vec![asks]).await?;
    assert_eq!(output(&world, "out.reply").await?, "hello");
    let stored = world.nats.read_stream("OUT").await?;
    let headers = &stored.first().context("no output")?.headers;
    assert_eq!(headers.get("Reply-To").map(String::as_str), Some("in.next"));
    Ok(())
});

both!(an_async_handler_takes_effect_once, |kind| async move {
    let settings = format!("{QUICK_RETRIES}\n[worker.limits]\ntime = \"2s\"\n");
    let world = World::start(kind, &manifest_of(&guests::async_component()?, &settings)).await?;
    let behaviour = |name: &str, id: &str| NewMessage::new("in.x", id, name, "{}");
    world
        .nats
        .publish_all(vec![
            behaviour("insert", "one"),
            behaviour("insert", "one"),
            behaviour("waits", "two"),
            behaviour("reject", "rejected"),
            behaviour("panic", "panics"),
            behaviour("later", "later"),
            behaviour("forever", "forever"),
            behaviour("never", "never"),
        ])
        .await?;
    dead(&world, 4).await?;
    done(&world, 3).await?;

    // Several timers run at once.
    let waited = output(&world, "out.waited").await?;
    let ms = waited["ms"].as_u64().unwrap_or_default();
    ensure!((200..440).contains(&ms), "{waited}");

    let effects = "select event_id, count(*) from app.effect group by event_id order by 1";
    let effects = world.database.rows(effects).await?;
    assert_eq!(effects, [["one", "2"], ["two", "2"]]);
    let dead = dead_letters(&world).await?;
    for (event, part) in [
        ("rejected", "requested reject"),
        ("panics", "requested panic"),
        ("forever", "2s"),
        ("never", "panicked"),
    ] {
        let row = dead.iter().find(|row| row[0] == event);
        let row = row.with_context(|| format!("{event} is not dead"))?;
        ensure!(row[1].contains(part), "{row:?}");
    }
    Ok(())
});

both!(requests_reach_a_handler_of_wasi_3, |kind| async move {
    let manifest = format!(
        "[[worker]]\nname = \"test\"\ncomponent = \"{}\"\n[[worker.route]]\npath = \"/count/{{*rest}}\"\n",
        guests::async_http_component()?.display()
    );
    let world = World::start(kind, &manifest).await?;
    let (url, client) = (world.ingress_url()?, reqwest::Client::new());
    let post = async |path: &str, key: &str, body: &str| -> Result<(u16, String)> {
        let request = client.post(format!("{url}{path}"));
        let request = request.header("idempotency-key", key).body(body.to_owned());
        let response = request.send().await?;
        Ok((response.status().as_u16(), response.text().await?))
    };

    // The effect is that of the first request with the key.
    let authority = url.replace("http://", "");
    for _ in 0..2 {
        let (status, body) = post("/count/a", "k1", "hello").await?;
        assert_eq!(
            (status, body),
            (200, format!("{authority}/count/a 1 hello end"))
        );
    }
    let (_, body) = post("/count/a", "k2", &"x".repeat(200_000)).await?;
    ensure!(body.contains("/count/a 2 xxx") && body.len() > 200_000);

    // A refusal and an error leave no effect.
    assert_eq!(post("/count/refuse", "k3", "").await?.0, 422);
    ensure!(
        post("/count/refuse", "k4", "")
            .await?
            .1
            .contains("refuse 1 ")
    );
    let began = Instant::now();
    let (status, problem) = post("/count/error", "k5", "").await?;
    ensure!(
        status >= 500 && problem.contains("problem"),
        "{status} {problem}"
    );
    ensure!(began.elapsed() < Duration::from_secs(10), "{problem}");
    let listed = world.oncely(&["state", "list", "test"]).await?;
    ensure!(
        listed.contains("default//count/a")
            && !listed.contains("refuse")
            && !listed.contains("error"),
        "{listed}"
    );
    Ok(())
});

// Totals and notices are right although the host is killed and each order is published twice.
both!(
    a_jetstream_handler_of_wasmcloud_counts_right_under_kills,
    |kind| async move {
        let manifest = manifest_of(&guests::nats_component()?, QUICK_RETRIES);
        let mut world = World::start(kind, &manifest).await?;
        let orders = 200;
        for part in 0..4 {
            let mut messages = Vec::new();
            for n in part * 50..(part + 1) * 50 {
                let body = format!("account-{}:{}", n % 3, n + 1);
                for _ in 0..2 {
                    messages.push(message("in.order", &format!("o{n}"), &body));
                }
            }
            world.nats.publish_all(messages).await?;
            if part < 3 {
                let handled = "select count(*) from oncely.inbox where state = 'done'";
                world.until_at_least(handled, part * 50 + 5).await?;
                world.kill_host()?;
                world.start_host().await?;
            }
        }
        done(&world, orders).await?;

        // Each order is in its total once, and each total was sent once.
        for account in 0..3 {
            let sum: i64 = (0..orders)
                .filter(|n| n % 3 == account)
                .map(|n| n + 1)
                .sum();
            let key = format!("totals/account-{account}");
            let state = world.oncely(&["state", "get", "test", &key]).await?;
            ensure!(state.contains(&sum.to_string()), "{state} is not {sum}");
        }
        let sent = world
            .eventually("200 totals", || async {
                let stored = world.nats.read_stream("OUT").await?;
                Ok((stored.len() >= 200).then_some(stored))
            })
            .await?;
        assert_eq!(sent.len(), 200);
        let account = sent
            .first()
            .and_then(|stored| stored.headers.get("Account"));
        ensure!(account.is_some_and(|account| account.starts_with("account-")));
        Ok(())
    }
);

both!(
    acknowledgements_of_a_jetstream_handler_are_verdicts,
    |kind| async move {
        let manifest = manifest_of(&guests::nats_component()?, QUICK_RETRIES);
        let world = World::start(kind, &manifest).await?;
        world
            .nats
            .publish_all(vec![
                message("in.nak", "nak", "n:1"),
                message("in.term", "term", "t:1"),
                message("in.request", "request", ""),
                message("in.keys", "keys", ""),
            ])
            .await?;
        done(&world, 2).await?;
        dead(&world, 2).await?;
        let dead = dead_letters(&world).await?;
        ensure!(
            dead[0][1].contains("core.request is not available"),
            "{dead:?}"
        );
        ensure!(dead[1][1].contains("terminated"), "{dead:?}");
        let keys = world
            .eventually("the keys", || async {
                let stored = world.nats.read_stream("OUT").await?;
                let mut keys = stored.into_iter().filter(|one| one.subject == "out.keys");
                Ok(keys
                    .next()
                    .map(|one| String::from_utf8_lossy(&one.body).into_owned()))
            })
            .await?;
        assert_eq!(keys, r#"["a", "c"] false 1 true true true"#);
        let listed = world.oncely(&["state", "list", "test"]).await?;
        ensure!(
            listed.contains("totals/n") && !listed.contains("totals/t"),
            "{listed}"
        );
        Ok(())
    }
);
