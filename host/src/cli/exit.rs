//! Exit codes, and the errors that select one.

use std::fmt;
use std::process::ExitCode;

use crate::model::hint;

/// The exit code of a command. The numbers are stable for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command succeeded.
    Success = 0,
    /// The command failed.
    Failure = 1,
    /// The command line, the manifest or the configuration is invalid. Nothing was executed.
    Usage = 2,
    /// The requested worker, version or dead letter does not exist.
    NotFound = 3,
    /// The host, its database or NATS is unreachable; the same command may succeed later.
    Unreachable = 4,
    /// The replay diverges from its recording.
    Diverged = 5,
    /// The recording was cut before the failure; the replay matches up to there.
    Truncated = 6,
    /// `oncely deploy --plan`: a deployment would change something.
    Changes = 10,
}

/// An error message with an exit code.
///
/// It can be an error of its own, or the context of another: `Err(Exit::NotFound.with_message("no
/// worker is called x").into())`, `.context(Exit::Unreachable.with_message("reach the host"))`.
#[derive(Debug)]
pub struct ExitError {
    exit: Exit,
    message: String,
}

impl Exit {
    /// Attaches a message to the exit code.
    pub fn with_message(self, message: impl Into<String>) -> ExitError {
        ExitError {
            exit: self,
            message: message.into(),
        }
    }

    /// The exit code of a command that failed with `error`.
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
