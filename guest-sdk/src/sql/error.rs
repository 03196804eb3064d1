//! Why a statement failed.

use std::fmt;

use super::DatabaseError;
pub use crate::bindings::oncely::worker::sql::Error as ErrorKind;

/// Why a statement failed. With `?` it becomes a failure that asks for a retry; a conflict with another transaction
/// is run again by the host and spends no attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    pub(super) fn new(kind: ErrorKind) -> Self {
        Self(kind)
    }

    pub(super) fn other(message: String) -> Self {
        Self(ErrorKind::Other(message))
    }

    /// Which kind of error it was.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// What the database said, where it was the database that refused.
    pub fn database(&self) -> Option<&DatabaseError> {
        match &self.0 {
            ErrorKind::ConstraintViolation(error)
            | ErrorKind::Conflict(error)
            | ErrorKind::QueryFailed(error) => Some(error),
            _ => None,
        }
    }

    /// The constraint that was violated, where the database names it. Good for choosing the failure to return: the
    /// delivery itself cannot be saved any more.
    ///
    /// ```no_run
    /// # use oncely_guest::prelude::*;
    /// # fn example(owner: &str) -> Result<(), Failure> {
    /// sql::execute("insert into account (owner) values ($1)", params![owner]).map_err(|error| match error.constraint() {
    ///     Some("account_owner") => Failure::reject(format!("{owner} is no customer")).code("unknown-owner"),
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
                f.write_str("another transaction was in the way: ")?;
                write_database_error(f, error)
            }
            ErrorKind::Timeout => {
                f.write_str("the time of this delivery ran out during a statement")
            }
            ErrorKind::NotAllowed(why)
            | ErrorKind::InvalidParameter(why)
            | ErrorKind::UnsupportedType(why)
            | ErrorKind::TooLarge(why)
            | ErrorKind::TransactionFailed(why)
            | ErrorKind::Other(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}

/// The database's sentence, the constraint where the sentence does not name it, and the code.
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
