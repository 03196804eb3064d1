//! Earlier demos: a running one is left alone, and the files of a finished one are removed.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use oncely::model::hint::WithHint;
use serde_json::Value;

/// Time limit for a nats-server to stop.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// Held while a demo runs; concurrent demos would remove each other's files.
pub struct Lock {
    _file: File,
}

/// Locks the demo whose files are in `folder`.
///
/// # Errors
/// Fails if another demo is running, or if the folder is not writable.
pub fn lock(folder: &Path) -> Result<Lock> {
    let path = folder.with_extension("lock");
    let file = File::create(&path).with_context(|| format!("write {}", path.display()));
    let file = file.hint("clone the repository into a writable folder")?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(anyhow!("another demo is running in this checkout"))
            .hint("wait until it ends, then run: make demo"),
        Err(TryLockError::Error(error)) => Err(error).context("lock the demo's folder"),
    }
}

/// Removes the files of an earlier demo, and the nats-server that a killed demo leaves running.
///
/// # Errors
/// Fails if a host still runs on these files; a user may be inspecting them.
pub fn remove(folder: &Path) -> Result<()> {
    let data_dir = folder.join(".oncely");
    if let Some(pid) = running(&data_dir.join("host.json"), "oncely") {
        return Err(anyhow!(
            "the host {pid} still runs on the data of an earlier demo in {}",
            data_dir.display()
        ))
        .hint(format!("stop it, then try again: kill {pid} && make demo"));
    }
    if let Some(pid) = running(&data_dir.join("nats/server.json"), "nats-server") {
        stop(pid)?;
    }
    if folder.exists() {
        let removed =
            std::fs::remove_dir_all(folder).context("remove the files of the earlier demo");
        removed.hint(format!("rm -r {}", folder.display()))?;
    }
    Ok(())
}

/// The process id in the field `pid` of a JSON file, if that process runs this program. Process ids
/// are reused.
fn running(file: &Path, program: &str) -> Option<u32> {
    let description: Value = serde_json::from_str(&std::fs::read_to_string(file).ok()?).ok()?;
    let pid = u32::try_from(description.get("pid")?.as_u64()?).ok()?;
    command_of(pid)?.contains(program).then_some(pid)
}

fn command_of(pid: u32) -> Option<String> {
    if let Ok(command) = std::fs::read(format!("/proc/{pid}/cmdline")) {
        return Some(String::from_utf8_lossy(&command).into_owned());
    }
    let output = Command::new("ps")
        .args(["-o", "command=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn stop(pid: u32) -> Result<()> {
    support::world::signal(pid, "TERM")?;
    let end = Instant::now() + STOP_WITHIN;
    while command_of(pid).is_some_and(|command| command.contains("nats-server")) {
        if Instant::now() > end {
            return Err(anyhow!(
                "the nats-server {pid} of an earlier demo does not stop"
            ))
            .hint(format!("kill -9 {pid}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
