//! A child process that cannot outlive the test process, even a killed one.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Context;

/// A server run under a small shell that waits on a pipe from this process. The pipe closes when
/// the value is dropped or the process dies. The shell then stops the server and removes its
/// folder.
pub struct Server {
    shell: Child,
}

impl Server {
    /// Runs the shell command line `command` and removes `folder` after it ends.
    pub fn start(command: &str, folder: &Path) -> anyhow::Result<Self> {
        let script = format!(
            "{command} & pid=$!; read _; kill -INT $pid 2>/dev/null; wait $pid 2>/dev/null; rm -rf '{}'",
            folder.display()
        );
        Server::run(&script)
    }

    /// Runs a shell script that stops its server when its standard input ends.
    pub fn run(script: &str) -> anyhow::Result<Self> {
        let shell = Command::new("sh")
            .args(["-c", script])
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

/// Below the ephemeral ports of all systems. An outgoing connection on an ephemeral port could
/// block a server that is about to start.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// A loopback port that was free a moment ago. Each process starts its search elsewhere and never
/// returns the same port twice in a row.
pub fn free_port() -> anyhow::Result<u16> {
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random()));
    for _ in PORTS {
        let port = PORTS.start + NEXT.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no free port from {} to {}", PORTS.start, PORTS.end)
}
