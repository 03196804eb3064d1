//! Watermarks: the state of the broker, written to the database first and then to the watermark
//! stream. A comparison of the two detects a restore of the database or of the broker to an earlier
//! time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Result, StoreError};

/// How many watermarks are kept, in addition to all since the newest acknowledged one. A host that
/// is delayed by more than this many watermarks of other hosts skips its own.
pub(super) const WATERMARKS_KEPT: u32 = 100;

/// How long recovered outputs are kept, in days. Their events, dead letters included, may be
/// handled again during that time.
pub(super) const RECOVERED_KEPT_DAYS: i32 = 30;

/// The state of the broker at some moment. Every message acknowledged by then is settled in the
/// database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerState {
    /// The streams that workers consume, by name.
    pub streams: BTreeMap<String, StreamEnd>,
    /// The ack floors, by worker.
    pub consumers: BTreeMap<String, AckFloor>,
}

/// The end of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// When the stream was created.
    pub created: Timestamp,
    /// The sequence of the last message, even if it was removed since.
    pub last_sequence: u64,
    /// When the last message was stored; `None` if it was removed already.
    pub stored_at: Option<Timestamp>,
}

/// The sequence up to which a consumer has acknowledged all messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckFloor {
    /// The stream that the consumer reads.
    pub stream: String,
    /// The sequence on that stream; 0 if nothing was acknowledged.
    pub sequence: u64,
    /// The subjects that the consumer was filtered by; empty for the whole stream.
    pub subjects: Vec<String>,
    /// Messages up to this sequence may have been skipped while the filter was different; 0 for
    /// none.
    #[serde(default)]
    pub skipped_up_to: u64,
}

/// A watermark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    /// The random name under which both sides store it: 32 hex digits.
    pub name: String,
    /// When it was written, on the database's clock.
    pub written_at: Timestamp,
    /// The state of the broker just before that.
    pub seen: BrokerState,
}

/// The watermarks of a database, for the comparison with the watermark stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// The newest one.
    pub last: Option<Watermark>,
    /// The newest acknowledged one: when it was written, and its sequence on the watermark stream.
    pub acknowledged: Option<(Timestamp, u64)>,
    /// When the requested watermark was written; `None` if the database does not have it.
    pub requested_written_at: Option<Timestamp>,
    /// Whether the database has recovered outputs.
    pub has_recovered: bool,
}

/// The place where a recovery found an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredOutput {
    /// The value of `Nats-Msg-Id`.
    pub id: String,
    /// The name of the stream that holds it.
    pub stream: String,
    /// The sequence on that stream.
    pub stream_sequence: u64,
}

pub(super) fn broker_state_to_text(seen: &BrokerState) -> Result<String> {
    serde_json::to_string(seen).map_err(|error| StoreError::Unavailable(error.into()))
}

pub(super) fn broker_state_from_text(text: &str) -> Result<BrokerState> {
    let seen = serde_json::from_str(text);
    seen.map_err(|error| {
        StoreError::Unavailable(anyhow::Error::new(error).context("read a watermark"))
    })
}
