//! Shared by `dev` and `run`: start a host and its control API, wait for a signal, drain.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::client::{COMPILED_DIR, HostFile, make_archive};
use super::exit::Exit;
use super::log_line::SingleLineWriter;
use super::signals::Signals;
use crate::alarms::WebhookClient;
use crate::api::{self, Authenticator};
use crate::bus::Bus;
use crate::config::{Database, GuestSql, HostConfig, HttpLimits, LogFormat, RelayMode};
use crate::console::{self, Console};
use crate::drain::Stop;
use crate::guest::GuestEngine;
use crate::http_server::{self, LateRouter};
use crate::model::hint::WithHint;
use crate::runtime::{Host, HostOptions, HostTasks, Retention};
use crate::store::{PostgresStore, SqliteStore, Store};

/// The reason that a host stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    Signal,
    /// The host has to be started again.
    NatsClientEnded,
}

/// A host that runs in this process.
pub struct HostProcess {
    pub host: Arc<Host>,
    /// The address of the control API.
    pub address: SocketAddr,
    /// The pages of the control API.
    pub console: Arc<Console>,
    /// The address of the ingress, if there is one.
    pub http: Option<SocketAddr>,
    running: HostTasks,
    stop_ingress: Stop,
    ingress: Option<tokio::task::JoinHandle<()>>,
    stop_api: Stop,
    api: tokio::task::JoinHandle<()>,
    data_dir: PathBuf,
    drain: Duration,
}

impl HostProcess {
    /// Starts the host, its workers, its control API and its ingress.
    ///
    /// # Errors
    /// The configuration cannot be used, or the database or NATS is unreachable.
    pub async fn start(
        config: &HostConfig,
        listener: TcpListener,
        requests: Option<TcpListener>,
    ) -> Result<HostProcess> {
        // Answer probes while the host starts.
        let address = listener
            .local_addr()
            .context("read the address of the control API")?;
        let (for_requests, for_control) = http_server::within_file_limit(
            config.http_limits,
            HttpLimits::CONTROL,
            config.pool_size,
        );
        let control_api = LateRouter::new(api::starting());
        let stop_api = Stop::new();
        let api = tokio::spawn(http_server::serve(
            "control API",
            listener,
            control_api.router(),
            for_control,
            stop_api.stopping(),
        ));

        // Connect to the database and to NATS.
        make_archive(config)?;
        let store = open_store(config).await?;
        let bus = Bus::connect(&config.nats).await.map_err(unreachable)?;
        let bus = bus
            .for_installation(store.installation(), config.take_over.clone())
            .with_replicas(config.stream_replicas);

        // Start the host.
        let token = config.load_or_create_token()?;
        let compiled = config.data_dir.join(COMPILED_DIR);
        let retention = Retention::of(config);
        let poster = |webhook| WebhookClient::new(webhook, config.webhook_secret.as_ref());
        let webhook = config
            .webhook
            .clone()
            .map(poster)
            .transpose()
            .context("set up the webhook")?;
        let engine = GuestEngine::new(&compiled, config.compile.clone())?;
        let options = HostOptions {
            config: Arc::new(config.clone()),
            retention,
            admission: config.admission.clone(),
            webhook,
            cache: config.cache.clone(),
            component_keys: config.component_keys.clone(),
            traces: config.traces.clone(),
        };
        let (host, running) = Host::start(store, bus, engine, options).await?;

        // Serve the control API and the console.
        let store = Arc::clone(&host.services.store);
        let authenticator = Arc::new(Authenticator::new(token.reveal(), store));
        let console = Console::new(Arc::clone(&host), Arc::clone(&authenticator), config);
        let pages = console::router(Arc::clone(&console));
        control_api.set(api::router(Arc::clone(&host), authenticator).merge(pages));

        // Serve the ingress.
        let stop_ingress = Stop::new();
        let http = requests
            .as_ref()
            .map(TcpListener::local_addr)
            .transpose()
            .context("read the address for requests")?;
        let ingress = requests.map(|requests| {
            let router = Arc::clone(&host.ingress).router();
            tokio::spawn(http_server::serve(
                "requests",
                requests,
                router,
                for_requests,
                stop_ingress.stopping(),
            ))
        });

        // Write the file by which the CLI finds this host.
        HostFile {
            url: format!("http://{address}"),
            token: token.reveal().to_owned(),
            http: http.map(|address| format!("http://{address}")),
            nats: config.nats.redacted(),
            database: config.database.redacted(),
            pid: std::process::id(),
        }
        .write(&config.data_dir)?;
        let (data_dir, drain) = (config.data_dir.clone(), config.drain);
        Ok(HostProcess {
            host,
            address,
            console,
            http,
            running,
            stop_ingress,
            ingress,
            stop_api,
            api,
            data_dir,
            drain,
        })
    }

    /// Completes the start, and waits until the host is ready.
    ///
    /// It is ready when the server has confirmed the subscriptions of the workers. A held host is
    /// not waited for: only an operator can release it.
    ///
    /// # Errors
    /// The host is not ready after `limit`.
    pub async fn ready(&self, limit: Duration) -> Result<()> {
        self.host.set_started();
        let ready = async {
            while let Err(why) = self.host.readiness().await {
                if self.host.hold().is_some() {
                    return;
                }
                tracing::debug!(reason = why, "not ready");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        match tokio::time::timeout(limit, ready).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let why = self.host.readiness().await.err().unwrap_or_default();
                anyhow::bail!("the host is not ready after {limit:?}: {why}")
            }
        }
    }

    /// Waits for a signal or the end of the NATS client, then drains the host.
    pub async fn run_until_stopped(self, signals: &mut Signals) -> Result<StopReason> {
        let stop_reason = tokio::select! {
            signal = signals.received() => {
                tracing::info!(signal, "draining");
                StopReason::Signal
            }
            () = self.host.services.bus.closed() => {
                // The usual cause is a message that the client cannot parse.
                tracing::error!("NATS client ended, restarting the host");
                StopReason::NatsClientEnded
            }
        };
        // Requests in progress are answered; later ones go to another host.
        self.stop_ingress.now();
        if let Some(ingress) = self.ingress {
            let _ = tokio::time::timeout(self.drain.min(INGRESS_DRAIN), ingress).await;
        }
        let drained = self.running.drain(&self.host, self.drain).await;
        self.stop_api.now();
        // Open connections of clients do not delay the end.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.api).await;
        HostFile::remove(&self.data_dir);
        // Without NATS nothing can be acknowledged or published; all of it is redelivered.
        if stop_reason == StopReason::Signal {
            drained?;
        }
        Ok(stop_reason)
    }
}

/// How long requests in progress and idle connections may take when the host ends.
const INGRESS_DRAIN: Duration = Duration::from_secs(5);

/// Binds the address of the ingress, if one is configured.
pub async fn listen_for_http(config: &HostConfig) -> Result<Option<TcpListener>> {
    let Some(address) = config.http else {
        return Ok(None);
    };
    let listener = bind(address)
        .await
        .with_context(|| format!("listen for requests on {address}"));
    listener
        .map(Some)
        .hint("stop the other host, or set another address with --http ADDRESS, or --http off")
}

/// Binds the address of the control API.
pub async fn listen(config: &HostConfig) -> Result<TcpListener> {
    bind(config.listen)
        .await
        .with_context(|| format!("listen on {}", config.listen))
        .hint("stop the other host, or set another address with --listen ADDRESS")
}

/// How long binding an address is retried: the previous host may still be exiting.
const BIND_TIMEOUT: Duration = Duration::from_secs(1);

async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let end = tokio::time::Instant::now() + BIND_TIMEOUT;
    loop {
        match TcpListener::bind(address).await {
            Err(error)
                if error.kind() == ErrorKind::AddrInUse && tokio::time::Instant::now() < end =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            bound => return bound,
        }
    }
}

async fn open_store(config: &HostConfig) -> Result<Arc<Store>> {
    let opened: Result<Store> = match &config.database {
        Database::Postgres(url) => {
            let store = match config.guest_sql {
                GuestSql::Restricted => PostgresStore::connect(url, config.pool_size).await,
                GuestSql::Trusted => PostgresStore::connect_trusted(url, config.pool_size).await,
            };
            match store {
                Ok(store) => with_wal(store, url, config).await,
                Err(error) => Err(error),
            }
        }
        Database::Sqlite(path) => SqliteStore::open(path).await.map(Store::from),
    };
    opened
        .map(Arc::new)
        .with_context(|| format!("open the database {}", config.database.redacted()))
        .hint("set the database with --database URL or ONCELY_DATABASE")
        .map_err(unreachable)
}

/// Lets the host read the WAL, and requests the configured relay mode.
///
/// WAL mode is requested only if the database allows it.
async fn with_wal(store: PostgresStore, url: &str, config: &HostConfig) -> Result<Store> {
    let url = match &config.relay_database {
        Some(Database::Postgres(url)) => url,
        _ => url,
    };
    let store = match store.with_wal(url, config.relay_slot_max) {
        Err(error) if config.relay == Some(RelayMode::Wal) => return Err(error),
        with_wal => Store::from(with_wal?),
    };
    if let (Some(relay), Some(log)) = (config.relay, store.wal()) {
        if relay == RelayMode::Wal {
            log.check().await?;
        }
        log.request_mode(relay == RelayMode::Wal).await?;
    }
    Ok(store)
}

fn unreachable(error: anyhow::Error) -> anyhow::Error {
    error.context(Exit::Unreachable.with_message("start the host"))
}

/// Log levels of libraries whose lines add nothing to ours; directives in `log_level` override
/// them.
const DEFAULT_DIRECTIVES: &str = "async_nats=warn,sqlx=error,pgwire_replication=off";

/// Sends log lines to standard error, in the configured format. `more` is another directive that
/// the configuration may override.
pub fn init_logging(config: &HostConfig, more: Option<&str>) -> Result<()> {
    let directives = [Some(DEFAULT_DIRECTIVES), more, Some(&config.log_level)];
    let directives: Vec<&str> = directives.into_iter().flatten().collect();
    let filter: Targets = directives.join(",").parse().context("read log_level")?;
    let log = tracing_subscriber::fmt::layer();
    let log = match config.log_format {
        LogFormat::Text => log
            .with_writer(|| SingleLineWriter(std::io::stderr()))
            .with_ansi(false)
            .with_target(false)
            .boxed(),
        // JSON escapes line breaks itself.
        LogFormat::Json => log
            .with_writer(std::io::stderr)
            .json()
            .flatten_event(true)
            .boxed(),
    };
    let started = tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .try_init();
    started.context("start the log")
}
