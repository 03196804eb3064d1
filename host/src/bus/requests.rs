//! Asking a consumer for messages: pull requests on the reading connection, one after another.

use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::BatchConfig;
use async_nats::{HeaderMap, StatusCode, Subject};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Bus;
use super::connection::{Connection, Listener, Message as Sent};
use super::readable::{read_block, read_subject};
use super::streams::timestamp;
use super::wire::Arrived;

/// How much longer than a request is open its end may take to arrive.
const END_WITHIN: Duration = Duration::from_secs(2);

/// What the subject begins with at which a message of a stream is acknowledged.
const ACKNOWLEDGED_AT: &str = "$JS.ACK.";

/// Where a delivered message stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub stream: String,
    pub sequence: u64,
    pub stored_at: Timestamp,
    /// How often it was delivered, this time included.
    pub delivered: u64,
    /// How many messages the consumer has yet to deliver for the first time.
    pub pending: u64,
    /// Where to acknowledge it.
    pub reply: String,
}

/// Pull requests to one consumer.
pub(super) struct Requests {
    deliveries: Connection,
    listener: Listener,
    connections: watch::Receiver<u64>,
    inbox: String,
    /// Where requests go.
    subject: String,
    made: u64,
    open: Option<Open>,
}

/// A request that is not over.
struct Open {
    answered_at: String,
    left: usize,
    until: Instant,
}

/// A requested message. Headers that cannot be read are left out, and such a subject is given as far as it is text.
pub(super) struct Taken {
    pub place: Place,
    pub subject: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Bus {
    /// A way to ask a consumer for messages.
    pub(super) async fn requests(&self, stream: &str, consumer: &str) -> Result<Requests> {
        let deliveries = self.deliveries().await?;
        let inbox = self.client.new_inbox();
        Ok(Requests {
            listener: deliveries.listen(&format!("{inbox}.*")),
            connections: deliveries.connections(),
            deliveries,
            inbox,
            subject: next_subject(self, stream, consumer),
            made: 0,
            open: None,
        })
    }

    /// The place of a message, read from its reply subject; none for anything but a message of a stream.
    pub(super) fn place(&self, reply: Option<&str>) -> Result<Option<Place>> {
        let Some(reply) = reply.filter(|reply| reply.starts_with(ACKNOWLEDGED_AT)) else { return Ok(None) };
        let message = self.acknowledgeable(reply);
        let info = message.info().map_err(Error::from_boxed).context("read the place of a message")?;
        Ok(Some(Place {
            stream: info.stream.to_owned(),
            sequence: info.stream_sequence,
            stored_at: timestamp(info.published)?,
            delivered: u64::try_from(info.delivered).unwrap_or(1),
            pending: info.pending,
            reply: reply.to_owned(),
        }))
    }

    /// A delivered message as far as it takes to acknowledge it.
    pub(super) fn acknowledgeable(&self, reply: &str) -> jetstream::Message {
        let message = async_nats::Message {
            subject: Subject::from_static("-"),
            reply: Some(Subject::from(reply)),
            payload: Bytes::new(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        };
        jetstream::Message { message, context: self.context.clone() }
    }
}

/// Where a consumer is asked for messages.
pub(super) fn next_subject(bus: &Bus, stream: &str, consumer: &str) -> String {
    format!("{}.CONSUMER.MSG.NEXT.{stream}.{consumer}", bus.nats.api_prefix())
}

impl Requests {
    /// Opens a request for at most `batch` messages, which ends after `expires`.
    pub fn ask(&mut self, batch: usize, expires: Duration, no_wait: bool) -> Result<()> {
        let answered_at = format!("{}.{}", self.inbox, self.made);
        self.made += 1;
        let over = *self.connections.borrow_and_update();
        let config = BatchConfig { batch, expires: Some(expires), no_wait, ..BatchConfig::default() };
        let body = serde_json::to_vec(&config).context("write a request for messages")?;
        self.deliveries.publish(Sent {
            over,
            subject: self.subject.clone(),
            reply: answered_at.clone(),
            headers: Vec::new(),
            body: body.into(),
        });
        self.open = Some(Open { answered_at, left: batch, until: Instant::now() + expires + END_WITHIN });
        Ok(())
    }

    /// Whether a request is open.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The next message that the open request brings; none when it is over. An error when the connection is gone, or the
    /// server has forgotten the request.
    pub async fn next(&mut self, bus: &Bus) -> Result<Option<Taken>> {
        loop {
            let Some(open) = &self.open else { return Ok(None) };
            let arrived = tokio::select! {
                biased;
                arrived = self.listener.next() => arrived.context("hear from NATS: the connection was given up")?,
                Ok(()) = self.connections.changed() => {
                    self.open = None;
                    bail!("the connection to NATS was lost");
                }
                () = tokio::time::sleep_until(open.until) => {
                    self.open = None;
                    bail!("the server does not answer a request for messages");
                }
            };
            if let Some(place) = bus.place(arrived.reply.as_deref())? {
                if let Some(open) = &mut self.open {
                    open.left = open.left.saturating_sub(1);
                }
                self.open.take_if(|open| open.left == 0);
                return Ok(Some(taken(place, &arrived)));
            }
            if open.answered_at.as_bytes() == arrived.subject.as_ref()
                && let Ok(block) = read_block(&arrived.headers)
                && block.status.is_some_and(|status| status != StatusCode::IDLE_HEARTBEAT)
            {
                self.open = None;
                let is_over = block.status.is_some_and(|status| {
                    [StatusCode::TIMEOUT, StatusCode::NOT_FOUND, StatusCode::REQUEST_TERMINATED].contains(&status)
                });
                if !is_over {
                    bail!("the server refuses a request for messages: {}", block.description);
                }
            }
        }
    }
}

fn taken(place: Place, arrived: &Arrived) -> Taken {
    Taken {
        place,
        subject: read_subject(&arrived.subject).unwrap_or_else(|(shown, _)| shown),
        headers: read_block(&arrived.headers).unwrap_or_default().headers,
        body: arrived.body.clone(),
    }
}
