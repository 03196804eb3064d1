//! A child process that cannot outlive the test process, not even a killed one.

use std::path::Path;
use std::process::{Child, Command, Stdio};

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

/// A port of the loopback interface that was free a moment ago.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("look for a free port")?;
    Ok(listener.local_addr().context("read the port")?.port())
}
