//! Running the guest for the members of one transaction: one after the other, or all of them in one call.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use super::{Delivery, Lent, Run, tell};
use crate::fault;
use crate::guest::{Call, CallFailure, FailureKind, Outcome, Warm};
use crate::manifest::Isolation;
use crate::message::{Message, Output};
use crate::state::BatchState;

/// What running the members of a group came to.
pub(super) enum Members {
    Ran(Ran),
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
    /// How many of those that failed were taken back to a savepoint.
    pub undone: u32,
}

/// One member's failed attempt.
pub(super) struct Failed {
    pub member: usize,
    pub failure: CallFailure,
    pub logs: String,
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
                lent.begin_member();
            }
            let state = std::mem::take(&mut ran.state);
            let outcome = self.call(vec![Arc::clone(message)], attempts + 1, lent, state, warm.take()).await?;
            ran.state = outcome.state;
            // An instance that failed, and what is in its memory, is of no more use.
            let is_kept = self.worker.isolation == Isolation::Batch || fault::mutant(fault::REUSE_AFTER_TRAP);
            warm = outcome.warm.filter(|_| is_kept);
            match outcome.result.and_then(|answers| answers.into_iter().collect()) {
                Ok(()) => {
                    ran.state.keep();
                    tell(&self.worker.name, &message.event_id, &outcome.logs);
                    ran.outputs.extend(outcome.outputs);
                    ran.succeeded.push(member);
                }
                Err(failure) if failure.kind == FailureKind::Conflict => return Ok(Members::Conflict(failure.message)),
                Err(failure) => {
                    ran.state.discard();
                    ran.failed.push(Failed { member, failure, logs: outcome.logs });
                    if outcome.ran_sql && !(run.careful && lent.undo_member().await?) {
                        return Ok(Members::Spoiled(ran.failed));
                    }
                    ran.undone += u32::from(outcome.ran_sql);
                }
            }
        }
        Ok(Members::Ran(ran))
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
        let outcome = self.call(messages, attempts + 1, lent, state, None).await?;
        let whole = outcome.result.and_then(|answers| match answers.len() == members.len() {
            true => Ok(answers),
            false => Err(wrong_count(members.len(), answers.len())),
        });
        let failed = |(member, failure)| Failed { member, failure, logs: outcome.logs.clone() };
        let failed: Vec<Failed> = match whole {
            Ok(answers) => members
                .iter()
                .zip(answers)
                .filter_map(|(member, answer)| answer.err().map(|failure| failed((*member, failure))))
                .collect(),
            Err(failure) if failure.kind == FailureKind::Conflict => return Ok(Members::Conflict(failure.message)),
            Err(failure) => match members.as_slice() {
                [member] => vec![failed((*member, failure))],
                _ => return Ok(Members::SomebodyFailed),
            },
        };
        if !failed.is_empty() {
            return Ok(Members::Spoiled(failed));
        }
        tell(&self.worker.name, &format!("a batch of {}", members.len()), &outcome.logs);
        let mut state = outcome.state;
        state.keep();
        Ok(Members::Ran(Ran { succeeded: members, outputs: outcome.outputs, state, ..Ran::default() }))
    }

    pub(super) async fn call(
        &self,
        messages: Vec<Arc<Message>>,
        attempt: u32,
        lent: &Lent,
        state: BatchState,
        warm: Option<Warm>,
    ) -> anyhow::Result<Outcome> {
        let call = Call {
            messages,
            worker: Arc::clone(&self.worker),
            version: self.version,
            attempt,
            now: Timestamp::now(),
            payload_max: self.payload_max,
            database: Arc::new(lent.clone()),
            state,
        };
        let began = Instant::now();
        let outcome = self.guest.call(call, warm).await;
        self.metrics.processed(&self.worker.name, began.elapsed());
        outcome
    }
}

fn wrong_count(messages: usize, answers: usize) -> CallFailure {
    CallFailure::new(
        FailureKind::Retry,
        "wrong-answer",
        format!("the batch handler was given {messages} messages and answered for {answers}"),
    )
}
