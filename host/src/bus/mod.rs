//! NATS JetStream: streams, durable pull consumers, and publishing confirmed by the stream's
//! acknowledgement.

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
mod backlog;
mod checkpoints;
mod connection;
mod decode;
mod denials;
mod feed;
mod inspection;
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
pub use backlog::StreamRange;
pub use feed::{Feed, FeedEvent};
pub use inspection::{ChangedSetting, ConsumerFacts, ServerFacts, StreamFacts};
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

/// The timeout of one JetStream request, and of the acknowledgement of one message.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest delay between two reconnect attempts.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

/// The hint for a server that does not answer.
pub const NO_SERVER_HINT: &str =
    "start the server, use `oncely dev`, which starts one, or set its address with --nats";

const WRONG_LOGIN_HINT: &str =
    "log in with --nats-creds FILE, --nats-context NAME, or ONCELY_NATS=nats://user:password@host";

/// A connection to NATS. It reconnects until [`Bus::closed`]. Cheap to clone.
#[derive(Clone)]
pub struct Bus {
    client: async_nats::Client,
    context: jetstream::Context,
    /// The number of connections so far. After a change, requests made over the old one have to be
    /// repeated.
    connections: watch::Receiver<u64>,
    stream_cache: Arc<tokio::sync::Mutex<Option<StreamCache>>>,
    /// The connection settings, also for the connections that are opened on first use.
    nats: Arc<Nats>,
    deliveries: Arc<OnceLock<Connection>>,
    publisher: Arc<OnceLock<Publisher>>,
    /// `None` for a bus that does not check the owners of resources.
    owner: Option<Arc<Owner>>,
    /// Replicas of each created stream; `None` for as many as there are servers, up to three.
    replicas: Option<usize>,
}

/// All streams, and the time of the listing.
type StreamCache = (Instant, Arc<Vec<StreamInfo>>);

impl Bus {
    /// Connects to NATS.
    ///
    /// # Errors
    /// No server answers, the login is refused, or the server has no JetStream.
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

        // Check JetStream.
        let context = ContextBuilder::new()
            .api_prefix(nats.api_prefix())
            .timeout(REQUEST_TIMEOUT)
            .ack_timeout(REQUEST_TIMEOUT)
            .build(client.clone());
        wait_for_jetstream(&context)
            .await
            .with_context(|| format!("query JetStream of NATS at {}", nats.redacted()))
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

    /// Whether the client is connected to NATS, according to its last known state.
    pub fn is_connected(&self) -> bool {
        // The counter's sender lives as long as the client's own tasks; without them the state is
        // stale.
        let is_alive = self.connections.has_changed().is_ok();
        is_alive && self.client.connection_state() == State::Connected
    }

    /// Changes with each new connection to NATS.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// The connection for messages that streams deliver, opened on first use.
    async fn deliveries(&self) -> Result<Connection> {
        let open = || Connection::start(Nats::clone(&self.nats), "oncely-deliveries");
        let connection = self.deliveries.get_or_init(open);
        connection.ready().await?;
        Ok(connection.clone())
    }

    /// The publisher, which has its own connection, opened on first use.
    fn publisher(&self) -> &Publisher {
        let open = || Connection::start(Nats::clone(&self.nats), "oncely-publications");
        self.publisher
            .get_or_init(|| Publisher::new(open(), self.client.new_inbox()))
    }

    /// Returns when the client's tasks have ended. Such a client does not reconnect; a new bus is
    /// needed.
    pub async fn closed(&self) {
        let mut connections = self.connections.clone();
        while connections.changed().await.is_ok() {}
    }

    /// Returns once everything sent so far, acknowledgements included, is on its way to the server.
    pub async fn flush(&self) -> Result<()> {
        tokio::time::timeout(REQUEST_TIMEOUT, self.client.flush())
            .await
            .context("flush the NATS client in time")?
            .context("flush the NATS client")
    }
}

/// How long JetStream, or a stream, may lack a leader when a host starts.
pub const LEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits until the cluster has elected a JetStream leader; a server without JetStream reports an
/// error at once.
async fn wait_for_jetstream(context: &jetstream::Context) -> Result<(), AccountError> {
    let end = Instant::now() + LEADER_TIMEOUT;
    let mut is_logged = false;
    loop {
        match context.query_account().await {
            Err(error) if error.kind() == AccountErrorKind::TimedOut && Instant::now() < end => {
                if !is_logged {
                    tracing::warn!("waiting for JetStream, no answer yet");
                }
                is_logged = true;
            }
            answer => return answer.map(drop),
        }
    }
}

/// The options of the client library. Credentials are read again for each connection.
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

/// The first attempt is immediate; the next ones wait 50 ms, 100 ms and so on.
fn reconnect_delay(attempt: usize) -> Duration {
    match u32::try_from(attempt) {
        Ok(0 | 1) => Duration::ZERO,
        Ok(attempt) if attempt < 8 => {
            (Duration::from_millis(25) * 2_u32.pow(attempt - 1)).min(RECONNECT_DELAY_MAX)
        }
        _ => RECONNECT_DELAY_MAX,
    }
}

/// Counts and logs connection events.
fn on_event(event: &Event, connections: &watch::Sender<u64>) {
    match event {
        Event::Connected => {
            connections.send_modify(|count| *count += 1);
            tracing::info!("connected to NATS");
        }
        Event::Disconnected => tracing::warn!("NATS connection lost, reconnecting"),
        Event::ServerError(error) => tracing::warn!(error = error.to_string(), "NATS server error"),
        other => tracing::debug!(event = other.to_string(), "NATS client event"),
    }
}
