//! Replays of failed attempts from their recordings, and the detection of deterministic failures.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use oncely::cache::{CacheKey, Loaded, Policy};
use oncely::model::message::Message;
use oncely::model::verdict::{DeadLetter, Reason, Verdict};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest, manifest_of};

use crate::positions::{DeliveryHarness, message};

const ONE_ATTEMPT: &str = "[worker.retry]\nattempts = 1\n";

/// A user's folder with only an exported file.
struct Laptop {
    folder: tempfile::TempDir,
}

/// The result of `oncely replay`.
struct ReplayOutput {
    code: Option<i32>,
    out: String,
    err: String,
}

impl ReplayOutput {
    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.out).with_context(|| format!("read {}: {}", self.out, self.err))
    }
}

impl Laptop {
    fn new() -> Result<Laptop> {
        Ok(Laptop {
            folder: tempfile::tempdir()?,
        })
    }

    /// Exports dead letters into the folder.
    async fn export(&self, world: &World, args: &[&str]) -> Result<PathBuf> {
        let path = self.folder.path().join("dead-letters.json");
        let out = path.to_string_lossy().into_owned();
        world
            .oncely(&[&["dlq", "export"], args, &["--out", &out]].concat())
            .await?;
        Ok(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    fn replay(&self, file: &Path, args: &[&str]) -> Result<ReplayOutput> {
        let output = Command::new(guests::oncely()?)
            .arg("replay")
            .arg(file)
            .args(args)
            .current_dir(self.folder.path())
            .env_remove("ONCELY_HOST")
            .output()?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Ok(ReplayOutput {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        })
    }

    /// The test component with one changed statement.
    fn changed_component(&self) -> Result<PathBuf> {
        let (old, new) = (
            b"insert into effect (event_id",
            b"INSERT into effect (event_id",
        );
        let mut wasm = std::fs::read(guests::component()?)?;
        let places: Vec<usize> = wasm
            .windows(old.len())
            .enumerate()
            .filter(|(_, at)| at == old)
            .map(|(at, _)| at)
            .collect();
        anyhow::ensure!(
            !places.is_empty(),
            "the component does not have the statement"
        );
        for at in places {
            wasm[at..at + new.len()].copy_from_slice(new);
        }
        self.write("changed.wasm", wasm)
    }
}

/// All host functions that a handler can call to read.
const INSPECTIONS: &str = r#"["now", "attempt", "remaining", "wall", "monotonic", "random", "seed", "sleep", "state", "cache", "sql"]"#;

fn failing_message(event_id: &str, behaviour: &str, options: &str) -> NewMessage {
    NewMessage::new("in.x", event_id, behaviour, options)
}

async fn world_with_dead_letters(
    kind: Kind,
    manifest: &str,
    messages: Vec<NewMessage>,
) -> Result<World> {
    let count = messages.len() as i64;
    let world = World::start(kind, manifest).await?;
    world.nats.publish_all(messages).await?;
    world.quiet(count).await?;
    Ok(world)
}

both!(
    a_replay_reproduces_a_trap_after_every_host_call,
    |kind: Kind| async move {
        let options = format!(
            r#"{{"inspect": {INSPECTIONS}, "times": 2, "n": 3, "lines": 7, "key": "counter", "cache": ["invalidate", "put"]}}"#
        );
        let behaviour = "state_counter,insert,cached,inspect,log,state_counter,trap";
        let mut world = world_with_dead_letters(
            kind,
            &manifest(ONE_ATTEMPT)?,
            vec![failing_message("e1", behaviour, &options)],
        )
        .await?;
        let laptop = Laptop::new()?;
        let file = laptop.export(&world, &["1"]).await?;
        let bare = std::fs::read_to_string(&file)?;
        laptop.write("whole.json", &bare)?;
        let file_without = laptop.export(&world, &["1", "--no-component"]).await?;
        world.stop_host().await?;
        let file = file.with_file_name("whole.json");

        // An unchanged component reproduces every call, log line and failure.
        let same = laptop.replay(&file, &["--json"])?;
        assert_eq!(same.code, Some(0), "{}{}", same.out, same.err);
        let report = same.json()?;
        assert_eq!(
            (&report["outcome"], &report["divergence"]),
            (&json!("reproduced"), &Value::Null)
        );
        assert_eq!(report["failure"]["code"], "trap");
        let calls: Vec<String> = report["record"]
            .as_array()
            .context("read the recording")?
            .iter()
            .map(kind_of)
            .collect();
        assert_eq!(report["calls"], calls.len());
        for function in [
            "get",
            "set",
            "send",
            "execute",
            "random",
            "remaining",
            "wall-clock",
            "monotonic-clock",
            "wait",
            "query",
            "cache-get",
            "cache-put",
            "cache-invalidate",
        ] {
            assert!(
                calls.iter().any(|call| call == function),
                "`{function}` is not in {calls:?}"
            );
        }
        let dead_letter: Value = serde_json::from_str(&bare)?;
        assert_eq!(report["logs"], dead_letter["failure_history"][0]["logs"]);
        assert!(
            report["logs"]
                .as_str()
                .is_some_and(|logs| logs.contains("seed: (") && logs.contains("line 6")),
            "{report}"
        );
        let shown = laptop.replay(&file, &["--calls"])?;
        assert!(
            shown.out.contains("sql.execute \"insert into effect")
                && shown.out.contains("reproduced: "),
            "{}",
            shown.out
        );

        // A changed component diverges at its changed call.
        let changed = laptop.changed_component()?;
        let diverging = laptop.replay(
            &file,
            &["--json", "--component", &changed.to_string_lossy()],
        )?;
        assert_eq!(
            diverging.code,
            Some(5),
            "{}{}",
            diverging.out,
            diverging.err
        );
        let divergence = diverging.json()?["divergence"].clone();
        let place = calls
            .iter()
            .position(|call| call == "execute")
            .context("find the statement")?
            + 1;
        assert_eq!(divergence["call"], place);
        let (expected, instead) = (
            divergence["expected"].to_string(),
            divergence["actual"].to_string(),
        );
        assert!(
            expected.contains("insert into effect") && instead.contains("INSERT into effect"),
            "{divergence}"
        );
        assert!(
            diverging
                .err
                .contains(&format!("diverges from the recording at call {place}")),
            "{}",
            diverging.err
        );

        // An export without the component needs it as an argument.
        let without_component = laptop.replay(&file_without, &[])?;
        assert_eq!(without_component.code, Some(2), "{}", without_component.err);
        assert!(
            without_component.err.contains("--component"),
            "{}",
            without_component.err
        );
        let with_component = laptop.replay(
            &file_without,
            &["--component", &guests::component()?.to_string_lossy()],
        )?;
        assert_eq!(
            with_component.code,
            Some(0),
            "{}{}",
            with_component.out,
            with_component.err
        );
        Ok(())
    }
);

/// The host call of a step, such as `query`.
fn kind_of(step: &Value) -> String {
    let call = &step["call"];
    let name = call
        .as_object()
        .and_then(|call| call.keys().next().cloned());
    name.or_else(|| call.as_str().map(str::to_owned))
        .unwrap_or_default()
}

both!(
    a_replay_ends_the_same_way_as_its_attempt,
    |kind: Kind| async move {
        let settings =
            "[worker.retry]\nattempts = 1\n[worker.limits]\ntime = \"2s\"\nsql_statements = 5\n";
        let cases = [
            ("panic", "insert,panic", "{}"),
            (
                "fail",
                "inspect,fail",
                r#"{"inspect": ["state", "sql"], "code": "red"}"#,
            ),
            ("later", "fail", r#"{"after_ms": 10}"#),
            ("reject", "insert,reject", "{}"),
            ("memory", "eat_memory", "{}"),
            ("recurse", "recurse", "{}"),
            ("refused", "emit_ungranted", "{}"),
            ("unique", "swallow_error", r#"{"what": "unique"}"#),
            ("syntax", "sql_text", r#"{"sql": "select from from"}"#),
            (
                "no-table",
                "sql_text",
                r#"{"sql": "select * from nowhere"}"#,
            ),
            (
                "statements",
                "inspect",
                r#"{"inspect": ["sql"], "times": 6}"#,
            ),
            ("cas", "state_counter,state_cas,trap", "{}"),
            (
                "spin",
                "inspect,spin",
                r#"{"inspect": ["monotonic", "random"]}"#,
            ),
            // The attempt was stopped during its sleep: the replay stops there, without sleeping.
            ("sleep", "insert,sleep", "{}"),
            (
                "clocks",
                "inspect,trap",
                r#"{"inspect": ["monotonic"], "times": 10000}"#,
            ),
            (
                "numbers",
                "inspect,trap",
                r#"{"inspect": ["state", "seed", "random"], "times": 1000, "bytes": 3}"#,
            ),
        ];

        // One export of all dead letters
        let messages = cases
            .iter()
            .map(|(event, behaviour, options)| failing_message(event, behaviour, options))
            .collect();
        let world = world_with_dead_letters(kind, &manifest(settings)?, messages).await?;
        let laptop = Laptop::new()?;
        let file = laptop.export(&world, &["--all"]).await?;
        let text = std::fs::read_to_string(&file)?;
        assert_eq!(text.lines().count(), cases.len());
        assert_eq!(
            text.matches("\"component\":\"").count(),
            1,
            "the file contains the component once"
        );
        let several = laptop.replay(&file, &[])?;
        assert_eq!(several.code, Some(2));
        assert!(several.err.contains("--id ID"), "{}", several.err);

        // Each replay ends like its attempt.
        for line in text.lines() {
            let dead_letter: Value = serde_json::from_str(line)?;
            let replayed =
                laptop.replay(&file, &["--json", "--id", &dead_letter["id"].to_string()])?;
            assert_eq!(
                replayed.code,
                Some(0),
                "{}: {}",
                dead_letter["event_id"],
                replayed.err
            );
            let report = replayed.json()?;
            assert_eq!(
                report["failure"]["message"], dead_letter["detail"],
                "{}",
                dead_letter["event_id"]
            );
            assert_eq!(
                report["failure"]["code"], dead_letter["code"],
                "{}",
                dead_letter["event_id"]
            );
        }
        Ok(())
    }
);

both!(a_truncated_recording_is_reported, |kind: Kind| async move {
    let many_rows = r#"with recursive n (n) as (select 1 union all select n + 1 from n where n < 9900)
        select n, 'row ' || n as a, 'a long text that takes its room, again and again, in each of the rows, and in the next one again' as b from n"#;
    let wide = match kind {
        Kind::Sqlite => "select hex(zeroblob(1500000))",
        _ => "select repeat('0', 3000000)",
    };
    let sql = |sql: &str| json!({"inspect": ["random", "sql", "random"], "sql": sql}).to_string();
    let messages = vec![
        failing_message(
            "random",
            "inspect,trap",
            r#"{"inspect": ["random"], "times": 20, "bytes": 65536}"#,
        ),
        failing_message("rows", "inspect,trap", &sql(many_rows)),
        failing_message("wide", "inspect,trap", &sql(wide)),
    ];
    // A truncated recording proves nothing.
    let world = world_with_dead_letters(kind, &manifest(QUICK_RETRIES)?, messages).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["--all"]).await?;
    for line in std::fs::read_to_string(&file)?.lines() {
        let dead_letter: Value = serde_json::from_str(line)?;
        assert!(line.len() < 40 << 20, "{} bytes", line.len());
        assert_eq!(
            (&dead_letter["reason"], &dead_letter["attempts"]),
            (&json!("attempts-exhausted"), &json!(3))
        );
        assert_eq!(
            dead_letter["replay"]["record"]["truncated"], true,
            "{}",
            dead_letter["event_id"]
        );
        let cut = laptop.replay(&file, &["--id", &dead_letter["id"].to_string()])?;
        assert_eq!(cut.code, Some(6), "{}{}", cut.out, cut.err);
        assert!(
            cut.out.contains("up to where the recording was cut"),
            "{}",
            cut.out
        );
    }
    Ok(())
});

both!(
    the_call_of_a_batch_handler_is_replayed_as_a_whole,
    |kind: Kind| async move {
        let manifest = manifest_of(
            &guests::batch_component()?,
            &format!("concurrency = 1\nbatch = 8\n{ONE_ATTEMPT}"),
        );
        let good = (0..3).map(|n| failing_message(&format!("good{n}"), "insert", "{}"));
        let bad = ["trap", "reject", "late-reject", "short", "violate"]
            .map(|behaviour| failing_message(behaviour, behaviour, "{}"));
        let mut world = World::without_host(kind, &manifest).await?;
        world.start_host().await?;
        world.stop_host().await?;
        world
            .nats
            .publish_all(bad.into_iter().chain(good).collect())
            .await?;
        world.start_host().await?;
        world.quiet(8).await?;

        // Replay each failed batch
        let laptop = Laptop::new()?;
        let file = laptop.export(&world, &["--all"]).await?;
        for line in std::fs::read_to_string(&file)?.lines() {
            let dead_letter: Value = serde_json::from_str(line)?;
            let replayed =
                laptop.replay(&file, &["--json", "--id", &dead_letter["id"].to_string()])?;
            assert_eq!(
                replayed.code,
                Some(0),
                "{}: {}",
                dead_letter["event_id"],
                replayed.err
            );
        }

        // A handler of single messages cannot replay a batch.
        let single = guests::component()?;
        let text = std::fs::read_to_string(&file)?;
        let together = text
            .lines()
            .map(serde_json::from_str::<Value>)
            .find(|dead_letter| {
                let messages = |dead_letter: &Value| {
                    dead_letter["replay"]["record"]["messages"]
                        .as_array()
                        .map_or(0, Vec::len)
                };
                dead_letter
                    .as_ref()
                    .is_ok_and(|dead_letter| messages(dead_letter) > 1)
            });
        let id = together.context("find a recording of several messages")??["id"].to_string();
        let refused = laptop.replay(
            &file,
            &["--id", &id, "--component", &single.to_string_lossy()],
        )?;
        assert_eq!(refused.code, Some(1));
        assert!(
            refused.err.contains("handles one at a time"),
            "{}",
            refused.err
        );
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_export_is_refused_without_a_panic() -> Result<()> {
    let messages = vec![failing_message(
        "e1",
        "insert,inspect,trap",
        &format!(r#"{{"inspect": {INSPECTIONS}}}"#),
    )];
    let world = world_with_dead_letters(Kind::Sqlite, &manifest(ONE_ATTEMPT)?, messages).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["1"]).await?;
    let whole: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut dead_letter = whole.clone();
        edit(&mut dead_letter);
        dead_letter.to_string()
    };
    let wasm = std::fs::read(guests::component()?)?;
    let cut_off: String = whole.to_string().chars().take(1000).collect();
    for (name, content, code, says) in [
        ("empty", String::new(), 2, "contains no dead letter"),
        ("text", "not an export".to_owned(), 2, "line 1 of"),
        (
            "json",
            "[1, 2]".to_owned(),
            2,
            "is not an exported dead letter",
        ),
        ("half", cut_off, 2, "is not an exported dead letter"),
        (
            "null",
            edited(&|dead_letter| dead_letter["replay"] = Value::Null),
            3,
            "no recording of an attempt",
        ),
        (
            "older",
            edited(&|dead_letter| dead_letter["replay"]["record"]["format"] = json!(0)),
            1,
            "format 0",
        ),
        (
            "no-failure",
            edited(&|dead_letter| dead_letter["replay"]["record"]["failure"] = Value::Null),
            1,
            "contain the failure of the attempt",
        ),
        (
            "another",
            edited(&|dead_letter| dead_letter["event_id"] = json!("another")),
            1,
            "not contain the event `another`",
        ),
        (
            "no-messages",
            edited(&|dead_letter| dead_letter["replay"]["record"]["messages"] = json!([])),
            1,
            "not contain the event",
        ),
        (
            "no-wasm",
            edited(&|dead_letter| dead_letter["replay"]["component"] = json!("AAAA")),
            1,
            "load the component",
        ),
        (
            "misfit",
            edited(&|dead_letter| {
                dead_letter["replay"]["record"]["steps"][0]["result"] = json!({"ready": [7]})
            }),
            1,
            "does not fit",
        ),
        (
            "shorter",
            edited(&|dead_letter| dead_letter["replay"]["record"]["steps"] = json!([])),
            5,
            "at call 1",
        ),
        (
            "other-log",
            edited(&|dead_letter| dead_letter["replay"]["record"]["logs"] = json!("now: 1\n")),
            5,
            "in the log",
        ),
    ] {
        let file = laptop.write(name, content)?;
        let refused = laptop.replay(&file, &[])?;
        assert_eq!(
            refused.code,
            Some(code),
            "{name}: {}{}",
            refused.out,
            refused.err
        );
        assert!(
            refused.err.contains(says) && !refused.err.contains("panicked"),
            "{name}: {}",
            refused.err
        );
    }

    // Wrong arguments
    let binary = laptop.write("binary", &wasm)?;
    assert_eq!(laptop.replay(&binary, &[])?.code, Some(2));
    assert_eq!(laptop.replay(Path::new("nowhere.json"), &[])?.code, Some(2));
    assert_eq!(laptop.replay(&file, &["--id", "7"])?.code, Some(3));
    let core = laptop.write("core.wasm", b"\0asm\x01\0\0\0")?;
    assert_eq!(
        laptop
            .replay(&file, &["--component", &core.to_string_lossy()])?
            .code,
        Some(1)
    );

    // Closed dead letters keep no recording.
    world
        .oncely(&["dlq", "resolve", "1", "--note", "seen"])
        .await?;
    let file = laptop.export(&world, &["1"]).await?;
    let gone = laptop.replay(&file, &[])?;
    assert_eq!(gone.code, Some(3), "{}", gone.err);
    Ok(())
}

// ---- deterministic failures ----

both!(
    a_deterministic_failure_is_dead_lettered_unless_set_to_retry,
    |kind: Kind| async move {
        let messages = || {
            let options = |inspect: &str| {
                format!(r#"{{"inspect": {inspect}, "key": "nothing", "attempt": 2}}"#)
            };
            vec![
                failing_message(
                    "plain",
                    "inspect,trap",
                    &options(r#"["state", "sql", "sleep"]"#),
                ),
                failing_message("seed", "inspect,panic", &options(r#"["seed"]"#)),
                failing_message("memory", "eat_memory", "{}"),
                failing_message("stack", "recurse", "{}"),
                // These get a different result each time.
                failing_message("now", "inspect,trap", &options(r#"["now"]"#)),
                failing_message("attempt", "inspect,trap", &options(r#"["attempt"]"#)),
                failing_message("clock", "inspect,trap", &options(r#"["monotonic"]"#)),
                failing_message("wall", "inspect,trap", &options(r#"["wall"]"#)),
                failing_message("random", "inspect,trap", &options(r#"["random"]"#)),
                // These request a retry.
                failing_message("retry", "inspect,fail", &options(r#"["state"]"#)),
                failing_message("later", "fail", r#"{"after_ms": 1}"#),
                failing_message("unique", "swallow_error", r#"{"what": "unique"}"#),
                // This failure may be the machine's fault.
                failing_message("time", "spin", "{}"),
            ]
        };
        let proved = ["memory", "plain", "seed", "stack"];
        for switch in ["", "deterministic_failures = \"retry\"\n"] {
            let limits = "[worker.limits]\ntime = \"2s\"\n";
            let world = world_with_dead_letters(
                kind,
                &manifest(&format!("{QUICK_RETRIES}{switch}{limits}"))?,
                messages(),
            )
            .await?;
            let sql = "select event_id, reason, attempts from oncely.dead_letter order by event_id";
            for row in world.database.rows(sql).await? {
                let expected = match switch.is_empty() && proved.contains(&row[0].as_str()) {
                    true => ["deterministic-failure", "2"],
                    false => ["attempts-exhausted", "3"],
                };
                assert_eq!(row[1..], expected, "{} with `{switch}`", row[0]);
            }
        }
        Ok(())
    }
);

/// The dead letter after one delivery of a message; none if it will be retried.
async fn deliver_once(
    harness: &DeliveryHarness,
    message: &Arc<Message>,
) -> Result<Option<DeadLetter>> {
    let mut delivered = harness.deliver(std::slice::from_ref(message)).await?;
    match delivered.verdicts.pop() {
        Some(Verdict::Retry { .. }) => Ok(None),
        Some(Verdict::Dead(dead_letter)) => Ok(Some(*dead_letter)),
        other => anyhow::bail!("unexpected verdict: {other:?}"),
    }
}

both!(
    a_changed_host_result_is_no_deterministic_failure,
    |kind: Kind| async move {
        let mut harness = DeliveryHarness::new(kind, "[worker.retry]\nattempts = 9\n").await?;
        let options = r#"{"inspect": ["sql"], "sql": "select id from once"}"#;
        let poison = message("poison", "inspect,trap", options);
        assert!(deliver_once(&harness, &poison).await?.is_none());
        harness
            .database
            .execute("insert into app.once (id) values ('a')")
            .await?;
        assert!(
            deliver_once(&harness, &poison).await?.is_none(),
            "the second attempt read another row"
        );
        harness.database.execute("delete from app.once").await?;
        assert!(
            deliver_once(&harness, &poison).await?.is_none(),
            "the third attempt read another result than the second"
        );
        let dead_letter = deliver_once(&harness, &poison)
            .await?
            .context("find the dead letter after an identical attempt")?;
        assert_eq!(
            (dead_letter.reason, dead_letter.attempts),
            (Reason::DeterministicFailure, 4)
        );
        assert!(
            dead_letter.detail.contains("panicked or reached"),
            "{}",
            dead_letter.detail
        );

        // The effects of its neighbours in a batch are results, too. Two attempts must belong to
        // one version.
        let neighbour = message("good", "state_counter", "{}");
        let poison = message("second", "inspect,trap", r#"{"inspect": ["state"]}"#);
        let mut delivered = harness.deliver(&[neighbour, Arc::clone(&poison)]).await?;
        assert!(matches!(
            delivered.verdicts.pop(),
            Some(Verdict::Retry { .. })
        ));
        harness.delivery.version = 2;
        assert!(
            deliver_once(&harness, &poison).await?.is_none(),
            "another version may act differently"
        );
        assert_eq!(
            deliver_once(&harness, &poison)
                .await?
                .map(|dead_letter| dead_letter.reason),
            Some(Reason::DeterministicFailure)
        );
        Ok(())
    }
);

both!(
    a_cached_host_result_is_no_deterministic_failure,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, "[worker.retry]\nattempts = 3\n").await?;
        let poison = |event: &str, key: &str| {
            message(
                event,
                "inspect,trap",
                &format!(r#"{{"inspect": ["cache"], "key": "{key}"}}"#),
            )
        };
        let policy = Policy {
            ttl: std::time::Duration::from_secs(60),
            stale: std::time::Duration::ZERO,
        };
        let cache = &harness.delivery.cache;
        cache
            .put(
                &CacheKey::value("test", "k"),
                Loaded::cacheable("v".into(), Vec::new(), policy),
                cache.read_version("test"),
            )
            .await;
        let (cached, missing) = (poison("cached", "k"), poison("missing", "nothing"));
        assert!(
            deliver_once(&harness, &cached).await?.is_none()
                && deliver_once(&harness, &cached).await?.is_none()
        );
        assert_eq!(
            deliver_once(&harness, &cached)
                .await?
                .map(|dead_letter| dead_letter.reason),
            Some(Reason::AttemptsExhausted)
        );
        assert!(deliver_once(&harness, &missing).await?.is_none());
        assert_eq!(
            deliver_once(&harness, &missing)
                .await?
                .map(|dead_letter| dead_letter.reason),
            Some(Reason::DeterministicFailure)
        );
        Ok(())
    }
);

both!(
    a_redrive_gets_two_attempts_before_a_deterministic_failure,
    |kind: Kind| async move {
        let world = world_with_dead_letters(
            kind,
            &manifest(QUICK_RETRIES)?,
            vec![failing_message("e1", "trap", "{}")],
        )
        .await?;
        world.oncely(&["dlq", "redrive", "1"]).await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where attempts = 4 and state = 'open'",
                1,
            )
            .await?;
        let rows = world
            .database
            .rows("select reason from oncely.dead_letter")
            .await?;
        assert_eq!(rows, [["deterministic-failure"]]);

        // A dry run fails in the same way.
        let plan = world
            .oncely_json(&["dlq", "redrive", "1", "--dry-run", "--json"])
            .await?;
        assert_eq!(
            plan["dead_letters"][0]["prediction"], "same-failure",
            "{plan}"
        );
        Ok(())
    }
);

both!(
    recordings_are_removed_once_an_event_takes_effect,
    |kind: Kind| async move {
        let messages = vec![
            failing_message("late", "fail_once,insert", "{}"),
            failing_message("later", "insert,fail_until", r#"{"attempt": 3}"#),
            failing_message("never", "insert,trap", "{}"),
        ];
        let world = world_with_dead_letters(kind, &manifest(QUICK_RETRIES)?, messages).await?;
        world
            .until("select count(*) from oncely.recording", 1)
            .await?;
        let rows = world
            .database
            .rows("select event_id, attempt from oncely.recording")
            .await?;
        assert_eq!(rows, [["never", "3"]]);
        Ok(())
    }
);

both!(
    a_reused_instance_is_no_deterministic_failure,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(
            kind,
            "isolation = \"batch\"\n[worker.retry]\nattempts = 9\n",
        )
        .await?;
        let poison = message("poison", "trap", "{}");
        for round in 0..3 {
            let good = message(&format!("good{round}"), "insert", r#"{"n": 1}"#);
            let delivered = harness.deliver(&[good, Arc::clone(&poison)]).await?;
            assert!(
                matches!(delivered.verdicts[1], Verdict::Retry { .. }),
                "{:?}",
                delivered.verdicts
            );
        }

        // Alone the message gets its own instance.
        assert!(deliver_once(&harness, &poison).await?.is_none());
        assert_eq!(
            deliver_once(&harness, &poison)
                .await?
                .map(|dead_letter| dead_letter.reason),
            Some(Reason::DeterministicFailure)
        );
        Ok(())
    }
);
