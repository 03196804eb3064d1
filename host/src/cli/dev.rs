//! `oncely dev`: all of Oncely on this machine without setup: SQLite, a child nats-server, your
//! workers.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use super::build::{BuiltComponent, EnvironmentArg, ToolchainArg};
use super::client::{DATA_DIR, make_data_dir};
use super::deploy::{propose, show_plan};
use super::lock::Lock;
use super::serve::{HostProcess, StopReason, init_logging, listen, listen_for_http};
use super::signals::Signals;
use super::term;
use super::watch::Sources;
use crate::api::Caller;
use crate::bus::EmbeddedServer;
use crate::config::manifest::{FILE_NAME, Manifest};
use crate::config::{HostConfig, HostFlags};
use crate::consumer::VERDICT_LOG;
use crate::runtime::{Host, deploy};

/// How long the subscriptions of the workers may take.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Run a host with all it needs on this machine.
///
/// It uses SQLite in .oncely/ and a nats-server of its own, and deploys the workers of your
/// manifests. When a file changes, it builds and deploys again. A broken build leaves the previous
/// version running. On a terminal it shows the result of each message.
#[derive(Debug, Args)]
pub struct Dev {
    /// Deploy these manifests, or folders that contain an oncely.toml. Default: the manifest of
    /// this folder, if there is one.
    manifests: Vec<PathBuf>,
    /// Store all data in this folder.
    #[arg(long, default_value = DATA_DIR, value_name = "FOLDER")]
    data_dir: PathBuf,
    /// Use this NATS server instead of a child nats-server.
    #[arg(long, value_name = "URL", conflicts_with = "nats_port")]
    nats: Option<String>,
    /// Take over the streams and consumers of this other installation, which no longer exists.
    #[arg(long, value_name = "ID")]
    take_over: Option<String>,
    /// Set the port of the child nats-server. Default: its previous port, else a free one.
    #[arg(long, value_name = "PORT")]
    nats_port: Option<u16>,
    /// Use this database instead of SQLite in the data folder.
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Set the address of the control API. Default: 127.0.0.1:7420, or a free port if that is
    /// taken.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Set the address for HTTP requests. Default: 127.0.0.1:7480, or a free port if that is taken.
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// Allow POST /publish/SUBJECT for these subjects, separated by commas.
    #[arg(long, value_name = "SUBJECTS")]
    http_publish: Option<String>,
    /// Do not build and deploy again when files change.
    #[arg(long, env = "ONCELY_NO_WATCH")]
    no_watch: bool,
    #[command(flatten)]
    toolchain: ToolchainArg,
    #[command(flatten)]
    environment: EnvironmentArg,
}

impl Dev {
    pub async fn run(self) -> Result<()> {
        let manifests = self.manifests()?;
        let data_dir = make_data_dir(&self.data_dir)?;
        let _folder = Lock::folder(&data_dir).await?;
        let server = self.nats_server(&data_dir).await?;
        let ended = self.serve(&data_dir, manifests, server.as_ref()).await;
        if let Some(server) = server {
            server.stop().await?;
        }
        ended
    }

    async fn serve(
        self,
        data_dir: &Path,
        manifests: Vec<Manifest>,
        server: Option<&EmbeddedServer>,
    ) -> Result<()> {
        let config = self.config(data_dir, server)?;
        let verdicts = format!("{VERDICT_LOG}=debug");
        let shows_verdicts = std::io::stderr().is_terminal();
        init_logging(&config, shows_verdicts.then_some(verdicts.as_str()))?;
        let _database = Lock::database(&config.database).await?;
        let mut signals = Signals::listen()?;
        let mut manifests = manifests;
        while self.serve_once(&config, &manifests, &mut signals).await?
            == StopReason::NatsClientEnded
        {
            // A change may have been deployed meanwhile.
            if let Ok(changed) = self.manifests() {
                manifests = changed;
            }
        }
        Ok(())
    }

    async fn serve_once(
        &self,
        config: &HostConfig,
        manifests: &[Manifest],
        signals: &mut Signals,
    ) -> Result<StopReason> {
        let listener = self.listener(config).await?;
        let requests = self.requests(config).await?;
        let host_process = tokio::select! {
            biased;
            _ = signals.received() => return Ok(StopReason::Signal),
            host_process = HostProcess::start(config, listener, requests) => host_process?,
        };
        // Listed before the first build, which may take minutes.
        let sources: Vec<Sources> = match self.no_watch {
            true => Vec::new(),
            false => manifests
                .iter()
                .map(|manifest| Sources::of(manifest, config))
                .collect(),
        };
        tokio::select! {
            biased;
            _ = signals.received() => {}
            deployed = self.deploy_all(&host_process, config, manifests) => deployed?,
        }
        let watching = self.watch(&host_process, config, sources);
        let ended = host_process.run_until_stopped(signals).await;
        watching.iter().for_each(AbortHandle::abort);
        ended
    }

    /// Starts to build and deploy the manifests again when their files change.
    fn watch(
        &self,
        host_process: &HostProcess,
        config: &HostConfig,
        sources: Vec<Sources>,
    ) -> Vec<AbortHandle> {
        let mut watching = Vec::new();
        for (path, mut sources) in self.paths().into_iter().zip(sources) {
            let (host, toolchain) = (Arc::clone(&host_process.host), self.toolchain);
            let (config, environment) = (config.clone(), self.environment.clone());
            let task = tokio::spawn(async move {
                while let Ok(changed) = sources.changed().await {
                    let began = Instant::now();
                    show_changed(&changed);
                    // Whatever is wrong with the new sources, the previous version keeps running.
                    match redeploy(&host, &config, &path, environment.name(), toolchain).await {
                        Ok(next) => {
                            sources = next;
                            let took = began.elapsed().as_secs_f64();
                            term::note(format!("deployed in {took:.1} s"));
                        }
                        Err(error) => {
                            term::error(&error);
                            term::note("the previous version keeps running");
                        }
                    }
                }
            });
            watching.push(task.abort_handle());
        }
        watching
    }

    /// Deploys the manifests, waits until their workers run, and prints the addresses.
    async fn deploy_all(
        &self,
        host_process: &HostProcess,
        config: &HostConfig,
        manifests: &[Manifest],
    ) -> Result<()> {
        for manifest in manifests {
            deploy_in_process(&host_process.host, manifest, self.toolchain).await?;
        }
        host_process.host.reconcile().await?;
        host_process.ready(READY_TIMEOUT).await?;
        if let Some(hold) = host_process.host.hold() {
            term::warning(hold);
        }
        print_addresses(host_process, config).await
    }

    /// The manifests on the command line, or the one of this folder.
    fn manifests(&self) -> Result<Vec<Manifest>> {
        let paths = self.paths();
        let load = |path: &PathBuf| Manifest::load(path, self.environment.name());
        paths.iter().map(load).collect()
    }

    fn paths(&self) -> Vec<PathBuf> {
        if self.manifests.is_empty() && Path::new(FILE_NAME).exists() {
            return vec![PathBuf::from(".")];
        }
        self.manifests.clone()
    }

    async fn nats_server(&self, data_dir: &Path) -> Result<Option<EmbeddedServer>> {
        if self.nats.is_some() {
            return Ok(None);
        }
        let server = EmbeddedServer::start(data_dir, self.nats_port).await?;
        if server.was_running() {
            term::note(format!(
                "using the nats-server of the previous run, which is still running: {}",
                server.url()
            ));
        }
        Ok(Some(server))
    }

    fn config(&self, data_dir: &Path, server: Option<&EmbeddedServer>) -> Result<HostConfig> {
        let mut config = HostConfig::load(&HostFlags {
            database: self.database.clone(),
            nats: self
                .nats
                .clone()
                .or_else(|| server.map(EmbeddedServer::url)),
            take_over: self.take_over.clone(),
            listen: self.listen.clone(),
            http: self.http.clone(),
            http_publish: self.http_publish.clone(),
            data_dir: Some(data_dir.display().to_string()),
            ..HostFlags::default()
        })?;
        config.compile.keeps_functions = true;
        Ok(config)
    }

    async fn listener(&self, config: &HostConfig) -> Result<TcpListener> {
        match listen(config).await {
            // Another `oncely dev` may run in another folder.
            Err(_) if is_unset(self.listen.as_deref(), "ONCELY_LISTEN") => {
                TcpListener::bind((config.listen.ip(), 0))
                    .await
                    .context("listen on a free port")
            }
            listener => listener,
        }
    }

    async fn requests(&self, config: &HostConfig) -> Result<Option<TcpListener>> {
        match (listen_for_http(config).await, config.http) {
            (Err(_), Some(address)) if is_unset(self.http.as_deref(), "ONCELY_HTTP") => {
                TcpListener::bind((address.ip(), 0))
                    .await
                    .map(Some)
                    .context("listen for requests on a free port")
            }
            (listener, _) => listener,
        }
    }
}

/// Whether a setting of `oncely dev` has its default. An address that was set is never replaced.
fn is_unset(flag: Option<&str>, variable: &str) -> bool {
    flag.is_none() && std::env::var_os(variable).is_none()
}

/// Builds and deploys a manifest again. Returns its sources from before the build: a change during
/// the build is another change.
async fn redeploy(
    host: &Host,
    config: &HostConfig,
    path: &Path,
    environment: Option<&str>,
    toolchain: ToolchainArg,
) -> Result<Sources> {
    let manifest = Manifest::load(path, environment)?;
    let sources = Sources::of(&manifest, config);
    deploy_in_process(host, &manifest, toolchain).await?;
    host.reconcile().await?;
    Ok(sources)
}

/// Names the first changed files.
fn show_changed(changed: &[PathBuf]) {
    let names: Vec<String> = changed
        .iter()
        .take(3)
        .map(|path| path.display().to_string())
        .collect();
    let more = match changed.len().saturating_sub(names.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    term::note(format!("changed: {}{more}", names.join(", ")));
}

/// Builds and deploys the workers of a manifest in this process.
async fn deploy_in_process(
    host: &Host,
    manifest: &Manifest,
    toolchain: ToolchainArg,
) -> Result<()> {
    manifest.warnings().iter().for_each(term::warning);
    for entry in &manifest.workers {
        let mut built = BuiltComponent::build(entry, toolchain).await?;
        let wasm = std::mem::take(&mut built.wasm);
        let digest = host.services.add_component(wasm.into()).await;
        let digest = digest.with_context(|| built.error_context(entry))?;
        let dialect = host.services.store.dialect();
        let proposal = propose(manifest, entry, built, digest, dialect).await?;
        let (plan, _) = deploy::deploy(host, &proposal).await?;
        show_plan(&plan);
    }
    Ok(())
}

/// Prints the addresses and the workers.
async fn print_addresses(host_process: &HostProcess, config: &HostConfig) -> Result<()> {
    term::data(term::details([
        ("control API", format!("http://{}", host_process.address)),
        (
            "console",
            format!(
                "http://{}{}",
                host_process.address,
                host_process.console.login_path(Caller::host())
            ),
        ),
        (
            "requests",
            host_process
                .http
                .map_or_else(|| "none".to_owned(), |address| format!("http://{address}")),
        ),
        ("nats", config.nats.redacted()),
        ("database", config.database.redacted()),
        ("data folder", config.data_dir.display().to_string()),
    ]))?;
    for state in host_process.host.workers().await {
        let version = state
            .version
            .map_or_else(String::new, |version| format!(" version {version}"));
        let takes = match &state.stream {
            Some(stream) => format!("{stream} {}", state.subjects.join(" ")),
            None => state.routes.join(" · "),
        };
        let takes = if takes.is_empty() {
            takes
        } else {
            format!(": {takes}")
        };
        term::data(format!(
            "worker {}{version} is {}{takes}",
            state.worker, state.state
        ))?;
    }
    term::data("ready; stop with Ctrl-C")
}
