//! Why a message could not be handled, and what should become of it.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use crate::bindings::oncely::worker::types;

/// Why a message could not be handled, and what should become of it. Whatever it says, nothing the handler did for
/// this message takes effect.
///
/// `?` turns every [`std::error::Error`] into a failure that asks for a retry, with the error's sentence and those of
/// its causes: most errors are of the moment, and what turns out not to be is a dead letter once the attempts are used
/// up. Where trying again cannot help, say so:
///
/// ```
/// use oncely_guest::prelude::*;
///
/// fn amount(text: &str) -> Result<i64, Failure> {
///     text.parse().map_err(|error| Failure::reject(format!("`{text}` is no amount: {error}")).code("bad-amount"))
/// }
///
/// assert_eq!(amount("12x").unwrap_err().code.as_deref(), Some("bad-amount"));
/// ```
///
/// Like `anyhow::Error` it is not a `std::error::Error` itself; that is what lets `?` take all the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What should become of the message.
    pub kind: FailureKind,
    /// A short, stable name for this kind of failure; letters with the same code are grouped.
    pub code: Option<String>,
    /// One sentence for the person who reads the dead letter.
    pub message: String,
}

/// What should become of a message whose handling failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Try again after a backoff that grows with each attempt; a dead letter when the manifest's attempts are used up.
    Retry,
    /// Like `Retry`, but not before so long a time has passed.
    RetryAfter(Duration),
    /// Do not try again: the message becomes a dead letter at once.
    Reject,
}

impl Failure {
    /// Try again, after the backoff the manifest sets.
    pub fn retry(message: impl fmt::Display) -> Self {
        Self::new(FailureKind::Retry, message)
    }

    /// Try again, but not before `delay` has passed.
    pub fn retry_after(delay: Duration, message: impl fmt::Display) -> Self {
        Self::new(FailureKind::RetryAfter(delay), message)
    }

    /// Do not try again: this message can never be handled as it stands.
    pub fn reject(message: impl fmt::Display) -> Self {
        Self::new(FailureKind::Reject, message)
    }

    /// Gives the failure a short, stable name such as `card-declined`.
    #[must_use]
    pub fn code(self, code: impl Into<String>) -> Self {
        Self {
            code: Some(code.into()),
            ..self
        }
    }

    fn new(kind: FailureKind, message: impl fmt::Display) -> Self {
        Self {
            kind,
            code: None,
            message: message.to_string(),
        }
    }

    pub(crate) fn into_wit(self) -> types::Failure {
        let kind = match self.kind {
            FailureKind::Retry => types::FailureKind::Retry,
            FailureKind::RetryAfter(delay) => types::FailureKind::RetryAfter(milliseconds(delay)),
            FailureKind::Reject => types::FailureKind::Reject,
        };
        types::Failure {
            kind,
            code: self.code,
            message: self.message,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: Error> From<E> for Failure {
    /// A retry with the error's sentence, followed by those of its causes.
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message = format!("{message}: {error}");
            cause = error.source();
        }
        Self::retry(message)
    }
}

/// Whole milliseconds, rounded up: a wait that was asked for is never cut short.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_error_becomes_a_retry_with_its_causes() {
        #[derive(Debug)]
        struct Outer(std::num::ParseIntError);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("cannot read the amount")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }

        let failure = Failure::from(Outer("x".parse::<i64>().unwrap_err()));
        assert_eq!(
            failure,
            Failure::retry("cannot read the amount: invalid digit found in string")
        );
    }

    #[test]
    fn a_wait_is_never_cut_short() {
        assert_eq!(milliseconds(Duration::from_micros(1)), 1);
        assert_eq!(milliseconds(Duration::from_secs(2)), 2000);
        assert_eq!(milliseconds(Duration::MAX), u64::MAX);
    }
}
