//! Production-like hosts: `oncely run`, configured by environment, several on one database.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::compiled;
use crate::eventually::eventually;
use crate::guests;
use crate::world::{PATIENCE, World, signal};

/// One `oncely run` process in its own folder.
pub struct RunningHost {
    folder: PathBuf,
    child: Child,
}

impl RunningHost {
    /// Starts a host on a world's database and NATS server and waits until it is ready. Its
    /// environment is that of the world's own host.
    pub async fn start(world: &World, name: &str) -> Result<Self> {
        let mut host = Self::spawn(world, name)?;
        host.ready().await?;
        Ok(host)
    }

    /// Like [`RunningHost::start`], without waiting.
    pub fn spawn(world: &World, name: &str) -> Result<Self> {
        let folder = world.folder.path().join(name);
        std::fs::create_dir_all(&folder).context("create the host's folder")?;
        let _ = compiled::provide(&folder.join(".oncely"));
        let log = std::fs::File::create(folder.join("log")).context("create the host's log")?;
        let child = Command::new(guests::oncely()?)
            .arg("run")
            .current_dir(&folder)
            .env("ONCELY_DATABASE", world.database.url())
            .env("ONCELY_NATS", world.nats.url())
            .env("ONCELY_LISTEN", "127.0.0.1:0")
            .env("ONCELY_HTTP", "127.0.0.1:0")
            .env("ONCELY_LOG_FORMAT", "json")
            .envs(world.host_env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log)
            .spawn()
            .context("start a host")?;
        Ok(RunningHost { folder, child })
    }

    /// The process id of the host.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops the host gracefully.
    pub fn stop(mut self) -> Result<()> {
        signal(self.pid(), "TERM")?;
        let status = tokio::task::block_in_place(|| self.child.wait()).context("stop a host")?;
        ensure!(status.success(), "{status}:\n{}", self.log());
        Ok(())
    }

    /// The folder of the host.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until the host runs all deployments.
    pub async fn ready(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            // Without its own file, commands would find the `host.json` of a parent folder.
            let is_there = self.folder.join(".oncely/host.json").exists();
            let status = self.oncely(&["status", "--json"]);
            if is_there
                && let Ok(status) = &status
                && serde_json::from_str::<Value>(status)?.get("ready") == Some(&Value::Bool(true))
            {
                return Ok(());
            }
            if Instant::now() > end || self.child.try_wait()?.is_some() {
                bail!("the host is not ready:\n{}", self.log());
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// The base URL of the ingress.
    pub fn ingress_url(&self) -> Result<String> {
        let text = std::fs::read_to_string(self.folder.join(".oncely/host.json"))
            .context("read the host file")?;
        let file: Value = serde_json::from_str(&text)?;
        file.get("http")
            .and_then(Value::as_str)
            .map(str::to_owned)
            .context("the host has no ingress address")
    }

    /// Runs a command against this host.
    pub fn oncely(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(guests::oncely()?)
            .args(args)
            .current_dir(&self.folder)
            .output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The version of the first worker on this host.
    pub fn version(&self) -> Result<Option<u64>> {
        let workers: Value = serde_json::from_str(&self.oncely(&["workers", "--json"])?)?;
        Ok(workers.pointer("/0/version").and_then(Value::as_u64))
    }

    /// Waits until the host runs this version.
    pub async fn until_version(&self, version: u64) -> Result<()> {
        self.eventually(format!("version {version} runs"), || async {
            let running = self.version()?;
            ensure!(running == Some(version), "{running:?} runs");
            Ok(Some(()))
        })
        .await
    }

    /// Like [`eventually`], with the host's log in the error.
    pub async fn eventually<T, F>(
        &self,
        description: impl Display,
        probe: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<Option<T>>>,
    {
        let found = eventually(description, probe).await;
        found.map_err(|error| anyhow!("{error:#}; host log:\n{}", self.log()))
    }

    /// The number of messages this host has handled since its start.
    pub fn handled(&self) -> Result<u64> {
        let workers: Value = serde_json::from_str(&self.oncely(&["workers", "--json"])?)?;
        Ok(workers
            .pointer("/0/done")
            .and_then(Value::as_u64)
            .unwrap_or_default())
    }

    /// The complete log of the host.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for RunningHost {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = compiled::save(&self.folder.join(".oncely"));
    }
}
