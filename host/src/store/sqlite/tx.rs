//! The transaction of one batch.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::SqlitePool;

use super::changes::{self, ChangeTracker};
use super::guest_sql::{self, Guests, StatementOutcome};
use super::session::Session;
use super::{errors, inbox, outbox, requests, state};
use crate::model::request::{HttpResponse, RequestKey};
use crate::model::sql::{Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::Settled;
use crate::store::shared::Savepoint;
use crate::store::{
    Changes, Claim, Claimed, ClaimedRequest, OutboxRow, Output, Result, StateSlot, StateWrite, Tx,
    shared,
};

/// An open transaction of one worker.
pub(super) struct SqliteTx {
    session: Session,
    worker: String,
    /// The event ids that this transaction claimed and that were not settled before.
    fresh: HashSet<String>,
    /// The failure that keeps this transaction from committing.
    failure: Option<String>,
    /// Whether a rollback to the savepoint clears that failure.
    is_recoverable: bool,
    savepoint: Savepoint,
    guests: Guests,
    /// Connections that read the committed state.
    readers: SqlitePool,
    tracker: Option<ChangeTracker>,
}

impl SqliteTx {
    pub(super) fn new(session: Session, worker: &str, guests: Guests, readers: SqlitePool) -> Self {
        SqliteTx {
            session,
            worker: worker.to_owned(),
            fresh: HashSet::new(),
            failure: None,
            is_recoverable: true,
            savepoint: Savepoint::new(),
            guests,
            readers,
            tracker: None,
        }
    }

    fn check(&self) -> Result<()> {
        self.failure
            .as_deref()
            .map_or(Ok(()), |why| Err(shared::transaction_failed(why)))
    }

    /// Records the failure of an operation of the platform.
    fn record_failure<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failure = Some(error.to_string());
            self.is_recoverable = false;
        }
        result
    }

    /// Records the failure of a guest's statement that reached the database.
    fn record_outcome<T>(
        &mut self,
        outcome: Result<StatementOutcome<T>>,
    ) -> Result<std::result::Result<T, SqlError>> {
        Ok(match self.record_failure(outcome)? {
            StatementOutcome::Done(value) => Ok(value),
            StatementOutcome::NotRun(error) => Err(error),
            StatementOutcome::Failed(error) => {
                self.failure = Some(error.to_string());
                Err(error)
            }
        })
    }
}

#[async_trait]
impl Tx for SqliteTx {
    async fn claim(&mut self, claims: &[Claim]) -> Result<Vec<Claimed>> {
        self.check()?;
        let claimed = inbox::claim(&mut self.session, &self.worker, claims).await;
        let claimed = self.record_failure(claimed)?;
        let is_fresh = |(_, claimed): &(&Claim, &Claimed)| matches!(claimed, Claimed::Fresh { .. });
        let fresh = claims.iter().zip(&claimed).filter(is_fresh);
        self.fresh
            .extend(fresh.map(|(claim, _)| claim.event_id.clone()));
        Ok(claimed)
    }

    async fn release_claims(&mut self, event_ids: &[String]) -> Result<()> {
        self.check()?;
        let ours: Vec<&str> = event_ids
            .iter()
            .map(String::as_str)
            .filter(|event_id| self.fresh.contains(*event_id))
            .collect();
        let released = inbox::release_claims(&mut self.session, &self.worker, &ours).await;
        self.record_failure(released)
    }

    async fn claim_request(&mut self, request: &RequestKey) -> Result<ClaimedRequest> {
        self.check()?;
        let claimed = requests::claim(&mut self.session, &self.worker, request).await;
        self.record_failure(claimed)
    }

    async fn store_response(
        &mut self,
        request: &RequestKey,
        response: &HttpResponse,
        keep: Duration,
    ) -> Result<()> {
        self.check()?;
        let kept =
            requests::store_response(&mut self.session, &self.worker, request, response, keep)
                .await;
        self.record_failure(kept.map_err(errors::from_guest_values))
    }

    async fn load_state(&mut self, keys: &[String]) -> Result<Vec<(String, StateSlot)>> {
        self.check()?;
        let entries = state::load(&mut self.session, &self.worker, keys).await;
        self.record_failure(entries)
    }

    async fn save_state(&mut self, writes: &[StateWrite]) -> Result<()> {
        self.check()?;
        let saved = state::save(&mut self.session, &self.worker, writes).await;
        self.record_failure(saved.map_err(errors::from_guest_values))
    }

    async fn savepoint(&mut self) -> Result<()> {
        self.check()?;
        let statements = self.savepoint.create_sql();
        let made = self.session.run(statements, "create a savepoint").await;
        self.record_failure(made)
    }

    async fn rollback_to_savepoint(&mut self) -> Result<()> {
        if !self.is_recoverable {
            return self.check();
        }
        let statement = self.savepoint.rollback_sql()?;
        let undone = self
            .session
            .run(statement, "roll back to the savepoint")
            .await;
        if undone.is_ok() {
            self.failure = None;
        }
        self.record_failure(undone)
    }

    async fn query(
        &mut self,
        statement: &str,
        params: &[Value],
        limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>> {
        if let Some(why) = &self.failure {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome =
            guest_sql::query(&mut self.session, self.guests, statement, params, limits).await;
        self.record_outcome(outcome)
    }

    async fn execute(
        &mut self,
        statement: &str,
        params: &[Value],
    ) -> Result<std::result::Result<u64, SqlError>> {
        if let Some(why) = &self.failure {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = guest_sql::execute(&mut self.session, self.guests, statement, params).await;
        self.record_outcome(outcome)
    }

    async fn append_outputs(
        &mut self,
        outputs: &[Output],
        lease: Duration,
    ) -> Result<Vec<OutboxRow>> {
        self.check()?;
        let appended = outbox::append(&mut self.session, &self.worker, outputs, lease).await;
        self.record_failure(appended.map_err(errors::from_guest_values))
    }

    async fn track_changes(&mut self) -> Result<()> {
        self.check()?;
        let tracker = changes::track(&mut self.session).await;
        self.tracker = Some(self.record_failure(tracker)?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        self.check()?;
        self.failure = Some("the transaction only tracks changes".to_owned());
        self.is_recoverable = false;
        match &self.tracker {
            Some(tracker) => {
                changes::changes(&mut self.session, &self.readers, tracker, limit).await
            }
            None => Ok(Changes::default()),
        }
    }

    async fn commit(self: Box<Self>) -> Result<Settled> {
        if let Err(refused) = self.check() {
            self.rollback().await;
            return Err(refused);
        }
        self.session.commit().await?;
        Ok(Settled::seen_by_store())
    }

    async fn rollback(mut self: Box<Self>) {
        // A connection that cannot stop tracking is closed.
        if self.tracker.is_some() && changes::stop_tracking(&mut self.session).await.is_err() {
            return;
        }
        self.session.rollback().await;
    }
}
