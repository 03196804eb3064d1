//! Publishing: pipelined, in order, and believed only when the stream has answered.

use std::error::Error;
use std::str::FromStr;
use std::time::Duration;

use async_nats::header::{HeaderName, HeaderValue};
use async_nats::jetstream::ErrorCode;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use tokio::sync::watch;

use super::Bus;
use super::publisher::{AckError, ApiError, Publication};
use super::streams::stream_for_subject;
use crate::model::message::Headers;
use crate::model::subject::check_subject;

/// How many messages of one call wait for their answers at the same time. A server queues 10,000 for one stream and
/// refuses more.
const IN_FLIGHT_MAX: usize = 1_000;

/// A message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingMessage {
    pub subject: String,
    pub headers: Headers,
    /// Travels as `Nats-Msg-Id`: the stream stores a message with an id it knows only once within its dedupe window.
    pub id: String,
    pub body: Bytes,
}

/// Where a message now stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishAck {
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
    RetryLater(String),
    /// Its subject, for the moment: the stream holds as many messages of it as it may, and takes others.
    SubjectFull(String),
    /// Its subject, as long as streams and permissions are as they are.
    Unroutable(String),
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
            | PublishError::RetryLater(text)
            | PublishError::SubjectFull(text)
            | PublishError::Unroutable(text)
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

pub type PublishResult = Result<PublishAck, PublishError>;

/// The streams may be this old when a subject is looked up that nobody listens to.
const STREAMS_AGE_MAX: Duration = Duration::from_secs(1);

impl Bus {
    /// Publishes messages in order and waits for all answers; one answer for each message, in their order. What the
    /// broker takes is stored in this order too.
    pub async fn publish(&self, messages: Vec<OutgoingMessage>) -> Vec<PublishResult> {
        let mut answers = Vec::with_capacity(messages.len());
        let mut open = FuturesOrdered::new();
        let connection_number = match self.publisher().ready().await {
            Ok(()) => *self.publish_connection().borrow(),
            // No connection has this number: the messages are not sent.
            Err(_) => 0,
        };
        for message in messages {
            open.push_back(self.begin_publish(message, connection_number));
            if open.len() >= IN_FLIGHT_MAX {
                answers.extend(open.next().await);
            }
        }
        answers.extend(open.collect::<Vec<_>>().await);
        answers
    }

    /// The number of the connection that publications go over, 0 for none yet. It changes with each new one.
    pub fn publish_connection(&self) -> watch::Receiver<u64> {
        self.publisher().connections()
    }

    /// Whether something can be published now, as far as it is known.
    pub fn can_publish(&self) -> bool {
        self.publisher().is_connected()
    }

    /// Sends a message over the connection of this number, or not at all; the future it returns ends with the stream's answer.
    /// Messages are stored in the order in which they were sent, as long as none of them fails.
    pub fn begin_publish(
        &self,
        message: OutgoingMessage,
        connection_number: u64,
    ) -> BoxFuture<'static, PublishResult> {
        let (subject, size) = (
            message.subject.clone(),
            message.body.len() + headers_size(&message),
        );
        if let Err(why) = self.check(&message, size) {
            return Box::pin(std::future::ready(Err(PublishError::Refused(why))));
        }
        let headers = header_block(&message);
        let publication = Publication {
            subject: message.subject,
            headers,
            body: message.body,
        };
        let answer = self.publisher().send(connection_number, publication);
        let bus = self.clone();
        Box::pin(async move {
            match answer.await {
                Ok(ack) => match ack.error {
                    None => Ok(PublishAck {
                        stream: ack.stream,
                        sequence: ack.seq,
                        duplicate: ack.duplicate,
                    }),
                    Some(refusal) => Err(classify(refusal)),
                },
                Err(AckError::NotSent) => Err(PublishError::NoConnection(
                    "there is no connection to NATS".to_owned(),
                )),
                Err(AckError::NoResponders) => Err(bus.no_responders_error(&subject).await),
                // The server gives a denied message no answer.
                Err(AckError::Unconfirmed(_)) if bus.publisher().is_denied(&subject) => {
                    Err(PublishError::Unroutable(format!(
                        "this login may not publish to {subject}: the server denies it"
                    )))
                }
                Err(AckError::Unconfirmed(why)) => Err(PublishError::Unavailable(why)),
            }
        })
    }

    /// Why a server would not take a message, or close the connection over it.
    fn check(&self, message: &OutgoingMessage, size: usize) -> Result<(), String> {
        check_subject(&message.subject)?;
        message
            .headers
            .iter()
            .try_for_each(|(name, value)| check_header(name, value))?;
        check_header(MESSAGE_ID_HEADER, &message.id)?;
        let most = self.max_payload();
        if size > most {
            return Err(format!(
                "the message has {size} bytes with its headers, and the NATS server takes {most} (max_payload)"
            ));
        }
        Ok(())
    }

    /// Nobody listens to a subject: because no stream takes it, or because JetStream is starting.
    async fn no_responders_error(&self, subject: &str) -> PublishError {
        match self.streams(STREAMS_AGE_MAX).await {
            Ok(streams) if stream_for_subject(&streams, subject).is_none() => {
                PublishError::Unroutable(format!("no stream takes the subject {subject}"))
            }
            _ => PublishError::Unavailable(
                "nobody answers for the stream; JetStream may be starting".to_owned(),
            ),
        }
    }
}

/// Carries the id of a message.
const MESSAGE_ID_HEADER: &str = "Nats-Msg-Id";

/// What a header block begins with.
const HEADER_BLOCK_PREFIX: &str = "NATS/1.0\r\n";

fn check_header(name: &str, value: &str) -> Result<(), String> {
    let shown = name.escape_debug();
    if name.is_empty() {
        return Err("a header has no name".to_owned());
    }
    HeaderName::from_str(name)
        .map_err(|error| format!("`{shown}` cannot be a header's name: {error}"))?;
    HeaderValue::from_str(value)
        .map_err(|error| format!("the value of the header `{name}` cannot be sent: {error}"))?;
    Ok(())
}

/// All headers of a message, with its id in place of any other.
fn headers_with_id(message: &OutgoingMessage) -> impl Iterator<Item = (&str, &str)> {
    let others = message
        .headers
        .iter()
        .filter(|(name, _)| name != MESSAGE_ID_HEADER);
    others
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .chain([(MESSAGE_ID_HEADER, message.id.as_str())])
}

fn header_block(message: &OutgoingMessage) -> Vec<u8> {
    let mut block = Vec::with_capacity(headers_size(message));
    block.extend_from_slice(HEADER_BLOCK_PREFIX.as_bytes());
    for part in headers_with_id(message).flat_map(|(name, value)| [name, ": ", value, "\r\n"]) {
        block.extend_from_slice(part.as_bytes());
    }
    block.extend_from_slice(b"\r\n");
    block
}

/// As the server counts it.
fn headers_size(message: &OutgoingMessage) -> usize {
    let lines: usize = headers_with_id(message)
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum();
    HEADER_BLOCK_PREFIX.len() + lines + 2
}

/// How far a refusal reaches. A client error (4xx) is about the message, but for those listed here; any other is about the
/// stream and may pass: a stream that is full answers 503, and messages wait until it takes more.
fn classify(refusal: ApiError) -> PublishError {
    let ApiError {
        code,
        err_code,
        description: text,
    } = refusal;
    match (ErrorCode(err_code), code) {
        (ErrorCode::STREAM_STORE_FAILED, _) => classify_store_failure(text),
        (DUPLICATE_IN_PROCESS, _) => PublishError::RetryLater(text),
        (ErrorCode::STREAM_SEALED | ErrorCode::MESSAGE_COUNTER_BROKEN, _) => {
            PublishError::Unroutable(text)
        }
        // The account has used up what it may: the stream takes nothing until something is removed.
        (ErrorCode::ACCOUNT_RESOURCES_EXCEEDED, _) | (_, TOO_MANY_REQUESTS) => {
            PublishError::Unavailable(text)
        }
        (ErrorCode::STREAM_ROLLUP_FAILED, _) | (_, 400..500) => PublishError::Refused(text),
        _ => PublishError::Unavailable(text),
    }
}

/// One code stands for all that can go wrong when a stream stores a message; its text alone says which. A text that a newer
/// server words otherwise counts as the stream's trouble.
fn classify_store_failure(text: String) -> PublishError {
    if text.contains("per subject exceeded") {
        PublishError::SubjectFull(text)
    } else if text.contains("message to large") || text.contains("message too large") {
        PublishError::Refused(text)
    } else {
        PublishError::Unavailable(text)
    }
}

/// The stream's queue is full for the moment.
const TOO_MANY_REQUESTS: u64 = 429;

/// A message with the same id is being stored right now, which may yet fail; not among the client's constants.
const DUPLICATE_IN_PROCESS: ErrorCode = ErrorCode(10_158);

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(code: u64, err_code: u64, description: &str) -> PublishError {
        classify(ApiError {
            code,
            err_code,
            description: description.to_owned(),
        })
    }

    #[test]
    fn publish_errors_have_the_scope_of_their_cause() {
        use PublishError::{Refused, RetryLater, SubjectFull, Unavailable, Unroutable};
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
            assert!(
                matches!(answered(code, err_code, description), Unavailable(_)),
                "{description}"
            );
        }
        let full = answered(503, 10_077, "maximum messages per subject exceeded");
        assert!(
            matches!(&full, SubjectFull(why) if why.contains("per subject")),
            "{full:?}"
        );
        assert!(matches!(
            answered(400, 10_109, "invalid operation on sealed stream"),
            Unroutable(_)
        ));
        assert!(matches!(
            answered(500, 10_172, "message counter is broken"),
            Unroutable(_)
        ));
        assert!(matches!(
            answered(409, 10_158, "duplicate message id is in process"),
            RetryLater(_)
        ));
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
            assert!(
                matches!(answered(code, err_code, description), Refused(_)),
                "{description}"
            );
        }
    }
}
