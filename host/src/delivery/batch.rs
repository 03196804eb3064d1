//! Runs the guest for the items of one transaction: one call per item, or one call for all of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;
use tracing::Instrument;

use super::{
    BatchItem, BatchRun, Delivery, FailedCall, Fate, Savepoints, SharedTx, log_guest_output,
};
use crate::cache::{Cache, CacheKey};
use crate::config::manifest::Isolation;
use crate::guest::{
    CacheReader, CachedValue, Call, CallFailure, CallOutcome, FailureKind, HandlerResult, Recorder,
    RequestCall, WarmInstance,
};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::model::sql::SqlError;
use crate::model::trace_context::OutputTrace;
use crate::traces::Interval;

/// The outcome of running the items of a group. Each of them has a fate then.
pub(super) enum GroupRun {
    /// The effects of the succeeded items can be committed.
    Completed(Box<GroupEffects>),
    /// The database work of the failed items cannot be separated from that of the others.
    RerunOthers,
    /// The call for all items failed, and it is unknown which one is the cause.
    UnknownItemFailed,
    /// Another transaction conflicted.
    Conflict(String),
}

/// The inputs of a call that differ from call to call.
pub(super) struct CallInputs {
    pub messages: Vec<Arc<Message>>,
    /// The trace of each message, for its outputs; empty when traces are off.
    pub traces: Vec<OutputTrace>,
    pub request: Option<RequestCall>,
}

/// The effects of the succeeded items of a group, beside those in the database.
#[derive(Default)]
pub(super) struct GroupEffects {
    /// In the order they were sent.
    pub outputs: Vec<Output>,
    pub state: BatchState,
    /// Applied after the commit.
    pub cache: CacheWrites,
    /// How many failed items were rolled back to a savepoint.
    pub savepoint_rollbacks: u32,
}

impl Delivery {
    /// Runs the guest for all items. `state` holds the values read for them.
    pub(super) async fn run_items(
        &self,
        run: &BatchRun,
        fresh: &mut [&mut BatchItem],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        if self.guest.is_batch_handler() {
            self.run_batch(run, fresh, shared_tx, state).await
        } else {
            self.run_each(run, fresh, shared_tx, state).await
        }
    }

    /// One call per item, until one spoils the transaction.
    async fn run_each(
        &self,
        run: &BatchRun,
        fresh: &mut [&mut BatchItem],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        let mut effects = GroupEffects {
            state,
            ..GroupEffects::default()
        };
        let mut recordings = run.recordings_size();
        let mut failed_keys = HashSet::new();
        let mut warm = None;
        for item in fresh {
            if item
                .key
                .as_ref()
                .is_some_and(|key| failed_keys.contains(key))
            {
                item.fate = Fate::Blocked;
                continue;
            }
            if run.savepoints == Savepoints::PerItem {
                shared_tx.begin_item().await;
            }

            let inputs = self.inputs_of(&[&mut **item]);
            let stopwatch = self.traces.stopwatch();
            let state = std::mem::take(&mut effects.state);
            let attempt = item.attempts + 1;
            let span = tracing::debug_span!(
                "delivery",
                worker = self.worker.name,
                event_id = item.message.event_id,
                attempt,
            );
            let outcome = self
                .call(inputs, attempt, shared_tx, state, warm.take())
                .instrument(span)
                .await?;
            if let (Some(trace), Some(stopwatch)) = (&mut item.trace, stopwatch) {
                let failure = first_failure(&outcome.result);
                trace.handled(stopwatch.stop(), shared_tx.take_statements(), failure);
            }

            if let Some(error) = shared_tx.take_earlier_error().await {
                return Ok(deferred_failed(error));
            }
            effects.state = outcome.state;
            // A failed instance is never reused: its memory is in an unknown state.
            warm = outcome
                .warm
                .filter(|_| self.worker.isolation == Isolation::Batch);
            match outcome
                .result
                .and_then(|results| results.into_iter().collect())
            {
                Ok(()) => {
                    effects.state.keep();
                    log_guest_output(&self.worker.name, &item.message.event_id, &outcome.logs);
                    effects.outputs.extend(outcome.outputs);
                    effects.cache.extend(outcome.cache);
                    item.fate = Fate::Succeeded;
                }
                Err(failure) if failure.kind == FailureKind::Conflict => {
                    return Ok(GroupRun::Conflict(failure.message));
                }
                Err(failure) => {
                    effects.state.discard();
                    shared_tx.drop_deferred().await;
                    let record = outcome.record.as_deref();
                    let failed = FailedCall::new(failure, record, &outcome.logs, recordings);
                    recordings += failed.recording_size();
                    failed_keys.extend(item.key.clone());
                    item.fate = Fate::Failed(failed);
                    if outcome.ran_sql && !self.undo_item(run, shared_tx).await? {
                        return Ok(GroupRun::RerunOthers);
                    }
                    effects.savepoint_rollbacks += u32::from(outcome.ran_sql);
                }
            }
        }
        match shared_tx.run_collected().await? {
            Ok(()) => Ok(GroupRun::Completed(Box::new(effects))),
            Err(error) => Ok(deferred_failed(error)),
        }
    }

    /// Rolls the failed item back to its savepoint. False when there is none.
    async fn undo_item(&self, run: &BatchRun, shared_tx: &SharedTx) -> anyhow::Result<bool> {
        match run.savepoints {
            Savepoints::None => Ok(false),
            Savepoints::PerItem => shared_tx.undo_item().await,
        }
    }

    /// One call for all items. Their effects cannot be separated: all take effect, or none.
    async fn run_batch(
        &self,
        run: &BatchRun,
        fresh: &mut [&mut BatchItem],
        shared_tx: &SharedTx,
        state: BatchState,
    ) -> anyhow::Result<GroupRun> {
        let inputs = self.inputs_of(fresh);
        let stopwatch = self.traces.stopwatch();
        let attempts = fresh.iter().map(|item| item.attempts).max();
        let attempt = attempts.unwrap_or_default() + 1;
        let span = tracing::debug_span!(
            "delivery",
            worker = self.worker.name,
            messages = inputs.messages.len(),
            attempt,
        );
        let outcome = self
            .call(inputs, attempt, shared_tx, state, None)
            .instrument(span)
            .await?;
        if let Some(stopwatch) = stopwatch {
            trace_batch(fresh, &outcome, stopwatch.stop(), shared_tx);
        }

        let results = match (outcome.result, fresh.len()) {
            (Ok(results), _) => results,
            (Err(failure), _) if failure.kind == FailureKind::Conflict => {
                return Ok(GroupRun::Conflict(failure.message));
            }
            (Err(failure), 1) => vec![Err(failure)],
            (Err(_), _) => return Ok(GroupRun::UnknownItemFailed),
        };

        // A failed item spoils the transaction for all of them.
        if results.iter().any(Result::is_err) {
            let mut recordings = run.recordings_size();
            for (item, result) in fresh.iter_mut().zip(results) {
                let Err(failure) = result else { continue };
                let record = outcome.record.as_deref();
                let failed = FailedCall::new(failure, record, &outcome.logs, recordings);
                recordings += failed.recording_size();
                item.fate = Fate::Failed(failed);
            }
            return Ok(GroupRun::RerunOthers);
        }

        let label = format!("a batch of {}", fresh.len());
        log_guest_output(&self.worker.name, &label, &outcome.logs);
        fresh
            .iter_mut()
            .for_each(|item| item.fate = Fate::Succeeded);
        let mut state = outcome.state;
        state.keep();
        Ok(GroupRun::Completed(Box::new(GroupEffects {
            outputs: outcome.outputs,
            state,
            cache: outcome.cache,
            savepoint_rollbacks: 0,
        })))
    }

    pub(super) async fn call(
        &self,
        inputs: CallInputs,
        attempt: u32,
        shared_tx: &SharedTx,
        state: BatchState,
        warm: Option<WarmInstance>,
    ) -> anyhow::Result<CallOutcome> {
        let call = Call {
            messages: inputs.messages,
            traces: inputs.traces,
            worker: Arc::clone(&self.worker),
            config: Arc::clone(&self.config),
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
            request: inputs.request,
            recorder: Recorder::default(),
        };
        shared_tx.begin_call().await;
        let began = Instant::now();
        let outcome = self.guest.call(call, warm).await;
        self.metrics.processed(&self.worker.name, began.elapsed());
        outcome
    }
}

/// How a run ends whose calls share their deferred statements, when one of those fails. The items
/// run again with savepoints, where each fails by itself.
fn deferred_failed(error: SqlError) -> GroupRun {
    match error {
        SqlError::Conflict(error) => GroupRun::Conflict(error.message),
        _ => GroupRun::RerunOthers,
    }
}

/// Takes the call for all items into the trace of each. The statements belong to the call, so they
/// are in the trace of the first item.
fn trace_batch(
    items: &mut [&mut BatchItem],
    outcome: &CallOutcome,
    interval: Interval,
    shared_tx: &SharedTx,
) {
    let mut statements = shared_tx.take_statements();
    for (position, item) in items.iter_mut().enumerate() {
        let Some(trace) = &mut item.trace else {
            continue;
        };
        let failure = match &outcome.result {
            Ok(results) => results
                .get(position)
                .and_then(|result| result.as_ref().err()),
            Err(failure) => Some(failure),
        };
        trace.handled(interval, std::mem::take(&mut statements), failure);
    }
}

/// The failure of a call for one message.
pub(super) fn first_failure(
    result: &Result<Vec<HandlerResult>, CallFailure>,
) -> Option<&CallFailure> {
    match result {
        Ok(results) => results.iter().find_map(|result| result.as_ref().err()),
        Err(failure) => Some(failure),
    }
}

/// The read cache of one worker, for its guests.
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
