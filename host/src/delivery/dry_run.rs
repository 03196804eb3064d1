//! Dry run: handles a message in a transaction that is always rolled back.

use std::sync::Arc;

use super::batch::CallInputs;
use super::{CONFLICTS_MAX, Delivery, SharedTx, schema_mismatch, store_error};
use crate::guest::{CallFailure, CallOutcome, FailureKind};
use crate::model::failure_code::FailureCode;
use crate::model::keyed_state::{BatchState, StateEntry};
use crate::model::message::{Message, Output};
use crate::model::verdict::Reason;
use crate::store::conflict::pause_after;
use crate::store::{Changes, StoreError, Tx};

/// The outcome that a delivery would have.
#[derive(Debug, Default)]
pub struct DryRunOutcome {
    /// The failure, and the reason of the dead letter that it would lead to.
    pub failure: Option<(Reason, CallFailure)>,
    /// The outputs that the delivery would publish, in order.
    pub outputs: Vec<Output>,
    /// Keys of the state with their entries before and after.
    pub state: Vec<(String, Option<StateEntry>, Option<StateEntry>)>,
    /// The changed rows of workers' tables.
    pub changes: Changes,
    /// The handler's log, one line per entry.
    pub logs: String,
}

impl Delivery {
    /// Handles a message in a transaction that is rolled back. Its outputs are never published and
    /// no attempt is counted. The result has at most `limit` changed rows of each table.
    ///
    /// # Errors
    /// - [`StoreError::Conflict`] if conflicts with other transactions persist.
    /// - Every other error of the database.
    pub async fn dry_run(
        &self,
        message: Arc<Message>,
        limit: usize,
    ) -> Result<DryRunOutcome, StoreError> {
        if let Some(failure) = schema_mismatch(&self.worker, &message) {
            return Ok(DryRunOutcome {
                failure: Some((self.dead_letter_reason(&failure), failure)),
                ..DryRunOutcome::default()
            });
        }
        let mut conflicts = 0;
        loop {
            match self.dry_run_once(Arc::clone(&message), limit).await {
                Ok(Some(dry_run)) => return Ok(dry_run),
                Ok(None) | Err(StoreError::Conflict(_)) if conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                    pause_after(conflicts).await;
                }
                Ok(None) => {
                    return Err(StoreError::Conflict(anyhow::anyhow!(
                        "conflicts with other transactions persisted over all retries"
                    )));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns `None` after a conflict with another transaction.
    async fn dry_run_once(
        &self,
        message: Arc<Message>,
        limit: usize,
    ) -> Result<Option<DryRunOutcome>, StoreError> {
        let mut tx = self
            .store
            .begin(&self.worker.name, self.worker.limits.time)
            .await?;
        if let Err(error) = tx.track_changes().await {
            tx.rollback().await;
            return Err(error);
        }

        // Run the handler.
        let shared_tx = SharedTx::new(self.store.dialect(), tx);
        let attempt = message.attempts_before() + 1;
        let inputs = CallInputs {
            messages: vec![message],
            traces: Vec::new(),
            request: None,
        };
        let outcome = self
            .call(inputs, attempt, &shared_tx, BatchState::default(), None)
            .await;

        // Read the effects, then roll back.
        let mut tx = shared_tx.take_tx().await?;
        let dry_run = match outcome {
            Ok(outcome) => self.inspect(outcome, &mut tx, limit).await,
            Err(error) => Err(store_error(error)),
        };
        tx.rollback().await;
        dry_run
    }

    /// Converts the effects of the call into a report. Returns `None` after a conflict.
    async fn inspect(
        &self,
        outcome: CallOutcome,
        tx: &mut Tx,
        limit: usize,
    ) -> Result<Option<DryRunOutcome>, StoreError> {
        let CallOutcome {
            result,
            outputs,
            mut state,
            logs,
            ..
        } = outcome;
        let failure = match result.map(|results| results.into_iter().find_map(Result::err)) {
            Ok(failure) => failure,
            Err(failure) => Some(failure),
        };
        if let Some(failure) = failure {
            if failure.kind == FailureKind::Conflict {
                return Ok(None);
            }
            return Ok(Some(DryRunOutcome {
                failure: Some((self.dead_letter_reason(&failure), failure)),
                logs,
                ..DryRunOutcome::default()
            }));
        }
        state.keep();
        let changes = tx.changes(limit).await?;
        let refused = |why: &String| {
            CallFailure::new(FailureKind::Retry, FailureCode::CommitRefused, why.as_str())
        };
        let failure = changes
            .refused
            .as_ref()
            .map(refused)
            .map(|failure| (self.dead_letter_reason(&failure), failure));
        Ok(Some(DryRunOutcome {
            failure,
            outputs,
            state: state.changes(),
            changes,
            logs,
        }))
    }

    /// The reason of the dead letter that a failure leads to.
    fn dead_letter_reason(&self, failure: &CallFailure) -> Reason {
        match failure.kind {
            FailureKind::Reject => Reason::Rejected,
            FailureKind::OutputRefused => Reason::OutputRefused,
            _ => Reason::AttemptsExhausted,
        }
    }
}
