//! NATS JetStream: streams, durable pull consumers, and publishing that waits for the stream's answer.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::connection::State;
use async_nats::jetstream::{self, context::ContextBuilder};
use async_nats::{ConnectErrorKind, ConnectOptions, Event};
use tokio::sync::watch;

use crate::config::{Login, Nats};
use crate::hint::WithHint;

mod publish;
mod pull;
mod server;
mod streams;

pub use publish::{Outgoing, PublishError, PublishedAt};
pub use pull::{Backlog, Probe, Progress, Pull, Pulled, Receipt, Subscription};
pub use server::EmbeddedServer;
pub use streams::{Ensured, StreamInfo, StreamSpec};

/// How long one request to JetStream may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How many publications may wait for their answers.
const PUBLICATIONS_IN_FLIGHT: usize = 4_000;

const NO_SERVER: &str = "is the server running? `oncely dev` starts one of its own; --nats names another";

const WRONG_LOGIN: &str =
    "log in with --nats-creds FILE, --nats-context NAME, or ONCELY_NATS=nats://user:password@host";

/// A connection to NATS. Once made it is kept for ever: it reconnects by itself. Cheap to clone.
#[derive(Clone)]
pub struct Bus {
    client: async_nats::Client,
    context: jetstream::Context,
    /// Counts connections: when it moves, whatever waited on the old one has to ask again.
    connections: watch::Receiver<u64>,
}

impl Bus {
    /// Connects; an error when no server answers.
    pub async fn connect(nats: &Nats) -> Result<Bus> {
        let (sender, connections) = watch::channel(0_u64);
        let options = login(ConnectOptions::new(), nats)
            .await?
            .name("oncely")
            .max_reconnects(None)
            .reconnect_delay_callback(|attempt| Duration::from_millis((50 << attempt.min(5)) as u64))
            .connection_timeout(Duration::from_secs(5))
            .event_callback(move |event| {
                let sender = sender.clone();
                async move {
                    match event {
                        Event::Connected => sender.send_modify(|count| *count += 1),
                        Event::Disconnected => tracing::warn!("the connection to NATS is gone; reconnecting"),
                        other => tracing::debug!("nats: {other}"),
                    }
                }
            });
        let client = options
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
            .context("ask NATS for JetStream")
            .hint("start the server with JetStream: nats-server --jetstream")?;
        Ok(Bus { client, context, connections })
    }

    /// The largest message the server takes, headers included, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.server_info().max_payload
    }

    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
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
