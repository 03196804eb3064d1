//! A failed attempt is run again from its record, and two that agree prove that a third is of no use.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use oncely::cache::{CacheKey, Loaded, Policy};
use oncely::model::message::Message;
use oncely::model::verdict::{Letter, Reason, Verdict};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::nats::ToPublish;
use support::world::{QUICK_RETRIES, World, manifest, manifest_of};

use crate::positions::{Heart, message};

const ONE_ATTEMPT: &str = "[worker.retry]\nattempts = 1\n";

/// A folder of somebody who has nothing but a file.
struct Laptop {
    folder: tempfile::TempDir,
}

/// What `oncely replay` came to.
struct Replayed {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Replayed {
    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.out).with_context(|| format!("read {}: {}", self.out, self.err))
    }
}

impl Laptop {
    fn new() -> Result<Laptop> {
        Ok(Laptop { folder: tempfile::tempdir()? })
    }

    /// Brings dead letters home.
    async fn export(&self, world: &World, args: &[&str]) -> Result<PathBuf> {
        let path = self.folder.path().join("letters.json");
        let out = path.to_string_lossy().into_owned();
        world.oncely(&[&["dlq", "export"], args, &["--out", &out]].concat()).await?;
        Ok(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    fn replay(&self, file: &Path, args: &[&str]) -> Result<Replayed> {
        let output = Command::new(guests::oncely()?)
            .arg("replay")
            .arg(file)
            .args(args)
            .current_dir(self.folder.path())
            .env_remove("ONCELY_HOST")
            .output()?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Ok(Replayed { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) })
    }

    /// The test component with another statement in it.
    fn changed_component(&self) -> Result<PathBuf> {
        let (old, new) = (b"insert into effect (event_id", b"INSERT into effect (event_id");
        let mut wasm = std::fs::read(guests::component()?)?;
        let places: Vec<usize> =
            wasm.windows(old.len()).enumerate().filter(|(_, at)| at == old).map(|(at, _)| at).collect();
        anyhow::ensure!(!places.is_empty(), "the component does not have the statement");
        for at in places {
            wasm[at..at + new.len()].copy_from_slice(new);
        }
        self.write("changed.wasm", wasm)
    }
}

/// Everything a handler can look at.
const LOOKS: &str =
    r#"["now", "attempt", "remaining", "wall", "monotonic", "random", "seed", "sleep", "state", "cache", "sql"]"#;

fn to_die(event_id: &str, behaviour: &str, options: &str) -> ToPublish {
    ToPublish::new("in.x", event_id, behaviour, options)
}

async fn with_letters(kind: Kind, manifest: &str, messages: Vec<ToPublish>) -> Result<World> {
    let count = messages.len() as i64;
    let world = World::start(kind, manifest).await?;
    world.nats.publish_all(messages).await?;
    world.quiet(count).await?;
    Ok(world)
}

both!(a_trap_after_everything_a_handler_can_look_at_is_the_same_on_a_laptop, |kind: Kind| async move {
    let options = format!(
        r#"{{"look": {LOOKS}, "times": 2, "n": 3, "lines": 7, "key": "counter", "cache": ["invalidate", "put"]}}"#
    );
    let behaviour = "state_counter,insert,cached,look,log,state_counter,trap";
    let mut world = with_letters(kind, &manifest(ONE_ATTEMPT)?, vec![to_die("e1", behaviour, &options)]).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["1"]).await?;
    let bare = std::fs::read_to_string(&file)?;
    laptop.write("whole.json", &bare)?;
    let file_without = laptop.export(&world, &["1", "--no-component"]).await?;
    world.stop_host().await?;
    let file = file.with_file_name("whole.json");

    let same = laptop.replay(&file, &["--json"])?;
    assert_eq!(same.code, Some(0), "{}{}", same.out, same.err);
    let report = same.json()?;
    assert_eq!((&report["outcome"], &report["departure"]), (&json!("same"), &Value::Null));
    assert_eq!(report["failure"]["code"], "trap");
    let asked: Vec<String> = report["record"].as_array().context("no record")?.iter().map(kind_of).collect();
    assert_eq!(report["steps"], asked.len());
    for what in [
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
        assert!(asked.iter().any(|asked| asked == what), "`{what}` is not in {asked:?}");
    }
    let letter: Value = serde_json::from_str(&bare)?;
    assert_eq!(report["logs"], letter["story"][0]["logs"]);
    assert!(
        report["logs"].as_str().is_some_and(|logs| logs.contains("seed: (") && logs.contains("line 6")),
        "{report}"
    );
    let shown = laptop.replay(&file, &["--steps"])?;
    assert!(
        shown.out.contains("sql.execute \"insert into effect") && shown.out.contains("the same: "),
        "{}",
        shown.out
    );

    // Another component departs where it does something else.
    let changed = laptop.changed_component()?;
    let departs = laptop.replay(&file, &["--json", "--component", &changed.to_string_lossy()])?;
    assert_eq!(departs.code, Some(5), "{}{}", departs.out, departs.err);
    let departure = departs.json()?["departure"].clone();
    let place = asked.iter().position(|asked| asked == "execute").context("no statement")? + 1;
    assert_eq!(departure["step"], place);
    let (expected, instead) = (departure["expected"].to_string(), departure["instead"].to_string());
    assert!(expected.contains("insert into effect") && instead.contains("INSERT into effect"), "{departure}");
    assert!(departs.err.contains(&format!("departs from the record at call {place}")), "{}", departs.err);

    // A file without its component needs it from elsewhere.
    let lacks = laptop.replay(&file_without, &[])?;
    assert_eq!(lacks.code, Some(2), "{}", lacks.err);
    assert!(lacks.err.contains("--component"), "{}", lacks.err);
    let given = laptop.replay(&file_without, &["--component", &guests::component()?.to_string_lossy()])?;
    assert_eq!(given.code, Some(0), "{}{}", given.out, given.err);
    Ok(())
});

/// What a step asked, such as `query`.
fn kind_of(step: &Value) -> String {
    let asked = &step["asked"];
    let name = asked.as_object().and_then(|asked| asked.keys().next().cloned());
    name.or_else(|| asked.as_str().map(str::to_owned)).unwrap_or_default()
}

both!(whatever_ends_an_attempt_ends_its_replay, |kind: Kind| async move {
    let settings = "[worker.retry]\nattempts = 1\n[worker.limits]\ntime = \"2s\"\nsql_statements = 5\n";
    let cases = [
        ("panic", "insert,panic", "{}"),
        ("fail", "look,fail", r#"{"look": ["state", "sql"], "code": "told"}"#),
        ("later", "fail", r#"{"after_ms": 10}"#),
        ("reject", "insert,reject", "{}"),
        ("memory", "eat_memory", "{}"),
        ("recurse", "recurse", "{}"),
        ("refused", "emit_ungranted", "{}"),
        ("unique", "swallow_error", r#"{"what": "unique"}"#),
        ("syntax", "sql_text", r#"{"sql": "select from from"}"#),
        ("no-table", "sql_text", r#"{"sql": "select * from nowhere"}"#),
        ("statements", "look", r#"{"look": ["sql"], "times": 6}"#),
        ("cas", "state_counter,state_cas,trap", "{}"),
        ("spin", "look,spin", r#"{"look": ["monotonic", "random"]}"#),
        // It is stopped while it waits: the replay ends there, and at once.
        ("sleep", "insert,sleep", "{}"),
        ("clocks", "look,trap", r#"{"look": ["monotonic"], "times": 10000}"#),
        ("numbers", "look,trap", r#"{"look": ["state", "seed", "random"], "times": 1000, "bytes": 3}"#),
    ];
    let messages = cases.iter().map(|(event, behaviour, options)| to_die(event, behaviour, options)).collect();
    let world = with_letters(kind, &manifest(settings)?, messages).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["--all"]).await?;
    let text = std::fs::read_to_string(&file)?;
    assert_eq!(text.lines().count(), cases.len());
    assert_eq!(text.matches("\"component\":\"").count(), 1, "the component stands in the file once");
    let several = laptop.replay(&file, &[])?;
    assert_eq!(several.code, Some(2));
    assert!(several.err.contains("--letter ID"), "{}", several.err);
    for line in text.lines() {
        let letter: Value = serde_json::from_str(line)?;
        let replayed = laptop.replay(&file, &["--json", "--letter", &letter["id"].to_string()])?;
        assert_eq!(replayed.code, Some(0), "{}: {}", letter["event_id"], replayed.err);
        let report = replayed.json()?;
        assert_eq!(report["failure"]["message"], letter["detail"], "{}", letter["event_id"]);
        assert_eq!(report["failure"]["code"], letter["code"], "{}", letter["event_id"]);
    }
    Ok(())
});

both!(a_record_that_has_no_room_for_everything_says_so, |kind: Kind| async move {
    let many_rows = r#"with recursive n (n) as (select 1 union all select n + 1 from n where n < 9900)
        select n, 'row ' || n as a, 'a long text that takes its room, again and again, in each of the rows, and in the next one again' as b from n"#;
    let wide = match kind {
        Kind::Sqlite => "select hex(zeroblob(1500000))",
        _ => "select repeat('0', 3000000)",
    };
    let sql = |sql: &str| json!({"look": ["random", "sql", "random"], "sql": sql}).to_string();
    let messages = vec![
        to_die("random", "look,trap", r#"{"look": ["random"], "times": 20, "bytes": 65536}"#),
        to_die("rows", "look,trap", &sql(many_rows)),
        to_die("wide", "look,trap", &sql(wide)),
    ];
    // Nothing is proved by what is cut.
    let world = with_letters(kind, &manifest(QUICK_RETRIES)?, messages).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["--all"]).await?;
    for line in std::fs::read_to_string(&file)?.lines() {
        let letter: Value = serde_json::from_str(line)?;
        assert!(line.len() < 40 << 20, "{} bytes", line.len());
        assert_eq!((&letter["reason"], &letter["attempts"]), (&json!("attempts-exhausted"), &json!(3)));
        assert_eq!(letter["replay"]["record"]["cut"], true, "{}", letter["event_id"]);
        let cut = laptop.replay(&file, &["--letter", &letter["id"].to_string()])?;
        assert_eq!(cut.code, Some(6), "{}{}", cut.out, cut.err);
        assert!(cut.out.contains("there the record was cut"), "{}", cut.out);
    }
    Ok(())
});

both!(the_call_of_a_batch_handler_is_replayed_as_a_whole, |kind: Kind| async move {
    let manifest = manifest_of(&guests::batch_component()?, &format!("concurrency = 1\nbatch = 8\n{ONE_ATTEMPT}"));
    let good = (0..3).map(|n| to_die(&format!("good{n}"), "insert", "{}"));
    let bad = ["trap", "reject", "late-reject", "short", "violate"].map(|behaviour| to_die(behaviour, behaviour, "{}"));
    let mut world = World::without_host(kind, &manifest).await?;
    world.start_host().await?;
    world.stop_host().await?;
    world.nats.publish_all(bad.into_iter().chain(good).collect()).await?;
    world.start_host().await?;
    world.quiet(8).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["--all"]).await?;
    for line in std::fs::read_to_string(&file)?.lines() {
        let letter: Value = serde_json::from_str(line)?;
        let replayed = laptop.replay(&file, &["--json", "--letter", &letter["id"].to_string()])?;
        assert_eq!(replayed.code, Some(0), "{}: {}", letter["event_id"], replayed.err);
    }
    // A handler for one message at a time cannot stand in for it.
    let foreign = guests::component()?;
    let text = std::fs::read_to_string(&file)?;
    let together = text.lines().map(serde_json::from_str::<Value>).find(|letter| {
        let messages = |letter: &Value| letter["replay"]["record"]["messages"].as_array().map_or(0, Vec::len);
        letter.as_ref().is_ok_and(|letter| messages(letter) > 1)
    });
    let id = together.context("no record of several messages")??["id"].to_string();
    let refused = laptop.replay(&file, &["--letter", &id, "--component", &foreign.to_string_lossy()])?;
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("handles one at a time"), "{}", refused.err);
    Ok(())
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_export_is_refused_and_nothing_panics() -> Result<()> {
    let messages = vec![to_die("e1", "insert,look,trap", &format!(r#"{{"look": {LOOKS}}}"#))];
    let world = with_letters(Kind::Sqlite, &manifest(ONE_ATTEMPT)?, messages).await?;
    let laptop = Laptop::new()?;
    let file = laptop.export(&world, &["1"]).await?;
    let whole: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut letter = whole.clone();
        edit(&mut letter);
        letter.to_string()
    };
    let wasm = std::fs::read(guests::component()?)?;
    let cut_off: String = whole.to_string().chars().take(1000).collect();
    for (name, content, code, says) in [
        ("empty", String::new(), 2, "holds no letter"),
        ("text", "a letter to my aunt".to_owned(), 2, "line 1 of"),
        ("json", "[1, 2]".to_owned(), 2, "is no exported letter"),
        ("half", cut_off, 2, "is no exported letter"),
        ("null", edited(&|letter| letter["replay"] = Value::Null), 3, "no record of an attempt"),
        ("older", edited(&|letter| letter["replay"]["record"]["form"] = json!(0)), 1, "of form 0"),
        (
            "no-failure",
            edited(&|letter| letter["replay"]["record"]["failure"] = Value::Null),
            1,
            "how the attempt failed",
        ),
        ("another", edited(&|letter| letter["event_id"] = json!("another")), 1, "not about the event `another`"),
        ("no-messages", edited(&|letter| letter["replay"]["record"]["messages"] = json!([])), 1, "not about the event"),
        ("no-wasm", edited(&|letter| letter["replay"]["component"] = json!("AAAA")), 1, "load the component"),
        (
            "misfit",
            edited(&|letter| letter["replay"]["record"]["steps"][0]["saw"] = json!({"ready": [7]})),
            1,
            "does not fit",
        ),
        ("shorter", edited(&|letter| letter["replay"]["record"]["steps"] = json!([])), 5, "at call 1"),
        ("other-log", edited(&|letter| letter["replay"]["record"]["logs"] = json!("now: 1\n")), 5, "in its log"),
    ] {
        let file = laptop.write(name, content)?;
        let refused = laptop.replay(&file, &[])?;
        assert_eq!(refused.code, Some(code), "{name}: {}{}", refused.out, refused.err);
        assert!(refused.err.contains(says) && !refused.err.contains("panicked"), "{name}: {}", refused.err);
    }
    let binary = laptop.write("binary", &wasm)?;
    assert_eq!(laptop.replay(&binary, &[])?.code, Some(2));
    assert_eq!(laptop.replay(Path::new("nowhere.json"), &[])?.code, Some(2));
    assert_eq!(laptop.replay(&file, &["--letter", "7"])?.code, Some(3));
    let core = laptop.write("core.wasm", b"\0asm\x01\0\0\0")?;
    assert_eq!(laptop.replay(&file, &["--component", &core.to_string_lossy()])?.code, Some(1));

    // Closed letters keep no record.
    world.oncely(&["dlq", "resolve", "1", "--note", "seen"]).await?;
    let file = laptop.export(&world, &["1"]).await?;
    let gone = laptop.replay(&file, &[])?;
    assert_eq!(gone.code, Some(3), "{}", gone.err);
    Ok(())
}

// ---- proved poison ----

both!(a_trap_that_repeats_to_the_letter_is_dead_at_once_unless_the_manifest_says_otherwise, |kind: Kind| async move {
    let messages = || {
        let looks = |looks: &str| format!(r#"{{"look": {looks}, "key": "nothing", "attempt": 2}}"#);
        vec![
            to_die("plain", "look,trap", &looks(r#"["state", "sql", "sleep"]"#)),
            to_die("seed", "look,panic", &looks(r#"["seed"]"#)),
            to_die("memory", "eat_memory", "{}"),
            to_die("stack", "recurse", "{}"),
            // These see something else each time.
            to_die("now", "look,trap", &looks(r#"["now"]"#)),
            to_die("attempt", "look,trap", &looks(r#"["attempt"]"#)),
            to_die("clock", "look,trap", &looks(r#"["monotonic"]"#)),
            to_die("wall", "look,trap", &looks(r#"["wall"]"#)),
            to_die("random", "look,trap", &looks(r#"["random"]"#)),
            // These ask for time.
            to_die("retry", "look,fail", &looks(r#"["state"]"#)),
            to_die("later", "fail", r#"{"after_ms": 1}"#),
            to_die("unique", "swallow_error", r#"{"what": "unique"}"#),
            // This one may be the machine's fault.
            to_die("time", "spin", "{}"),
        ]
    };
    let proved = ["memory", "plain", "seed", "stack"];
    for switch in ["", "proved_poison = \"retry\"\n"] {
        let limits = "[worker.limits]\ntime = \"2s\"\n";
        let world = with_letters(kind, &manifest(&format!("{QUICK_RETRIES}{switch}{limits}"))?, messages()).await?;
        let sql = "select event_id, reason, attempts from oncely.dead_letter order by event_id";
        for row in world.database.rows(sql).await? {
            let expected = match switch.is_empty() && proved.contains(&row[0].as_str()) {
                true => ["proved-poison", "2"],
                false => ["attempts-exhausted", "3"],
            };
            assert_eq!(row[1..], expected, "{} with `{switch}`", row[0]);
        }
    }
    Ok(())
});

/// What one delivery of a message came to: none when it is to be tried again.
async fn once(heart: &Heart, message: &Arc<Message>) -> Result<Option<Letter>> {
    let mut delivered = heart.deliver(std::slice::from_ref(message)).await?;
    match delivered.verdicts.pop() {
        Some(Verdict::Retry { .. }) => Ok(None),
        Some(Verdict::Dead(letter)) => Ok(Some(*letter)),
        other => anyhow::bail!("it came to {other:?}"),
    }
}

both!(an_answer_that_changed_between_two_attempts_proves_nothing, |kind: Kind| async move {
    let mut heart = Heart::of(kind, "[worker.retry]\nattempts = 9\n").await?;
    let options = r#"{"look": ["sql"], "sql": "select id from once"}"#;
    let poison = message("poison", "look,trap", options);
    assert!(once(&heart, &poison).await?.is_none());
    heart.database.execute("insert into app.once (id) values ('a')").await?;
    assert!(once(&heart, &poison).await?.is_none(), "it saw another row");
    heart.database.execute("delete from app.once").await?;
    assert!(once(&heart, &poison).await?.is_none(), "it saw no row again, and one in between");
    let letter = once(&heart, &poison).await?.context("nothing changed, and it is to be tried again")?;
    assert_eq!((letter.reason, letter.attempts), (Reason::ProvedPoison, 4));
    assert!(letter.detail.contains("panicked or reached"), "{}", letter.detail);

    // What its neighbours in a batch did, it sees too; and one attempt of each version is not two of one.
    let neighbour = message("good", "state_counter", "{}");
    let poison = message("second", "look,trap", r#"{"look": ["state"]}"#);
    let mut delivered = heart.deliver(&[neighbour, Arc::clone(&poison)]).await?;
    assert!(matches!(delivered.verdicts.pop(), Some(Verdict::Retry { .. })));
    heart.delivery.version = 2;
    assert!(once(&heart, &poison).await?.is_none(), "another version may do otherwise");
    assert_eq!(once(&heart, &poison).await?.map(|letter| letter.reason), Some(Reason::ProvedPoison));
    Ok(())
});

both!(a_cached_answer_goes_away_by_itself_and_proves_nothing, |kind: Kind| async move {
    let heart = Heart::of(kind, "[worker.retry]\nattempts = 3\n").await?;
    let poison =
        |event: &str, key: &str| message(event, "look,trap", &format!(r#"{{"look": ["cache"], "key": "{key}"}}"#));
    let policy = Policy { ttl: std::time::Duration::from_secs(60), stale: std::time::Duration::ZERO };
    let cache = &heart.delivery.cache;
    cache.put(&CacheKey::value("test", "k"), Loaded::kept("v".into(), Vec::new(), policy), cache.begin("test")).await;
    let (cached, missing) = (poison("cached", "k"), poison("missing", "nothing"));
    assert!(once(&heart, &cached).await?.is_none() && once(&heart, &cached).await?.is_none());
    assert_eq!(once(&heart, &cached).await?.map(|letter| letter.reason), Some(Reason::AttemptsExhausted));
    assert!(once(&heart, &missing).await?.is_none());
    assert_eq!(once(&heart, &missing).await?.map(|letter| letter.reason), Some(Reason::ProvedPoison));
    Ok(())
});

both!(what_is_put_back_has_two_attempts_before_anything_is_proved, |kind: Kind| async move {
    let world = with_letters(kind, &manifest(QUICK_RETRIES)?, vec![to_die("e1", "trap", "{}")]).await?;
    world.oncely(&["dlq", "redrive", "1"]).await?;
    world.until("select count(*) from oncely.dead_letter where attempts = 4 and state = 'open'", 1).await?;
    let rows = world.database.rows("select reason from oncely.dead_letter").await?;
    assert_eq!(rows, [["proved-poison"]]);
    // A rehearsal finds it failing as it did.
    let plan = world.oncely_json(&["dlq", "redrive", "1", "--dry-run", "--json"]).await?;
    assert_eq!(plan["letters"][0]["class"], "fails-the-same", "{plan}");
    Ok(())
});

both!(nothing_stays_on_record_of_what_took_effect_after_all, |kind: Kind| async move {
    let messages = vec![
        to_die("late", "fail_once,insert", "{}"),
        to_die("later", "insert,fail_until", r#"{"attempt": 3}"#),
        to_die("never", "insert,trap", "{}"),
    ];
    let world = with_letters(kind, &manifest(QUICK_RETRIES)?, messages).await?;
    world.until("select count(*) from oncely.record", 1).await?;
    let rows = world.database.rows("select event_id, attempt from oncely.record").await?;
    assert_eq!(rows, [["never", "3"]]);
    Ok(())
});

both!(an_instance_that_remembers_other_messages_proves_nothing, |kind: Kind| async move {
    let heart = Heart::of(kind, "isolation = \"batch\"\n[worker.retry]\nattempts = 9\n").await?;
    let poison = message("poison", "trap", "{}");
    for round in 0..3 {
        let good = message(&format!("good{round}"), "insert", r#"{"n": 1}"#);
        let delivered = heart.deliver(&[good, Arc::clone(&poison)]).await?;
        assert!(matches!(delivered.verdicts[1], Verdict::Retry { .. }), "{:?}", delivered.verdicts);
    }
    // Alone it has an instance of its own.
    assert!(once(&heart, &poison).await?.is_none());
    assert_eq!(once(&heart, &poison).await?.map(|letter| letter.reason), Some(Reason::ProvedPoison));
    Ok(())
});
