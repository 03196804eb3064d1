//! Publishing: pipelined, in order, and believed only when the stream has answered.

use std::str::FromStr;

use async_nats::header::{HeaderMap, HeaderName, HeaderValue, NATS_MESSAGE_ID};
use async_nats::jetstream::context::{PublishAckFuture, PublishErrorKind};
use bytes::Bytes;

use super::Bus;
use crate::message::Headers;

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
    /// It cannot be published as it is.
    Refused(String),
}

impl std::fmt::Display for PublishError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PublishError::Unavailable(why) | PublishError::Refused(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for PublishError {}

impl Bus {
    /// Publishes messages in order and waits for all answers; one answer for each message, in their order.
    pub async fn publish(&self, messages: Vec<Outgoing>) -> Vec<Result<PublishedAt, PublishError>> {
        let mut sent = Vec::with_capacity(messages.len());
        for message in messages {
            sent.push(self.send(message).await);
        }
        let mut answers = Vec::with_capacity(sent.len());
        for sent in sent {
            answers.push(match sent {
                Ok(answer) => match answer.await {
                    Ok(ack) => Ok(PublishedAt { stream: ack.stream, sequence: ack.sequence, duplicate: ack.duplicate }),
                    Err(error) => Err(classify(&error)),
                },
                Err(error) => Err(error),
            });
        }
        answers
    }

    /// Sends one message; the answer is yet to come.
    async fn send(&self, message: Outgoing) -> Result<PublishAckFuture, PublishError> {
        // A publication into a broken connection would be buffered and its answer awaited for nothing.
        if !self.is_connected() {
            return Err(PublishError::Unavailable("no connection to NATS".to_owned()));
        }
        let headers = headers(&message)?;
        let size = message.body.len() + headers_size(&message);
        let most = self.max_payload();
        if size > most {
            // The server would close the connection over it.
            return Err(PublishError::Refused(format!(
                "the message has {size} bytes with its headers, and the NATS server takes {most} (max_payload)"
            )));
        }
        let publish = async_nats::jetstream::message::PublishMessage::build().payload(message.body).headers(headers);
        self.context.send_publish(message.subject, publish).await.map_err(|error| classify(&error))
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
    HeaderName::from_str(name)
        .map_err(|error| PublishError::Refused(format!("`{}` cannot be a header's name: {error}", name.escape_debug())))
}

fn header_value(name: &str, value: &str) -> Result<HeaderValue, PublishError> {
    HeaderValue::from_str(value)
        .map_err(|error| PublishError::Refused(format!("the value of the header `{name}` cannot be sent: {error}")))
}

/// As the server counts it, and a little more.
fn headers_size(message: &Outgoing) -> usize {
    let lines: usize = message.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    lines + "NATS/1.0\r\nNats-Msg-Id: \r\n\r\n".len() + message.id.len()
}

fn classify(error: &async_nats::jetstream::context::PublishError) -> PublishError {
    let text = format!("{:#}", anyhow::anyhow!(error.to_string()));
    match error.kind() {
        PublishErrorKind::MaxPayloadExceeded => PublishError::Refused(text),
        // The stream may be made, or be back, in a moment.
        PublishErrorKind::StreamNotFound => PublishError::Unavailable("no stream holds the subject".to_owned()),
        _ => PublishError::Unavailable(text),
    }
}
