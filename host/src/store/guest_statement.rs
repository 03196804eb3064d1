//! Guests' statements, alike on both databases: their outcome, and the limits on their rows.

use sqlx::{Column as _, Row};

use super::Result;
use crate::model::sql::{self, Rows, SqlError, SqlLimits, StatementFacts, Value};

/// A checked statement with its parameters.
pub(super) struct Prepared<A> {
    pub text: String,
    pub arguments: A,
    pub facts: StatementFacts,
}

/// A checked statement of a guest that runs later.
#[derive(Debug, Clone)]
pub struct DeferredStatement {
    pub(super) statement: String,
    pub(super) params: Vec<Value>,
}

impl DeferredStatement {
    /// Its approximate size in bytes.
    pub fn size(&self) -> usize {
        self.statement.len() + self.params.iter().map(Value::size).sum::<usize>()
    }
}

/// The first of several statements that failed.
#[derive(Debug)]
pub struct FailedStatement {
    /// Its position among them, from 0.
    pub position: usize,
    /// The error for its guest.
    pub error: SqlError,
}

type Prepare<A> = std::result::Result<Prepared<A>, SqlError>;

/// Checks a statement and binds its parameters with `prepare`, large ones off the async threads.
pub(super) async fn prepare<G, A>(
    guests: &G,
    statement: &str,
    params: &[Value],
    prepare: fn(&G, &str, &[Value]) -> Prepare<A>,
) -> Prepare<A>
where
    G: Clone + Send + 'static,
    A: Send + 'static,
{
    if !sql::are_large(params) {
        return prepare(guests, statement, params);
    }
    let (guests, statement, params) = (guests.clone(), statement.to_owned(), params.to_vec());
    let prepared = tokio::task::spawn_blocking(move || prepare(&guests, &statement, &params));
    prepared
        .await
        .unwrap_or_else(|error| Err(SqlError::InvalidParameter(error.to_string())))
}

/// The outcome of a guest's statement.
pub(super) enum StatementOutcome<T> {
    Done(T),
    /// It did not reach the database.
    NotRun(SqlError),
    /// It failed, or its result was not read to the end. The transaction can only be rolled back.
    Failed(SqlError),
    /// Like `Failed`, and the connection must not be used again: the result was not read to the
    /// end, or the prepared statement no longer fits the tables.
    ConnectionBroken(SqlError),
}

/// The number of changed rows; zero for a statement that changes none.
pub(super) fn changed_rows(changes_rows: bool, affected: u64) -> StatementOutcome<u64> {
    StatementOutcome::Done(if changes_rows { affected } else { 0 })
}

/// Collects the rows of a query within their limits.
pub(super) struct RowCollector {
    rows: Rows,
    bytes: usize,
    limits: SqlLimits,
}

impl RowCollector {
    pub fn new(limits: SqlLimits) -> Self {
        RowCollector {
            rows: Rows::default(),
            bytes: 0,
            limits,
        }
    }

    /// Adds a row, unless it exceeds a limit. `received` is its size before any value is copied, if
    /// known.
    pub fn add<R: Row>(
        &mut self,
        row: &R,
        received: usize,
        decode: impl Fn(&R, usize) -> std::result::Result<Value, SqlError>,
    ) -> std::result::Result<(), SqlError> {
        if self.rows.rows.len() >= self.limits.rows {
            return Err(SqlError::TooLarge(format!(
                "the result has more than {} rows",
                self.limits.rows
            )));
        }
        self.check_size(received)?;
        if self.rows.columns.is_empty() {
            let names = row.columns().iter().map(|column| column.name().to_owned());
            self.rows.columns = names.collect();
        }
        let values: std::result::Result<Vec<_>, SqlError> =
            (0..row.len()).map(|at| decode(row, at)).collect();
        let values = values?;
        self.bytes += values.iter().map(Value::size).sum::<usize>();
        self.check_size(self.bytes)?;
        self.rows.rows.push(values);
        Ok(())
    }

    fn check_size(&self, bytes: usize) -> std::result::Result<(), SqlError> {
        if bytes > self.limits.bytes {
            return Err(SqlError::TooLarge(format!(
                "the result is larger than {} bytes",
                self.limits.bytes
            )));
        }
        Ok(())
    }

    pub fn finish(self) -> Result<StatementOutcome<Rows>> {
        Ok(StatementOutcome::Done(self.rows))
    }
}
