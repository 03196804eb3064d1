//! Running the guest for the members of one transaction: one after the other, or all of them in one call.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{Delivery, Lent, Run, tell};
use crate::cache::{Cache, CacheKey};
use crate::config::manifest::Isolation;
use crate::fault;
use crate::guest::{
    CachedValue, CachedValues, Call, CallFailure, FailureKind, Outcome, Record, RequestCall, Tape, Warm,
};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::store::KeptRecord;

/// How much the records of one batch's failed attempts may hold together, in bytes as they are kept; those that have no
/// room are not kept.
const RECORDS_MAX: usize = 8 << 20;

/// What running the members of a group came to.
pub(super) enum Members {
    Ran(Box<Ran>),
    /// These failed, and what they or others did in the database cannot be told apart.
    Spoiled(Vec<Failed>),
    /// The call for all of them failed, and nobody knows who is to blame.
    SomebodyFailed,
    /// Another transaction stood in the way.
    Conflict(String),
}

/// Members that ran, and what they left.
#[derive(Default)]
pub(super) struct Ran {
    pub succeeded: Vec<usize>,
    pub failed: Vec<Failed>,
    /// Those that wait for one that failed; they did not run.
    pub behind: Vec<usize>,
    /// In the order they were sent.
    pub outputs: Vec<Output>,
    pub state: BatchState,
    /// What is to be done to the cache after the commit.
    pub cache: CacheWrites,
    /// How many of those that failed were taken back to a savepoint.
    pub undone: u32,
}

/// One member's failed attempt.
pub(super) struct Failed {
    pub member: usize,
    pub failure: CallFailure,
    pub logs: String,
    /// What the guest was given, asked and saw; none if there was no room for it.
    pub record: Option<KeptRecord>,
}

impl Failed {
    /// A failed attempt with its record, if it has room beside those that failed before it.
    fn new<'f>(
        member: usize,
        failure: CallFailure,
        record: Option<&Record>,
        logs: &str,
        others: impl Iterator<Item = &'f Failed>,
    ) -> Failed {
        let used: usize = others.filter_map(|failed| failed.record.as_ref()).map(|record| record.json.len()).sum();
        let record = record.and_then(|record| kept(record, &failure));
        let record = record.filter(|record| used + record.json.len() <= RECORDS_MAX);
        Failed { member, failure, logs: logs.to_owned(), record }
    }
}

/// The record of a call and its failure, as it is kept.
fn kept(record: &Record, failure: &CallFailure) -> Option<KeptRecord> {
    let record = Record { failure: Some(failure.clone()), ..record.clone() };
    match record.json() {
        Ok(json) => Some(KeptRecord { json, proof: record.proof() }),
        Err(error) => {
            tracing::warn!("the record of a failed attempt is not kept: {error}");
            None
        }
    }
}

impl Delivery {
    /// Runs the guest for all members, each with its failed attempts so far. `state` is what was read for them.
    pub(super) async fn run_members(
        &self,
        run: &Run<'_>,
        fresh: &[(usize, u32)],
        lent: &Lent,
        state: BatchState,
    ) -> anyhow::Result<Members> {
        if self.guest.takes_batches() {
            self.run_together(run, fresh, lent, state).await
        } else {
            self.run_one_by_one(run, fresh, lent, state).await
        }
    }

    /// One call for each member, until one spoils the transaction.
    async fn run_one_by_one(
        &self,
        run: &Run<'_>,
        fresh: &[(usize, u32)],
        lent: &Lent,
        state: BatchState,
    ) -> anyhow::Result<Members> {
        let mut ran = Ran { state, ..Ran::default() };
        let mut warm = None;
        for &(member, attempts) in fresh {
            let Some(message) = run.batch.get(member) else { continue };
            if run.is_behind(member, &ran.failed) {
                ran.behind.push(member);
                continue;
            }
            if run.careful {
                lent.begin_member().await;
            }
            let state = std::mem::take(&mut ran.state);
            let outcome = self.call(vec![Arc::clone(message)], attempts + 1, lent, state, warm.take(), None).await?;
            ran.state = outcome.state;
            // An instance that failed, and what is in its memory, is of no more use.
            let is_kept = self.worker.isolation == Isolation::Batch || fault::mutant(fault::REUSE_AFTER_TRAP);
            warm = outcome.warm.filter(|_| is_kept);
            match outcome.result.and_then(|answers| answers.into_iter().collect()) {
                Ok(()) => {
                    ran.state.keep();
                    tell(&self.worker.name, &message.event_id, &outcome.logs);
                    ran.outputs.extend(outcome.outputs);
                    ran.cache.extend(outcome.cache);
                    ran.succeeded.push(member);
                }
                Err(failure) if failure.kind == FailureKind::Conflict => return Ok(Members::Conflict(failure.message)),
                Err(failure) => {
                    ran.state.discard();
                    let others = run.failed.iter().chain(&ran.failed);
                    let failed = Failed::new(member, failure, outcome.record.as_deref(), &outcome.logs, others);
                    ran.failed.push(failed);
                    if outcome.ran_sql && !(run.careful && lent.undo_member().await?) {
                        return Ok(Members::Spoiled(ran.failed));
                    }
                    ran.undone += u32::from(outcome.ran_sql);
                }
            }
        }
        Ok(Members::Ran(Box::new(ran)))
    }

    /// One call for all members. Its effects cannot be told apart: they take effect together or not at all.
    async fn run_together(
        &self,
        run: &Run<'_>,
        fresh: &[(usize, u32)],
        lent: &Lent,
        state: BatchState,
    ) -> anyhow::Result<Members> {
        let members: Vec<usize> = fresh.iter().map(|(member, _)| *member).collect();
        let messages: Vec<Arc<Message>> = members.iter().filter_map(|member| run.batch.get(*member).cloned()).collect();
        let attempts = fresh.iter().map(|(_, attempts)| *attempts).max().unwrap_or_default();
        let outcome = self.call(messages, attempts + 1, lent, state, None, None).await?;
        let failures: Vec<(usize, CallFailure)> = match outcome.result {
            Ok(answers) => {
                members.iter().zip(answers).filter_map(|(member, answer)| Some((*member, answer.err()?))).collect()
            }
            Err(failure) if failure.kind == FailureKind::Conflict => return Ok(Members::Conflict(failure.message)),
            Err(failure) => match members.as_slice() {
                [member] => vec![(*member, failure)],
                _ => return Ok(Members::SomebodyFailed),
            },
        };
        if !failures.is_empty() {
            let mut failed: Vec<Failed> = Vec::new();
            for (member, failure) in failures {
                let others = run.failed.iter().chain(&failed);
                let one = Failed::new(member, failure, outcome.record.as_deref(), &outcome.logs, others);
                failed.push(one);
            }
            return Ok(Members::Spoiled(failed));
        }
        tell(&self.worker.name, &format!("a batch of {}", members.len()), &outcome.logs);
        let mut state = outcome.state;
        state.keep();
        let (outputs, cache) = (outcome.outputs, outcome.cache);
        Ok(Members::Ran(Box::new(Ran { succeeded: members, outputs, state, cache, ..Ran::default() })))
    }

    pub(super) async fn call(
        &self,
        messages: Vec<Arc<Message>>,
        attempt: u32,
        lent: &Lent,
        state: BatchState,
        warm: Option<Warm>,
        request: Option<RequestCall>,
    ) -> anyhow::Result<Outcome> {
        let call = Call {
            messages,
            worker: Arc::clone(&self.worker),
            version: self.version,
            attempt,
            now: Timestamp::now(),
            payload_max: self.payload_max,
            database: Arc::new(lent.clone()),
            cache: Arc::new(OfWorker { cache: self.cache.clone(), worker: self.worker.name.clone() }),
            state,
            request,
            tape: Tape::default(),
        };
        let began = Instant::now();
        let outcome = self.guest.call(call, warm).await;
        self.metrics.processed(&self.worker.name, began.elapsed());
        outcome
    }
}

/// The cache as the guests of one worker see it.
struct OfWorker {
    cache: Cache,
    worker: String,
}

#[async_trait]
impl CachedValues for OfWorker {
    async fn get(&self, key: &str) -> Option<CachedValue> {
        let found = self.cache.get(&CacheKey::value(&self.worker, key)).await?;
        Some(CachedValue { value: found.value, tags: found.tags })
    }
}
