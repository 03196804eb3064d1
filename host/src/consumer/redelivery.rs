//! Redelivery barrier: at the start of a worker that holds keys, the messages of an earlier host
//! precede new ones.
//!
//! A killed host leaves unacknowledged messages. JetStream redelivers them only after `ack_wait`,
//! but delivers newer ones at once. The newer ones would overtake earlier messages of their keys,
//! so they wait here.
//!
//! The redelivered messages also wait for each other, because the server does not always redeliver
//! them in order. The order changes when the server had started a redelivery to a host that
//! disappeared. It also changes when progress acks reached the server for only some of the
//! messages.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::queue::Sequenced;
use crate::bus::{Backlog, Probe};

/// How long after `ack_wait`, or after the last redelivered message, another one may still arrive.
const GRACE: Duration = Duration::from_secs(1);

/// Interval of checks whether all of them are acknowledged.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Waits for the messages that were unacknowledged when the worker started.
pub struct RedeliveryBarrier<T> {
    /// `None` once the wait has ended.
    waiting: Option<BarrierState<T>>,
}

struct BarrierState<T> {
    /// Messages up to this sequence are old.
    last_old_sequence: u64,
    /// Number of unacknowledged old messages at the start.
    unacked: u64,
    /// Sequences of old messages that arrived.
    arrived: HashSet<u64>,
    /// Time by which the server has redelivered all messages of a dead host.
    redelivery_deadline: Instant,
    /// End of the wait. Another host may have acknowledged the missing ones in the meantime.
    deadline: Instant,
    /// Old messages that wait for the others.
    old_messages: Vec<T>,
    /// New messages, in the order of their arrival.
    deferred: Vec<T>,
    deferred_max: usize,
    /// Maximum number of messages that this host holds.
    capacity: usize,
}

impl<T: Sequenced> RedeliveryBarrier<T> {
    /// A barrier that does not wait.
    pub fn disabled() -> Self {
        RedeliveryBarrier { waiting: None }
    }

    /// Waits for the unacknowledged messages, in a host that holds up to `capacity` messages.
    ///
    /// Up to half of the capacity is available for new messages, or less when the old ones need it.
    /// The minimum is an eighth. With less, pulling in small portions would take longer than the
    /// wait.
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

    /// Number of messages to pull when the host has capacity for `available`. Once the limit of
    /// deferred messages is reached, waits until the redelivery of the old ones is due. The server
    /// delivers those first.
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

    /// Adds a message and returns those that may continue now, in order. When the host is full
    /// (`is_full`), the old messages that have arrived continue without the others.
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

    /// Returns when the wait is over: no other host holds a message, or the deadline has passed.
    /// Never returns without a wait.
    pub async fn wait_until_done(&self, probe: &Probe, permits: &Semaphore) {
        let Some(waiting) = &self.waiting else {
            return std::future::pending().await;
        };
        let all_acked = async {
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                // One permit belongs to the message that is being pulled.
                let held_here = waiting
                    .capacity
                    .saturating_sub(permits.available_permits() + 1);
                if probe
                    .backlog()
                    .await
                    .is_ok_and(|backlog| backlog.ack_pending <= held_here as u64)
                {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout_at(waiting.deadline, all_acked).await;
    }

    /// Ends the wait and returns all waiting messages, in order.
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

    /// Three messages up to sequence 10 are unacknowledged.
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
        // A message that is delivered twice counts once.
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
