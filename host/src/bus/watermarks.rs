//! The broker's side of watermarks: a short text under the installation's own subject. The stream
//! keeps the last few.

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::context::PublishErrorKind;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::Bus;
use super::streams::StreamSpec;

/// The stream of watermarks.
pub const WATERMARK_STREAM: &str = "ONCELY_WATERMARKS";

/// The subjects of that stream.
const WATERMARK_SUBJECTS: &str = "oncely.watermark.>";

/// How many watermarks of an installation the stream keeps.
const WATERMARKS_KEPT: i64 = 10;

/// A watermark as stored on the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWatermark {
    /// Its sequence on the watermark stream.
    pub sequence: u64,
    /// The body of the message; invalid UTF-8 is replaced.
    pub text: String,
}

/// The definition of the watermark stream.
pub fn watermark_stream() -> StreamSpec {
    StreamSpec {
        messages_per_subject_max: Some(WATERMARKS_KEPT),
        ..StreamSpec::new(WATERMARK_STREAM, &[WATERMARK_SUBJECTS])
    }
}

impl Bus {
    /// The last watermark under a subject; `None` if there is none.
    pub async fn last_watermark(&self, subject: &str) -> Result<Option<StoredWatermark>> {
        let raw = self
            .get_raw_message(WATERMARK_STREAM, json!({ "last_by_subj": subject }))
            .await
            .context("read the last watermark")?;
        let Some(raw) = raw else { return Ok(None) };
        let text = STANDARD.decode(&raw.data).context("decode a watermark")?;
        Ok(Some(StoredWatermark {
            sequence: raw.seq,
            text: String::from_utf8_lossy(&text).into_owned(),
        }))
    }

    /// Writes a watermark if the last one under its subject is still at the sequence `after` (0 for
    /// none). Returns its sequence, or `None` if another host was faster.
    pub async fn write_watermark(
        &self,
        subject: &str,
        text: String,
        after: u64,
    ) -> Result<Option<u64>> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", after.to_string());
        let sent = self
            .context
            .publish_with_headers(subject.to_owned(), headers, text.into())
            .await;
        match sent.context("write a watermark")?.await {
            Ok(ack) => Ok(Some(ack.sequence)),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => Ok(None),
            Err(error) => Err(error).context("write a watermark"),
        }
    }
}
