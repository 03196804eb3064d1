//! Guest statements: filtered, typed parameters and results, enforced limits.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{Arguments, Either, Executor, Row};

use super::errors;
use super::guest_values::{self, Parameter};
use super::session::{Purpose, Session, Sessions};
use crate::model::sql::{
    self, Dialect, Functions, Rows, SqlError, SqlLimits, StatementFacts, Value,
};
use crate::store::error::Doing as _;
use crate::store::guest_statement::{
    Prepared, RowCollector, StatementOutcome, changed_rows, prepare,
};
use crate::store::{BrokenStatement, Result, StoreError};

/// How long after its time limit the host terminates a statement that the server did not cancel.
const GRACE: Duration = Duration::from_secs(1);

/// The environment of guests' statements.
#[derive(Clone)]
pub(in crate::store) struct Guests {
    /// The functions that the filter permits; `None` without the filter.
    pub functions: Option<Arc<Functions>>,
    /// The source of platform transactions.
    pub platform: Sessions,
    /// The source of guests' transactions.
    pub sessions: Sessions,
}

/// Checks a statement without running it.
pub(in crate::store) async fn check(
    guests: &Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<(), SqlError> {
    prepare(guests, statement, params, check_and_bind)
        .await
        .map(drop)
}

pub(in crate::store) async fn query(
    session: &mut Session,
    guests: &Guests,
    statement: &str,
    params: &[Value],
    limits: SqlLimits,
) -> Result<StatementOutcome<Rows>> {
    let Prepared {
        text, arguments, ..
    } = match prepare(guests, statement, params, check_and_bind).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    run_with_deadline(session, guests, async |session| {
        fetch(session, text, arguments, limits).await
    })
    .await
}

pub(in crate::store) async fn execute(
    session: &mut Session,
    guests: &Guests,
    statement: &str,
    params: &[Value],
) -> Result<StatementOutcome<u64>> {
    let Prepared {
        text,
        arguments,
        facts,
    } = match prepare(guests, statement, params, check_and_bind).await {
        Ok(prepared) => prepared,
        Err(error) => return Ok(StatementOutcome::NotRun(error)),
    };
    let run = async |session: &mut Session| match session
        .guest_query(text, arguments)
        .execute(session.connection())
        .await
    {
        Ok(result) => Ok(changed_rows(facts.changes_rows, result.rows_affected())),
        Err(error) => failed(error),
    };
    run_with_deadline(session, guests, run).await
}

/// Runs a statement, and terminates its backend if it does not return in time. The server's own
/// limit is a session setting, which a statement could change. The statement's future is never
/// dropped.
pub(super) async fn run_with_deadline<T>(
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
    let mut rows = RowCollector::new(limits);
    loop {
        match stream.try_next().await {
            Ok(Some(Either::Left(_))) => {}
            Ok(Some(Either::Right(row))) => {
                if let Err(error) = rows.add(&row, received_size(&row), guest_values::decode) {
                    return Ok(StatementOutcome::ConnectionBroken(error));
                }
            }
            Ok(None) => return rows.finish(),
            Err(error) => return failed(error),
        }
    }
}

pub(super) fn failed<T>(error: sqlx::Error) -> Result<StatementOutcome<T>> {
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

/// Checks a statement and binds its parameters. Its text ends in a comment with the types of the
/// parameters: a connection caches prepared statements by text, and one prepared for other types
/// would misread them.
fn check_and_bind(
    guests: &Guests,
    statement: &str,
    params: &[Value],
) -> std::result::Result<Prepared<PgArguments>, SqlError> {
    let facts = match guests.functions.as_deref() {
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

/// The size of a row as it came from the server.
fn received_size(row: &PgRow) -> usize {
    let size = |at| {
        let raw = row.try_get_raw(at).ok()?;
        raw.as_bytes().ok().map(<[u8]>::len)
    };
    (0..row.len()).filter_map(size).sum()
}
