//! Guest statements: checked, bound, read by storage class, stopped at their limits.

use futures::TryStreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Column, Either, Executor, Row};

use super::session::Session;
use super::{errors, guest_values};
use crate::sql::{self, Dialect, Rows, SqlError, SqlLimits, Value};
use crate::store::Result;

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
    statement: &str,
    params: &[Value],
    limits: SqlLimits,
) -> Result<Outcome<Rows>> {
    let arguments = match prepare(statement, params) {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Outcome::NotRun(error)),
    };
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
            Err(error) => return errors::of_guest(error).map(Outcome::Failed),
        }
    }
}

pub(super) async fn execute(session: &mut Session, statement: &str, params: &[Value]) -> Result<Outcome<u64>> {
    let arguments = match prepare(statement, params) {
        Ok(prepared) => prepared,
        Err(error) => return Ok(Outcome::NotRun(error)),
    };
    let changes_rows = sql::changes_rows(statement, Dialect::Sqlite);
    let query = sqlx::query_with(AssertSqlSafe(statement), arguments);
    let connection = session.connection().map_err(|error| errors::of_statement(error, "run a guest's statement"))?;
    match query.execute(connection).await {
        Ok(result) if changes_rows => Ok(Outcome::Done(result.rows_affected())),
        Ok(_) => Ok(Outcome::Done(0)),
        Err(error) => errors::of_guest(error).map(Outcome::Failed),
    }
}

/// Checks a statement and binds its parameters.
fn prepare(statement: &str, params: &[Value]) -> std::result::Result<SqliteArguments, SqlError> {
    sql::check_statement(statement, Dialect::Sqlite)?;
    sql::check_platform_names(statement, Dialect::Sqlite)?;
    // SQLite would take what is missing for null.
    let highest = sql::highest_placeholder(statement, Dialect::Sqlite);
    if highest > params.len() {
        return Err(SqlError::InvalidParameter(format!(
            "the statement has a placeholder ${highest}, but {} parameters came with it",
            params.len()
        )));
    }
    guest_values::bind(params)
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
