//! Publishing: pipelined, in order, and confirmed only by the stream's acknowledgement.

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

/// How many messages of one call may wait for acknowledgements at once. A server queues 10,000 per
/// stream and refuses more.
const IN_FLIGHT_MAX: usize = 1_000;

/// A message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingMessage {
    /// The subject to publish to, without wildcards.
    pub subject: String,
    /// The headers besides `Nats-Msg-Id`, in order.
    pub headers: Headers,
    /// Sent as `Nats-Msg-Id`: within its dedupe window the stream stores a known id only once.
    pub id: String,
    /// The payload, published unchanged.
    pub body: Bytes,
}

/// The position at which a message is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishAck {
    /// The name of the stream that stored the message.
    pub stream: String,
    /// The sequence on that stream; for a duplicate, that of the stored message.
    pub sequence: u64,
    /// The message was already stored.
    pub duplicate: bool,
}

/// The reason why a message was not published, or not known to be. Each variant states the scope of
/// the failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishError {
    /// This message, permanently: it was not published and never will be.
    Refused(String),
    /// This message, temporarily: publish it again with the same id.
    RetryLater(String),
    /// Its subject, temporarily: the stream has reached its limit for this subject and accepts
    /// others.
    SubjectFull(String),
    /// Its subject, until streams or permissions change.
    Unroutable(String),
    /// Its stream: no acknowledgement, or a temporary refusal. The message may or may not be
    /// stored; publish it again with the same id.
    Unavailable(String),
    /// The connection: nothing was sent.
    NoConnection(String),
    /// This message and its id: it was not published, and the stream holds another message under
    /// that id.
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

/// The result of publishing one message.
pub type PublishResult = Result<PublishAck, PublishError>;

/// The maximum age of the cached stream list when a subject without responders is looked up.
const STREAMS_AGE_MAX: Duration = Duration::from_secs(1);

impl Bus {
    /// Publishes messages in order and waits for all acknowledgements. Returns one result for each
    /// message, in the same order. The stream stores the accepted messages in this order too.
    pub async fn publish(&self, messages: Vec<OutgoingMessage>) -> Vec<PublishResult> {
        let mut results = Vec::with_capacity(messages.len());
        let mut open = FuturesOrdered::new();
        let connection_number = match self.publisher().ready().await {
            Ok(()) => *self.publish_connection().borrow(),
            // No connection has the number 0, so the messages are not sent.
            Err(_) => 0,
        };
        for message in messages {
            open.push_back(self.begin_publish(message, connection_number));
            if open.len() >= IN_FLIGHT_MAX {
                results.extend(open.next().await);
            }
        }
        results.extend(open.collect::<Vec<_>>().await);
        results
    }

    /// The number of the publishing connection, 0 before the first. It changes with each reconnect.
    pub fn publish_connection(&self) -> watch::Receiver<u64> {
        self.publisher().connections()
    }

    /// Whether publishing is possible now, according to the last known connection state.
    pub fn can_publish(&self) -> bool {
        self.publisher().is_connected()
    }

    /// Sends a message over the connection with this number, or not at all. The returned future
    /// resolves to the stream's acknowledgement. As long as no message fails, messages are stored
    /// in the order in which they were sent.
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
        let ack = self.publisher().send(connection_number, publication);

        let bus = self.clone();
        Box::pin(async move {
            match ack.await {
                Ok(ack) => match ack.error {
                    None => Ok(PublishAck {
                        stream: ack.stream,
                        sequence: ack.seq,
                        duplicate: ack.duplicate,
                    }),
                    Some(refusal) => Err(classify(refusal)),
                },
                Err(AckError::NotSent) => Err(PublishError::NoConnection(
                    "not connected to NATS".to_owned(),
                )),
                Err(AckError::NoResponders) => Err(bus.no_responders_error(&subject).await),
                // The server does not ack a denied message.
                Err(AckError::Unconfirmed(_)) if bus.publisher().is_denied(&subject) => {
                    Err(PublishError::Unroutable(format!(
                        "permission denied: this login may not publish to {subject}"
                    )))
                }
                Err(AckError::Unconfirmed(why)) => Err(PublishError::Unavailable(why)),
            }
        })
    }

    /// Checks a message for anything that the server would refuse or close the connection over.
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
                "the message has {size} bytes with its headers, \
                 more than the NATS server's max_payload of {most}"
            ));
        }
        Ok(())
    }

    /// The error for a subject without responders: no stream accepts it, or JetStream is starting.
    async fn no_responders_error(&self, subject: &str) -> PublishError {
        match self.streams(STREAMS_AGE_MAX).await {
            Ok(streams) if stream_for_subject(&streams, subject).is_none() => {
                PublishError::Unroutable(format!("no stream accepts the subject {subject}"))
            }
            _ => PublishError::Unavailable(
                "the stream does not respond; JetStream may be starting".to_owned(),
            ),
        }
    }
}

/// The header that carries a message's id.
const MESSAGE_ID_HEADER: &str = "Nats-Msg-Id";

/// The first line of each header block.
const HEADER_BLOCK_PREFIX: &str = "NATS/1.0\r\n";

fn check_header(name: &str, value: &str) -> Result<(), String> {
    let shown = name.escape_debug();
    if name.is_empty() {
        return Err("a header has no name".to_owned());
    }
    HeaderName::from_str(name)
        .map_err(|error| format!("`{shown}` is not a valid header name: {error}"))?;
    HeaderValue::from_str(value)
        .map_err(|error| format!("the value of the header `{name}` cannot be sent: {error}"))?;
    Ok(())
}

/// All headers of a message, with its id in place of any other message id.
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

/// The size of the header block in bytes, as the server counts it.
fn headers_size(message: &OutgoingMessage) -> usize {
    let lines: usize = headers_with_id(message)
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum();
    HEADER_BLOCK_PREFIX.len() + lines + 2
}

/// Classifies a refusal by its scope. A client error (4xx) concerns the message, except for the
/// codes listed here. Any other error concerns the stream and may pass: a full stream answers 503,
/// and messages wait until it accepts more.
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
        // The account limit is exhausted: the stream accepts nothing until something is removed.
        (ErrorCode::ACCOUNT_RESOURCES_EXCEEDED, _) | (_, TOO_MANY_REQUESTS) => {
            PublishError::Unavailable(text)
        }
        (ErrorCode::STREAM_ROLLUP_FAILED, _) | (_, 400..500) => PublishError::Refused(text),
        _ => PublishError::Unavailable(text),
    }
}

/// One code covers every failure to store a message; only its text distinguishes them. An unknown
/// text, for example of a newer server, counts as a failure of the stream.
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

/// A message with the same id is being stored right now, and that may still fail. The client
/// library has no constant for this code.
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
