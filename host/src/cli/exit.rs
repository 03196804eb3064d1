//! Exit codes, and the errors that select one.

use std::fmt;
use std::process::ExitCode;

use crate::model::explanation::codes;
use crate::model::hint;

codes! {
    /// The exit code of a command. The numbers are stable for scripts.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Exit {
        Success: "0",
            "The command succeeded.",
            "Nothing.";
        Failure: "1",
            "The command failed.",
            "Read the error and its hint.";
        Usage: "2",
            "The command line, the manifest or the configuration is invalid. Nothing was executed.",
            "Correct it; the error names the line or the option.";
        NotFound: "3",
            "The requested worker, version, dead letter or case does not exist.",
            "List the existing ones.";
        Unreachable: "4",
            "The host, its database or NATS is unreachable.",
            "Run the same command again later.";
        Diverged: "5",
            "`oncely replay`: the replay diverges from its recording.",
            "Replay with the component of the recorded version, see dead letters.";
        Truncated: "6",
            "`oncely replay`: the recording was cut before the failure, and matches up to there.",
            "Nothing: the recording contains no more.";
        Findings: "7",
            "`oncely doctor` found a problem, `oncely audit` a difference, or `oncely receipt verify` refused a receipt.",
            "Read the findings; each has a fix.";
        NotDrained: "8",
            "`oncely drain`: the worker is paused, but not drained after the timeout.",
            "Run the same command again; it shows the work that is left.";
        Unconfirmed: "9",
            "`oncely receipt`: the event is in no checkpoint yet, or the receipt was not compared with a published hash.",
            "Run the same command after the next checkpoint, or with --checkpoint.";
        Changes: "10",
            "`oncely deploy --plan`: a deployment would change something.",
            "Deploy, or fail the check in CI.";
    }
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
        let number = exit.as_str().parse();
        ExitCode::from(number.unwrap_or(u8::MAX))
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
