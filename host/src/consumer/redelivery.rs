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

use super::queue::Sequenced;
use crate::bus::{Backlog, Probe};

/// How long after `ack_wait`, or after the last old message, another old one may be on its way.
const GRACE: Duration = Duration::from_secs(1);

/// How often to look whether there is anything left to wait for.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Waits for the messages that were out when the worker started.
pub struct RedeliveryBarrier<T> {
    /// None once nothing is waited for.
    waiting: Option<BarrierState<T>>,
}

struct BarrierState<T> {
    /// Sequences up to this one are old.
    last_old_sequence: u64,
    /// How many of them were out.
    unacked: u64,
    /// Which of them came.
    arrived: HashSet<u64>,
    /// By when all that a dead host left is delivered again.
    redelivery_deadline: Instant,
    /// Until when they are waited for: they may also have been settled by another host meanwhile.
    deadline: Instant,
    /// Old ones that came and wait for the others.
    old_messages: Vec<T>,
    /// New messages, in the order they came.
    deferred: Vec<T>,
    deferred_max: usize,
    /// How many messages this host may hold.
    capacity: usize,
}

impl<T: Sequenced> RedeliveryBarrier<T> {
    /// Nothing is waited for.
    pub fn disabled() -> Self {
        RedeliveryBarrier { waiting: None }
    }

    /// Waits for what is out, in a host that may hold `capacity` messages. Of these, half may be new ones that wait, or fewer when
    /// the old ones need the room; but not so few that asking for a handful at a time would take longer than the wait.
    pub fn begin(backlog: Backlog, ack_wait: Duration, capacity: usize) -> Self {
        let redelivery_deadline = Instant::now() + ack_wait;
        let left =
            capacity.saturating_sub(usize::try_from(backlog.ack_pending).unwrap_or(usize::MAX));
        let waiting = BarrierState {
            last_old_sequence: backlog.delivered,
            unacked: backlog.ack_pending,
            arrived: HashSet::new(),
            redelivery_deadline,
            deadline: redelivery_deadline + GRACE,
            old_messages: Vec::new(),
            deferred: Vec::new(),
            deferred_max: left.clamp(capacity / 8, capacity / 2).max(1),
            capacity,
        };
        RedeliveryBarrier {
            waiting: Some(waiting).filter(|waiting| waiting.unacked > 0),
        }
    }

    /// How many messages may be asked for when there is room for `available`. While as many new ones are deferred as may be,
    /// it answers only once the old ones, which the server delivers first, can be delivered.
    pub async fn pull_limit(&self, available: usize) -> usize {
        let Some(waiting) = &self.waiting else {
            return available;
        };
        if Instant::now() >= waiting.redelivery_deadline {
            return available;
        }
        match waiting.deferred_max.saturating_sub(waiting.deferred.len()) {
            0 => {
                tokio::time::sleep_until(waiting.redelivery_deadline).await;
                available
            }
            left => left.min(available),
        }
    }

    /// Takes a message in and returns those that may go on now, in order. With no room left in the host (`is_full`) the old
    /// ones go on as far as they came.
    pub fn admit(&mut self, message: T, is_full: bool) -> Vec<T> {
        let Some(waiting) = &mut self.waiting else {
            return vec![message];
        };
        if message.sequence() > waiting.last_old_sequence {
            waiting.deferred.push(message);
            return Vec::new();
        }
        waiting.arrived.insert(message.sequence());
        waiting.deadline = waiting.deadline.max(Instant::now() + GRACE);
        waiting.old_messages.push(message);
        if waiting.arrived.len() as u64 >= waiting.unacked {
            self.finish()
        } else if is_full {
            waiting.take_old()
        } else {
            Vec::new()
        }
    }

    /// Returns when it is no use to wait any longer: nobody else holds anything, or time is up. Never, when nothing is
    /// waited for.
    pub async fn wait_until_done(&self, probe: &Probe, room: &Semaphore) {
        let Some(waiting) = &self.waiting else {
            return std::future::pending().await;
        };
        let all_acked = async {
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                // One place is taken for the message that is being asked for.
                let held = waiting
                    .capacity
                    .saturating_sub(room.available_permits() + 1);
                if probe
                    .backlog()
                    .await
                    .is_ok_and(|backlog| backlog.ack_pending <= held as u64)
                {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout_at(waiting.deadline, all_acked).await;
    }

    /// Ends the wait and returns what waited, in order.
    pub fn finish(&mut self) -> Vec<T> {
        let Some(mut waiting) = self.waiting.take() else {
            return Vec::new();
        };
        let mut ready = waiting.take_old();
        ready.append(&mut waiting.deferred);
        ready
    }
}

impl<T: Sequenced> BarrierState<T> {
    fn take_old(&mut self) -> Vec<T> {
        let mut old_messages = std::mem::take(&mut self.old_messages);
        old_messages.sort_by_key(Sequenced::sequence);
        old_messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Sequenced for u64 {
        fn key(&self) -> Option<&str> {
            None
        }

        fn sequence(&self) -> u64 {
            *self
        }
    }

    /// Three are out, of those up to 10.
    fn barrier(capacity: usize) -> RedeliveryBarrier<u64> {
        let backlog = Backlog {
            pending: 0,
            ack_pending: 3,
            waiting: 0,
            delivered: 10,
        };
        RedeliveryBarrier::begin(backlog, Duration::from_secs(30), capacity)
    }

    fn admit(barrier: &mut RedeliveryBarrier<u64>, messages: &[u64]) -> Vec<Vec<u64>> {
        messages
            .iter()
            .map(|message| barrier.admit(*message, false))
            .collect()
    }

    #[tokio::test]
    async fn new_messages_wait_for_redelivered_ones() {
        let mut barrier = barrier(100);
        // One that is delivered twice is not two.
        assert!(
            admit(&mut barrier, &[11, 8, 12, 9, 8])
                .iter()
                .all(Vec::is_empty)
        );
        assert_eq!(barrier.admit(3, false), [3, 8, 8, 9, 11, 12]);
        assert_eq!(barrier.admit(13, false), [13]);
    }

    #[tokio::test]
    async fn finish_returns_all_messages_in_order() {
        let mut barrier = barrier(100);
        assert!(admit(&mut barrier, &[11, 8, 3]).iter().all(Vec::is_empty));
        assert_eq!(barrier.finish(), [3, 8, 11]);
        assert!(barrier.finish().is_empty());
    }

    #[tokio::test]
    async fn new_messages_leave_capacity_for_old_ones() {
        assert_eq!(barrier(100).pull_limit(60).await, 50);
        assert_eq!(barrier(5).pull_limit(5).await, 2);
        assert_eq!(barrier(16).pull_limit(16).await, 8);
        assert_eq!(barrier(4).pull_limit(4).await, 1);
        let mut barrier = barrier(2);
        assert_eq!(barrier.pull_limit(2).await, 1);
        assert!(barrier.admit(9, false).is_empty());
        assert_eq!(barrier.admit(8, true), [8, 9]);
        assert!(barrier.admit(11, false).is_empty());
        assert_eq!(barrier.admit(10, false), [10, 11]);
    }
}
