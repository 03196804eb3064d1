//! Exit codes, and the errors that choose one.

use std::fmt;
use std::process::ExitCode;

use crate::model::hint;

/// How a command ended; scripts can rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked.
    Done = 0,
    /// It failed; the error says why.
    Failure = 1,
    /// The command line, the manifest or the configuration is wrong: nothing was tried.
    Usage = 2,
    /// What was asked for is not there: a worker, a version, a dead letter.
    NotFound = 3,
    /// The host, its database or NATS cannot be reached; the same command may work later.
    Unreachable = 4,
    /// What was replayed is not as it is on record.
    Departed = 5,
    /// The record of what was replayed ends before the failure: up to there it is the same.
    Cut = 6,
}

/// A sentence that ends a command with an exit code. It can be an error of its own, or the context of another:
/// `Err(Exit::NotFound.because("no worker is called x").into())`, `.context(Exit::Unreachable.because("reach the host"))`.
#[derive(Debug)]
pub struct Ended {
    exit: Exit,
    sentence: String,
}

impl Exit {
    /// Says why a command ends like this.
    pub fn because(self, sentence: impl Into<String>) -> Ended {
        Ended { exit: self, sentence: sentence.into() }
    }

    /// How a command ends that failed with `error`.
    pub fn of(error: &anyhow::Error) -> Exit {
        hint::find::<Ended>(error).map_or(Exit::Failure, |ended| ended.exit)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Ended {}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;
    use crate::model::hint::WithHint;

    #[test]
    fn an_error_ends_with_its_code_wherever_it_stands() {
        assert_eq!(Exit::of(&anyhow!("x")), Exit::Failure);
        let not_found = anyhow::Error::from(Exit::NotFound.because("no worker is called x"));
        assert_eq!(Exit::of(&not_found.hint("run: oncely workers").context("roll back")), Exit::NotFound);
        let refused = Err::<(), _>(anyhow!("connection refused")).context(Exit::Unreachable.because("reach the host"));
        let refused = refused.hint("start it").unwrap_err();
        assert_eq!(Exit::of(&refused), Exit::Unreachable);
        assert_eq!(format!("{refused:#}"), "reach the host: connection refused");
    }
}
