//! The messages that a worker holds. Progress acks keep the broker from redelivering them.

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
    /// In the order of their arrival, in which the broker would redeliver them.
    messages: BTreeMap<u64, Progress>,
}

/// Protects one message from redelivery until dropped.
pub(super) struct InFlightGuard {
    all: InFlightMessages,
    number: u64,
}

impl InFlightMessages {
    /// Adds a message until the guard is dropped.
    pub(super) fn enter(&self, progress: Progress) -> InFlightGuard {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next;
        state.next += 1;
        state.messages.insert(number, progress);
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

    /// Sends a progress ack for each message at this interval, until the task is aborted. The
    /// interval is at least 10 ms.
    pub(super) async fn send_progress_acks(self, every: Duration) {
        let mut tick = tokio::time::interval(every.max(Duration::from_millis(10)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        loop {
            tick.tick().await;
            for progress in self.all() {
                if let Err(error) = progress.send().await {
                    tracing::debug!(
                        error = format!("{error:#}"),
                        "failed to send a progress ack"
                    );
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
