//! Guest statements: checked, bound, decoded by storage class, stopped at their limits.

use crate::store::error::Doing as _;
use std::time::Duration;

use futures::TryStreamExt;
use sqlx::sqlite::SqliteArguments;
use sqlx::{AssertSqlSafe, Either, Executor};

use super::session::Session;
use super::{errors, guest_values};
use crate::model::sql::{self, Dialect, Rows, SqlError, SqlLimits, StatementFacts, Value};
use crate::store::Result;
use crate::store::guest_statement::{
    Prepared, RowCollector, StatementOutcome, changed_rows, prepare,
};

/// The conditions under which guest statements run.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Guests {
    /// Whether the statement filter applies.
    pub has_filter: bool,
    /// How long one statement may take.
    pub time: Duration,
    /// Whether their transaction is read-only.
    pub reads_only: bool,
}

/// Checks a statement without running it.
pub(in crate::store) async fn check(
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<(), SqlError> {
    prepare(&guests, statement, params, check_and_bind)
        .await
        .map(drop)
}

/// Runs a guest's statement and returns its rows, up to `limits`.
pub(in crate::store) async fn query(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
    limits: SqlLimits,
) -> Result<StatementOutcome<Rows>> {
    let Prepared {
        text, arguments, ..
    } = match prepare(&guests, statement, params, check_and_bind).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    session.begin_guest_statement(guests.time).await?;
    let outcome = fetch(session, text, arguments, limits, guests.reads_only).await;
    end_statement(session, outcome).await
}

/// Runs a guest's statement and returns the number of changed rows.
pub(in crate::store) async fn execute(
    session: &mut Session,
    guests: Guests,
    statement: &str,
    params: &[Value],
) -> Result<StatementOutcome<u64>> {
    let Prepared {
        text,
        arguments,
        facts,
    } = match prepare(&guests, statement, params, check_and_bind).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    session.begin_guest_statement(guests.time).await?;
    let query = sqlx::query_with(AssertSqlSafe(text), arguments);
    let connection = session.connection().doing("run a guest's statement")?;
    let outcome = match query.execute(connection).await {
        Ok(result) => Ok(changed_rows(facts.changes_rows, result.rows_affected())),
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
    let mut rows = RowCollector::new(limits);
    loop {
        match stream.try_next().await {
            Ok(Some(Either::Left(_))) => {}
            Ok(Some(Either::Right(row))) => {
                if let Err(error) = rows.add(&row, 0, guest_values::decode) {
                    return Ok(StatementOutcome::Failed(error));
                }
            }
            Ok(None) => return rows.finish(),
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

/// Checks a statement and binds its parameters. The text opens with a comment, because a connection
/// caches prepared statements by their text. The platform's own were prepared without the
/// authorizer.
fn check_and_bind(
    guests: &Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared<SqliteArguments>, SqlError> {
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
