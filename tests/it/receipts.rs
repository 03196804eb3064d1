//! Receipts: checkpoints over settled rows, files that prove an outcome, and the audit of both.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::{Connection, Executor};
use support::database::{Database, Kind};
use support::guests;
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{QUICK_RETRIES, World, manifest};

use crate::relay_modes::RelayMode;

/// A command's exit code, standard output and standard error.
struct Ran {
    exit: Option<i32>,
    stdout: String,
    stderr: String,
}

fn ran(command: &mut Command) -> Result<Ran> {
    let output = command.output().context("run a command")?;
    Ok(Ran {
        exit: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// Runs `oncely` in the folder of a world.
fn oncely(world: &World, args: &[&str]) -> Result<Ran> {
    let mut command = Command::new(guests::oncely()?);
    command.args(args).current_dir(world.folder.path());
    command.env_remove("ONCELY_HOST").env_remove("ONCELY_TOKEN");
    tokio::task::block_in_place(|| ran(&mut command))
}

/// Runs the verifier of the description.
fn described_verifier(file: &str, anchor: Option<&str>, world: &World) -> Result<Option<i32>> {
    let script = guests::repository().join("tests/it/receipts/verify.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(file).args(anchor);
    command.current_dir(world.folder.path());
    tokio::task::block_in_place(|| ran(&mut command)).map(|ran| ran.exit)
}

/// A world with a checkpoint every second.
async fn world(kind: Kind) -> Result<World> {
    let mut world = World::without_host(kind, &manifest(QUICK_RETRIES)?).await?;
    world.host_env = vec![("ONCELY_RECEIPTS".to_owned(), "1s".to_owned())];
    world.start_host().await?;
    // Rows of before are not expected to be in a checkpoint.
    let has_begun = "select count(*) from oncely.checkpoint_head";
    world.until(has_begun, 1).await?;
    Ok(world)
}

fn message(event: &str, behaviour: &str) -> NewMessage {
    NewMessage::new("in.x", event, behaviour, r#"{"n": 1}"#)
}

/// Waits for the receipt of an event with the places of this many outputs, and writes it to a file.
async fn receipt(world: &World, event: &str, outputs: usize) -> Result<(String, Value)> {
    let file = format!("{event}.receipt.json");
    let receipt = world
        .eventually(format!("the receipt of {event}"), || async {
            let ran = oncely(world, &["receipt", event, "--out", &file])?;
            ensure!(ran.exit == Some(0), "{:?}: {}", ran.exit, ran.stderr);
            let text = std::fs::read_to_string(world.folder.path().join(&file))?;
            let receipt: Value = serde_json::from_str(&text)?;
            let found = receipt["outputs"].as_array().map_or(0, Vec::len);
            ensure!(found == outputs, "{found} outputs: {text}");
            Ok(Some(receipt))
        })
        .await?;
    Ok((file, receipt))
}

/// The hash of a checkpoint as it was published.
async fn published(world: &World, number: &Value) -> Result<String> {
    world
        .eventually("the checkpoint is published", || async {
            let stored = world.nats.read_stream("ONCELY_CHECKPOINTS").await?;
            let bodies = stored
                .iter()
                .map(|one| serde_json::from_slice::<Value>(&one.body));
            let bodies = bodies.collect::<serde_json::Result<Vec<Value>>>()?;
            let found = bodies.iter().find(|one| one["number"] == *number);
            Ok(found.and_then(|one| one["hash"].as_str().map(str::to_owned)))
        })
        .await
}

fn last(receipt: &Value) -> &Value {
    receipt["checkpoints"]
        .as_array()
        .and_then(|all| all.last())
        .unwrap_or(&Value::Null)
}

/// Verifies a receipt both ways. The results have to agree.
fn verified(world: &World, file: &str, anchor: Option<&str>) -> Result<Option<i32>> {
    let mut args = vec!["receipt", "verify", file];
    if let Some(anchor) = anchor {
        args.extend(["--checkpoint", anchor]);
    }
    let ran = oncely(world, &args)?;
    let described = described_verifier(file, anchor, world)?;
    ensure!(
        ran.exit == described,
        "oncely: {:?} {}, the described verifier: {described:?}",
        ran.exit,
        ran.stderr
    );
    Ok(ran.exit)
}

both!(
    receipts_of_done_dead_and_duplicate_events_are_valid,
    |kind: Kind| async move {
        let world = world(kind).await?;
        world
            .nats
            .publish_all(vec![
                message("done", "insert"),
                message("done", "insert"),
                message("dead", "reject"),
                message("late", "insert,fail_once"),
            ])
            .await?;
        world.until("select count(*) from oncely.inbox", 3).await?;

        for (event, outcome) in [("done", "done"), ("dead", "dead"), ("late", "done")] {
            let (file, receipt) = receipt(&world, event, 1).await?;
            let leaf = &receipt["event"]["leaf"];
            assert_eq!(leaf["outcome"], outcome);
            assert_eq!(
                (&leaf["worker"], &leaf["stream"]),
                (&json!("test"), &json!("IN"))
            );
            let place = &receipt["outputs"][0]["leaf"];
            let stream = if outcome == "dead" {
                "ONCELY_DLQ"
            } else {
                "OUT"
            };
            assert_eq!(place["stream"], stream);

            // Valid with the published hash alone.
            let last = last(&receipt);
            let hash = published(&world, &last["number"]).await?;
            assert_eq!(verified(&world, &file, Some(&hash))?, Some(0));
            assert_eq!(verified(&world, &file, None)?, Some(9));
            assert_eq!(verified(&world, &file, Some(&"0".repeat(64)))?, Some(7));
            let shown = oncely(&world, &["receipt", "verify", &file, "--checkpoint", &hash])?;
            assert!(
                shown.stdout.contains(&format!("outcome: {outcome}")),
                "{}",
                shown.stdout
            );
        }

        // The hashes are those of the message and of the output.
        let (_, receipt) = receipt(&world, "done", 1).await?;
        let leaf = &receipt["event"]["leaf"];
        let sequence = leaf["sequence"].as_u64().context("a sequence")?;
        let stored = world.nats.read_stream("IN").await?;
        let message = stored.iter().find(|one| one.sequence == sequence);
        let message = message.context("the message")?;
        let mut payload = Sha256::new();
        payload.update((message.subject.len() as u64).to_be_bytes());
        payload.update(&message.subject);
        payload.update(&message.body);
        assert_eq!(leaf["payload"], hex::encode(payload.finalize()));
        let place = &receipt["outputs"][0]["leaf"];
        let outputs = world.nats.read_stream("OUT").await?;
        let output = outputs.iter().find(|one| place["sequence"] == one.sequence);
        let output = output.context("the output")?;
        assert_eq!(
            leaf["outputs"][0]["sha256"],
            hex::encode(Sha256::digest(&output.body))
        );
        Ok(())
    }
);

both!(
    a_redriven_event_has_the_receipt_of_its_last_outcome,
    |kind: Kind| async move {
        let one_attempt =
            "[worker.retry]\nattempts = 1\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";
        let mut world = World::without_host(kind, &manifest(one_attempt)?).await?;
        world.host_env = vec![("ONCELY_RECEIPTS".to_owned(), "1s".to_owned())];
        world.start_host().await?;
        world
            .nats
            .publish_all(vec![message("e1", "fail_once,insert")])
            .await?;
        let (first, dead) = receipt(&world, "e1", 1).await?;
        assert_eq!(dead["event"]["leaf"]["outcome"], "dead");
        std::fs::copy(
            world.folder.path().join(&first),
            world.folder.path().join("dead.json"),
        )?;

        let said = world.oncely(&["dlq", "redrive", "--all"]).await?;
        assert_eq!(said.trim(), "redriven: 1; succeeded: 1");
        let done = world
            .eventually("the receipt of the redrive", || async {
                let (_, done) = receipt(&world, "e1", 1).await?;
                Ok(Some(done).filter(|done| done["event"]["leaf"]["outcome"] == "done"))
            })
            .await?;
        assert_eq!(done["outputs"][0]["leaf"]["stream"], "OUT");
        assert_eq!(
            done["event"]["leaf"]["payload"],
            dead["event"]["leaf"]["payload"]
        );

        // The first receipt stays valid, and the replaced row is no difference.
        let hash = published(&world, &last(&dead)["number"]).await?;
        assert_eq!(verified(&world, "dead.json", Some(&hash))?, Some(0));
        assert_eq!(covered(&world).await?, rows(&world).await? + 1);
        let (differences, report) = audit(&world)?;
        assert_eq!(differences, [], "{report}");
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_has_the_place_of_an_output_from_the_wal() -> Result<()> {
    let mut world = RelayMode::Wal.world(QUICK_RETRIES).await?;
    let receipts = ("ONCELY_RECEIPTS".to_owned(), "1s".to_owned());
    world.host_env.push(receipts);
    RelayMode::Wal.start(&mut world).await?;
    world.nats.publish_all(load(0, 20)).await?;
    let (file, receipt) = receipt(&world, "e7", 1).await?;
    assert_eq!(receipt["outputs"][0]["leaf"]["stream"], "OUT");
    let hash = published(&world, &last(&receipt)["number"]).await?;
    assert_eq!(verified(&world, &file, Some(&hash))?, Some(0));
    assert_eq!(covered(&world).await?, rows(&world).await?);
    let (differences, report) = audit(&world)?;
    assert_eq!(differences, [], "{report}");
    Ok(())
}

both!(a_changed_receipt_is_refused, |kind: Kind| async move {
    let world = world(kind).await?;
    let messages = (0..5).map(|n| message(&format!("e{n}"), "insert"));
    world.nats.publish_all(messages.collect()).await?;
    let (_, receipt) = receipt(&world, "e2", 1).await?;

    let mut changed = Vec::new();
    changes(&receipt, &mut |place, value| changed.push((place, value)));
    assert!(changed.len() > 30, "{}", changed.len());
    for (place, value) in &changed {
        let mut receipt = receipt.clone();
        *receipt.pointer_mut(place).context("a place")? = value.clone();
        let file = "changed.json";
        std::fs::write(world.folder.path().join(file), receipt.to_string())?;
        assert_eq!(verified(&world, file, None)?, Some(7), "{place}: {value}");
    }
    // A removed or an added field.
    for (place, field) in [
        ("/event", "path"),
        ("/checkpoints/0", "previous"),
        ("", "outputs"),
    ] {
        let mut without = receipt.clone();
        let object = without.pointer_mut(place).and_then(Value::as_object_mut);
        object.context("an object")?.remove(field);
        let mut with = receipt.clone();
        let object = with.pointer_mut(place).and_then(Value::as_object_mut);
        object
            .context("an object")?
            .insert("note".to_owned(), json!("x"));
        for receipt in [without, with] {
            let file = "changed.json";
            std::fs::write(world.folder.path().join(file), receipt.to_string())?;
            let ran = oncely(&world, &["receipt", "verify", file])?;
            assert_eq!(ran.exit, Some(7), "{place} {field}: {}", ran.stderr);
        }
    }
    Ok(())
});

/// Calls `change` with each text, number and list of a value, changed, and its place.
fn changes(value: &Value, change: &mut impl FnMut(String, Value)) {
    fn visit(place: &str, value: &Value, change: &mut impl FnMut(String, Value)) {
        match value {
            Value::String(text) => {
                let (first, rest) = text.split_at(text.chars().next().map_or(0, char::len_utf8));
                let other = if first == "0" { "1" } else { "0" };
                change(place.to_owned(), json!(format!("{other}{rest}")));
            }
            Value::Number(number) => {
                change(
                    place.to_owned(),
                    json!(number.as_u64().unwrap_or_default() + 1),
                );
            }
            Value::Null => change(place.to_owned(), json!("0")),
            Value::Bool(flag) => change(place.to_owned(), json!(!flag)),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    visit(&format!("{place}/{index}"), item, change);
                }
            }
            Value::Object(fields) => {
                for (key, item) in fields {
                    visit(&format!("{place}/{key}"), item, change);
                }
            }
        }
    }
    visit("", value, change);
}

/// The kinds of an audit's differences with their events, and the report.
fn audit(world: &World) -> Result<(Vec<(String, String)>, Value)> {
    let ran = oncely(world, &["audit", "--json"])?;
    let report: Value = serde_json::from_str(&ran.stdout).with_context(|| ran.stderr.clone())?;
    let list = report["differences"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pairs = list
        .iter()
        .map(|one| (text(&one["kind"]), text(&one["event_id"])));
    Ok((pairs.collect(), report))
}

both!(
    changed_rows_and_checkpoints_are_named_by_the_audit,
    |kind: Kind| async move {
        let world = world(kind).await?;
        let messages = (0..10).map(|n| message(&format!("e{n}"), "insert"));
        world.nats.publish_all(messages.collect()).await?;
        world.oncely(&["pause", "test"]).await?;
        world.oncely(&["resume", "test"]).await?;
        for n in 0..10 {
            receipt(&world, &format!("e{n}"), 1).await?;
        }
        let covered = covered(&world).await?;
        assert_eq!(covered, rows(&world).await?);
        let (differences, report) = audit(&world)?;
        assert_eq!(differences, [], "{report}");
        assert!(
            report["checkpoints"]["published"].as_u64() > Some(0),
            "{report}"
        );

        // Later reads begin after these rows. Until then an inserted row is one that commits late.
        let margin = match kind {
            Kind::Sqlite => "3000000",
            _ => "interval '3 seconds'",
        };
        let are_old = format!(
            "select count(*) from oncely.checkpoint_head
             where events_from > (select max(settled_at) from oncely.inbox) + {margin}"
        );
        world.until(&are_old, 1).await?;

        // Rows that are changed, deleted and inserted, past the host.
        let blob = match kind {
            Kind::Sqlite => "zeroblob(32)",
            _ => "decode(repeat('00', 32), 'hex')",
        };
        let partition = if matches!(kind, Kind::Sqlite) {
            ""
        } else {
            ", partition"
        };
        for change in [
            format!("update oncely.inbox set payload_sha256 = {blob} where event_id = 'e3'"),
            "delete from oncely.inbox where event_id = 'e4'".to_owned(),
            "update oncely.outbox set subject = 'out.y' where event_id = 'e6'".to_owned(),
            format!(
                "insert into oncely.inbox (worker, event_id, state, payload_sha256, settled_at{partition})
                 select worker, 'forged', state, payload_sha256, settled_at{partition}
                 from oncely.inbox where event_id = 'e5'"
            ),
        ] {
            world.database.execute(&change).await?;
        }
        let expected = [
            ("message-without-outcome", "e4"),
            ("row-changed", "e3"),
            ("row-changed", "e6"),
            ("row-missing", "e4"),
            ("row-without-checkpoint", "forged"),
        ];
        let (differences, report) = audit(&world)?;
        assert_eq!(pairs(&differences), expected, "{report}");
        let refused = oncely(&world, &["receipt", "e3"])?;
        assert!(
            refused.stderr.contains("is not as it was in checkpoint"),
            "{}",
            refused.stderr
        );

        // An activity, and checkpoints.
        let unlock = match kind {
            Kind::Sqlite => {
                "drop trigger oncely.activity_no_update; drop trigger oncely.checkpoint_no_update;"
            }
            _ => {
                "alter table oncely.activity disable trigger user;
                 alter table oncely.checkpoint disable trigger user;"
            }
        };
        world.database.execute(unlock).await?;
        world
            .database
            .execute("update oncely.activity set actor = 'mallory' where verb = 'pause'")
            .await?;
        world
            .database
            .execute("update oncely.checkpoint set leaves = leaves + 1 where number = 1")
            .await?;
        let (differences, report) = audit(&world)?;
        let found: Vec<_> = pairs(&differences)
            .into_iter()
            .filter(|(_, event)| event.is_empty())
            .collect();
        // Its hash, and the number of its leaves.
        let expected = [
            ("checkpoint-changed", ""),
            ("checkpoint-changed", ""),
            ("row-changed", ""),
        ];
        assert_eq!(found, expected, "{report}");

        // A checkpoint that was written again, consistently, is not the published one.
        world
            .database
            .execute("delete from oncely.checkpoint_block where checkpoint = 1")
            .await?;
        world
            .database
            .execute(&format!(
                "update oncely.checkpoint set hash = '{}' where number = 1",
                "0".repeat(64)
            ))
            .await?;
        let (differences, report) = audit(&world)?;
        let differs = ("checkpoint-differs".to_owned(), String::new());
        assert!(differences.contains(&differs), "{report}");
        Ok(())
    }
);

fn pairs(differences: &[(String, String)]) -> Vec<(&str, &str)> {
    let mut pairs: Vec<_> = differences
        .iter()
        .map(|(kind, event)| (kind.as_str(), event.as_str()))
        .collect();
    pairs.sort_unstable();
    pairs
}

/// The number of rows that belong into checkpoints.
async fn rows(world: &World) -> Result<i64> {
    let published = world.database.published("worker <> 'oncely:checkpoint'");
    let sql = format!(
        "select (select count(*) from oncely.inbox) + (select count(*) from oncely.activity)
             + (select count(*) from oncely.activity_outcome) + ({published})"
    );
    world.database.number(&sql).await
}

/// The number of leaves, once no more are added.
async fn covered(world: &World) -> Result<i64> {
    let sum = "select coalesce(sum(leaves), 0) from oncely.checkpoint";
    world
        .eventually("all rows are in checkpoints", || async {
            let (rows, leaves) = (rows(world).await?, world.database.number(sum).await?);
            ensure!(leaves >= rows, "{leaves} leaves for {rows} rows");
            Ok(Some(leaves))
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_commit_is_in_the_next_checkpoint() -> Result<()> {
    let world = world(Kind::Postgres).await?;
    let mut late = sqlx::PgConnection::connect(&world.database.direct_url()).await?;
    late.execute(
        "begin; insert into oncely.inbox (worker, event_id, state, payload_sha256, partition)
         values ('test', 'late', 'done', sha256('x'), 0)",
    )
    .await?;

    // Checkpoints are closed meanwhile, for longer than the margin of their reads.
    let closed =
        "select coalesce(max(extract(epoch from closed_at))::bigint, 0) from oncely.checkpoint";
    let begin = world
        .database
        .number("select extract(epoch from now())::bigint")
        .await?;
    let mut n = 0;
    while world.database.number(closed).await? < begin + 14 {
        n += 1;
        world
            .nats
            .publish_all(vec![message(&format!("e{n}"), "insert")])
            .await?;
        let count = "select count(*) from oncely.inbox";
        world.until(count, n).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let before = world
        .database
        .number("select max(number) from oncely.checkpoint")
        .await?;
    let pending = oncely(&world, &["receipt", "late"])?;
    assert_eq!(pending.exit, Some(3), "{}", pending.stderr);
    late.execute("commit").await?;
    let (file, receipt) = receipt(&world, "late", 0).await?;
    assert!(
        receipt["event"]["checkpoint"].as_i64() > Some(before),
        "{receipt}"
    );
    assert_eq!(verified(&world, &file, None)?, Some(9));
    assert_eq!(covered(&world).await?, rows(&world).await?);
    Ok(())
}

/// Publishes in the background while a host is killed, and checks that each row is in one
/// checkpoint, and that each checkpoint is published once.
async fn has_no_gap_and_no_double(world: &World, audit: impl Fn() -> Result<Value>) -> Result<()> {
    assert_eq!(covered(world).await?, rows(world).await?);
    let closed = world
        .database
        .number("select count(*) from oncely.checkpoint")
        .await?;
    assert!(closed > 1);
    let numbers = world
        .eventually("all checkpoints are published", || async {
            let stored = world.nats.read_stream("ONCELY_CHECKPOINTS").await?;
            let bodies = stored
                .iter()
                .map(|one| serde_json::from_slice::<Value>(&one.body));
            let numbers = bodies.map(|one| Ok(one?["number"].as_i64().unwrap_or_default()));
            let numbers = numbers.collect::<Result<Vec<i64>>>()?;
            ensure!(numbers.last() >= Some(&closed), "{numbers:?}");
            Ok(Some(numbers))
        })
        .await?;
    assert_eq!(numbers, (1..=numbers.len() as i64).collect::<Vec<_>>());
    let report = audit()?;
    assert_eq!(report["total"], 0, "{report}");
    Ok(())
}

fn load(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| message(&format!("e{n}"), "insert"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_host_leaves_no_gap_on_sqlite() -> Result<()> {
    let mut world = world(Kind::Sqlite).await?;
    for round in 0..5 {
        world
            .nats
            .publish_all(load(round * 200, (round + 1) * 200))
            .await?;
        world
            .until_at_least(
                "select count(*) from oncely.inbox",
                (round * 200 + 50) as i64,
            )
            .await?;
        // Killed after a checkpoint, or wherever it is.
        if round % 2 == 0 {
            let count = "select count(*) from oncely.checkpoint";
            world.until_at_least(count, 1 + round as i64 / 2).await?;
        }
        world.kill_host()?;
        world.start_host().await?;
    }
    world.quiet(1000).await?;
    has_no_gap_and_no_double(&world, || audit(&world).map(|(_, report)| report)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_of_which_one_is_killed_leave_no_gap_and_no_double() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest(QUICK_RETRIES)?).await?;
    world.host_env = vec![("ONCELY_RECEIPTS".to_owned(), "1s".to_owned())];
    let one = RunningHost::start(&world, "one").await?;
    let two = RunningHost::start(&world, "two").await?;
    let path = world.folder.path().join("oncely.toml");
    one.oncely(&["deploy", path.to_str().context("a path")?])?;
    for round in 0..3 {
        world
            .nats
            .publish_all(load(round * 500, (round + 1) * 500))
            .await?;
        world
            .until_at_least("select count(*) from oncely.checkpoint", 1 + round as i64)
            .await?;
    }
    drop(one);
    world.nats.publish_all(load(1500, 2000)).await?;
    world.quiet(2000).await?;
    has_no_gap_and_no_double(&world, || {
        let report = two.oncely(&["audit", "--json"])?;
        Ok(serde_json::from_str(&report)?)
    })
    .await
}

both!(
    an_event_without_a_checkpoint_has_the_time_of_the_next,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest(QUICK_RETRIES)?).await?;
        world.start_host().await?;
        world
            .nats
            .publish_all(vec![message("e1", "insert")])
            .await?;
        world.quiet(1).await?;
        let off = oncely(&world, &["receipt", "e1"])?;
        assert_eq!(off.exit, Some(1));
        assert!(
            off.stderr.contains("hint: set receipts = \"1m\""),
            "{}",
            off.stderr
        );

        world.stop_host().await?;
        world.host_env = vec![("ONCELY_RECEIPTS".to_owned(), "5m".to_owned())];
        world.start_host().await?;
        world
            .until("select count(*) from oncely.checkpoint_head", 1)
            .await?;
        world
            .nats
            .publish_all(vec![message("e2", "insert")])
            .await?;
        world.quiet(2).await?;
        let pending = oncely(&world, &["receipt", "e2"])?;
        assert_eq!(pending.exit, Some(9), "{}", pending.stderr);
        assert!(
            pending.stderr.contains("the next one is due at 2"),
            "{}",
            pending.stderr
        );
        let unknown = oncely(&world, &["receipt", "e3"])?;
        assert_eq!(unknown.exit, Some(3), "{}", unknown.stderr);
        Ok(())
    }
);

/// The cost of a checkpoint over 100,000 events with an output each. Prints the figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_a_checkpoint_over_100_000_events() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest(QUICK_RETRIES)?).await?;
    world.start_host().await?;
    world.stop_host().await?;
    let Database::Postgres { .. } = &world.database else {
        return Ok(());
    };
    world
        .database
        .execute(
            "insert into oncely.checkpoint_head
                 (began_at, events_from, outputs_from, activities_from, checked_at, leased_until)
             select now(), now(), now(), now(), now() - interval '1 day', now();
             insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, settled_at, partition)
             select 'test', gen_random_uuid()::text, 'done', sha256(n::text::bytea), 'IN', n,
                 now() + n * interval '100 microseconds', 0
             from generate_series(1, 100000) as n;
             insert into oncely.outbox (id, worker, event_id, ordinal, subject, headers, body, created_at, leased_until,
                 published_at, stream, stream_sequence, partition)
             select md5(event_id), worker, event_id, 0, 'out.x', '[]', convert_to(event_id, 'UTF8'), settled_at,
                 settled_at, settled_at, 'OUT', stream_sequence, 0
             from oncely.inbox order by settled_at",
        )
        .await?;
    for table in ["inbox", "outbox"] {
        let vacuum = format!("vacuum (freeze, analyze) oncely.{table}");
        world.database.execute(&vacuum).await?;
    }
    let wal = "select (pg_current_wal_insert_lsn() - '0/0')::bigint";
    let before = world.database.number(wal).await?;
    world.host_env = vec![
        ("ONCELY_RECEIPTS".to_owned(), "1s".to_owned()),
        ("ONCELY_LOG_LEVEL".to_owned(), "oncely=debug".to_owned()),
    ];
    world.start_host().await?;
    world
        .until_at_least(
            "select coalesce(sum(leaves), 0)::bigint from oncely.checkpoint",
            200_000,
        )
        .await?;
    let after = world.database.number(wal).await?;
    let pid = world.host_pid().context("a host")?;
    let status = std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/status")))?;
    for line in world
        .host_log()
        .lines()
        .filter(|line| line.contains("checkpoint closed"))
    {
        println!("{line}");
    }
    println!("WAL: {} bytes", after - before);
    // The largest parts of it, if the server has the extension.
    let extension = "create extension if not exists pg_walinspect";
    if world.database.execute(extension).await.is_ok() {
        let parts = format!(
            "select \"resource_manager/record_type\", count, record_size, fpi_size
             from pg_get_wal_stats('0/0'::pg_lsn + {before}, '0/0'::pg_lsn + {after}, true)
             order by combined_size desc limit 6"
        );
        for part in world.database.rows(&parts).await? {
            println!("{}", part.join(" "));
        }
    }
    let peak = status.lines().filter(|line| line.starts_with("VmHWM"));
    peak.for_each(|line| println!("{line}"));
    Ok(())
}

/// The cost of the indexes by age for the insertion of 200,000 inbox records, in batches of 100.
/// Prints milliseconds without and with them, three times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_the_cost_of_the_indexes_by_age() -> Result<()> {
    let mut world = World::without_host(Kind::Postgres, &manifest(QUICK_RETRIES)?).await?;
    world.start_host().await?;
    world.stop_host().await?;
    let now = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
    for round in 0..3 {
        for (name, change) in [
            ("without", "drop index oncely.inbox_by_age"),
            (
                "with",
                "create index inbox_by_age on oncely.inbox using brin (settled_at)
                     with (pages_per_range = 16, autosummarize = on)",
            ),
        ] {
            world.database.execute(change).await?;
            let insert = format!(
                "do $$ begin
                     for batch in 1..2000 loop
                         insert into oncely.inbox
                             (worker, event_id, state, payload_sha256, stream, stream_sequence, settled_at, partition)
                         select 'test', '{name}{round}-' || batch || '-' || n, 'done', sha256('x'), 'IN', n,
                             clock_timestamp(), 0
                         from generate_series(1, 100) as n;
                         commit;
                     end loop;
                 end $$"
            );
            let before = world.database.number(now).await?;
            world.database.execute(&insert).await?;
            println!("{name}: {} ms", world.database.number(now).await? - before);
        }
    }
    Ok(())
}
