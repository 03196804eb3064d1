//! Guest statements: filtered, typed parameters and results, enforced limits.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{Arguments, Column, Either, Executor, Row};

use super::errors::{self, Doing};
use super::guest_values::{self, Parameter};
use super::session::{Purpose, Session, Sessions};
use crate::model::sql::{
    self, Dialect, Functions, Rows, SqlError, SqlLimits, StatementFacts, Value,
};
use crate::store::{BrokenStatement, Result, StoreError};

/// How long after its time limit the host terminates a statement that the server did not cancel.
const GRACE: Duration = Duration::from_secs(1);

/// The environment of guests' statements.
#[derive(Clone)]
pub(super) struct Guests {
    /// The functions that the filter permits; `None` without the filter.
    pub functions: Option<Arc<Functions>>,
    /// The source of platform transactions.
    pub platform: Sessions,
    /// The source of guests' transactions.
    pub sessions: Sessions,
}

/// A checked statement with its parameters.
struct Prepared {
    text: String,
    arguments: PgArguments,
    facts: StatementFacts,
}

/// The outcome of a guest's statement.
pub(super) enum StatementOutcome<T> {
    Done(T),
    /// It did not reach the database.
    NotRun(SqlError),
    /// The database refused it, and the transaction is aborted.
    Failed(SqlError),
    /// The connection must not be used again: the result was not read to the end, or the prepared
    /// statement no longer fits the tables.
    ConnectionBroken(SqlError),
}

pub(super) async fn query(
    session: &mut Session,
    guests: &Guests,
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
    run_with_deadline(session, guests, async |session| {
        fetch(session, text, arguments, limits).await
    })
    .await
}

pub(super) async fn execute(
    session: &mut Session,
    guests: &Guests,
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
    let run = async |session: &mut Session| match session
        .guest_query(text, arguments)
        .execute(session.connection())
        .await
    {
        Ok(result) if facts.changes_rows => Ok(StatementOutcome::Done(result.rows_affected())),
        Ok(_) => Ok(StatementOutcome::Done(0)),
        Err(error) => failed(error),
    };
    run_with_deadline(session, guests, run).await
}

/// Runs a statement, and terminates its backend if it does not return in time. The server's own
/// limit is a session setting, which a statement could change. The statement's future is never
/// dropped.
async fn run_with_deadline<T>(
    session: &mut Session,
    guests: &Guests,
    run: impl AsyncFnOnce(&mut Session) -> Result<StatementOutcome<T>>,
) -> Result<StatementOutcome<T>> {
    let process = session.process();
    let overdue = tokio::time::sleep(session.guest_time() + GRACE);
    let mut running = std::pin::pin!(run(session));
    tokio::select! {
        biased;
        outcome = &mut running => return outcome,
        () = overdue => {}
    }
    let terminated = terminate(&guests.platform, process).await;
    let outcome = running.await;
    match terminated {
        // The termination broke the connection.
        Ok(()) => Ok(StatementOutcome::ConnectionBroken(SqlError::Timeout)),
        Err(error) => outcome.and(Err(error)),
    }
}

async fn terminate(platform: &Sessions, process: i32) -> Result<()> {
    let mut session = platform.begin(Purpose::Platform).await?;
    let query = session.query("select pg_catalog.pg_terminate_backend($1)");
    query
        .bind(process)
        .execute(session.connection())
        .await
        .doing("terminate an overdue statement")?;
    session.commit().await
}

async fn fetch(
    session: &mut Session,
    statement: String,
    arguments: PgArguments,
    limits: SqlLimits,
) -> Result<StatementOutcome<Rows>> {
    let query = session.guest_query(statement, arguments);
    let mut stream = session.connection().fetch_many(query);
    let mut rows = Rows::default();
    let mut bytes = 0;
    loop {
        match stream.try_next().await {
            Ok(Some(Either::Left(_))) => {}
            Ok(Some(Either::Right(row))) => {
                if let Err(error) = add_row(&mut rows, &mut bytes, &row, limits) {
                    return Ok(StatementOutcome::ConnectionBroken(error));
                }
            }
            Ok(None) => return Ok(StatementOutcome::Done(rows)),
            Err(error) => return failed(error),
        }
    }
}

fn failed<T>(error: sqlx::Error) -> Result<StatementOutcome<T>> {
    let is_stale_plan = errors::is_stale_plan(&error);
    let is_loss = errors::is_connection_loss(&error);
    let error = errors::from_guest_statement(error).map_err(|error| match error {
        StoreError::Unavailable(cause) if is_loss => {
            StoreError::Unavailable(cause.context(BrokenStatement))
        }
        error => error,
    })?;
    Ok(if is_stale_plan {
        StatementOutcome::ConnectionBroken(error)
    } else {
        StatementOutcome::Failed(error)
    })
}

/// Checks a statement and binds its parameters, large ones off the async threads.
async fn prepare(
    guests: &Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared, SqlError> {
    if !sql::are_large(params) {
        return prepare_here(guests.functions.as_deref(), statement, params);
    }
    let (functions, statement, params) = (
        guests.functions.clone(),
        statement.to_owned(),
        params.to_vec(),
    );
    let prepared = tokio::task::spawn_blocking(move || {
        prepare_here(functions.as_deref(), &statement, &params)
    });
    prepared
        .await
        .unwrap_or_else(|error| Err(SqlError::InvalidParameter(error.to_string())))
}

/// Checks a statement and binds its parameters. Its text ends in a comment with the types of the
/// parameters: a connection caches prepared statements by text, and one prepared for other types
/// would misread them.
fn prepare_here(
    functions: Option<&Functions>,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared, SqlError> {
    let facts = match functions {
        Some(functions) => {
            let facts = sql::check_statement(statement, Dialect::Postgres, Some(functions))?;
            sql::check_count(&facts, params.len())?;
            facts
        }
        // Without the filter, only the server checks the statement.
        None => StatementFacts::of(statement, Dialect::Postgres),
    };
    if params.len() > usize::from(u16::MAX) {
        return Err(SqlError::InvalidParameter(format!(
            "a statement can have at most {} parameters",
            u16::MAX
        )));
    }
    let mut text = format!("{statement}\n--");
    let mut arguments = PgArguments::default();
    for value in params {
        let parameter = Parameter::of(value)?;
        text.push(parameter.type_code());
        arguments
            .add(parameter)
            .map_err(|error| SqlError::InvalidParameter(error.to_string()))?;
    }
    Ok(Prepared {
        text,
        arguments,
        facts,
    })
}

fn add_row(
    rows: &mut Rows,
    bytes: &mut usize,
    row: &PgRow,
    limits: SqlLimits,
) -> std::result::Result<(), SqlError> {
    if rows.rows.len() >= limits.rows {
        return Err(SqlError::TooLarge(format!(
            "the result has more than {} rows",
            limits.rows
        )));
    }

    // Check the received size before any value is copied.
    let came: usize = (0..row.columns().len())
        .map(|at| {
            row.try_get_raw(at)
                .ok()
                .and_then(|raw| raw.as_bytes().ok().map(<[u8]>::len))
                .unwrap_or_default()
        })
        .sum();
    let too_large =
        || SqlError::TooLarge(format!("the result is larger than {} bytes", limits.bytes));
    if came > limits.bytes {
        return Err(too_large());
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
        return Err(too_large());
    }
    rows.rows.push(values);
    Ok(())
}
