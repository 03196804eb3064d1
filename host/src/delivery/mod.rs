//! The core: a batch of messages becomes one transaction and a verdict for each message.
//!
//! A guest has no effect outside the transaction, so a batch is run speculatively: a failing item
//! is taken out, and the others run again or continue as if it had never been there. It never costs
//! its neighbours an attempt.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;

use crate::cache::{Cache, ReadVersion};
use crate::config::manifest::{ResolvedConfig, Worker};
use crate::fault;
use crate::guest::Guest;
use crate::metrics::Metrics;
use crate::metrics::health::{Health, HealthCheck};
use crate::model::cache_writes::CacheWrites;
use crate::model::invalidation::Invalidation;
use crate::model::keyed_state::{BatchState, StateSlot};
use crate::model::message::{Message, Output};
use crate::model::verdict::Verdict;
use crate::store::conflict::pause_after;
use crate::store::{Claim, OutboxRow, Store, StoreError, Tx, is_busy};
use crate::traces::Traces;

mod attempts;
mod batch;
pub mod batch_size;
pub mod concurrency_limit;
mod connection_breaks;
mod dry_run;
mod item;
pub mod request;
pub mod request_group;
mod schema;
mod shared_tx;
mod trace;

use batch::{GroupEffects, GroupRun};
pub use connection_breaks::ConnectionBreaks;
pub use dry_run::DryRunOutcome;
use item::{BatchItem, FailedCall, Fate};
pub(crate) use schema::schema_mismatch;
pub(crate) use shared_tx::SharedTx;
pub use trace::RequestTrace;

/// The lease of committed outputs. For this long after the commit, only the committing host
/// publishes them.
pub const HAND_OVER_LEASE: Duration = Duration::from_secs(30);

/// Maximum number of times that a batch is run again at once after conflicts with other
/// transactions.
const CONFLICTS_MAX: u32 = 12;

/// After how long an in-batch duplicate of a message without a final verdict is delivered again.
const DUPLICATE_WAIT: Duration = Duration::from_millis(500);

/// What deliveries of one deployment share.
#[derive(Clone)]
pub struct Delivery {
    /// The database that runs the transactions.
    pub store: Arc<Store>,
    /// The compiled component of the deployment.
    pub guest: Guest,
    /// The worker's manifest, with all defaults filled in.
    pub worker: Arc<Worker>,
    /// The worker's configuration, with the values of secrets.
    pub config: Arc<ResolvedConfig>,
    /// The version of the deployment; 1 for the worker's first one.
    pub version: u32,
    /// The largest payload the broker takes, in bytes.
    pub payload_max: usize,
    /// The metrics of the host.
    pub metrics: Arc<Metrics>,
    /// The cache of the host. Cache writes are applied to it with the commit.
    pub cache: Cache,
    /// The messages whose statements broke the connection. They run alone.
    pub connection_breaks: ConnectionBreaks,
    /// The health of the host. Each database operation is recorded in it.
    pub health: Arc<Health>,
    /// Records the spans of deliveries, if traces are on.
    pub traces: Traces,
}

/// Whether an item that runs SQL gets a savepoint first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Savepoints {
    /// No round trip for it; an item that fails after SQL makes the others run again.
    None,
    /// One round trip per item with SQL; an item that fails is rolled back alone.
    PerItem,
}

/// The result of a delivered batch.
#[derive(Debug)]
pub struct BatchResult {
    /// One verdict per message, in the order of the batch.
    pub verdicts: Vec<Verdict>,
    /// Committed outputs to be published now, in order.
    pub outputs: Vec<OutboxRow>,
    /// Not later than the start of the first of their leases.
    pub leased_at: Instant,
    /// Number of transactions whose items had to run again.
    pub reruns: u32,
    /// Number of items that were rolled back to a savepoint, which spared the others another run.
    pub savepoint_rollbacks: u32,
    /// Number of conflicts with other transactions.
    pub conflicts: u32,
}

impl Delivery {
    /// Records the outcome of a database operation. Conflicts and failures of guests say nothing
    /// about the database.
    pub fn report_health<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) => self.health.record(HealthCheck::Transactions, Ok(())),
            // A full pool is no fault of the database.
            Err(error @ StoreError::Unavailable(cause))
                if !error.broke_in_statement() && !is_busy(cause) =>
            {
                self.health
                    .record(HealthCheck::Transactions, Err(format!("{cause:#}")));
            }
            Err(_) => {}
        }
    }

    /// Delivers a batch: every message gets a verdict.
    ///
    /// The future must run to its end; dropping it leaves a database operation half done.
    ///
    /// # Errors
    /// Nothing is known and nothing is lost: call it again with the same batch.
    pub async fn deliver(
        &self,
        batch: &[Arc<Message>],
        savepoints: Savepoints,
    ) -> Result<BatchResult, StoreError> {
        let mut run = BatchRun::new(savepoints);
        let mut items = item::distinct(batch, &self.worker);
        self.check_schemas(&mut items);
        let mut groups = self.group_items(items);
        while let Some(group) = groups.pop_front() {
            let mut group = run.runnable(group);
            if group.is_empty() {
                continue;
            }

            let outcome = match self.run_group(&mut run, &mut group).await {
                Err(error) if error.broke_in_statement() => {
                    item::reset(&mut group);
                    self.handle_connection_break(&mut group, error)?
                }
                Err(error) => {
                    self.record_lost_runs(&group);
                    return Err(error);
                }
                Ok(outcome) => outcome,
            };

            run.reruns += u32::from(!matches!(outcome, TxOutcome::Finished));
            if !matches!(outcome, TxOutcome::Finished | TxOutcome::Rerun) {
                item::reset(&mut group);
            }
            let pending = run.finish(group);
            match outcome {
                TxOutcome::Finished => push_group(&mut groups, pending),
                TxOutcome::Rerun => {
                    fault::point(fault::BEFORE_RERUN);
                    run.savepoints = Savepoints::PerItem;
                    push_group(&mut groups, pending);
                }
                TxOutcome::Conflict(cause) => {
                    self.metrics.conflict(&self.worker.name);
                    run.conflicts += 1;
                    if run.conflicts > CONFLICTS_MAX {
                        return Err(StoreError::Conflict(cause));
                    }
                    pause_after(run.conflicts).await;
                    split(pending, &mut groups);
                }
                TxOutcome::Split => split(pending, &mut groups),
                TxOutcome::RunIndividually => {
                    for item in pending.into_iter().rev() {
                        groups.push_front(vec![item]);
                    }
                }
            }
        }

        self.judge_failures(&mut run).await?;
        let event_ids = batch.iter().map(|message| message.event_id.as_str());
        self.connection_breaks.remove(event_ids);
        self.delete_recordings(&run).await;
        self.metrics.batch(&self.worker.name, run.reruns);
        for (item, verdict) in &run.judged {
            self.record_delivery(item, verdict);
        }
        Ok(run.into_result(&self.worker.name, self.version))
    }

    /// Runs one group of pending items in one transaction.
    async fn run_group(
        &self,
        run: &mut BatchRun,
        group: &mut [BatchItem],
    ) -> Result<TxOutcome, StoreError> {
        // Claim the event ids.
        let stopwatch = self.traces.stopwatch();
        let read_version = self.cache.read_version(&self.worker.name);
        let mut tx = self
            .store
            .begin(&self.worker.name, self.worker.limits.time)
            .await?;
        fault::point(fault::AFTER_BEGIN);
        let claims: Vec<Claim> = group.iter().map(BatchItem::claim).collect();
        let claimed = match tx.claim(&claims).await {
            Ok(claimed) => claimed,
            Err(error) => return roll_back_after(error, tx).await,
        };
        fault::point(fault::AFTER_CLAIM);
        for (item, claimed) in group.iter_mut().zip(claimed) {
            item.apply_claim(claimed, &self.worker.name, self.version);
        }
        self.trace_claims(stopwatch, group);
        let mut fresh: Vec<&mut BatchItem> =
            group.iter_mut().filter(|item| item.is_pending()).collect();

        // Take out the messages that do not fit their schema.
        fresh.iter_mut().for_each(|item| self.reject_mismatch(item));
        let mut runnable: Vec<&mut BatchItem> = fresh
            .iter_mut()
            .filter(|item| item.is_pending())
            .map(|item| &mut **item)
            .collect();
        if runnable.is_empty() {
            tx.rollback().await;
            return Ok(TxOutcome::Finished);
        }

        // Run the guest.
        let state = match self.prefetch(&runnable, &mut tx).await {
            Ok(state) => state,
            Err(error) => return roll_back_after(error, tx).await,
        };
        let collects = run.savepoints == Savepoints::None && runnable.len() > 1;
        let shared_tx = SharedTx::new(self.store.dialect(), tx)
            .traced(self.traces.are_on())
            .collecting_deferred(collects && !self.guest.is_batch_handler());
        let group_run = self.run_items(run, &mut runnable, &shared_tx, state).await;
        let tx = shared_tx.take_tx().await?;

        // Commit or roll back.
        let outcome = match group_run {
            Ok(GroupRun::Completed(effects)) => {
                let effects = *effects;
                return self
                    .commit_group(run, tx, &mut fresh, effects, read_version)
                    .await;
            }
            Ok(GroupRun::RerunOthers) => Ok(TxOutcome::Rerun),
            Ok(GroupRun::Conflict(why)) => Ok(TxOutcome::Conflict(anyhow::anyhow!(why))),
            Ok(GroupRun::UnknownItemFailed) => Ok(TxOutcome::Split),
            Err(error) => Err(store_error(error)),
        };
        tx.rollback().await;
        outcome
    }

    /// Reads the state that the items are likely to need, with one statement.
    async fn prefetch(
        &self,
        fresh: &[&mut BatchItem],
        tx: &mut Tx,
    ) -> Result<BatchState, StoreError> {
        let mut state = BatchState::default();
        let keys: BTreeSet<String> = fresh
            .iter()
            .flat_map(|item| {
                let keys = self.worker.state_keys.iter();
                keys.filter_map(|key| key.key_for(&item.message))
            })
            .collect();
        if keys.is_empty() {
            return Ok(state);
        }
        let keys: Vec<String> = keys.into_iter().collect();
        let found: Vec<(String, StateSlot)> = tx.load_state(&keys).await?;
        for (key, slot) in found {
            state.record_read(key, slot);
        }
        Ok(state)
    }

    /// Writes state and outputs and commits. Items take effect only if the database confirms the
    /// commit.
    async fn commit_group(
        &self,
        run: &mut BatchRun,
        mut tx: Tx,
        fresh: &mut [&mut BatchItem],
        mut effects: GroupEffects,
        read_version: ReadVersion,
    ) -> Result<TxOutcome, StoreError> {
        fault::point(fault::AFTER_GUEST);
        let first = fresh.iter().find(|item| item.has_succeeded());
        let Some(first) = first.map(|item| item.message.event_id.clone()) else {
            tx.rollback().await;
            run.savepoint_rollbacks += effects.savepoint_rollbacks;
            return Ok(TxOutcome::Finished);
        };

        // Write the effects.
        let stopwatch = self.traces.stopwatch();
        let leased_at = Instant::now();
        let invalidation = self.invalidation_output(&first, &effects.cache)?;
        let invalidation_id = invalidation.as_ref().map(|output| output.id.clone());
        effects.outputs.extend(invalidation);
        let rows = match self.write_effects(&mut tx, fresh, &effects).await {
            Ok(rows) => rows,
            Err(error) => {
                tx.rollback().await;
                return handle_commit_error(error, fresh);
            }
        };
        fault::point(fault::BEFORE_COMMIT);

        // Commit, and only then publish and cache.
        match tx.commit().await {
            Ok(settled) => {
                fault::point(fault::AFTER_COMMIT);
                let (cache, id) = (&effects.cache, invalidation_id.as_deref());
                self.cache
                    .commit(&self.worker.name, cache, read_version, id)
                    .await;
                for item in fresh.iter_mut().filter(|item| item.has_succeeded()) {
                    item.fate = Fate::Judged(Verdict::Done(settled));
                    if let (Some(trace), Some(stopwatch)) = (&mut item.trace, stopwatch) {
                        trace.committed(stopwatch.stop());
                    }
                }
                run.leased_at = run.leased_at.or(Some(leased_at));
                run.outputs.extend(rows);
                run.savepoint_rollbacks += effects.savepoint_rollbacks;
                Ok(TxOutcome::Finished)
            }
            Err(error) => {
                if matches!(error, StoreError::Unavailable(_)) {
                    self.metrics.commit_unclear(&self.worker.name);
                    self.invalidate_after_unclear_commit(&effects.cache).await;
                }
                handle_commit_error(error, fresh)
            }
        }
    }

    /// Releases the claims of items without an effect, writes state and outputs.
    async fn write_effects(
        &self,
        tx: &mut Tx,
        fresh: &[&mut BatchItem],
        effects: &GroupEffects,
    ) -> Result<Vec<OutboxRow>, StoreError> {
        let dropped = fresh.iter().filter(|item| !item.has_succeeded());
        let dropped: Vec<String> = dropped.map(|item| item.message.event_id.clone()).collect();
        if !dropped.is_empty() {
            tx.release_claims(&dropped).await?;
        }
        let writes = effects.state.writes();
        if !writes.is_empty() {
            tx.save_state(&writes).await?;
        }
        tx.append_outputs(&effects.outputs, HAND_OVER_LEASE).await
    }

    /// The output that notifies other hosts of invalidated tags; none when no tag is invalidated.
    fn invalidation_output(
        &self,
        event_id: &str,
        cache: &CacheWrites,
    ) -> Result<Option<Output>, StoreError> {
        if cache.tags().is_empty() {
            return Ok(None);
        }
        let invalidation =
            Invalidation::new(&self.worker.name, cache.tags().clone(), Timestamp::now());
        let output = invalidation
            .output(event_id, self.payload_max)
            .context("write the invalidation");
        output.map(Some).map_err(StoreError::Unavailable)
    }

    /// Updates the cache after a commit without an answer: nothing is put, and values that it may
    /// have made stale are invalidated here and in Redis. If the transaction did commit, its output
    /// follows.
    async fn invalidate_after_unclear_commit(&self, cache: &CacheWrites) {
        self.cache
            .invalidate(&self.worker.name, cache.tags().iter().cloned())
            .await;
    }
}

/// The outcome of one transaction.
enum TxOutcome {
    /// No other item has to run because of this transaction. Blocked items run next; failures are
    /// counted at the end of the batch.
    Finished,
    /// Some failed and took the transaction with them: the others run again.
    Rerun,
    /// Another transaction conflicted: run again, in smaller groups.
    Conflict(anyhow::Error),
    /// An unknown item of the group failed: run again in halves.
    Split,
    /// The database refused the group as a whole: run each item alone.
    RunIndividually,
}

/// One batch on its way to its verdicts.
struct BatchRun {
    /// Items with a verdict.
    judged: Vec<(BatchItem, Verdict)>,
    /// Items with a failed attempt that is yet to be counted.
    failed: Vec<(BatchItem, FailedCall)>,
    /// By key, the position of its first failed item. Later items of the key wait.
    held_keys: HashMap<String, usize>,
    outputs: Vec<OutboxRow>,
    leased_at: Option<Instant>,
    reruns: u32,
    savepoint_rollbacks: u32,
    conflicts: u32,
    savepoints: Savepoints,
}

impl BatchRun {
    fn new(savepoints: Savepoints) -> Self {
        BatchRun {
            judged: Vec::new(),
            failed: Vec::new(),
            held_keys: HashMap::new(),
            outputs: Vec::new(),
            leased_at: None,
            reruns: 0,
            savepoint_rollbacks: 0,
            conflicts: 0,
            savepoints,
        }
    }

    /// The items of a group that can run now. An item of a key with an earlier, failed item gets
    /// the verdict `Blocked`.
    fn runnable(&mut self, group: Vec<BatchItem>) -> Vec<BatchItem> {
        let (blocked, runnable): (Vec<_>, Vec<_>) =
            group.into_iter().partition(|item| self.is_blocked(item));
        let blocked = blocked.into_iter().map(|item| (item, Verdict::Blocked));
        self.judged.extend(blocked);
        runnable
    }

    fn is_blocked(&self, item: &BatchItem) -> bool {
        let held_by = item.key.as_ref().and_then(|key| self.held_keys.get(key));
        held_by.is_some_and(|failed| *failed < item.position)
    }

    /// Takes in the items with a verdict or a failed attempt; returns those that are to run.
    fn finish(&mut self, group: Vec<BatchItem>) -> Vec<BatchItem> {
        let mut pending = Vec::new();
        for mut item in group {
            match std::mem::take(&mut item.fate) {
                Fate::Judged(verdict) => self.judged.push((item, verdict)),
                Fate::Failed(failed) => {
                    if let Some(key) = &item.key {
                        let first = self.held_keys.entry(key.clone()).or_insert(item.position);
                        *first = item.position.min(*first);
                    }
                    self.failed.push((item, failed));
                }
                Fate::Blocked | Fate::Succeeded | Fate::Pending => pending.push(item),
            }
        }
        pending
    }

    /// The size of the recordings of failed attempts so far, in bytes.
    fn recordings_size(&self) -> usize {
        let sizes = self
            .failed
            .iter()
            .map(|(_, failed)| failed.recording_size());
        sizes.sum()
    }

    fn into_result(self, worker: &str, version: u32) -> BatchResult {
        let mut verdicts = Vec::new();
        for (item, verdict) in self.judged {
            verdicts.extend(item.duplicate_verdicts(&verdict, worker, version));
            verdicts.push((item.position, verdict));
        }
        verdicts.sort_by_key(|(position, _)| *position);
        BatchResult {
            verdicts: verdicts.into_iter().map(|(_, verdict)| verdict).collect(),
            outputs: self.outputs,
            leased_at: self.leased_at.unwrap_or_else(Instant::now),
            reruns: self.reruns,
            savepoint_rollbacks: self.savepoint_rollbacks,
            conflicts: self.conflicts,
        }
    }
}

/// The outcome of a group whose transaction could not be committed.
fn handle_commit_error(
    error: StoreError,
    fresh: &mut [&mut BatchItem],
) -> Result<TxOutcome, StoreError> {
    match (error, fresh) {
        (StoreError::Conflict(cause), _) => Ok(TxOutcome::Conflict(cause)),
        (StoreError::Refused(cause), [item]) => {
            item.fate = Fate::Failed(FailedCall::commit_refused(&cause));
            Ok(TxOutcome::Finished)
        }
        // One of them is the cause. Run alone, the failing one is identified.
        (StoreError::Refused(_), _) => Ok(TxOutcome::RunIndividually),
        (error, _) => Err(error),
    }
}

/// Splits a group in halves, which come next.
fn split(mut group: Vec<BatchItem>, groups: &mut VecDeque<Vec<BatchItem>>) {
    let later = group.split_off(group.len().div_ceil(2));
    push_group(groups, later);
    push_group(groups, group);
}

fn push_group(groups: &mut VecDeque<Vec<BatchItem>>, group: Vec<BatchItem>) {
    if !group.is_empty() {
        groups.push_front(group);
    }
}

/// Rolls back. A conflict is the outcome of the transaction, any other error is returned.
async fn roll_back_after(error: StoreError, tx: Tx) -> Result<TxOutcome, StoreError> {
    tx.rollback().await;
    match error {
        StoreError::Conflict(cause) => Ok(TxOutcome::Conflict(cause)),
        other => Err(other),
    }
}

/// The error of the store that ended a guest call.
fn store_error(error: anyhow::Error) -> StoreError {
    error
        .downcast::<StoreError>()
        .unwrap_or_else(StoreError::Unavailable)
}

/// Logs what a guest logged, line by line.
fn log_guest_output(worker: &str, event_id: &str, logs: &str) {
    for line in logs.lines() {
        tracing::info!(worker, event_id, line, "guest output");
    }
}
