//! Runs the guest for the items of one transaction: one call for each item, or one call for all of
//! them.

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

/// Maximum total size of the records of one batch, in stored bytes. Records beyond it are not kept.
const RECORDS_MAX: usize = 8 << 20;

/// The outcome of the items of a group.
pub(super) enum GroupRun {
    Completed(Box<CompletedRun>),
    /// These items failed, and their effects in the database cannot be separated from those of the
    /// other items.
    RerunOthers(Vec<FailedItem>),
    /// The call for all items failed, and the failed item is unknown.
    UnknownItemFailed,
    /// A conflict with another transaction.
    Conflict(String),
}

/// The items of a completed group and their effects.
#[derive(Default)]
pub(super) struct CompletedRun {
    pub succeeded: Vec<usize>,
    pub failed: Vec<FailedItem>,
    /// Items that did not run, because an earlier item of their key failed.
    pub blocked: Vec<usize>,
    /// In the order of the calls.
    pub outputs: Vec<Output>,
    pub state: BatchState,
    /// Cache writes to apply after the commit.
    pub cache: CacheWrites,
    /// Number of failed items that were rolled back to a savepoint.
    pub savepoint_rollbacks: u32,
}

/// The failed attempt of one item.
pub(super) struct FailedItem {
    pub item: usize,
    pub failure: CallFailure,
    pub logs: String,
    /// The record of the call. `None` if the records of the batch exceed their limit.
    pub record: Option<StoredRecording>,
}

impl FailedItem {
    /// A failed attempt. It has its record if the records of the batch stay within their limit.
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

/// The record of a call with its failure, as stored.
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
            tracing::warn!(error = %error, "failed to serialize the record of a failed attempt");
            None
        }
    }
}

impl Delivery {
    /// Runs the guest for all items. `fresh` has the items with their failed attempts so far, and
    /// `state` the prefetched keys.
    ///
    /// # Errors
    /// A failure of the host or the database. No attempt is counted.
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

    /// Runs one call for each item, until a failed one spoils the transaction.
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
            // A failed instance is not used again.
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

    /// Runs one call for all items. Their effects cannot be separated, so they take effect together
    /// or not at all.
    async fn run_batch(
        &self,
        run: &BatchRun<'_>,
        fresh: &[(usize, u32)],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        // Call the handler with all messages.
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

        // Find the failed items.
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

        // Keep the effects of all items.
        log_guest_output(
            &self.worker.name,
            &format!("batch of {}", items.len()),
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

/// The cache as seen by the guests of one worker.
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
