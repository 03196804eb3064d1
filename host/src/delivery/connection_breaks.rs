//! Messages during whose statements the database connection broke.
//!
//! In most cases the database or the network is the cause, and no attempt is counted. But a
//! statement can also end its own session or the server process, and its message would be retried
//! forever. Therefore these messages run alone. A message that breaks its connection repeatedly
//! while it runs alone has failed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::{BatchItem, Delivery, FailedCall, Fate, TxOutcome};
use crate::guest::{CallFailure, FailureKind};
use crate::model::failure_code::FailureCode;
use crate::store::StoreError;

/// Number of connection breaks of a message that runs alone before an attempt is counted as failed.
const BREAKS_MAX: u32 = 2;

/// Maximum number of tracked messages. Beyond it, counting starts over.
const MESSAGES_MAX: usize = 10_000;

/// Connection breaks by event id while the message ran alone. Zero for messages that ran together
/// with others.
#[derive(Debug, Clone, Default)]
pub struct ConnectionBreaks {
    counts: Arc<Mutex<HashMap<String, u32>>>,
}

impl ConnectionBreaks {
    fn with<T>(&self, access: impl FnOnce(&mut HashMap<String, u32>) -> T) -> T {
        access(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tracks the messages of a group, and counts a break if the group is a single message. Returns
    /// the highest count.
    fn record(&self, event_ids: Vec<String>) -> u32 {
        let alone = u32::from(event_ids.len() == 1);
        self.with(|counts| {
            if counts.len() > MESSAGES_MAX {
                counts.clear();
            }
            let each = event_ids.into_iter().map(|event_id| {
                let count = counts.entry(event_id).or_default();
                *count += alone;
                *count
            });
            each.max().unwrap_or_default()
        })
    }

    /// Whether a message has to run alone.
    fn contains(&self, event_id: &str) -> bool {
        self.with(|counts| counts.contains_key(event_id))
    }

    /// Removes messages that have their verdicts.
    pub(super) fn remove<'i>(&self, event_ids: impl Iterator<Item = &'i str>) {
        self.with(|counts| {
            if !counts.is_empty() {
                event_ids.for_each(|event_id| {
                    counts.remove(event_id);
                });
            }
        });
    }
}

impl Delivery {
    /// Splits items into groups that run one after the other. Tracked messages run alone, all
    /// others together.
    pub(super) fn group_items(&self, items: Vec<BatchItem>) -> VecDeque<Vec<BatchItem>> {
        let mut groups: VecDeque<Vec<BatchItem>> = VecDeque::new();
        let mut can_join = false;
        for item in items {
            let is_alone = self.connection_breaks.contains(&item.message.event_id);
            match groups.back_mut() {
                Some(group) if can_join && !is_alone => group.push(item),
                _ => groups.push_back(vec![item]),
            }
            can_join = !is_alone;
        }
        groups
    }

    /// Handles a connection that broke during a statement of the group.
    ///
    /// # Errors
    /// The same error, for a message that runs alone and may be retried.
    pub(super) fn handle_connection_break(
        &self,
        group: &mut [BatchItem],
        error: StoreError,
    ) -> Result<TxOutcome, StoreError> {
        let pending = group.iter().filter(|item| item.is_pending());
        let event_ids = pending.map(|item| item.message.event_id.clone()).collect();
        let times = self.connection_breaks.record(event_ids);
        match group {
            [item] if times >= BREAKS_MAX => {
                let why = format!(
                    "the connection to the database broke {times} times during its statements: \
                     {:#}",
                    anyhow::Error::from(error)
                );
                let failure =
                    CallFailure::new(FailureKind::Retry, FailureCode::ConnectionBroken, why);
                item.fate = Fate::Failed(FailedCall::without_call(failure));
                Ok(TxOutcome::Finished)
            }
            [_] => Err(error),
            _ => Ok(TxOutcome::RunIndividually),
        }
    }
}
