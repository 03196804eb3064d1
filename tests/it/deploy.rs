//! New versions under load, and activation of earlier versions.

use anyhow::{Context, Result};
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

/// Version `label` of the worker.
fn labelled(label: &str) -> Result<String> {
    manifest(&format!(
        "batch = 8\nconcurrency = 2\n[worker.config]\nlabel = \"{label}\""
    ))
}

both!(
    deploy_and_rollback_under_load_lose_and_repeat_nothing,
    |kind: Kind| async move {
        let world = World::start(kind, &labelled("one")?).await?;
        let count = 600;
        let messages = (0..count)
            .map(|n| {
                NewMessage::new(
                    "in.x",
                    &format!("e{n}"),
                    "insert,version,slow",
                    r#"{"n": 1, "ms": 3}"#,
                )
            })
            .collect();
        world.nats.publish_all(messages).await?;
        std::fs::write(world.folder.path().join("oncely.toml"), labelled("two")?)
            .context("write the manifest")?;
        let deployed = world.oncely(&["deploy", "oncely.toml"]).await?;
        assert_eq!(deployed.trim(), "worker test version 2 is active");
        until_version(&world, 2).await?;
        let back = world.oncely(&["rollback", "test"]).await?;
        assert_eq!(back.trim(), "worker test version 1 is active");
        until_version(&world, 1).await?;
        world.quiet(count).await?;
        let books = books::check(&world).await?;
        assert_eq!(books.effects.len(), count as usize);
        assert!(books.dead.is_empty());
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.attempt")
                .await?,
            0
        );

        // An unchanged deployment is not a new version. A changed one always is, even if an equal
        // version existed earlier.
        assert_eq!(
            world.oncely(&["deploy", "oncely.toml"]).await?.trim(),
            "worker test version 3 is active"
        );
        assert_eq!(
            world.oncely(&["deploy", "oncely.toml"]).await?.trim(),
            "worker test version 3 is active"
        );
        Ok(())
    }
);

/// Waits until the host runs a version.
async fn until_version(world: &World, version: u64) -> Result<()> {
    world
        .eventually(format!("version {version} runs"), || async {
            let workers = world.oncely_json(&["workers", "--json"]).await?;
            anyhow::ensure!(workers[0]["version"] == version, "{workers}");
            Ok(Some(()))
        })
        .await
}

/// The error and the hint of a refused deployment.
async fn refused(world: &World, manifest: &str) -> Result<String> {
    std::fs::write(world.folder.path().join("other.toml"), manifest).context("write a manifest")?;
    match world.oncely(&["deploy", "other.toml"]).await {
        Ok(printed) => anyhow::bail!("the deployment succeeded: {printed}"),
        Err(error) => Ok(error.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unworkable_deployment_is_refused_with_a_fix() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let good = manifest("")?;

    let text = refused(
        &world,
        &good.replace("stream = \"IN\"", "stream = \"NOWHERE\""),
    )
    .await?;
    assert!(
        text.contains("the stream `NOWHERE`, which does not exist"),
        "{text}"
    );
    assert!(
        text.contains("hint: add to oncely.toml:  [[stream]]  name = \"NOWHERE\""),
        "{text}"
    );

    let text = refused(
        &world,
        &good.replace("outputs = [\"out.>\"]", "outputs = [\"elsewhere.x\"]"),
    )
    .await?;
    assert!(
        text.contains("no stream accepts the output `elsewhere.x`"),
        "{text}"
    );

    let short = "[[stream]]\nname = \"SHORT\"\nsubjects = [\"short.>\"]\nmax_age = \"10s\"\n";
    let text = refused(
        &world,
        &format!(
            "{short}{}",
            good.replace("stream = \"IN\"", "stream = \"SHORT\"")
        ),
    )
    .await?;
    assert!(
        text.contains("SHORT keeps messages for 10s, but worker test retries them for up to 15s"),
        "{text}"
    );

    let text = refused(&world, &good.replace("outputs =", "outptus =")).await?;
    assert!(
        text.contains("outptus") && text.contains("outputs"),
        "{text}"
    );

    std::fs::write(world.folder.path().join("empty.wasm"), b"\0asm\x0d\0\x01\0")
        .context("write a component")?;
    let component = support::guests::component()?;
    let text = refused(
        &world,
        &good.replace(&component.display().to_string(), "empty.wasm"),
    )
    .await?;
    assert!(
        text.contains("must export `oncely:worker/handler@0.1.0`"),
        "{text}"
    );

    std::fs::write(world.folder.path().join("text.wasm"), "not wasm").context("write a file")?;
    let text = refused(
        &world,
        &good.replace(&component.display().to_string(), "text.wasm"),
    )
    .await?;
    assert!(
        text.contains("the file is text, not a WebAssembly component"),
        "{text}"
    );

    let workers = world.oncely_json(&["workers", "--json"]).await?;
    assert_eq!(workers.as_array().map(Vec::len), Some(1));
    Ok(())
}

both!(a_new_migration_alone_is_a_change, |kind: Kind| async move {
    let mut world = World::without_host(kind, "").await?;
    let folder = world.folder.path().join("migrations");
    let shared = support::guests::repository().join("tests/guests/migrations");
    for database in ["postgres", "sqlite"] {
        std::fs::create_dir_all(folder.join(database))?;
        for file in std::fs::read_dir(shared.join(database))? {
            let file = file?;
            std::fs::copy(file.path(), folder.join(database).join(file.file_name()))?;
        }
    }
    let own = folder.join(if kind == Kind::Sqlite {
        "sqlite"
    } else {
        "postgres"
    });
    let manifest =
        manifest("")?.replace(&shared.display().to_string(), &folder.display().to_string());
    world.write_manifest(&manifest)?;
    world.start_host().await?;
    let write = |text: &str| std::fs::write(own.join("9_later.sql"), text);

    write("create table later (\n    a integer primary key\n);\n")?;
    let plan = plan_of(&world)?;
    assert!(plan.contains("+ migration 9_later.sql"), "{plan}");
    let deployed = world.oncely(&["deploy", "oncely.toml"]).await?;
    assert_eq!(deployed.trim(), "worker test version 2 is active");
    assert_eq!(
        world
            .database
            .number("select count(*) from app.later")
            .await?,
        0
    );

    // The same text with other line endings or a byte order mark.
    for same in [
        "create table later (\r\n    a integer primary key\r\n);\r\n",
        "create table later (\r    a integer primary key\r);\r",
        "\u{feff}create table later (\n    a integer primary key\n);\n",
    ] {
        write(same)?;
        let deployed = world.oncely(&["deploy", "oncely.toml"]).await?;
        assert_eq!(
            deployed.trim(),
            "worker test version 2 is active",
            "{same:?}"
        );
    }
    write("create table later (a text primary key);\n")?;
    let refused = world
        .oncely(&["deploy", "oncely.toml"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("9_later.sql of worker test changed since it ran"),
        "{refused}"
    );
    std::fs::remove_file(own.join("9_later.sql"))?;

    // A migration with a byte order mark, and one that fails.
    std::fs::write(
        own.join("91_marked.sql"),
        "\u{feff}create table marked (a integer);\r\n",
    )?;
    assert_eq!(
        world.oncely(&["deploy", "oncely.toml"]).await?.trim(),
        "worker test version 3 is active"
    );
    std::fs::write(
        own.join("92_broken.sql"),
        "create tabel broken (a integer);",
    )?;
    let refused = world
        .oncely(&["deploy", "oncely.toml"])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("run the migration 92_broken.sql"),
        "{refused}"
    );
    until_version(&world, 3).await
});

/// The plan that `oncely deploy --dry-run` prints.
fn plan_of(world: &World) -> Result<String> {
    let output = std::process::Command::new(support::guests::oncely()?)
        .args(["deploy", "--dry-run", "oncely.toml"])
        .current_dir(world.folder.path())
        .env_remove("ONCELY_HOST")
        .output()
        .context("run `oncely deploy --dry-run`")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr))
}
