//! Redrives of many dead letters as jobs: they survive their client and their host.

use anyhow::Result;
use serde_json::Value;
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{World, manifest};

/// One attempt, so that `fail_once` dies and succeeds when redriven.
const ONE_ATTEMPT: &str =
    "[worker.retry]\nattempts = 1\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"";

const OPEN: &str = "select count(*) from oncely.dead_letter where state = 'open'";

fn failing_once(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| NewMessage::new("in.x", &format!("e{n}"), "fail_once,insert", r#"{"n": 1}"#))
        .collect()
}

/// Waits until all redrives have taken effect and their outputs are published.
async fn settled(world: &World, count: i64) -> Result<()> {
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, count).await?;
    world.quiet(count).await
}

both!(
    a_job_can_be_paused_resumed_and_cancelled,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world.nats.publish_all(failing_once(0, 40)).await?;
        world.until(OPEN, 40).await?;
        let said = world
            .oncely(&[
                "dlq", "redrive", "--all", "--rate", "10", "--detach", "--note", "fixed",
            ])
            .await?;
        assert!(said.contains("job 1 redrives 40 dead letters"), "{said}");

        // Pause: after the current chunk, nothing is redriven.
        world
            .until_at_least("select redriven from oncely.redrive_job", 1)
            .await?;
        let paused = world
            .oncely_json(&["dlq", "jobs", "pause", "1", "--json"])
            .await?;
        assert_eq!(paused["state"], "paused");
        let redriven = "select count(*) from oncely.dead_letter where generation = 1";
        let so_far = world.database.number(redriven).await?;
        assert_eq!(paused["redriven"].as_i64(), Some(so_far));
        assert!(so_far < 40, "{so_far} are redriven");
        let shown = world.oncely(&["dlq", "jobs", "show", "1"]).await?;
        assert!(
            shown.contains("paused") && shown.contains("fixed"),
            "{shown}"
        );

        // Resume, and cancel: those that are redriven stay redriven.
        world.oncely(&["dlq", "jobs", "resume", "1"]).await?;
        world.until_at_least(redriven, so_far + 1).await?;
        let cancelled = world
            .oncely_json(&["dlq", "jobs", "cancel", "1", "--json"])
            .await?;
        assert_eq!(cancelled["state"], "cancelled");
        let ended = world.database.number(redriven).await?;
        assert_eq!(cancelled["redriven"].as_i64(), Some(ended));
        let refused = world
            .oncely(&["dlq", "jobs", "resume", "1"])
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("job 1 has ended"), "{refused}");

        // Another job takes the rest. The client shows the results.
        let said = world
            .oncely(&["dlq", "redrive", "--all", "--rate", "0"])
            .await?;
        assert!(
            said.contains(&format!("redriven: {}", 40 - ended)),
            "{said}"
        );
        settled(&world, 40).await?;
        assert_eq!(books::check(&world).await?.effects.len(), 40);
        let jobs = world.oncely_json(&["dlq", "jobs", "--json"]).await?;
        let states: Vec<&Value> = jobs
            .as_array()
            .into_iter()
            .flatten()
            .map(|job| &job["state"])
            .collect();
        assert_eq!(states, ["done", "cancelled"]);
        let missing = world
            .oncely(&["dlq", "jobs", "show", "9"])
            .await
            .unwrap_err()
            .to_string();
        assert!(missing.contains("there is no job 9"), "{missing}");
        Ok(())
    }
);

both!(
    a_killed_host_continues_its_job_at_the_next_start,
    |kind: Kind| async move {
        let settings = format!("ack_wait = \"1s\"\n{ONE_ATTEMPT}");
        let mut world = World::start(kind, &manifest(&settings)?).await?;
        world.nats.publish_all(failing_once(0, 40)).await?;
        world.until(OPEN, 40).await?;
        world
            .oncely(&["dlq", "redrive", "--all", "--rate", "20", "--detach"])
            .await?;
        world
            .until_at_least("select redriven from oncely.redrive_job", 4)
            .await?;
        world.kill_host()?;
        let done = world
            .database
            .number("select redriven from oncely.redrive_job")
            .await?;
        assert!(done < 40, "{done} are redriven");
        world.start_host().await?;
        world
            .until(
                "select count(*) from oncely.redrive_job where state = 'done'",
                1,
            )
            .await?;

        // Each dead letter was redriven once.
        world
            .until(
                "select count(*) from oncely.dead_letter_audit where action = 'redrive'",
                40,
            )
            .await?;
        settled(&world, 40).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.outputs), (40, 40));
        Ok(())
    }
);

/// The host that runs a job is killed. The other one finishes it, and nothing is redriven twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_host_finishes_the_job_of_a_killed_one() -> Result<()> {
    let settings = format!("ack_wait = \"1s\"\n{ONE_ATTEMPT}");
    let world = World::without_host(Kind::Postgres, &manifest(&settings)?).await?;
    let one = RunningHost::start(&world, "job-one").await?;
    let path = world.folder.path().join("oncely.toml");
    one.oncely(&["deploy", &path.display().to_string()])?;
    world.nats.publish_all(failing_once(0, 60)).await?;
    world.until(OPEN, 60).await?;

    // One host has the job: the other one starts later.
    one.oncely(&["dlq", "redrive", "--all", "--rate", "10", "--detach"])?;
    world
        .until_at_least("select redriven from oncely.redrive_job", 2)
        .await?;
    let two = RunningHost::start(&world, "job-two").await?;
    let before = world
        .database
        .rows("select redriven, leased_by from oncely.redrive_job")
        .await?;
    support::world::signal(one.pid(), "KILL")?;
    drop(one);
    two.eventually("the job is done", || async {
        let job: Value =
            serde_json::from_str(&two.oncely(&["dlq", "jobs", "show", "1", "--json"])?)?;
        Ok((job["state"] == "done").then_some(()))
    })
    .await?;
    let after = world
        .database
        .rows("select redriven, leased_by from oncely.redrive_job")
        .await?;
    assert_eq!(after[0][0], "60");
    assert_ne!(before[0][1], after[0][1], "the same host finished it");
    let redrives = "select count(*) from oncely.dead_letter_audit where action = 'redrive'";
    assert_eq!(world.database.number(redrives).await?, 60);
    settled(&world, 60).await?;
    let books = books::check(&world).await?;
    assert_eq!((books.effects.len(), books.outputs), (60, 60));
    Ok(())
}
