//! The transaction and the cache behind the imports of a guest.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::model::keyed_state::StateSlot;
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};

/// The transaction that `sql` and `state` of a guest use.
///
/// The outer error is that of the host, the inner error that of the guest. A started call completes
/// even when its future is dropped. A stopped guest therefore never leaves the transaction in the
/// middle of an operation.
#[async_trait]
pub trait Database: Send + Sync {
    /// The SQL dialect of the guest's statements.
    fn dialect(&self) -> Dialect;
    /// Runs a statement and returns its rows.
    ///
    /// # Errors
    /// Outer: the database is unavailable. Inner: it refused the statement, or the result exceeds
    /// `limits`.
    async fn query(
        &self,
        statement: String,
        params: Vec<Value>,
        limits: SqlLimits,
    ) -> DatabaseResult<Rows>;
    /// Runs a statement and returns the number of changed rows.
    ///
    /// # Errors
    /// Outer: the database is unavailable. Inner: it refused the statement.
    async fn execute(&self, statement: String, params: Vec<Value>) -> DatabaseResult<u64>;
    /// Checks a statement and queues it.
    ///
    /// # Errors
    /// Outer: the database is unavailable. Inner: the statement was refused, or the queue was full
    /// and a queued statement failed.
    async fn defer(&self, statement: String, params: Vec<Value>) -> DatabaseResult<Deferral>;
    /// Runs the queued statements.
    ///
    /// # Errors
    /// Outer: the database is unavailable. Inner: it refused one of them.
    async fn run_deferred(&self) -> DatabaseResult<()>;
    /// Ends a call that succeeded. Its queued statements run now, or together with those of later
    /// calls in the same transaction.
    ///
    /// # Errors
    /// Those of [`Database::run_deferred`].
    async fn end_call(&self) -> DatabaseResult<()>;
    /// The slot of a key of the worker's state, without an entry if the key does not exist.
    ///
    /// # Errors
    /// The database is unavailable.
    async fn load_state(&self, key: String) -> anyhow::Result<StateSlot>;
    /// The first `most` existing keys of the worker's state that begin with `prefix` and follow
    /// `after`, in byte order.
    ///
    /// # Errors
    /// The database is unavailable.
    async fn list_state(
        &self,
        prefix: String,
        after: String,
        most: u32,
    ) -> anyhow::Result<Vec<String>>;
}

/// The state of a deferred statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deferral {
    /// It is queued.
    Queued,
    /// The queue was full, so its statements have run.
    Ran,
}

/// The cache that a guest reads. An unavailable cache reads as empty and is never an error.
#[async_trait]
pub trait CacheReader: Send + Sync {
    /// The value under a key of the worker; `None` if it is missing or expired.
    async fn get(&self, key: &str) -> Option<CachedValue>;
}

/// A cached value with its tags.
#[derive(Debug, Clone)]
pub struct CachedValue {
    /// The bytes that the guest stored.
    pub value: Bytes,
    /// The tags that invalidate the value.
    pub tags: Arc<[String]>,
}

/// The outer error is that of the host, the inner error that of the guest.
pub type DatabaseResult<T> = anyhow::Result<Result<T, SqlError>>;
