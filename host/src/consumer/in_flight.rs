//! The messages that a worker holds: the broker hears of progress with them, so that it does not deliver them again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::bus::Progress;

/// All messages that a worker holds. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct InFlightMessages(Arc<Mutex<InFlightState>>);

#[derive(Default)]
struct InFlightState {
    next: u64,
    /// In the order of their arrival, in which the broker would deliver them again.
    messages: BTreeMap<u64, Progress>,
}

/// Keeps one message from redelivery until dropped.
pub(super) struct InFlightGuard {
    all: InFlightMessages,
    number: u64,
}

impl InFlightMessages {
    pub(super) fn enter(&self, progress: Progress) -> InFlightGuard {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = held.next;
        held.next += 1;
        held.messages.insert(number, progress);
        InFlightGuard {
            all: self.clone(),
            number,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .messages
            .len()
    }

    /// Reports progress with all of them to the broker every so often, until the task is aborted.
    pub(super) async fn send_progress_acks(self, every: Duration) {
        let mut tick = tokio::time::interval(every.max(Duration::from_millis(10)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        loop {
            tick.tick().await;
            for progress in self.all() {
                if let Err(error) = progress.send().await {
                    tracing::debug!(error = format!("{error:#}"), "progress not sent");
                    break;
                }
            }
        }
    }

    fn all(&self) -> Vec<Progress> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .messages
            .values()
            .cloned()
            .collect()
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.all
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .messages
            .remove(&self.number);
    }
}
