//! A PostgreSQL cluster of the test process's own, with a fresh database for each test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::server::{Server, free_port};

/// A cluster in a folder of its own, on a free port of the loopback interface.
pub struct Cluster {
    port: u16,
    folder: TempDir,
    server: Option<Server>,
}

/// A fresh database in a cluster.
#[derive(Debug, Clone)]
pub struct PostgresDatabase {
    port: u16,
    name: String,
}

impl PostgresDatabase {
    /// Makes a database in the cluster all tests of this process share.
    pub async fn create() -> Result<Self> {
        static SHARED: OnceCell<Cluster> = OnceCell::const_new();
        SHARED.get_or_try_init(Cluster::start).await?.create_database().await
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{}", self.port, self.name)
    }
}

impl Cluster {
    /// Makes and starts a cluster.
    pub async fn start() -> Result<Cluster> {
        let folder = tempfile::Builder::new().prefix("oncely-postgres-").tempdir().context("make a folder")?;
        let data = folder.path().join("data");
        // The server refuses to run as root and must own its folder.
        std::fs::create_dir(&data).context("make the data folder")?;
        if is_root()? {
            run(Command::new("chown").arg("postgres").arg(folder.path()).arg(&data))?;
        }
        run(as_server_user(&program("initdb")?)?
            .args(["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C"])
            .arg("--pgdata")
            .arg(&data))?;
        let mut cluster = Cluster { port: free_port()?, folder, server: None };
        cluster.restart().await?;
        Ok(cluster)
    }

    /// Starts the server, again on the same port and with the same data.
    pub async fn restart(&mut self) -> Result<()> {
        let mut command = as_server_user(&program("postgres")?)?;
        let folder = self.folder.path();
        command.arg("-D").arg(folder.join("data")).args(["-h", "127.0.0.1", "-p", &self.port.to_string()]);
        command.arg("-k").arg(folder).args(["-c", "max_connections=300"]);
        let line = shell_line(&command);
        let log = folder.join("log");
        self.server = Some(Server::start(&format!("exec {line} >'{}' 2>&1", log.display()), &folder.join("none"))?);
        let end = Instant::now() + Duration::from_secs(30);
        while let Err(error) = sqlx::PgConnection::connect(&self.url("postgres")).await {
            if Instant::now() > end {
                bail!("PostgreSQL does not answer: {error}\n{}", std::fs::read_to_string(log).unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Stops the server at once, as a crash would: connections are cut, the log is replayed at the next start.
    pub fn crash(&mut self) -> Result<()> {
        let pid_file = self.folder.path().join("data/postmaster.pid");
        let text = std::fs::read_to_string(pid_file).context("read the server's pid")?;
        let pid = text.lines().next().context("read the server's pid")?.parse().context("read the server's pid")?;
        crate::world::signal(pid, "QUIT")?;
        self.server = None;
        Ok(())
    }

    pub async fn create_database(&self) -> Result<PostgresDatabase> {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let mut connection = sqlx::PgConnection::connect(&self.url("postgres")).await.context("connect")?;
        sqlx::raw_sql(AssertSqlSafe(format!("create database {name}"))).execute(&mut connection).await?;
        Ok(PostgresDatabase { port: self.port, name })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}

/// A program of the newest PostgreSQL on this machine.
fn program(name: &str) -> Result<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|folder| folder.flatten().map(|entry| entry.path().join("bin").join(name)).collect())
        .unwrap_or_default();
    versions.retain(|path| path.exists());
    versions.sort();
    match versions.pop() {
        Some(path) => Ok(path),
        None => Ok(Path::new(name).to_owned()),
    }
}

/// A command that runs as the user `postgres` when this is root.
pub fn as_server_user(program: &Path) -> Result<Command> {
    if !is_root()? {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("runuser");
    command.args(["-u", "postgres", "--"]).arg(program);
    Ok(command)
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("ask who we are")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.current_dir("/").output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn shell_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|part| format!("'{}'", part.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}
