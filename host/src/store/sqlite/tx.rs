//! The transaction of one batch.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::SqlitePool;

use super::changes::{self, Watch};
use super::guest_sql::{self, Guests, Outcome};
use super::session::Session;
use super::{errors, inbox, outbox, requests, state};
use crate::model::request::{HttpAnswer, RequestKey};
use crate::model::sql::{Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::Settled;
use crate::store::shared::Savepoint;
use crate::store::{
    Changes, Claim, Claimed, ClaimedRequest, OutboxRow, Output, Result, StateSlot, StateWrite, Tx, shared,
};

pub(super) struct SqliteTx {
    session: Session,
    worker: String,
    /// The event ids that this transaction claimed and that were not settled before.
    fresh: HashSet<String>,
    /// Why nothing of this transaction can take effect any more.
    doomed: Option<String>,
    /// Whether going back to the savepoint would lift that.
    undoable: bool,
    savepoint: Savepoint,
    guests: Guests,
    /// See what was committed before.
    readers: SqlitePool,
    watch: Option<Watch>,
}

impl SqliteTx {
    pub(super) fn new(session: Session, worker: &str, guests: Guests, readers: SqlitePool) -> Self {
        SqliteTx {
            session,
            worker: worker.to_owned(),
            fresh: HashSet::new(),
            doomed: None,
            undoable: true,
            savepoint: Savepoint::new(),
            guests,
            readers,
            watch: None,
        }
    }

    fn check(&self) -> Result<()> {
        self.doomed.as_deref().map_or(Ok(()), |why| Err(shared::doomed(why)))
    }

    /// Remembers that an operation of our own failed.
    fn remember<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.doomed = Some(error.to_string());
            self.undoable = false;
        }
        result
    }

    /// Remembers that a guest's statement reached the database and failed.
    fn conclude<T>(&mut self, outcome: Result<Outcome<T>>) -> Result<std::result::Result<T, SqlError>> {
        Ok(match self.remember(outcome)? {
            Outcome::Done(value) => Ok(value),
            Outcome::NotRun(error) => Err(error),
            Outcome::Failed(error) => {
                self.doomed = Some(error.to_string());
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
        let claimed = self.remember(claimed)?;
        let is_fresh = |(_, claimed): &(&Claim, &Claimed)| matches!(claimed, Claimed::Fresh { .. });
        let fresh = claims.iter().zip(&claimed).filter(is_fresh);
        self.fresh.extend(fresh.map(|(claim, _)| claim.event_id.clone()));
        Ok(claimed)
    }

    async fn unclaim(&mut self, event_ids: &[String]) -> Result<()> {
        self.check()?;
        let ours: Vec<&str> =
            event_ids.iter().map(String::as_str).filter(|event_id| self.fresh.contains(*event_id)).collect();
        let unclaimed = inbox::unclaim(&mut self.session, &self.worker, &ours).await;
        self.remember(unclaimed)
    }

    async fn claim_request(&mut self, request: &RequestKey) -> Result<ClaimedRequest> {
        self.check()?;
        let claimed = requests::claim(&mut self.session, &self.worker, request).await;
        self.remember(claimed)
    }

    async fn answer_request(&mut self, request: &RequestKey, answer: &HttpAnswer, keep: Duration) -> Result<()> {
        self.check()?;
        let kept = requests::keep(&mut self.session, &self.worker, request, answer, keep).await;
        self.remember(kept.map_err(errors::of_guests_values))
    }

    async fn load_state(&mut self, keys: &[String]) -> Result<Vec<(String, StateSlot)>> {
        self.check()?;
        let entries = state::load(&mut self.session, &self.worker, keys).await;
        self.remember(entries)
    }

    async fn save_state(&mut self, writes: &[StateWrite]) -> Result<()> {
        self.check()?;
        let saved = state::save(&mut self.session, &self.worker, writes).await;
        self.remember(saved.map_err(errors::of_guests_values))
    }

    async fn savepoint(&mut self) -> Result<()> {
        self.check()?;
        let statements = self.savepoint.begin();
        let made = self.session.run(statements, "make a savepoint").await;
        self.remember(made)
    }

    async fn undo(&mut self) -> Result<()> {
        if !self.undoable {
            return self.check();
        }
        let statement = self.savepoint.back()?;
        let undone = self.session.run(statement, "go back to the savepoint").await;
        if undone.is_ok() {
            self.doomed = None;
        }
        self.remember(undone)
    }

    async fn query(
        &mut self,
        statement: &str,
        params: &[Value],
        limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>> {
        if let Some(why) = &self.doomed {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = guest_sql::query(&mut self.session, self.guests, statement, params, limits).await;
        self.conclude(outcome)
    }

    async fn execute(&mut self, statement: &str, params: &[Value]) -> Result<std::result::Result<u64, SqlError>> {
        if let Some(why) = &self.doomed {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = guest_sql::execute(&mut self.session, self.guests, statement, params).await;
        self.conclude(outcome)
    }

    async fn append_outputs(&mut self, outputs: &[Output], lease: Duration) -> Result<Vec<OutboxRow>> {
        self.check()?;
        let appended = outbox::append(&mut self.session, &self.worker, outputs, lease).await;
        self.remember(appended.map_err(errors::of_guests_values))
    }

    async fn watch(&mut self) -> Result<()> {
        self.check()?;
        let watch = changes::watch(&mut self.session).await;
        self.watch = Some(self.remember(watch)?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        self.check()?;
        self.doomed = Some("it was only watched".to_owned());
        self.undoable = false;
        match &self.watch {
            Some(watch) => changes::changes(&mut self.session, &self.readers, watch, limit).await,
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
        // A connection that cannot be told to stop watching is closed.
        if self.watch.is_some() && changes::forget(&mut self.session).await.is_err() {
            return;
        }
        self.session.rollback().await;
    }
}
