//! Dry runs of a redrive, and plans that become invalid when their facts change.

use anyhow::{Context, Result};
use serde_json::Value;
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

const ONE_ATTEMPT: &str =
    "[worker.retry]\nattempts = 1\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";

const OPEN: &str = "select count(*) from oncely.dead_letter where state = 'open'";

/// The dead letters of a dry run, by event id.
async fn dry_run(world: &World, selection: &[&str]) -> Result<Vec<(String, Value)>> {
    let plan = world
        .oncely_json(&[&["dlq", "redrive", "--dry-run", "--json"], selection].concat())
        .await?;
    let dead_letters = plan["dead_letters"]
        .as_array()
        .context("read the dead letters of the plan")?;
    let mut by_event: Vec<_> = dead_letters
        .iter()
        .map(|one| {
            (
                one["event_id"].as_str().unwrap_or_default().to_owned(),
                one.clone(),
            )
        })
        .collect();
    by_event.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(by_event)
}

fn classes(dead_letters: &[(String, Value)]) -> Vec<(&str, &str)> {
    dead_letters
        .iter()
        .map(|(event, one)| {
            (
                event.as_str(),
                one["prediction"].as_str().unwrap_or_default(),
            )
        })
        .collect()
}

both!(
    a_dry_run_classifies_dead_letters_and_changes_nothing,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let message = |event: &str, behaviour: &str| {
            NewMessage::new(
                "in.x",
                event,
                behaviour,
                r#"{"n": 2, "key": "visits", "code": "red"}"#,
            )
        };
        world
            .nats
            .publish_all(vec![
                message("applied", "fail_once"),
                message("different", "fail_once,trap"),
                message("same", "reject"),
                message("succeeds", "fail_once,insert,state_counter"),
            ])
            .await?;
        world.until(OPEN, 4).await?;

        // JSON
        let counts =
            "select (select count(*) from app.effect) + (select count(*) from oncely.attempt)
        + 100 * (select count(*) from oncely.outbox) + (select count(*) from oncely.state)";
        let before = world.database.number(counts).await?;
        let dead_letters = dry_run(&world, &["--all"]).await?;
        let expected = [
            ("applied", "already-applied"),
            ("different", "different-failure"),
            ("same", "same-failure"),
            ("succeeds", "would-succeed"),
        ];
        assert_eq!(classes(&dead_letters), expected);
        let succeeds = &dead_letters[3].1;
        assert_eq!(
            succeeds["changes"]["rows"].as_array().map(Vec::len),
            Some(2)
        );
        assert_eq!(
            succeeds["changes"]["rows"][0]["after"]["event_id"],
            "succeeds"
        );
        assert_eq!(succeeds["outputs"].as_array().map(Vec::len), Some(3));
        assert_eq!(succeeds["outputs"][0]["id"], "test:succeeds:0");
        assert_eq!(
            (
                &succeeds["state"][0]["key"],
                &succeeds["state"][0]["before"]
            ),
            (&"visits".into(), &Value::Null)
        );
        assert_eq!(world.database.number(counts).await?, before);

        // Text
        let id = succeeds["dead_letter"].to_string();
        let shown = world.oncely(&["dlq", "redrive", &id, "--dry-run"]).await?;
        for expected in [
            "prediction: would succeed",
            "+ effect {",
            "+ visits 1 (version 1)",
            "test:succeeds:1 to out.effect",
        ] {
            assert!(shown.contains(expected), "`{expected}` is not in:\n{shown}");
        }
        let table = world
            .oncely(&["dlq", "redrive", "--all", "--dry-run"])
            .await?;
        assert!(
            table.contains("same failure: 1") && table.contains("would succeed: 1"),
            "{table}"
        );
        Ok(())
    }
);

both!(
    a_plan_redrives_only_unchanged_predicted_successes,
    |kind: Kind| async move {
        let settings = format!("{ONE_ATTEMPT}\n[worker.config]\nlabel = \"one\"");
        let world = World::start(kind, &manifest(&settings)?).await?;
        let ledger = |event: &str, from: &str| {
            let options = format!(
                r#"{{"from": "{from}", "to": "{from}-other", "delta": 5, "n": 1, "key": "{from}", "seq": 1}}"#
            );
            NewMessage::new("in.x", event, "fail_once,ledger", &options)
        };
        let rejected = NewMessage::new("in.x", "rejected", "reject", "{}");
        world
            .nats
            .publish_all(vec![ledger("e1", "a"), ledger("e2", "b"), rejected])
            .await?;
        world.until(OPEN, 3).await?;
        world
            .database
            .execute("insert into app.balance (account, amount) values ('a', 100), ('b', 100)")
            .await?;
        let path = world.folder.path().join("plan.json").display().to_string();
        world
            .oncely(&["dlq", "redrive", "--all", "--dry-run", "--out", &path])
            .await?;

        // One of the accounts is changed after the plan.
        world
            .database
            .execute("update app.balance set amount = 95 where account = 'b'")
            .await?;
        let refused = world
            .oncely(&["dlq", "redrive", "--plan", &path])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("its result changed since it was planned"),
            "{refused}"
        );
        world
            .until("select count(*) from oncely.inbox where state = 'done'", 1)
            .await?;
        assert_eq!(
            books::check(&world).await?.effects,
            ["e1".to_owned()].into()
        );
        assert_eq!(world.database.number(OPEN).await?, 2);

        // A redriven dead letter is not redriven again. A new deployment invalidates the plan.
        let refused = world
            .oncely(&["dlq", "redrive", "--plan", &path])
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("it was redriven since"), "{refused}");
        world
            .oncely(&["dlq", "redrive", "--all", "--dry-run", "--out", &path])
            .await?;
        world.write_manifest(&manifest(&settings.replace("one", "two"))?)?;
        let folder = world
            .folder
            .path()
            .join("oncely.toml")
            .display()
            .to_string();
        world.oncely(&["deploy", &folder]).await?;
        let refused = world
            .oncely(&["dlq", "redrive", "--plan", &path])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("planned with version 1 of test, but version 2 is active now"),
            "{refused}"
        );
        assert_eq!(world.database.number(OPEN).await?, 2);
        Ok(())
    }
);

both!(
    a_later_effect_of_the_same_key_is_a_hazard,
    |kind: Kind| async move {
        let settings = format!("ordering_key = \"subject:2\"\n{ONE_ATTEMPT}");
        let world = World::start(kind, &manifest(&settings)?).await?;
        let fails = |key: &str, event: &str| {
            NewMessage::new(
                &format!("in.{key}"),
                event,
                "fail_once,insert",
                r#"{"n": 1}"#,
            )
        };
        let good = |key: &str, event: &str| {
            NewMessage::new(&format!("in.{key}"), event, "insert", r#"{"n": 1}"#)
        };
        world
            .nats
            .publish_all(vec![
                good("b", "b0"),
                fails("a", "a1"),
                fails("b", "b1"),
                fails("a", "a2"),
                good("a", "a3"),
                fails("a", "a4"),
            ])
            .await?;
        world.until(OPEN, 4).await?;
        world.quiet(6).await?;
        let dead_letters = dry_run(&world, &["--worker", "test"]).await?;
        let expected = [
            ("a1", "order-hazard"),
            ("a2", "order-hazard"),
            ("a4", "would-succeed"),
            ("b1", "would-succeed"),
        ];
        assert_eq!(classes(&dead_letters), expected);
        assert!(
            dead_letters[0].1["detail"]
                .as_str()
                .unwrap_or_default()
                .contains("such as a3"),
            "{}",
            dead_letters[0].1["detail"]
        );
        Ok(())
    }
);
