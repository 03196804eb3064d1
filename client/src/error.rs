//! What can go wrong, as the one who called sees it: what to correct, what to send again, what to look up.

use std::fmt;
use std::time::Duration;

use crate::Response;

/// Why an operation has no good response.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// It was never sent, because it cannot be: an address, a header, a key or a number that is none. Correct it.
    Invalid(String),
    /// The server refused it and would again: a 4xx, a redirect, or a failure that is stored under the key. Correct
    /// the request and send it under another key.
    Refused(Box<Refused>),
    /// 422: the key that was brought was used before with another request. One of the two has the wrong key.
    KeyReused(Box<Refused>),
    /// It did not succeed in time, or nothing more may be tried. Send it again later, under the same key.
    GaveUp(Box<GaveUp>),
}

/// A response that says no.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// Method and path.
    pub operation: String,
    /// What the server said; [`Response::problem`] has the details if there are any.
    pub response: Response,
    /// See [`Error::is_unclear`].
    pub unclear: bool,
}

/// Tries that came to nothing.
#[derive(Debug)]
#[non_exhaustive]
pub struct GaveUp {
    /// Method and path.
    pub operation: String,
    /// Why there was no further try.
    pub reason: GiveUpReason,
    /// How often the request was sent.
    pub tries: u32,
    /// The last failure.
    pub last: Failure,
    /// The key it went under, also if it was made here.
    pub key: Option<String>,
    /// See [`Error::is_unclear`].
    pub unclear: bool,
}

/// Why there was no further try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GiveUpReason {
    /// The next one would have come after the deadline, which is this long.
    Deadline(Duration),
    /// The retry budget is used up: most of what this client sends fails.
    Budget,
    /// It has no key and its method is not idempotent: a second try might do it twice.
    NotSafe,
}

/// What became of one try.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// A response that may be another next time.
    Response(Box<Response>),
    /// No whole response within this time.
    TimedOut(Duration),
    /// No connection, or one that broke before the response was whole.
    Connection(reqwest::Error),
}

impl Error {
    /// Whether nobody knows if the operation was carried out: a try may have been, and there was no response that settles
    /// it. Requests that only read are never unclear. Sending it again under [`Error::key`] finds out, for as long as
    /// the server remembers keys.
    pub fn is_unclear(&self) -> bool {
        match self {
            Error::Invalid(_) => false,
            Error::Refused(refused) | Error::KeyReused(refused) => refused.unclear,
            Error::GaveUp(gave_up) => gave_up.unclear,
        }
    }

    /// The key that the request went under, also if it was made here: the same operation may be sent again with it.
    pub fn key(&self) -> Option<&str> {
        match self {
            Error::Invalid(_) => None,
            Error::Refused(refused) | Error::KeyReused(refused) => refused.response.key.as_deref(),
            Error::GaveUp(gave_up) => gave_up.key.as_deref(),
        }
    }

    /// How often the request was sent.
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
            Error::Invalid(what) => write!(f, "nothing was sent: {what}"),
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
                    "{operation} was refused, as the key {key:?} was used before with another request ({response}); "
                )?;
                write!(f, "another operation needs another key")
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
            "{operation} was refused {}: {response}",
            times(response.tries)
        )?;
        match &response.key {
            Some(key) if response.replayed => {
                write!(
                    f,
                    "; that is stored under the key {key:?}, and only another key runs it again"
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
            "{operation} did not succeed {}, and {reason}; at last: {last}",
            times(*tries)
        )?;
        match (unclear, key) {
            (true, Some(key)) => {
                write!(
                    f,
                    "; it may have been carried out, so send it again under the same key, {key:?}"
                )
            }
            (true, None) => write!(
                f,
                "; it may have been carried out, so look before you send it again"
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
                "its deadline of {deadline:?} leaves no time for another try"
            ),
            GiveUpReason::Budget => write!(f, "the client's budget for retries is used up"),
            GiveUpReason::NotSafe => write!(f, "without a key another try might do it twice"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Response(response) => {
                write!(f, "{response}")?;
                match response.retry_after() {
                    Some(wait) => write!(f, " (asks to wait {wait:?})"),
                    None => Ok(()),
                }
            }
            Failure::TimedOut(limit) => write!(f, "no response within {limit:?}"),
            Failure::Connection(error) if error.is_connect() => {
                write!(f, "no connection to the server")
            }
            Failure::Connection(_) => {
                write!(f, "the connection broke before the response was there")
            }
        }
    }
}

fn times(tries: u32) -> String {
    match tries {
        1 => "in 1 try".to_owned(),
        tries => format!("in {tries} tries"),
    }
}
