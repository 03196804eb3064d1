//! `oncely dev`: everything on this machine, with nothing set up before: SQLite, a nats-server child, your workers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use super::build::component_of;
use super::client::{DATA_DIR, make_data_dir};
use super::deploy::{propose, show_plan};
use super::serve::{Serve, Served, open_store};
use super::term;
use crate::bus::{Bus, BusOptions, EmbeddedServer};
use crate::config::Retention;
use crate::deploy;
use crate::hint::WithHint;
use crate::manifest::Manifest;

/// How long the workers may take until their subscriptions are seen.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long a drain may take.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);

/// The control API's port, unless it is taken.
const PORT: u16 = 7420;

/// Runs everything on this machine: SQLite in .oncely/, a nats-server of its own, and the workers of your manifests.
#[derive(Debug, Args)]
pub struct Dev {
    /// Manifests to deploy, or folders that hold an oncely.toml. Default: this folder's, if there is one.
    manifests: Vec<PathBuf>,
    /// Where everything is kept.
    #[arg(long, default_value = DATA_DIR, value_name = "FOLDER")]
    data_dir: PathBuf,
    /// Use this NATS server rather than a child.
    #[arg(long, value_name = "URL", conflicts_with = "nats_port")]
    nats: Option<String>,
    /// The port of the nats-server child. Default: the one it had before, else a free one.
    #[arg(long, value_name = "PORT")]
    nats_port: Option<u16>,
    /// Use this database rather than SQLite in the data folder.
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Where the control API listens. Default: 127.0.0.1:7420, or a free port if that is taken.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::SocketAddr>,
}

impl Dev {
    pub async fn run(self) -> Result<()> {
        let data_dir = make_data_dir(&self.data_dir)?;
        let manifests = self.manifests()?;
        let database = self.database.clone().unwrap_or_else(|| data_dir.join("oncely.db").display().to_string());
        let store = open_store(&database, 16).await?;
        let server = self.nats_server(&data_dir).await?;
        let url = match (&self.nats, &server) {
            (Some(url), _) => url.clone(),
            (None, Some(server)) => server.url(),
            (None, None) => anyhow::bail!("there is no NATS server to use"),
        };
        let bus = Bus::connect(&BusOptions { url: Some(url.clone()), ..BusOptions::default() }).await?;
        let token = format!("oncely_{}", hex::encode(Sha256::digest(rand::random::<[u8; 32]>())));
        let serve = Serve {
            store,
            bus,
            listener: self.listener().await?,
            token: &token,
            data_dir: &data_dir,
            retention: Retention::default(),
            nats: url.clone(),
            database: database.clone(),
        };
        let served = serve.start().await?;
        for manifest in &manifests {
            deploy_here(&served, manifest).await?;
        }
        served.host.reconcile().await?;
        served.ready(READY_WITHIN).await?;
        announce(&served, &url, &database, &data_dir).await;
        let ended = served.until_signal(DRAIN_WITHIN).await;
        if let Some(server) = server {
            server.stop().await?;
        }
        ended
    }

    /// The manifests named, or the one of this folder.
    fn manifests(&self) -> Result<Vec<Manifest>> {
        let here = [PathBuf::from(".")];
        let paths: &[PathBuf] = if self.manifests.is_empty() && Path::new("oncely.toml").exists() {
            &here
        } else {
            &self.manifests
        };
        paths.iter().map(|path| Manifest::load(path)).collect()
    }

    async fn nats_server(&self, data_dir: &Path) -> Result<Option<EmbeddedServer>> {
        if self.nats.is_some() {
            return Ok(None);
        }
        Ok(Some(EmbeddedServer::start(data_dir, self.nats_port).await?))
    }

    async fn listener(&self) -> Result<TcpListener> {
        if let Some(address) = self.listen {
            return TcpListener::bind(address)
                .await
                .with_context(|| format!("listen on {address}"))
                .hint("name another address with --listen");
        }
        match TcpListener::bind(("127.0.0.1", PORT)).await {
            Ok(listener) => Ok(listener),
            Err(_) => TcpListener::bind(("127.0.0.1", 0)).await.context("listen on a free port"),
        }
    }
}

/// Builds and deploys the workers of a manifest in this very process.
async fn deploy_here(served: &Served, manifest: &Manifest) -> Result<()> {
    manifest.warnings().iter().for_each(|warning| term::note(&format!("warning: {warning}")));
    let host = &served.host;
    for entry in &manifest.workers {
        let component = component_of(entry)?;
        let wasm = std::fs::read(&component).with_context(|| format!("read {}", component.display()))?;
        let digest = hex::encode(Sha256::digest(&wasm));
        host.load(wasm.clone())
            .await
            .with_context(|| format!("check the component of worker {}", entry.worker.name))?;
        host.store.put_component(&digest, &wasm).await?;
        let proposal = propose(manifest, entry, digest, host.store.dialect())?;
        let (plan, _) = deploy::deploy(host, &proposal).await?;
        show_plan(&plan);
    }
    Ok(())
}

/// Says where everything is.
async fn announce(served: &Served, nats: &str, database: &str, data_dir: &Path) {
    term::details(&[
        ("control API", format!("http://{}", served.address)),
        ("nats", nats.to_owned()),
        ("database", database.to_owned()),
        ("data folder", data_dir.display().to_string()),
    ]);
    for state in served.host.workers().await {
        let version = state.version.map_or_else(String::new, |version| version.to_string());
        let stream = state.stream.unwrap_or_default();
        term::data(&format!(
            "worker {} version {version} is {}: {stream} {}",
            state.worker,
            state.state,
            state.subjects.join(" ")
        ));
    }
    term::data("ready; stop with Ctrl-C");
}
