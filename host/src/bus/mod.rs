//! NATS JetStream: streams, durable pull consumers, and publishing that waits for the stream's answer.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::connection::State;
use async_nats::jetstream;
use async_nats::jetstream::context::{AccountError, AccountErrorKind, ContextBuilder};
use async_nats::{Auth, AuthError, ConnectErrorKind, ConnectOptions, Event};
use tokio::sync::watch;

use crate::config::Nats;
use crate::model::hint::WithHint;
use connection::Connection;
use installation::Owner;
use login::ConnectAuth;
use publisher::Publisher;

mod alarms;
mod connection;
mod decode;
mod denials;
mod feed;
mod installation;
mod login;
mod publish;
mod publisher;
mod pull;
mod pull_requests;
mod raw;
mod server;
mod streams;
mod watermarks;
mod wire;

pub use alarms::{AlarmConsumer, AlarmMessage};
pub use feed::{Feed, FeedEvent};
pub use installation::OtherInstallation;
pub use publish::{OutgoingMessage, PublishAck, PublishError, PublishResult};
pub use pull::{
    Backlog, ConsumerAckFloor, ConsumerState, DeliveredMessage, Probe, Progress, PullConsumer,
    Receipt, Subscription, UnhandledMessages,
};
pub use raw::MessageComparison;
pub use server::EmbeddedServer;
pub use streams::{
    EnsuredStream, ScannedMessage, StartPosition, StreamInfo, StreamSpec, is_permanent_error,
    stream_for_subject,
};
pub use watermarks::{StoredWatermark, WATERMARK_STREAM, watermark_stream};

/// How long one request to JetStream may take, and the answer to one publication.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The most it waits between two attempts to connect again.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

const NO_SERVER_HINT: &str =
    "is the server running? `oncely dev` starts one of its own; --nats names another";

const WRONG_LOGIN_HINT: &str =
    "log in with --nats-creds FILE, --nats-context NAME, or ONCELY_NATS=nats://user:password@host";

/// A connection to NATS. It reconnects by itself until [`Bus::closed`]. Cheap to clone.
#[derive(Clone)]
pub struct Bus {
    client: async_nats::Client,
    context: jetstream::Context,
    /// Counts connections: when it moves, whatever waited on the old one has to ask again.
    connections: watch::Receiver<u64>,
    stream_cache: Arc<tokio::sync::Mutex<Option<StreamCache>>>,
    /// How to reach NATS, and further connections to it as soon as they are needed.
    nats: Arc<Nats>,
    deliveries: Arc<OnceLock<Connection>>,
    publisher: Arc<OnceLock<Publisher>>,
    /// None for a bus that asks nobody whose something is.
    owner: Option<Arc<Owner>>,
    /// How many servers keep each stream that is made; none for as many as there are, up to three.
    replicas: Option<usize>,
}

/// All streams, and as of when.
type StreamCache = (Instant, Arc<Vec<StreamInfo>>);

impl Bus {
    /// Connects; an error when no server answers, or one without JetStream.
    pub async fn connect(nats: &Nats) -> Result<Bus> {
        let (sender, connections) = watch::channel(0_u64);
        let client = options(nats)
            .name("oncely")
            .max_reconnects(None)
            .reconnect_delay_callback(reconnect_delay)
            .connection_timeout(Duration::from_secs(5))
            .event_callback(move |event| {
                on_event(&event, &sender);
                std::future::ready(())
            })
            .connect(nats.servers.clone())
            .await
            .map_err(|error| {
                let hint = match error.kind() {
                    ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
                        WRONG_LOGIN_HINT
                    }
                    _ => NO_SERVER_HINT,
                };
                anyhow::Error::from(error).hint(hint)
            })
            .with_context(|| format!("connect to NATS at {}", nats.redacted()))?;
        let context = ContextBuilder::new()
            .api_prefix(nats.api_prefix())
            .timeout(REQUEST_TIMEOUT)
            .ack_timeout(REQUEST_TIMEOUT)
            .build(client.clone());
        wait_for_jetstream(&context)
            .await
            .with_context(|| format!("ask NATS at {} for JetStream", nats.redacted()))
            .hint("start the server with JetStream: nats-server --jetstream")?;
        Ok(Bus {
            client,
            context,
            connections,
            stream_cache: Arc::default(),
            nats: Arc::new(nats.clone()),
            deliveries: Arc::default(),
            publisher: Arc::default(),
            owner: None,
            replicas: None,
        })
    }

    /// The largest message the server takes, headers included, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    pub fn is_connected(&self) -> bool {
        // The count's sender lives as long as the client's own tasks do; without them the state is a stale one.
        let is_alive = self.connections.has_changed().is_ok();
        is_alive && self.client.connection_state() == State::Connected
    }

    /// Changes with each new connection to NATS.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// The connection for messages that streams deliver, opened at the first call.
    async fn deliveries(&self) -> Result<Connection> {
        let open = || Connection::start(Nats::clone(&self.nats), "oncely-deliveries");
        let connection = self.deliveries.get_or_init(open);
        connection.ready().await?;
        Ok(connection.clone())
    }

    /// Publications have a connection of their own, opened at the first call.
    fn publisher(&self) -> &Publisher {
        let open = || Connection::start(Nats::clone(&self.nats), "oncely-publications");
        self.publisher
            .get_or_init(|| Publisher::new(open(), self.client.new_inbox()))
    }

    /// Returns when the client has ended: it reads the server's words in tasks of its own, and ends with them. It does not
    /// come back: make another.
    pub async fn closed(&self) {
        let mut connections = self.connections.clone();
        while connections.changed().await.is_ok() {}
    }

    /// Returns once everything sent so far, acknowledgements among it, is on its way to the server.
    pub async fn flush(&self) -> Result<()> {
        tokio::time::timeout(REQUEST_TIMEOUT, self.client.flush())
            .await
            .context("send what is buffered for NATS in time")?
            .context("send what is buffered for NATS")
    }
}

/// How long JetStream may be without a leader when a host starts.
const LEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits for a leader of a cluster that chooses one; a server without JetStream says so at once.
async fn wait_for_jetstream(context: &jetstream::Context) -> Result<(), AccountError> {
    let end = Instant::now() + LEADER_TIMEOUT;
    let mut is_logged = false;
    loop {
        match context.query_account().await {
            Err(error) if error.kind() == AccountErrorKind::TimedOut && Instant::now() < end => {
                if !is_logged {
                    tracing::warn!("the start waits for JetStream: it does not answer");
                }
                is_logged = true;
            }
            answer => return answer.map(drop),
        }
    }
}

/// How the client library connects. It reads the credentials again for each connection.
fn options(nats: &Nats) -> ConnectOptions {
    let nats_config = nats.clone();
    let mut options = ConnectOptions::with_auth_callback(move |nonce| {
        let nats = nats_config.clone();
        async move {
            let ConnectAuth {
                user,
                password,
                token,
                jwt,
                nkey,
                signature,
            } = login::connect_auth(&nats, &nonce)
                .await
                .map_err(|error| AuthError::new(format!("{error:#}")))?;
            let mut auth = Auth::new();
            (auth.username, auth.password, auth.token) = (user, password, token);
            (auth.jwt, auth.nkey, auth.signature) = (jwt, nkey, signature);
            Ok(auth)
        }
    });
    if nats.tls_first {
        options = options.tls_first();
    }
    if let Some(prefix) = &nats.inbox_prefix {
        options = options.custom_inbox_prefix(prefix);
    }
    if let Some(path) = &nats.root_certificate {
        options = options.add_root_certificates(path.clone());
    }
    if let Some((certificate, key)) = &nats.client_certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options
}

/// The first attempt at once, the next ones 50 ms, 100 ms and so on apart.
fn reconnect_delay(attempt: usize) -> Duration {
    match u32::try_from(attempt) {
        Ok(0 | 1) => Duration::ZERO,
        Ok(attempt) if attempt < 8 => {
            (Duration::from_millis(25) * 2_u32.pow(attempt - 1)).min(RECONNECT_DELAY_MAX)
        }
        _ => RECONNECT_DELAY_MAX,
    }
}

/// Passes on what happened to the connection.
fn on_event(event: &Event, connections: &watch::Sender<u64>) {
    match event {
        Event::Connected => {
            connections.send_modify(|count| *count += 1);
            tracing::info!("connected to NATS");
        }
        Event::Disconnected => tracing::warn!("the connection to NATS is gone; connecting again"),
        Event::ServerError(error) => tracing::warn!("NATS complains: {error}"),
        other => tracing::debug!("nats: {other}"),
    }
}
