//! Instances of hosts: each start of a host is one. Leases and sessions carry its id, so that
//! another host can take over from a frozen, vanished or killed one.

use std::time::Duration;

/// How long an instance counts as alive after a renewal, on the database's clock.
pub const HOST_LEASE: Duration = Duration::from_secs(6);

/// The interval of renewals.
pub const RENEW_INTERVAL: Duration = Duration::from_millis(1500);

/// The timeout of a renewal.
pub const RENEW_TIMEOUT: Duration = Duration::from_secs(4);

/// How long after the start of its last renewal an instance may publish outputs that it leased.
/// Shorter than [`HOST_LEASE`] by the time that a message may be in transit to the broker.
pub const LEASE_SAFE_FOR: Duration = Duration::from_secs(4);

/// The id of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instance(i64);

impl Instance {
    pub(super) fn new() -> Self {
        Instance(rand::random::<i64>() & i64::MAX)
    }

    /// The value for columns.
    pub(super) fn id(self) -> i64 {
        self.0
    }

    /// The name of this instance's sessions: `oncely guests 00ab…`.
    pub(super) fn name(self, purpose: &str) -> String {
        format!("{purpose} {:016x}", self.0)
    }
}

/// An instance with an expired lease, which another instance took over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenOver {
    /// The id of the instance: 16 hex digits.
    pub instance: String,
    /// How many of its sessions were terminated.
    pub sessions: u64,
    /// How many of its leased outputs were released; `None` until its sessions have ended.
    pub outputs: Option<u64>,
}
