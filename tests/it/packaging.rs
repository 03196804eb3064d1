//! The packages of Oncely: the image's files, the systemd unit, and shell completions.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use support::guests::{oncely, repository};
use support::nats::NatsServer;
use support::server::free_port;
use support::world::PATIENCE;

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed:\n{text}");
    Ok(text)
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// The entries of the repository that the host is compiled from, by Cargo's list of its sources.
fn compiled_entries() -> Result<BTreeSet<String>> {
    let list = oncely()?.with_extension("d");
    let text =
        std::fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let root = repository().canonicalize()?;
    let (_, sources) = text.split_once(": ").context("find the sources")?;
    let mut entries = BTreeSet::new();
    for source in sources.split_whitespace() {
        let source = Path::new(source).canonicalize();
        let source = source.with_context(|| format!("find a source of {}", list.display()))?;
        let first = source.strip_prefix(&root)?.components().next();
        let first = first.context("find the entry of a source")?;
        entries.insert(first.as_os_str().to_string_lossy().into_owned());
    }
    // These are the output and the history of the repository.
    entries.retain(|entry| !["target", ".git"].contains(&entry.as_str()));
    Ok(entries)
}

// The host includes files of other folders, such as templates, migrations and references.
#[test]
fn copies_of_the_repository_have_all_sources_of_the_host() -> Result<()> {
    let ignored = std::fs::read_to_string(repository().join(".dockerignore"))?;
    let image: Vec<&str> = ignored
        .lines()
        .filter_map(|line| line.strip_prefix('!'))
        .collect();
    let script = std::fs::read_to_string(repository().join("scripts/build-mutants"))?;
    let copy = script.lines().find_map(|line| line.strip_prefix("cp -r "));
    let mutants: Vec<&str> = copy
        .context("find the copy of scripts/build-mutants")?
        .split_whitespace()
        .collect();
    let entries = compiled_entries()?;
    ensure!(
        ["host", "docs", "guest-sdk"]
            .iter()
            .all(|known| entries.contains(*known)),
        "{entries:?}"
    );
    for entry in &entries {
        let entry = entry.as_str();
        ensure!(image.contains(&entry), ".dockerignore lacks !{entry}");
        ensure!(mutants.contains(&entry), "build-mutants lacks {entry}");
    }
    Ok(())
}

#[test]
fn the_version_names_the_commit() -> Result<()> {
    let version = output(Command::new(oncely()?).arg("--version"))?;
    let commit = version
        .trim()
        .strip_prefix("oncely 0.1.0 (")
        .and_then(|rest| rest.strip_suffix(')'));
    let commit = commit.with_context(|| format!("find the commit in `{version}`"))?;
    let is_hash = commit.len() == 12 && commit.chars().all(|digit| digit.is_ascii_hexdigit());
    assert!(is_hash || commit == "unknown", "{commit}");
    Ok(())
}

#[test]
fn each_shell_completes_every_command() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = output(Command::new(oncely()?).args(["completions", shell]))?;
        for command in ["deploy", "rollback", "redrive", "--dry-run", "--toolchain"] {
            assert!(
                script.contains(command.trim_start_matches("--")),
                "the completions for {shell} lack {command}"
            );
        }
    }
    Ok(())
}

#[test]
fn the_systemd_unit_is_valid_and_hardened() -> Result<()> {
    if !is_there("systemd-analyze") {
        eprintln!("skipped: systemd-analyze is not installed");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let unit = folder.path().join("oncely.service");
    let text = std::fs::read_to_string(repository().join("packaging/oncely.service"))?;
    std::fs::write(
        &unit,
        text.replace("/usr/bin/oncely", &oncely()?.display().to_string()),
    )?;
    let said = output(Command::new("systemd-analyze").arg("verify").arg(&unit))?;
    assert!(!said.contains("oncely.service"), "{said}");
    // The exposure out of 100, lower is better: 96 is an unprotected service.
    output(
        Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=20"])
            .arg(&unit),
    )?;
    Ok(())
}

/// The image's files alone are enough to run a host as an unprivileged user.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_runs_from_the_image_files_only() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("oncely-image-").tempdir()?;
    let tree = folder.path().join("image");
    output(
        Command::new(repository().join("scripts/image-tree"))
            .arg(oncely()?)
            .arg(&tree),
    )?;
    assert!(!tree.join("bin/sh").exists(), "the image contains a shell");
    let Some(mut inside) = inside(&tree)? else {
        eprintln!("skipped: chroot and user namespaces are not permitted");
        return Ok(());
    };

    let nats = NatsServer::start().await?;
    let (control, http) = (free_port()?, free_port()?);
    let child = inside
        .args(["/usr/bin/oncely", "run"])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("ONCELY_DATA_DIR", "/var/lib/oncely")
        .env("ONCELY_NATS", nats.url())
        .env("ONCELY_LISTEN", format!("127.0.0.1:{control}"))
        .env("ONCELY_HTTP", format!("127.0.0.1:{http}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(folder.path().join("log"))?)
        .spawn()
        .context("start the host in the image's files")?;
    let mut host = Host(child);
    let end = Instant::now() + PATIENCE;
    let ready = format!("http://127.0.0.1:{control}/readyz");
    while !reqwest::get(&ready)
        .await
        .is_ok_and(|response| response.status().is_success())
    {
        let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        ensure!(host.0.try_wait()?.is_none(), "the host exited:\n{}", log());
        ensure!(Instant::now() < end, "the host is not ready:\n{}", log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(tree.join("var/lib/oncely/oncely.db").exists());
    Ok(())
}

struct Host(Child);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command that runs its arguments with `tree` as the root folder: as the image's user if the
/// tests run as root, else in a user namespace. None if neither is permitted.
fn inside(tree: &Path) -> Result<Option<Command>> {
    let is_root = output(Command::new("id").arg("-u"))?.trim() == "0";
    let command = || {
        let mut command;
        if is_root {
            command = Command::new("chroot");
            command.arg("--userspec=65532:65532");
        } else {
            command = Command::new("unshare");
            command.args(["--user", "--map-root-user", "chroot"]);
        }
        command.arg(tree);
        command
    };
    let works = command()
        .args(["/usr/bin/oncely", "--version"])
        .output()
        .is_ok_and(|output| output.status.success());
    ensure!(
        works || !is_root,
        "the program does not start in the image's files"
    );
    Ok(works.then(command))
}
