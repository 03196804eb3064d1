//! What `dev` and `run` share: start a host and its control API, wait for a signal, drain.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::client::{HOST_FILE, HostFile};
use crate::api;
use crate::bus::Bus;
use crate::drain::Stop;
use crate::host::{Host, Retention, Running};
use crate::store::{PostgresStore, SqliteStore, Store};

/// A host that runs in this process.
pub struct Served {
    pub host: Arc<Host>,
    /// Where the control API listens.
    pub address: SocketAddr,
    running: Running,
    stop_api: Stop,
    api: tokio::task::JoinHandle<Result<()>>,
    data_dir: PathBuf,
}

/// What a host is started with.
pub struct Serve<'s> {
    pub store: Arc<dyn Store>,
    pub bus: Bus,
    pub listener: TcpListener,
    pub token: &'s str,
    pub data_dir: &'s Path,
    pub retention: Retention,
    /// For the host file: where NATS and the database are, without credentials.
    pub nats: String,
    pub database: String,
}

impl Serve<'_> {
    /// Starts the host, its workers and its control API.
    pub async fn start(self) -> Result<Served> {
        let cache = self.data_dir.join("components");
        let (host, running) = Host::start(self.store, self.bus, &cache, self.retention).await?;
        let address = self.listener.local_addr().context("read the address of the control API")?;
        let stop_api = Stop::new();
        let mut stopping = stop_api.stopping();
        let (served_host, token) = (Arc::clone(&host), self.token.to_owned());
        let api = tokio::spawn(async move {
            api::serve(served_host, self.listener, &token, async move { stopping.stopped().await }).await
        });
        HostFile {
            url: format!("http://{address}"),
            token: self.token.to_owned(),
            nats: self.nats,
            database: self.database,
            pid: std::process::id(),
        }
        .write(self.data_dir)?;
        Ok(Served { host, address, running, stop_api, api, data_dir: self.data_dir.to_owned() })
    }
}

impl Served {
    /// Waits until the workers' subscriptions are seen on the server.
    pub async fn ready(&self, limit: Duration) -> Result<()> {
        let ready = async {
            loop {
                match self.host.ready().await {
                    Ok(()) => return,
                    Err(why) => tracing::debug!("not ready: {why}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(limit, ready).await.context("wait for the workers to be ready")
    }

    /// Waits for SIGTERM or SIGINT, then stops in good order within `limit`.
    pub async fn until_signal(self, limit: Duration) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
        let drained = self.running.drain(&self.host, limit).await;
        self.stop_api.now();
        // Clients that hold a connection open do not hold up the end.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.api).await;
        let _ = std::fs::remove_file(self.data_dir.join(HOST_FILE));
        drained
    }
}

/// Opens the database a URL names: `postgres://…`, or SQLite by path or `sqlite:` URL.
pub async fn open_store(url: &str, pool: u32) -> Result<Arc<dyn Store>> {
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Ok(Arc::new(PostgresStore::connect(url, pool).await?));
    }
    let path = url.strip_prefix("sqlite://").or_else(|| url.strip_prefix("sqlite:")).unwrap_or(url);
    Ok(Arc::new(SqliteStore::open(Path::new(path)).await?))
}
