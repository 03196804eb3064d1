//! The heart: a batch of messages becomes one transaction and a verdict for each message.
//!
//! A guest has no effect outside the transaction, so a batch may be run speculatively: what fails is taken out and the
//! others run again, or go on, as if it had never been there. A failing item never costs its neighbours an attempt.

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

/// For how long committed outputs belong to the relay of the host that committed them.
pub const HAND_OVER_LEASE: Duration = Duration::from_secs(30);

/// How often a batch is run again at once because another transaction stood in its way.
const CONFLICTS_MAX: u32 = 12;

/// When a copy of a message that is just being handled is to be looked at again.
const DUPLICATE_WAIT: Duration = Duration::from_millis(500);

/// What deliveries of one deployment share.
#[derive(Clone)]
pub struct Delivery {
    pub store: Arc<dyn Store>,
    pub guest: Guest,
    pub worker: Arc<Worker>,
    pub version: u32,
    /// The largest payload the broker takes, in bytes.
    pub payload_max: usize,
    pub metrics: Arc<Metrics>,
    pub cache: Cache,
    pub connection_breaks: ConnectionBreaks,
    pub health: Arc<Health>,
}

/// What a batch came to.
#[derive(Debug)]
pub struct BatchResult {
    /// One verdict for each message, in their order.
    pub verdicts: Vec<Verdict>,
    /// Committed outputs that are to be published now, in order.
    pub outputs: Vec<OutboxRow>,
    /// Not later than the first of their leases started.
    pub leased_at: Instant,
    /// How often messages had to be run again because of others in the batch.
    pub reruns: u32,
    /// How many items were taken back to a savepoint, so that nobody had to run again.
    pub savepoint_rollbacks: u32,
    /// How often another transaction stood in the way.
    pub conflicts: u32,
}

impl Delivery {
    /// Takes note of how an operation of the database went. A conflict, or what a guest did, says nothing of the database.
    pub fn report_health<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) => self.health.record(HealthCheck::Transactions, Ok(())),
            // A pool that is full is the host's own matter.
            Err(error @ StoreError::Unavailable(cause))
                if !error.broke_in_statement() && !is_busy(cause) =>
            {
                self.health
                    .record(HealthCheck::Transactions, Err(format!("{cause:#}")));
            }
            Err(_) => {}
        }
    }

    /// Delivers a batch. One `with_savepoints` makes a savepoint before each item that runs SQL, which costs a round trip, so
    /// that one that fails costs its neighbours nothing; others get savepoints when they have to. An error means that nothing is known and nothing is lost: call it again with the same batch.
    /// The future must run to its end; drop it, and a database operation is left half-way.
    pub async fn deliver(
        &self,
        batch: &[Arc<Message>],
        with_savepoints: bool,
    ) -> Result<BatchResult, StoreError> {
        let mut run = BatchRun::new(batch, &self.worker);
        run.with_savepoints = with_savepoints;
        let mut groups = self.group_items(&run, run.distinct_items());
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
        let state = match self.prefetch(run, &fresh, tx.as_mut()).await {
            Ok(state) => state,
            Err(error) => return roll_back_after(error, tx).await,
        };
        let shared_tx = SharedTx::new(self.store.dialect(), tx);
        let group_run = self.run_items(run, &fresh, &shared_tx, state).await;
        let tx = shared_tx.take_tx().await?;
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

    /// Reads the state that the items are likely to need, with one statement.
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

    /// Writes what the items left, commits, and only then believes it.
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

    /// The message that tells other hosts what the transaction that handles an event invalidates, if it does.
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
            .context("write what is to be forgotten");
        output.map(Some).map_err(StoreError::Unavailable)
    }

    /// What is to be done to the cache when nobody says what became of a commit: nothing is put, and what it may have made old is
    /// forgotten here and in Redis. If it was a commit, its message follows.
    async fn invalidate_after_unclear_commit(&self, cache: &CacheWrites) {
        self.cache
            .invalidate(&self.worker.name, cache.tags().iter().cloned())
            .await;
    }

    /// Counts the failed attempts and decides what becomes of each message.
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
                "attempt failed: {}",
                failed.failure.message
            );
            let verdict = self.judge(run, failed.item, failed.failure, counted);
            run.set_verdict(failed.item, verdict);
        }
        Ok(())
    }

    /// Forgets what is on record of events that failed before and took effect now. If it cannot, that goes with their attempts.
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
                "records of attempts not removed: {:#}",
                anyhow::Error::from(error)
            );
        }
    }

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
        // What was put back has a budget of its own, and goes on counting.
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

/// What one transaction came to.
enum TxOutcome {
    /// All items of the group have a verdict or a counted failure.
    Committed,
    /// Some failed in a way that took the transaction with them: the others are to run again.
    Rerun,
    /// Another transaction stood in the way: run again, in smaller groups.
    Conflict(anyhow::Error),
    /// Somebody in the group failed, and nobody knows who: run again in halves.
    Split,
    /// The database refused the group as a whole: run each item alone.
    RunIndividually,
}

/// One batch on its way to its verdicts.
struct BatchRun<'b> {
    batch: &'b [Arc<Message>],
    /// Which other item with the same event id stands for it.
    duplicates: HashMap<usize, usize>,
    /// For each item the key whose later messages wait when it fails.
    keys: Vec<Option<String>>,
    verdicts: Vec<Option<Verdict>>,
    failed: Vec<FailedItem>,
    /// Those that had failed attempts when they were claimed.
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
        // What was put back goes before its copies: it may be claimed although it is dead, and its body may be a corrected one.
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

    /// The group without items that failed, and without those that wait for one that did.
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

    /// Whether an earlier item of the same key failed: in a transaction before, or just now.
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

    /// Keeps for later who failed, and says who waits for them.
    fn record_failures(&mut self, completed: CompletedRun) {
        self.savepoint_rollbacks += completed.savepoint_rollbacks;
        self.failed.extend(completed.failed);
        for item in completed.blocked {
            self.set_verdict(item, Verdict::Blocked);
        }
    }

    /// The items that were claimed and take no effect.
    fn dropped_event_ids(&self, completed: &CompletedRun) -> Vec<String> {
        let items = completed
            .failed
            .iter()
            .map(|failed| failed.item)
            .chain(completed.blocked.iter().copied());
        items.filter_map(|item| self.event_id(item)).collect()
    }

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

    /// Gives a verdict to what was settled before; returns the others with their failed attempts so far.
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

    /// For now only marks the item; `finish` writes the letter.
    fn mark_id_reuse(&mut self, item: usize) {
        self.duplicates.insert(item, item);
    }

    /// What follows when the transaction of a group could not be committed.
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
            // Somebody in the group is to blame; alone, everybody answers for himself.
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

    /// The verdict of a message whose event id another one holds.
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
                    "the event id `{}` was used before for a message with another subject or body",
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

/// Splits a group in halves, which come next.
fn split(mut group: Vec<usize>, groups: &mut VecDeque<Vec<usize>>) {
    let later = group.split_off(group.len().div_ceil(2));
    if !later.is_empty() {
        groups.push_front(later);
    }
    groups.push_front(group);
}

/// Rolls back, and turns a conflict into another round.
async fn roll_back_after(error: StoreError, tx: Box<dyn Tx>) -> Result<TxOutcome, StoreError> {
    tx.rollback().await;
    match error {
        StoreError::Conflict(cause) => Ok(TxOutcome::Conflict(cause)),
        other => Err(other),
    }
}

/// The store's own error, out of a guest call that it ended.
fn store_error(error: anyhow::Error) -> StoreError {
    error
        .downcast::<StoreError>()
        .unwrap_or_else(StoreError::Unavailable)
}

fn log_guest_output(worker: &str, event_id: &str, logs: &str) {
    for line in logs.lines() {
        tracing::info!(worker, event_id, "{line}");
    }
}
