//! Failed attempts: they are counted in a transaction of their own, and judged by the retry policy.

use super::{BatchItem, BatchRun, Delivery, FailedCall};
use crate::fault;
use crate::guest::{CallFailure, FailureKind};
use crate::model::message::Message;
use crate::model::verdict::{DeadLetter, Reason, Verdict};
use crate::store::{CountedAttempt, FailedAttempt, StoreError};

impl Delivery {
    /// Counts the failed attempts of a batch, and gives each message its verdict.
    pub(super) async fn judge_failures(&self, run: &mut BatchRun) -> Result<(), StoreError> {
        if run.failed.is_empty() {
            return Ok(());
        }
        let failed = std::mem::take(&mut run.failed);
        let attempts: Vec<FailedAttempt> = failed
            .iter()
            .map(|(item, failed)| FailedAttempt {
                event_id: item.message.event_id.clone(),
                version: self.version,
                code: failed.failure.code.clone(),
                error: failed.failure.message.clone(),
                logs: failed.logs.clone(),
                recording: failed.recording.clone(),
            })
            .collect();
        let counted = self
            .store
            .count_attempts(&self.worker.name, &attempts)
            .await?;
        fault::point(fault::AFTER_COUNT);

        for ((mut item, failed), counted) in failed.into_iter().zip(counted) {
            self.report_attempt(&item, &failed, counted);
            if let Some(trace) = &mut item.trace {
                trace.failed(&failed.failure);
            }
            let verdict = self.judge(&item.message, failed.failure, counted);
            run.judged.push((item, verdict));
        }
        Ok(())
    }

    fn report_attempt(&self, item: &BatchItem, failed: &FailedCall, counted: CountedAttempt) {
        let (logs, code) = (failed.logs.trim_end(), failed.failure.code.as_deref());
        self.metrics.attempt_failed(&self.worker.name, code);
        tracing::warn!(
            worker = self.worker.name,
            event_id = item.message.event_id,
            attempt = counted.attempt,
            code,
            logs = (!logs.is_empty()).then_some(logs),
            error = failed.failure.message,
            "attempt failed"
        );
    }

    /// The verdict of a message after a failed attempt.
    fn judge(&self, message: &Message, failure: CallFailure, counted: CountedAttempt) -> Verdict {
        let CountedAttempt { attempt, is_repeat } = counted;
        // A redriven message has a new budget of attempts, and its numbers continue.
        let before = message.attempts_before();
        let attempt_since_redrive = attempt.saturating_sub(before).max(1);
        let policy = &self.worker.retry;

        let is_deterministic = is_repeat && attempt_since_redrive > 1;
        let reason = match failure.kind {
            FailureKind::Reject => Reason::Rejected,
            FailureKind::OutputRefused => Reason::OutputRefused,
            _ if !policy.allows_retry(attempt_since_redrive) => Reason::AttemptsExhausted,
            _ if is_deterministic && policy.dead_letters_deterministic_failures() => {
                Reason::DeterministicFailure
            }
            kind => {
                let requested = match kind {
                    FailureKind::RetryAfter(after) => Some(after),
                    _ => None,
                };
                let after = policy.delay_after(attempt_since_redrive, requested, rand::random());
                return Verdict::Retry { attempt, after };
            }
        };
        Verdict::Dead(Box::new(DeadLetter {
            worker: self.worker.name.clone(),
            version: self.version,
            reason,
            code: failure.code,
            detail: failure.message,
            frames: failure.frames,
            attempts: attempt,
            message: message.clone(),
        }))
    }

    /// Deletes the recordings of events that failed before and took effect now. If that fails,
    /// retention deletes them with their attempts.
    pub(super) async fn delete_recordings(&self, run: &BatchRun) {
        let recovered = run
            .judged
            .iter()
            .filter(|(item, verdict)| item.attempts > 0 && matches!(verdict, Verdict::Done(_)));
        let event_ids: Vec<String> = recovered
            .map(|(item, _)| item.message.event_id.clone())
            .collect();
        if event_ids.is_empty() {
            return;
        }
        let deleted = self
            .store
            .delete_recordings(&self.worker.name, &event_ids)
            .await;
        if let Err(error) = deleted {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::debug!(
                worker = self.worker.name,
                error,
                "recordings of attempts not deleted"
            );
        }
    }
}
