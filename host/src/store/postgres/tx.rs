//! The transaction of one batch.

use std::time::Duration;

use anyhow::anyhow;
use async_trait::async_trait;
use sqlx::Row;

use super::guest_sql::{self, Guests, Outcome};
use super::session::{Purpose, Session, Sessions};
use super::{changes, errors, inbox, outbox, requests, state};
use crate::fault;
use crate::model::request::{HttpAnswer, RequestKey};
use crate::model::sql::{Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::Settled;
use crate::store::shared::Savepoint;
use crate::store::{
    Changes, Claim, Claimed, ClaimedRequest, OutboxRow, Output, Result, StateSlot, StateWrite, StoreError, Tx, shared,
};

pub(super) struct PostgresTx {
    session: Session,
    guests: Guests,
    worker: String,
    /// Why nothing of this transaction can take effect any more.
    doomed: Option<String>,
    /// Whether going back to the savepoint would lift that.
    undoable: bool,
    savepoint: Savepoint,
    /// What had been written when the watch began.
    watched: Option<changes::Counts>,
    /// Whether the connection is unfit for further use.
    spoilt: bool,
}

impl PostgresTx {
    pub(super) fn new(session: Session, worker: &str, guests: Guests) -> Self {
        PostgresTx {
            session,
            guests,
            worker: worker.to_owned(),
            doomed: None,
            undoable: true,
            savepoint: Savepoint::new(),
            watched: None,
            spoilt: false,
        }
    }

    fn check(&self) -> Result<()> {
        if fault::mutant(fault::IGNORE_COMMIT_TAG) {
            return Ok(());
        }
        self.doomed.as_deref().map_or(Ok(()), |why| Err(shared::doomed(why)))
    }

    /// Remembers that an operation of our own failed. A connection that could not serve it is not used again: a guest
    /// that got past the filter may have taken our prepared statements from it.
    fn remember<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.doomed = Some(error.to_string());
            self.undoable = false;
            self.look_at_key(error);
            self.spoilt |= matches!(error, StoreError::Unavailable(_));
        }
        result
    }

    /// The next transaction reads the key of the door again if it was renewed.
    fn look_at_key(&self, error: &StoreError) {
        if errors::is_renewed_key(error) {
            self.guests.house.key_is_stale();
        }
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
            Outcome::Spoilt(error) => {
                self.doomed = Some(error.to_string());
                self.undoable = false;
                self.spoilt = true;
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
        self.remember(claimed)
    }

    async fn unclaim(&mut self, event_ids: &[String]) -> Result<()> {
        self.check()?;
        let unclaimed = inbox::unclaim(&mut self.session, &self.worker, event_ids).await;
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
        let outcome = guest_sql::query(&mut self.session, &self.guests, statement, params, limits).await;
        self.conclude(outcome)
    }

    async fn execute(&mut self, statement: &str, params: &[Value]) -> Result<std::result::Result<u64, SqlError>> {
        if let Some(why) = &self.doomed {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = guest_sql::execute(&mut self.session, &self.guests, statement, params).await;
        self.conclude(outcome)
    }

    async fn append_outputs(&mut self, outputs: &[Output], lease: Duration) -> Result<Vec<OutboxRow>> {
        self.check()?;
        let appended = outbox::append(&mut self.session, &self.worker, outputs, lease).await;
        self.remember(appended.map_err(errors::of_guests_values))
    }

    async fn watch(&mut self) -> Result<()> {
        self.check()?;
        let counts = changes::counts(&mut self.session).await;
        self.watched = Some(self.remember(counts)?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        self.check()?;
        let before = self.watched.take().unwrap_or_default();
        let changes = changes::changes(&mut self.session, &self.guests.sessions, &before, limit).await;
        self.doomed = Some("it was only watched".to_owned());
        self.undoable = false;
        self.remember(changes)
    }

    async fn commit(self: Box<Self>) -> Result<Settled> {
        if let Err(refused) = self.check() {
            self.rollback().await;
            return Err(refused);
        }
        let xid = self.session.id().to_owned();
        let house = self.guests.house.clone();
        match self.session.commit().await {
            Err(StoreError::Unavailable(_)) if fault::mutant(fault::RESOLVE_BY_SELECT) => {
                resolve_by_select(&house, &xid).await?;
            }
            Err(error) if errors::is_renewed_key(&error) => {
                house.key_is_stale();
                return Err(error);
            }
            committed => committed?,
        }
        Ok(Settled::seen_by_store())
    }

    async fn rollback(self: Box<Self>) {
        if !self.spoilt {
            self.session.rollback().await;
        }
    }
}

/// What a mutant makes of an unclear commit. One that is still on its way looks as if it had not happened.
async fn resolve_by_select(house: &Sessions, xid: &str) -> Result<()> {
    let mut session = house.begin(Purpose::House).await?;
    let query = session.query("select pg_catalog.pg_xact_status($1::pg_catalog.text::pg_catalog.xid8) = 'committed'");
    let row = query.bind(xid).fetch_one(session.connection()).await;
    match row.and_then(|row| row.try_get(0)) {
        Ok(true) => Ok(()),
        _ => Err(StoreError::Refused(anyhow!("it did not happen"))),
    }
}
