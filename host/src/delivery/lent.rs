//! The transaction of a batch in the hands of its guests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::fault;
use crate::guest::Database;
use crate::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::state::StateEntry;
use crate::store::{StoreError, Tx};

/// The transaction, lent to the guests of a batch.
#[derive(Clone)]
pub(super) struct Lent {
    dialect: Dialect,
    tx: Arc<Mutex<Option<Box<dyn Tx>>>>,
    /// Whether the next statement needs a savepoint before it.
    wants_savepoint: Arc<AtomicBool>,
}

impl Lent {
    pub(super) fn new(dialect: Dialect, tx: Box<dyn Tx>) -> Self {
        Lent { dialect, tx: Arc::new(Mutex::new(Some(tx))), wants_savepoint: Arc::default() }
    }

    /// Takes the transaction back, once a statement that outlived its guest has ended.
    pub(super) async fn take_back(&self) -> Result<Box<dyn Tx>, StoreError> {
        let missing = || StoreError::Unavailable(anyhow::anyhow!("the transaction went missing"));
        self.tx.lock().await.take().ok_or_else(missing)
    }

    /// From here on statements are the next member's: it gets a savepoint when it runs the first.
    pub(super) fn begin_member(&self) {
        self.wants_savepoint.store(true, Ordering::Release);
    }

    /// Takes back what the member did since [`Lent::begin_member`]; false when only the whole transaction can be.
    pub(super) async fn undo_member(&self) -> anyhow::Result<bool> {
        if self.wants_savepoint.load(Ordering::Acquire) {
            return Ok(true);
        }
        match self.on_tx(|tx| tx.undo()).await {
            Ok(()) => Ok(true),
            Err(error) => match error.downcast::<StoreError>() {
                Ok(StoreError::Refused(_)) => Ok(false),
                Ok(error) => Err(error.into()),
                Err(error) => Err(error),
            },
        }
    }

    /// Like [`Lent::on_tx`], for a guest's statement.
    async fn on_tx_with_savepoint<T, F>(&self, operation: F) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: for<'t> FnOnce(&'t mut dyn Tx) -> futures::future::BoxFuture<'t, Result<T, StoreError>> + Send + 'static,
    {
        if self.wants_savepoint.swap(false, Ordering::AcqRel) {
            self.on_tx(|tx| tx.savepoint()).await?;
        }
        self.on_tx(operation).await
    }

    /// Runs one operation in a task of its own: if the guest is stopped while it waits, the operation still ends
    /// properly, and whoever takes the transaction next waits for that.
    async fn on_tx<T, F>(&self, operation: F) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: for<'t> FnOnce(&'t mut dyn Tx) -> futures::future::BoxFuture<'t, Result<T, StoreError>> + Send + 'static,
    {
        let tx = Arc::clone(&self.tx);
        let task = tokio::spawn(async move {
            let mut guard = tx.lock().await;
            match guard.as_mut() {
                Some(tx) => operation(tx.as_mut()).await.map_err(anyhow::Error::from),
                None => Err(anyhow::anyhow!("the transaction is over")),
            }
        });
        task.await.context("run a database operation")?
    }
}

#[async_trait]
impl Database for Lent {
    fn dialect(&self) -> Dialect {
        self.dialect
    }

    async fn query(
        &self,
        statement: String,
        params: Vec<Value>,
        limits: SqlLimits,
    ) -> anyhow::Result<Result<Rows, SqlError>> {
        self.on_tx_with_savepoint(move |tx| Box::pin(async move { tx.query(&statement, &params, limits).await })).await
    }

    async fn execute(&self, statement: String, params: Vec<Value>) -> anyhow::Result<Result<u64, SqlError>> {
        let executed =
            self.on_tx_with_savepoint(move |tx| Box::pin(async move { tx.execute(&statement, &params).await })).await;
        fault::point(fault::MID_GUEST);
        executed
    }

    async fn load_state(&self, key: String) -> anyhow::Result<Option<StateEntry>> {
        let found = self.on_tx(move |tx| Box::pin(async move { tx.load_state(&[key]).await })).await?;
        Ok(found.into_iter().next().map(|(_, entry)| entry))
    }
}
