//! This delivery: which attempt it is, how long it may take, and what identifies it to others.

use std::time::Duration;

use crate::bindings::oncely::worker::invocation as wit;

/// The same for every attempt at this message by this worker and for nothing else: give it to other systems as an
/// idempotency key.
pub fn id() -> String {
    wit::id()
}

/// The worker's name.
pub fn worker() -> String {
    wit::worker()
}

/// The version of the deployment that runs.
pub fn version() -> u32 {
    wit::version()
}

/// 1 for the first attempt.
pub fn attempt() -> u32 {
    wit::attempt()
}

/// After how many attempts the message becomes a dead letter; for a dead letter that was put back, those before that
/// included.
pub fn max_attempts() -> u32 {
    wit::max_attempts()
}

/// The time this attempt began, in microseconds since the Unix epoch, UTC; it does not move while the handler runs.
pub fn now() -> u64 {
    wit::now()
}

/// How long the handler may still run, to the millisecond.
pub fn remaining() -> Duration {
    Duration::from_millis(wit::remaining())
}

/// The W3C trace context of the message, if it has one.
pub fn traceparent() -> Option<String> {
    wit::traceparent()
}
