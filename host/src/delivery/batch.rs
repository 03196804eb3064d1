//! Running the guest for the items of one transaction: one after the other, or all of them in one call.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{BatchRun, Delivery, SharedTx, log_guest_output};
use crate::cache::{Cache, CacheKey};
use crate::config::manifest::Isolation;
use crate::fault;
use crate::guest::{
    CacheReader, CachedValue, Call, CallFailure, CallOutcome, FailureKind, Record, Recorder,
    RequestCall, WarmInstance,
};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::store::StoredRecording;

/// How much the records of one batch's failed attempts may hold together, in bytes as they are kept; those that have no
/// room are not kept.
const RECORDS_MAX: usize = 8 << 20;

/// What running the items of a group came to.
pub(super) enum GroupRun {
    Completed(Box<CompletedRun>),
    /// These failed, and what they or others did in the database cannot be told apart.
    RerunOthers(Vec<FailedItem>),
    /// The call for all of them failed, and nobody knows who is to blame.
    UnknownItemFailed,
    /// Another transaction stood in the way.
    Conflict(String),
}

/// Items that were run, and what they left.
#[derive(Default)]
pub(super) struct CompletedRun {
    pub succeeded: Vec<usize>,
    pub failed: Vec<FailedItem>,
    /// Those that wait for one that failed; they did not run.
    pub blocked: Vec<usize>,
    /// In the order they were sent.
    pub outputs: Vec<Output>,
    pub state: BatchState,
    /// What is to be done to the cache after the commit.
    pub cache: CacheWrites,
    /// How many of those that failed were taken back to a savepoint.
    pub savepoint_rollbacks: u32,
}

/// One item's failed attempt.
pub(super) struct FailedItem {
    pub item: usize,
    pub failure: CallFailure,
    pub logs: String,
    /// What the guest was given, asked and saw; none if there was no room for it.
    pub record: Option<StoredRecording>,
}

impl FailedItem {
    /// A failed attempt with its record, if it has room beside those that failed before it.
    fn new<'f>(
        item: usize,
        failure: CallFailure,
        record: Option<&Record>,
        logs: &str,
        others: impl Iterator<Item = &'f FailedItem>,
    ) -> FailedItem {
        let used: usize = others
            .filter_map(|failed| failed.record.as_ref())
            .map(|record| record.json.len())
            .sum();
        let record = record.and_then(|record| kept_record(record, &failure));
        let record = record.filter(|record| used + record.json.len() <= RECORDS_MAX);
        FailedItem {
            item,
            failure,
            logs: logs.to_owned(),
            record,
        }
    }
}

/// The record of a call and its failure, as it is kept.
fn kept_record(record: &Record, failure: &CallFailure) -> Option<StoredRecording> {
    let record = Record {
        failure: Some(failure.clone()),
        ..record.clone()
    };
    match record.json() {
        Ok(json) => Some(StoredRecording {
            json,
            digest: record.trap_digest(),
        }),
        Err(error) => {
            tracing::warn!("the record of a failed attempt is not kept: {error}");
            None
        }
    }
}

impl Delivery {
    /// Runs the guest for all items, each with its failed attempts so far. `state` is what was read for them.
    pub(super) async fn run_items(
        &self,
        run: &BatchRun<'_>,
        fresh: &[(usize, u32)],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        if self.guest.is_batch_handler() {
            self.run_batch(run, fresh, shared_tx, state).await
        } else {
            self.run_each(run, fresh, shared_tx, state).await
        }
    }

    /// One call for each item, until one spoils the transaction.
    async fn run_each(
        &self,
        run: &BatchRun<'_>,
        fresh: &[(usize, u32)],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        let mut completed = CompletedRun {
            state,
            ..CompletedRun::default()
        };
        let mut warm = None;
        for &(item, attempts) in fresh {
            let Some(message) = run.batch.get(item) else {
                continue;
            };
            if run.is_blocked(item, &completed.failed) {
                completed.blocked.push(item);
                continue;
            }
            if run.with_savepoints {
                shared_tx.begin_item().await;
            }
            let state = std::mem::take(&mut completed.state);
            let outcome = self
                .call(
                    vec![Arc::clone(message)],
                    attempts + 1,
                    shared_tx,
                    state,
                    warm.take(),
                    None,
                )
                .await?;
            completed.state = outcome.state;
            // An instance that failed, and what is in its memory, is of no more use.
            let is_kept =
                self.worker.isolation == Isolation::Batch || fault::mutant(fault::REUSE_AFTER_TRAP);
            warm = outcome.warm.filter(|_| is_kept);
            match outcome
                .result
                .and_then(|answers| answers.into_iter().collect())
            {
                Ok(()) => {
                    completed.state.keep();
                    log_guest_output(&self.worker.name, &message.event_id, &outcome.logs);
                    completed.outputs.extend(outcome.outputs);
                    completed.cache.extend(outcome.cache);
                    completed.succeeded.push(item);
                }
                Err(failure) if failure.kind == FailureKind::Conflict => {
                    return Ok(GroupRun::Conflict(failure.message));
                }
                Err(failure) => {
                    completed.state.discard();
                    let others = run.failed.iter().chain(&completed.failed);
                    let failed = FailedItem::new(
                        item,
                        failure,
                        outcome.record.as_deref(),
                        &outcome.logs,
                        others,
                    );
                    completed.failed.push(failed);
                    if outcome.ran_sql && !(run.with_savepoints && shared_tx.undo_item().await?) {
                        return Ok(GroupRun::RerunOthers(completed.failed));
                    }
                    completed.savepoint_rollbacks += u32::from(outcome.ran_sql);
                }
            }
        }
        Ok(GroupRun::Completed(Box::new(completed)))
    }

    /// One call for all items. Its effects cannot be told apart: they take effect together or not at all.
    async fn run_batch(
        &self,
        run: &BatchRun<'_>,
        fresh: &[(usize, u32)],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        let items: Vec<usize> = fresh.iter().map(|(item, _)| *item).collect();
        let messages: Vec<Arc<Message>> = items
            .iter()
            .filter_map(|item| run.batch.get(*item).cloned())
            .collect();
        let attempts = fresh
            .iter()
            .map(|(_, attempts)| *attempts)
            .max()
            .unwrap_or_default();
        let outcome = self
            .call(messages, attempts + 1, shared_tx, state, None, None)
            .await?;
        let failures: Vec<(usize, CallFailure)> = match outcome.result {
            Ok(answers) => items
                .iter()
                .zip(answers)
                .filter_map(|(item, answer)| Some((*item, answer.err()?)))
                .collect(),
            Err(failure) if failure.kind == FailureKind::Conflict => {
                return Ok(GroupRun::Conflict(failure.message));
            }
            Err(failure) => match items.as_slice() {
                [item] => vec![(*item, failure)],
                _ => return Ok(GroupRun::UnknownItemFailed),
            },
        };
        if !failures.is_empty() {
            let mut failed: Vec<FailedItem> = Vec::new();
            for (item, failure) in failures {
                let others = run.failed.iter().chain(&failed);
                let one = FailedItem::new(
                    item,
                    failure,
                    outcome.record.as_deref(),
                    &outcome.logs,
                    others,
                );
                failed.push(one);
            }
            return Ok(GroupRun::RerunOthers(failed));
        }
        log_guest_output(
            &self.worker.name,
            &format!("a batch of {}", items.len()),
            &outcome.logs,
        );
        let mut state = outcome.state;
        state.keep();
        let (outputs, cache) = (outcome.outputs, outcome.cache);
        Ok(GroupRun::Completed(Box::new(CompletedRun {
            succeeded: items,
            outputs,
            state,
            cache,
            ..CompletedRun::default()
        })))
    }

    pub(super) async fn call(
        &self,
        messages: Vec<Arc<Message>>,
        attempt: u32,
        shared_tx: &SharedTx,
        state: BatchState,
        warm: Option<WarmInstance>,
        request: Option<RequestCall>,
    ) -> anyhow::Result<CallOutcome> {
        let call = Call {
            messages,
            worker: Arc::clone(&self.worker),
            version: self.version,
            attempt,
            now: Timestamp::now(),
            payload_max: self.payload_max,
            database: Arc::new(shared_tx.clone()),
            cache: Arc::new(WorkerCache {
                cache: self.cache.clone(),
                worker: self.worker.name.clone(),
            }),
            state,
            request,
            recorder: Recorder::default(),
        };
        let began = Instant::now();
        let outcome = self.guest.call(call, warm).await;
        self.metrics.processed(&self.worker.name, began.elapsed());
        outcome
    }
}

/// The cache as the guests of one worker see it.
struct WorkerCache {
    cache: Cache,
    worker: String,
}

#[async_trait]
impl CacheReader for WorkerCache {
    async fn get(&self, key: &str) -> Option<CachedValue> {
        let found = self.cache.get(&CacheKey::value(&self.worker, key)).await?;
        Some(CachedValue {
            value: found.value,
            tags: found.tags,
        })
    }
}
