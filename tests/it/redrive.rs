//! Corrected, redriven and closed dead letters: one effect and one dead letter each.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use support::books;
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{World, manifest};

/// One attempt, so that `fail_once` dies and succeeds when redriven.
const ONE_ATTEMPT: &str =
    "[worker.retry]\nattempts = 1\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";

const OPEN: &str = "select count(*) from oncely.dead_letter where state = 'open'";

fn failing_once(event: &str) -> NewMessage {
    NewMessage::new("in.x", event, "fail_once,insert", r#"{"n": 1}"#)
}

/// The same event from a publisher that never received the acknowledgement.
fn again(mut message: NewMessage, event: &str) -> NewMessage {
    message.headers.retain(|(name, _)| name != "Nats-Msg-Id");
    message.headers.push((
        "Nats-Msg-Id".to_owned(),
        format!("again-{}", uuid::Uuid::new_v4()),
    ));
    message.headers.push(("ce-id".to_owned(), event.to_owned()));
    message
}

async fn dead_letter(world: &World, id: i64) -> Result<Value> {
    world
        .oncely_json(&["dlq", "show", &id.to_string(), "--json"])
        .await
}

both!(
    a_redrive_goes_to_its_worker_only_with_new_attempts,
    |kind: Kind| async move {
        let retries = "[worker.retry]\nattempts = 2\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";
        let other = format!(
            "[[worker]]\nname = \"other\"\ncomponent = \"{}\"\nstream = \"IN\"\noutputs = [\"out.>\"]\n{retries}",
            guests::component()?.display()
        );
        let world = World::start(kind, &format!("{}\n{other}", manifest(retries)?)).await?;

        // Dies at the second attempt, and would succeed at the fourth.
        let message = NewMessage::new(
            "in.x",
            "e1",
            "fail_until,insert",
            r#"{"attempt": 4, "n": 1}"#,
        );
        world.nats.publish_all(vec![message]).await?;
        world.until(OPEN, 2).await?;

        // Only the worker `test` gets its redrive.
        let said = world
            .oncely(&["dlq", "redrive", "--worker", "test", "--note", "fixed"])
            .await?;
        assert_eq!(said.trim(), "redriven: 1; succeeded: 1");
        let attempts = world
            .database
            .rows("select worker, count(*) from oncely.attempt group by worker order by 1")
            .await?;
        assert_eq!(attempts, [["other", "2"], ["test", "3"]]);
        assert_eq!(
            world
                .database
                .rows("select event_id, count(*) from app.effect group by event_id")
                .await?,
            [["e1", "2"]]
        );
        let states = world
            .database
            .rows("select worker, state from oncely.inbox order by worker")
            .await?;
        assert_eq!(states, [["other", "dead"], ["test", "done"]]);

        // The closed dead letter is not listed, and cannot be redriven again.
        assert_eq!(
            world
                .oncely_json(&["dlq", "list", "--worker", "test", "--json"])
                .await?
                .as_array()
                .map(Vec::len),
            Some(0)
        );
        let id = world
            .oncely_json(&["dlq", "list", "--worker", "test", "--closed", "--json"])
            .await?[0]["id"]
            .clone();
        let shown = dead_letter(&world, id.as_i64().unwrap_or_default()).await?;
        assert_eq!(
            (&shown["state"], &shown["inbox"]["state"]),
            (&"done".into(), &"done".into())
        );
        assert_eq!(shown["outputs"][0]["id"], "test:e1:0");
        assert_eq!(
            (&shown["audit"][0]["action"], &shown["audit"][0]["note"]),
            (&"redrive".into(), &"fixed".into())
        );
        let refused = world
            .oncely(&["dlq", "redrive", &id.to_string(), "--force"])
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("it took effect since"), "{refused}");
        Ok(())
    }
);

both!(
    dying_again_adds_attempts_to_the_same_dead_letter,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world
            .nats
            .publish_all(vec![NewMessage::new("in.x", "e1", "log,fail", "{}")])
            .await?;
        world.until(OPEN, 1).await?;
        for round in 1..=2 {
            let said = world.oncely(&["dlq", "redrive", "--all"]).await?;
            assert_eq!(said.trim(), "redriven: 1; succeeded: 0; failed again: 1");
            let shown = dead_letter(&world, 1).await?;
            assert_eq!(
                (&shown["generation"], &shown["attempts"]),
                (&round.into(), &(round + 1).into())
            );
            assert_eq!(
                shown["failure_history"].as_array().map(Vec::len),
                Some(round + 1)
            );
        }
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            1
        );
        world.quiet(1).await?;
        let notices = world.nats.read_stream("ONCELY_DLQ").await?;
        let header =
            |at: usize, name: &str| notices[at].headers.get(name).cloned().unwrap_or_default();
        assert_eq!(notices.len(), 3);
        assert_eq!(
            [header(0, "Oncely-Redriven"), header(2, "Oncely-Redriven")],
            ["", "2"]
        );
        assert!(
            header(2, "Oncely-Output-Id").ends_with(":test:e1:r2"),
            "{}",
            header(2, "Oncely-Output-Id")
        );
        assert_eq!(header(2, "Oncely-Dead-Letter"), "1");

        // Redriven messages have left the queue.
        assert_eq!(world.nats.read_stream("ONCELY_REDRIVE").await?.len(), 0);
        Ok(())
    }
);

both!(
    a_corrected_message_is_still_the_same_event,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let original = NewMessage::new("in.x", "e1", "insert", r#"{"n": "#);
        world.nats.publish_all(vec![original.clone()]).await?;
        world.until(OPEN, 1).await?;

        // Correct and redrive
        let corrected = world.folder.path().join("corrected.json");
        std::fs::write(&corrected, r#"{"n": 1}"#)?;
        let path = corrected.display().to_string();
        let edit = [
            "dlq",
            "edit",
            "1",
            "--body",
            &path,
            "--note",
            "truncated body",
            "--actor",
            "ada",
        ];
        assert_eq!(
            world.oncely(&edit).await?.trim(),
            "dead letter 1 has a corrected body of 8 bytes"
        );
        assert_eq!(
            world.oncely(&["dlq", "show", "1", "--raw"]).await?,
            r#"{"n": 1}"#
        );
        assert_eq!(
            world.oncely(&["dlq", "redrive", "1"]).await?.trim(),
            "redriven: 1; succeeded: 1"
        );
        let shown = dead_letter(&world, 1).await?;

        // The original body is shown beside the correction.
        assert_eq!(
            (&shown["body"], &shown["edits"][0]["actor"]),
            (&"eyJuIjog".into(), &"host".into())
        );
        assert_eq!(
            (
                &shown["audit"][0]["actor"],
                &shown["audit"][0]["stated_name"]
            ),
            (&"host".into(), &"ada".into())
        );

        // The original message and its copy are duplicates now.
        world
            .nats
            .publish_all(vec![again(original, "e1"), failing_once("e2")])
            .await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where event_id = 'e2'",
                1,
            )
            .await?;
        world.quiet(2).await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            2
        );
        assert_eq!(books::check(&world).await?.effects.len(), 1);
        let late = world.oncely(&edit).await.unwrap_err().to_string();
        assert!(
            late.contains("dead letter 1 was not corrected")
                && late.contains("it took effect since"),
            "{late}"
        );
        Ok(())
    }
);

both!(
    closed_dead_letters_are_hidden_and_audited,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let messages = (1..=4).map(|n| failing_once(&format!("e{n}"))).collect();
        world.nats.publish_all(messages).await?;
        world.until(OPEN, 4).await?;
        let ids: Vec<String> = world
            .database
            .rows("select id from oncely.dead_letter order by event_id")
            .await?
            .concat();

        // Close
        assert_eq!(
            world
                .oncely(&["dlq", "resolve", &ids[0], "--note", "repaired by hand"])
                .await?
                .trim(),
            "resolved: 1 of 1"
        );
        let unasked = world
            .oncely(&["dlq", "drop", "--worker", "test"])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            unasked.contains("refusing to drop 3 dead letters without confirmation")
                && unasked.contains("--yes"),
            "{unasked}"
        );
        assert_eq!(
            world
                .oncely(&["dlq", "drop", &ids[1], "--yes"])
                .await?
                .trim(),
            "dropped: 1 of 1"
        );

        // Closed dead letters are hidden.
        assert_eq!(
            world
                .oncely_json(&["dlq", "list", "--json"])
                .await?
                .as_array()
                .map(Vec::len),
            Some(2)
        );
        assert_eq!(
            world
                .oncely_json(&["dlq", "list", "--closed", "--json"])
                .await?
                .as_array()
                .map(Vec::len),
            Some(4)
        );
        assert_eq!(
            world
                .oncely_json(&["status", "--json"])
                .await?
                .pointer("/totals/0/dead"),
            Some(&2.into())
        );

        // Only a forced redrive reopens one.
        let refused = world
            .oncely(&["dlq", "redrive", &ids[0]])
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("it is closed (resolved)"), "{refused}");
        let refused = world
            .oncely(&["dlq", "resolve", &ids[1], "--note", "x"])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("it is already closed (dropped)"),
            "{refused}"
        );
        let said = world
            .oncely(&["dlq", "redrive", &ids[0], "--force"])
            .await?;
        assert_eq!(said.trim(), "redriven: 1; succeeded: 1");

        // The audit is complete and append-only.
        let acts = world
            .database
            .rows("select action from oncely.dead_letter_audit order by seq")
            .await?
            .concat();
        assert_eq!(acts, ["resolve", "drop", "redrive"]);
        let forged = world
            .database
            .execute("update oncely.dead_letter_audit set actor = 'somebody else'")
            .await;
        assert!(format!("{:#}", forged.unwrap_err()).contains("append-only"));

        // The export contains all of them, one per line.
        let export = world
            .oncely(&["dlq", "export", "--all", "--closed"])
            .await?;
        assert_eq!(
            export
                .lines()
                .filter(|line| serde_json::from_str::<Value>(line).is_ok())
                .count(),
            4
        );
        Ok(())
    }
);

both!(a_refused_redrive_gives_a_hint, |kind: Kind| async move {
    let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
    let first = NewMessage::new("in.x", "e1", "insert", r#"{"n": 1}"#);
    let reuse = again(NewMessage::new("in.x", "e1", "insert", r#"{"n": 2}"#), "e1");
    world.nats.publish_all(vec![first]).await?;
    world.until("select count(*) from oncely.inbox", 1).await?;
    world.nats.publish_all(vec![reuse]).await?;
    world.until(OPEN, 1).await?;
    let refused = world
        .oncely(&["dlq", "redrive", "1"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("its event id stands for another message"),
        "{refused}"
    );
    let nothing = world
        .oncely(&["dlq", "redrive"])
        .await
        .unwrap_err()
        .to_string();
    assert!(nothing.contains("no dead letters selected"), "{nothing}");
    let missing = world
        .oncely(&["dlq", "redrive", "7"])
        .await
        .unwrap_err()
        .to_string();
    assert!(missing.contains("there is no dead letter 7"), "{missing}");
    let forged = world
        .oncely(&["publish", "oncely.redrive.test", "x"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        forged.contains("`oncely.redrive.test` is reserved for redriven dead letters"),
        "{forged}"
    );
    assert_eq!(
        world
            .oncely(&["dlq", "resolve", "1", "--note", "sent anew"])
            .await?
            .trim(),
        "resolved: 1 of 1"
    );
    Ok(())
});

both!(
    dead_letters_are_selected_by_common_properties,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let coded = |subject: &str, event: &str, code: &str| {
            NewMessage::new(
                subject,
                event,
                "reject",
                &format!(r#"{{"code": "{code}"}}"#),
            )
        };
        world
            .nats
            .publish_all(vec![
                coded("in.a.x", "e1", "red"),
                coded("in.a.y", "e2", "blue"),
                coded("in.b.x", "e3", "red"),
            ])
            .await?;
        world.until(OPEN, 3).await?;
        for (filter, expected) in [
            (&["--subject", "in.a.*"][..], 2),
            (&["--subject", "in.*.x"], 2),
            (&["--subject", "in.b.x"], 1),
            (&["--code", "red"], 2),
            (&["--code", "red", "--subject", "in.a.>"], 1),
            (&["--reason", "attempts-exhausted"], 0),
            (&["--since", "1h"], 3),
            (&["--until", "1h"], 0),
            (&["--limit", "2"], 2),
        ] {
            let list = world
                .oncely_json(&[&["dlq", "list", "--json"], filter].concat())
                .await?;
            assert_eq!(list.as_array().map(Vec::len), Some(expected), "{filter:?}");
        }
        Ok(())
    }
);

both!(
    a_guest_cannot_publish_to_reserved_subjects,
    |kind: Kind| async move {
        let granted = manifest(ONE_ATTEMPT)?.replace(
            "outputs = [\"out.>\"]",
            "outputs = [\"out.>\", \"*.redrive.test\"]",
        );
        let refused = World::start(kind, &granted)
            .await
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(refused.contains("*.redrive.test"), "{refused}");
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let forger = NewMessage::new(
            "in.x",
            "forger",
            "emit",
            r#"{"subject": "oncely.redrive.test"}"#,
        );
        world.nats.publish_all(vec![forger]).await?;
        world
            .until(
                "select count(*) from oncely.dead_letter where reason = 'output-refused'",
                1,
            )
            .await?;
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.outbox where subject like 'oncely.redrive.%'")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    redrives_take_effect_once_under_kills_and_duplicates,
    |kind: Kind| async move {
        let count = 80;
        let settings = format!("ack_wait = \"1s\"\nbatch = 8\n{ONE_ATTEMPT}");
        let mut world = World::start(kind, &manifest(&settings)?).await?;
        let messages: Vec<NewMessage> =
            (0..count).map(|n| failing_once(&format!("e{n}"))).collect();
        world.nats.publish_all(messages.clone()).await?;
        world.until(OPEN, count).await?;
        let unsettled = "select count(*) from oncely.dead_letter left join oncely.inbox
        on inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id
        where inbox.state is null or inbox.state <> 'done'";
        let unsettled = match kind {
        Kind::Sqlite => {
            "select count(*) from oncely_dead_letter as l where not exists (
            select 1 from oncely_inbox as i where i.worker = l.worker and i.event_id = l.event_id and i.state = 'done')"
        }
        _ => unsettled,
    };

        // Concurrent redrives, duplicates and kills
        for round in 0..8_u64 {
            if world.database.number(unsettled).await? == 0 {
                break;
            }
            // Two operators redrive at the same time, and the publisher repeats its messages.
            let redrive = ["dlq", "redrive", "--all", "--rate", "300", "--wait", "0s"];
            let copies = messages
                .iter()
                .enumerate()
                .filter(|(n, _)| *n as u64 % 7 == round % 7);
            let copies = copies
                .map(|(n, message)| again(message.clone(), &format!("e{n}")))
                .collect();
            let late = async {
                tokio::time::sleep(Duration::from_millis(30 + 23 * round)).await;
                world.nats.publish_all(copies).await
            };
            let kill = async {
                tokio::time::sleep(Duration::from_millis(60 + 37 * (round % 6))).await;
                let pid = world.host_pid().unwrap_or_default();
                support::world::signal(pid, "KILL")
            };
            let (_, _, copied, killed) =
                tokio::join!(world.oncely(&redrive), world.oncely(&redrive), late, kill);
            copied?;
            killed?;
            world.kill_host()?;
            world.start_host().await?;
            // The messages of the dead host return after `ack_wait`. Those that died meanwhile are
            // redriven again.
            world.until(world.database.unpublished(), 0).await?;
        }

        // Recovery and checks
        world
            .oncely(&["dlq", "redrive", "--all", "--force", "--wait", "20s"])
            .await?;
        world.until(unsettled, 0).await?;
        world.quiet(count).await?;
        let books = books::check(&world).await?;
        assert_eq!(
            (books.effects.len(), books.outputs),
            (count as usize, count as usize)
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter")
                .await?,
            count
        );
        Ok(())
    }
);

both!(
    an_interrupted_redrive_continues_on_the_host,
    |kind: Kind| async move {
        let count = 30;
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world
            .nats
            .publish_all((0..count).map(|n| failing_once(&format!("e{n}"))).collect())
            .await?;
        world.until(OPEN, count).await?;
        let child = std::process::Command::new(guests::oncely()?)
            .args(["dlq", "redrive", "--all", "--rate", "10"])
            .current_dir(world.folder.path())
            .env_remove("ONCELY_HOST")
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()?;
        world
            .until_at_least("select redriven from oncely.redrive_job", 1)
            .await?;
        support::world::signal(child.id(), "INT")?;
        let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(
            said.contains("job 1 continues on the hosts")
                && said.contains("oncely dlq jobs show 1")
                && said.contains("oncely dlq jobs cancel 1"),
            "{said}"
        );

        // Nothing else is needed.
        world
            .until(
                "select count(*) from oncely.redrive_job where state = 'done'",
                1,
            )
            .await?;
        world
            .until(
                "select count(*) from oncely.inbox where state = 'done'",
                count,
            )
            .await?;
        world.quiet(count).await?;
        assert_eq!(books::check(&world).await?.effects.len(), count as usize);
        let job = world
            .oncely_json(&["dlq", "jobs", "show", "1", "--json"])
            .await?;
        assert_eq!(
            (&job["state"], &job["redriven"], &job["refused"]),
            (&"done".into(), &count.into(), &0.into())
        );
        Ok(())
    }
);
