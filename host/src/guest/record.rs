//! Record of a failed call: its inputs, its host calls with their results, and its failure.
//!
//! A guest is a function of these inputs. With the same results it behaves the same again. This
//! makes a replay possible, and it makes two equal records a proof of a deterministic failure.

use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::failure::{CallFailure, FailureKind};
use crate::model::base64_text;
use crate::model::keyed_state::StateEntry;
use crate::model::message::{Headers, Message};
use crate::model::sql::{Dialect, Rows, SqlError, Value};

/// Version of the record format. A host reads records of its own version only.
pub const RECORD_FORMAT: u32 = 3;

/// Maximum size of the recorded calls and results, in bytes. A record is truncated at the first
/// step that exceeds it.
pub const RECORD_MAX: usize = 1 << 20;

/// The stored record of a failed call. Serialized as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_FORMAT`] of the host that wrote the record.
    pub format: u32,
    /// Version of the worker.
    pub version: u32,
    /// Number of the attempt; 1 for the first one.
    pub attempt: u32,
    /// Start of the attempt.
    pub now: Timestamp,
    /// SQL dialect of the database.
    pub dialect: Dialect,
    /// Largest payload that the broker accepted, in bytes.
    pub payload_max: usize,
    /// One message for a handler. All messages of the call for a batch handler.
    pub messages: Vec<Message>,
    /// Host calls in the order in which the guest made them.
    pub steps: Vec<Step>,
    /// Whether the record is truncated, by its own limit or by that of its batch.
    pub truncated: bool,
    /// Inputs that differ between attempts or hosts.
    #[serde(flatten)]
    pub inputs: AttemptInputs,
    /// Whether the instance had handled other messages before, so that its memory may depend on
    /// them.
    pub warm: bool,
    /// Whether the machine ran out of memory during the call.
    pub out_of_memory: bool,
    /// Log output of the guest, one line per entry.
    pub logs: String,
    /// Failure of the message; `None` until the delivery adds it.
    pub failure: Option<CallFailure>,
}

/// One host call and its result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// Function and arguments.
    pub call: HostCall,
    /// `None` when the call ended without a result, or when the result exceeded the size limit.
    pub result: Option<HostResult>,
}

/// Inputs of a call that differ between attempts or hosts and do not change during the call.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AttemptInputs {
    /// Whether the guest read the start time of the attempt.
    pub has_read_now: bool,
    /// Whether the guest read the number of the attempt.
    pub has_read_attempt: bool,
    /// The seed of its hash maps, if the guest read it.
    pub hash_seed: Option<(u64, u64)>,
}

/// A call from the guest to the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostCall {
    /// `outbox.send`.
    Send(Box<OutgoingMessage>),
    /// `state.get`.
    Get {
        /// Key within the state of the worker.
        key: String,
    },
    /// A page of the keys of the state.
    List {
        /// Beginning of the keys.
        prefix: String,
        /// The key that the page follows.
        after: String,
    },
    /// `state.set`.
    Set {
        /// Key within the state of the worker.
        key: String,
        /// New value.
        #[serde(with = "base64_text")]
        value: Bytes,
    },
    /// `state.delete`.
    Delete {
        /// Key within the state of the worker.
        key: String,
    },
    /// `state.compare-and-set`.
    CompareAndSet {
        /// Key within the state of the worker.
        key: String,
        /// Version that the key must have; `None` if it must not exist.
        expected: Option<u64>,
        /// New value.
        #[serde(with = "base64_text")]
        value: Bytes,
    },
    /// `sql.query`.
    Query {
        /// One statement, as the guest passed it.
        statement: String,
        /// Values of the parameters, in order.
        params: Vec<Value>,
    },
    /// `sql.execute`.
    Execute {
        /// One statement, as the guest passed it.
        statement: String,
        /// Values of the parameters, in order.
        params: Vec<Value>,
    },
    /// `sql.defer`.
    Defer {
        /// One statement, as the guest passed it.
        statement: String,
        /// Values of the parameters, in order.
        params: Vec<Value>,
    },
    /// Run of the deferred statements.
    RunDeferred,
    /// `cache.get`.
    CacheGet {
        /// Key within the cache of the worker.
        key: String,
    },
    /// `cache.put`.
    CachePut {
        /// Key within the cache of the worker.
        key: String,
        /// New value.
        #[serde(with = "base64_text")]
        value: Bytes,
        /// Time to live, in milliseconds.
        ttl_ms: u64,
        /// Tags that invalidate the value.
        tags: Vec<String>,
    },
    /// `cache.invalidate`.
    CacheInvalidate {
        /// Tags to invalidate.
        tags: Vec<String>,
    },
    /// The time left until the deadline.
    Remaining,
    /// Current time of the WASI wall clock.
    WallClock,
    /// Current time of the WASI monotonic clock.
    MonotonicClock,
    /// A number of random bytes.
    Random {
        /// Number of bytes.
        bytes: u64,
    },
    /// Wait until at least one of several pollables is ready.
    Poll {
        /// Number of pollables.
        pollables: usize,
    },
    /// Whether one pollable is ready.
    IsReady,
    /// Wait until one pollable is ready.
    Wait,
}

/// A message to publish, as the guest passed it.
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
    /// Approximate size in bytes.
    pub fn size(&self) -> usize {
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| name.len() + value.len() + 8)
            .sum();
        self.subject.len() + headers + self.body.len()
    }
}

/// The result of a host call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostResult {
    /// The result follows from the arguments.
    Nothing,
    /// Entry of a state key; `None` if the key does not exist.
    Entry(Option<StateEntry>),
    /// The key before the change: the version of its value, its last version, and the size of the
    /// value in bytes.
    PreviousEntry {
        /// Version of the value; `None` if the key did not exist.
        version: Option<u64>,
        /// Last version of the key. The next change gets a higher one.
        last: u64,
        /// Size of the value, in bytes; 0 if the key did not exist.
        size: usize,
    },
    /// Keys of the state.
    Keys(Vec<String>),
    /// Rows of a query.
    Rows(Rows),
    /// Number of changed rows.
    Changed(u64),
    /// Error of a statement, as returned to the guest.
    Refused(SqlError),
    /// The cached value, if any.
    Cached(#[serde(with = "base64_text::optional")] Option<Bytes>),
    /// Time of the monotonic clock in nanoseconds, time left, or readiness as 0 or 1.
    Number(u64),
    /// Time of the wall clock since the Unix epoch.
    Time {
        /// Whole seconds.
        seconds: u64,
        /// Rest, below one second.
        nanoseconds: u32,
    },
    /// Random bytes.
    #[serde(with = "base64_text")]
    Bytes(Bytes),
    /// Indexes of the ready pollables.
    Ready(Vec<u32>),
}

impl Record {
    /// The record as stored.
    pub fn json(&self) -> Result<Bytes, serde_json::Error> {
        serde_json::to_vec(self).map(Bytes::from)
    }

    /// Digest of all inputs and calls of the guest up to its trap. Two attempts with the same
    /// digest prove that a third one fails the same, as long as the data do not change.
    ///
    /// `None` where equal digests would prove nothing:
    /// - The failure is not a trap.
    /// - The record is truncated or incomplete.
    /// - The instance was warm, or the machine ran out of memory. The next attempt may differ.
    /// - The guest read a cached value, which expires.
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
    /// Whether two calls are equal. Compares the JSON, because some floating-point numbers do not
    /// equal themselves.
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
            HostCall::List { prefix, after } => {
                write!(f, "state keys that begin with {prefix:?} after {after:?}")
            }
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
            HostCall::Defer { statement, params } => {
                write!(f, "sql.defer {statement:?} {}", Params(params))
            }
            HostCall::RunDeferred => f.write_str("run of the deferred statements"),
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
            HostCall::WallClock => f.write_str("wall-clock.now"),
            HostCall::MonotonicClock => f.write_str("monotonic-clock.now"),
            HostCall::Random { bytes } => write!(f, "{bytes} random bytes"),
            HostCall::Poll { pollables } => write!(f, "poll of {pollables} pollables"),
            HostCall::IsReady => f.write_str("pollable.ready"),
            HostCall::Wait => f.write_str("pollable.block"),
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
                f.write_str("no entry")
            }
            HostResult::PreviousEntry {
                version: Some(version),
                ..
            } => write!(f, "was version {version}"),
            HostResult::Keys(keys) => write!(f, "{} keys", keys.len()),
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

/// Formats parameters and column values.
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

/// Formats bytes as text if they are UTF-8, else as hex.
struct Body<'b>(&'b [u8]);

impl fmt::Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(self.0) {
            Ok(text) => write!(f, "{text:?}"),
            Err(_) => write!(f, "x'{}'", hex::encode(self.0)),
        }
    }
}
