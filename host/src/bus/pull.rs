//! Taking messages from a stream: a durable pull consumer, one open request at a time, acks by hand.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy, ReplayPolicy, pull};
use async_nats::jetstream::message::Acker;
use async_nats::jetstream::{self, AckKind};
use futures::StreamExt;
use jiff::Timestamp;
use std::sync::Arc;
use tokio::sync::watch;

use super::Bus;
use super::streams::timestamp;
use crate::message::{Headers, InvalidEventId, Message, Origin, event_id};
use crate::retry::Backoff;
use crate::verdict::Settled;

/// How long one pull request stays open on the server. Short: a request that got lost costs no more than this.
const REQUEST_OPEN: Duration = Duration::from_secs(5);

/// How many bytes one pull request may bring.
const REQUEST_BYTES: usize = 16 << 20;

/// What to take, and under which name the server remembers how far it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub stream: String,
    /// The durable consumer's name.
    pub durable: String,
    /// Wildcards allowed; empty for all of the stream.
    pub subjects: Vec<String>,
    /// After how long without a sign of life a message is delivered again.
    pub ack_wait: Duration,
    /// How many messages may be out at the same time, over all hosts.
    pub max_ack_pending: i64,
    pub metadata: HashMap<String, String>,
}

/// The taking end of a subscription.
pub struct Pull {
    bus: Bus,
    subscription: Subscription,
    consumer: Consumer<pull::Config>,
    stream_created: Timestamp,
    /// The open request.
    request: Option<pull::Batch>,
    connections: watch::Receiver<u64>,
}

/// A message, and what to do with it.
pub struct Pulled {
    pub message: Message,
    /// What is wrong with the publisher's event id; the message then carries a stand-in.
    pub invalid_id: Option<String>,
    pub receipt: Receipt,
}

/// The right to settle one delivered message.
pub struct Receipt {
    acker: Arc<Acker>,
}

/// Tells the server that a message is being worked on. Cheap to clone.
#[derive(Clone)]
pub struct Progress {
    acker: Arc<Acker>,
}

/// What a consumer still has before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Messages never delivered.
    pub pending: u64,
    /// Messages delivered and not acknowledged.
    pub ack_pending: u64,
    /// Open pull requests.
    pub waiting: u64,
}

impl Bus {
    /// Makes or updates the durable consumer. It is never deleted: it holds the place on the stream.
    pub async fn subscribe(&self, subscription: &Subscription) -> Result<Pull> {
        let (consumer, stream_created) = self.ensure_consumer(subscription).await?;
        Ok(Pull {
            bus: self.clone(),
            subscription: subscription.clone(),
            consumer,
            stream_created,
            request: None,
            connections: self.connections.clone(),
        })
    }

    async fn ensure_consumer(&self, subscription: &Subscription) -> Result<(Consumer<pull::Config>, Timestamp)> {
        let stream = self
            .context
            .get_stream(&subscription.stream)
            .await
            .with_context(|| format!("open the stream {}", subscription.stream))?;
        let created = timestamp(stream.cached_info().created)?;
        let config = pull::Config {
            durable_name: Some(subscription.durable.clone()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: subscription.ack_wait,
            // We count attempts, in the database: a broker that gives up would lose the message.
            max_deliver: -1,
            filter_subjects: subscription.subjects.clone(),
            replay_policy: ReplayPolicy::Instant,
            max_ack_pending: subscription.max_ack_pending,
            metadata: subscription.metadata.clone(),
            ..pull::Config::default()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .with_context(|| format!("make the consumer {} on {}", subscription.durable, subscription.stream))?;
        Ok((consumer, created))
    }
}

impl Pull {
    /// The next message. Keeps one request of at most `room` messages open; trouble with the broker is waited out:
    /// after a reconnect, or when the consumer is gone, it asks again by itself.
    pub async fn next(&mut self, room: usize) -> Result<Pulled> {
        let mut backoff = Backoff::default();
        loop {
            match self.try_next(room).await {
                Ok(Some(pulled)) => return Ok(pulled),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!("pulling from {} again soon: {error:#}", self.subscription.stream);
                    self.request = None;
                    tokio::time::sleep(backoff.next(rand::random())).await;
                    self.renew().await;
                }
            }
        }
    }

    /// One step: a message, or none when a request ended or the connection changed.
    async fn try_next(&mut self, room: usize) -> Result<Option<Pulled>> {
        if self.request.is_none() {
            self.connections.mark_unchanged();
            let request = self
                .consumer
                .batch()
                .max_messages(room)
                .max_bytes(REQUEST_BYTES)
                .expires(REQUEST_OPEN)
                .messages()
                .await
                .context("ask for messages")?;
            self.request = Some(request);
        }
        let Some(request) = &mut self.request else { return Ok(None) };
        tokio::select! {
            biased;
            message = request.next() => match message {
                Some(message) => self.take(message.map_err(anyhow::Error::from_boxed).context("take a message")?).map(Some),
                None => {
                    self.request = None;
                    Ok(None)
                }
            },
            // The server knows nothing of requests made on a connection that is gone.
            Ok(()) = self.connections.changed() => {
                self.request = None;
                self.renew().await;
                Ok(None)
            }
        }
    }

    /// Makes sure the consumer is there, and learns anew when the stream was made: a stream that was deleted and made
    /// again counts from 1.
    async fn renew(&mut self) {
        match self.bus.ensure_consumer(&self.subscription).await {
            Ok((consumer, created)) => {
                self.consumer = consumer;
                self.stream_created = created;
            }
            Err(error) => tracing::debug!("consumer {} not renewed: {error:#}", self.subscription.durable),
        }
    }

    fn take(&self, message: jetstream::Message) -> Result<Pulled> {
        let info = message.info().map_err(anyhow::Error::from_boxed).context("read a message's place")?;
        let origin = Origin {
            stream: info.stream.to_owned(),
            sequence: info.stream_sequence,
            stored_at: timestamp(info.published)?,
        };
        let (message, acker) = message.split();
        let headers = headers(message.headers.as_ref());
        let (event_id, invalid_id) = match event_id(&headers, &origin.stream, self.stream_created, origin.sequence) {
            Ok(id) => (id, None),
            Err(InvalidEventId { stand_in, why }) => (stand_in, Some(why)),
        };
        let message = Message {
            event_id,
            subject: message.subject.to_string(),
            headers,
            body: message.payload,
            origin: Some(origin),
        };
        Ok(Pulled { message, invalid_id, receipt: Receipt { acker: Arc::new(acker) } })
    }

    /// A way to look at the consumer from elsewhere.
    pub fn probe(&self) -> Probe {
        Probe {
            bus: self.bus.clone(),
            stream: self.subscription.stream.clone(),
            durable: self.subscription.durable.clone(),
        }
    }
}

/// Looks at a consumer. Cheap to clone.
#[derive(Clone)]
pub struct Probe {
    bus: Bus,
    stream: String,
    durable: String,
}

impl Probe {
    /// Whether the server knows that somebody takes messages here.
    pub async fn seen_by_server(&self) -> Result<bool> {
        let backlog = self.backlog().await?;
        Ok(backlog.waiting > 0 || backlog.ack_pending > 0)
    }

    pub async fn backlog(&self) -> Result<Backlog> {
        let stream = self.bus.context.get_stream_no_info(&self.stream).await.context("open the stream")?;
        let info = stream.consumer_info(&self.durable).await.context("look at the consumer")?;
        Ok(Backlog {
            pending: info.num_pending,
            ack_pending: info.num_ack_pending as u64,
            waiting: info.num_waiting as u64,
        })
    }
}

impl Receipt {
    /// Acknowledges: only with the proof that the database holds a final word on the message.
    pub async fn ack(self, _proof: &Settled) -> Result<()> {
        self.acker.ack().await.map_err(anyhow::Error::from_boxed).context("acknowledge")
    }

    /// Asks for the message again after a while. Always with a delay: without one the server delivers it at once.
    pub async fn nak(self, after: Duration) -> Result<()> {
        let after = after.max(Duration::from_millis(1));
        self.acker.ack_with(AckKind::Nak(Some(after))).await.map_err(anyhow::Error::from_boxed).context("ask again")
    }

    pub fn progress(&self) -> Progress {
        Progress { acker: Arc::clone(&self.acker) }
    }
}

impl Progress {
    /// Starts the wait for the acknowledgement anew.
    pub async fn send(&self) -> Result<()> {
        self.acker.ack_with(AckKind::Progress).await.map_err(anyhow::Error::from_boxed).context("tell of progress")
    }
}

/// Headers by name, without those that only concern the transport.
fn headers(map: Option<&async_nats::HeaderMap>) -> Headers {
    let Some(map) = map else { return Headers::new() };
    let mut headers: Headers = map
        .iter()
        .flat_map(|(name, values)| values.iter().map(move |value| (name.to_string(), value.to_string())))
        .filter(|(name, _)| {
            let name = name.to_ascii_lowercase();
            !name.starts_with("nats-batch-") && !name.starts_with("nats-schedule") && !name.starts_with("nats-expected")
        })
        .collect();
    // The client keeps no order between names; ours is at least always the same.
    headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    headers
}
