//! Instances of hosts: each start of a host is one. Leases and sessions bear its id, so that another host can take over from
//! one that froze, vanished or was killed.

use std::time::Duration;

/// How long an instance counts as alive after it last said so, on the database's clock.
pub const HOST_LEASE: Duration = Duration::from_secs(6);

/// How often an instance says so.
pub const RENEW_INTERVAL: Duration = Duration::from_millis(1500);

/// How long it may take to say so.
pub const RENEW_TIMEOUT: Duration = Duration::from_secs(4);

/// For how long after it began to say so an instance may send what it leased. Shorter than [`HOST_LEASE`] by the time that
/// something may be on its way to the broker.
pub const LEASE_SAFE_FOR: Duration = Duration::from_secs(4);

/// The id of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instance(i64);

impl Instance {
    pub(super) fn new() -> Self {
        Instance(rand::random::<i64>() & i64::MAX)
    }

    /// As it stands in columns.
    pub(super) fn id(self) -> i64 {
        self.0
    }

    /// The name of sessions of this instance: `oncely guests 00ab…`.
    pub(super) fn name(self, purpose: &str) -> String {
        format!("{purpose} {:016x}", self.0)
    }
}

/// An instance that another one took over from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenOver {
    pub instance: String,
    /// Its sessions that were ended just now.
    pub sessions: u64,
    /// Its leases of outputs that were released; none as long as sessions of it are about to end.
    pub outputs: Option<u64>,
}
