//! Guest statements: checked, bound, read by storage class, stopped at their limits.

use std::time::Duration;

use futures::TryStreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Column, Either, Executor, Row};

use super::session::Session;
use super::{errors, guest_values};
use crate::model::sql::{self, Dialect, Facts, Rows, SqlError, SqlLimits, Value};
use crate::store::Result;

/// Under which terms guests' statements run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guests {
    /// Whether they are filtered.
    pub has_filter: bool,
    /// How long one may take.
    pub time: Duration,
    /// Whether their transaction can but read.
    pub reads_only: bool,
}

/// A statement that may run.
struct Prepared {
    text: String,
    arguments: SqliteArguments,
    facts: Facts,
}

/// How a guest's statement ended.
pub(super) enum Outcome<T> {
    Done(T),
    /// It did not reach the database.
    NotRun(SqlError),
    /// It failed, or what it returned was not read to the end: the transaction can only be rolled back.
    Failed(SqlError),
}

pub(super) async fn query(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
    limits: SqlLimits,
) -> Result<Outcome<Rows>> {
    let Prepared { text, arguments, .. } = match prepare(guests, statement, params).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Outcome::NotRun(error)),
    };
    session.admit_guest(guests.time).await?;
    let outcome = fetch(session, text, arguments, limits, guests.reads_only).await;
    dismiss(session, outcome).await
}

pub(super) async fn execute(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> Result<Outcome<u64>> {
    let Prepared { text, arguments, facts } = match prepare(guests, statement, params).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Outcome::NotRun(error)),
    };
    session.admit_guest(guests.time).await?;
    let query = sqlx::query_with(AssertSqlSafe(text), arguments);
    let connection = session.connection().map_err(|error| errors::of_statement(error, "run a guest's statement"))?;
    let outcome = match query.execute(connection).await {
        Ok(result) if facts.changes_rows => Ok(Outcome::Done(result.rows_affected())),
        Ok(_) => Ok(Outcome::Done(0)),
        Err(error) => errors::of_guest(error, guests.reads_only).map(Outcome::Failed),
    };
    dismiss(session, outcome).await
}

async fn fetch(
    session: &mut Session,
    statement: String,
    arguments: SqliteArguments,
    limits: SqlLimits,
    reads_only: bool,
) -> Result<Outcome<Rows>> {
    let query = sqlx::query_with(AssertSqlSafe(statement), arguments);
    let connection = session.connection().map_err(|error| errors::of_statement(error, "run a guest's statement"))?;
    let mut stream = connection.fetch_many(query);
    let mut rows = Rows::default();
    let mut bytes = 0;
    loop {
        match stream.try_next().await {
            Ok(Some(Either::Left(_))) => {}
            Ok(Some(Either::Right(row))) => {
                if let Err(error) = add_row(&mut rows, &mut bytes, &row, limits) {
                    return Ok(Outcome::Failed(error));
                }
            }
            Ok(None) => return Ok(Outcome::Done(rows)),
            Err(error) => return errors::of_guest(error, reads_only).map(Outcome::Failed),
        }
    }
}

/// Ends the guest's turn. A statement that ended the transaction has failed, whatever it said itself.
async fn dismiss<T>(session: &mut Session, outcome: Result<Outcome<T>>) -> Result<Outcome<T>> {
    let is_open = session.dismiss_guest().await?;
    Ok(match outcome? {
        Outcome::Done(_) if !is_open => {
            Outcome::Failed(SqlError::TransactionFailed("the statement ended the transaction".to_owned()))
        }
        outcome => outcome,
    })
}

/// Checks a statement and binds its parameters, large ones off the async threads.
async fn prepare(guests: Guests, statement: &str, params: &[Value]) -> std::result::Result<Prepared, SqlError> {
    if !sql::are_large(params) {
        return prepare_here(guests, statement, params);
    }
    let (statement, params) = (statement.to_owned(), params.to_vec());
    let prepared = tokio::task::spawn_blocking(move || prepare_here(guests, &statement, &params));
    prepared.await.unwrap_or_else(|error| Err(SqlError::InvalidParameter(error.to_string())))
}

/// Checks a statement and binds its parameters. A comment opens its text: a connection keeps prepared statements by
/// their text, and those of the house were prepared with no wall around them.
fn prepare_here(guests: Guests, statement: &str, params: &[Value]) -> std::result::Result<Prepared, SqlError> {
    let facts = match guests.has_filter {
        true => sql::check_statement(statement, Dialect::Sqlite, None)?,
        false => Facts::of(statement, Dialect::Sqlite),
    };
    // SQLite would take what is missing for null.
    if guests.has_filter || facts.highest_placeholder > params.len() {
        sql::check_count(&facts, params.len())?;
    }
    Ok(Prepared { text: format!("/* a worker's */ {statement}"), arguments: guest_values::bind(params)?, facts })
}

fn add_row(
    rows: &mut Rows,
    bytes: &mut usize,
    row: &SqliteRow,
    limits: SqlLimits,
) -> std::result::Result<(), SqlError> {
    if rows.rows.len() >= limits.rows {
        return Err(SqlError::TooLarge(format!("the result has more than {} rows", limits.rows)));
    }
    if rows.columns.is_empty() {
        rows.columns = row.columns().iter().map(|column| column.name().to_owned()).collect();
    }
    let values = (0..row.columns().len())
        .map(|at| {
            let value = guest_values::decode(row, at)?;
            *bytes += value.size();
            Ok(value)
        })
        .collect::<std::result::Result<Vec<_>, SqlError>>()?;
    if *bytes > limits.bytes {
        return Err(SqlError::TooLarge(format!("the result is larger than {} bytes", limits.bytes)));
    }
    rows.rows.push(values);
    Ok(())
}
