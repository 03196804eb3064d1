//! At the start of a worker that holds keys: what an earlier host was given comes before what is new.
//!
//! A host that was killed leaves messages unacknowledged, which JetStream delivers again only once `ack_wait` is over;
//! newer ones it delivers at once. They would overtake the older ones of their keys, so they wait here.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::bus::{Backlog, Probe};
use crate::lane::Parcel;

/// How long after `ack_wait`, or after the last old message, another old one may be on its way.
const GRACE: Duration = Duration::from_secs(1);

/// How often to look whether there is anything left to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Waits for the messages that were out when the worker started.
pub struct Recovery {
    /// None once nothing is waited for.
    waiting: Option<Waiting>,
}

struct Waiting {
    /// Sequences up to this one are old.
    newest_old: u64,
    /// How many of them were out.
    out: u64,
    /// Which of them came.
    came: HashSet<u64>,
    /// By when all that a dead host left is delivered again.
    expired: Instant,
    /// Until when they are waited for: they may also have been settled by another host meanwhile.
    until: Instant,
    /// New messages, in the order they came.
    parked: Vec<Parcel>,
    parked_max: usize,
    /// How many messages this host may hold.
    capacity: usize,
}

impl Recovery {
    /// Nothing is waited for.
    pub fn none() -> Self {
        Recovery { waiting: None }
    }

    /// Waits for what is out, in a host that may hold `capacity` messages; half of them may be new ones that wait.
    pub fn begin(backlog: Backlog, ack_wait: Duration, capacity: usize) -> Self {
        let expired = Instant::now() + ack_wait;
        let waiting = Waiting {
            newest_old: backlog.delivered,
            out: backlog.ack_pending,
            came: HashSet::new(),
            expired,
            until: expired + GRACE,
            parked: Vec::new(),
            parked_max: (capacity / 2).max(1),
            capacity,
        };
        Recovery { waiting: Some(waiting).filter(|waiting| waiting.out > 0) }
    }

    /// How many messages may be asked for when there is room for `available`. While as many new ones are parked as may be,
    /// it answers only once the old ones, which the server delivers first, can be delivered.
    pub async fn room(&self, available: usize) -> usize {
        let Some(waiting) = &self.waiting else { return available };
        if Instant::now() >= waiting.expired {
            return available;
        }
        match waiting.parked_max.saturating_sub(waiting.parked.len()) {
            0 => {
                tokio::time::sleep_until(waiting.expired).await;
                available
            }
            left => left.min(available),
        }
    }

    /// Takes a message in and returns those that may go on now, in order.
    pub fn admit(&mut self, parcel: Parcel) -> Vec<Parcel> {
        let Some(waiting) = &mut self.waiting else { return vec![parcel] };
        if parcel.sequence() > waiting.newest_old {
            waiting.parked.push(parcel);
            return Vec::new();
        }
        waiting.came.insert(parcel.sequence());
        waiting.until = waiting.until.max(Instant::now() + GRACE);
        let mut ready = vec![parcel];
        if waiting.came.len() as u64 >= waiting.out {
            ready.extend(self.end());
        }
        ready
    }

    /// Returns when it is no use to wait any longer: nobody else holds anything, or time is up. Never, when nothing is
    /// waited for.
    pub async fn over(&self, probe: &Probe, room: &Semaphore) {
        let Some(waiting) = &self.waiting else { return std::future::pending().await };
        let nothing_out = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                // One place is taken for the message that is being asked for.
                let held = waiting.capacity.saturating_sub(room.available_permits() + 1);
                if probe.backlog().await.is_ok_and(|backlog| backlog.ack_pending <= held as u64) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout_at(waiting.until, nothing_out).await;
    }

    /// Ends the wait and returns what was parked.
    pub fn end(&mut self) -> Vec<Parcel> {
        self.waiting.take().map(|waiting| waiting.parked).unwrap_or_default()
    }
}
