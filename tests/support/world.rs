//! A world per test: a database, a nats-server and a host process that can be killed.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::compiled;
use crate::database::{Database, Kind};
use crate::eventually::{eventually, eventually_within};
use crate::guests;
use crate::nats::NatsServer;

/// Timeout for an expected event.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Timeout for a host's start: the first host compiles its components, one of them an 18 MB
/// interpreter.
const START_PATIENCE: Duration = Duration::from_secs(240);

/// A database, a nats-server and the program under test as a process.
pub struct World {
    pub database: Database,
    pub nats: NatsServer,
    pub folder: TempDir,
    /// The NATS URL for the host: the server, or a proxy in front of it.
    pub nats_url: String,
    /// The database URL for the host, if it is not that of `database`.
    pub database_url: Option<String>,
    /// Another build of the program under test; by default the latest `oncely`.
    pub program: Option<PathBuf>,
    /// Additional environment of the host.
    pub host_env: Vec<(String, String)>,
    /// The control API address of the host; a new port at each start unless set.
    pub listen: String,
    /// The ingress address of the host; a new port at each start unless set.
    pub http: String,
    manifest: PathBuf,
    host: Option<Child>,
}

/// The usual manifest: one worker `test` over the stream IN, with outputs on the stream OUT.
/// `settings` is inserted into `[[worker]]` before its tables.
pub fn manifest(settings: &str) -> Result<String> {
    Ok(manifest_of(&guests::component()?, settings))
}

/// One worker `test` with these routes, whose behaviour is determined by each request, with outputs
/// on the stream OUT. `time` is its limit.
pub fn http_manifest(time: &str, routes: &str) -> Result<String> {
    let settings = format!("[worker.limits]\ntime = \"{time}\"\n{routes}");
    Ok(worker_of(&guests::http_component()?, "", &settings))
}

/// Like [`manifest`], for another component.
pub fn manifest_of(component: &Path, settings: &str) -> String {
    let input = "[[stream]]\nname = \"IN\"\nsubjects = [\"in.>\"]\n";
    let worker = worker_of(component, "stream = \"IN\"\n", settings);
    format!("\n{input}{worker}")
}

/// The stream OUT, and the worker `test` that may send to it.
fn worker_of(component: &Path, input: &str, settings: &str) -> String {
    let migrations = guests::repository().join("tests/guests/migrations");
    format!(
        r#"
[[stream]]
name = "OUT"
subjects = ["out.>"]

[[worker]]
name = "test"
component = "{}"
migrations = "{}"
{input}outputs = ["out.>"]
{settings}
"#,
        component.display(),
        migrations.display()
    )
}

/// Settings for tests that wait for retries.
pub const QUICK_RETRIES: &str = r#"
[worker.retry]
attempts = 3
backoff = "50ms"
backoff_max = "200ms"
"#;

impl World {
    /// Starts everything with one manifest and waits until the host is ready.
    pub async fn start(kind: Kind, manifest: &str) -> Result<World> {
        let mut world = World::without_host(kind, manifest).await?;
        world.start_host().await?;
        Ok(world)
    }

    /// Like [`World::start`], without starting the host.
    pub async fn without_host(kind: Kind, manifest: &str) -> Result<World> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-test-")
            .tempdir()
            .context("create a folder")?;
        let database = Database::fresh(kind, folder.path()).await?;
        let nats = NatsServer::start().await?;
        let path = folder.path().join("oncely.toml");
        std::fs::write(&path, manifest).context("write the manifest")?;
        let nats_url = nats.url();
        let (program, host_env) = (None, Vec::new());
        Ok(World {
            database,
            nats,
            folder,
            nats_url,
            database_url: None,
            program,
            host_env,
            listen: "127.0.0.1:0".to_owned(),
            http: "127.0.0.1:0".to_owned(),
            manifest: path,
            host: None,
        })
    }

    /// Starts the host process and waits until it is ready.
    pub async fn start_host(&mut self) -> Result<()> {
        self.spawn_host()?;
        self.ready().await
    }

    /// Starts the host process.
    pub fn spawn_host(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(self.host_file());
        let database_url = self.database_url.clone();
        let database_url = database_url.unwrap_or_else(|| self.database.url());
        self.host = Some(self.spawn(&self.data_dir(), &self.nats_url, &database_url)?);
        Ok(())
    }

    /// Starts a second host beside the first one; the caller owns the process.
    pub fn spawn_rival(&self) -> Result<Child> {
        self.spawn(
            &self.folder.path().join(".rival"),
            &self.nats_url,
            &self.database.url(),
        )
    }

    /// Like [`World::spawn_rival`], but the rival bypasses all proxies.
    pub fn spawn_rival_directly(&self) -> Result<Child> {
        self.spawn(
            &self.folder.path().join(".rival"),
            &self.nats.url(),
            &self.database.direct_url(),
        )
    }

    /// Starts a host of another installation on the same NATS server, with its database in this
    /// file.
    pub fn spawn_other_installation(&self, database: &Path) -> Result<Child> {
        self.spawn(
            &self.folder.path().join(".other"),
            &self.nats.url(),
            &database.display().to_string(),
        )
    }

    fn spawn(&self, data_dir: &Path, nats_url: &str, database_url: &str) -> Result<Child> {
        let _ = compiled::provide(data_dir);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("host.log"))
            .context("open the host's log")?;
        self.command("dev")?
            .args([
                "--listen",
                &self.listen,
                "--http",
                &self.http,
                "--http-publish",
                "in.>,out.>",
                "--no-watch",
                "--nats",
                nats_url,
                "--database",
                database_url,
            ])
            .arg("--data-dir")
            .arg(data_dir)
            .arg(&self.manifest)
            .envs(self.host_env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log)
            .spawn()
            .context("start the host")
    }

    /// Replaces the manifest for the next start of the host.
    pub fn write_manifest(&self, manifest: &str) -> Result<()> {
        std::fs::write(&self.manifest, manifest).context("write the manifest")
    }

    /// Waits until the host is ready.
    pub async fn ready(&mut self) -> Result<()> {
        let end = Instant::now() + START_PATIENCE;
        loop {
            if let Some(status) = self
                .host
                .as_mut()
                .and_then(|host| host.try_wait().ok())
                .flatten()
            {
                bail!("the host exited with {status}:\n{}", self.host_log());
            }
            if let Ok(status) = self.oncely_json(&["status", "--json"]).await
                && status.get("ready") == Some(&Value::Bool(true))
            {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the host is not ready:\n{}", self.host_log());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Kills the host like a power cut.
    pub fn kill_host(&mut self) -> Result<()> {
        if let Some(mut host) = self.host.take() {
            host.kill().context("kill the host")?;
            host.wait().context("wait for the killed host")?;
        }
        Ok(())
    }

    /// Stops the host gracefully and checks its exit status.
    pub async fn stop_host(&mut self) -> Result<()> {
        let Some(mut host) = self.host.take() else {
            return Ok(());
        };
        signal(host.id(), "TERM")?;
        let status = tokio::task::spawn_blocking(move || host.wait())
            .await
            .context("wait for the host")??;
        ensure!(
            status.success(),
            "the host exited with {status}:\n{}",
            self.host_log()
        );
        Ok(())
    }

    /// The process id of the host.
    pub fn host_pid(&self) -> Option<u32> {
        self.host.as_ref().map(Child::id)
    }

    /// Whether the host process is running.
    pub fn is_host_running(&mut self) -> bool {
        self.host
            .as_mut()
            .is_some_and(|host| matches!(host.try_wait(), Ok(None)))
    }

    /// Waits until the host is not ready for a reason that contains `why`; returns the whole
    /// reason.
    pub async fn not_ready(&self, why: &str) -> Result<String> {
        self.eventually(format!("the host is not ready: `{why}`"), || async {
            let status = self.oncely_json(&["status", "--json"]).await?;
            let reason = status["not_ready"].as_str().unwrap_or("ready");
            ensure!(reason.contains(why), "last reason: `{reason}`");
            Ok(Some(reason.to_owned()))
        })
        .await
    }

    /// Runs `oncely` with these arguments against the host and returns its output.
    pub async fn oncely(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command(args.first().copied().unwrap_or_default())?;
        command.args(args.iter().skip(1));
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Like [`World::oncely`], for a command that prints JSON.
    pub async fn oncely_json(&self, args: &[&str]) -> Result<Value> {
        serde_json::from_str(&self.oncely(args).await?).context("parse the JSON output")
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(self.program.clone().map_or_else(guests::oncely, Ok)?);
        command
            .arg(name)
            .current_dir(self.folder.path())
            .env("NO_COLOR", "1");
        command
            .env_remove("ONCELY_HOST")
            .env_remove("ONCELY_TOKEN")
            .env("RUST_BACKTRACE", "0");
        Ok(command)
    }

    fn data_dir(&self) -> PathBuf {
        self.folder.path().join(".oncely")
    }

    /// The current base URL of the ingress.
    pub fn ingress_url(&self) -> Result<String> {
        self.host_file_field("http")
            .context("the host has no ingress address")
    }

    /// The current base URL of the control API.
    pub fn control_url(&self) -> Result<String> {
        self.host_file_field("url")
            .context("the host has no control address")
    }

    /// The token of the control API and of the console.
    pub fn token(&self) -> Result<String> {
        self.host_file_field("token")
            .context("the host has no token")
    }

    /// A field of the file in which the host publishes its addresses.
    fn host_file_field(&self, field: &str) -> Result<String> {
        let text = std::fs::read_to_string(self.host_file()).context("read the host file")?;
        let file: serde_json::Value = serde_json::from_str(&text)?;
        file.get(field)
            .and_then(|value| value.as_str())
            .map(str::to_owned)
            .with_context(|| format!("the host file has no {field}"))
    }

    fn host_file(&self) -> PathBuf {
        self.data_dir().join("host.json")
    }

    /// The complete log of the host.
    pub fn host_log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("host.log")).unwrap_or_default()
    }

    /// Waits until a query returns this number.
    pub async fn until(&self, sql: &str, expected: i64) -> Result<()> {
        self.eventually(format!("`{sql}` returns {expected}"), || async {
            let found = self.database.number(sql).await?;
            ensure!(found == expected, "it returned {found}");
            Ok(Some(()))
        })
        .await
    }

    /// Waits until a query returns at least this number, and returns the number.
    pub async fn until_at_least(&self, sql: &str, minimum: i64) -> Result<i64> {
        let description = format!("`{sql}` returns at least {minimum}");
        self.eventually(description, || async {
            let found = self.database.number(sql).await?;
            ensure!(found >= minimum, "it returned {found}");
            Ok(Some(found))
        })
        .await
    }

    /// Like [`eventually`], with the host log in the error.
    pub async fn eventually<T, F>(
        &self,
        description: impl Display,
        probe: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<Option<T>>>,
    {
        let found = eventually(description, probe).await;
        found.map_err(|error| self.with_log(&error))
    }

    /// Like [`World::eventually`], with another limit.
    pub async fn eventually_within<T, F>(
        &self,
        limit: Duration,
        description: impl Display,
        probe: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<Option<T>>>,
    {
        let found = eventually_within(limit, description, probe).await;
        found.map_err(|error| self.with_log(&error))
    }

    fn with_log(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}; host log:\n{}", self.host_log())
    }

    /// Waits until `settled` messages are settled and every output is published.
    pub async fn quiet(&self, settled: i64) -> Result<()> {
        self.until("select count(*) from oncely.inbox", settled)
            .await?;
        self.until(self.database.unpublished(), 0).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.kill_host();
        let _ = compiled::save(&self.data_dir());
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status()
        .context("run kill")?;
    ensure!(status.success(), "kill -{name} {pid} failed");
    Ok(())
}
