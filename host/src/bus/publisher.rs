//! The publishing connection. A message goes over the connection it was meant for, or is not sent:
//! if a stream lost its tail between two connections, it is inspected before any new message
//! follows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use async_nats::StatusCode;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::connection::{Connection, Listener, Message};
use super::decode::decode_headers;
use super::wire::IncomingMessage;

/// How long a stream may take to acknowledge a message.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// A message for a stream, in the form that the server receives.
pub(super) struct Publication {
    pub subject: String,
    pub headers: Vec<u8>,
    pub body: Bytes,
}

/// The acknowledgement of a stream, or its refusal.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ack {
    pub stream: String,
    pub seq: u64,
    pub duplicate: bool,
    pub error: Option<ApiError>,
}

/// The reason why a stream did not store a message.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct ApiError {
    /// Like an HTTP status code.
    pub code: u64,
    pub err_code: u64,
    pub description: String,
}

/// The reason for a missing acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AckError {
    /// The message was not sent.
    NotSent,
    /// The subject has no subscriber.
    NoResponders,
    /// The message may or may not be stored.
    Unconfirmed(String),
}

type AckResult = Result<Ack, AckError>;

/// Sends messages and matches acknowledgements to them. Cheap to clone.
#[derive(Clone)]
pub(super) struct Publisher {
    connection: Connection,
    inbox: Arc<str>,
    pending: Arc<Mutex<PendingAcks>>,
    /// Stops with the last clone.
    _ack_reader: Arc<JoinSet<()>>,
}

/// Unacknowledged messages, by the last token of their reply subject.
#[derive(Default)]
struct PendingAcks {
    next: u64,
    open: HashMap<u64, PendingAck>,
}

struct PendingAck {
    /// The number of the connection it was sent over.
    connection_number: u64,
    answer: oneshot::Sender<AckResult>,
}

impl Publisher {
    /// Acknowledgements arrive at subjects below `inbox`.
    pub fn new(connection: Connection, inbox: String) -> Self {
        let pending = Arc::<Mutex<PendingAcks>>::default();
        let listener = connection.listen(&format!("{inbox}.*"));
        let mut ack_reader = JoinSet::new();
        ack_reader.spawn(read_acks(
            listener,
            connection.connections(),
            Arc::clone(&pending),
        ));
        Publisher {
            connection,
            inbox: inbox.into(),
            pending,
            _ack_reader: Arc::new(ack_reader),
        }
    }

    /// Returns once a connection exists or has existed.
    pub async fn ready(&self) -> Result<()> {
        self.connection.ready().await
    }

    pub fn is_connected(&self) -> bool {
        self.connection.is_up()
    }

    /// Changes with each new connection.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connection.connections()
    }

    /// Whether the server denied a message to this subject recently.
    pub fn is_denied(&self, subject: &str) -> bool {
        self.connection.is_denied(subject)
    }

    /// Sends a message over the connection with this number, or not at all. The future resolves to
    /// the acknowledgement. Messages are sent in the order of these calls.
    pub fn send(
        &self,
        connection_number: u64,
        publication: Publication,
    ) -> impl Future<Output = AckResult> + use<> {
        let receiver = self.begin(connection_number, publication);
        let pending = Arc::clone(&self.pending);
        async move {
            let (token, receiver) = receiver.ok_or(AckError::NotSent)?;
            let answer = tokio::time::timeout(ACK_TIMEOUT, receiver).await;
            answer.map_or_else(
                |_| {
                    pending
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .open
                        .remove(&token);
                    Err(AckError::Unconfirmed(
                        "the stream did not acknowledge in time".to_owned(),
                    ))
                },
                |answer| answer.unwrap_or_else(|_| Err(connection_lost())),
            )
        }
    }

    fn begin(
        &self,
        connection_number: u64,
        publication: Publication,
    ) -> Option<(u64, oneshot::Receiver<AckResult>)> {
        // Read under the lock under which the messages of earlier connections are removed.
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_connected() || self.connection.number() != connection_number {
            return None;
        }
        let token = pending.next;
        pending.next += 1;
        let (answer, receiver) = oneshot::channel();
        pending.open.insert(
            token,
            PendingAck {
                connection_number,
                answer,
            },
        );
        let Publication {
            subject,
            headers,
            body,
        } = publication;
        self.connection.publish(Message {
            connection_number,
            subject,
            reply: format!("{}.{token}", self.inbox),
            headers,
            body,
        });
        Some((token, receiver))
    }
}

/// Delivers acknowledgements until the connection is closed. Messages sent over a lost connection
/// fail, as no acknowledgement can follow.
async fn read_acks(
    mut listener: Listener,
    mut connections: watch::Receiver<u64>,
    pending: Arc<Mutex<PendingAcks>>,
) {
    loop {
        tokio::select! {
            // An acknowledgement that was received still counts.
            biased;
            incoming = listener.next() => match incoming {
                Some(incoming) => deliver_ack(&incoming, &pending),
                None => return,
            },
            changed = connections.changed() => match changed {
                Ok(()) => {
                    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
                    let now = *connections.borrow_and_update();
                    let gone: Vec<PendingAck> = pending
                        .open
                        .extract_if(|_, open| open.connection_number != now)
                        .map(|(_, open)| open)
                        .collect();
                    drop(pending);
                    for open in gone {
                        let _ = open.answer.send(Err(connection_lost()));
                    }
                }
                Err(_) => return,
            },
        }
    }
}

fn deliver_ack(incoming: &IncomingMessage, pending: &Mutex<PendingAcks>) {
    let token = incoming
        .subject
        .rsplit(|byte| *byte == b'.')
        .next()
        .and_then(|token| std::str::from_utf8(token).ok());
    let Some(token) = token.and_then(|token| token.parse::<u64>().ok()) else {
        return;
    };
    let Some(open) = pending
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .open
        .remove(&token)
    else {
        return;
    };
    let _ = open.answer.send(parse_ack(incoming));
}

fn parse_ack(incoming: &IncomingMessage) -> AckResult {
    let status = decode_headers(&incoming.headers)
        .ok()
        .and_then(|block| block.status);
    if status == Some(StatusCode::NO_RESPONDERS) {
        return Err(AckError::NoResponders);
    }
    serde_json::from_slice(&incoming.body)
        .map_err(|error| AckError::Unconfirmed(format!("malformed acknowledgement: {error}")))
}

fn connection_lost() -> AckError {
    AckError::Unconfirmed("connection to NATS lost before the stream acknowledged".to_owned())
}
