//! Failures of a handler: why a message could not be handled, and whether to retry it.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use crate::bindings::oncely::worker::types;

/// Why a message could not be handled, and whether to retry it. With every kind, the effects of the
/// handler for this message are rolled back.
///
/// `?` turns every [`std::error::Error`] into a retry, with the messages of the error and its
/// causes. Most errors are transient; a permanent one becomes a dead letter after the last attempt.
/// Reject a message explicitly where a retry cannot succeed:
///
/// ```
/// use oncely_guest::prelude::*;
///
/// fn amount(text: &str) -> Result<i64, Failure> {
///     text.parse().map_err(|error| {
///         Failure::reject(format!("invalid amount `{text}`: {error}")).code("bad-amount")
///     })
/// }
///
/// assert_eq!(amount("12x").unwrap_err().code.as_deref(), Some("bad-amount"));
/// ```
///
/// Like `anyhow::Error`, `Failure` does not implement `std::error::Error`. That allows the
/// conversion from all types that do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whether and when to retry.
    pub kind: FailureKind,
    /// A short, stable name for this kind of failure. Dead letters are grouped by it.
    pub code: Option<String>,
    /// One sentence for the operator who reads the dead letter.
    pub message: String,
}

/// Whether and when to retry a failed message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// Retry after a backoff that grows with each attempt. After the last attempt that the manifest
    /// allows, the message becomes a dead letter.
    Retry,
    /// Like `Retry`, but not before this delay has passed.
    RetryAfter(Duration),
    /// Do not retry: the message becomes a dead letter at once.
    Reject,
}

impl Failure {
    /// A retry after the backoff of the manifest.
    pub fn retry(message: impl fmt::Display) -> Self {
        Self::new(FailureKind::Retry, message)
    }

    /// A retry, but not before `delay` has passed.
    pub fn retry_after(delay: Duration, message: impl fmt::Display) -> Self {
        Self::new(FailureKind::RetryAfter(delay), message)
    }

    /// No retry: this message can never be handled as it is.
    pub fn reject(message: impl fmt::Display) -> Self {
        Self::new(FailureKind::Reject, message)
    }

    /// Sets a short, stable name for the failure, such as `card-declined`.
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
    /// A retry with the message of the error, followed by those of its causes.
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

/// Whole milliseconds, rounded up, so that a requested wait is never shortened.
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
