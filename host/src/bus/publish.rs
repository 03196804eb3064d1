//! Publishing: pipelined, in order, and believed only when the stream has answered.

use std::error::Error;
use std::str::FromStr;
use std::time::Duration;

use async_nats::header::{HeaderMap, HeaderName, HeaderValue, NATS_MESSAGE_ID};
use async_nats::jetstream::context::{PublishAckFuture, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;

use super::Bus;
use super::streams::stream_of;
use crate::message::Headers;
use crate::subject::check_subject;

/// How many messages of one call wait for their answers at the same time. A server queues 10,000 for one stream and
/// refuses more.
const WINDOW: usize = 1_000;

/// A message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    pub subject: String,
    pub headers: Headers,
    /// Travels as `Nats-Msg-Id`: the stream stores a message with an id it knows only once within its dedupe window.
    pub id: String,
    pub body: Bytes,
}

/// Where a message now stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedAt {
    pub stream: String,
    pub sequence: u64,
    /// It was there already.
    pub duplicate: bool,
}

/// Why a message was not published, or not known to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishError {
    /// No answer, or a passing refusal: it may or may not be there; publish it again with the same id.
    Unavailable(String),
    /// It was not published, and will never be: the fault is its own.
    Refused(String),
    /// It was not published, and will not be as long as the streams are as they are.
    NoPlace(String),
}

impl std::fmt::Display for PublishError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (PublishError::Unavailable(text) | PublishError::Refused(text) | PublishError::NoPlace(text)) = self;
        f.write_str(text)
    }
}

impl Error for PublishError {}

pub type Answer = Result<PublishedAt, PublishError>;

/// The streams may be this old when a subject is looked up that nobody listens to.
const STREAMS_AS_OF: Duration = Duration::from_secs(1);

impl Bus {
    /// Publishes messages in order and waits for all answers; one answer for each message, in their order. What the
    /// broker takes is stored in this order too.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(messages.len());
        let mut open = FuturesOrdered::new();
        for message in messages {
            open.push_back(self.begin_publish(message).await);
            if open.len() >= WINDOW {
                answers.extend(open.next().await);
            }
        }
        answers.extend(open.collect::<Vec<_>>().await);
        answers
    }

    /// Sends a message; the future it returns ends with the stream's answer. Messages are stored in the order in which
    /// they were sent, as long as none of them fails.
    pub async fn begin_publish(&self, message: Outgoing) -> BoxFuture<'static, Answer> {
        let subject = message.subject.clone();
        match self.send(message).await {
            Ok(sent) => Box::pin(self.clone().answer(subject, sent)),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    async fn answer(self, subject: String, sent: PublishAckFuture) -> Answer {
        match sent.await {
            Ok(ack) => Ok(PublishedAt { stream: ack.stream, sequence: ack.sequence, duplicate: ack.duplicate }),
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => Err(self.why_unheard(&subject).await),
            // The server does not answer what it does not let through.
            Err(error) if error.kind() == PublishErrorKind::TimedOut && self.is_denied(&subject) => {
                Err(PublishError::NoPlace(format!("this login may not publish to {subject}: the server denies it")))
            }
            Err(error) => Err(classify(&error)),
        }
    }

    /// Sends one message; the answer is yet to come.
    async fn send(&self, message: Outgoing) -> Result<PublishAckFuture, PublishError> {
        check_subject(&message.subject).map_err(PublishError::Refused)?;
        let headers = headers(&message)?;
        // While disconnected the client would keep it and send it at some later time.
        if !self.is_connected() {
            return Err(PublishError::Unavailable("there is no connection to NATS".to_owned()));
        }
        let size = message.body.len() + headers_size(&message);
        let publish = PublishMessage::build().payload(message.body).headers(headers);
        self.context.send_publish(message.subject, publish).await.map_err(|error| match error.kind() {
            // The server would close the connection over it.
            PublishErrorKind::MaxPayloadExceeded => PublishError::Refused(format!(
                "the message has {size} bytes with its headers, and the NATS server takes {} (max_payload)",
                self.max_payload()
            )),
            _ => classify(&error),
        })
    }

    /// Nobody listens to a subject: because no stream takes it, or because JetStream is starting.
    async fn why_unheard(&self, subject: &str) -> PublishError {
        match self.streams(STREAMS_AS_OF).await {
            Ok(streams) if stream_of(&streams, subject).is_none() => {
                PublishError::NoPlace(format!("no stream takes the subject {subject}"))
            }
            _ => PublishError::Unavailable("nobody answers for the stream; JetStream may be starting".to_owned()),
        }
    }
}

/// Headers by the fallible constructors alone: the others panic on a line break.
fn headers(message: &Outgoing) -> Result<HeaderMap, PublishError> {
    let mut map = HeaderMap::new();
    for (name, value) in &message.headers {
        map.append(header_name(name)?, header_value(name, value)?);
    }
    map.insert(NATS_MESSAGE_ID, header_value("Nats-Msg-Id", &message.id)?);
    Ok(map)
}

fn header_name(name: &str) -> Result<HeaderName, PublishError> {
    let shown = name.escape_debug();
    if name.is_empty() {
        return Err(PublishError::Refused("a header has no name".to_owned()));
    }
    HeaderName::from_str(name)
        .map_err(|error| PublishError::Refused(format!("`{shown}` cannot be a header's name: {error}")))
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue, PublishError> {
    HeaderValue::from_str(value)
        .map_err(|error| PublishError::Refused(format!("the value of the header `{name}` cannot be sent: {error}")))
}

/// As the server counts it.
fn headers_size(message: &Outgoing) -> usize {
    let lines: usize = message.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    lines + "NATS/1.0\r\nNats-Msg-Id: \r\n\r\n".len() + message.id.len()
}

/// A client error (4xx) of the stream is about this message and stays; anything else may pass. A stream that is full
/// counts as passing (503): messages wait until there is room.
fn classify(error: &jetstream::context::PublishError) -> PublishError {
    let answer = error.source().and_then(|source| source.downcast_ref::<jetstream::Error>());
    match answer {
        Some(answer) if answer.error_code() == ErrorCode::STREAM_SEALED => PublishError::NoPlace(error.to_string()),
        Some(answer) if (400..500).contains(&answer.code()) && answer.code() != TOO_MANY_REQUESTS => {
            PublishError::Refused(error.to_string())
        }
        _ => PublishError::Unavailable(error.to_string()),
    }
}

/// The stream's queue is full for the moment.
const TOO_MANY_REQUESTS: usize = 429;
