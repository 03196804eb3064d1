//! The transaction of a batch, shared by its guests.

use std::sync::{Arc, PoisonError};

use anyhow::Context as _;
use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::sync::Mutex;

use super::trace::{RunningStatement, StatementLog, Statements};
use crate::fault;
use crate::guest::Database;
use crate::model::keyed_state::StateSlot;
use crate::model::request::RequestKey;
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::store::{ClaimedRequest, KeptResponse, StoreError, Tx};

/// A transaction that the guests of a batch share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SharedTx {
    dialect: Dialect,
    /// The lock gives exclusive access to the transaction. An operation holds it from start to end.
    /// A stopped guest therefore cannot run a statement after its item was rolled back.
    slot: Arc<Mutex<TxSlot>>,
    /// The statements of the running guest, if traces are on.
    statements: Option<StatementLog>,
}

/// The transaction and its savepoint state.
struct TxSlot {
    /// `None` after [`SharedTx::take_tx`].
    tx: Option<Tx>,
    /// Whether the next statement needs a savepoint first.
    needs_savepoint: bool,
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
}

impl SharedTx {
    pub(crate) fn new(dialect: Dialect, tx: Tx) -> Self {
        SharedTx {
            dialect,
            slot: Arc::new(Mutex::new(TxSlot {
                tx: Some(tx),
                needs_savepoint: false,
            })),
            statements: None,
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

    /// Takes the transaction out. Waits for a statement that outlived its guest.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if it was taken before.
    pub(crate) async fn take_tx(&self) -> Result<Tx, StoreError> {
        let missing = || StoreError::Unavailable(anyhow::anyhow!("the transaction is missing"));
        self.slot.lock().await.tx.take().ok_or_else(missing)
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
                Ok(slot
                    .item_tx()
                    .await?
                    .query(&statement, &params, limits)
                    .await?)
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
            Box::pin(async move { Ok(slot.item_tx().await?.execute(&statement, &params).await?) })
        });
        let executed = executed.await;
        if let Some(running) = running {
            running.finish(&executed);
        }
        fault::point(fault::MID_GUEST);
        executed
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
