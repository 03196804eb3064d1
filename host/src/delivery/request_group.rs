//! Requests that share a transaction, as the messages of a batch do. Each has its own response
//! after the commit.
//!
//! A group is run speculatively. A request that fails, or that takes long, is dropped from it
//! without cost to the others. What the database refuses as a whole is run again, each request in a
//! transaction of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::batch::{CallInputs, first_failure};
use super::request::{
    HandlerOutcome, IncomingRequest, RequestOutcome, commit_refused, handled_elsewhere,
    request_message,
};
use super::trace::{ClaimTrace, ItemTrace};
use super::{CONFLICTS_MAX, Delivery, HAND_OVER_LEASE, Savepoints, SharedTx};
use super::{log_guest_output, store_error};
use crate::cache::ReadVersion;
use crate::fault;
use crate::guest::{CallFailure, CallOutcome};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::model::request::HttpResponse;
use crate::model::sql::{Dialect, SqlError};
use crate::store::conflict::pause_after;
use crate::store::{KeptResponse, OutboxRow, StoreError, Tx};
use crate::traces::{Stopwatch, Traces};

/// How many requests of a refused group are handled at once.
const INDIVIDUALLY_AT_ONCE: usize = 4;

/// A request that waits for its outcome.
pub struct PendingRequest {
    /// The request.
    pub incoming: Arc<IncomingRequest>,
    /// Takes its outcome.
    pub outcome: oneshot::Sender<Result<RequestOutcome, StoreError>>,
}

/// The result of a group. Its requests have their outcomes, except those that are left.
#[derive(Default)]
pub struct GroupResult {
    /// Requests that take long. Each runs alone.
    pub slow: Vec<PendingRequest>,
    /// The requests behind the last of them, which did not run.
    pub left: Vec<PendingRequest>,
    /// Number of times that requests had to run again.
    pub reruns: u32,
    /// Number of conflicts with other transactions.
    pub conflicts: u32,
    /// What their handlers did.
    pub handlers: HandlerRuns,
}

/// What the handlers of a group did.
#[derive(Default)]
pub struct HandlerRuns {
    /// Number of calls.
    pub calls: usize,
    /// How long they took together.
    pub time: Duration,
    /// Number of requests whose effects were rolled back.
    pub undone: u32,
}

impl HandlerRuns {
    fn add(mut self, other: HandlerRuns) -> Self {
        self.calls += other.calls;
        self.time += other.time;
        self.undone += other.undone;
        self
    }
}

/// A request of a transaction.
struct Item<'r> {
    incoming: &'r IncomingRequest,
    message: Arc<Message>,
    fate: Fate,
    /// The run of this transaction, if traces are on.
    trace: Option<Box<ItemTrace>>,
}

enum Fate {
    /// It is to run.
    Pending,
    /// It was stopped, because it took long and others wait.
    Slow,
    /// Its response takes effect with the commit. A failed one has no other effects.
    Responded(HttpResponse),
    /// Its handler was stopped.
    Failed(CallFailure),
    /// It has its outcome.
    Settled(RequestOutcome),
}

/// How a transaction ended.
enum GroupEnd {
    /// The fates of the items that ran are settled.
    Finished {
        outputs: Vec<OutboxRow>,
        leased_at: Instant,
    },
    /// An item failed after it ran SQL, and there was no savepoint. The transaction is rolled back.
    NeedsSavepoints,
    /// The database refused the group as a whole.
    RunIndividually,
    /// Another transaction conflicted.
    Conflict(anyhow::Error),
}

/// The effects of the successful items, beside those in the database.
#[derive(Default)]
struct Effects {
    outputs: Vec<Output>,
    state: BatchState,
    cache: CacheWrites,
}

/// What an item of a running group leads to.
enum Step {
    Continue,
    /// Its effects are rolled back.
    Undone,
    /// The items behind it run in a later transaction.
    Stop,
    End(GroupEnd),
}

impl Delivery {
    /// Handles one request in a transaction of its own. The future must run to completion, like
    /// that of [`Delivery::deliver`].
    ///
    /// # Errors
    /// Nothing took effect.
    pub async fn handle(&self, incoming: &IncomingRequest) -> Result<RequestOutcome, StoreError> {
        let mut runs = HandlerRuns::default();
        self.handle_alone(incoming, Savepoints::None, &mut runs)
            .await
    }

    async fn handle_alone(
        &self,
        incoming: &IncomingRequest,
        savepoints: Savepoints,
        runs: &mut HandlerRuns,
    ) -> Result<RequestOutcome, StoreError> {
        let mut conflicts = 0;
        loop {
            let mut items = [Item::new(incoming)];
            let ended = self.run_together(&mut items, savepoints, None, runs).await;
            let [item] = items;
            let cause = match ended {
                Ok(GroupEnd::Finished { outputs, leased_at }) => {
                    return Ok(outcome(item.fate, outputs, leased_at));
                }
                // Its effects are gone with the transaction. A response is stored in another one.
                Ok(GroupEnd::NeedsSavepoints | GroupEnd::RunIndividually) => {
                    runs.undone += 1;
                    item.record(&self.traces, self.store.dialect());
                    return match item.fate {
                        Fate::Responded(response) if !incoming.request.is_safe() => {
                            self.store_response(incoming, response).await
                        }
                        fate => Ok(outcome(fate, Vec::new(), Instant::now())),
                    };
                }
                Ok(GroupEnd::Conflict(cause)) | Err(StoreError::Conflict(cause)) => cause,
                Err(error) => return Err(error),
            };
            self.metrics.conflict(&self.worker.name);
            conflicts += 1;
            if conflicts > CONFLICTS_MAX {
                return Err(StoreError::Conflict(cause));
            }
            pause_after(conflicts).await;
        }
    }

    /// Handles requests that may write in one transaction, as far as they can share it. A handler
    /// that takes longer than `patience` is stopped while others wait for it. The future must run
    /// to completion, like that of [`Delivery::deliver`].
    pub async fn handle_group(
        &self,
        mut group: Vec<PendingRequest>,
        mut savepoints: Savepoints,
        patience: Duration,
    ) -> GroupResult {
        let mut result = GroupResult::default();
        while group.len() > 1 {
            let mut items: Vec<Item<'_>> = group
                .iter()
                .map(|request| Item::new(&request.incoming))
                .collect();
            let runs = &mut result.handlers;
            let ended = self
                .run_together(&mut items, savepoints, Some(patience), runs)
                .await;
            let fates: Vec<Fate> = items.into_iter().map(|item| item.fate).collect();
            match ended {
                Ok(GroupEnd::Finished { outputs, leased_at }) => {
                    finish(group, fates, outputs, leased_at, &mut result);
                    return result;
                }
                Ok(GroupEnd::NeedsSavepoints) if savepoints == Savepoints::None => {
                    savepoints = Savepoints::PerItem;
                    result.reruns += 1;
                    group = without_slow(group, fates, &mut result);
                }
                Ok(GroupEnd::NeedsSavepoints | GroupEnd::RunIndividually) => {
                    result.reruns += 1;
                    group = without_slow(group, fates, &mut result);
                    break;
                }
                Ok(GroupEnd::Conflict(_)) | Err(StoreError::Conflict(_)) => {
                    self.metrics.conflict(&self.worker.name);
                    (result.conflicts, result.reruns) = (result.conflicts + 1, result.reruns + 1);
                    break;
                }
                // The statement of one of them may have broken the connection.
                Err(error) if error.broke_in_statement() => {
                    result.reruns += 1;
                    break;
                }
                Err(error) => {
                    for request in group {
                        request.finish(Err(same_for_each(&error)));
                    }
                    return result;
                }
            }
        }
        let runs = self.handle_individually(group, savepoints).await;
        result.handlers = result.handlers.add(runs);
        result
    }

    /// Handles requests in transactions of their own, a few at a time: one that hangs does not keep
    /// the others waiting.
    async fn handle_individually(
        &self,
        group: Vec<PendingRequest>,
        savepoints: Savepoints,
    ) -> HandlerRuns {
        let handled = futures::stream::iter(group).map(async |request: PendingRequest| {
            let mut runs = HandlerRuns::default();
            let outcome = self.handle_alone(&request.incoming, savepoints, &mut runs);
            let outcome = outcome.await;
            request.finish(outcome);
            runs
        });
        handled
            .buffer_unordered(INDIVIDUALLY_AT_ONCE)
            .fold(HandlerRuns::default(), async |sum, runs| sum.add(runs))
            .await
    }

    /// Runs one transaction for all items.
    async fn run_together(
        &self,
        items: &mut [Item<'_>],
        savepoints: Savepoints,
        patience: Option<Duration>,
        runs: &mut HandlerRuns,
    ) -> Result<GroupEnd, StoreError> {
        // Claim the idempotency keys.
        let stopwatch = self.traces.stopwatch();
        let may_write = items.iter().any(|item| !item.incoming.request.is_safe());
        let (name, time) = (&self.worker.name, self.worker.limits.time);
        let read_version = self.cache.read_version(name);
        let mut tx = match may_write {
            true => self.store.begin(name, time).await?,
            false => self.store.begin_read_only(name, time).await?,
        };
        fault::point(fault::AFTER_BEGIN);
        if let Err(error) = claim(items, &mut tx).await {
            tx.rollback().await;
            return Err(error);
        }
        fault::point(fault::AFTER_CLAIM);
        trace_claims(stopwatch, items);
        let mut fresh: Vec<&mut Item<'_>> =
            items.iter_mut().filter(|item| item.is_pending()).collect();
        if fresh.is_empty() {
            tx.rollback().await;
            return Ok(GroupEnd::without_outputs());
        }

        // Run the handlers.
        let shared_tx = SharedTx::new(self.store.dialect(), tx)
            .traced(self.traces.are_on())
            .collecting_deferred(savepoints == Savepoints::None && fresh.len() > 1);
        let mut effects = Effects::default();
        let ended = self
            .run_handlers(
                &mut fresh,
                &shared_tx,
                savepoints,
                patience,
                &mut effects,
                runs,
            )
            .await;
        let tx = shared_tx.take_tx().await?;
        fault::point(fault::AFTER_GUEST);
        match ended {
            Ok(None) => {}
            Ok(Some(ended)) => {
                tx.rollback().await;
                return Ok(ended);
            }
            Err(error) => {
                tx.rollback().await;
                return Err(store_error(error));
            }
        }

        // Commit their effects.
        let ended = match may_write {
            true => {
                self.commit_together(&mut fresh, tx, effects, read_version)
                    .await
            }
            false => {
                tx.rollback().await;
                // A read-only request may still put cache values.
                self.cache
                    .commit(name, &effects.cache, read_version, None)
                    .await;
                Ok(GroupEnd::without_outputs())
            }
        };
        if matches!(ended, Ok(GroupEnd::Finished { .. })) {
            for item in &fresh {
                item.record(&self.traces, self.store.dialect());
            }
        }
        ended
    }

    /// Runs the handlers one after the other. Returns the end of the transaction if it cannot be
    /// committed.
    async fn run_handlers(
        &self,
        items: &mut [&mut Item<'_>],
        shared_tx: &SharedTx,
        savepoints: Savepoints,
        patience: Option<Duration>,
        effects: &mut Effects,
        runs: &mut HandlerRuns,
    ) -> anyhow::Result<Option<GroupEnd>> {
        let patience = patience.filter(|_| items.len() > 1);
        for item in items {
            let began = Instant::now();
            if savepoints == Savepoints::PerItem {
                shared_tx.begin_item().await;
            }
            let returned = self
                .call_handler(item, shared_tx, effects, patience)
                .await?;
            runs.calls += 1;
            runs.time += began.elapsed();
            if let Some(error) = shared_tx.take_earlier_error().await {
                return Ok(Some(deferred_failed(error)));
            }
            let step = match returned {
                Some(outcome) => {
                    self.take_in(item, outcome, shared_tx, savepoints, effects)
                        .await?
                }
                None => {
                    item.fate = Fate::Slow;
                    match undo(shared_tx, savepoints).await? {
                        true => Step::Stop,
                        false => Step::End(GroupEnd::NeedsSavepoints),
                    }
                }
            };
            match step {
                Step::Continue => {}
                Step::Undone => runs.undone += 1,
                Step::Stop => break,
                Step::End(ended) => return Ok(Some(ended)),
            }
        }
        let ran = shared_tx.run_collected().await?;
        Ok(ran.err().map(deferred_failed))
    }

    /// Runs one handler. Returns `None` if it was stopped because others wait for it.
    async fn call_handler(
        &self,
        item: &mut Item<'_>,
        shared_tx: &SharedTx,
        effects: &mut Effects,
        patience: Option<Duration>,
    ) -> anyhow::Result<Option<CallOutcome>> {
        let stopwatch = self.traces.stopwatch();
        // A stopped call takes its state with it.
        let state = match patience {
            None => std::mem::take(&mut effects.state),
            Some(_) => effects.state.clone(),
        };
        let trace = item.trace.as_ref();
        let trace = trace.and_then(|trace| trace.of_outputs(&self.traces));
        let inputs = CallInputs {
            messages: vec![Arc::clone(&item.message)],
            traces: Vec::from_iter(trace),
            request: Some(item.incoming.call(&self.worker.name)),
        };
        let span = tracing::debug_span!("handler", id = item.message.event_id);
        let running = self
            .call(inputs, 1, shared_tx, state, None)
            .instrument(span);
        let outcome = match patience {
            None => running.await?,
            Some(patience) => match tokio::time::timeout(patience, running).await {
                Ok(outcome) => outcome?,
                Err(_) => {
                    shared_tx.take_statements();
                    return Ok(None);
                }
            },
        };
        if let (Some(trace), Some(stopwatch)) = (&mut item.trace, stopwatch) {
            let failure = first_failure(&outcome.result);
            trace.handled(stopwatch.stop(), shared_tx.take_statements(), failure);
        }
        Ok(Some(outcome))
    }

    /// Takes in the effects of an item that succeeded. Rolls back those of one that failed.
    async fn take_in(
        &self,
        item: &mut Item<'_>,
        mut outcome: CallOutcome,
        shared_tx: &SharedTx,
        savepoints: Savepoints,
        effects: &mut Effects,
    ) -> anyhow::Result<Step> {
        log_guest_output(&self.worker.name, &item.message.event_id, &outcome.logs);
        effects.state = std::mem::take(&mut outcome.state);
        item.fate = match HandlerOutcome::of(&mut outcome) {
            HandlerOutcome::Conflict(why) => {
                return Ok(Step::End(GroupEnd::Conflict(anyhow::anyhow!(why))));
            }
            HandlerOutcome::Response(response) if response.is_success() => {
                effects.state.keep();
                effects.outputs.append(&mut outcome.outputs);
                effects.cache.extend(outcome.cache);
                item.fate = Fate::Responded(response);
                return Ok(Step::Continue);
            }
            HandlerOutcome::Response(response) => Fate::Responded(response),
            HandlerOutcome::Failure(failure) => Fate::Failed(failure),
        };
        effects.state.discard();
        shared_tx.drop_deferred().await;
        if !outcome.ran_sql {
            return Ok(Step::Continue);
        }
        if undo(shared_tx, savepoints).await? {
            return Ok(Step::Undone);
        }
        Ok(Step::End(match savepoints {
            Savepoints::None => GroupEnd::NeedsSavepoints,
            Savepoints::PerItem => GroupEnd::RunIndividually,
        }))
    }

    /// Writes the effects and the responses of the items, and commits.
    async fn commit_together(
        &self,
        items: &mut [&mut Item<'_>],
        mut tx: Tx,
        mut effects: Effects,
        read_version: ReadVersion,
    ) -> Result<GroupEnd, StoreError> {
        // A failed request without a key has nothing to commit.
        let Some(first) = items.iter().find(|item| item.has_effects()) else {
            tx.rollback().await;
            return Ok(GroupEnd::without_outputs());
        };
        let event_id = first.message.event_id.clone();

        // Write the effects.
        let invalidation = self.invalidation_output(&event_id, &effects.cache)?;
        let id = invalidation.as_ref().map(|output| output.id.clone());
        effects.outputs.extend(invalidation);
        let stopwatch = self.traces.stopwatch();
        let leased_at = Instant::now();
        let outputs = match write(items, &effects, &mut tx).await {
            Ok(outputs) => outputs,
            Err(error) => {
                tx.rollback().await;
                return refused(items, error);
            }
        };
        fault::point(fault::BEFORE_COMMIT);

        // Commit, and only then respond and cache.
        let (name, cache) = (&self.worker.name, &effects.cache);
        match tx.commit().await {
            Ok(_) => {
                fault::point(fault::AFTER_COMMIT);
                for item in items.iter_mut().filter(|item| item.has_effects()) {
                    if let (Some(trace), Some(stopwatch)) = (&mut item.trace, stopwatch) {
                        trace.committed(stopwatch.stop());
                    }
                }
                self.cache
                    .commit(name, cache, read_version, id.as_deref())
                    .await;
                Ok(GroupEnd::Finished { outputs, leased_at })
            }
            Err(StoreError::Unavailable(cause)) => {
                self.metrics.commit_unclear(name);
                self.invalidate_after_unclear_commit(cache).await;
                for item in items.iter_mut().filter(|item| item.has_effects()) {
                    let cause = anyhow::anyhow!("{cause:#}");
                    item.fate = Fate::Settled(RequestOutcome::Unclear(cause));
                }
                Ok(GroupEnd::without_outputs())
            }
            Err(error) => refused(items, error),
        }
    }
}

/// Begins the traces of the requests of a transaction.
fn trace_claims(stopwatch: Option<Stopwatch>, items: &mut [Item<'_>]) {
    let Some(stopwatch) = stopwatch else { return };
    let claim = ClaimTrace::new(stopwatch, items.len());
    for item in items {
        let request = item.incoming.trace.as_ref();
        item.trace = request.map(|request| ItemTrace::of_request(request, &claim));
    }
}

/// Claims the keys of the items that have one, and settles those whose key is not free.
async fn claim(items: &mut [Item<'_>], tx: &mut Tx) -> Result<(), StoreError> {
    let mut with_key: Vec<&mut Item<'_>> = items
        .iter_mut()
        .filter(|item| item.incoming.key.is_some())
        .collect();
    let keys = with_key
        .iter()
        .filter_map(|item| item.incoming.key.as_ref());
    let keys: Vec<_> = keys.map(|(key, _)| key).collect();
    if keys.is_empty() {
        return Ok(());
    }
    let claimed = tx.claim_requests(&keys).await?;
    for (item, claimed) in with_key.iter_mut().zip(claimed) {
        if let Some(outcome) = handled_elsewhere(claimed) {
            item.fate = Fate::Settled(outcome);
        }
    }
    Ok(())
}

/// How a transaction ends whose handlers share their deferred statements, when one of those fails.
fn deferred_failed(error: SqlError) -> GroupEnd {
    match error {
        SqlError::Conflict(error) => GroupEnd::Conflict(anyhow::anyhow!(error.message)),
        _ => GroupEnd::NeedsSavepoints,
    }
}

/// Rolls back the running item. Returns false if only the whole transaction can be rolled back.
async fn undo(shared_tx: &SharedTx, savepoints: Savepoints) -> anyhow::Result<bool> {
    match savepoints {
        Savepoints::None => Ok(false),
        Savepoints::PerItem => shared_tx.undo_item().await,
    }
}

/// Writes state, outputs and the responses of requests with a key.
async fn write(
    items: &[&mut Item<'_>],
    effects: &Effects,
    tx: &mut Tx,
) -> Result<Vec<OutboxRow>, StoreError> {
    let writes = effects.state.writes();
    if !writes.is_empty() {
        tx.save_state(&writes).await?;
    }
    let outputs = match effects.outputs.is_empty() {
        true => Vec::new(),
        false => tx.append_outputs(&effects.outputs, HAND_OVER_LEASE).await?,
    };
    let kept: Vec<KeptResponse<'_>> = items.iter().filter_map(|item| item.kept()).collect();
    if !kept.is_empty() {
        tx.store_responses(&kept).await?;
    }
    Ok(outputs)
}

/// The end of a transaction that the database did not commit. A request that is alone is refused.
///
/// # Errors
/// The database failed.
fn refused(items: &mut [&mut Item<'_>], error: StoreError) -> Result<GroupEnd, StoreError> {
    match (error, items) {
        (StoreError::Conflict(cause), _) => Ok(GroupEnd::Conflict(cause)),
        (StoreError::Refused(cause), [item]) => {
            item.fate = Fate::Settled(commit_refused(&cause));
            Ok(GroupEnd::without_outputs())
        }
        (StoreError::Refused(_), _) => Ok(GroupEnd::RunIndividually),
        (error, _) => Err(error),
    }
}

/// Gives the requests of a finished transaction their outcomes. The first one that succeeded takes
/// the outputs of all to the relay.
fn finish(
    group: Vec<PendingRequest>,
    fates: Vec<Fate>,
    mut outputs: Vec<OutboxRow>,
    leased_at: Instant,
    result: &mut GroupResult,
) {
    for (request, fate) in group.into_iter().zip(fates) {
        match fate {
            Fate::Pending => result.left.push(request),
            Fate::Slow => result.slow.push(request),
            fate => {
                let outputs = match fate {
                    Fate::Responded(_) => std::mem::take(&mut outputs),
                    _ => Vec::new(),
                };
                request.finish(Ok(outcome(fate, outputs, leased_at)));
            }
        }
    }
}

/// Takes out a request that takes long.
fn without_slow(
    group: Vec<PendingRequest>,
    fates: Vec<Fate>,
    result: &mut GroupResult,
) -> Vec<PendingRequest> {
    let mut others = Vec::with_capacity(group.len());
    for (request, fate) in group.into_iter().zip(fates) {
        match fate {
            Fate::Slow => result.slow.push(request),
            _ => others.push(request),
        }
    }
    others
}

fn outcome(fate: Fate, outputs: Vec<OutboxRow>, leased_at: Instant) -> RequestOutcome {
    match fate {
        Fate::Responded(response) => RequestOutcome::Responded {
            response,
            replayed: false,
            outputs,
            leased_at,
        },
        Fate::Failed(failure) => RequestOutcome::Failed(failure),
        Fate::Settled(outcome) => outcome,
        Fate::Pending | Fate::Slow => RequestOutcome::InFlight,
    }
}

/// A copy of an error of the database, for each request of a group.
fn same_for_each(error: &StoreError) -> StoreError {
    match error {
        StoreError::Conflict(cause) => StoreError::Conflict(anyhow::anyhow!("{cause:#}")),
        StoreError::Unavailable(cause) => StoreError::Unavailable(anyhow::anyhow!("{cause:#}")),
        StoreError::Refused(cause) => StoreError::Refused(anyhow::anyhow!("{cause:#}")),
    }
}

impl GroupEnd {
    fn without_outputs() -> Self {
        GroupEnd::Finished {
            outputs: Vec::new(),
            leased_at: Instant::now(),
        }
    }
}

impl PendingRequest {
    /// Passes the outcome on. Without a receiver, a retry finds it in the database.
    pub fn finish(self, outcome: Result<RequestOutcome, StoreError>) {
        let _ = self.outcome.send(outcome);
    }
}

impl<'r> Item<'r> {
    fn new(incoming: &'r IncomingRequest) -> Self {
        Item {
            incoming,
            message: request_message(&incoming.request),
            fate: Fate::Pending,
            trace: None,
        }
    }

    fn is_pending(&self) -> bool {
        matches!(self.fate, Fate::Pending)
    }

    /// Records the spans of an item that ran to its end.
    fn record(&self, traces: &Traces, dialect: Dialect) {
        let trace = self.trace.as_ref();
        if let Some(trace) = trace.filter(|_| !matches!(self.fate, Fate::Pending | Fate::Slow)) {
            trace.record_parts(traces, dialect);
        }
    }

    /// Whether the commit has effects of the item.
    fn has_effects(&self) -> bool {
        match &self.fate {
            Fate::Responded(response) => response.is_success() || self.incoming.key.is_some(),
            _ => false,
        }
    }

    /// The response to store.
    fn kept(&self) -> Option<KeptResponse<'_>> {
        match (&self.incoming.key, &self.fate) {
            (Some((request, keep)), Fate::Responded(response)) => Some(KeptResponse {
                request,
                response,
                keep: *keep,
            }),
            _ => None,
        }
    }
}
