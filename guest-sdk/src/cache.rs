//! A cache in front of the worker's own data, in the memory of the host and, where one is
//! configured, in a Redis that all hosts share.
//!
//! The cache is not part of the transaction: [`get`] may return an outdated value, for at most the
//! value's time to live. Never base a decision about money on it. [`put`] and [`invalidate`] take
//! effect after the commit, and not at all after a rollback.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use oncely_guest::prelude::*;
//! # #[derive(Serialize, Deserialize)]
//! # struct Price { cents: i64 }
//! # fn load(article: &str) -> Result<Price, Failure> { unimplemented!() }
//! // On read:
//! fn price(article: &str) -> Result<Price, Failure> {
//!     if let Some(price) = cache::get_json(article)? {
//!         return Ok(price);
//!     }
//!     let price = load(article)?;
//!     cache::put_json(article, &price, Duration::from_secs(60), &[article])?;
//!     Ok(price)
//! }
//!
//! // On write:
//! fn set_price(article: &str, cents: i64) -> Result<(), Failure> {
//!     sql::execute("update price set cents = $2 where article = $1", params![article, cents])?;
//!     cache::invalidate(&[article])?;
//!     Ok(())
//! }
//! ```

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bindings::oncely::worker::cache as wit;
pub use crate::bindings::oncely::worker::cache::Error as ErrorKind;
use crate::failure::{Failure, milliseconds};

/// The value under a key, if it exists and is valid. Puts and invalidations of this delivery are
/// visible.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get(key: &str) -> Result<Option<Vec<u8>>, Error> {
    wit::get(key).map_err(Error)
}

/// The value under a key, parsed as JSON. None also when the value does not parse as `T`: an
/// earlier version of the handler may have stored another form.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>, Error> {
    Ok(get(key)?.and_then(|value| serde_json::from_slice(&value).ok()))
}

/// Stores a value for at most `ttl`. It is dropped on all hosts once one of its tags is
/// invalidated. If that happened after this delivery began, the value is not stored at all.
///
/// # Errors
/// See [`ErrorKind`]. A refusal does not doom the delivery: the handler may continue.
pub fn put<T: AsRef<str>>(key: &str, value: &[u8], ttl: Duration, tags: &[T]) -> Result<(), Error> {
    wit::put(key, value, milliseconds(ttl), &owned(tags)).map_err(Error)
}

/// Stores a value as JSON; see [`put`].
///
/// # Errors
/// A retry when the host refuses the value, or when `value` cannot be serialized as JSON.
pub fn put_json<T: AsRef<str>>(
    key: &str,
    value: &impl Serialize,
    ttl: Duration,
    tags: &[T],
) -> Result<(), Failure> {
    Ok(put(key, &serde_json::to_vec(value)?, ttl, tags)?)
}

/// Drops all values of this worker that have one of these tags, on all hosts, right after the
/// commit.
///
/// # Errors
/// See [`ErrorKind`].
pub fn invalidate<T: AsRef<str>>(tags: &[T]) -> Result<(), Error> {
    wit::invalidate(&owned(tags)).map_err(Error)
}

fn owned<T: AsRef<str>>(tags: &[T]) -> Vec<String> {
    tags.iter().map(|tag| tag.as_ref().to_owned()).collect()
}

/// Why an operation on the cache was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    /// The kind of refusal.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::InvalidKey(reason)
            | ErrorKind::InvalidTag(reason)
            | ErrorKind::InvalidTtl(reason)
            | ErrorKind::TooLarge(reason)
            | ErrorKind::TooMany(reason)
            | ErrorKind::Other(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}
