//! Messages in whose statements the connection to the database broke.
//!
//! Most of the time the database or the network is to blame, and nothing is charged. But a statement can also end its own
//! session, or the server's process: such a message would be run for ever. So those that were there are run alone, and one
//! in whose statements the connection breaks again and again has failed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Delivery, Failed, Round, Run};
use crate::guest::{CallFailure, FailureKind};
use crate::store::StoreError;

/// How often the connection may break in a message that runs alone, before that is an attempt that failed.
const ALONE_MAX: u32 = 2;

/// How many messages are remembered; beyond that, counting starts over.
const REMEMBERED_MAX: usize = 10_000;

/// By event id how often the connection broke while the message ran alone; zero for those that ran together with others.
#[derive(Debug, Clone, Default)]
pub struct Breaks {
    counts: Arc<Mutex<HashMap<String, u32>>>,
}

impl Breaks {
    fn with<T>(&self, look: impl FnOnce(&mut HashMap<String, u32>) -> T) -> T {
        look(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers the messages of a group, and counts for one that ran alone. Returns how often it was counted.
    fn count(&self, event_ids: Vec<String>) -> u32 {
        let alone = u32::from(event_ids.len() == 1);
        self.with(|counts| {
            if counts.len() > REMEMBERED_MAX {
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

    /// Whether a message is to run alone.
    fn has(&self, event_id: &str) -> bool {
        self.with(|counts| counts.contains_key(event_id))
    }

    /// Forgets messages that have their verdicts.
    pub(super) fn forget<'i>(&self, event_ids: impl Iterator<Item = &'i str>) {
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
    /// The members in groups that run one after the other: those in which the connection broke alone, the others together.
    pub(super) fn groups_of(&self, run: &Run<'_>, members: Vec<usize>) -> VecDeque<Vec<usize>> {
        let mut groups: VecDeque<Vec<usize>> = VecDeque::new();
        let mut joins = false;
        for member in members {
            let is_alone = run.event_id(member).is_some_and(|event_id| self.breaks.has(&event_id));
            match groups.back_mut() {
                Some(group) if joins && !is_alone => group.push(member),
                _ => groups.push_back(vec![member]),
            }
            joins = !is_alone;
        }
        groups
    }

    /// What follows when the connection broke during a statement of one of the group.
    pub(super) fn broken(&self, run: &mut Run<'_>, group: &[usize], error: StoreError) -> Result<Round, StoreError> {
        let event_ids: Vec<String> = group.iter().filter_map(|member| run.event_id(*member)).collect();
        let times = self.breaks.count(event_ids);
        match group {
            [member] if times >= ALONE_MAX => {
                let why = format!(
                    "the connection to the database broke {times} times during its statements: {:#}",
                    anyhow::Error::from(error)
                );
                let failure = CallFailure::new(FailureKind::Retry, "connection-broken", why);
                run.failed.push(Failed { member: *member, failure, logs: String::new(), record: None });
                Ok(Round::Committed)
            }
            [_] => Err(error),
            _ => Ok(Round::Singly),
        }
    }
}
