//! Hostile guests and publishers: each ends as an understandable dead letter, without side effects.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

/// Event, behaviour, options, reason of the dead letter, and part of its detail.
const HOSTILE: &[(&str, &str, &str, &str, &str)] = &[
    (
        "trap",
        "trap",
        "{}",
        "attempts-exhausted",
        "panicked or reached code that cannot be reached",
    ),
    ("panic", "panic", "{}", "attempts-exhausted", "panicked"),
    (
        "spin",
        "spin",
        "{}",
        "attempts-exhausted",
        "ran longer than its limit",
    ),
    (
        "sleep",
        "sleep",
        "{}",
        "attempts-exhausted",
        "ran longer than its limit",
    ),
    (
        "memory",
        "eat_memory",
        "{}",
        "attempts-exhausted",
        "more memory than its limit of 64.0 MiB",
    ),
    (
        "recurse",
        "recurse",
        "{}",
        "attempts-exhausted",
        "recursed too deep",
    ),
    ("fail", "fail", "{}", "attempts-exhausted", ""),
    ("reject", "reject", "{}", "rejected", ""),
    (
        "ungranted",
        "emit_ungranted",
        "{}",
        "output-refused",
        "may not publish to",
    ),
    (
        "huge",
        "emit_huge",
        "{}",
        "output-refused",
        "bytes with its headers; at most",
    ),
    (
        "many",
        "emit_many",
        "{}",
        "output-refused",
        "a delivery may send 100 messages",
    ),
    (
        "swallow-send",
        "swallow_error",
        r#"{"what": "send"}"#,
        "output-refused",
        "may not publish to",
    ),
    (
        "swallow-unique",
        "swallow_error",
        r#"{"what": "unique"}"#,
        "attempts-exhausted",
        "a statement failed",
    ),
    (
        "reject-unique",
        "swallow_error",
        r#"{"what": "reject_unique"}"#,
        "rejected",
        "duplicate row",
    ),
    (
        "insert-trap",
        "insert,trap",
        "{}",
        "attempts-exhausted",
        "panicked",
    ),
    (
        "late",
        "emit",
        r#"{"delay_ms": 1735689600000000}"#,
        "output-refused",
        "may be delayed by 366 days at most",
    ),
    (
        "state-keys",
        "state_many",
        r#"{"keys": 21}"#,
        "attempts-exhausted",
        "may read and change 20 keys",
    ),
    (
        "state-reads",
        "state_many",
        r#"{"reads": 20, "keys": 1}"#,
        "attempts-exhausted",
        "may read and change 20 keys",
    ),
    (
        "state-size",
        "state_many",
        r#"{"keys": 20, "size": 6000}"#,
        "attempts-exhausted",
        "exceed 102400 bytes",
    ),
    (
        "unknown",
        "no-such-behaviour",
        "{}",
        "rejected",
        "no-such-behaviour",
    ),
];

const SETTINGS: &str = r#"
batch = 8

[worker.retry]
attempts = 2
backoff = "10ms"
backoff_max = "50ms"

[worker.limits]
time = "1s"
state_entries = 20
state_entries_size = "100KiB"
"#;

both!(
    each_hostile_message_is_dead_lettered_alone_with_a_reason,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest(SETTINGS)?).await?;
        let mut messages = Vec::new();
        for (event, behaviour, options, _, _) in HOSTILE {
            messages.push(NewMessage::new("in.x", event, behaviour, options));
            messages.extend((0..5).map(|n| {
                NewMessage::new(
                    "in.x",
                    &format!("good-{event}-{n}"),
                    "insert",
                    r#"{"n": 1}"#,
                )
            }));
        }
        let good = HOSTILE.len() * 5;
        world.nats.publish_all(messages).await?;
        world.quiet((good + HOSTILE.len()) as i64).await?;
        assert!(world.is_host_running());
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.dead.len()),
            (good, HOSTILE.len())
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt where event_id like 'good-%'")
                .await?,
            0
        );
        for (event, _, _, reason, says) in HOSTILE {
            let sql =
                format!("select reason, detail from oncely.dead_letter where event_id = '{event}'");
            let rows = world.database.rows(&sql).await?;
            let [row] = rows.as_slice() else {
                anyhow::bail!("{event} has {} dead letters", rows.len())
            };
            assert_eq!(row[0], *reason, "{event}: {}", row[1]);
            assert!(
                row[1].contains(says),
                "{event}: `{}` does not contain `{says}`",
                row[1]
            );
        }
        check_notices(&world).await
    }
);

/// Checks that the DLQ stream has one notice for each dead letter, with the original body.
async fn check_notices(world: &World) -> Result<()> {
    let notices = world.nats.read_stream("ONCELY_DLQ").await?;
    assert_eq!(notices.len(), HOSTILE.len());
    let header = |notice: &support::nats::Stored, name: &str| {
        notice.headers.get(name).cloned().unwrap_or_default()
    };
    for (event, _, options, reason, _) in HOSTILE {
        let notice = notices
            .iter()
            .find(|notice| header(notice, "Oncely-Event-Id") == *event)
            .with_context(|| format!("{event} is not on the DLQ stream"))?;
        assert_eq!(notice.subject, "oncely.dlq.test");
        assert_eq!(header(notice, "Oncely-Reason"), *reason);
        assert_eq!(header(notice, "Oncely-Subject"), "in.x");
        assert_eq!(notice.body, options.as_bytes());
    }
    Ok(())
}

/// Statements that try to leave the transaction or to reach objects of others.
const ESCAPES: &[&str] = &[
    "commit",
    "/* a */ COMMIT",
    "-- a\ncommit",
    "end",
    "rollback",
    "commit and chain",
    "begin",
    "savepoint a",
    "prepare transaction 'x'",
    "set role none",
    "reset all",
    "do $$ begin commit; end $$",
    "select 1; commit",
    "insert or rollback into once (id) values ('x')",
    "create table hidden (a integer)",
    "drop table effect",
    "copy effect to '/tmp/x'",
    "attach 'x.db' as other",
    "pragma journal_mode = delete",
    "vacuum",
    "listen x",
    "notify x",
    "delete from oncely_inbox",
    "delete from oncely.inbox",
    "select * from oncely_component",
    "select * from oncely.component",
    "select * from sqlite_master",
    "explain select 1",
];

both!(
    sql_that_would_leave_the_transaction_is_refused,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(SETTINGS)?).await?;
        let messages = ESCAPES
            .iter()
            .enumerate()
            .map(|(n, sql)| {
                let options = serde_json::json!({ "sql": sql }).to_string();
                NewMessage::new("in.x", &format!("escape{n}"), "insert,sql_text", &options)
            })
            .chain([NewMessage::new("in.x", "good", "insert", r#"{"n": 1}"#)])
            .collect();
        world.nats.publish_all(messages).await?;
        world.quiet(ESCAPES.len() as i64 + 1).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            books.effects,
            ["good".to_owned()].into(),
            "a hostile statement took effect"
        );
        assert_eq!(books.dead.len(), ESCAPES.len());
        Ok(())
    }
);

/// Subjects and header blocks that a server stores but no handler can receive, with part of the
/// dead letter's detail.
const UNREADABLE: &[(&[u8], &[u8], &str)] = &[
    (
        b"in.x",
        b"NATS/1.0\r\nA: \xff\xfe\r\n\r\n",
        "headers are not UTF-8",
    ),
    (b"in.x", b"NATS/1.0\r\nno colon\r\n\r\n", "has no colon"),
    (b"in.x", b"NATS/1.0\r\nA b: c\r\n\r\n", "malformed name"),
    (
        b"in.x",
        b"NATS/1.0\r\nA: b\rc\r\n\r\n",
        "line break in its value",
    ),
    (b"in.\xff\xfe", b"", "subject is not UTF-8"),
    (
        b"in.caf\xe9",
        b"NATS/1.0\r\nA: b\r\n\r\n",
        "subject is not UTF-8",
    ),
    (
        b"in.\xff",
        b"NATS/1.0\r\nA: \xff\r\n\r\n",
        "subject is not UTF-8; the headers are not UTF-8",
    ),
    (b"in.a\x0bb", b"", "control character"),
    (b"in.a\x00b", b"", "control character"),
];

/// The number of the host's NATS connections so far; a broken connection is replaced by a new one.
fn connections(world: &World) -> usize {
    world.host_log().matches("connected to NATS").count()
}

both!(
    an_unreadable_message_is_dead_lettered_without_a_reconnect,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let began = Instant::now();
        for (n, (subject, headers, _)) in UNREADABLE.iter().enumerate() {
            world
                .nats
                .publish_all(vec![NewMessage::new(
                    "in.x",
                    &format!("before{n}"),
                    "insert",
                    "{}",
                )])
                .await?;
            world.nats.publish_raw(subject, headers, b"{}")?;
            world
                .nats
                .publish_all(vec![NewMessage::new(
                    "in.x",
                    &format!("after{n}"),
                    "insert",
                    "{}",
                )])
                .await?;
        }

        // Unicode white space is no separator: such a message is readable.
        let headers = b"NATS/1.0\r\nce-id: spaced\r\ndo: insert\r\n\r\n";
        world
            .nats
            .publish_raw("in.a\u{a0}\u{2003}b".as_bytes(), headers, b"{}")?;
        world.quiet(UNREADABLE.len() as i64 * 3 + 1).await?;

        // Far less than `ack_wait`: messages lost with a broken connection would return only after
        // that.
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "the messages took {:?}",
            began.elapsed()
        );

        // No reconnect, and one dead letter for each unreadable message
        assert_eq!(connections(&world), 1, "{}", world.host_log());
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.dead.len()),
            (UNREADABLE.len() * 2 + 1, UNREADABLE.len())
        );
        for (_, _, says) in UNREADABLE {
            let sql = format!(
                "select count(*) from oncely.dead_letter where reason = 'unreadable' and detail like '%{says}%'"
            );
            assert!(world.database.number(&sql).await? >= 1, "{says}");
        }
        let kept = "select count(*) from oncely.dead_letter where headers like '%Oncely-Unreadable-Subject%'";
        assert_eq!(world.database.number(kept).await?, 5);
        Ok(())
    }
);

both!(
    unreadable_messages_of_other_subjects_are_ignored,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("subjects = [\"in.mine\"]")?).await?;
        for n in 0..40 {
            world
                .nats
                .publish_raw(b"in.other", b"NATS/1.0\r\nA: \xff\r\n\r\n", b"{}")?;
            world.nats.publish_raw(b"in.\xff\xfe", b"", b"{}")?;
            world
                .nats
                .publish_all(vec![NewMessage::new(
                    "in.mine",
                    &format!("mine{n}"),
                    "insert",
                    "{}",
                )])
                .await?;
        }
        world.quiet(40).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            0
        );
        assert_eq!(connections(&world), 1);
        Ok(())
    }
);

both!(
    an_unreadable_message_on_an_output_stream_blocks_no_output,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("")?).await?;

        // The stream has a tiny duplicate window, so each repeated output is verified.
        world
            .nats
            .make_stream("OUT", "out.>", Duration::from_millis(100))
            .await?;
        world.start_host().await?;
        let strangers = || -> Result<()> {
            world
                .nats
                .publish_raw(b"out.x", b"NATS/1.0\r\nA b: c\r\n\r\n", b"{}")?;
            world.nats.publish_raw(b"out.\xff\xfe", b"", b"{}")
        };
        strangers()?;
        world
            .nats
            .publish_all(
                (0..5)
                    .map(|n| NewMessage::new("in.x", &format!("e{n}"), "emit", "{}"))
                    .collect(),
            )
            .await?;
        world.quiet(5).await?;
        strangers()?;
        world.kill_host()?;
        world
            .nats
            .publish_all(
                (5..10)
                    .map(|n| NewMessage::new("in.x", &format!("e{n}"), "emit", "{}"))
                    .collect(),
            )
            .await?;
        world.start_host().await?;
        world.quiet(10).await?;

        // Once for each of the two hosts.
        assert_eq!(connections(&world), 2, "{}", world.host_log());
        Ok(())
    }
);

// Statements that are expensive to parse, as large as a handler's memory allows: four at a time,
// with liveness probes meanwhile.
both!(
    statements_of_megabytes_leave_the_host_responsive,
    |kind: Kind| async move {
        let mut world = World::start(
            kind,
            &manifest("concurrency = 4\nbatch = 1\n[worker.limits]\nmemory = \"256MiB\"")?,
        )
        .await?;
        let fillers = [
            ";", " ", "(", "'a' ", "/* */", "--\n", "$a$ $a$", "\"a\".", "1+", "e'\\n'", "\u{e9}",
            "a,",
        ];
        let message = |(n, filler): (usize, &&str)| {
            let options = serde_json::json!({ "filler": filler }).to_string();
            NewMessage::new("in.x", &format!("long{n}"), "long_sql", &options)
        };
        let alive = world.control_url()? + "/livez";
        let client = reqwest::Client::new();
        world
            .nats
            .publish_all(fillers.iter().enumerate().map(message).collect())
            .await?;

        // Probe while the statements are handled
        let mut slowest = Duration::ZERO;
        while world
            .database
            .number("select count(*) from oncely.inbox")
            .await?
            < fillers.len() as i64
        {
            let started = Instant::now();
            assert!(
                client
                    .get(&alive)
                    .send()
                    .await
                    .context("request `/livez`")?
                    .status()
                    .is_success()
            );
            slowest = slowest.max(started.elapsed());
            anyhow::ensure!(
                slowest < Duration::from_secs(3),
                "a liveness probe took {slowest:?}:\n{}",
                world.host_log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let refused = "select count(*) from oncely.dead_letter where reason = 'rejected' and detail like '%at most 262144 are allowed%'";
        assert_eq!(
            world.database.number(refused).await?,
            fillers.len() as i64,
            "{}",
            world.host_log()
        );
        world.ready().await
    }
);
