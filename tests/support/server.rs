//! A child process that cannot outlive the test process, not even a killed one.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Context;

/// A server run under a small shell that waits on a pipe from this process: when the pipe closes, because the
/// value was dropped or the process was killed, the shell stops the server and removes its folder.
pub struct Server {
    shell: Child,
}

impl Server {
    /// Runs `command` (a shell command line) and removes `folder` once it ended.
    pub fn start(command: &str, folder: &Path) -> anyhow::Result<Self> {
        let script = format!(
            "{command} & pid=$!; read _; kill -INT $pid 2>/dev/null; wait $pid 2>/dev/null; rm -rf '{}'",
            folder.display()
        );
        let shell = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start a shell to guard a test server")?;
        Ok(Server { shell })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// Below those that systems give to outgoing connections: one of these could take the port of a server that is to be started,
/// or started again, in a moment.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// A port of the loopback interface that was free a moment ago. Each process begins somewhere else and gives none twice
/// in a row.
pub fn free_port() -> anyhow::Result<u16> {
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random()));
    for _ in PORTS {
        let port = PORTS.start + NEXT.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no port from {} to {} is free", PORTS.start, PORTS.end)
}
