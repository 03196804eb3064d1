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

/// Why a message was not published, or not known to be. Each says how far the trouble reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishError {
    /// This message, for good: it was not published, and will never be; the fault is its own.
    Refused(String),
    /// This message, for the moment: publish it again with the same id.
    NotNow(String),
    /// Its subject, for the moment: the stream holds as many messages of it as it may, and takes others.
    SubjectFull(String),
    /// Its subject, as long as streams and permissions are as they are.
    NoPlace(String),
    /// Its stream: no answer, or a passing refusal. The message may or may not be there; publish it again with the same id.
    Unavailable(String),
    /// The connection: nothing was sent.
    NoConnection(String),
    /// This message, under its id: it was not published, and the stream holds another message under that id.
    IdTaken(String),
}

impl PublishError {
    fn text(&self) -> &str {
        match self {
            PublishError::Refused(text)
            | PublishError::NotNow(text)
            | PublishError::SubjectFull(text)
            | PublishError::NoPlace(text)
            | PublishError::Unavailable(text)
            | PublishError::NoConnection(text)
            | PublishError::IdTaken(text) => text,
        }
    }
}

impl std::fmt::Display for PublishError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
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
            return Err(PublishError::NoConnection("there is no connection to NATS".to_owned()));
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

/// How far an error reaches. A client error (4xx) is about the message, but for those listed here; any other is about the
/// stream and may pass: a stream that is full answers 503, and messages wait until it takes more.
fn classify(error: &jetstream::context::PublishError) -> PublishError {
    let text = error.to_string();
    let Some(answer) = error.source().and_then(|source| source.downcast_ref::<jetstream::Error>()) else {
        return PublishError::Unavailable(text);
    };
    match (answer.error_code(), answer.code()) {
        (ErrorCode::STREAM_STORE_FAILED, _) => not_stored(text),
        (DUPLICATE_UNDER_WAY, _) => PublishError::NotNow(text),
        (ErrorCode::STREAM_SEALED | ErrorCode::MESSAGE_COUNTER_BROKEN, _) => PublishError::NoPlace(text),
        // The account has used up what it may: the stream takes nothing until something is removed.
        (ErrorCode::ACCOUNT_RESOURCES_EXCEEDED, _) | (_, TOO_MANY_REQUESTS) => PublishError::Unavailable(text),
        (ErrorCode::STREAM_ROLLUP_FAILED, _) | (_, 400..500) => PublishError::Refused(text),
        _ => PublishError::Unavailable(text),
    }
}

/// One code stands for all that can go wrong when a stream stores a message; its text alone says which. A text that a newer
/// server words otherwise counts as the stream's trouble.
fn not_stored(text: String) -> PublishError {
    if text.contains("per subject exceeded") {
        PublishError::SubjectFull(text)
    } else if text.contains("message to large") || text.contains("message too large") {
        PublishError::Refused(text)
    } else {
        PublishError::Unavailable(text)
    }
}

/// The stream's queue is full for the moment.
const TOO_MANY_REQUESTS: usize = 429;

/// A message with the same id is being stored right now, which may yet fail; not among the client's constants.
const DUPLICATE_UNDER_WAY: ErrorCode = ErrorCode(10_158);

#[cfg(test)]
mod tests {
    use async_nats::jetstream::context::PublishError as Failed;

    use super::*;

    /// As the client makes of a server's answer.
    fn answered(code: usize, err_code: u64, description: &str) -> PublishError {
        let answer = serde_json::json!({ "code": code, "err_code": err_code, "description": description });
        let answer: jetstream::Error = serde_json::from_value(answer).unwrap();
        classify(&Failed::with_source(PublishErrorKind::Other, answer))
    }

    #[test]
    fn publish_errors_have_the_scope_of_their_cause() {
        use PublishError::{NoPlace, NotNow, Refused, SubjectFull, Unavailable};
        for (code, err_code, description) in [
            (503, 10_077, "maximum messages exceeded"),
            (503, 10_077, "maximum bytes exceeded"),
            (503, 10_077, "no space left on device"),
            (503, 10_008, "JetStream system temporarily unavailable"),
            (503, 10_023, "insufficient resources"),
            (500, 10_047, "insufficient storage resources available"),
            (500, 10_028, "insufficient memory resources available"),
            (400, 10_002, "resource limits exceeded for account"),
            (429, 10_167, "too many requests"),
            (500, 10_118, "stream is offline"),
            (503, 99_999, "an error of a newer server"),
        ] {
            assert!(matches!(answered(code, err_code, description), Unavailable(_)), "{description}");
        }
        let full = answered(503, 10_077, "maximum messages per subject exceeded");
        assert!(matches!(&full, SubjectFull(why) if why.contains("per subject")), "{full:?}");
        assert!(matches!(answered(400, 10_109, "invalid operation on sealed stream"), NoPlace(_)));
        assert!(matches!(answered(500, 10_172, "message counter is broken"), NoPlace(_)));
        assert!(matches!(answered(409, 10_158, "duplicate message id is in process"), NotNow(_)));
        for (code, err_code, description) in [
            (400, 10_054, "message size exceeds maximum allowed"),
            (400, 10_097, "header size exceeds maximum allowed of 64k"),
            (503, 10_077, "message to large"),
            (400, 10_060, "expected stream does not match"),
            (400, 10_070, "wrong last msg ID: 1"),
            (400, 10_071, "wrong last sequence: 7"),
            (400, 10_164, "wrong last sequence"),
            (400, 10_165, "invalid per-message TTL"),
            (400, 10_166, "per-message TTL is disabled"),
            (400, 10_188, "message schedules is disabled"),
            (500, 10_111, "rollup not permitted"),
        ] {
            assert!(matches!(answered(code, err_code, description), Refused(_)), "{description}");
        }
    }
}
