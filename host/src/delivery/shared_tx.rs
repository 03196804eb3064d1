//! The transaction of a batch, shared by its guests.

use std::sync::{Arc, PoisonError};

use anyhow::Context as _;
use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::sync::Mutex;

use super::trace::{RunningStatement, StatementLog, Statements};
use crate::fault;
use crate::guest::{Database, Deferral};
use crate::model::keyed_state::StateSlot;
use crate::model::request::RequestKey;
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::store::{ClaimedRequest, DeferredStatement, KeptResponse, StoreError, Tx};

/// A transaction that the guests of a batch share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SharedTx {
    dialect: Dialect,
    /// The lock gives exclusive access to the transaction. An operation holds it from start to end.
    /// A stopped guest therefore cannot run a statement after its item was rolled back.
    slot: Arc<Mutex<TxSlot>>,
    /// The statements of the running guest, if traces are on.
    statements: Option<StatementLog>,
    /// Whether deferred statements of one call wait for those of later calls.
    collects_deferred: bool,
}

/// The transaction, its savepoint state and its deferred statements.
struct TxSlot {
    /// `None` after [`SharedTx::take_tx`].
    tx: Option<Tx>,
    /// Whether the next statement needs a savepoint first.
    needs_savepoint: bool,
    deferred: DeferredStatements,
}

/// The statements that wait for a run.
#[derive(Default)]
struct DeferredStatements {
    /// In the order in which the guests deferred them.
    queue: Vec<DeferredStatement>,
    /// The size of the queue in bytes.
    size: usize,
    /// Where the statements of the current call begin.
    own_from: usize,
    /// The error of a statement of an earlier call, which ran during the current one.
    earlier_error: Option<SqlError>,
}

/// The queue runs before it takes more bytes or statements.
const DEFERRED_SIZE_MAX: usize = 1 << 20;
const DEFERRED_MAX: usize = 1_000;

/// The name of a run of deferred statements in traces.
const DEFERRED_STATEMENTS: &str = "deferred statements";

/// What a guest reads when a statement of another guest failed.
const EARLIER_FAILED: &str = "a deferred statement of another message failed";

impl DeferredStatements {
    fn begin_call(&mut self) {
        self.own_from = self.queue.len();
    }

    fn push(&mut self, statement: DeferredStatement) {
        self.size += statement.size();
        self.queue.push(statement);
    }

    fn is_full(&self) -> bool {
        self.size >= DEFERRED_SIZE_MAX || self.queue.len() >= DEFERRED_MAX
    }

    /// Drops the statements of the current call.
    fn drop_own(&mut self) {
        let own = self.queue.drain(self.own_from..);
        self.size -= own.map(|statement| statement.size()).sum::<usize>();
    }
}

impl TxSlot {
    fn tx(&mut self) -> anyhow::Result<&mut Tx> {
        self.tx.as_mut().context("the transaction is over")
    }

    /// Returns the transaction. Sets the savepoint before the first statement of an item.
    async fn item_tx(&mut self) -> anyhow::Result<&mut Tx> {
        if self.needs_savepoint {
            self.tx()?.savepoint().await?;
            self.needs_savepoint = false;
        }
        self.tx()
    }

    /// Runs the deferred statements. Returns the error of a statement of the current call.
    async fn run_deferred(&mut self) -> anyhow::Result<Result<(), SqlError>> {
        if self.deferred.queue.is_empty() {
            return Ok(Ok(()));
        }
        let deferred = std::mem::take(&mut self.deferred);
        let ran = self.item_tx().await?.execute_all(&deferred.queue).await?;
        Ok(ran.map_err(|failed| {
            if failed.position >= deferred.own_from {
                return failed.error;
            }
            self.deferred.earlier_error = Some(failed.error);
            SqlError::TransactionFailed(EARLIER_FAILED.to_owned())
        }))
    }
}

impl SharedTx {
    pub(crate) fn new(dialect: Dialect, tx: Tx) -> Self {
        SharedTx {
            dialect,
            slot: Arc::new(Mutex::new(TxSlot {
                tx: Some(tx),
                needs_savepoint: false,
                deferred: DeferredStatements::default(),
            })),
            statements: None,
            collects_deferred: false,
        }
    }

    /// Collects the deferred statements of all calls, if `is_on`. [`SharedTx::run_collected`] runs
    /// them before the commit.
    pub(crate) fn collecting_deferred(self, is_on: bool) -> Self {
        SharedTx {
            collects_deferred: is_on,
            ..self
        }
    }

    /// Records the statements of guests from now on, if `is_on`.
    pub(crate) fn traced(self, is_on: bool) -> Self {
        SharedTx {
            statements: is_on.then(StatementLog::default),
            ..self
        }
    }

    /// Takes the recorded statements out.
    pub(crate) fn take_statements(&self) -> Statements {
        let log = self.statements.as_ref();
        let statements = log.map(|log| log.lock().unwrap_or_else(PoisonError::into_inner));
        statements
            .map(|mut statements| std::mem::take(&mut *statements))
            .unwrap_or_default()
    }

    fn begin_statement(&self, text: &str) -> Option<RunningStatement> {
        let log = self.statements.as_ref()?;
        Some(RunningStatement::start(log, text))
    }

    /// Takes the transaction out. Waits for a statement that outlived its guest. A transaction with
    /// deferred statements can only be rolled back.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if it was taken before.
    pub(crate) async fn take_tx(&self) -> Result<Tx, StoreError> {
        let missing = || StoreError::Unavailable(anyhow::anyhow!("the transaction is missing"));
        let mut slot = self.slot.lock().await;
        let mut tx = slot.tx.take().ok_or_else(missing)?;
        if !slot.deferred.queue.is_empty() {
            tx.fail("deferred statements did not run");
        }
        Ok(tx)
    }

    /// Begins the next call of a guest.
    pub(crate) async fn begin_call(&self) {
        self.slot.lock().await.deferred.begin_call();
    }

    /// Drops the deferred statements of a call that failed.
    pub(crate) async fn drop_deferred(&self) {
        self.slot.lock().await.deferred.drop_own();
    }

    /// Takes the error of a deferred statement of an earlier call, which spoiled the transaction
    /// during the last one.
    pub(crate) async fn take_earlier_error(&self) -> Option<SqlError> {
        self.slot.lock().await.deferred.earlier_error.take()
    }

    /// Runs the collected statements of all calls.
    ///
    /// # Errors
    /// Outer: the database is unavailable. Inner: it refused one of them, and the transaction can
    /// only be rolled back.
    pub(crate) async fn run_collected(&self) -> anyhow::Result<Result<(), SqlError>> {
        let mut slot = self.slot.lock().await;
        if slot.deferred.queue.is_empty() {
            return Ok(Ok(()));
        }
        slot.deferred.own_from = 0;
        slot.run_deferred().await
    }

    /// Starts the next item. Its savepoint is set before its first statement.
    pub(crate) async fn begin_item(&self) {
        self.slot.lock().await.needs_savepoint = true;
    }

    /// Like [`SharedTx::begin_item`], for an item that only reads.
    /// [`SharedTx::end_read_only_item`] ends it.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn begin_read_only_item(&self) -> anyhow::Result<()> {
        let mut slot = self.slot.lock().await;
        slot.needs_savepoint = false;
        Ok(slot.tx()?.read_only_savepoint().await?)
    }

    /// Rolls back to the beginning of an item that only reads. Waits for a statement that outlived
    /// its guest.
    ///
    /// # Errors
    /// The transaction can only be rolled back as a whole.
    pub(crate) async fn end_read_only_item(&self) -> anyhow::Result<()> {
        Ok(self.slot.lock().await.tx()?.end_read_only().await?)
    }

    /// Claims the key of a request, see [`Tx::claim_requests`].
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn claim_request(&self, key: &RequestKey) -> anyhow::Result<ClaimedRequest> {
        let claimed = self.slot.lock().await.tx()?.claim_requests(&[key]).await?;
        Ok(claimed.into_iter().next().unwrap_or(ClaimedRequest::Fresh))
    }

    /// Stores the response to a claimed key, see [`Tx::store_responses`].
    ///
    /// # Errors
    /// The database failed.
    pub(crate) async fn store_response(&self, kept: KeptResponse<'_>) -> anyhow::Result<()> {
        Ok(self
            .slot
            .lock()
            .await
            .tx()?
            .store_responses(&[kept])
            .await?)
    }

    /// Rolls back all statements since [`SharedTx::begin_item`]. Waits for a statement that
    /// outlived its guest. Returns false if only the whole transaction can be rolled back.
    ///
    /// # Errors
    /// The rollback failed for another reason.
    pub(crate) async fn undo_item(&self) -> anyhow::Result<bool> {
        let mut slot = self.slot.lock().await;
        slot.deferred.drop_own();
        if slot.needs_savepoint {
            return Ok(true);
        }
        match slot.tx()?.rollback_to_savepoint().await {
            Ok(()) => Ok(true),
            Err(StoreError::Refused(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs one operation of a guest in a task of its own. A guest that is stopped while it waits
    /// for the lock never starts the operation. A guest that is stopped later leaves the operation
    /// running, and the next user of the lock waits for it.
    async fn with_tx<T, F>(&self, operation: F) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: for<'d> FnOnce(&'d mut TxSlot) -> BoxFuture<'d, anyhow::Result<T>> + Send + 'static,
    {
        let mut slot = Arc::clone(&self.slot).lock_owned().await;
        let task = tokio::spawn(async move { operation(&mut slot).await });
        task.await.context("run a database operation")?
    }
}

#[async_trait]
impl Database for SharedTx {
    fn dialect(&self) -> Dialect {
        self.dialect
    }

    async fn query(
        &self,
        statement: String,
        params: Vec<Value>,
        limits: SqlLimits,
    ) -> anyhow::Result<Result<Rows, SqlError>> {
        let running = self.begin_statement(&statement);
        let queried = self.with_tx(move |slot| {
            Box::pin(async move {
                if let Err(error) = slot.run_deferred().await? {
                    return Ok(Err(error));
                }
                let tx = slot.item_tx().await?;
                Ok(tx.query(&statement, &params, limits).await?)
            })
        });
        let queried = queried.await;
        if let Some(running) = running {
            running.finish(&queried);
        }
        queried
    }

    async fn execute(
        &self,
        statement: String,
        params: Vec<Value>,
    ) -> anyhow::Result<Result<u64, SqlError>> {
        let running = self.begin_statement(&statement);
        let executed = self.with_tx(move |slot| {
            Box::pin(async move {
                if let Err(error) = slot.run_deferred().await? {
                    return Ok(Err(error));
                }
                Ok(slot.item_tx().await?.execute(&statement, &params).await?)
            })
        });
        let executed = executed.await;
        if let Some(running) = running {
            running.finish(&executed);
        }
        fault::point(fault::MID_GUEST);
        executed
    }

    async fn defer(
        &self,
        statement: String,
        params: Vec<Value>,
    ) -> anyhow::Result<Result<Deferral, SqlError>> {
        // Checking and queueing do not reach the database, so they may be stopped at any point.
        let mut slot = self.slot.lock().await;
        match slot.tx()?.check_deferred(statement, params).await? {
            Ok(statement) => slot.deferred.push(statement),
            Err(error) => return Ok(Err(error)),
        }
        let is_full = slot.deferred.is_full();
        drop(slot);
        match is_full {
            true => Ok(self.run_deferred().await?.map(|()| Deferral::Ran)),
            false => Ok(Ok(Deferral::Queued)),
        }
    }

    async fn run_deferred(&self) -> anyhow::Result<Result<(), SqlError>> {
        let running = self.begin_statement(DEFERRED_STATEMENTS);
        let ran = self
            .with_tx(|slot| Box::pin(async move { slot.run_deferred().await }))
            .await;
        if let Some(running) = running {
            running.finish(&ran);
        }
        fault::point(fault::MID_GUEST);
        ran
    }

    async fn end_call(&self) -> anyhow::Result<Result<(), SqlError>> {
        match self.collects_deferred {
            true => Ok(Ok(())),
            false => self.run_deferred().await,
        }
    }

    async fn load_state(&self, key: String) -> anyhow::Result<StateSlot> {
        let found = self
            .with_tx(move |slot| Box::pin(async move { Ok(slot.tx()?.load_state(&[key]).await?) }))
            .await?;
        Ok(found
            .into_iter()
            .next()
            .map(|(_, slot)| slot)
            .unwrap_or_default())
    }

    async fn list_state(
        &self,
        prefix: String,
        after: String,
        most: u32,
    ) -> anyhow::Result<Vec<String>> {
        self.with_tx(move |slot| {
            Box::pin(async move { Ok(slot.tx()?.list_state(&prefix, &after, most).await?) })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SqliteStore, Store, WorkerMigration};
    use futures::FutureExt as _;

    const LIMITS: SqlLimits = SqlLimits {
        rows: 10,
        bytes: 1_000,
    };

    async fn insert(shared_tx: &SharedTx, text: &str) -> anyhow::Result<Result<u64, SqlError>> {
        shared_tx
            .execute(
                "insert into effect values ($1)".to_owned(),
                vec![Value::Text(text.to_owned())],
            )
            .await
    }

    /// Runs an item that takes effect. Then runs an item that is stopped at its statement after
    /// `before` earlier statements, and rolls it back. Then runs a third item. Returns the rows of
    /// the transaction.
    async fn effects_around_a_stop(before: usize) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("test.db"))
            .await
            .map(Store::from)
            .unwrap();
        let digest = "0".repeat(64);
        store.put_component(&digest, b"").await.unwrap();
        let tables = WorkerMigration {
            name: "0001.sql".to_owned(),
            sql: "create table effect (what text)".to_owned(),
        };
        store
            .deploy("test", &digest, "{}", &[tables])
            .await
            .unwrap();
        let shared_tx = SharedTx::new(
            Dialect::Sqlite,
            store
                .begin("test", std::time::Duration::from_secs(10))
                .await
                .unwrap(),
        );

        shared_tx.begin_item().await;
        insert(&shared_tx, "first").await.unwrap().unwrap();

        shared_tx.begin_item().await;
        for _ in 0..before {
            insert(&shared_tx, "stopped").await.unwrap().unwrap();
        }
        assert!(
            insert(&shared_tx, "stopped").now_or_never().is_none(),
            "the statement finished before it was stopped"
        );
        assert!(
            shared_tx.undo_item().await.unwrap(),
            "the item was not rolled back"
        );

        shared_tx.begin_item().await;
        insert(&shared_tx, "third").await.unwrap().unwrap();
        let rows = shared_tx
            .query("select what from effect".to_owned(), Vec::new(), LIMITS)
            .await
            .unwrap()
            .unwrap();
        shared_tx.take_tx().await.unwrap().rollback().await;
        rows.rows.into_iter().flatten().collect()
    }

    /// Runs on a single-threaded runtime, where the task spawned last runs first.
    #[test]
    fn a_statement_of_a_stopped_guest_is_undone_with_its_item() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        for before in [0, 1, 2] {
            let effects = runtime
                .block_on(runtime.spawn(effects_around_a_stop(before)))
                .unwrap();
            assert_eq!(
                effects,
                ["first", "third"].map(|what| Value::Text(what.to_owned())),
                "after {before} statements"
            );
        }
    }
}
