//! The core of the host: a batch of messages becomes one transaction and one verdict for each
//! message.
//!
//! A guest has no effect outside the transaction, so a batch can run speculatively. A failed item
//! is removed, and the other items run again or continue as if it had never been part of the batch.
//! A failed item never costs the other items an attempt.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;

use crate::cache::{Cache, ReadVersion};
use crate::config::manifest::Worker;
use crate::fault;
use crate::guest::{CallFailure, FailureKind, Guest};
use crate::metrics::Metrics;
use crate::metrics::health::{Health, HealthCheck};
use crate::model::cache_writes::CacheWrites;
use crate::model::invalidation::Invalidation;
use crate::model::keyed_state::{BatchState, StateSlot};
use crate::model::message::{Message, Output};
use crate::model::verdict::{DeadLetter, Reason, Verdict};
use crate::store::conflict::pause_after;
use crate::store::{
    Claim, Claimed, CountedAttempt, FailedAttempt, OutboxRow, Store, StoreError, Tx, is_busy,
};

mod batch;
mod connection_breaks;
mod dry_run;
pub mod request;
mod shared_tx;

use batch::{CompletedRun, FailedItem, GroupRun};
pub use connection_breaks::ConnectionBreaks;
pub use dry_run::DryRunOutcome;
use shared_tx::SharedTx;

/// How long committed outputs belong to the relay of the host that committed them.
pub const HAND_OVER_LEASE: Duration = Duration::from_secs(30);

/// Maximum number of immediate retries of a batch after conflicts with other transactions.
const CONFLICTS_MAX: u32 = 12;

/// Delay until the redelivery of a duplicate whose original is still being handled.
const DUPLICATE_WAIT: Duration = Duration::from_millis(500);

/// The parts that all deliveries of one deployment share.
#[derive(Clone)]
pub struct Delivery {
    pub store: Arc<dyn Store>,
    pub guest: Guest,
    pub worker: Arc<Worker>,
    pub version: u32,
    /// Largest payload that the broker accepts, in bytes.
    pub payload_max: usize,
    pub metrics: Arc<Metrics>,
    pub cache: Cache,
    pub connection_breaks: ConnectionBreaks,
    pub health: Arc<Health>,
}

/// The outcome of a batch.
#[derive(Debug)]
pub struct BatchResult {
    /// One verdict for each message, in their order.
    pub verdicts: Vec<Verdict>,
    /// Committed outputs to publish now, in order.
    pub outputs: Vec<OutboxRow>,
    /// A time before the first of their leases began.
    pub leased_at: Instant,
    /// Number of reruns because of other items in the batch.
    pub reruns: u32,
    /// Number of items that were rolled back to a savepoint, without a rerun of the others.
    pub savepoint_rollbacks: u32,
    /// Number of conflicts with other transactions.
    pub conflicts: u32,
}

impl Delivery {
    /// Records the outcome of a database operation in the health checks. Conflicts and guest
    /// failures are unrelated to the health of the database.
    pub fn report_health<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) => self.health.record(HealthCheck::Transactions, Ok(())),
            // A full connection pool is a load problem of this host.
            Err(error @ StoreError::Unavailable(cause))
                if !error.broke_in_statement() && !is_busy(cause) =>
            {
                self.health
                    .record(HealthCheck::Transactions, Err(format!("{cause:#}")));
            }
            Err(_) => {}
        }
    }

    /// Delivers a batch: runs the guest, commits and returns one verdict for each message.
    ///
    /// With `with_savepoints`, each item that runs SQL gets a savepoint first. It costs one round
    /// trip and saves the rerun of the other items after a failure. Without it, savepoints are set
    /// only in reruns.
    ///
    /// The future must run to completion. Dropping it interrupts a database operation.
    ///
    /// # Errors
    /// The outcome is unknown, and nothing is lost. Call it again with the same batch.
    pub async fn deliver(
        &self,
        batch: &[Arc<Message>],
        with_savepoints: bool,
    ) -> Result<BatchResult, StoreError> {
        // Split the batch into groups, one transaction each.
        let mut run = BatchRun::new(batch, &self.worker);
        run.with_savepoints = with_savepoints;
        let mut groups = self.group_items(&run, run.distinct_items());

        // Run the groups until each item has a verdict or a failure.
        while let Some(group) = groups.pop_front() {
            let group = run.runnable_items(group);
            let outcome = match self.run_group(&mut run, &group).await {
                Err(error) if error.broke_in_statement() => {
                    self.handle_connection_break(&mut run, &group, error)?
                }
                attempted => attempted?,
            };
            run.reruns += u32::from(!matches!(outcome, TxOutcome::Committed));
            match outcome {
                TxOutcome::Committed => {}
                TxOutcome::Rerun => {
                    fault::point(fault::BEFORE_RERUN);
                    run.with_savepoints = true;
                    groups.push_front(group);
                }
                TxOutcome::Conflict(cause) => {
                    self.metrics.conflict(&self.worker.name);
                    run.conflicts += 1;
                    if run.conflicts > CONFLICTS_MAX {
                        return Err(StoreError::Conflict(cause));
                    }
                    pause_after(run.conflicts).await;
                    split(group, &mut groups);
                }
                TxOutcome::Split => split(group, &mut groups),
                TxOutcome::RunIndividually => {
                    for item in group.into_iter().rev() {
                        groups.push_front(vec![item]);
                    }
                }
            }
        }

        // Count the failed attempts and clean up.
        self.judge_failures(&mut run).await?;
        self.connection_breaks
            .remove(batch.iter().map(|message| message.event_id.as_str()));
        self.forget_records(&run).await;
        self.metrics.batch(&self.worker.name, run.reruns);
        Ok(run.finish(&self.worker.name, self.version))
    }

    /// Runs one group in one transaction.
    async fn run_group(
        &self,
        run: &mut BatchRun<'_>,
        group: &[usize],
    ) -> Result<TxOutcome, StoreError> {
        if group.is_empty() {
            return Ok(TxOutcome::Committed);
        }

        // Claim the items.
        let read_version = self.cache.read_version(&self.worker.name);
        let mut tx = self
            .store
            .begin(&self.worker.name, self.worker.limits.time)
            .await?;
        fault::point(fault::AFTER_BEGIN);
        let claimed = match tx.claim(&run.claims(group)).await {
            Ok(claimed) => claimed,
            Err(error) => return roll_back_after(error, tx).await,
        };
        fault::point(fault::AFTER_CLAIM);
        if fault::mutant(fault::INBOX_IN_OWN_TX) {
            tx.commit().await?;
            tx = self
                .store
                .begin(&self.worker.name, self.worker.limits.time)
                .await?;
        }
        let fresh = run.sort_claimed(group, claimed);
        if fresh.is_empty() {
            tx.rollback().await;
            return Ok(TxOutcome::Committed);
        }

        // Run the guest.
        let state = match self.prefetch(run, &fresh, tx.as_mut()).await {
            Ok(state) => state,
            Err(error) => return roll_back_after(error, tx).await,
        };
        let shared_tx = SharedTx::new(self.store.dialect(), tx);
        let group_run = self.run_items(run, &fresh, &shared_tx, state).await;
        let tx = shared_tx.take_tx().await?;

        // Commit, or decide how to run the group again.
        if let Ok(GroupRun::Completed(completed)) = group_run {
            return self
                .commit_group(run, tx, group, *completed, read_version)
                .await;
        }
        tx.rollback().await;
        match group_run {
            Ok(GroupRun::Completed(_)) => Ok(TxOutcome::Committed),
            Ok(GroupRun::RerunOthers(failed)) => {
                run.failed.extend(failed);
                Ok(TxOutcome::Rerun)
            }
            Ok(GroupRun::Conflict(why)) => Ok(TxOutcome::Conflict(anyhow::anyhow!(why))),
            Ok(GroupRun::UnknownItemFailed) => Ok(TxOutcome::Split),
            Err(error) => Err(store_error(error)),
        }
    }

    /// Prefetches the state that the items are likely to need, with one statement.
    async fn prefetch(
        &self,
        run: &BatchRun<'_>,
        fresh: &[(usize, u32)],
        tx: &mut dyn Tx,
    ) -> Result<BatchState, StoreError> {
        let mut state = BatchState::default();
        let messages = fresh.iter().filter_map(|(item, _)| run.batch.get(*item));
        let keys = messages.flat_map(|message| {
            self.worker
                .state_keys
                .iter()
                .filter_map(|key| key.key_for(message))
        });
        let keys: Vec<String> = keys.collect::<BTreeSet<_>>().into_iter().collect();
        if keys.is_empty() {
            return Ok(state);
        }
        let found: Vec<(String, StateSlot)> = tx.load_state(&keys).await?;
        for (key, slot) in found {
            state.record_read(key, slot);
        }
        Ok(state)
    }

    /// Writes the effects of the items and commits. The verdicts are set only after the commit is
    /// confirmed.
    async fn commit_group(
        &self,
        run: &mut BatchRun<'_>,
        mut tx: Box<dyn Tx>,
        group: &[usize],
        mut completed: CompletedRun,
        read_version: ReadVersion,
    ) -> Result<TxOutcome, StoreError> {
        fault::point(fault::AFTER_GUEST);
        if completed.succeeded.is_empty() {
            tx.rollback().await;
            run.record_failures(completed);
            return Ok(TxOutcome::Committed);
        }

        // Collect the effects.
        let leased_at = Instant::now();
        let dropped = run.dropped_event_ids(&completed);
        let writes = completed.state.writes();
        let first = completed
            .succeeded
            .first()
            .and_then(|item| run.event_id(*item));
        let invalidation = self.invalidation_output(first.as_deref(), &completed.cache)?;
        let id = invalidation
            .as_ref()
            .map(|invalidation| invalidation.id.clone());
        completed.outputs.extend(invalidation);

        // Write them.
        let written = async {
            if !dropped.is_empty() && !fault::mutant(fault::SKIP_RELEASE) {
                tx.release_claims(&dropped).await?;
            }
            if !writes.is_empty() {
                tx.save_state(&writes).await?;
            }
            tx.append_outputs(&completed.outputs, HAND_OVER_LEASE).await
        };
        let rows = match written.await {
            Ok(rows) => rows,
            Err(error) => {
                tx.rollback().await;
                return run.handle_commit_error(error, group, &completed);
            }
        };

        // Commit.
        fault::point(fault::BEFORE_COMMIT);
        match tx.commit().await {
            Ok(settled) => {
                fault::point(fault::AFTER_COMMIT);
                self.cache
                    .commit(
                        &self.worker.name,
                        &completed.cache,
                        read_version,
                        id.as_deref(),
                    )
                    .await;
                for item in &completed.succeeded {
                    run.set_verdict(*item, Verdict::Done(settled));
                }
                run.leased_at = run.leased_at.or(Some(leased_at));
                run.outputs.extend(rows);
                run.record_failures(completed);
                Ok(TxOutcome::Committed)
            }
            Err(error) => {
                if matches!(error, StoreError::Unavailable(_)) {
                    self.metrics.commit_unclear(&self.worker.name);
                    self.invalidate_after_unclear_commit(&completed.cache).await;
                }
                run.handle_commit_error(error, group, &completed)
            }
        }
    }

    /// The message that announces the invalidated tags of a transaction to other hosts. `None` if
    /// there are no tags.
    fn invalidation_output(
        &self,
        event_id: Option<&str>,
        cache: &CacheWrites,
    ) -> Result<Option<Output>, StoreError> {
        let Some(event_id) = event_id.filter(|_| !cache.tags().is_empty()) else {
            return Ok(None);
        };
        let invalidation =
            Invalidation::new(&self.worker.name, cache.tags().clone(), Timestamp::now());
        let output = invalidation
            .output(event_id, self.payload_max)
            .context("encode the cache invalidation");
        output.map(Some).map_err(StoreError::Unavailable)
    }

    /// Updates the cache after a commit with an unknown outcome. No value is put, and all possibly
    /// outdated values are invalidated here and in Redis. If the transaction was committed, its
    /// invalidation message follows.
    async fn invalidate_after_unclear_commit(&self, cache: &CacheWrites) {
        self.cache
            .invalidate(&self.worker.name, cache.tags().iter().cloned())
            .await;
    }

    /// Counts the failed attempts and sets the verdicts of their messages.
    async fn judge_failures(&self, run: &mut BatchRun<'_>) -> Result<(), StoreError> {
        let failed = std::mem::take(&mut run.failed);
        if failed.is_empty() {
            return Ok(());
        }
        let mut records: Vec<FailedAttempt> = failed
            .iter()
            .map(|failed| FailedAttempt {
                event_id: run.event_id(failed.item).unwrap_or_default(),
                version: self.version,
                code: failed.failure.code.clone(),
                error: failed.failure.message.clone(),
                logs: failed.logs.clone(),
                recording: failed.record.clone(),
            })
            .collect();
        if fault::mutant(fault::CHARGE_WHOLE_BATCH)
            && let Some(first) = records.first().cloned()
        {
            let charge = |item: &Arc<Message>| FailedAttempt {
                event_id: item.event_id.clone(),
                ..first.clone()
            };
            records.extend(run.batch.iter().map(charge));
        }
        let counted = self
            .store
            .count_attempts(&self.worker.name, &records)
            .await?;
        fault::point(fault::AFTER_COUNT);
        failed.iter().for_each(|failed| {
            self.metrics
                .attempt_failed(&self.worker.name, failed.failure.code.as_deref());
        });
        for (failed, counted) in failed.into_iter().zip(counted) {
            let (logs, code) = (failed.logs.trim_end(), failed.failure.code.as_deref());
            tracing::warn!(
                worker = self.worker.name,
                event_id = run.event_id(failed.item),
                attempt = counted.attempt,
                code,
                logs = (!logs.is_empty()).then_some(logs),
                error = failed.failure.message,
                "attempt failed"
            );
            let verdict = self.judge(run, failed.item, failed.failure, counted);
            run.set_verdict(failed.item, verdict);
        }
        Ok(())
    }

    /// Deletes the records of events that failed before and took effect now. Records that remain
    /// after an error are deleted together with their attempts.
    async fn forget_records(&self, run: &BatchRun<'_>) {
        let took_effect =
            |item: &&usize| matches!(run.verdicts.get(**item), Some(Some(Verdict::Done(_))));
        let items = run.failed_before.iter().filter(took_effect);
        let event_ids: Vec<String> = items.filter_map(|item| run.event_id(*item)).collect();
        if event_ids.is_empty() {
            return;
        }
        if let Err(error) = self
            .store
            .delete_recordings(&self.worker.name, &event_ids)
            .await
        {
            tracing::debug!(
                worker = self.worker.name,
                error = format!("{:#}", anyhow::Error::from(error)),
                "failed to delete records of attempts"
            );
        }
    }

    /// Decides between a retry and a dead letter.
    fn judge(
        &self,
        run: &BatchRun<'_>,
        item: usize,
        failure: CallFailure,
        counted: CountedAttempt,
    ) -> Verdict {
        let CountedAttempt {
            attempt,
            is_repeat: repeats,
        } = counted;
        // A redriven message has an attempt budget of its own, and its count continues.
        let before = run
            .batch
            .get(item)
            .map_or(0, |message| message.attempts_before());
        let budget_attempt = attempt.saturating_sub(before).max(1);
        let retry_after = match failure.kind {
            FailureKind::RetryAfter(after) => Some(after),
            _ => None,
        };
        let reason = match failure.kind {
            FailureKind::Reject => Reason::Rejected,
            FailureKind::OutputRefused => Reason::OutputRefused,
            _ if !self.worker.retry.allows_retry(budget_attempt) => Reason::AttemptsExhausted,
            _ if repeats
                && budget_attempt > 1
                && self.worker.retry.dead_letters_deterministic_failures() =>
            {
                Reason::DeterministicFailure
            }
            _ => {
                let after =
                    self.worker
                        .retry
                        .delay_after(budget_attempt, retry_after, rand::random());
                return Verdict::Retry { attempt, after };
            }
        };
        let Some(message) = run.batch.get(item) else {
            return Verdict::Wait {
                after: DUPLICATE_WAIT,
            };
        };
        Verdict::Dead(Box::new(DeadLetter {
            worker: self.worker.name.clone(),
            version: self.version,
            reason,
            code: failure.code,
            detail: failure.message,
            frames: failure.frames,
            attempts: attempt,
            message: Message::clone(message),
        }))
    }
}

/// The outcome of one transaction.
enum TxOutcome {
    /// All items of the group have a verdict or a counted failure.
    Committed,
    /// Some items failed and spoiled the transaction. The others have to run again.
    Rerun,
    /// A conflict with another transaction. Run again in smaller groups.
    Conflict(anyhow::Error),
    /// An unknown item of the group failed. Run again in halves.
    Split,
    /// The database refused the group as a whole. Run each item alone.
    RunIndividually,
}

/// The progress of one batch towards its verdicts.
struct BatchRun<'b> {
    batch: &'b [Arc<Message>],
    /// In-batch duplicates: by item, the item with the same event id that is handled for both.
    duplicates: HashMap<usize, usize>,
    /// By item, the ordering key whose later messages wait after a failure.
    keys: Vec<Option<String>>,
    verdicts: Vec<Option<Verdict>>,
    failed: Vec<FailedItem>,
    /// Items that had failed attempts when they were claimed.
    failed_before: BTreeSet<usize>,
    outputs: Vec<OutboxRow>,
    leased_at: Option<Instant>,
    reruns: u32,
    savepoint_rollbacks: u32,
    conflicts: u32,
    /// Whether items that run SQL get a savepoint.
    with_savepoints: bool,
}

impl<'b> BatchRun<'b> {
    fn new(batch: &'b [Arc<Message>], worker: &Worker) -> Self {
        let mut first = HashMap::new();
        let mut duplicates = HashMap::new();
        // A redriven message precedes its copies. It may be claimed although its event is dead, and
        // its body may be a corrected one.
        let redriven_first =
            (0..batch.len()).partition::<Vec<_>, _>(|item| is_redriven(batch, *item));
        for item in redriven_first.0.into_iter().chain(redriven_first.1) {
            let Some(message) = batch.get(item) else {
                continue;
            };
            let earlier = *first.entry(message.event_id.as_str()).or_insert(item);
            if earlier != item {
                duplicates.insert(item, earlier);
            }
        }
        let verdicts = batch.iter().map(|_| None).collect();
        let keys = batch
            .iter()
            .map(|message| worker.held_key(message))
            .collect();
        let (failed, failed_before, outputs) = (Vec::new(), BTreeSet::new(), Vec::new());
        BatchRun {
            batch,
            duplicates,
            keys,
            verdicts,
            failed,
            failed_before,
            outputs,
            leased_at: None,
            reruns: 0,
            savepoint_rollbacks: 0,
            conflicts: 0,
            with_savepoints: false,
        }
    }

    /// The items without in-batch duplicates.
    fn distinct_items(&self) -> Vec<usize> {
        (0..self.batch.len())
            .filter(|item| !self.duplicates.contains_key(item))
            .collect()
    }

    fn event_id(&self, item: usize) -> Option<String> {
        self.batch.get(item).map(|message| message.event_id.clone())
    }

    fn set_verdict(&mut self, item: usize, verdict: Verdict) {
        if let Some(slot) = self.verdicts.get_mut(item) {
            *slot = Some(verdict);
        }
    }

    /// Removes failed items from a group, and those that wait for a failed one.
    fn runnable_items(&mut self, group: Vec<usize>) -> Vec<usize> {
        let (blocked, group): (Vec<usize>, Vec<usize>) = group
            .into_iter()
            .partition(|item| self.is_blocked(*item, &[]));
        for item in blocked {
            self.set_verdict(item, Verdict::Blocked);
        }
        group
            .into_iter()
            .filter(|item| self.failed.iter().all(|failed| failed.item != *item))
            .collect()
    }

    /// Whether an earlier item of the same key failed, in an earlier transaction or in this one
    /// (`just_now`).
    fn is_blocked(&self, item: usize, just_now: &[FailedItem]) -> bool {
        let key_of = |item: usize| self.keys.get(item).and_then(Option::as_ref);
        let Some(key) = key_of(item) else {
            return false;
        };
        self.failed
            .iter()
            .chain(just_now)
            .any(|failed| failed.item < item && key_of(failed.item) == Some(key))
    }

    /// Keeps the failed items for [`Delivery::judge_failures`], and sets the verdicts of the items
    /// that wait for them.
    fn record_failures(&mut self, completed: CompletedRun) {
        self.savepoint_rollbacks += completed.savepoint_rollbacks;
        self.failed.extend(completed.failed);
        for item in completed.blocked {
            self.set_verdict(item, Verdict::Blocked);
        }
    }

    /// Event ids that were claimed and take no effect.
    fn dropped_event_ids(&self, completed: &CompletedRun) -> Vec<String> {
        let items = completed
            .failed
            .iter()
            .map(|failed| failed.item)
            .chain(completed.blocked.iter().copied());
        items.filter_map(|item| self.event_id(item)).collect()
    }

    /// The claims of a group.
    fn claims(&self, group: &[usize]) -> Vec<Claim> {
        let claim = |message: &Arc<Message>| Claim {
            event_id: message.event_id.clone(),
            payload_sha256: message.payload_sha256(),
            origin: message
                .origin
                .as_ref()
                .map(|origin| (origin.stream.clone(), origin.sequence)),
            redriven: message.redriven.is_some(),
        };
        group
            .iter()
            .filter_map(|item| self.batch.get(*item))
            .map(claim)
            .collect()
    }

    /// Sets the verdicts of items that were settled before. Returns the other items with their
    /// failed attempts so far.
    fn sort_claimed(&mut self, group: &[usize], claimed: Vec<Claimed>) -> Vec<(usize, u32)> {
        let mut fresh = Vec::new();
        for (&item, claimed) in group.iter().zip(claimed) {
            match claimed {
                _ if fault::mutant(fault::SKIP_CLAIM) => fresh.push((item, 0)),
                _ if self.is_distrusted(item) => {
                    if let Claimed::Settled(_) = claimed {
                        fault::witness(fault::MUTANT_ACTED);
                    }
                    fresh.push((item, 0));
                }
                Claimed::Fresh { attempts } => {
                    if attempts > 0 {
                        self.failed_before.insert(item);
                    }
                    fresh.push((item, attempts));
                }
                Claimed::Settled(settled) => self.set_verdict(item, Verdict::Duplicate(settled)),
                Claimed::OtherPayload => self.mark_id_reuse(item),
            }
        }
        fresh
    }

    fn is_distrusted(&self, item: usize) -> bool {
        self.batch
            .get(item)
            .is_some_and(|message| fault::ignores_inbox(&message.event_id))
    }

    /// Flags an item whose event id was used before. `finish` writes its dead letter.
    fn mark_id_reuse(&mut self, item: usize) {
        self.duplicates.insert(item, item);
    }

    /// Handles a failed commit of a group.
    ///
    /// # Errors
    /// The outcome of the commit is unknown.
    fn handle_commit_error(
        &mut self,
        error: StoreError,
        group: &[usize],
        completed: &CompletedRun,
    ) -> Result<TxOutcome, StoreError> {
        match error {
            StoreError::Conflict(cause) => Ok(TxOutcome::Conflict(cause)),
            StoreError::Refused(_) if fault::mutant(fault::RESOLVE_BY_SELECT) => {
                group
                    .iter()
                    .filter_map(|item| self.event_id(*item))
                    .for_each(|id| fault::ignore_inbox(&id));
                Ok(TxOutcome::Rerun)
            }
            // One item of the group is the cause. Alone, each item fails for itself only.
            StoreError::Refused(_) if group.len() > 1 => Ok(TxOutcome::RunIndividually),
            StoreError::Refused(cause) => {
                let why = format!("{cause:#}");
                let failure =
                    || CallFailure::new(FailureKind::Retry, "commit-refused", why.as_str());
                let failed = |item: &usize| FailedItem {
                    item: *item,
                    failure: failure(),
                    logs: String::new(),
                    record: None,
                };
                self.failed.extend(completed.succeeded.iter().map(failed));
                Ok(TxOutcome::Committed)
            }
            error => Err(error),
        }
    }

    /// Sets the verdicts of in-batch duplicates and returns the result.
    fn finish(mut self, worker: &str, version: u32) -> BatchResult {
        for item in 0..self.batch.len() {
            if let Some(&first) = self.duplicates.get(&item) {
                let verdict = self.duplicate_verdict(item, first, worker, version);
                self.set_verdict(item, verdict);
            }
        }
        let unknown = || Verdict::Wait {
            after: DUPLICATE_WAIT,
        };
        BatchResult {
            verdicts: self
                .verdicts
                .into_iter()
                .map(|verdict| verdict.unwrap_or_else(unknown))
                .collect(),
            outputs: self.outputs,
            leased_at: self.leased_at.unwrap_or_else(Instant::now),
            reruns: self.reruns,
            savepoint_rollbacks: self.savepoint_rollbacks,
            conflicts: self.conflicts,
        }
    }

    /// The verdict of a message whose event id belongs to another message.
    fn duplicate_verdict(&self, item: usize, first: usize, worker: &str, version: u32) -> Verdict {
        let Some(message) = self.batch.get(item) else {
            return Verdict::Wait {
                after: DUPLICATE_WAIT,
            };
        };
        let same = first != item
            && self
                .batch
                .get(first)
                .is_some_and(|first| first.payload_sha256() == message.payload_sha256());
        if !same {
            return Verdict::Dead(Box::new(DeadLetter {
                worker: worker.to_owned(),
                version,
                reason: Reason::IdReuse,
                code: None,
                detail: format!(
                    "the event id `{}` was already used for a message with another subject or body",
                    message.event_id
                ),
                frames: Vec::new(),
                attempts: 0,
                message: Message::clone(message),
            }));
        }
        match self.verdicts.get(first).and_then(Option::as_ref) {
            Some(Verdict::Done(settled) | Verdict::Duplicate(settled)) => {
                Verdict::Duplicate(*settled)
            }
            Some(Verdict::Retry { after, .. }) => Verdict::Wait { after: *after },
            _ => Verdict::Wait {
                after: DUPLICATE_WAIT,
            },
        }
    }
}

fn is_redriven(batch: &[Arc<Message>], item: usize) -> bool {
    batch
        .get(item)
        .is_some_and(|message| message.redriven.is_some())
}

/// Splits a group in halves, which run next.
fn split(mut group: Vec<usize>, groups: &mut VecDeque<Vec<usize>>) {
    let later = group.split_off(group.len().div_ceil(2));
    if !later.is_empty() {
        groups.push_front(later);
    }
    groups.push_front(group);
}

/// Rolls back. A conflict leads to another try, every other error is returned.
async fn roll_back_after(error: StoreError, tx: Box<dyn Tx>) -> Result<TxOutcome, StoreError> {
    tx.rollback().await;
    match error {
        StoreError::Conflict(cause) => Ok(TxOutcome::Conflict(cause)),
        other => Err(other),
    }
}

/// Recovers the error of the store from the error of a guest call.
fn store_error(error: anyhow::Error) -> StoreError {
    error
        .downcast::<StoreError>()
        .unwrap_or_else(StoreError::Unavailable)
}

/// Logs each output line of a guest.
fn log_guest_output(worker: &str, event_id: &str, logs: &str) {
    for line in logs.lines() {
        tracing::info!(worker, event_id, line, "guest output");
    }
}
