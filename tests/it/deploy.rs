//! New versions under load, and back again.

use std::time::Duration;

use anyhow::{Context, Result};
use support::books;
use support::database::Kind;
use support::nats::ToPublish;
use support::world::{World, manifest};

/// Version `label` of the worker.
fn labelled(label: &str) -> Result<String> {
    manifest(&format!("batch = 8\nconcurrency = 2\n[worker.config]\nlabel = \"{label}\""))
}

both!(a_deployment_and_a_rollback_under_load_lose_and_repeat_nothing, |kind: Kind| async move {
    let world = World::start(kind, &labelled("one")?).await?;
    let count = 600;
    let messages = (0..count)
        .map(|n| ToPublish::new("in.x", &format!("e{n}"), "insert,version,slow", r#"{"n": 1, "ms": 3}"#))
        .collect();
    world.nats.publish_all(messages).await?;
    std::fs::write(world.folder.path().join("oncely.toml"), labelled("two")?).context("write the manifest")?;
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
    assert_eq!(world.database.number("select count(*) from oncely.attempt").await?, 0);
    // Deploying what is there already changes nothing; what is new is a new version, never an old one again.
    assert_eq!(world.oncely(&["deploy", "oncely.toml"]).await?.trim(), "worker test version 3 is active");
    assert_eq!(world.oncely(&["deploy", "oncely.toml"]).await?.trim(), "worker test version 3 is active");
    Ok(())
});

/// Waits until the host runs a version.
async fn until_version(world: &World, version: u64) -> Result<()> {
    for _ in 0..600 {
        let workers = world.oncely_json(&["workers", "--json"]).await?;
        if workers.pointer("/0/version").and_then(serde_json::Value::as_u64) == Some(version) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    anyhow::bail!("version {version} does not run:\n{}", world.host_log())
}

/// What is refused, with the sentence and the hint.
async fn refused(world: &World, manifest: &str) -> Result<String> {
    std::fs::write(world.folder.path().join("other.toml"), manifest).context("write a manifest")?;
    match world.oncely(&["deploy", "other.toml"]).await {
        Ok(printed) => anyhow::bail!("it was deployed: {printed}"),
        Err(error) => Ok(error.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_is_refused_with_the_line_that_would_mend_it() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let good = manifest("")?;

    let text = refused(&world, &good.replace("stream = \"IN\"", "stream = \"NOWHERE\"")).await?;
    assert!(text.contains("the stream `NOWHERE`, which does not exist"), "{text}");
    assert!(text.contains("hint: add to oncely.toml:  [[stream]]  name = \"NOWHERE\""), "{text}");

    let text = refused(&world, &good.replace("outputs = [\"out.>\"]", "outputs = [\"elsewhere.x\"]")).await?;
    assert!(text.contains("no stream holds the output `elsewhere.x`"), "{text}");

    let short = "[[stream]]\nname = \"SHORT\"\nsubjects = [\"short.>\"]\nmax_age = \"10s\"\n";
    let text = refused(&world, &format!("{short}{}", good.replace("stream = \"IN\"", "stream = \"SHORT\""))).await?;
    assert!(text.contains("SHORT keeps messages for 10s, and worker test tries them for up to 15s"), "{text}");

    let text = refused(&world, &good.replace("outputs =", "outptus =")).await?;
    assert!(text.contains("outptus") && text.contains("outputs"), "{text}");

    std::fs::write(world.folder.path().join("empty.wasm"), b"\0asm\x0d\0\x01\0").context("write a component")?;
    let component = support::guests::component()?;
    let text = refused(&world, &good.replace(&component.display().to_string(), "empty.wasm")).await?;
    assert!(text.contains("must export `oncely:worker/handler@0.1.0`"), "{text}");

    std::fs::write(world.folder.path().join("text.wasm"), "not wasm").context("write a file")?;
    let text = refused(&world, &good.replace(&component.display().to_string(), "text.wasm")).await?;
    assert!(text.contains("the file is text, not a WebAssembly component"), "{text}");

    let workers = world.oncely_json(&["workers", "--json"]).await?;
    assert_eq!(workers.as_array().map(Vec::len), Some(1));
    Ok(())
}
