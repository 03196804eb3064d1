//! The transaction of one batch or one request.

use std::time::Duration;

use async_trait::async_trait;

use super::guest_sql::{self, Guests, StatementOutcome};
use super::session::Session;
use super::{changes, errors, inbox, outbox, requests, state};
use crate::model::request::{HttpResponse, RequestKey};
use crate::model::sql::{Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::Settled;
use crate::store::shared::Savepoint;
use crate::store::{
    Changes, Claim, Claimed, ClaimedRequest, OutboxRow, Output, Result, StateSlot, StateWrite,
    StoreError, Tx, shared,
};

pub(super) struct PostgresTx {
    session: Session,
    guests: Guests,
    worker: String,
    /// The failure that prevents a commit.
    failure: Option<String>,
    /// Whether a rollback to the savepoint removes the failure.
    is_recoverable: bool,
    savepoint: Savepoint,
    /// Row counts by table when change tracking started.
    counts_before: Option<changes::CountsByTable>,
    /// Whether the connection must not be used again.
    is_broken: bool,
}

impl PostgresTx {
    pub(super) fn new(session: Session, worker: &str, guests: Guests) -> Self {
        PostgresTx {
            session,
            guests,
            worker: worker.to_owned(),
            failure: None,
            is_recoverable: true,
            savepoint: Savepoint::new(),
            counts_before: None,
            is_broken: false,
        }
    }

    fn check(&self) -> Result<()> {
        self.failure
            .as_deref()
            .map_or(Ok(()), |why| Err(shared::transaction_failed(why)))
    }

    /// Records the failure of a platform operation. After an `Unavailable`, the connection is not
    /// used again: a guest that bypassed the filter may have deallocated the host's prepared
    /// statements.
    fn record_failure<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failure = Some(error.to_string());
            self.is_recoverable = false;
            self.check_key(error);
            self.is_broken |= matches!(error, StoreError::Unavailable(_));
        }
        result
    }

    /// After a renewal of the key for definer functions, the next transaction reads the new key.
    fn check_key(&self, error: &StoreError) {
        if errors::is_renewed_key(error) {
            self.guests.platform.mark_key_stale();
        }
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
            StatementOutcome::ConnectionBroken(error) => {
                self.failure = Some(error.to_string());
                self.is_recoverable = false;
                self.is_broken = true;
                Err(error)
            }
        })
    }
}

#[async_trait]
impl Tx for PostgresTx {
    async fn claim(&mut self, claims: &[Claim]) -> Result<Vec<Claimed>> {
        self.check()?;
        let claimed = inbox::claim(&mut self.session, &self.worker, claims).await;
        self.record_failure(claimed)
    }

    async fn release_claims(&mut self, event_ids: &[String]) -> Result<()> {
        self.check()?;
        let released = inbox::release_claims(&mut self.session, &self.worker, event_ids).await;
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
        let made = self.session.run(statements, "set a savepoint").await;
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
            guest_sql::query(&mut self.session, &self.guests, statement, params, limits).await;
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
        let outcome = guest_sql::execute(&mut self.session, &self.guests, statement, params).await;
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
        let counts = changes::counts(&mut self.session).await;
        self.counts_before = Some(self.record_failure(counts)?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        self.check()?;
        let before = self.counts_before.take().unwrap_or_default();
        let changes =
            changes::changes(&mut self.session, &self.guests.sessions, &before, limit).await;
        self.failure = Some("it was a dry run".to_owned());
        self.is_recoverable = false;
        self.record_failure(changes)
    }

    async fn commit(self: Box<Self>) -> Result<Settled> {
        if let Err(refused) = self.check() {
            self.rollback().await;
            return Err(refused);
        }
        let platform = self.guests.platform.clone();
        match self.session.commit().await {
            Err(error) if errors::is_renewed_key(&error) => {
                platform.mark_key_stale();
                return Err(error);
            }
            committed => committed?,
        }
        Ok(Settled::seen_by_store())
    }

    async fn rollback(self: Box<Self>) {
        if !self.is_broken {
            self.session.rollback().await;
        }
    }
}
