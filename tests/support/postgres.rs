//! A PostgreSQL cluster per test process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use crate::server::{Server, free_port};

/// Settings for tests: durable against a process crash only, and quick to detect deadlocks.
const SETTINGS: &str = "-c fsync=off -c deadlock_timeout=200ms -c max_connections=300 -c shared_buffers=64MB \
    -c wal_level=logical -c max_replication_slots=100 -c max_wal_senders=100";

/// Like [`SETTINGS`], but asynchronous commits reach the disk seconds later. Stopping the server
/// loses the latest ones.
const LATE_WRITER: &str = "-c fsync=off -c deadlock_timeout=200ms -c max_connections=300 -c shared_buffers=64MB \
    -c wal_level=logical -c max_replication_slots=100 -c max_wal_senders=100 \
    -c wal_writer_delay=10s -c wal_writer_flush_after=64MB -c wal_buffers=16MB";

/// German server messages.
const IN_GERMAN: &str =
    "-c fsync=off -c max_connections=50 -c shared_buffers=64MB -c lc_messages=de_DE.UTF-8";

/// Production settings: durable against a crash of the machine.
const DURABLE: &str =
    "-c max_connections=300 -c shared_buffers=512MB -c max_wal_size=4GB -c wal_level=logical";

/// `pg_hba.conf`: app roles that hosts create need their passwords, other roles do not.
pub const RULES: &str = "local all all trust\n\
    host all postgres 127.0.0.1/32 trust\n\
    host all all 127.0.0.1/32 scram-sha-256\n";

/// A cluster in its own folder, stopped and removed with the test process.
pub struct Cluster {
    folder: PathBuf,
    port: u16,
    settings: &'static str,
    /// Folder with locales that the system does not have.
    locales: Option<PathBuf>,
    /// All servers started so far, the latest last.
    servers: Vec<Server>,
}

impl Cluster {
    /// Creates and starts a cluster.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(SETTINGS)
    }

    /// Like [`Cluster::start`], but a stop loses the asynchronous commits of the last seconds.
    pub fn start_with_late_writer() -> anyhow::Result<Self> {
        Self::start_with(LATE_WRITER)
    }

    /// Like [`Cluster::start`], with production settings.
    pub fn start_durable() -> anyhow::Result<Self> {
        Self::start_with(DURABLE)
    }

    /// Like [`Cluster::start`], with only these server arguments as settings.
    pub fn start_with(settings: &'static str) -> anyhow::Result<Self> {
        let mut cluster = Self::make(settings)?;
        cluster.start_again()?;
        Ok(cluster)
    }

    /// Like [`Cluster::start`], with German server messages.
    pub fn start_in_german() -> anyhow::Result<Self> {
        let mut cluster = Self::make(IN_GERMAN)?;
        let locales = cluster.folder.join("locales");
        std::fs::create_dir(&locales).context("create a folder for the locale")?;
        let compiled = locales.join("de_DE.UTF-8").to_string_lossy().into_owned();
        run("localedef", &["-i", "de_DE", "-f", "UTF-8", &compiled])
            .context("compile a locale (Debian: locales)")?;
        cluster.locales = Some(locales);
        cluster.start_again()?;
        Ok(cluster)
    }

    fn make(settings: &'static str) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-postgres-")
            .tempdir()
            .context("create a folder")?
            .keep();
        if !as_postgres().is_empty() {
            run("chown", &["postgres", &folder.to_string_lossy()])?;
        }
        let data = folder.join("data").to_string_lossy().into_owned();
        let initdb = tool("initdb").to_string_lossy().into_owned();
        let command = [
            "-D",
            &data,
            "-U",
            "postgres",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C",
        ];
        run_as_postgres(&[&[initdb.as_str()], &command[..]].concat())?;
        let rules = folder.join("rules.conf").to_string_lossy().into_owned();
        std::fs::write(&rules, RULES).context("write the access rules")?;
        run("chmod", &["a+r", &rules])?;
        run_as_postgres(&["cp", &rules, &format!("{data}/pg_hba.conf")])?;
        Ok(Cluster {
            folder,
            port: free_port()?,
            settings,
            locales: None,
            servers: Vec::new(),
        })
    }

    /// Starts the server again after [`Cluster::stop`].
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        let (folder, port, settings) = (self.folder.display(), self.port, self.settings);
        let locales = self.locales.as_ref().map_or_else(String::new, |path| {
            format!("env LOCPATH={} ", path.display())
        });
        let command = format!(
            "{locales}{} {} -D {folder}/data -p {port} -k {folder} -c listen_addresses=127.0.0.1 {settings}",
            as_postgres().join(" "),
            tool("postgres").display()
        );
        self.servers.push(Server::start(&command, &self.folder)?);
        let deadline = Instant::now() + Duration::from_secs(30);
        let ready = tool("pg_isready").to_string_lossy().into_owned();
        while run(&ready, &["-q", "-h", "127.0.0.1", "-p", &port.to_string()]).is_err() {
            ensure!(
                Instant::now() < deadline,
                "PostgreSQL did not start in time"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Stops the server like a crash: connections break, and no checkpoint is written.
    pub fn stop(&self) -> anyhow::Result<()> {
        let data = self.folder.join("data").to_string_lossy().into_owned();
        let pg_ctl = tool("pg_ctl").to_string_lossy().into_owned();
        run_as_postgres(&[
            pg_ctl.as_str(),
            "-D",
            &data,
            "-m",
            "immediate",
            "-w",
            "stop",
        ])
    }

    /// Like [`Cluster::stop`], within milliseconds.
    pub fn crash(&self) -> anyhow::Result<()> {
        let file = self.folder.join("data/postmaster.pid");
        let text = std::fs::read_to_string(&file).context("read the server's process id")?;
        let pid = text.lines().next().context("find the process id")?;
        run("kill", &["-QUIT", pid.trim()])?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while file.exists() {
            ensure!(Instant::now() < deadline, "PostgreSQL did not end in time");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket folder, where every role is trusted.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(format!(".s.PGSQL.{}", self.port))
    }

    /// The URL of a database of this cluster.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Creates an empty database and returns its name.
    pub async fn create_database(&self) -> anyhow::Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(&self.url("postgres"))
            .await
            .context("connect to the test cluster")?;
        connection
            .execute(AssertSqlSafe(format!("create database {name}")))
            .await
            .context("create a test database")?;
        connection
            .close()
            .await
            .context("close the connection to the test cluster")?;
        Ok(name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The running server is dropped first; each guard removes the folder after its server
        // ended.
        while let Some(server) = self.servers.pop() {
            drop(server);
        }
    }
}

/// The shared cluster; each test creates its own database in it.
pub fn shared() -> &'static Cluster {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    SHARED.get_or_init(|| Cluster::start().expect("start a PostgreSQL cluster"))
}

/// Debian does not put PostgreSQL's server tools on `PATH`.
fn tool(name: &str) -> PathBuf {
    let installed = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let mut tools: Vec<_> = installed
        .map(|version| version.path().join("bin").join(name))
        .filter(|p| p.exists())
        .collect();
    tools.sort();
    tools.pop().unwrap_or_else(|| Path::new(name).to_owned())
}

/// Command prefix for a program that refuses to run as root.
pub fn as_postgres() -> Vec<&'static str> {
    let is_root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|output| output.stdout.trim_ascii() == b"0");
    // `exec` replaces the shell, so signals reach the server.
    if is_root {
        vec![
            "setpriv",
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
        ]
    } else {
        Vec::new()
    }
}

fn run_as_postgres(command: &[&str]) -> anyhow::Result<()> {
    let words = [&as_postgres()[..], command].concat();
    let (program, arguments) = words.split_first().context("split the command")?;
    run(program, arguments)
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .output()
        .with_context(|| format!("run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
