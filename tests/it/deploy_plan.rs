//! `oncely deploy --plan`: its JSON and its exit codes.

use std::process::Output;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use support::database::Kind;
use support::world::{World, manifest};

/// Runs `oncely deploy` with these arguments in the folder of the world.
fn deploy(world: &World, args: &[&str]) -> Result<Output> {
    std::process::Command::new(support::guests::oncely()?)
        .arg("deploy")
        .args(args)
        .current_dir(world.folder.path())
        .env("NO_COLOR", "1")
        .env_remove("ONCELY_HOST")
        .env_remove("ONCELY_TOKEN")
        .output()
        .context("run `oncely deploy`")
}

/// The JSON of a plan and its exit code.
fn plan(world: &World, manifest: &str) -> Result<(Value, i32)> {
    let output = deploy(world, &["--plan", "--json", manifest])?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let document = serde_json::from_slice(&output.stdout).context(text)?;
    Ok((document, output.status.code().unwrap_or(-1)))
}

/// How often a worker started on the host.
fn starts(world: &World) -> usize {
    world.host_log().matches("worker running").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plan_json_lists_all_changes_and_exits_with_10() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("batch = 7")?).await?;
    let changed = manifest(
        "batch = 8\nsubjects = [\"in.>\"]\n[worker.config]\nkey = { secret = \"env:TEST_KEY\" }",
    )?;
    let changed = format!("[[stream]]\nname = \"NEW\"\nsubjects = [\"new.>\"]\n{changed}");
    let added = format!(
        "{changed}\n[[worker]]\nname = \"extra\"\ncomponent = \"{}\"\nstream = \"NEW\"\n",
        support::guests::component()?.display()
    );
    world.write_manifest(&added)?;

    let (document, code) = plan(&world, "oncely.toml")?;
    assert_eq!(code, 10, "{document}");
    assert_eq!(
        (&document["format"], &document["changes"]),
        (&json!(1), &json!(true))
    );
    let update = &document["workers"][0];
    assert_eq!(
        *update,
        json!({
            "worker": "test", "version": 1, "action": "update", "component": null,
            "manifest": [
                { "key": "batch", "old": 7, "new": 8 },
                { "key": "config.key", "old": null, "new": { "secret": "env:TEST_KEY" } },
                { "key": "subjects", "old": [], "new": ["in.>"] },
            ],
            "migrations": [], "streams": ["NEW"],
            "consumers": [
                { "stream": "IN", "consumer": "oncely-test", "action": "update" },
            ],
        })
    );
    let create = &document["workers"][1];
    assert_eq!(
        (&create["action"], &create["version"]),
        (&json!("create"), &json!(null))
    );
    assert_eq!(create["component"]["old"], json!(null), "{create}");
    assert_eq!(
        create["consumers"][0],
        json!({ "stream": "NEW", "consumer": "oncely-extra", "action": "create" })
    );

    // The text form has the same code. A dry run ends with 0, and a failure with 1.
    let text = deploy(&world, &["--plan", "oncely.toml"])?;
    assert_eq!(text.status.code(), Some(10));
    let shown = String::from_utf8_lossy(&text.stderr).into_owned();
    assert!(
        shown.contains("~ batch: 7 -> 8") && !shown.contains("error"),
        "{shown}"
    );
    assert_eq!(
        deploy(&world, &["--dry-run", "oncely.toml"])?.status.code(),
        Some(0)
    );
    world.write_manifest(&changed.replace("stream = \"IN\"", "stream = \"NOWHERE\""))?;
    assert_eq!(
        deploy(&world, &["--plan", "oncely.toml"])?.status.code(),
        Some(1)
    );

    // Nothing was deployed.
    let workers = world.oncely_json(&["workers", "--json"]).await?;
    assert_eq!(workers.as_array().map(Vec::len), Some(1), "{workers}");
    assert_eq!(workers[0]["version"], 1, "{workers}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identical_deployment_makes_no_version_and_no_restart() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let started = starts(&world);
    assert!(started > 0, "{}", world.host_log());
    let (document, code) = plan(&world, "oncely.toml")?;
    assert_eq!(code, 0, "{document}");
    assert_eq!(document["changes"], json!(false), "{document}");
    assert_eq!(
        document["workers"],
        json!([{
            "worker": "test", "version": 1, "action": "none", "component": null, "manifest": [],
            "migrations": [], "streams": [], "consumers": [],
        }])
    );
    for _ in 0..2 {
        let deployed = world.oncely(&["deploy", "oncely.toml"]).await?;
        assert_eq!(deployed.trim(), "worker test version 1 is active");
    }
    // The supervisor compares versions once per second.
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert_eq!(starts(&world), started, "{}", world.host_log());
    let rows = "select count(*) from oncely.deployment";
    assert_eq!(world.database.number(rows).await?, 1);
    Ok(())
}
