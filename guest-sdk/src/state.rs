//! Keyed values of this worker, in the same transaction.
//!
//! ```no_run
//! # use oncely_guest::prelude::*;
//! # fn example() -> Result<(), Failure> {
//! let seen: u64 = state::get_json("seen")?.unwrap_or(0);
//! state::set_json("seen", &(seen + 1))?;
//! # Ok(())
//! # }
//! ```

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bindings::oncely::worker::state as wit;
pub use crate::bindings::oncely::worker::state::{Entry, Error as ErrorKind};
use crate::failure::Failure;

/// The value under a key with its version; none when the key is not there.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get(key: &str) -> Result<Option<Entry>, Error> {
    wit::get(key).map_err(Error)
}

/// The value under a key, read as JSON; none when the key is not there.
///
/// # Errors
/// A retry when the state cannot be reached or holds something else than the JSON that `T` expects.
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>, Failure> {
    let Some(entry) = get(key)? else {
        return Ok(None);
    };
    entry.json().map(Some).map_err(|error| {
        Failure::retry(format!(
            "the state under `{key}` is not as expected: {error}"
        ))
    })
}

/// Sets a value and returns its new version.
///
/// # Errors
/// See [`ErrorKind`].
pub fn set(key: &str, value: &[u8]) -> Result<u64, Error> {
    wit::set(key, value).map_err(Error)
}

/// Sets a value as JSON and returns its new version.
///
/// # Errors
/// A retry when the state cannot be reached or `value` has no JSON form.
pub fn set_json(key: &str, value: &impl Serialize) -> Result<u64, Failure> {
    Ok(set(key, &serde_json::to_vec(value)?)?)
}

/// Deletes a key; false when it was not there.
///
/// # Errors
/// See [`ErrorKind`].
pub fn delete(key: &str) -> Result<bool, Error> {
    wit::delete(key).map_err(Error)
}

/// Sets a value only if the key still has the version that was seen (none: only if it is not there), and returns the
/// new version.
///
/// This is optimistic locking for a value that was read in an earlier delivery; within one delivery the transaction
/// already protects what was read.
///
/// ```no_run
/// # use oncely_guest::prelude::*;
/// # fn example(seen: u64) -> Result<(), Failure> {
/// match state::compare_and_set("cart-7", Some(seen), b"paid") {
///     Err(error) if error.is_version_mismatch() => log::info!("the cart has changed since"),
///     result => drop(result?),
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`ErrorKind::VersionMismatch`] when another version is there; otherwise see [`ErrorKind`].
pub fn compare_and_set(key: &str, expected: Option<u64>, value: &[u8]) -> Result<u64, Error> {
    wit::compare_and_set(key, expected, value).map_err(Error)
}

impl Entry {
    /// Reads the value as JSON.
    ///
    /// # Errors
    /// When the value is not the JSON that `T` expects.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.value)
    }
}

/// Why an operation on the state was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    /// Which kind of refusal it was.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// Whether [`compare_and_set`] found another version than the one expected.
    pub fn is_version_mismatch(&self) -> bool {
        matches!(self.0, ErrorKind::VersionMismatch(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::VersionMismatch(Some(found)) => {
                write!(f, "the key has changed: it is at version {found} now")
            }
            ErrorKind::VersionMismatch(None) => {
                f.write_str("the key has changed: it is not there any more")
            }
            ErrorKind::InvalidKey(why)
            | ErrorKind::TooLarge(why)
            | ErrorKind::TransactionFailed(why)
            | ErrorKind::Other(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}
