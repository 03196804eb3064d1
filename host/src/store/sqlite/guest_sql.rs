//! Guest statements: checked, bound, decoded by storage class, stopped at their limits.

use super::errors::Doing;
use std::time::Duration;

use futures::TryStreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Column, Either, Executor, Row};

use super::session::Session;
use super::{errors, guest_values};
use crate::model::sql::{self, Dialect, Rows, SqlError, SqlLimits, StatementFacts, Value};
use crate::store::Result;

/// The conditions under which guest statements run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guests {
    /// Whether the statement filter applies.
    pub has_filter: bool,
    /// How long one statement may take.
    pub time: Duration,
    /// Whether their transaction is read-only.
    pub reads_only: bool,
}

/// A checked statement with its parameters.
struct Prepared {
    text: String,
    arguments: SqliteArguments,
    facts: StatementFacts,
}

/// The outcome of a guest's statement.
pub(super) enum StatementOutcome<T> {
    Done(T),
    /// It did not reach the database.
    NotRun(SqlError),
    /// It failed, or its result was not read to the end. The transaction can only be rolled back.
    Failed(SqlError),
}

/// Runs a guest's statement and returns its rows, up to `limits`.
pub(super) async fn query(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
    limits: SqlLimits,
) -> Result<StatementOutcome<Rows>> {
    let Prepared {
        text, arguments, ..
    } = match prepare(guests, statement, params).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    session.begin_guest_statement(guests.time).await?;
    let outcome = fetch(session, text, arguments, limits, guests.reads_only).await;
    end_statement(session, outcome).await
}

/// Runs a guest's statement and returns the number of changed rows.
pub(super) async fn execute(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> Result<StatementOutcome<u64>> {
    let Prepared {
        text,
        arguments,
        facts,
    } = match prepare(guests, statement, params).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    session.begin_guest_statement(guests.time).await?;
    let query = sqlx::query_with(AssertSqlSafe(text), arguments);
    let connection = session.connection().doing("run a guest's statement")?;
    let outcome = match query.execute(connection).await {
        Ok(result) if facts.changes_rows => Ok(StatementOutcome::Done(result.rows_affected())),
        Ok(_) => Ok(StatementOutcome::Done(0)),
        Err(error) => {
            errors::from_guest_statement(error, guests.reads_only).map(StatementOutcome::Failed)
        }
    };
    end_statement(session, outcome).await
}

async fn fetch(
    session: &mut Session,
    statement: String,
    arguments: SqliteArguments,
    limits: SqlLimits,
    reads_only: bool,
) -> Result<StatementOutcome<Rows>> {
    let query = sqlx::query_with(AssertSqlSafe(statement), arguments);
    let connection = session.connection().doing("run a guest's statement")?;
    let mut stream = connection.fetch_many(query);
    let mut rows = Rows::default();
    let mut bytes = 0;
    loop {
        match stream.try_next().await {
            Ok(Some(Either::Left(_))) => {}
            Ok(Some(Either::Right(row))) => {
                if let Err(error) = add_row(&mut rows, &mut bytes, &row, limits) {
                    return Ok(StatementOutcome::Failed(error));
                }
            }
            Ok(None) => return Ok(StatementOutcome::Done(rows)),
            Err(error) => {
                return errors::from_guest_statement(error, reads_only)
                    .map(StatementOutcome::Failed);
            }
        }
    }
}

/// Ends a guest's statement. One that ended the transaction has failed, regardless of its own
/// result.
async fn end_statement<T>(
    session: &mut Session,
    outcome: Result<StatementOutcome<T>>,
) -> Result<StatementOutcome<T>> {
    let is_open = session.end_guest_statement().await?;
    Ok(match outcome? {
        StatementOutcome::Done(_) if !is_open => StatementOutcome::Failed(
            SqlError::TransactionFailed("the statement ended the transaction".to_owned()),
        ),
        outcome => outcome,
    })
}

/// Checks a statement and binds its parameters, large ones off the async threads.
async fn prepare(
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared, SqlError> {
    if !sql::are_large(params) {
        return prepare_here(guests, statement, params);
    }
    let (statement, params) = (statement.to_owned(), params.to_vec());
    let prepared = tokio::task::spawn_blocking(move || prepare_here(guests, &statement, &params));
    prepared
        .await
        .unwrap_or_else(|error| Err(SqlError::InvalidParameter(error.to_string())))
}

/// Checks a statement and binds its parameters. The text opens with a comment, because a connection
/// caches prepared statements by their text. The platform's own were prepared without the
/// authorizer.
fn prepare_here(
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared, SqlError> {
    let facts = match guests.has_filter {
        true => sql::check_statement(statement, Dialect::Sqlite, None)?,
        false => StatementFacts::of(statement, Dialect::Sqlite),
    };
    // SQLite would read a missing parameter as null.
    if guests.has_filter || facts.highest_placeholder > params.len() {
        sql::check_count(&facts, params.len())?;
    }
    Ok(Prepared {
        text: format!("/* a worker's */ {statement}"),
        arguments: guest_values::bind(params)?,
        facts,
    })
}

fn add_row(
    rows: &mut Rows,
    bytes: &mut usize,
    row: &SqliteRow,
    limits: SqlLimits,
) -> std::result::Result<(), SqlError> {
    if rows.rows.len() >= limits.rows {
        return Err(SqlError::TooLarge(format!(
            "the result has more than {} rows",
            limits.rows
        )));
    }
    if rows.columns.is_empty() {
        rows.columns = row
            .columns()
            .iter()
            .map(|column| column.name().to_owned())
            .collect();
    }
    let values = (0..row.columns().len())
        .map(|at| {
            let value = guest_values::decode(row, at)?;
            *bytes += value.size();
            Ok(value)
        })
        .collect::<std::result::Result<Vec<_>, SqlError>>()?;
    if *bytes > limits.bytes {
        return Err(SqlError::TooLarge(format!(
            "the result is larger than {} bytes",
            limits.bytes
        )));
    }
    rows.rows.push(values);
    Ok(())
}
