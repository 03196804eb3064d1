//! Classification of PostgreSQL's errors. It uses their codes and the server function that raised
//! them, never their texts, which are localized.

use anyhow::anyhow;
use sqlx::Error;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::model::sql::{DatabaseError, SqlError};
use crate::store::error::{cause, sqlx_error};
use crate::store::{BrokenStatement, StoreError};

/// The fence of a commit divides by zero in a transaction that the host did not begin.
const DIVISION_BY_ZERO: &str = "22012";
const IN_FAILED_TRANSACTION: &str = "25P02";
const NO_TRANSACTION: &str = "25P01";
const NO_SAVEPOINT: &str = "3B001";
const READ_ONLY: &str = "25006";
const INSUFFICIENT_PRIVILEGE: &str = "42501";
const QUERY_CANCELED: &str = "57014";
const FEATURE_NOT_SUPPORTED: &str = "0A000";
const PROTOCOL_VIOLATION: &str = "08P01";
const NO_PREPARED_STATEMENT: &str = "26000";
/// The server function that detects a prepared statement that no longer fits the tables.
const PLAN_REVALIDATION: &str = "RevalidateCachedQuery";
/// The server function that binds parameters to a prepared statement.
const BIND_FUNCTION: &str = "exec_bind_message";
/// The functions by which procedural languages raise errors of user code, with any code.
const RAISE_FUNCTIONS: [&str; 7] = [
    "exec_stmt_raise",
    "PLy_output",
    "PLy_elog",
    "PLy_elog_impl",
    "do_util_elog",
    "croak_cstr",
    "throw_tcl_error",
];
/// The prefix of sqlx's prepared statement names.
const STATEMENT_NAME_PREFIX: &str = "sqlx_s_";
/// Raised by the platform's functions: an invalid token, or a commit without the host's token.
const TOKEN_REFUSED: [&str; 2] = ["ONC01", "ONC02"];
/// Raised by the platform's functions: a statement changed the client encoding.
const ENCODING_CHANGED: &str = "ONC03";
/// Raised by the platform's functions: the host's key for definer functions was renewed.
const RENEWED_KEY: &str = "ONC04";

/// The error of a platform statement.
pub(in crate::store) fn from_statement(error: Error, context: &'static str) -> StoreError {
    let code = code(&error).to_owned();
    let cause = with_pooler_hint(cause(error), &code).context(context);
    match code.as_str() {
        code if is_conflict(code) => StoreError::Conflict(cause),
        IN_FAILED_TRANSACTION => StoreError::Refused(cause),
        code if TOKEN_REFUSED.contains(&code) => {
            StoreError::Refused(cause.context("a statement ended the transaction"))
        }
        ENCODING_CHANGED => StoreError::Refused(cause),
        _ => StoreError::Unavailable(cause),
    }
}

/// The error of a platform statement that writes a guest's values. A value that the tables refuse
/// is the guest's fault.
pub(in crate::store) fn from_guest_values(error: StoreError) -> StoreError {
    let StoreError::Unavailable(cause) = error else {
        return error;
    };
    // Invalid values of a type, violated constraints, and values that are too large for an index.
    let is_of_value = |error: &Error| {
        ["22", "23", "54"]
            .iter()
            .any(|class| code(error).starts_with(class))
    };
    match sqlx_error(&cause) {
        Some(error) if is_of_value(error) => StoreError::Refused(cause),
        _ => StoreError::Unavailable(cause),
    }
}

/// The error of a savepoint. A missing savepoint ended with its transaction, by a guest's
/// statement.
pub(in crate::store) fn from_savepoint(error: Error, context: &'static str) -> StoreError {
    match code(&error) {
        NO_SAVEPOINT | NO_TRANSACTION => StoreError::Refused(cause(error).context(context)),
        _ => from_statement(error, context),
    }
}

/// The error of a commit with guests' writes. A refusal because of those writes had no effects; any
/// other error has an unknown outcome. A deferred trigger may fail with any code.
pub(in crate::store) fn from_guest_commit(error: Error) -> StoreError {
    let refusal = match code(&error) {
        // A trigger may raise this code, too.
        RENEWED_KEY => {
            return StoreError::Unavailable(
                cause(error).context("commit").context(BrokenStatement),
            );
        }
        code if TOKEN_REFUSED.contains(&code) => "a statement ended the transaction",
        _ if is_raised(&error) => "a deferred trigger failed",
        QUERY_CANCELED if !is_fatal(&error) => "its deferred triggers took too long",
        code if is_conflict(code) || is_server_failure(&error) => {
            return from_statement(error, "commit");
        }
        DIVISION_BY_ZERO if !is_in_function(&error) => "a statement ended the transaction",
        IN_FAILED_TRANSACTION => "a statement of the transaction failed",
        "" => return from_statement(error, "commit"),
        code if code.starts_with("23") => "a deferred constraint is violated",
        _ => "a deferred trigger failed",
    };
    StoreError::Refused(cause(error).context(refusal))
}

/// The error of a guest's statement: the outer one is the host's, the inner one is for the guest.
pub(in crate::store) fn from_guest_statement(error: Error) -> Result<SqlError, StoreError> {
    let Some(database) = database_error(&error) else {
        return match error {
            Error::TypeNotFound { type_name } => Ok(SqlError::UnsupportedType(format!(
                "there is no type `{type_name}`"
            ))),
            Error::Encode(cause) => Ok(SqlError::InvalidParameter(cause.to_string())),
            error => Err(from_statement(error, "run a guest's statement")),
        };
    };
    let said = DatabaseError {
        code: database.code().to_owned(),
        message: database.message().to_owned(),
        constraint: database.constraint().map(str::to_owned),
    };
    let binds = database.routine() == Some(BIND_FUNCTION);
    Ok(match said.code.as_str() {
        code if TOKEN_REFUSED.contains(&code) => SqlError::NotAllowed(said.message),
        code if is_raised(&error) && code.starts_with("23") => SqlError::ConstraintViolation(said),
        _ if is_raised(&error) => SqlError::QueryFailed(said),
        PROTOCOL_VIOLATION if binds => SqlError::InvalidParameter(said.message),
        _ if is_stale_plan(&error) => SqlError::Conflict(said),
        QUERY_CANCELED => SqlError::Timeout,
        INSUFFICIENT_PRIVILEGE => {
            SqlError::NotAllowed(format!("not available to workers: {}", said.message))
        }
        // For an unknown type, sqlx queries the server and so replaces the unnamed statement.
        NO_PREPARED_STATEMENT if binds => SqlError::UnsupportedType(
            "a column of the result has an unsupported type; read it as text, as in `x::text`"
                .to_owned(),
        ),
        // The guests' session is also read-only outside of the host's transaction.
        READ_ONLY => SqlError::TransactionFailed(
            "the transaction is read-only, or an earlier statement ended it".to_owned(),
        ),
        IN_FAILED_TRANSACTION => SqlError::TransactionFailed(said.message),
        code if is_conflict(code) => SqlError::Conflict(said),
        // The message is localized, the statement name is not.
        code if is_pooler_error(code)
            && !is_in_function(&error)
            && said.message.contains(STATEMENT_NAME_PREFIX) =>
        {
            return Err(from_statement(error, "run a guest's statement"));
        }
        _ if is_server_failure(&error) => {
            return Err(from_statement(error, "run a guest's statement"));
        }
        code if code.starts_with("23") => SqlError::ConstraintViolation(said),
        _ => SqlError::QueryFailed(said),
    })
}

/// Whether the host's key for definer functions was renewed.
pub(in crate::store) fn is_renewed_key(error: &StoreError) -> bool {
    let StoreError::Unavailable(cause) = error else {
        return false;
    };
    sqlx_error(cause).is_some_and(|error| code(error) == RENEWED_KEY)
}

/// Whether the connection failed before the statement began, so that another connection may
/// succeed.
pub(in crate::store) fn is_connection_loss(error: &Error) -> bool {
    match error {
        Error::Io(_) | Error::Protocol(_) => true,
        error => is_fatal(error) || code(error).starts_with("08") || code(error).starts_with("57P"),
    }
}

/// Whether the server, or a pooler in front of it, refused a login.
pub(in crate::store) fn is_login_refused(error: &Error) -> bool {
    // PgBouncer responds to an unknown user with 08P01.
    code(error).starts_with("28") || code(error) == PROTOCOL_VIOLATION
}

pub(in crate::store) fn is_insufficient_privilege(error: &Error) -> bool {
    code(error) == INSUFFICIENT_PRIVILEGE
}

pub(in crate::store) fn is_unique_violation(error: &Error) -> bool {
    code(error) == "23505"
}

/// Whether the connection holds a prepared statement that no longer fits the tables. A server that
/// omits the raising function may mean another unsupported feature. The connection is then replaced
/// needlessly.
pub(in crate::store) fn is_stale_plan(error: &Error) -> bool {
    database_error(error).is_some_and(|error| {
        error.code() == FEATURE_NOT_SUPPORTED
            && error
                .routine()
                .is_none_or(|routine| routine == PLAN_REVALIDATION)
    })
}

/// Whether user code raised it. Its code then has no meaning.
fn is_raised(error: &Error) -> bool {
    !is_fatal(error)
        && database_error(error)
            .and_then(PgDatabaseError::routine)
            .is_some_and(|by| RAISE_FUNCTIONS.contains(&by))
}

/// Whether it was raised inside a function and not in the statement itself.
fn is_in_function(error: &Error) -> bool {
    database_error(error).is_some_and(|error| error.r#where().is_some())
}

fn is_conflict(code: &str) -> bool {
    matches!(code, "40001" | "40P01" | "55P03")
}

/// Whether the server has a failure: it closes the connection, lacks resources or has a disk error.
/// All other codes may be caused by the statement.
fn is_server_failure(error: &Error) -> bool {
    let code = code(error);
    // A pooler sets no function name; the server always does.
    let is_from_pooler = code.starts_with("08")
        && database_error(error).is_some_and(|error| error.routine().is_none());
    is_fatal(error)
        || is_from_pooler
        || (code.starts_with("53") && code != "53400")
        || code.starts_with("58")
}

fn is_pooler_error(code: &str) -> bool {
    matches!(code, NO_PREPARED_STATEMENT | "42P05")
}

fn with_pooler_hint(cause: anyhow::Error, code: &str) -> anyhow::Error {
    if is_pooler_error(code) {
        return cause.context(anyhow!(
            "prepared statements do not work here; behind a pooler, \
             end the database URL in ?statement-cache-capacity=0"
        ));
    }
    cause
}

fn is_fatal(error: &Error) -> bool {
    database_error(error)
        .is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic))
}

fn code(error: &Error) -> &str {
    database_error(error).map_or("", PgDatabaseError::code)
}

fn database_error(error: &Error) -> Option<&PgDatabaseError> {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref())
}
