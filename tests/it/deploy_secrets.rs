//! Environments of a manifest, and secrets that only hosts resolve.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use support::database::{Database, Kind};
use support::nats::NewMessage;
use support::world::{World, manifest};

const SECRET: &str = "pa55-b4ttery-h0rse";

/// The text that the handler sends instead of the secret.
fn reversed(secret: &str) -> String {
    secret.chars().rev().collect()
}

/// The latest output with the reversed configuration, once there are `count` of them.
async fn read_config(world: &World, count: usize) -> Result<Value> {
    let bodies = world
        .eventually("the handler sends its configuration", || async {
            let stored = world.nats.read_stream("OUT").await?;
            let bodies: Vec<_> = stored
                .into_iter()
                .filter(|stored| stored.subject == "out.reversed")
                .map(|stored| stored.body)
                .collect();
            Ok((bodies.len() == count).then_some(bodies))
        })
        .await?;
    let last = bodies.last().context("no output")?;
    serde_json::from_slice(last).context("parse an output")
}

/// All rows of all tables as text; for SQLite, the bytes of its files.
async fn dump(world: &World) -> Result<String> {
    if let Database::Sqlite(path) = &world.database {
        let wal = format!("{}-wal", path.display());
        let files = [path.as_path(), Path::new(&wal)].map(std::fs::read);
        let bytes: Vec<u8> = files.into_iter().flatten().flatten().collect();
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    let tables = "select quote_ident(schemaname), quote_ident(tablename) from pg_tables \
                  where schemaname not in ('pg_catalog', 'information_schema')";
    let mut text = String::new();
    for table in world.database.rows(tables).await? {
        let rows = format!("select t::text from {} t", table.join("."));
        for row in world.database.rows(&rows).await? {
            text.push_str(&row.join("\t"));
            text.push('\n');
        }
    }
    Ok(text)
}

both!(
    a_secret_reaches_the_handler_and_no_row_export_or_log,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, "").await?;
        let file = world.folder.path().join("label.txt");
        std::fs::write(&file, "first\n").context("write a secret")?;
        world.write_manifest(&manifest(&format!(
            "[worker.retry]\nattempts = 1\n[worker.config]\n\
             key = {{ secret = \"env:TEST_API_KEY\" }}\n\
             label = {{ secret = \"file:{}\" }}\nplain = \"abc\"",
            file.display()
        ))?)?;
        world.host_env = vec![("TEST_API_KEY".to_owned(), SECRET.to_owned())];
        world.start_host().await?;

        // The handler reads it, also in an attempt that fails and is recorded.
        world
            .nats
            .publish_all(vec![
                NewMessage::new("in.a", "e1", "config_reversed", ""),
                NewMessage::new("in.a", "e2", "config_reversed,reject", ""),
            ])
            .await?;
        let config = read_config(&world, 1).await?;
        assert_eq!(config["key"], reversed(SECRET), "{config}");
        assert_eq!(config["label"], "tsrif", "{config}");
        assert_eq!(config["plain"], "cba", "{config}");
        world
            .until("select count(*) from oncely.dead_letter", 1)
            .await?;

        // Rows contain the references only.
        let rows = dump(&world).await?;
        assert!(rows.contains("env:TEST_API_KEY"), "the dump is incomplete");
        assert!(rows.contains("file:/"), "the dump is incomplete");
        let hex = |text: &str| -> String {
            let digits = text.bytes().map(|byte| format!("{byte:02x}"));
            digits.collect()
        };
        for secret in [SECRET.to_owned(), hex(SECRET)] {
            assert!(!rows.contains(&secret), "a row contains the secret");
        }

        // So do the commands and the log.
        let export = world.folder.path().join("export.jsonl");
        let out = export.display().to_string();
        world
            .oncely(&["dlq", "export", "--all", "--no-component", "--out", &out])
            .await?;
        let exported = std::fs::read_to_string(&export).context("read the export")?;
        assert!(exported.contains("env:TEST_API_KEY"), "{exported}");
        let shown = [
            exported,
            world.oncely(&["status", "--json"]).await?,
            world.oncely(&["workers", "--json"]).await?,
            world.oncely(&["workers", "test"]).await?,
            world
                .oncely(&["deploy", "--dry-run", "oncely.toml"])
                .await?,
            world.host_log(),
        ];
        for text in shown {
            ensure!(!text.contains(SECRET), "the secret is shown: {text}");
        }

        // A restart reads the value again.
        world.stop_host().await?;
        std::fs::write(&file, "second\n").context("write a secret")?;
        world.start_host().await?;
        world
            .nats
            .publish_all(vec![NewMessage::new("in.a", "e3", "config_reversed", "")])
            .await?;
        assert_eq!(read_config(&world, 2).await?["label"], "dnoces");
        Ok(())
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_its_secret_is_broken_and_others_run() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let file = world.folder.path().join("late.txt");
    let component = support::guests::component()?;
    let second = format!(
        "{}\n[[worker]]\nname = \"needy\"\ncomponent = \"{}\"\nstream = \"IN\"\n\
         [worker.config]\nlate = {{ secret = \"file:{}\" }}\n",
        manifest("")?,
        component.display(),
        file.display()
    );
    std::fs::write(world.folder.path().join("second.toml"), second).context("write a manifest")?;
    let error = world.oncely(&["deploy", "second.toml"]).await.unwrap_err();
    let text = error.to_string();
    let named = format!(
        "the secret file:{} of worker needy (config key `late`) is missing",
        file.display()
    );
    assert!(text.contains(&named), "{text}");

    // The other worker runs; the host names the secret.
    let states = |workers: &Value| -> Vec<(String, String)> {
        let of = |worker: &Value, key: &str| worker[key].as_str().unwrap_or_default().to_owned();
        let workers = workers.as_array().into_iter().flatten();
        workers
            .map(|worker| (of(worker, "worker"), of(worker, "state")))
            .collect()
    };
    let status = world.oncely_json(&["status", "--json"]).await?;
    let workers = world.oncely_json(&["workers", "--json"]).await?;
    let expected = |needy: &str| {
        [("needy", needy), ("test", "running")]
            .map(|(worker, state)| (worker.to_owned(), state.to_owned()))
    };
    assert_eq!(states(&workers), expected("broken"), "{workers}");
    assert!(status.to_string().contains(&named), "{status}");

    // It starts once the secret exists.
    std::fs::write(&file, "here").context("write the secret")?;
    world
        .eventually("the worker runs", || async {
            let workers = world.oncely_json(&["workers", "--json"]).await?;
            Ok((states(&workers) == expected("running")).then_some(()))
        })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deploy_env_merges_the_tables_of_an_environment() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("batch = 7")?).await?;
    let text = format!(
        "{}\n[[env.production.worker]]\nname = \"test\"\nbatch = 9\n",
        manifest("batch = 7")?
    );
    world.write_manifest(&text)?;
    let plan = |args: Vec<&'static str>| {
        let world = &world;
        async move {
            let mut command = vec!["deploy", "--dry-run", "oncely.toml"];
            command.extend(args);
            world.oncely(&command).await
        }
    };
    plan(vec![]).await?;
    let error = plan(vec!["--env", "staging"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("there is no environment `staging`"),
        "{error}"
    );
    assert!(
        error.contains("the environments are: production"),
        "{error}"
    );
    let deployed = world
        .oncely(&["deploy", "--env", "production", "oncely.toml"])
        .await?;
    assert_eq!(deployed.trim(), "worker test version 2 is active");
    let deployed = world.oncely(&["deploy", "oncely.toml"]).await?;
    assert_eq!(deployed.trim(), "worker test version 3 is active");
    Ok(())
}
