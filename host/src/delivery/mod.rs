//! The heart: a batch of messages becomes one transaction and a verdict for each message.
//!
//! A guest has no effect outside the transaction, so a batch may be run speculatively: what fails is taken out and the
//! others run again, or go on, as if it had never been there. A failing member never costs its neighbours an attempt.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;

use crate::cache::{Began, Cache};
use crate::config::manifest::Worker;
use crate::fault;
use crate::guest::{CallFailure, FailureKind, Guest};
use crate::metrics::Metrics;
use crate::metrics::health::{Health, Part};
use crate::model::cache_writes::CacheWrites;
use crate::model::invalidation::Invalidation;
use crate::model::keyed_state::{BatchState, StateSlot};
use crate::model::message::{Message, Output};
use crate::model::verdict::{Letter, Reason, Verdict};
use crate::store::conflict::pause_after;
use crate::store::{Claim, Claimed, CountedAttempt, FailedAttempt, OutboxRow, Store, StoreError, Tx, is_busy};

mod batch;
mod breaks;
mod dry_run;
pub mod request;
mod shared_tx;

use batch::{Failed, Members, Ran};
pub use breaks::Breaks;
pub use dry_run::Rehearsal;
use shared_tx::Lent;

/// For how long committed outputs belong to the relay of the host that committed them.
pub const HAND_OVER_LEASE: Duration = Duration::from_secs(30);

/// How often a batch is run again at once because another transaction stood in its way.
const CONFLICTS_MAX: u32 = 12;

/// When a copy of a message that is just being handled is to be looked at again.
const TWIN_WAIT: Duration = Duration::from_millis(500);

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
    pub breaks: Breaks,
    pub health: Arc<Health>,
}

/// What a batch came to.
#[derive(Debug)]
pub struct Delivered {
    /// One verdict for each message, in their order.
    pub verdicts: Vec<Verdict>,
    /// Committed outputs that are to be published now, in order.
    pub outputs: Vec<OutboxRow>,
    /// Not later than the first of their leases began.
    pub leased_at: Instant,
    /// How often messages had to be run again because of others in the batch.
    pub reruns: u32,
    /// How many members were taken back to a savepoint, so that nobody had to run again.
    pub undone: u32,
    /// How often another transaction stood in the way.
    pub conflicts: u32,
}

impl Delivery {
    /// Takes note of how an operation of the database went. A conflict, or what a guest did, says nothing of the database.
    pub fn note<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) => self.health.note(Part::Transactions, Ok(())),
            // A pool that is full is the host's own matter.
            Err(error @ StoreError::Unavailable(cause)) if !error.broke_in_statement() && !is_busy(cause) => {
                self.health.note(Part::Transactions, Err(format!("{cause:#}")));
            }
            Err(_) => {}
        }
    }

    /// Delivers a batch. A `careful` one makes a savepoint before each member that runs SQL, which costs a round trip, so
    /// that one that fails costs its neighbours nothing; others become careful when they have to. An error means that nothing is known and nothing is lost: call it again with the same batch.
    /// The future must run to its end; drop it, and a database operation is left half-way.
    pub async fn deliver(&self, batch: &[Arc<Message>], careful: bool) -> Result<Delivered, StoreError> {
        let mut run = Run::new(batch, &self.worker);
        run.careful = careful;
        let mut groups = self.groups_of(&run, run.first_of_each_id());
        while let Some(group) = groups.pop_front() {
            let group = run.without_those_out(group);
            let round = match self.attempt(&mut run, &group).await {
                Err(error) if error.broke_in_statement() => self.broken(&mut run, &group, error)?,
                attempted => attempted?,
            };
            run.reruns += u32::from(!matches!(round, Round::Committed));
            match round {
                Round::Committed => {}
                Round::Again => {
                    fault::point(fault::BEFORE_RERUN);
                    run.careful = true;
                    groups.push_front(group);
                }
                Round::Conflict(cause) => {
                    self.metrics.conflict(&self.worker.name);
                    run.conflicts += 1;
                    if run.conflicts > CONFLICTS_MAX {
                        return Err(StoreError::Conflict(cause));
                    }
                    pause_after(run.conflicts).await;
                    split(group, &mut groups);
                }
                Round::Halves => split(group, &mut groups),
                Round::Singly => {
                    for member in group.into_iter().rev() {
                        groups.push_front(vec![member]);
                    }
                }
            }
        }
        self.judge_failures(&mut run).await?;
        self.breaks.forget(batch.iter().map(|message| message.event_id.as_str()));
        self.forget_records(&run).await;
        self.metrics.batch(&self.worker.name, run.reruns);
        Ok(run.finish(&self.worker.name, self.version))
    }

    /// Runs one group in one transaction.
    async fn attempt(&self, run: &mut Run<'_>, group: &[usize]) -> Result<Round, StoreError> {
        if group.is_empty() {
            return Ok(Round::Committed);
        }
        let began = self.cache.begin(&self.worker.name);
        let mut tx = self.store.begin(&self.worker.name, self.worker.limits.time).await?;
        fault::point(fault::AFTER_BEGIN);
        let claimed = match tx.claim(&run.claims(group)).await {
            Ok(claimed) => claimed,
            Err(error) => return conflict_or(error, tx).await,
        };
        fault::point(fault::AFTER_CLAIM);
        if fault::mutant(fault::INBOX_IN_ITS_OWN_TX) {
            tx.commit().await?;
            tx = self.store.begin(&self.worker.name, self.worker.limits.time).await?;
        }
        let fresh = run.sort_claimed(group, claimed);
        if fresh.is_empty() {
            tx.rollback().await;
            return Ok(Round::Committed);
        }
        let state = match self.prefetch(run, &fresh, tx.as_mut()).await {
            Ok(state) => state,
            Err(error) => return conflict_or(error, tx).await,
        };
        let lent = Lent::new(self.store.dialect(), tx);
        let came_to = self.run_members(run, &fresh, &lent, state).await;
        let tx = lent.take_back().await?;
        if let Ok(Members::Ran(ran)) = came_to {
            return self.conclude(run, tx, group, *ran, began).await;
        }
        tx.rollback().await;
        match came_to {
            Ok(Members::Ran(_)) => Ok(Round::Committed),
            Ok(Members::Spoiled(failed)) => {
                run.failed.extend(failed);
                Ok(Round::Again)
            }
            Ok(Members::Conflict(why)) => Ok(Round::Conflict(anyhow::anyhow!(why))),
            Ok(Members::SomebodyFailed) => Ok(Round::Halves),
            Err(error) => Err(house_error(error)),
        }
    }

    /// Reads the state that the members are likely to need, with one statement.
    async fn prefetch(&self, run: &Run<'_>, fresh: &[(usize, u32)], tx: &mut dyn Tx) -> Result<BatchState, StoreError> {
        let mut state = BatchState::default();
        let messages = fresh.iter().filter_map(|(member, _)| run.batch.get(*member));
        let keys = messages.flat_map(|message| self.worker.state_keys.iter().filter_map(|key| key.key_for(message)));
        let keys: Vec<String> = keys.collect::<BTreeSet<_>>().into_iter().collect();
        if keys.is_empty() {
            return Ok(state);
        }
        let found: Vec<(String, StateSlot)> = tx.load_state(&keys).await?;
        for (key, slot) in found {
            state.remember(key, slot);
        }
        Ok(state)
    }

    /// Writes what the members left, commits, and only then believes it.
    async fn conclude(
        &self,
        run: &mut Run<'_>,
        mut tx: Box<dyn Tx>,
        group: &[usize],
        mut ran: Ran,
        began: Began,
    ) -> Result<Round, StoreError> {
        fault::point(fault::AFTER_GUEST);
        if ran.succeeded.is_empty() {
            tx.rollback().await;
            run.set_aside(ran);
            return Ok(Round::Committed);
        }
        let leased_at = Instant::now();
        let dropped = run.event_ids_of_dropped(&ran);
        let writes = ran.state.writes();
        let first = ran.succeeded.first().and_then(|member| run.event_id(*member));
        let told = self.told(first.as_deref(), &ran.cache)?;
        let id = told.as_ref().map(|told| told.id.clone());
        ran.outputs.extend(told);
        let written = async {
            if !dropped.is_empty() && !fault::mutant(fault::SKIP_UNCLAIM) {
                tx.unclaim(&dropped).await?;
            }
            if !writes.is_empty() {
                tx.save_state(&writes).await?;
            }
            tx.append_outputs(&ran.outputs, HAND_OVER_LEASE).await
        };
        let rows = match written.await {
            Ok(rows) => rows,
            Err(error) => {
                tx.rollback().await;
                return run.refused_or(error, group, &ran);
            }
        };
        fault::point(fault::BEFORE_COMMIT);
        match tx.commit().await {
            Ok(settled) => {
                fault::point(fault::AFTER_COMMIT);
                self.cache.commit(&self.worker.name, &ran.cache, began, id.as_deref()).await;
                for member in &ran.succeeded {
                    run.verdict(*member, Verdict::Done(settled));
                }
                run.leased_at = run.leased_at.or(Some(leased_at));
                run.outputs.extend(rows);
                run.set_aside(ran);
                Ok(Round::Committed)
            }
            Err(error) => {
                if matches!(error, StoreError::Unavailable(_)) {
                    self.metrics.commit_unclear(&self.worker.name);
                    self.doubt(&ran.cache).await;
                }
                run.refused_or(error, group, &ran)
            }
        }
    }

    /// The message that tells other hosts what the transaction that handles an event invalidates, if it does.
    fn told(&self, event_id: Option<&str>, cache: &CacheWrites) -> Result<Option<Output>, StoreError> {
        let Some(event_id) = event_id.filter(|_| !cache.tags().is_empty()) else { return Ok(None) };
        let told = Invalidation::new(&self.worker.name, cache.tags().clone(), Timestamp::now());
        let output = told.output(event_id, self.payload_max).context("write what is to be forgotten");
        output.map(Some).map_err(StoreError::Unavailable)
    }

    /// What is to be done to the cache when nobody says what became of a commit: nothing is put, and what it may have made old is
    /// forgotten here and in Redis. If it was a commit, its message follows.
    async fn doubt(&self, cache: &CacheWrites) {
        self.cache.invalidate(&self.worker.name, cache.tags().iter().cloned()).await;
    }

    /// Counts the failed attempts and decides what becomes of each message.
    async fn judge_failures(&self, run: &mut Run<'_>) -> Result<(), StoreError> {
        let failed = std::mem::take(&mut run.failed);
        if failed.is_empty() {
            return Ok(());
        }
        let mut records: Vec<FailedAttempt> = failed
            .iter()
            .map(|failed| FailedAttempt {
                event_id: run.event_id(failed.member).unwrap_or_default(),
                version: self.version,
                code: failed.failure.code.clone(),
                error: failed.failure.message.clone(),
                logs: failed.logs.clone(),
                record: failed.record.clone(),
            })
            .collect();
        if fault::mutant(fault::CHARGE_WHOLE_BATCH)
            && let Some(first) = records.first().cloned()
        {
            let charge = |member: &Arc<Message>| FailedAttempt { event_id: member.event_id.clone(), ..first.clone() };
            records.extend(run.batch.iter().map(charge));
        }
        let counted = self.store.count_attempts(&self.worker.name, &records).await?;
        fault::point(fault::AFTER_COUNT);
        failed.iter().for_each(|failed| {
            self.metrics.attempt_failed(&self.worker.name, failed.failure.code.as_deref());
        });
        for (failed, counted) in failed.into_iter().zip(counted) {
            let (logs, code) = (failed.logs.trim_end(), failed.failure.code.as_deref());
            tracing::warn!(
                worker = self.worker.name,
                event_id = run.event_id(failed.member),
                attempt = counted.attempt,
                code,
                logs = (!logs.is_empty()).then_some(logs),
                "attempt failed: {}",
                failed.failure.message
            );
            let verdict = self.judge(run, failed.member, failed.failure, counted);
            run.verdict(failed.member, verdict);
        }
        Ok(())
    }

    /// Forgets what is on record of events that failed before and took effect now. If it cannot, that goes with their attempts.
    async fn forget_records(&self, run: &Run<'_>) {
        let took_effect = |member: &&usize| matches!(run.verdicts.get(**member), Some(Some(Verdict::Done(_))));
        let members = run.failed_before.iter().filter(took_effect);
        let event_ids: Vec<String> = members.filter_map(|member| run.event_id(*member)).collect();
        if event_ids.is_empty() {
            return;
        }
        if let Err(error) = self.store.forget_records(&self.worker.name, &event_ids).await {
            tracing::debug!("records of attempts not removed: {:#}", anyhow::Error::from(error));
        }
    }

    fn judge(&self, run: &Run<'_>, member: usize, failure: CallFailure, counted: CountedAttempt) -> Verdict {
        let CountedAttempt { attempt, repeats } = counted;
        // What was put back has a budget of its own, and goes on counting.
        let before = run.batch.get(member).map_or(0, |message| message.attempts_before());
        let of_budget = attempt.saturating_sub(before).max(1);
        let asked = match failure.kind {
            FailureKind::RetryAfter(after) => Some(after),
            _ => None,
        };
        let reason = match failure.kind {
            FailureKind::Reject => Reason::Rejected,
            FailureKind::OutputRefused => Reason::OutputRefused,
            _ if !self.worker.retry.allows_another(of_budget) => Reason::AttemptsExhausted,
            _ if repeats && of_budget > 1 && self.worker.retry.buries_proved_poison() => Reason::ProvedPoison,
            _ => {
                let after = self.worker.retry.after(of_budget, asked, rand::random());
                return Verdict::Retry { attempt, after };
            }
        };
        let Some(message) = run.batch.get(member) else { return Verdict::Wait { after: TWIN_WAIT } };
        Verdict::Dead(Box::new(Letter {
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
enum Round {
    /// All members of the group have a verdict or a counted failure.
    Committed,
    /// Some failed in a way that took the transaction with them: the others are to run again.
    Again,
    /// Another transaction stood in the way: run again, in smaller groups.
    Conflict(anyhow::Error),
    /// Somebody in the group failed, and nobody knows who: run again in halves.
    Halves,
    /// The database refused the group as a whole: run each member alone.
    Singly,
}

/// One batch on its way to its verdicts.
struct Run<'b> {
    batch: &'b [Arc<Message>],
    /// Which other member with the same event id stands for it.
    twins: HashMap<usize, usize>,
    /// For each member the key whose later messages wait when it fails.
    keys: Vec<Option<String>>,
    verdicts: Vec<Option<Verdict>>,
    failed: Vec<Failed>,
    /// Those that had failed attempts when they were claimed.
    failed_before: BTreeSet<usize>,
    outputs: Vec<OutboxRow>,
    leased_at: Option<Instant>,
    reruns: u32,
    undone: u32,
    conflicts: u32,
    /// Whether members that run SQL get a savepoint.
    careful: bool,
}

impl<'b> Run<'b> {
    fn new(batch: &'b [Arc<Message>], worker: &Worker) -> Self {
        let mut first = HashMap::new();
        let mut twins = HashMap::new();
        // What was put back goes before its copies: it may be claimed although it is dead, and its body may be a corrected one.
        let put_back_first = (0..batch.len()).partition::<Vec<_>, _>(|member| is_redriven(batch, *member));
        for member in put_back_first.0.into_iter().chain(put_back_first.1) {
            let Some(message) = batch.get(member) else { continue };
            let earlier = *first.entry(message.event_id.as_str()).or_insert(member);
            if earlier != member {
                twins.insert(member, earlier);
            }
        }
        let verdicts = batch.iter().map(|_| None).collect();
        let keys = batch.iter().map(|message| worker.held_key_of(message)).collect();
        let (failed, failed_before, outputs) = (Vec::new(), BTreeSet::new(), Vec::new());
        Run {
            batch,
            twins,
            keys,
            verdicts,
            failed,
            failed_before,
            outputs,
            leased_at: None,
            reruns: 0,
            undone: 0,
            conflicts: 0,
            careful: false,
        }
    }

    fn first_of_each_id(&self) -> Vec<usize> {
        (0..self.batch.len()).filter(|member| !self.twins.contains_key(member)).collect()
    }

    fn event_id(&self, member: usize) -> Option<String> {
        self.batch.get(member).map(|message| message.event_id.clone())
    }

    fn verdict(&mut self, member: usize, verdict: Verdict) {
        if let Some(slot) = self.verdicts.get_mut(member) {
            *slot = Some(verdict);
        }
    }

    /// The group without members that failed, and without those that wait for one that did.
    fn without_those_out(&mut self, group: Vec<usize>) -> Vec<usize> {
        let (behind, group): (Vec<usize>, Vec<usize>) =
            group.into_iter().partition(|member| self.is_behind(*member, &[]));
        for member in behind {
            self.verdict(member, Verdict::Behind);
        }
        group.into_iter().filter(|member| self.failed.iter().all(|failed| failed.member != *member)).collect()
    }

    /// Whether an earlier member of the same key failed: in a transaction before, or just now.
    fn is_behind(&self, member: usize, just_now: &[Failed]) -> bool {
        let key_of = |member: usize| self.keys.get(member).and_then(Option::as_ref);
        let Some(key) = key_of(member) else { return false };
        self.failed.iter().chain(just_now).any(|failed| failed.member < member && key_of(failed.member) == Some(key))
    }

    /// Keeps for later who failed, and says who waits for them.
    fn set_aside(&mut self, ran: Ran) {
        self.undone += ran.undone;
        self.failed.extend(ran.failed);
        for member in ran.behind {
            self.verdict(member, Verdict::Behind);
        }
    }

    /// The members that were claimed and take no effect.
    fn event_ids_of_dropped(&self, ran: &Ran) -> Vec<String> {
        let members = ran.failed.iter().map(|failed| failed.member).chain(ran.behind.iter().copied());
        members.filter_map(|member| self.event_id(member)).collect()
    }

    fn claims(&self, group: &[usize]) -> Vec<Claim> {
        let claim = |message: &Arc<Message>| Claim {
            event_id: message.event_id.clone(),
            payload_sha256: message.payload_sha256(),
            origin: message.origin.as_ref().map(|origin| (origin.stream.clone(), origin.sequence)),
            redriven: message.redriven.is_some(),
        };
        group.iter().filter_map(|member| self.batch.get(*member)).map(claim).collect()
    }

    /// Gives a verdict to what was settled before; returns the others with their failed attempts so far.
    fn sort_claimed(&mut self, group: &[usize], claimed: Vec<Claimed>) -> Vec<(usize, u32)> {
        let mut fresh = Vec::new();
        for (&member, claimed) in group.iter().zip(claimed) {
            match claimed {
                _ if fault::mutant(fault::SKIP_CLAIM) => fresh.push((member, 0)),
                _ if self.is_distrusted(member) => {
                    if let Claimed::Settled(_) = claimed {
                        fault::witness(fault::MUTANT_ACTED);
                    }
                    fresh.push((member, 0));
                }
                Claimed::Fresh { attempts } => {
                    if attempts > 0 {
                        self.failed_before.insert(member);
                    }
                    fresh.push((member, attempts));
                }
                Claimed::Settled(settled) => self.verdict(member, Verdict::Duplicate(settled)),
                Claimed::OtherPayload => self.id_reuse(member),
            }
        }
        fresh
    }

    fn is_distrusted(&self, member: usize) -> bool {
        self.batch.get(member).is_some_and(|message| fault::distrusts_inbox(&message.event_id))
    }

    /// For now only marks the member; `finish` writes the letter.
    fn id_reuse(&mut self, member: usize) {
        self.twins.insert(member, member);
    }

    /// What follows when the transaction of a group could not be committed.
    fn refused_or(&mut self, error: StoreError, group: &[usize], ran: &Ran) -> Result<Round, StoreError> {
        match error {
            StoreError::Conflict(cause) => Ok(Round::Conflict(cause)),
            StoreError::Refused(_) if fault::mutant(fault::RESOLVE_BY_SELECT) => {
                group.iter().filter_map(|member| self.event_id(*member)).for_each(|id| fault::distrust_inbox(&id));
                Ok(Round::Again)
            }
            // Somebody in the group is to blame; alone, everybody answers for himself.
            StoreError::Refused(_) if group.len() > 1 => Ok(Round::Singly),
            StoreError::Refused(cause) => {
                let why = format!("{cause:#}");
                let failure = || CallFailure::new(FailureKind::Retry, "commit-refused", why.as_str());
                let failed =
                    |member: &usize| Failed { member: *member, failure: failure(), logs: String::new(), record: None };
                self.failed.extend(ran.succeeded.iter().map(failed));
                Ok(Round::Committed)
            }
            error => Err(error),
        }
    }

    fn finish(mut self, worker: &str, version: u32) -> Delivered {
        for member in 0..self.batch.len() {
            if let Some(&first) = self.twins.get(&member) {
                let verdict = self.twin_verdict(member, first, worker, version);
                self.verdict(member, verdict);
            }
        }
        let unknown = || Verdict::Wait { after: TWIN_WAIT };
        Delivered {
            verdicts: self.verdicts.into_iter().map(|verdict| verdict.unwrap_or_else(unknown)).collect(),
            outputs: self.outputs,
            leased_at: self.leased_at.unwrap_or_else(Instant::now),
            reruns: self.reruns,
            undone: self.undone,
            conflicts: self.conflicts,
        }
    }

    /// The verdict of a message whose event id another one holds.
    fn twin_verdict(&self, member: usize, first: usize, worker: &str, version: u32) -> Verdict {
        let Some(message) = self.batch.get(member) else { return Verdict::Wait { after: TWIN_WAIT } };
        let same = first != member
            && self.batch.get(first).is_some_and(|first| first.payload_sha256() == message.payload_sha256());
        if !same {
            return Verdict::Dead(Box::new(Letter {
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
            Some(Verdict::Done(settled) | Verdict::Duplicate(settled)) => Verdict::Duplicate(*settled),
            Some(Verdict::Retry { after, .. }) => Verdict::Wait { after: *after },
            _ => Verdict::Wait { after: TWIN_WAIT },
        }
    }
}

fn is_redriven(batch: &[Arc<Message>], member: usize) -> bool {
    batch.get(member).is_some_and(|message| message.redriven.is_some())
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
async fn conflict_or(error: StoreError, tx: Box<dyn Tx>) -> Result<Round, StoreError> {
    tx.rollback().await;
    match error {
        StoreError::Conflict(cause) => Ok(Round::Conflict(cause)),
        other => Err(other),
    }
}

/// The store's own error, out of a guest call that it ended.
fn house_error(error: anyhow::Error) -> StoreError {
    error.downcast::<StoreError>().unwrap_or_else(StoreError::Unavailable)
}

fn tell(worker: &str, event_id: &str, logs: &str) {
    for line in logs.lines() {
        tracing::info!(worker, event_id, "{line}");
    }
}
