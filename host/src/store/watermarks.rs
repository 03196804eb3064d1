//! Watermarks: what the database knows of the broker, written here first and then on the stream of marks, so that each of the two
//! tells whether the other was restored to an earlier time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Result, StoreError};

/// How many marks are kept, beside all since the newest one that the broker has acknowledged. A host whose turn comes later
/// than so many others leaves its mark to the next turn.
pub(super) const WATERMARKS_KEPT: u32 = 100;

/// For how long it is known which outputs were found on their streams by a recovery, in days: their events may be handled
/// again for as long, dead letters among them.
pub(super) const RECOVERED_KEPT_DAYS: i32 = 30;

/// What was seen of the broker at some moment: everything acknowledged by then is settled in the database that says so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerState {
    /// The streams that workers read, by name.
    pub streams: BTreeMap<String, StreamEnd>,
    /// By worker.
    pub consumers: BTreeMap<String, AckFloor>,
}

/// Where a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// When the stream was made.
    pub created: Timestamp,
    pub last_sequence: u64,
    /// When the message there was stored; none when it was gone already.
    pub stored_at: Option<Timestamp>,
}

/// Up to where a consumer had acknowledged everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckFloor {
    pub stream: String,
    pub sequence: u64,
    /// The subjects that the consumer took then; empty for all of the stream.
    pub subjects: Vec<String>,
    /// Messages up to this sequence may have been passed over while the consumer took other subjects; 0 for none.
    #[serde(default)]
    pub skipped_up_to: u64,
}

/// A mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    pub name: String,
    pub written_at: Timestamp,
    pub seen: BrokerState,
}

/// The marks of a database, as they are compared with what stands on the stream of marks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// The newest one.
    pub last: Option<Watermark>,
    /// The newest one that the broker acknowledged: when it was written, and its sequence on the stream of marks.
    pub acknowledged: Option<(Timestamp, u64)>,
    /// When the mark that was asked about was written; none when it is not here.
    pub known: Option<Timestamp>,
    /// Whether outputs are known that a recovery found on their streams.
    pub has_recovered: bool,
}

/// Where an output was found by a recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredOutput {
    pub id: String,
    pub stream: String,
    pub stream_sequence: u64,
}

pub(super) fn broker_state_to_text(seen: &BrokerState) -> Result<String> {
    serde_json::to_string(seen).map_err(|error| StoreError::Unavailable(error.into()))
}

pub(super) fn broker_state_from_text(text: &str) -> Result<BrokerState> {
    let seen = serde_json::from_str(text);
    seen.map_err(|error| StoreError::Unavailable(anyhow::Error::new(error).context("read a mark")))
}
