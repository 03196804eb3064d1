//! Errors of SQL statements.

use std::fmt;

use super::DatabaseError;
pub use crate::bindings::oncely::worker::sql::Error as ErrorKind;

/// Why a statement failed. `?` turns it into a retry. After a conflict with another transaction the
/// host runs the message again, and no attempt is spent.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    pub(super) fn new(kind: ErrorKind) -> Self {
        Self(kind)
    }

    pub(super) fn other(message: String) -> Self {
        Self(ErrorKind::Other(message))
    }

    /// The kind of error.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// The error from the database, if the database refused the statement.
    pub fn database(&self) -> Option<&DatabaseError> {
        match &self.0 {
            ErrorKind::ConstraintViolation(error)
            | ErrorKind::Conflict(error)
            | ErrorKind::QueryFailed(error) => Some(error),
            _ => None,
        }
    }

    /// The violated constraint, where the database names it. Use it to choose the failure to
    /// return: the delivery is rolled back in any case.
    ///
    /// ```no_run
    /// # use oncely_guest::prelude::*;
    /// # fn example(owner: &str) -> Result<(), Failure> {
    /// let insert = "insert into account (owner) values ($1)";
    /// sql::execute(insert, params![owner]).map_err(|error| match error.constraint() {
    ///     Some("account_owner") => Failure::reject("unknown owner").code("unknown-owner"),
    ///     _ => error.into(),
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn constraint(&self) -> Option<&str> {
        self.database()
            .and_then(|error| error.constraint.as_deref())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::ConstraintViolation(error) | ErrorKind::QueryFailed(error) => {
                write_database_error(f, error)
            }
            ErrorKind::Conflict(error) => {
                f.write_str("conflict with another transaction: ")?;
                write_database_error(f, error)
            }
            ErrorKind::Timeout => {
                f.write_str("the time limit of this delivery was reached during a statement")
            }
            ErrorKind::NotAllowed(reason)
            | ErrorKind::InvalidParameter(reason)
            | ErrorKind::UnsupportedType(reason)
            | ErrorKind::TooLarge(reason)
            | ErrorKind::TransactionFailed(reason)
            | ErrorKind::Other(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}

/// The message of the database, the constraint if the message does not name it, and the code.
fn write_database_error(f: &mut fmt::Formatter<'_>, error: &DatabaseError) -> fmt::Result {
    f.write_str(&error.message)?;
    match &error.constraint {
        Some(name) if !error.message.contains(name.as_str()) => {
            write!(f, " (constraint {name}, code {})", error.code)
        }
        _ => write!(f, " (code {})", error.code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(message: &str) -> Error {
        Error::new(ErrorKind::ConstraintViolation(DatabaseError {
            code: "23505".to_owned(),
            message: message.to_owned(),
            constraint: Some("account_pk".to_owned()),
        }))
    }

    #[test]
    fn a_violated_constraint_is_named_exactly_once() {
        assert_eq!(
            violation("duplicate key").to_string(),
            "duplicate key (constraint account_pk, code 23505)"
        );
        assert_eq!(
            violation("\"account_pk\" is violated").to_string(),
            "\"account_pk\" is violated (code 23505)"
        );
        assert_eq!(violation("duplicate key").constraint(), Some("account_pk"));
    }
}
