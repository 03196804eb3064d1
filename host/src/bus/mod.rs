//! NATS JetStream: streams, durable pull consumers, and publishing that waits for the stream's answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::connection::State;
use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{ConnectErrorKind, ConnectOptions, Event};
use tokio::sync::watch;

use crate::config::{Login, Nats};
use crate::hint::WithHint;
use installation::Owner;
use reader::Reader;

mod alarms;
mod feed;
mod installation;
mod marks;
mod publish;
mod pull;
mod raw;
mod readable;
mod reader;
mod requests;
mod server;
mod streams;
mod wire;

pub use alarms::{AlarmMessage, Alarms};
pub use feed::{Feed, Heard};
pub use installation::Foreign;
pub use marks::{MARK_STREAM, StoredMark, mark_stream};
pub use publish::{Answer, Outgoing, PublishError, PublishedAt};
pub use pull::{Acknowledged, Backlog, Probe, Progress, Pull, Pulled, Receipt, Subscription, Unhandled};
pub use raw::Compared;
pub use server::EmbeddedServer;
pub use streams::{Ensured, From, Passed, StreamInfo, StreamSpec, stream_of};

/// How long one request to JetStream may take, and the answer to one publication.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How many publications of all callers together may wait for their answers; far more than callers send.
const PUBLICATIONS_IN_FLIGHT: usize = 1 << 16;

/// The most it waits between two attempts to connect again.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

const NO_SERVER: &str = "is the server running? `oncely dev` starts one of its own; --nats names another";

const WRONG_LOGIN: &str =
    "log in with --nats-creds FILE, --nats-context NAME, or ONCELY_NATS=nats://user:password@host";

/// A connection to NATS. It reconnects by itself until [`Bus::ended`]. Cheap to clone.
#[derive(Clone)]
pub struct Bus {
    client: async_nats::Client,
    context: jetstream::Context,
    /// Counts connections: when it moves, whatever waited on the old one has to ask again.
    connections: watch::Receiver<u64>,
    known_streams: Arc<tokio::sync::Mutex<Option<Known>>>,
    denied: Denied,
    /// How to reach NATS, and the connection for delivered messages, once there is a subscription.
    nats: Arc<Nats>,
    reader: Arc<OnceLock<Reader>>,
    /// None for a bus that asks nobody whose something is.
    owner: Option<Arc<Owner>>,
}

/// All streams, and as of when.
type Known = (Instant, Arc<Vec<StreamInfo>>);

/// Subjects the server did not let us publish to, and when it said so.
type Denied = Arc<Mutex<HashMap<String, Instant>>>;

/// How many of them are remembered, and for how long: more than can be under way in that time, so that none counts as
/// its stream's trouble.
const DENIED_MAX: usize = 1 << 16;
const DENIED_FOR: Duration = Duration::from_secs(30);

impl Bus {
    /// Connects; an error when no server answers, or one without JetStream.
    pub async fn connect(nats: &Nats) -> Result<Bus> {
        let (sender, connections) = watch::channel(0_u64);
        let denied = Denied::default();
        let denials = Arc::clone(&denied);
        let client = login(ConnectOptions::new(), nats)
            .await?
            .name("oncely")
            .max_reconnects(None)
            .reconnect_delay_callback(reconnect_delay)
            .connection_timeout(Duration::from_secs(5))
            .event_callback(move |event| {
                tell(&event, &sender);
                remember_denial(&event, &denials);
                std::future::ready(())
            })
            .connect(nats.servers.clone())
            .await
            .map_err(|error| {
                let hint = match error.kind() {
                    ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => WRONG_LOGIN,
                    _ => NO_SERVER,
                };
                anyhow::Error::from(error).hint(hint)
            })
            .with_context(|| format!("connect to NATS at {}", nats.shown()))?;
        let context = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .ack_timeout(REQUEST_TIMEOUT)
            .max_ack_inflight(PUBLICATIONS_IN_FLIGHT)
            .build(client.clone());
        context
            .query_account()
            .await
            .with_context(|| format!("ask NATS at {} for JetStream", nats.shown()))
            .hint("start the server with JetStream: nats-server --jetstream")?;
        let (nats, reader) = (Arc::new(nats.clone()), Arc::default());
        Ok(Bus { client, context, connections, known_streams: Arc::default(), denied, nats, reader, owner: None })
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
    async fn reader(&self) -> Result<Reader> {
        let reader = self.reader.get_or_init(|| Reader::start(Nats::clone(&self.nats)));
        reader.ready().await?;
        Ok(reader.clone())
    }

    /// Whether the server denied a message to this subject just now. It says so in words for people, and not to whom.
    fn is_denied(&self, subject: &str) -> bool {
        let denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
        denied.get(subject).is_some_and(|since| since.elapsed() < DENIED_FOR)
    }

    /// Returns when the client has ended: it reads the server's words in tasks of its own, and ends with them. It does not
    /// come back: make another.
    pub async fn ended(&self) {
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

/// Adds what proves who we are.
async fn login(options: ConnectOptions, nats: &Nats) -> Result<ConnectOptions> {
    let mut options = match &nats.login {
        Login::None => options,
        Login::Password { user, password } => options.user_and_password(user.clone(), password.reveal().to_owned()),
        Login::Token(token) => options.token(token.reveal().to_owned()),
        Login::Nkey(path) => {
            let seed = std::fs::read_to_string(path).with_context(|| format!("read the nkey {}", path.display()))?;
            options.nkey(seed.trim().to_owned())
        }
        Login::Credentials(path) => {
            options.credentials_file(path).await.with_context(|| format!("read the credentials {}", path.display()))?
        }
    };
    if let Some(path) = &nats.root_certificate {
        options = options.add_root_certificates(path.clone());
    }
    if let Some((certificate, key)) = &nats.client_certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// The first attempt at once, the next ones 50 ms, 100 ms and so on apart.
fn reconnect_delay(attempt: usize) -> Duration {
    match u32::try_from(attempt) {
        Ok(0 | 1) => Duration::ZERO,
        Ok(attempt) if attempt < 8 => (Duration::from_millis(25) * 2_u32.pow(attempt - 1)).min(RECONNECT_DELAY_MAX),
        _ => RECONNECT_DELAY_MAX,
    }
}

/// Passes on what happened to the connection.
fn tell(event: &Event, connections: &watch::Sender<u64>) {
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

fn remember_denial(event: &Event, denied: &Denied) {
    let Event::ServerError(error) = event else { return };
    let text = error.to_string();
    let Some((_, rest)) = text.split_once("Permissions Violation for Publish to \"") else { return };
    let Some((subject, _)) = rest.split_once('"') else { return };
    let mut denied = denied.lock().unwrap_or_else(PoisonError::into_inner);
    if denied.len() >= DENIED_MAX {
        denied.retain(|_, since| since.elapsed() < DENIED_FOR);
    }
    if denied.len() < DENIED_MAX {
        denied.insert(subject.to_owned(), Instant::now());
    }
}
