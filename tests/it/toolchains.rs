//! The example workers and the test guests, built with every Rust toolchain for WebAssembly.
//!
//! `scripts/install-tools test` installs both targets of rustup if it is present, and Debian's
//! packages if apt-get has them. The test output names toolchains that a machine cannot have.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use oncely::cli::cargo::Target;
use serde_json::json;
use support::database::Kind;
use support::guests::{self, repository};
use support::nats::NewMessage;
use support::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_built_with_wasm32_wasip2_run() -> Result<()> {
    workers_run(Target::Wasip2, "rustup").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_built_with_wasm32_unknown_unknown_run() -> Result<()> {
    workers_run(Target::Unknown, "rustup").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_built_with_a_standard_library_from_source_run() -> Result<()> {
    workers_run(Target::StdFromSource, "apt-get").await
}

#[test]
fn the_javascript_package_passes_its_tests() -> Result<()> {
    let output = Command::new("node")
        .args(["--test", "sdk.test.js", "component.test.js"])
        .env("PATH", guests::tools_path())
        .current_dir(repository().join("tests/js-guest"))
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

/// The error of the build has the file and the line of the source.
#[test]
fn the_javascript_build_explains_mistakes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sdk = repository().join("guest-sdk/js/oncely");
    guests::link_npm_packages(folder.path(), &sdk)?;
    let imported = "import { handler } from \"oncely\";\ntype Id = string;\n";
    for (source, words) in [
        (
            "export default handler((id: Id => {});",
            ["Expected", "app.ts:3"],
        ),
        ("import \"node:fs\";", ["no modules of Node.js", "app.ts:3"]),
        (
            "export const handle = 1;",
            ["default export", "handler(...)"],
        ),
        (
            "const id: Id = `${Math.random()}`;\nexport default handler(() => {});",
            ["Math.random()", "app.ts:3"],
        ),
        (
            "\nconst at = new Date();\nexport default handler(() => console.log(at));",
            ["new Date()", "app.ts:4"],
        ),
        (
            "function fail(): Id {\n  throw new TypeError(\"no table\");\n}\nexport default fail();",
            ["TypeError: no table", "fail (app.ts:4)"],
        ),
    ] {
        std::fs::write(folder.path().join("app.ts"), format!("{imported}{source}"))?;
        let output = Command::new("node")
            .arg(sdk.join("build.js"))
            .args(["app.ts", "-o", "app.wasm"])
            .env("PATH", guests::tools_path())
            .current_dir(folder.path())
            .output()?;
        let complaint = String::from_utf8(output.stderr)?;
        ensure!(
            !output.status.success() && words.iter().all(|word| complaint.contains(word)),
            "{source}: {complaint}"
        );
    }
    Ok(())
}

/// The error of a failed build names the other toolchains, with a command for each.
#[tokio::test]
async fn a_failed_build_names_the_other_toolchains() -> Result<()> {
    let folder = tempfile::tempdir()?;
    broken_crate(folder.path())?;
    let output = Command::new(guests::oncely()?)
        .arg("build")
        .arg(folder.path())
        .output()?;
    let complaint = String::from_utf8(output.stderr)?;
    assert!(!output.status.success(), "{complaint}");
    assert_eq!(
        complaint.matches("error: this is not Rust").count(),
        1,
        "cargo's messages come once:\n{complaint}"
    );
    let installed = Target::installed(folder.path());
    let (failed, others) = installed.split_first().context("find a toolchain")?;
    assert!(
        complaint.contains(&format!("build with the toolchain {failed}")),
        "{complaint}"
    );
    for other in others {
        assert!(
            complaint.contains(&format!("`ONCELY_TOOLCHAIN={other} oncely build`")),
            "{other}:\n{complaint}"
        );
    }
    Ok(())
}

/// A requested toolchain that is not installed is an error with its install command, not a
/// fallback.
#[tokio::test]
async fn a_toolchain_that_is_not_installed_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    broken_crate(folder.path())?;

    // A `rustc` without any target is first on `PATH`. Only absolute paths lead to the others.
    let fake = folder.path().join("bin");
    std::fs::create_dir(&fake)?;
    std::os::unix::fs::symlink("/bin/false", fake.join("rustc"))?;
    std::os::unix::fs::symlink("/bin/false", fake.join("cargo"))?;
    let output = Command::new(guests::oncely()?)
        .args(["build", "--toolchain", "wasm32-wasip2"])
        .arg(folder.path())
        .env("PATH", &fake)
        .output()?;
    let complaint = String::from_utf8(output.stderr)?;
    assert!(
        complaint.contains("error: ")
            && complaint.contains("the toolchain wasm32-wasip2 is not installed"),
        "{complaint}"
    );
    assert!(
        complaint.contains("hint: rustup target add wasm32-wasip2"),
        "{complaint}"
    );
    Ok(())
}

fn broken_crate(folder: &Path) -> Result<()> {
    std::fs::create_dir(folder.join("src"))?;
    std::fs::write(
        folder.join("src/lib.rs"),
        "compile_error!(\"this is not Rust\");",
    )?;
    let manifest = "[package]\nname = \"broken\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
                    [lib]\ncrate-type = [\"cdylib\"]\n\n[workspace]\n";
    std::fs::write(folder.join("Cargo.toml"), manifest)?;
    let worker =
        "[[worker]]\nname = \"broken\"\ncrate = \".\"\nstream = \"IN\"\nsubjects = [\"in.>\"]\n";
    Ok(std::fs::write(folder.join("oncely.toml"), worker)?)
}

async fn workers_run(toolchain: Target, installed_by: &str) -> Result<()> {
    if !Target::installed(&repository()).contains(&toolchain) {
        let client = Command::new(installed_by).arg("--version").output();
        ensure!(
            client.is_err(),
            "{toolchain} is not installed, but {installed_by} provides it: run `make install-tools`"
        );
        eprintln!("skipped: {toolchain} is not installed, and this machine has no {installed_by}");
        return Ok(());
    }

    // Guests and the payments example
    let folder = tempfile::tempdir()?;
    let built = |name: &str| {
        let out = folder
            .path()
            .join(format!("{}.wasm", name.replace('/', "-")));
        guests::build_with(name, &out, Some(toolchain)).map(|()| out)
    };
    let workers = [
        worker(
            "test",
            &built("tests/guests")?,
            "tests/guests/migrations",
            "stream = \"IN\"\noutputs = [\"out.>\"]",
        ),
        worker(
            "batch",
            &built("tests/batch-guest")?,
            "",
            "stream = \"BATCH\"\noutputs = [\"out.>\"]",
        ),
        worker(
            "http",
            &built("tests/http-guest")?,
            "",
            "outputs = [\"out.>\"]\n[[worker.route]]\npath = \"/do/it\"",
        ),
        worker(
            "settle",
            &built("examples/payments")?,
            "examples/payments/migrations",
            SETTLE,
        ),
    ];
    guests_and_payments_run(&workers.concat()).await?;

    // The ledger example
    let workers = [
        worker(
            "ledger",
            &built("examples/ledger/api")?,
            "examples/ledger/api/migrations",
            LEDGER,
        ),
        worker(
            "totals",
            &built("examples/ledger/totals")?,
            "examples/ledger/totals/migrations",
            "stream = \"LEDGER\"\nsubjects = [\"ledger.posted\"]",
        ),
    ];
    the_ledger_runs(&workers.concat()).await
}

const SETTLE: &str = r#"stream = "PAYMENTS"
subjects = ["payments.requested"]
outputs = ["payments.settled", "payments.declined"]
[worker.config]
currency = "EUR""#;

const LEDGER: &str = r#"outputs = ["ledger.posted"]
[[worker.route]]
path = "/accounts"
methods = ["POST"]
[[worker.route]]
path = "/transfers"
methods = ["POST"]"#;

fn worker(name: &str, component: &Path, migrations: &str, settings: &str) -> String {
    let migrations = match migrations {
        "" => String::new(),
        folder => format!("migrations = \"{}\"\n", repository().join(folder).display()),
    };
    format!(
        "[[worker]]\nname = \"{name}\"\ncomponent = \"{}\"\n{migrations}{settings}\n\n",
        component.display()
    )
}

fn streams(streams: &[(&str, &str)]) -> String {
    let one = |(name, subjects): &(&str, &str)| {
        format!("[[stream]]\nname = \"{name}\"\nsubjects = [\"{subjects}\"]\n\n")
    };
    streams.iter().map(one).collect()
}

async fn guests_and_payments_run(workers: &str) -> Result<()> {
    let streams = streams(&[
        ("IN", "in.>"),
        ("BATCH", "batch.>"),
        ("PAYMENTS", "payments.>"),
        ("OUT", "out.>"),
    ]);
    let world = World::start(Kind::Sqlite, &(streams + workers)).await?;
    let payment =
        json!({ "payment": "p1", "from": "alice", "to": "bob", "cents": 100 }).to_string();
    let mut messages = vec![NewMessage::new("payments.requested", "p1", "", &payment)];
    for n in 0..3 {
        messages.push(NewMessage::new(
            "in.x",
            &format!("one-{n}"),
            "insert,echo",
            "{}",
        ));
        messages.push(NewMessage::new(
            "batch.x",
            &format!("many-{n}"),
            "insert",
            "{}",
        ));
    }

    // Random numbers and clocks: parts of WASI linked by std, and those that only the guest
    // imports.
    let inspect = r#"{"inspect": ["now", "wall", "monotonic", "random", "seed", "sleep"]}"#;
    messages.push(NewMessage::new("in.x", "seen", "inspect", inspect));
    world.nats.publish_all(messages).await?;
    world
        .until("select count(*) from oncely_inbox where state = 'done'", 8)
        .await?;
    world
        .until("select count(*) from entry where payment = 'p1'", 2)
        .await?;
    world
        .until("select count(distinct event_id) from effect", 6)
        .await?;

    assert_eq!(
        post(
            &world,
            "/do/it",
            json!({ "event": "e1", "do": ["effect", "send"] })
        )
        .await?,
        200
    );
    world
        .until("select count(distinct event_id) from effect", 7)
        .await
}

async fn the_ledger_runs(workers: &str) -> Result<()> {
    let world = World::start(
        Kind::Sqlite,
        &(streams(&[("LEDGER", "ledger.>")]) + workers),
    )
    .await?;
    let world_account = json!({ "id": "world", "currency": "EUR", "overdraft_limit": null });
    assert_eq!(post(&world, "/accounts", world_account).await?, 201);
    assert_eq!(
        post(
            &world,
            "/accounts",
            json!({ "id": "alice", "currency": "EUR" })
        )
        .await?,
        201
    );
    let transfer = json!({ "from": "world", "to": "alice", "amount": 1000, "currency": "EUR" });
    assert_eq!(post(&world, "/transfers", transfer).await?, 201);
    world
        .until(
            "select count(*) from daily_total where account = 'alice'",
            1,
        )
        .await
}

/// The status of the answer to a request with its own key.
async fn post(world: &World, path: &str, body: serde_json::Value) -> Result<u16> {
    let request = reqwest::Client::new()
        .post(format!("{}{path}", world.ingress_url()?))
        .json(&body);
    Ok(request
        .header("Idempotency-Key", uuid::Uuid::new_v4().to_string())
        .send()
        .await?
        .status()
        .as_u16())
}
