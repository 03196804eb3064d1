//! The errors of the database, by their meaning for the caller.

use sqlx::postgres::PgDatabaseError;

use super::{postgres, sqlite};

/// The error of a store operation. Only `Refused` is caused by a guest.
#[derive(Debug)]
pub enum StoreError {
    /// Conflict with another transaction: a serialization failure, a deadlock, a busy database or a
    /// changed state key. There are no effects; retry at once.
    Conflict(anyhow::Error),
    /// The database is unreachable or returned an error of its own. A commit that failed like this
    /// has an unknown outcome; claiming the same event ids again resolves it. Wait, then retry.
    Unavailable(anyhow::Error),
    /// The commit failed because of a guest's writes (a deferred constraint), or a guest ended the
    /// transaction. There are no further effects.
    Refused(anyhow::Error),
}

impl StoreError {
    /// Whether the connection broke during a guest's statement, which may be the cause.
    pub fn broke_in_statement(&self) -> bool {
        matches!(self, StoreError::Unavailable(cause) if cause.is::<BrokenStatement>())
    }
}

/// The error of sqlx behind a failed operation. Its text contains those of its sources, so it has
/// none of its own.
#[derive(Debug)]
pub(super) struct Cause(sqlx::Error);

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Cause {}

/// Converts an error of sqlx.
pub(super) fn cause(error: sqlx::Error) -> anyhow::Error {
    anyhow::Error::new(Cause(error))
}

/// The error of sqlx behind an operation, if one was.
pub(super) fn sqlx_error(cause: &anyhow::Error) -> Option<&sqlx::Error> {
    cause.downcast_ref::<Cause>().map(|cause| &cause.0)
}

/// Whether an operation failed because all connections of this host were in use.
pub(crate) fn is_busy(cause: &anyhow::Error) -> bool {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(Cause(sqlx::Error::PoolTimedOut)))
    };
    cause.chain().any(is_full)
}

/// Context of a connection error that ended a guest's statement.
#[derive(Debug)]
pub(crate) struct BrokenStatement;

impl std::fmt::Display for BrokenStatement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection broke during a worker's statement")
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoreError::Conflict(_) => f.write_str("conflict with another transaction"),
            StoreError::Unavailable(_) => f.write_str("the database is unavailable"),
            StoreError::Refused(_) => f.write_str("the database refused the transaction"),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let (StoreError::Conflict(cause)
        | StoreError::Unavailable(cause)
        | StoreError::Refused(cause)) = self;
        Some(cause.as_ref())
    }
}

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Adds the context of a platform statement to its error.
pub(super) trait Doing<T> {
    /// `context` names the action in the present tense, such as `read the outbox`.
    fn doing(self, context: &'static str) -> Result<T>;
}

impl<T> Doing<T> for sqlx::Result<T> {
    fn doing(self, context: &'static str) -> Result<T> {
        self.map_err(|error| from_statement(error, context))
    }
}

/// The error of a platform statement.
pub(super) fn from_statement(error: sqlx::Error, context: &'static str) -> StoreError {
    let Some(database) = error.as_database_error() else {
        return StoreError::Unavailable(cause(error).context(context));
    };
    match database.try_downcast_ref::<PgDatabaseError>() {
        Some(_) => postgres::errors::from_statement(error, context),
        None => sqlite::errors::from_statement(error, context),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pool_is_recognised_and_no_text_is_said_twice() {
        let error = from_statement(sqlx::Error::PoolTimedOut, "read the outbox");
        let StoreError::Unavailable(cause) = &error else {
            unreachable!("{error:?}");
        };
        assert!(is_busy(cause));
        // Callers wrap the error of the store.
        let wrapped = anyhow::Error::from(error).context("write a report");
        assert!(is_busy(&wrapped));
        assert!(!is_busy(&anyhow::anyhow!("no")));

        let broken = std::io::Error::other("broken pipe");
        let error = anyhow::Error::from(from_statement(sqlx::Error::Io(broken), "commit"));
        let text = format!("{error:#}");
        assert_eq!(text.matches("broken pipe").count(), 1, "{text}");
    }
}
