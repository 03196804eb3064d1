//! The transaction of one batch or one request.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::anyhow;
use sqlx::sqlite::SqlitePool;

use super::changes::TableRows;
use super::db::Session;
use super::guest_statement::{DeferredStatement, FailedStatement, StatementOutcome};
use super::postgres::changes::CountsByTable;
use super::shared::Savepoint;
use super::sqlite::changes::ChangeTracker;
use super::{
    Changes, Claim, Claimed, ClaimedRequest, KeptResponse, OutboxRow, Output, Result, StateSlot,
    StateWrite, StoreError, outputs, postgres, shared, sqlite,
};
use crate::model::request::RequestKey;
use crate::model::sql::{Rows, SqlError, SqlLimits, Value};
use crate::model::verdict::Settled;

/// An open transaction of one worker. Dropping it without `commit` rolls it back and releases the
/// connection.
pub struct Tx {
    database: Database,
    worker: String,
    /// The failure that prevents a commit.
    failure: Option<String>,
    /// Whether a rollback to the savepoint removes the failure.
    is_recoverable: bool,
    savepoint: Savepoint,
}

enum Database {
    Postgres(Box<PostgresTx>),
    Sqlite(Box<SqliteTx>),
}

struct PostgresTx {
    session: postgres::session::Session,
    guests: postgres::guest_sql::Guests,
    /// Row counts by table when change tracking started.
    counts_before: Option<CountsByTable>,
    /// Whether the connection must not be used again.
    is_broken: bool,
}

struct SqliteTx {
    session: sqlite::session::Session,
    guests: sqlite::guest_sql::Guests,
    /// The event ids that this transaction claimed and that were not settled before.
    fresh: HashSet<String>,
    /// Connections that read the committed state.
    readers: SqlitePool,
    tracker: Option<ChangeTracker>,
}

impl Tx {
    pub(super) fn on_postgres(
        session: postgres::session::Session,
        worker: &str,
        guests: postgres::guest_sql::Guests,
    ) -> Self {
        let tx = PostgresTx {
            session,
            guests,
            counts_before: None,
            is_broken: false,
        };
        Tx::new(worker, Database::Postgres(Box::new(tx)))
    }

    pub(super) fn on_sqlite(
        session: sqlite::session::Session,
        worker: &str,
        guests: sqlite::guest_sql::Guests,
        readers: SqlitePool,
    ) -> Self {
        let tx = SqliteTx {
            session,
            guests,
            fresh: HashSet::new(),
            readers,
            tracker: None,
        };
        Tx::new(worker, Database::Sqlite(Box::new(tx)))
    }

    fn new(worker: &str, database: Database) -> Self {
        Tx {
            database,
            worker: worker.to_owned(),
            failure: None,
            is_recoverable: true,
            savepoint: Savepoint::new(),
        }
    }

    fn check(&self) -> Result<()> {
        self.failure
            .as_deref()
            .map_or(Ok(()), |why| Err(shared::transaction_failed(why)))
    }

    /// Records the failure of a platform operation. After an `Unavailable`, a connection to
    /// PostgreSQL is not used again: a guest that bypassed the filter may have deallocated the
    /// host's prepared statements.
    fn record_failure<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failure = Some(error.to_string());
            self.is_recoverable = false;
            if let Database::Postgres(tx) = &mut self.database {
                tx.check_key(error);
                tx.is_broken |= matches!(error, StoreError::Unavailable(_));
            }
        }
        result
    }

    /// Like [`Tx::record_failure`], for an operation that writes a guest's values. A value that the
    /// tables refuse is the guest's fault.
    fn record_guest_values<T>(&mut self, result: Result<T>) -> Result<T> {
        let result = result.map_err(|error| match self.database {
            Database::Postgres(_) => postgres::errors::from_guest_values(error),
            Database::Sqlite(_) => sqlite::errors::from_guest_values(error),
        });
        self.record_failure(result)
    }

    /// Records the failure of a guest's statement that reached the database.
    fn record_outcome<T>(
        &mut self,
        outcome: Result<StatementOutcome<T>>,
    ) -> Result<std::result::Result<T, SqlError>> {
        let error = match self.record_failure(outcome)? {
            StatementOutcome::Done(value) => return Ok(Ok(value)),
            StatementOutcome::NotRun(error) => return Ok(Err(error)),
            StatementOutcome::Failed(error) => error,
            StatementOutcome::ConnectionBroken(error) => {
                self.is_recoverable = false;
                if let Database::Postgres(tx) = &mut self.database {
                    tx.is_broken = true;
                }
                error
            }
        };
        self.failure = Some(error.to_string());
        Ok(Err(error))
    }

    /// Claims event ids in the inbox: all with one statement, sorted, so that overlapping batches
    /// wait for each other and cannot deadlock. Blocks while another transaction holds one of them
    /// uncommitted. `claims` contains each event id once; the results are in its order.
    pub async fn claim(&mut self, claims: &[Claim]) -> Result<Vec<Claimed>> {
        self.check()?;
        let claimed = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::inbox::claim(&mut tx.session, &self.worker, claims).await
            }
            Database::Sqlite(tx) => tx.claim(&self.worker, claims).await,
        };
        self.record_failure(claimed)
    }

    /// Releases claimed event ids of batch items that failed and ran no SQL.
    pub async fn release_claims(&mut self, event_ids: &[String]) -> Result<()> {
        self.check()?;
        let released = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::inbox::release_claims(&mut tx.session, &self.worker, event_ids).await
            }
            Database::Sqlite(tx) => tx.release_claims(&self.worker, event_ids).await,
        };
        self.record_failure(released)
    }

    /// Claims idempotency keys for this transaction, or returns their stored responses, in the
    /// order of `requests`. Does not wait for another transaction that has one of them.
    pub async fn claim_requests(
        &mut self,
        requests: &[&RequestKey],
    ) -> Result<Vec<ClaimedRequest>> {
        self.check()?;
        let claimed = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::requests::claim(&mut tx.session, &self.worker, requests).await
            }
            Database::Sqlite(tx) => {
                sqlite::requests::claim(&mut tx.session, &self.worker, requests).await
            }
        };
        self.record_failure(claimed)
    }

    /// Stores responses to keys that this transaction claimed.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if another transaction answered one of the keys.
    pub async fn store_responses(&mut self, responses: &[KeptResponse<'_>]) -> Result<()> {
        self.check()?;
        let worker = &self.worker;
        let stored = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::requests::store_responses(&mut tx.session, worker, responses).await
            }
            Database::Sqlite(tx) => {
                sqlite::requests::store_responses(&mut tx.session, worker, responses).await
            }
        };
        let stored = stored.and_then(|all_stored| match all_stored {
            true => Ok(()),
            false => Err(StoreError::Conflict(anyhow!(
                "an idempotency key was answered by another transaction"
            ))),
        });
        self.record_guest_values(stored)
    }

    /// The current state of each key, missing keys included.
    pub async fn load_state(&mut self, keys: &[String]) -> Result<Vec<(String, StateSlot)>> {
        self.check()?;
        let entries = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::state::load(&mut tx.session, &self.worker, keys).await
            }
            Database::Sqlite(tx) => sqlite::state::load(&mut tx.session, &self.worker, keys).await,
        };
        self.record_failure(entries)
    }

    /// The first `most` existing keys that begin with `prefix` and follow `after`, in byte order.
    pub async fn list_state(
        &mut self,
        prefix: &str,
        after: &str,
        most: u32,
    ) -> Result<Vec<String>> {
        self.check()?;
        let worker = &self.worker;
        let keys = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::state::list(&mut tx.session, worker, prefix, after, most).await
            }
            Database::Sqlite(tx) => {
                sqlite::state::list(&mut tx.session, worker, prefix, after, most).await
            }
        };
        self.record_failure(keys)
    }

    /// Applies all writes, at most one per key.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a key has changed since it was loaded.
    pub async fn save_state(&mut self, writes: &[StateWrite]) -> Result<()> {
        self.check()?;
        let saved = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::state::save(&mut tx.session, &self.worker, writes).await
            }
            Database::Sqlite(tx) => {
                sqlite::state::save(&mut tx.session, &self.worker, writes).await
            }
        };
        self.record_guest_values(saved)
    }

    /// Sets a savepoint for [`Tx::rollback_to_savepoint`], in place of an earlier one.
    pub async fn savepoint(&mut self) -> Result<()> {
        self.check()?;
        let statements = self.savepoint.create_sql();
        let made = self.run(statements, "set a savepoint").await;
        self.record_failure(made)
    }

    /// Rolls back to the savepoint, past a guest's failed statement too, so that the transaction
    /// can be committed again.
    ///
    /// # Errors
    /// `Refused` if that is impossible. The transaction can then only be rolled back.
    pub async fn rollback_to_savepoint(&mut self) -> Result<()> {
        if !self.is_recoverable {
            return self.check();
        }
        let mut statement = self.savepoint.rollback_sql()?;
        if let Database::Postgres(tx) = &mut self.database {
            statement.push_str(&tx.session.deallocations());
        }
        let undone = self.run(statement, "roll back to the savepoint").await;
        if undone.is_ok() {
            self.failure = None;
        }
        self.record_failure(undone)
    }

    /// Like [`Tx::savepoint`]. Guests cannot write until [`Tx::end_read_only`].
    pub async fn read_only_savepoint(&mut self) -> Result<()> {
        self.savepoint().await?;
        let made = match &mut self.database {
            Database::Postgres(tx) => {
                let statement = "set transaction read only".to_owned();
                tx.session.run(statement, "begin to read only").await
            }
            Database::Sqlite(tx) => tx.set_reads_only(true).await,
        };
        self.record_failure(made)
    }

    /// Rolls back to the savepoint of [`Tx::read_only_savepoint`]. Guests can write again.
    ///
    /// # Errors
    /// As of [`Tx::rollback_to_savepoint`].
    pub async fn end_read_only(&mut self) -> Result<()> {
        // On PostgreSQL, the rollback ends the mode as well.
        if let Database::Sqlite(tx) = &mut self.database {
            tx.set_reads_only(false).await?;
        }
        self.rollback_to_savepoint().await
    }

    async fn run(&mut self, statements: String, doing: &'static str) -> Result<()> {
        match &mut self.database {
            Database::Postgres(tx) => tx.session.run(statements, doing).await,
            Database::Sqlite(tx) => tx.session.run(statements, doing).await,
        }
    }

    /// Runs a guest's statement and returns its rows. The outer error is the host's, the inner one
    /// is for the guest. After an inner error from the database, the transaction can only be rolled
    /// back.
    pub async fn query(
        &mut self,
        statement: &str,
        params: &[Value],
        limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>> {
        if let Some(why) = &self.failure {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = match &mut self.database {
            Database::Postgres(tx) => {
                let (session, guests) = (&mut tx.session, &tx.guests);
                postgres::guest_sql::query(session, guests, statement, params, limits).await
            }
            Database::Sqlite(tx) => {
                let (session, guests) = (&mut tx.session, tx.guests);
                sqlite::guest_sql::query(session, guests, statement, params, limits).await
            }
        };
        self.record_outcome(outcome)
    }

    /// Like [`Tx::query`], but returns the number of changed rows.
    pub async fn execute(
        &mut self,
        statement: &str,
        params: &[Value],
    ) -> Result<std::result::Result<u64, SqlError>> {
        if let Some(why) = &self.failure {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let outcome = match &mut self.database {
            Database::Postgres(tx) => {
                let (session, guests) = (&mut tx.session, &tx.guests);
                postgres::guest_sql::execute(session, guests, statement, params).await
            }
            Database::Sqlite(tx) => {
                let (session, guests) = (&mut tx.session, tx.guests);
                sqlite::guest_sql::execute(session, guests, statement, params).await
            }
        };
        self.record_outcome(outcome)
    }

    /// Checks a statement that is to run later. The outer error is the host's, the inner one is for
    /// the guest.
    pub async fn check_deferred(
        &mut self,
        statement: String,
        params: Vec<Value>,
    ) -> Result<std::result::Result<DeferredStatement, SqlError>> {
        if let Some(why) = &self.failure {
            return Ok(Err(SqlError::TransactionFailed(why.clone())));
        }
        let checked = match &mut self.database {
            Database::Postgres(tx) => {
                postgres::guest_sql::check(&tx.guests, &statement, &params).await
            }
            Database::Sqlite(tx) => sqlite::guest_sql::check(tx.guests, &statement, &params).await,
        };
        Ok(checked.map(|()| DeferredStatement { statement, params }))
    }

    /// Runs checked statements in order. PostgreSQL takes many of them in one round trip. The outer
    /// error is the host's, the inner one is that of the first statement that failed. After an
    /// inner error, the transaction can only be rolled back.
    pub async fn execute_all(
        &mut self,
        statements: &[DeferredStatement],
    ) -> Result<std::result::Result<(), FailedStatement>> {
        if let (Database::Postgres(tx), None) = (&mut self.database, &self.failure)
            && let Some(bundle) = postgres::deferred::Bundle::of(statements)
        {
            let (session, guests) = (&mut tx.session, &tx.guests);
            let mut done = 0;
            let outcome = bundle.run(session, guests, &mut done).await;
            let ran = self.record_outcome(outcome)?;
            return Ok(ran.map_err(|error| FailedStatement {
                position: done,
                error,
            }));
        }
        for (position, deferred) in statements.iter().enumerate() {
            if let Err(error) = self.execute(&deferred.statement, &deferred.params).await? {
                return Ok(Err(FailedStatement { position, error }));
            }
        }
        Ok(Ok(()))
    }

    /// Makes a commit impossible.
    pub fn fail(&mut self, why: &str) {
        self.failure = Some(why.to_owned());
        self.is_recoverable = false;
    }

    /// Appends outputs with one statement. They are leased to this host for `lease`, so that no
    /// poller leases rows that are about to be handed to the relay from memory. Returns the outputs
    /// that are due at once, in order. Delayed outputs, and those of a key with a failing output,
    /// are left to the poller.
    pub async fn append_outputs(
        &mut self,
        outputs: &[Output],
        lease: Duration,
    ) -> Result<Vec<OutboxRow>> {
        self.check()?;
        let sent: Vec<(&str, &Output)> = outputs
            .iter()
            .map(|output| (self.worker.as_str(), output))
            .collect();
        let session = match &mut self.database {
            Database::Postgres(tx) => Session::Postgres(&mut tx.session),
            Database::Sqlite(tx) => Session::Sqlite(&mut tx.session),
        };
        let appended = outputs::append_for(session, &sent, lease).await;
        self.record_guest_values(appended)
    }

    /// Starts to track changed rows of workers' tables.
    pub async fn track_changes(&mut self) -> Result<()> {
        self.check()?;
        let tracked = match &mut self.database {
            Database::Postgres(tx) => tx.track_changes().await,
            Database::Sqlite(tx) => tx.track_changes().await,
        };
        self.record_failure(tracked)
    }

    /// The changes since [`Tx::track_changes`], at most `limit` rows of each table, and the reason
    /// why a commit would be refused. Afterwards the transaction can only be rolled back.
    pub async fn changes(&mut self, limit: usize) -> Result<Changes> {
        self.check()?;
        self.failure = Some("it was a dry run".to_owned());
        self.is_recoverable = false;
        let changes = match &mut self.database {
            Database::Postgres(tx) => tx.changes(limit).await,
            Database::Sqlite(tx) => tx.changes(limit).await,
        };
        self.record_failure(changes)
    }

    /// All rows of workers' tables, at most `limit` of each.
    ///
    /// # Errors
    /// `Refused` if a table has more.
    pub async fn table_rows(&mut self, limit: usize) -> Result<Vec<TableRows>> {
        self.check()?;
        let rows = match &mut self.database {
            Database::Postgres(tx) => postgres::changes::table_rows(&mut tx.session, limit).await,
            Database::Sqlite(tx) => sqlite::changes::table_rows(&mut tx.session, limit).await,
        };
        self.record_failure(rows)
    }

    /// The reason why a commit would be refused, such as a violated deferred constraint. Afterwards
    /// the transaction can only be rolled back.
    pub async fn commit_refusal(&mut self) -> Option<String> {
        let refusal = match &mut self.database {
            Database::Postgres(tx) => postgres::changes::refused(&mut tx.session).await,
            Database::Sqlite(_) => None,
        };
        self.failure = Some("it was a dry run".to_owned());
        self.is_recoverable = false;
        refusal
    }

    /// Commits. Returns `Ok` only if the database confirmed the commit of this very transaction.
    /// The commit is never sent twice.
    ///
    /// # Errors
    /// `Refused` if a guest's statement aborted or ended the transaction or violates a deferred
    /// constraint.
    pub async fn commit(self) -> Result<Settled> {
        if let Err(refused) = self.check() {
            self.rollback().await;
            return Err(refused);
        }
        match self.database {
            Database::Postgres(tx) => tx.commit().await?,
            Database::Sqlite(tx) => tx.session.commit().await?,
        }
        Ok(Settled::seen_by_store())
    }

    /// Rolls back. After an error here the connection is closed, which has the same effect.
    pub async fn rollback(self) {
        match self.database {
            Database::Postgres(tx) => tx.rollback().await,
            Database::Sqlite(tx) => tx.rollback().await,
        }
    }
}

impl PostgresTx {
    /// After a renewal of the key for definer functions, the next transaction reads the new key.
    fn check_key(&self, error: &StoreError) {
        if postgres::errors::is_renewed_key(error) {
            self.guests.platform.mark_key_stale();
        }
    }

    async fn track_changes(&mut self) -> Result<()> {
        self.counts_before = Some(postgres::changes::counts(&mut self.session).await?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        let before = self.counts_before.take().unwrap_or_default();
        let sessions = &self.guests.sessions;
        postgres::changes::changes(&mut self.session, sessions, &before, limit).await
    }

    async fn commit(self) -> Result<()> {
        let platform = self.guests.platform;
        let committed = self.session.commit().await;
        if let Err(error) = &committed
            && postgres::errors::is_renewed_key(error)
        {
            platform.mark_key_stale();
        }
        committed
    }

    async fn rollback(self) {
        if !self.is_broken {
            self.session.rollback().await;
        }
    }
}

impl SqliteTx {
    async fn claim(&mut self, worker: &str, claims: &[Claim]) -> Result<Vec<Claimed>> {
        let claimed = sqlite::inbox::claim(&mut self.session, worker, claims).await?;
        let is_fresh = |(_, claimed): &(&Claim, &Claimed)| matches!(claimed, Claimed::Fresh { .. });
        let fresh = claims.iter().zip(&claimed).filter(is_fresh);
        self.fresh
            .extend(fresh.map(|(claim, _)| claim.event_id.clone()));
        Ok(claimed)
    }

    /// Releases those of the event ids that this transaction claimed.
    async fn release_claims(&mut self, worker: &str, event_ids: &[String]) -> Result<()> {
        let ours: Vec<&str> = event_ids
            .iter()
            .map(String::as_str)
            .filter(|event_id| self.fresh.contains(*event_id))
            .collect();
        sqlite::inbox::release_claims(&mut self.session, worker, &ours).await
    }

    async fn set_reads_only(&mut self, reads_only: bool) -> Result<()> {
        self.guests.reads_only = reads_only;
        let statement = format!("pragma query_only = {reads_only}");
        self.session.run(statement, "set query_only").await
    }

    async fn track_changes(&mut self) -> Result<()> {
        self.tracker = Some(sqlite::changes::track(&mut self.session).await?);
        Ok(())
    }

    async fn changes(&mut self, limit: usize) -> Result<Changes> {
        match &self.tracker {
            Some(tracker) => {
                sqlite::changes::changes(&mut self.session, &self.readers, tracker, limit).await
            }
            None => Ok(Changes::default()),
        }
    }

    async fn rollback(mut self) {
        // A connection that cannot stop tracking is closed.
        if self.tracker.is_some()
            && sqlite::changes::stop_tracking(&mut self.session)
                .await
                .is_err()
        {
            return;
        }
        self.session.rollback().await;
    }
}
