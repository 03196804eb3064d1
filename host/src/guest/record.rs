//! The record of a call that failed: what the guest was given, what it asked, what it saw, and how it ended.
//!
//! A guest is a function of these: run again with the same answers it does the same. That makes a replay possible, and it
//! makes two records that agree a proof.

use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::call::{CallFailure, FailureKind};
use crate::model::base64_text;
use crate::model::keyed_state::StateEntry;
use crate::model::message::{Headers, Message};
use crate::model::sql::{Dialect, Rows, SqlError, Value};

/// The form in which records are written; a host reads those of its own form alone.
pub const RECORD_FORMAT: u32 = 2;

/// How much of what a call asks and sees is kept, in bytes. From the first thing on that has no more room the record is truncated.
pub const RECORD_MAX: usize = 1 << 20;

/// What is known of a call that failed. Written as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    /// Of the worker.
    pub version: u32,
    pub attempt: u32,
    /// When the attempt began.
    pub now: Timestamp,
    pub dialect: Dialect,
    /// The largest payload the broker took, in bytes.
    pub payload_max: usize,
    /// One for a handler; those of the whole call for a batch handler.
    pub messages: Vec<Message>,
    pub steps: Vec<Step>,
    /// Whether the guest asked for more than there was room for, in this record or in those of its batch.
    pub truncated: bool,
    #[serde(flatten)]
    pub inputs: AttemptInputs,
    /// Whether the instance had handled other messages before, so that its memory may remember them.
    pub warm: bool,
    /// Whether the machine had no memory left for the guest.
    pub out_of_memory: bool,
    pub logs: String,
    pub failure: Option<CallFailure>,
}

/// One thing the guest asked of the host, and what it saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub call: HostCall,
    /// None when the call ended before there was an answer, or when there was no room for it.
    pub result: Option<HostResult>,
}

/// Inputs of a call that differ for each attempt or host, and do not change during the call.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AttemptInputs {
    /// At the time the attempt began.
    pub has_read_now: bool,
    /// At the number of the attempt.
    pub has_read_attempt: bool,
    /// At the seed of its hash maps, which was this one.
    pub hash_seed: Option<(u64, u64)>,
}

/// What a guest can ask of the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostCall {
    Send(Box<OutgoingMessage>),
    Get {
        key: String,
    },
    Set {
        key: String,
        #[serde(with = "base64_text")]
        value: Bytes,
    },
    Delete {
        key: String,
    },
    CompareAndSet {
        key: String,
        expected: Option<u64>,
        #[serde(with = "base64_text")]
        value: Bytes,
    },
    Query {
        statement: String,
        params: Vec<Value>,
    },
    Execute {
        statement: String,
        params: Vec<Value>,
    },
    CacheGet {
        key: String,
    },
    CachePut {
        key: String,
        #[serde(with = "base64_text")]
        value: Bytes,
        ttl_ms: u64,
        tags: Vec<String>,
    },
    CacheInvalidate {
        tags: Vec<String>,
    },
    /// How much time is left.
    Remaining,
    WallClock,
    MonotonicClock,
    /// So many random bytes.
    Random {
        bytes: u64,
    },
    /// Which of so many things it waits for are ready.
    Poll {
        pollables: usize,
    },
    /// Whether one is.
    IsReady,
    /// To wait until one is.
    Wait,
}

/// A message to publish, as the guest asked for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutgoingMessage {
    pub subject: String,
    pub headers: Headers,
    #[serde(with = "base64_text")]
    pub body: Bytes,
    pub id: Option<String>,
    pub ordering_key: Option<String>,
    pub delay_ms: Option<u64>,
    pub caused_by: Option<String>,
}

impl OutgoingMessage {
    /// About how many bytes this holds.
    pub fn size(&self) -> usize {
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| name.len() + value.len() + 8)
            .sum();
        self.subject.len() + headers + self.body.len()
    }
}

/// What a guest was told from outside its call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostResult {
    /// What it was told follows from the call itself.
    Nothing,
    Entry(Option<StateEntry>),
    /// The key before it was changed: the version of its value, the last version it was given, and the value's size.
    PreviousEntry {
        version: Option<u64>,
        last: u64,
        size: usize,
    },
    Rows(Rows),
    /// How many rows changed.
    Changed(u64),
    Refused(SqlError),
    /// What was cached.
    Cached(#[serde(with = "base64_text::optional")] Option<Bytes>),
    Number(u64),
    Time {
        seconds: u64,
        nanoseconds: u32,
    },
    #[serde(with = "base64_text")]
    Bytes(Bytes),
    Ready(Vec<u32>),
}

impl Record {
    /// The record as it is kept.
    pub fn json(&self) -> Result<Bytes, serde_json::Error> {
        serde_json::to_vec(self).map(Bytes::from)
    }

    /// A digest of everything the guest saw and did up to its trap. Two attempts with the same one prove that a third does
    /// the same as long as the data stay as they are. None where that would prove nothing: another failure than a trap, a
    /// record that is truncated, an instance or a machine that is not as fresh as the next one, a cached value that goes away by itself.
    pub fn trap_digest(&self) -> Option<[u8; 32]> {
        let traps = self
            .failure
            .as_ref()
            .is_some_and(|failure| failure.kind == FailureKind::Trap);
        let is_complete = !self.truncated && self.steps.iter().all(|step| step.result.is_some());
        let is_cached = |step: &Step| matches!(step.result, Some(HostResult::Cached(Some(_))));
        if !traps
            || !is_complete
            || self.warm
            || self.out_of_memory
            || self.steps.iter().any(is_cached)
        {
            return None;
        }
        let now = self.inputs.has_read_now.then_some(self.now);
        let attempt = self.inputs.has_read_attempt.then_some(self.attempt);
        let seen = (
            self.version,
            &self.messages,
            &self.steps,
            now,
            attempt,
            self.inputs.hash_seed,
            &self.failure,
        );
        serde_json::to_vec(&seen)
            .ok()
            .map(|seen| Sha256::digest(seen).into())
    }
}

impl HostCall {
    /// Whether the guest asked the very same. By their text, because some numbers do not equal themselves.
    pub fn is_same(&self, other: &HostCall) -> bool {
        matches!((serde_json::to_string(self), serde_json::to_string(other)), (Ok(one), Ok(two)) if one == two)
    }
}

impl fmt::Display for HostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostCall::Send(outgoing) => write!(
                f,
                "outbox.send to {}: {}",
                outgoing.subject,
                Body(&outgoing.body)
            ),
            HostCall::Get { key } => write!(f, "state.get {key:?}"),
            HostCall::Set { key, value } => write!(f, "state.set {key:?} to {}", Body(value)),
            HostCall::Delete { key } => write!(f, "state.delete {key:?}"),
            HostCall::CompareAndSet {
                key,
                expected,
                value,
            } => {
                let expected = expected.map_or("no version".to_owned(), |version| {
                    format!("version {version}")
                });
                write!(
                    f,
                    "state.compare-and-set {key:?} from {expected} to {}",
                    Body(value)
                )
            }
            HostCall::Query { statement, params } => {
                write!(f, "sql.query {statement:?} {}", Params(params))
            }
            HostCall::Execute { statement, params } => {
                write!(f, "sql.execute {statement:?} {}", Params(params))
            }
            HostCall::CacheGet { key } => write!(f, "cache.get {key:?}"),
            HostCall::CachePut {
                key,
                value,
                ttl_ms,
                tags,
            } => {
                write!(
                    f,
                    "cache.put {key:?} for {ttl_ms} ms with the tags {tags:?}: {}",
                    Body(value)
                )
            }
            HostCall::CacheInvalidate { tags } => write!(f, "cache.invalidate {tags:?}"),
            HostCall::Remaining => f.write_str("invocation.remaining"),
            HostCall::WallClock => f.write_str("the wall clock"),
            HostCall::MonotonicClock => f.write_str("the monotonic clock"),
            HostCall::Random { bytes } => write!(f, "{bytes} random bytes"),
            HostCall::Poll { pollables } => write!(f, "which of {pollables} are ready"),
            HostCall::IsReady => f.write_str("whether it is ready"),
            HostCall::Wait => f.write_str("to wait until it is ready"),
        }
    }
}

impl fmt::Display for HostResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostResult::Nothing => f.write_str("done"),
            HostResult::Entry(Some(entry)) => {
                write!(f, "version {}: {}", entry.version, Body(&entry.value))
            }
            HostResult::Entry(None) | HostResult::PreviousEntry { version: None, .. } => {
                f.write_str("not there before")
            }
            HostResult::PreviousEntry {
                version: Some(version),
                ..
            } => write!(f, "was version {version}"),
            HostResult::Rows(rows) => {
                write!(
                    f,
                    "{} rows of ({})",
                    rows.rows.len(),
                    rows.columns.join(", ")
                )?;
                rows.rows
                    .first()
                    .map_or(Ok(()), |first| write!(f, ", the first {}", Params(first)))
            }
            HostResult::Changed(rows) => write!(f, "{rows} rows changed"),
            HostResult::Refused(error) => write!(f, "refused: {error}"),
            HostResult::Cached(Some(value)) => write!(f, "{}", Body(value)),
            HostResult::Cached(None) => f.write_str("not cached"),
            HostResult::Number(number) => write!(f, "{number}"),
            HostResult::Time {
                seconds,
                nanoseconds,
            } => write!(f, "{seconds}.{nanoseconds:09} s"),
            HostResult::Bytes(bytes) => write!(f, "{} bytes: {}", bytes.len(), hex::encode(bytes)),
            HostResult::Ready(ready) => write!(f, "{ready:?}"),
        }
    }
}

/// Values in a row.
struct Params<'v>(&'v [Value]);

impl fmt::Display for Params<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value: &Value| match value {
            Value::Null => "null".to_owned(),
            Value::Boolean(it) => it.to_string(),
            Value::Int64(it) | Value::Timestamp(it) => it.to_string(),
            Value::Float64(it) => it.to_string(),
            Value::Bytes(it) => format!("x'{}'", hex::encode(it)),
            Value::Text(it) | Value::Json(it) => format!("{it:?}"),
            Value::Decimal(it) | Value::Uuid(it) | Value::Date(it) | Value::Time(it) => it.clone(),
        };
        write!(
            f,
            "[{}]",
            self.0.iter().map(text).collect::<Vec<_>>().join(", ")
        )
    }
}

/// Bytes as text where they are text.
struct Body<'b>(&'b [u8]);

impl fmt::Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(self.0) {
            Ok(text) => write!(f, "{text:?}"),
            Err(_) => write!(f, "x'{}'", hex::encode(self.0)),
        }
    }
}
