//! An author's day: `oncely new` makes a project that tests, builds, deploys and handles a message
//! as it is, and `oncely dev` deploys each change.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::project::{Project, run};
use support::world::{World, manifest};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_rust_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("rust", &["cargo", "test", "--quiet"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_python_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("python", &["python3", "-m", "unittest"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_javascript_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("javascript", &["npm", "test"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_typescript_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("typescript", &["npm", "test"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_c_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("c", &["make", "test"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_go_project_handles_its_first_message() -> Result<()> {
    handles_its_first_message("go", &["go", "test"]).await
}

async fn handles_its_first_message(language: &str, test: &[&str]) -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let target = guests::target_dir()?.join("new");
    let project = Project::new(&world, "orders", language, &target).await?;

    // Its tests pass.
    let (program, arguments) = test.split_first().context("no command")?;
    let mut tests = project.command(program);
    tests.args(arguments);
    run(tests).await?;

    // So do its cases, in the component. The host uses the machine code again.
    std::os::unix::fs::symlink(
        world.folder.path().join(".oncely"),
        project.folder.join(".oncely"),
    )?;
    let tested = project.oncely(&["test"]).await?;
    ensure!(tested.contains("3 passed, 0 failed"), "{tested}");

    // It is built and deployed, and a message has its effect and its output.
    project.oncely(&["deploy"]).await?;
    world
        .oncely(&["publish", "orders.new", r#"{"id": "o1", "cents": 500}"#])
        .await?;
    world
        .until(
            "select count(*) from orders where id = 'o1' and cents = 500",
            1,
        )
        .await?;
    world
        .eventually("the output", || async {
            let stored = world.nats.read_stream("ORDERS").await?;
            let accepted = stored
                .into_iter()
                .find(|stored| stored.subject == "orders.accepted");
            Ok(accepted.map(|stored| stored.body))
        })
        .await
        .and_then(|body| {
            ensure!(
                body == br#"{"id":"o1"}"#,
                "{}",
                String::from_utf8_lossy(&body)
            );
            Ok(())
        })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_deploys_each_change_and_survives_a_broken_one() -> Result<()> {
    let world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    let folder = world.folder.path().join("app");
    std::fs::create_dir(&folder)?;
    let labelled = |label: &str| manifest(&format!("[worker.config]\nlabel = \"{label}\""));
    let write = |text: &str| std::fs::write(folder.join("oncely.toml"), text);
    write(&labelled("one")?)?;
    let log_file = world.folder.path().join("dev.log");
    let log = std::fs::File::create(&log_file)?;
    let _dev = tokio::process::Command::new(guests::oncely()?)
        .args([
            "dev",
            "app",
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
        ])
        .args(["--nats", &world.nats.url()])
        .current_dir(world.folder.path())
        .env("ONCELY_LOG_LEVEL", "info,oncely::verdict=debug")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?;
    let said = |words: &'static str| {
        let log_file = log_file.clone();
        world.eventually(format!("the log says `{words}`"), move || {
            let log = std::fs::read_to_string(&log_file).unwrap_or_default();
            async move { Ok(log.contains(words).then_some(())) }
        })
    };
    said("ready; stop").await?;
    handled_by(&world, "event-a", 1).await?;
    said("message handled").await?;

    // A change is deployed, a broken one is not.
    write(&labelled("two")?)?;
    said("deployed in").await?;
    // The version before takes messages until the new one runs.
    said("version=2").await?;
    handled_by(&world, "event-b", 2).await?;
    write("[[worker]")?;
    said("the previous version keeps running").await?;
    handled_by(&world, "event-c", 2).await?;
    write(&labelled("three")?)?;
    world
        .eventually("version 3 handles messages", || async {
            Ok(handled_by(&world, &uuid::Uuid::new_v4().to_string(), 3)
                .await
                .ok())
        })
        .await
}

/// Publishes a message and checks which version handles it.
async fn handled_by(world: &World, event_id: &str, version: u64) -> Result<()> {
    let message = NewMessage::new("in.x", event_id, "version", "");
    world.nats.publish_all(vec![message]).await?;
    let found = world
        .eventually(format!("the output of {event_id}"), || async {
            let stored = world.nats.read_stream("OUT").await?;
            let bodies = stored.iter().filter_map(|stored| {
                serde_json::from_slice::<serde_json::Value>(&stored.body).ok()
            });
            Ok(bodies
                .into_iter()
                .find(|body| {
                    let id = body["id"].as_str();
                    id.is_some_and(|id| id.contains(event_id))
                })
                .and_then(|body| body["version"].as_u64()))
        })
        .await?;
    ensure!(
        found == version,
        "{event_id} was handled by version {found}"
    );
    Ok(())
}
