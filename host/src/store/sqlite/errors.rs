//! The meaning of SQLite's errors for the host.

use sqlx::Error;

use crate::model::sql::{DatabaseError, SqlError};
use crate::store::StoreError;
use crate::store::error::{cause, sqlx_error};

// Primary result codes; see https://www.sqlite.org/rescode.html.
const ERROR: i32 = 1;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const NOMEM: i32 = 7;
const READONLY: i32 = 8;
const INTERRUPT: i32 = 9;
const IOERR: i32 = 10;
const CORRUPT: i32 = 11;
const FULL: i32 = 13;
const CANTOPEN: i32 = 14;
const PROTOCOL: i32 = 15;
const TOOBIG: i32 = 18;
const CONSTRAINT: i32 = 19;
const MISMATCH: i32 = 20;
const AUTH: i32 = 23;
const NOTADB: i32 = 26;

// Extended result codes.
const CONSTRAINT_COMMITHOOK: i32 = 531;

/// The error of a statement of the platform.
pub(in crate::store) fn from_statement(error: Error, context: &'static str) -> StoreError {
    let is_conflict = matches!(primary(&error), BUSY | LOCKED);
    let cause = cause(error).context(context);
    if is_conflict {
        StoreError::Conflict(cause)
    } else {
        StoreError::Unavailable(cause)
    }
}

/// The error of a platform statement that writes a guest's values. A value that the platform's
/// tables refuse is the guest's mistake.
pub(in crate::store) fn from_guest_values(error: StoreError) -> StoreError {
    let StoreError::Unavailable(cause) = error else {
        return error;
    };
    let is_of_value = |error: &Error| {
        matches!(primary(error), TOOBIG | CONSTRAINT | MISMATCH) && !is_commit_hook(error)
    };
    match sqlx_error(&cause) {
        Some(error) if is_of_value(error) => StoreError::Refused(cause),
        _ => StoreError::Unavailable(cause),
    }
}

/// The error of a savepoint. A missing savepoint means that a guest's statement ended the
/// transaction.
pub(in crate::store) fn from_savepoint(error: Error, context: &'static str) -> StoreError {
    match primary(&error) {
        ERROR => StoreError::Refused(cause(error).context(context)),
        _ => from_statement(error, context),
    }
}

/// The error of a commit. A commit that is refused because of the guest took no effect; any other
/// may have.
pub(in crate::store) fn from_commit(error: Error) -> StoreError {
    let refusal = match primary(&error) {
        ERROR if is_no_transaction(&error) => "a statement ended the transaction",
        CONSTRAINT => "a deferred constraint is violated",
        _ => return from_statement(error, "commit"),
    };
    StoreError::Refused(cause(error).context(refusal))
}

/// The error of a guest's statement: the outer one is the host's, the inner one the guest's. In a
/// read-only transaction (`reads_only`) a write is refused. In any other, that code means trouble
/// with the file.
pub(in crate::store) fn from_guest_statement(
    error: Error,
    reads_only: bool,
) -> Result<SqlError, StoreError> {
    let (code, primary) = (extended(&error), primary(&error));
    let Some(database) = error.as_database_error() else {
        return match error {
            Error::Encode(cause) => Ok(SqlError::InvalidParameter(cause.to_string())),
            error => Err(from_statement(error, "run a guest's statement")),
        };
    };
    let message = database.message().to_owned();
    let constraint = if primary == CONSTRAINT {
        constraint(&message)
    } else {
        None
    };
    let said = DatabaseError {
        code: code.to_string(),
        message,
        constraint,
    };
    Ok(match primary {
        INTERRUPT => SqlError::Timeout,
        AUTH => SqlError::NotAllowed(format!("not available to workers: {}", said.message)),
        TOOBIG => SqlError::TooLarge(said.message),
        NOMEM => SqlError::TooLarge("the statement ran out of memory".to_owned()),
        BUSY | LOCKED => SqlError::Conflict(said),
        READONLY if reads_only && code == READONLY => {
            SqlError::NotAllowed("the transaction is read-only".to_owned())
        }
        READONLY | IOERR | CORRUPT | FULL | CANTOPEN | PROTOCOL | NOTADB => {
            return Err(from_statement(error, "run a guest's statement"));
        }
        CONSTRAINT if is_commit_hook(&error) => {
            SqlError::TransactionFailed("an earlier statement ended the transaction".to_owned())
        }
        CONSTRAINT => SqlError::ConstraintViolation(said),
        _ => SqlError::QueryFailed(said),
    })
}

/// Whether SQLite reports that there is no transaction to end.
pub(in crate::store) fn is_no_transaction(error: &Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.message().contains("no transaction is active"))
}

/// Whether the commit hook refused a statement that would have committed outside of its
/// transaction.
pub(in crate::store) fn is_commit_hook(error: &Error) -> bool {
    extended(error) == CONSTRAINT_COMMITHOOK
}

/// The name in `CHECK constraint failed: name`, or the columns in `UNIQUE constraint failed:
/// table.column`.
fn constraint(message: &str) -> Option<String> {
    message
        .split_once("constraint failed: ")
        .map(|(_, name)| name.to_owned())
}

fn primary(error: &Error) -> i32 {
    extended(error) & 0xff
}

fn extended(error: &Error) -> i32 {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse().ok()).unwrap_or_default()
}
