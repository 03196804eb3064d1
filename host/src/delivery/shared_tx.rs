//! The transaction of a batch in the hands of its guests.

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::sync::Mutex;

use crate::fault;
use crate::guest::Database;
use crate::model::keyed_state::StateSlot;
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::store::{StoreError, Tx};

/// The transaction, shared by the guests of a batch.
#[derive(Clone)]
pub(super) struct SharedTx {
    dialect: Dialect,
    /// Whoever has the lock is alone with the transaction. An operation takes it before it begins and has it until it is
    /// done, so that nothing of a guest that was stopped can come after its item was undone.
    slot: Arc<Mutex<TxSlot>>,
}

/// The transaction, and where its present item stands.
struct TxSlot {
    /// None once it was taken back.
    tx: Option<Box<dyn Tx>>,
    /// Whether the next statement needs a savepoint before it.
    needs_savepoint: bool,
}

impl TxSlot {
    fn tx(&mut self) -> anyhow::Result<&mut dyn Tx> {
        Ok(self
            .tx
            .as_mut()
            .context("the transaction is over")?
            .as_mut())
    }

    /// The transaction, with a savepoint if this is the first statement of an item that wants one.
    async fn item_tx(&mut self) -> anyhow::Result<&mut dyn Tx> {
        if self.needs_savepoint {
            self.tx()?.savepoint().await?;
            self.needs_savepoint = false;
        }
        self.tx()
    }
}

impl SharedTx {
    pub(super) fn new(dialect: Dialect, tx: Box<dyn Tx>) -> Self {
        SharedTx {
            dialect,
            slot: Arc::new(Mutex::new(TxSlot {
                tx: Some(tx),
                needs_savepoint: false,
            })),
        }
    }

    /// Takes the transaction back, once a statement that outlived its guest has ended.
    pub(super) async fn take_tx(&self) -> Result<Box<dyn Tx>, StoreError> {
        let missing = || StoreError::Unavailable(anyhow::anyhow!("the transaction went missing"));
        self.slot.lock().await.tx.take().ok_or_else(missing)
    }

    /// From here on statements are the next item's: it gets a savepoint when it runs the first.
    pub(super) async fn begin_item(&self) {
        self.slot.lock().await.needs_savepoint = true;
    }

    /// Takes back what the item did since [`SharedTx::begin_item`], once a statement that outlived its guest has ended;
    /// false when only the whole transaction can be.
    pub(super) async fn undo_item(&self) -> anyhow::Result<bool> {
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

    /// Runs one operation of a guest in a task of its own: if the guest is stopped while it waits for the transaction, it
    /// never begins; if it is stopped later, the operation still ends properly, and whoever wants the transaction next
    /// waits for that.
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
        self.with_tx(move |slot| {
            Box::pin(async move {
                Ok(slot
                    .item_tx()
                    .await?
                    .query(&statement, &params, limits)
                    .await?)
            })
        })
        .await
    }

    async fn execute(
        &self,
        statement: String,
        params: Vec<Value>,
    ) -> anyhow::Result<Result<u64, SqlError>> {
        let executed = self.with_tx(move |slot| {
            Box::pin(async move { Ok(slot.item_tx().await?.execute(&statement, &params).await?) })
        });
        let executed = executed.await;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{SqliteStore, Store as _, WorkerMigration};
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

    /// An item that takes effect, then one that is stopped just when it asks for its statement after `before` others, and
    /// is undone, then a third one: what the transaction holds in the end.
    async fn effects_around_a_stop(before: usize) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("test.db"))
            .await
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
            "it was done before it could be stopped"
        );
        assert!(
            shared_tx.undo_item().await.unwrap(),
            "it could not be undone"
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

    /// On a task of a runtime with one thread, where what is spawned last runs first.
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
                "after {before}"
            );
        }
    }
}
