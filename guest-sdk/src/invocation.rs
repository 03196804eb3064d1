//! The current delivery: its id, attempt, version and time limit.

use std::time::Duration;

use crate::bindings::oncely::worker::invocation as wit;

/// An id that is the same for every attempt at this message by this worker, and different for all
/// other messages. Pass it to other systems as an idempotency key.
pub fn id() -> String {
    wit::id()
}

/// The name of the worker.
pub fn worker() -> String {
    wit::worker()
}

/// The version of the running deployment.
pub fn version() -> u32 {
    wit::version()
}

/// The number of this attempt, from 1.
pub fn attempt() -> u32 {
    wit::attempt()
}

/// The number of attempts after which the message becomes a dead letter. For a redriven dead letter
/// it includes the attempts before the redrive.
pub fn max_attempts() -> u32 {
    wit::max_attempts()
}

/// The time at which this attempt began, in microseconds since the Unix epoch, UTC. It does not
/// change while the handler runs.
pub fn now() -> u64 {
    wit::now()
}

/// The time that the handler has left, to the millisecond.
pub fn remaining() -> Duration {
    Duration::from_millis(wit::remaining())
}

/// The W3C trace context of the message, if it has one.
pub fn traceparent() -> Option<String> {
    wit::traceparent()
}
