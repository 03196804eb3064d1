//! Errors of an operation, and the next step: correct it, send it again, or check its outcome.

use std::fmt;
use std::time::Duration;

use crate::Response;

/// Why an operation did not succeed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The request was not sent: an address, header, key or setting is invalid. Correct it.
    Invalid(String),
    /// The server refused the request and would refuse it again: a 4xx, a redirect, or a failure
    /// that is stored under the key. Correct the request and send it under another key.
    Refused(Box<Refused>),
    /// 422: the caller's key was already used with another request. One of the two has the wrong
    /// key.
    KeyReused(Box<Refused>),
    /// The request did not succeed in time, or another try is not allowed. Send it again later,
    /// under the same key.
    GaveUp(Box<GaveUp>),
}

/// A response that refuses the request.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// Method and path.
    pub operation: String,
    /// The response of the server. [`Response::problem`] has the details, if there are any.
    pub response: Response,
    /// See [`Error::is_unclear`].
    pub unclear: bool,
}

/// The tries of an operation that did not succeed.
#[derive(Debug)]
#[non_exhaustive]
pub struct GaveUp {
    /// Method and path.
    pub operation: String,
    /// Why there was no further try.
    pub reason: GiveUpReason,
    /// The number of tries.
    pub tries: u32,
    /// The last failure.
    pub last: Failure,
    /// The key of the request, also when it was generated.
    pub key: Option<String>,
    /// See [`Error::is_unclear`].
    pub unclear: bool,
}

/// Why there was no further try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GiveUpReason {
    /// The next try would begin after the deadline, which is this long.
    Deadline(Duration),
    /// The retry budget is exhausted: most requests of this client fail.
    Budget,
    /// The request has no key and its method is not idempotent: a second try might repeat its
    /// effects.
    NotSafe,
}

/// The failure of one try.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// A response that may differ on the next try.
    Response(Box<Response>),
    /// No complete response within this time.
    TimedOut(Duration),
    /// No connection, or a connection that broke before the response was complete.
    Connection(reqwest::Error),
}

impl Error {
    /// Whether it is unknown if the operation was carried out: the server may have run a try, and
    /// no response settles it. Safe methods (GET, HEAD, OPTIONS) are never unclear. Sending the
    /// operation again under [`Error::key`] settles it, for as long as the server keeps keys.
    pub fn is_unclear(&self) -> bool {
        match self {
            Error::Invalid(_) => false,
            Error::Refused(refused) | Error::KeyReused(refused) => refused.unclear,
            Error::GaveUp(gave_up) => gave_up.unclear,
        }
    }

    /// The key of the request, also when it was generated: the same operation may be sent again
    /// with it.
    pub fn key(&self) -> Option<&str> {
        match self {
            Error::Invalid(_) => None,
            Error::Refused(refused) | Error::KeyReused(refused) => refused.response.key.as_deref(),
            Error::GaveUp(gave_up) => gave_up.key.as_deref(),
        }
    }

    /// The number of tries.
    pub fn tries(&self) -> u32 {
        match self {
            Error::Invalid(_) => 0,
            Error::Refused(refused) | Error::KeyReused(refused) => refused.response.tries,
            Error::GaveUp(gave_up) => gave_up.tries,
        }
    }

    /// The last response, if there was one.
    pub fn response(&self) -> Option<&Response> {
        match self {
            Error::Refused(refused) | Error::KeyReused(refused) => Some(&refused.response),
            Error::GaveUp(gave_up) => match &gave_up.last {
                Failure::Response(response) => Some(response),
                Failure::TimedOut(_) | Failure::Connection(_) => None,
            },
            Error::Invalid(_) => None,
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::GaveUp(gave_up) => match &gave_up.last {
                Failure::Connection(error) => Some(error),
                Failure::Response(_) | Failure::TimedOut(_) => None,
            },
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(reason) => write!(f, "nothing was sent: {reason}"),
            Error::Refused(refused) => write!(f, "{refused}"),
            Error::KeyReused(refused) => {
                let Refused {
                    operation,
                    response,
                    ..
                } = &**refused;
                let key = response.key.as_deref().unwrap_or_default();
                write!(
                    f,
                    "{operation} was refused: the key {key:?} was used before with another request"
                )?;
                write!(f, " ({response}); another operation needs another key")
            }
            Error::GaveUp(gave_up) => write!(f, "{gave_up}"),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refused {
            operation,
            response,
            unclear,
        } = self;
        write!(
            f,
            "{operation} was refused after {}: {response}",
            times(response.tries)
        )?;
        match &response.key {
            Some(key) if response.replayed => {
                write!(
                    f,
                    "; the response is stored under the key {key:?}, only another key runs it again"
                )
            }
            _ if *unclear => write!(f, "; an earlier try may have been carried out"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GaveUp {
            operation,
            reason,
            tries,
            last,
            key,
            unclear,
        } = self;
        write!(
            f,
            "{operation} failed after {}: {reason}; last failure: {last}",
            times(*tries)
        )?;
        match (unclear, key) {
            (true, Some(key)) => {
                write!(
                    f,
                    "; it may have been carried out: send it again under the same key, {key:?}"
                )
            }
            (true, None) => write!(
                f,
                "; it may have been carried out: check before sending it again"
            ),
            (false, _) => Ok(()),
        }
    }
}

impl fmt::Display for GiveUpReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GiveUpReason::Deadline(deadline) => write!(
                f,
                "the deadline of {deadline:?} leaves no time for another try"
            ),
            GiveUpReason::Budget => write!(f, "the retry budget is exhausted"),
            GiveUpReason::NotSafe => {
                write!(f, "without a key another try might repeat its effects")
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Response(response) => {
                write!(f, "{response}")?;
                match response.retry_after() {
                    Some(wait) => write!(f, " (Retry-After: {wait:?})"),
                    None => Ok(()),
                }
            }
            Failure::TimedOut(limit) => write!(f, "no response within {limit:?}"),
            Failure::Connection(error) if error.is_connect() => {
                write!(f, "no connection to the server")
            }
            Failure::Connection(_) => {
                write!(f, "the connection broke before the response was complete")
            }
        }
    }
}

fn times(tries: u32) -> String {
    match tries {
        1 => "1 try".to_owned(),
        tries => format!("{tries} tries"),
    }
}
