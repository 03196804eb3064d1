//! A span as it is recorded: ids, times, attributes and status.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::model::trace_context::{SpanId, TraceId};

/// A finished span.
#[derive(Debug, Clone)]
pub struct Span {
    pub trace_id: TraceId,
    pub span_id: SpanId,
    /// `None` for the root of a trace.
    pub parent: Option<SpanId>,
    pub name: String,
    pub kind: SpanKind,
    pub interval: Interval,
    pub attributes: Vec<(&'static str, Attribute)>,
    /// The code of a failure; never a text that may quote data.
    pub error: Option<String>,
}

/// The role of a span, as OpenTelemetry defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// Within the host.
    Internal,
    /// An HTTP request to the host.
    Server,
    /// A statement in the database.
    Client,
    /// A message to a stream.
    Producer,
    /// A message from a stream.
    Consumer,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    Text(String),
    Number(i64),
    Flag(bool),
}

/// The time of a span, in nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub start: u64,
    pub end: u64,
}

/// Measures an interval: its start by the clock of the system, its length by one that never jumps.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    began: SystemTime,
    running: Instant,
}

impl Stopwatch {
    pub fn start() -> Self {
        Stopwatch {
            began: SystemTime::now(),
            running: Instant::now(),
        }
    }

    /// The interval from the start until now.
    pub fn stop(&self) -> Interval {
        let since_epoch = self.began.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Interval {
            start: nanoseconds(since_epoch),
            end: nanoseconds(since_epoch.saturating_add(self.running.elapsed())),
        }
    }
}

impl From<&str> for Attribute {
    fn from(text: &str) -> Self {
        Attribute::Text(text.to_owned())
    }
}

impl From<String> for Attribute {
    fn from(text: String) -> Self {
        Attribute::Text(text)
    }
}

impl From<bool> for Attribute {
    fn from(flag: bool) -> Self {
        Attribute::Flag(flag)
    }
}

impl From<u32> for Attribute {
    fn from(number: u32) -> Self {
        Attribute::Number(number.into())
    }
}

impl From<u64> for Attribute {
    fn from(number: u64) -> Self {
        Attribute::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<usize> for Attribute {
    fn from(number: usize) -> Self {
        Attribute::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}
