//! At the start of a worker that holds keys: what an earlier host was given comes before what is new.
//!
//! A host that was killed leaves messages unacknowledged, which JetStream delivers again only once `ack_wait` is over;
//! newer ones it delivers at once. They would overtake the older ones of their keys, so they wait here. The old ones wait for
//! each other: the server does not deliver them in their order when it had begun to deliver one to a host that went away, or
//! when it heard of progress with some of them only.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::queue::InOrder;
use crate::bus::{Backlog, Probe};

/// How long after `ack_wait`, or after the last old message, another old one may be on its way.
const GRACE: Duration = Duration::from_secs(1);

/// How often to look whether there is anything left to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Waits for the messages that were out when the worker started.
pub struct Recovery<T> {
    /// None once nothing is waited for.
    waiting: Option<Waiting<T>>,
}

struct Waiting<T> {
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
    /// Old ones that came and wait for the others.
    old: Vec<T>,
    /// New messages, in the order they came.
    parked: Vec<T>,
    parked_max: usize,
    /// How many messages this host may hold.
    capacity: usize,
}

impl<T: InOrder> Recovery<T> {
    /// Nothing is waited for.
    pub fn none() -> Self {
        Recovery { waiting: None }
    }

    /// Waits for what is out, in a host that may hold `capacity` messages. Of these, half may be new ones that wait, or fewer when
    /// the old ones need the room; but not so few that asking for a handful at a time would take longer than the wait.
    pub fn begin(backlog: Backlog, ack_wait: Duration, capacity: usize) -> Self {
        let expired = Instant::now() + ack_wait;
        let left = capacity.saturating_sub(usize::try_from(backlog.ack_pending).unwrap_or(usize::MAX));
        let waiting = Waiting {
            newest_old: backlog.delivered,
            out: backlog.ack_pending,
            came: HashSet::new(),
            expired,
            until: expired + GRACE,
            old: Vec::new(),
            parked: Vec::new(),
            parked_max: left.clamp(capacity / 8, capacity / 2).max(1),
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

    /// Takes a message in and returns those that may go on now, in order. With no room left in the host (`is_full`) the old
    /// ones go on as far as they came.
    pub fn admit(&mut self, message: T, is_full: bool) -> Vec<T> {
        let Some(waiting) = &mut self.waiting else { return vec![message] };
        if message.sequence() > waiting.newest_old {
            waiting.parked.push(message);
            return Vec::new();
        }
        waiting.came.insert(message.sequence());
        waiting.until = waiting.until.max(Instant::now() + GRACE);
        waiting.old.push(message);
        if waiting.came.len() as u64 >= waiting.out {
            self.end()
        } else if is_full {
            waiting.take_old()
        } else {
            Vec::new()
        }
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

    /// Ends the wait and returns what waited, in order.
    pub fn end(&mut self) -> Vec<T> {
        let Some(mut waiting) = self.waiting.take() else { return Vec::new() };
        let mut ready = waiting.take_old();
        ready.append(&mut waiting.parked);
        ready
    }
}

impl<T: InOrder> Waiting<T> {
    fn take_old(&mut self) -> Vec<T> {
        let mut old = std::mem::take(&mut self.old);
        old.sort_by_key(InOrder::sequence);
        old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl InOrder for u64 {
        fn key(&self) -> Option<&str> {
            None
        }

        fn sequence(&self) -> u64 {
            *self
        }
    }

    /// Three are out, of those up to 10.
    fn recovery(capacity: usize) -> Recovery<u64> {
        let backlog = Backlog { pending: 0, ack_pending: 3, waiting: 0, delivered: 10 };
        Recovery::begin(backlog, Duration::from_secs(30), capacity)
    }

    fn admit(recovery: &mut Recovery<u64>, messages: &[u64]) -> Vec<Vec<u64>> {
        messages.iter().map(|message| recovery.admit(*message, false)).collect()
    }

    #[tokio::test]
    async fn old_ones_wait_for_each_other_and_new_ones_for_them() {
        let mut recovery = recovery(100);
        // One that is delivered twice is not two.
        assert!(admit(&mut recovery, &[11, 8, 12, 9, 8]).iter().all(Vec::is_empty));
        assert_eq!(recovery.admit(3, false), [3, 8, 8, 9, 11, 12]);
        assert_eq!(recovery.admit(13, false), [13]);
    }

    #[tokio::test]
    async fn when_time_is_up_all_go_on_in_their_order() {
        let mut recovery = recovery(100);
        assert!(admit(&mut recovery, &[11, 8, 3]).iter().all(Vec::is_empty));
        assert_eq!(recovery.end(), [3, 8, 11]);
        assert!(recovery.end().is_empty());
    }

    #[tokio::test]
    async fn new_ones_leave_room_for_the_old() {
        assert_eq!(recovery(100).room(60).await, 50);
        assert_eq!(recovery(5).room(5).await, 2);
        assert_eq!(recovery(16).room(16).await, 8);
        assert_eq!(recovery(4).room(4).await, 1);
        let mut recovery = recovery(2);
        assert_eq!(recovery.room(2).await, 1);
        assert!(recovery.admit(9, false).is_empty());
        assert_eq!(recovery.admit(8, true), [8, 9]);
        assert!(recovery.admit(11, false).is_empty());
        assert_eq!(recovery.admit(10, false), [10, 11]);
    }
}
