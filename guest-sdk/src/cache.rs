//! Values that are cheap to have again: a cache in front of the worker's own data, in the host and, where it has one, in a
//! Redis that all hosts share.
//!
//! It is not part of the transaction: [`get`] may answer with what was true some time ago, at most as long ago as the value's
//! time to live. Never decide about money by it. [`put`] and [`invalidate`] take effect once the transaction has committed, and
//! not at all when it does not.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use oncely_guest::prelude::*;
//! # #[derive(Serialize, Deserialize)]
//! # struct Price { cents: i64 }
//! # fn look_up(article: &str) -> Result<Price, Failure> { unimplemented!() }
//! // Who reads:
//! fn price(article: &str) -> Result<Price, Failure> {
//!     if let Some(price) = cache::get_json(article)? {
//!         return Ok(price);
//!     }
//!     let price = look_up(article)?;
//!     cache::put_json(article, &price, Duration::from_secs(60), &[article])?;
//!     Ok(price)
//! }
//!
//! // Who writes:
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

/// The value under a key, if there is one and it is valid. What this delivery itself put or invalidated is seen.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get(key: &str) -> Result<Option<Vec<u8>>, Error> {
    wit::get(key).map_err(Error)
}

/// The value under a key, read as JSON; none also when it is something else than the JSON that `T` expects, as an earlier
/// version of the handler may have left it.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>, Error> {
    Ok(get(key)?.and_then(|value| serde_json::from_slice(&value).ok()))
}

/// Keeps a value for so long, or less: it is dropped on all hosts once one of its tags is invalidated. If that happened since
/// this delivery began it is not kept at all.
///
/// # Errors
/// See [`ErrorKind`]. A handler may go on without.
pub fn put<T: AsRef<str>>(key: &str, value: &[u8], ttl: Duration, tags: &[T]) -> Result<(), Error> {
    wit::put(key, value, milliseconds(ttl), &owned(tags)).map_err(Error)
}

/// Keeps a value as JSON; see [`put`].
///
/// # Errors
/// A retry when it was refused, or when `value` has no JSON form.
pub fn put_json<T: AsRef<str>>(
    key: &str,
    value: &impl Serialize,
    ttl: Duration,
    tags: &[T],
) -> Result<(), Failure> {
    Ok(put(key, &serde_json::to_vec(value)?, ttl, tags)?)
}

/// Drops all values of this worker that have one of these tags, on all hosts, right after the commit.
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
    /// Which kind of refusal it was.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::InvalidKey(why)
            | ErrorKind::InvalidTag(why)
            | ErrorKind::InvalidTtl(why)
            | ErrorKind::TooLarge(why)
            | ErrorKind::TooMany(why)
            | ErrorKind::Other(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}
