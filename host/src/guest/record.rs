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
pub const RECORD_FORM: u32 = 2;

/// How much of what a call asks and sees is kept, in bytes. From the first thing on that has no more room the record is cut.
pub const RECORD_MAX: usize = 1 << 20;

/// What is known of a call that failed. Written as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub form: u32,
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
    pub cut: bool,
    #[serde(flatten)]
    pub looks: Looks,
    /// Whether the instance had handled other messages before, so that its memory may remember them.
    pub warm: bool,
    /// Whether the machine had no memory left for the guest.
    pub starved: bool,
    pub logs: String,
    pub failure: Option<CallFailure>,
}

/// One thing the guest asked of the host, and what it saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub asked: Asked,
    /// None when the call ended before there was an answer, or when there was no room for it.
    pub saw: Option<Saw>,
}

/// What the guest looked at besides its steps: the same whenever it looks, but another for each attempt or host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Looks {
    /// At the time the attempt began.
    pub at_now: bool,
    /// At the number of the attempt.
    pub at_attempt: bool,
    /// At the seed of its hash maps, which was this one.
    pub at_seed: Option<(u64, u64)>,
}

/// What a guest can ask of the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asked {
    Send(Box<Sending>),
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
        waits: usize,
    },
    /// Whether one is.
    IsReady,
    /// To wait until one is.
    Wait,
}

/// A message to publish, as the guest asked for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sending {
    pub subject: String,
    pub headers: Headers,
    #[serde(with = "base64_text")]
    pub body: Bytes,
    pub id: Option<String>,
    pub ordering_key: Option<String>,
    pub delay_ms: Option<u64>,
    pub caused_by: Option<String>,
}

impl Sending {
    /// About how many bytes this holds.
    pub fn size(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        self.subject.len() + headers + self.body.len()
    }
}

/// What a guest was told from outside its call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Saw {
    /// What it was told follows from the call itself.
    Nothing,
    Entry(Option<StateEntry>),
    /// The key before it was changed: the version of its value, the last version it was given, and the value's size.
    Before {
        version: Option<u64>,
        last: u64,
        size: usize,
    },
    Rows(Rows),
    /// How many rows changed.
    Changed(u64),
    Refused(SqlError),
    /// What was cached.
    Cached(#[serde(with = "base64_text::maybe")] Option<Bytes>),
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
    /// record that is cut, an instance or a machine that is not as fresh as the next one, a cached value that goes away by itself.
    pub fn proof(&self) -> Option<[u8; 32]> {
        let traps = self.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::Trap);
        let whole = !self.cut && self.steps.iter().all(|step| step.saw.is_some());
        let is_cached = |step: &Step| matches!(step.saw, Some(Saw::Cached(Some(_))));
        if !traps || !whole || self.warm || self.starved || self.steps.iter().any(is_cached) {
            return None;
        }
        let now = self.looks.at_now.then_some(self.now);
        let attempt = self.looks.at_attempt.then_some(self.attempt);
        let seen = (self.version, &self.messages, &self.steps, now, attempt, self.looks.at_seed, &self.failure);
        serde_json::to_vec(&seen).ok().map(|seen| Sha256::digest(seen).into())
    }
}

impl Asked {
    /// Whether the guest asked the very same. By their text, because some numbers do not equal themselves.
    pub fn is_same(&self, other: &Asked) -> bool {
        matches!((serde_json::to_string(self), serde_json::to_string(other)), (Ok(one), Ok(two)) if one == two)
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Asked::Send(sending) => write!(f, "outbox.send to {}: {}", sending.subject, Body(&sending.body)),
            Asked::Get { key } => write!(f, "state.get {key:?}"),
            Asked::Set { key, value } => write!(f, "state.set {key:?} to {}", Body(value)),
            Asked::Delete { key } => write!(f, "state.delete {key:?}"),
            Asked::CompareAndSet { key, expected, value } => {
                let expected = expected.map_or("no version".to_owned(), |version| format!("version {version}"));
                write!(f, "state.compare-and-set {key:?} from {expected} to {}", Body(value))
            }
            Asked::Query { statement, params } => write!(f, "sql.query {statement:?} {}", Params(params)),
            Asked::Execute { statement, params } => write!(f, "sql.execute {statement:?} {}", Params(params)),
            Asked::CacheGet { key } => write!(f, "cache.get {key:?}"),
            Asked::CachePut { key, value, ttl_ms, tags } => {
                write!(f, "cache.put {key:?} for {ttl_ms} ms with the tags {tags:?}: {}", Body(value))
            }
            Asked::CacheInvalidate { tags } => write!(f, "cache.invalidate {tags:?}"),
            Asked::Remaining => f.write_str("invocation.remaining"),
            Asked::WallClock => f.write_str("the wall clock"),
            Asked::MonotonicClock => f.write_str("the monotonic clock"),
            Asked::Random { bytes } => write!(f, "{bytes} random bytes"),
            Asked::Poll { waits } => write!(f, "which of {waits} are ready"),
            Asked::IsReady => f.write_str("whether it is ready"),
            Asked::Wait => f.write_str("to wait until it is ready"),
        }
    }
}

impl fmt::Display for Saw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Saw::Nothing => f.write_str("done"),
            Saw::Entry(Some(entry)) => write!(f, "version {}: {}", entry.version, Body(&entry.value)),
            Saw::Entry(None) | Saw::Before { version: None, .. } => f.write_str("not there before"),
            Saw::Before { version: Some(version), .. } => write!(f, "was version {version}"),
            Saw::Rows(rows) => {
                write!(f, "{} rows of ({})", rows.rows.len(), rows.columns.join(", "))?;
                rows.rows.first().map_or(Ok(()), |first| write!(f, ", the first {}", Params(first)))
            }
            Saw::Changed(rows) => write!(f, "{rows} rows changed"),
            Saw::Refused(error) => write!(f, "refused: {error}"),
            Saw::Cached(Some(value)) => write!(f, "{}", Body(value)),
            Saw::Cached(None) => f.write_str("not cached"),
            Saw::Number(number) => write!(f, "{number}"),
            Saw::Time { seconds, nanoseconds } => write!(f, "{seconds}.{nanoseconds:09} s"),
            Saw::Bytes(bytes) => write!(f, "{} bytes: {}", bytes.len(), hex::encode(bytes)),
            Saw::Ready(ready) => write!(f, "{ready:?}"),
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
        write!(f, "[{}]", self.0.iter().map(text).collect::<Vec<_>>().join(", "))
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
