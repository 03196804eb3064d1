//! Exit codes, and the errors that choose one.

use std::fmt;
use std::process::ExitCode;

use crate::model::hint;

/// How a command ended; scripts can rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked.
    Success = 0,
    /// It failed; the error says why.
    Failure = 1,
    /// The command line, the manifest or the configuration is wrong: nothing was tried.
    Usage = 2,
    /// What was asked for is not there: a worker, a version, a dead letter.
    NotFound = 3,
    /// The host, its database or NATS cannot be reached; the same command may work later.
    Unreachable = 4,
    /// What was replayed is not as it is on record.
    Diverged = 5,
    /// The record of what was replayed ends before the failure: up to there it is the same.
    Truncated = 6,
}

/// A sentence that ends a command with an exit code. It can be an error of its own, or the context of another:
/// `Err(Exit::NotFound.with_message("no worker is called x").into())`, `.context(Exit::Unreachable.with_message("reach the host"))`.
#[derive(Debug)]
pub struct ExitError {
    exit: Exit,
    message: String,
}

impl Exit {
    /// Says why a command ends like this.
    pub fn with_message(self, message: impl Into<String>) -> ExitError {
        ExitError {
            exit: self,
            message: message.into(),
        }
    }

    /// How a command ends that failed with `error`.
    pub fn from_error(error: &anyhow::Error) -> Exit {
        hint::find_cause::<ExitError>(error).map_or(Exit::Failure, |error| error.exit)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl fmt::Display for ExitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ExitError {}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;
    use crate::model::hint::WithHint;

    #[test]
    fn exit_code_is_found_anywhere_in_the_error_chain() {
        assert_eq!(Exit::from_error(&anyhow!("x")), Exit::Failure);
        let not_found = anyhow::Error::from(Exit::NotFound.with_message("no worker is called x"));
        assert_eq!(
            Exit::from_error(&not_found.hint("run: oncely workers").context("roll back")),
            Exit::NotFound
        );
        let refused = Err::<(), _>(anyhow!("connection refused"))
            .context(Exit::Unreachable.with_message("reach the host"));
        let refused = refused.hint("start it").unwrap_err();
        assert_eq!(Exit::from_error(&refused), Exit::Unreachable);
        assert_eq!(format!("{refused:#}"), "reach the host: connection refused");
    }
}
