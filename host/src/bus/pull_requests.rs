//! Pull requests to a consumer over the reading connection, one at a time.

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
use super::connection::{Connection, Listener, Message as ConnectionMessage};
use super::decode::{decode_headers, decode_subject};
use super::streams::timestamp;
use super::wire::IncomingMessage;

/// How long after its expiry the end of a request may arrive.
const EXPIRY_GRACE: Duration = Duration::from_secs(2);

/// The prefix of the subjects at which stream messages are acknowledged.
const ACK_SUBJECT_PREFIX: &str = "$JS.ACK.";

/// The stream position of a delivered message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MessagePosition {
    pub stream: String,
    pub sequence: u64,
    pub stored_at: Timestamp,
    /// Number of deliveries, this one included.
    pub delivered: u64,
    /// How many messages the consumer has not yet delivered for the first time.
    pub pending: u64,
    /// The subject for its acknowledgement.
    pub reply: String,
}

/// Pull requests to one consumer.
pub(super) struct PullRequests {
    deliveries: Connection,
    listener: Listener,
    connections: watch::Receiver<u64>,
    inbox: String,
    /// The subject for requests.
    subject: String,
    sent: u64,
    open: Option<OpenRequest>,
}

/// A request that has not ended.
struct OpenRequest {
    reply_subject: String,
    remaining: usize,
    deadline: Instant,
}

/// A fetched message. Unreadable headers are omitted; in a subject, bytes that are not UTF-8 are
/// replaced.
pub(super) struct FetchedMessage {
    pub position: MessagePosition,
    pub subject: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Bus {
    /// Prepares pull requests to a consumer.
    pub(super) async fn pull_requests(&self, stream: &str, consumer: &str) -> Result<PullRequests> {
        let deliveries = self.deliveries().await?;
        let inbox = self.client.new_inbox();
        Ok(PullRequests {
            listener: deliveries.listen(&format!("{inbox}.*")),
            connections: deliveries.connections(),
            deliveries,
            inbox,
            subject: next_subject(self, stream, consumer),
            sent: 0,
            open: None,
        })
    }

    /// The position of a message, parsed from its reply subject; `None` if it is not a message of a
    /// stream.
    pub(super) fn position(&self, reply: Option<&str>) -> Result<Option<MessagePosition>> {
        let Some(reply) = reply.filter(|reply| reply.starts_with(ACK_SUBJECT_PREFIX)) else {
            return Ok(None);
        };
        let message = self.ackable_message(reply);
        let info = message
            .info()
            .map_err(Error::from_boxed)
            .context("parse the position of a message")?;
        Ok(Some(MessagePosition {
            stream: info.stream.to_owned(),
            sequence: info.stream_sequence,
            stored_at: timestamp(info.published)?,
            delivered: u64::try_from(info.delivered).unwrap_or(1),
            pending: info.pending,
            reply: reply.to_owned(),
        }))
    }

    /// A delivered message reduced to the fields that its acknowledgement needs.
    pub(super) fn ackable_message(&self, reply: &str) -> jetstream::Message {
        let message = async_nats::Message {
            subject: Subject::from_static("-"),
            reply: Some(Subject::from(reply)),
            payload: Bytes::new(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        };
        jetstream::Message {
            message,
            context: self.context.clone(),
        }
    }
}

/// The subject for pull requests to a consumer.
pub(super) fn next_subject(bus: &Bus, stream: &str, consumer: &str) -> String {
    format!(
        "{}.CONSUMER.MSG.NEXT.{stream}.{consumer}",
        bus.nats.api_prefix()
    )
}

impl PullRequests {
    /// Opens a request for at most `batch` messages, which ends after `expires`.
    pub fn open(&mut self, batch: usize, expires: Duration, no_wait: bool) -> Result<()> {
        let reply_subject = format!("{}.{}", self.inbox, self.sent);
        self.sent += 1;
        let connection_number = *self.connections.borrow_and_update();
        let config = BatchConfig {
            batch,
            expires: Some(expires),
            no_wait,
            ..BatchConfig::default()
        };
        let body = serde_json::to_vec(&config).context("serialize a pull request")?;
        self.deliveries.publish(ConnectionMessage {
            connection_number,
            subject: self.subject.clone(),
            reply: reply_subject.clone(),
            headers: Vec::new(),
            body: body.into(),
        });
        self.open = Some(OpenRequest {
            reply_subject,
            remaining: batch,
            deadline: Instant::now() + expires + EXPIRY_GRACE,
        });
        Ok(())
    }

    /// Whether a request is open.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The next message of the open request; `None` when the request has ended.
    ///
    /// # Errors
    /// The connection is lost, or the server has lost or refused the request.
    pub async fn next(&mut self, bus: &Bus) -> Result<Option<FetchedMessage>> {
        let next = self.next_incoming(bus).await?;
        Ok(next.map(|(position, incoming)| fetched_message(position, &incoming)))
    }

    /// Like [`PullRequests::next`], with the message as it was received.
    pub async fn next_incoming(
        &mut self,
        bus: &Bus,
    ) -> Result<Option<(MessagePosition, IncomingMessage)>> {
        loop {
            let Some(open) = &self.open else {
                return Ok(None);
            };
            let incoming = tokio::select! {
                biased;
                incoming = self.listener.next() => {
                    incoming.context("read from NATS: the connection is closed")?
                }
                Ok(()) = self.connections.changed() => {
                    self.open = None;
                    bail!("the connection to NATS was lost");
                }
                () = tokio::time::sleep_until(open.deadline) => {
                    self.open = None;
                    bail!("the server does not answer the pull request");
                }
            };
            if let Some(position) = bus.position(incoming.reply.as_deref())? {
                if let Some(open) = &mut self.open {
                    open.remaining = open.remaining.saturating_sub(1);
                }
                self.open.take_if(|open| open.remaining == 0);
                return Ok(Some((position, incoming)));
            }
            if open.reply_subject.as_bytes() == incoming.subject.as_ref()
                && let Ok(block) = decode_headers(&incoming.headers)
                && block
                    .status
                    .is_some_and(|status| status != StatusCode::IDLE_HEARTBEAT)
            {
                self.open = None;
                let is_over = block.status.is_some_and(|status| {
                    [
                        StatusCode::TIMEOUT,
                        StatusCode::NOT_FOUND,
                        StatusCode::REQUEST_TERMINATED,
                    ]
                    .contains(&status)
                });
                if !is_over {
                    bail!("the server refused the pull request: {}", block.description);
                }
            }
        }
    }
}

fn fetched_message(position: MessagePosition, incoming: &IncomingMessage) -> FetchedMessage {
    FetchedMessage {
        position,
        subject: decode_subject(&incoming.subject).unwrap_or_else(|(shown, _)| shown),
        headers: decode_headers(&incoming.headers)
            .unwrap_or_default()
            .headers,
        body: incoming.body.clone(),
    }
}
