//! Single messages of a stream, fetched as JSON, so that no header can break the connection.

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;

use super::decode::{decode_headers, is_delete_marker};
use super::pull::headers;
use super::wire::IncomingMessage;
use super::{Bus, OutgoingMessage};
use crate::model::message::{InvalidEventId, event_id};

/// The server's response to a request for one message.
#[derive(Deserialize)]
struct GetMessageResponse {
    message: Option<RawMessage>,
    error: Option<ApiError>,
}

/// The reason for a missing message.
#[derive(Deserialize)]
struct ApiError {
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// No message is at this sequence, or none from there on matches the query.
const MESSAGE_NOT_FOUND: u64 = 10037;

/// A message as JSON.
#[derive(Deserialize)]
pub(super) struct RawMessage {
    pub seq: u64,
    subject: String,
    /// The header block, in Base64.
    #[serde(default)]
    hdrs: String,
    /// The body, in Base64.
    #[serde(default)]
    pub data: String,
    pub time: jiff::Timestamp,
}

impl RawMessage {
    /// The message as a consumer receives it, except for bytes of the subject that are not UTF-8.
    pub(super) fn incoming(&self) -> Result<IncomingMessage> {
        let headers = STANDARD
            .decode(&self.hdrs)
            .context("decode a message's headers")?;
        let body = STANDARD
            .decode(&self.data)
            .context("decode a message's body")?;
        Ok(IncomingMessage {
            sid: 0,
            subject: self.subject.clone().into(),
            reply: None,
            headers: headers.into(),
            body: body.into(),
        })
    }

    /// The id under which the message was published; empty if it has none.
    fn message_id(&self) -> Result<String> {
        let block = STANDARD
            .decode(&self.hdrs)
            .context("decode a message's headers")?;
        let block = String::from_utf8_lossy(&block);
        let id = block.lines().find_map(|line| {
            line.split_once(':')
                .filter(|(name, _)| *name == "Nats-Msg-Id")
        });
        Ok(id.map(|(_, id)| id.trim().to_owned()).unwrap_or_default())
    }
}

/// The result of comparing an expected message with the stored one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageComparison {
    /// The stored message is equal.
    Same,
    /// Another message is stored at this position.
    Different,
    /// No message is stored at this position any more.
    Gone,
}

impl Bus {
    /// Compares a message with the one stored at a position by id, body and subject. If the stream
    /// transforms subjects, only id and body are compared.
    pub async fn compare(
        &self,
        stream: &str,
        sequence: u64,
        message: &OutgoingMessage,
    ) -> Result<MessageComparison> {
        let Some(raw) = self.raw_message_at(stream, sequence).await? else {
            return Ok(MessageComparison::Gone);
        };
        let body = STANDARD
            .decode(&raw.data)
            .context("decode a message's body")?;
        let is_same = raw.message_id()? == message.id
            && body == message.body
            && (raw.subject == message.subject || self.has_subject_transform(stream).await?);
        Ok(if is_same {
            MessageComparison::Same
        } else {
            MessageComparison::Different
        })
    }

    async fn has_subject_transform(&self, stream: &str) -> Result<bool> {
        Ok(self
            .stream(stream)
            .await?
            .is_some_and(|stream| stream.has_subject_transform))
    }

    /// The id of the message at a position: empty if the message has none, `None` if there is no
    /// message.
    pub async fn message_id_at(&self, stream: &str, sequence: u64) -> Result<Option<String>> {
        self.raw_message_at(stream, sequence)
            .await?
            .map(|raw| raw.message_id())
            .transpose()
    }

    /// The time at which the message at a position was stored; `None` if there is no message.
    pub async fn stored_at(&self, stream: &str, sequence: u64) -> Result<Option<jiff::Timestamp>> {
        Ok(self
            .raw_message_at(stream, sequence)
            .await?
            .map(|raw| raw.time))
    }

    /// The subject and the event id of the message at a position. `None` if there is no message, or
    /// if it is unreadable or no event.
    pub async fn event_at(&self, stream: &str, sequence: u64) -> Result<Option<(String, String)>> {
        let Some(raw) = self.raw_message_at(stream, sequence).await? else {
            return Ok(None);
        };
        // In JSON, the server replaces bytes that are not UTF-8.
        if raw
            .subject
            .contains(|c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER)
        {
            return Ok(None);
        }
        let block = STANDARD
            .decode(&raw.hdrs)
            .context("decode a message's headers")?;
        let body = STANDARD
            .decode(&raw.data)
            .context("decode a message's body")?;
        if is_delete_marker(&block, &body) {
            return Ok(None);
        }
        let Ok(block) = decode_headers(&block) else {
            return Ok(None);
        };
        let id = match event_id(
            &headers(Some(&block.headers)),
            Some(&body),
            stream,
            raw.time,
            sequence,
        ) {
            Ok(id) => id,
            Err(InvalidEventId { fallback_id, .. }) => fallback_id,
        };
        Ok(Some((raw.subject, id)))
    }

    /// The storage time of the first message from a sequence on that matches one of `subjects`
    /// (patterns; empty for all).
    pub(super) async fn first_stored_at(
        &self,
        stream: &str,
        subjects: &[String],
        from: u64,
    ) -> Result<Option<jiff::Timestamp>> {
        let every = [">".to_owned()];
        let mut first: Option<jiff::Timestamp> = None;
        for subject in if subjects.is_empty() {
            &every
        } else {
            subjects
        } {
            let query = json!({ "seq": from, "next_by_subj": subject });
            if let Some(raw) = self
                .get_raw_message(stream, query)
                .await
                .context("find the oldest waiting message")?
            {
                first = Some(first.map_or(raw.time, |first| first.min(raw.time)));
            }
        }
        Ok(first)
    }

    async fn raw_message_at(&self, stream: &str, sequence: u64) -> Result<Option<RawMessage>> {
        // The sequence of a stream that was empty; the server takes it for a missing one.
        if sequence == 0 {
            return Ok(None);
        }
        let query = json!({ "seq": sequence });
        self.get_raw_message(stream, query)
            .await
            .with_context(|| format!("read message {sequence} of {stream}"))
    }

    pub(super) async fn get_raw_message(
        &self,
        stream: &str,
        query: serde_json::Value,
    ) -> Result<Option<RawMessage>> {
        let answer: GetMessageResponse = self
            .context
            .request(format!("STREAM.MSG.GET.{stream}"), &query)
            .await?;
        match answer.error {
            Some(refusal) if refusal.err_code != MESSAGE_NOT_FOUND => {
                bail!("{}", refusal.description)
            }
            _ => Ok(answer.message),
        }
    }
}
