//! The reading of another machine's clock.

use jiff::Timestamp;

/// The clock of a server, compared with the clock of this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockReading {
    /// How far the server's clock is ahead, negative for behind, in milliseconds.
    pub ahead_ms: i64,
    /// The round trip of the request, in milliseconds: the reading is accurate to this.
    pub accuracy_ms: i64,
}

impl ClockReading {
    /// The reading of a clock that showed `server` between the times `before` and `after`.
    pub fn new(before: Timestamp, server: Timestamp, after: Timestamp) -> Self {
        let [before, server, after] = [before, server, after].map(Timestamp::as_millisecond);
        ClockReading {
            ahead_ms: server.saturating_sub(before.midpoint(after)),
            accuracy_ms: after.saturating_sub(before).max(0),
        }
    }
}
