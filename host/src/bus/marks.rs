//! The broker's side of marks: a short text under a subject of the installation's own, of which the last few are kept.

use anyhow::{Context, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::context::PublishErrorKind;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::Bus;
use super::streams::StreamSpec;

/// The stream of marks.
pub const MARK_STREAM: &str = "ONCELY_MARK";

/// What that stream holds.
const MARK_SUBJECTS: &str = "oncely.mark.>";

/// How many marks of an installation it keeps.
const KEPT: i64 = 10;

/// A mark as it stands on the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMark {
    pub sequence: u64,
    pub text: String,
}

/// The stream of marks, to be made.
pub fn mark_stream() -> StreamSpec {
    StreamSpec { kept_per_subject: Some(KEPT), ..StreamSpec::new(MARK_STREAM, &[MARK_SUBJECTS]) }
}

impl Bus {
    /// The last mark under a subject; none when there is none.
    pub async fn last_mark(&self, subject: &str) -> Result<Option<StoredMark>> {
        let raw = self.raw(MARK_STREAM, json!({ "last_by_subj": subject })).await.context("read the last mark")?;
        let Some(raw) = raw else { return Ok(None) };
        let text = STANDARD.decode(&raw.data).context("decode a mark")?;
        Ok(Some(StoredMark { sequence: raw.seq, text: String::from_utf8_lossy(&text).into_owned() }))
    }

    /// Writes a mark, if the last one under its subject is still at the sequence `after`, 0 for none. Returns its sequence, or
    /// none when another host was faster.
    pub async fn write_mark(&self, subject: &str, text: String, after: u64) -> Result<Option<u64>> {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", after.to_string());
        let sent = self.context.publish_with_headers(subject.to_owned(), headers, text.into()).await;
        match sent.context("write a mark")?.await {
            Ok(ack) => Ok(Some(ack.sequence)),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => Ok(None),
            Err(error) => Err(error).context("write a mark"),
        }
    }
}
