//! A redis-server per test, to kill, pause and restart.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::server::{Server, free_port};

/// A Redis without persistence.
pub struct Redis {
    port: u16,
    folder: TempDir,
    server: Option<Server>,
}

impl Redis {
    pub async fn start() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-redis-")
            .tempdir()
            .context("create a folder")?;
        let mut redis = Redis {
            port: free_port()?,
            folder,
            server: None,
        };
        redis.restart().await?;
        Ok(redis)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Starts the server again on the same port, empty.
    pub async fn restart(&mut self) -> Result<()> {
        let folder = self.folder.path();
        let command = format!(
            "exec redis-server --bind 127.0.0.1 --port {} --save '' --appendonly no --dir '{}' --pidfile '{}' \
             --daemonize no >'{}' 2>&1",
            self.port,
            folder.display(),
            folder.join("pid").display(),
            folder.join("log").display()
        );
        self.server = Some(Server::start(
            &format!("( {command} )"),
            &folder.join("no-such-folder"),
        )?);
        let end = Instant::now() + Duration::from_secs(20);
        while self.command(&["PING"]).await.is_err() {
            if Instant::now() > end {
                let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
                bail!("the redis-server does not answer:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Kills the server like a power cut.
    pub fn kill(&mut self) -> Result<()> {
        self.signal("KILL")?;
        self.server = None;
        Ok(())
    }

    /// Suspends the server: its connections stay open, and nothing answers.
    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Resumes a paused server.
    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pid = std::fs::read_to_string(self.folder.path().join("pid"))
            .context("read the server's pid")?;
        crate::world::signal(pid.trim().parse().context("read the server's pid")?, name)
    }

    /// Sends one command and returns the first kilobytes of the raw answer.
    pub async fn command(&self, command: &[&str]) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))
            .await
            .context("connect to Redis")?;
        let mut request = format!("*{}\r\n", command.len());
        for part in command {
            request.push_str(&format!("${}\r\n{part}\r\n", part.len()));
        }
        stream
            .write_all(request.as_bytes())
            .await
            .context("send a command to Redis")?;
        let mut answer = vec![0; 64 << 10];
        let size = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut answer))
            .await
            .context("wait for Redis")??;
        let answer = String::from_utf8_lossy(answer.get(..size).unwrap_or_default()).into_owned();
        anyhow::ensure!(!answer.starts_with('-'), "{answer}");
        Ok(answer)
    }

    /// The number of keys that match a pattern.
    pub async fn keys(&self, pattern: &str) -> Result<usize> {
        let answer = self.command(&["KEYS", pattern]).await?;
        let count = answer
            .lines()
            .next()
            .and_then(|line| line.strip_prefix('*'))
            .context("read the list of keys")?;
        count.parse().context("read the number of keys")
    }
}
