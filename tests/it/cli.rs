//! The output of the commands.

use anyhow::Result;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dlq_commands_show_a_dead_letter_and_its_attempts() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    world
        .nats
        .publish_all(vec![NewMessage::new(
            "in.x",
            "bad",
            "reject",
            r#"{"code": "no-such-account"}"#,
        )])
        .await?;
    world.quiet(1).await?;

    let list = world.oncely(&["dlq", "list"]).await?;
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 2, "{list}");
    assert!(lines[0].starts_with("ID  WORKER  REASON"), "{list}");
    assert!(
        lines[1].contains("bad") && lines[1].contains("rejected"),
        "{list}"
    );

    let shown = world.oncely(&["dlq", "show", "1"]).await?;
    for expected in [
        "reason: rejected",
        "event id: bad",
        "subject: in.x",
        "from: IN 1",
        "do: reject",
        "attempt 1 at ",
    ] {
        assert!(shown.contains(expected), "`{expected}` is not in:\n{shown}");
    }
    let json = world.oncely_json(&["dlq", "show", "1", "--json"]).await?;
    assert_eq!(json["event_id"], "bad");
    assert_eq!(json["failure_history"].as_array().map(Vec::len), Some(1));

    let missing = world
        .oncely(&["dlq", "show", "99"])
        .await
        .map_err(|error| error.to_string());
    assert_eq!(
        missing,
        Err("error: there is no dead letter 99\nhint: oncely dlq list".to_owned())
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_twice_with_one_id_has_one_effect() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let publish = [
        "publish",
        "in.x",
        r#"{"n": 1}"#,
        "--id",
        "once",
        "-H",
        "do: insert",
    ];
    assert_eq!(world.oncely(&publish).await?.trim(), "IN 1 id once");
    assert_eq!(
        world.oncely(&publish).await?.trim(),
        "IN 1 id once (already stored)"
    );
    world.quiet(1).await?;

    let status = world.oncely(&["status"]).await?;
    assert!(status.contains("ready: yes"), "{status}");
    let status = world.oncely_json(&["status", "--json"]).await?;
    assert_eq!(status.pointer("/totals/0/done"), Some(&1.into()));
    assert_eq!(status.pointer("/totals/0/outputs"), Some(&1.into()));
    assert_eq!(status.pointer("/workers/0/pending"), Some(&0.into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_commands_show_the_state_of_a_worker() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let count = |event: &str, key: &str| {
        NewMessage::new(
            "in.x",
            event,
            "state_counter",
            &format!(r#"{{"key": "{key}"}}"#),
        )
    };
    world
        .nats
        .publish_all(vec![
            count("a", "visits/home"),
            count("b", "visits/home"),
            count("c", "other"),
        ])
        .await?;
    world.quiet(3).await?;

    // List
    let list = world
        .oncely(&["state", "list", "test", "--prefix", "visits/"])
        .await?;
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 2, "{list}");
    assert!(
        lines[0].starts_with("KEY") && lines[1].starts_with("visits/home"),
        "{list}"
    );
    assert_eq!(
        world
            .oncely(&["state", "list", "test", "--limit", "1"])
            .await?
            .lines()
            .count(),
        2
    );

    // Get
    let shown = world
        .oncely(&["state", "get", "test", "visits/home"])
        .await?;
    assert!(
        shown.contains("version: 2") && shown.ends_with("value (1 bytes)\n2\n"),
        "{shown}"
    );
    let json = world
        .oncely_json(&["state", "get", "test", "visits/home", "--json"])
        .await?;
    assert_eq!(
        (&json["version"], &json["value"]),
        (&2.into(), &"Mg==".into())
    );

    // Errors
    let missing = world
        .oncely(&["state", "get", "test", "nowhere"])
        .await
        .map_err(|error| error.to_string());
    let expected = "error: worker test has no state under `nowhere`\nhint: oncely state list test";
    assert_eq!(missing, Err(expected.to_owned()));
    let missing = world
        .oncely(&["state", "list", "nobody"])
        .await
        .map_err(|error| error.to_string());
    assert_eq!(
        missing,
        Err("error: there is no worker `nobody`\nhint: oncely workers".to_owned())
    );
    Ok(())
}

#[tokio::test]
async fn without_a_host_commands_hint_how_to_start_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = std::process::Command::new(support::guests::oncely()?)
        .arg("status")
        .current_dir(folder.path())
        .env_remove("ONCELY_HOST")
        .output()?;
    assert_eq!(output.status.code(), Some(4));
    let text = String::from_utf8(output.stderr)?;
    assert!(text.starts_with("error: no host is known here"), "{text}");
    assert!(text.contains("hint: start one with: oncely dev"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_api_requires_the_token() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let refused = world
        .oncely(&["workers", "--token", "wrong"])
        .await
        .map_err(|error| error.to_string());
    assert_eq!(
        refused.map(|_| ()),
        Err("error: the token is missing, wrong, expired or revoked\nhint: pass a token with --token or ONCELY_TOKEN".to_owned())
    );
    Ok(())
}
