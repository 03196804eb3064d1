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

/// The value under a key with its version; none when the key does not exist.
///
/// # Errors
/// See [`ErrorKind`].
pub fn get(key: &str) -> Result<Option<Entry>, Error> {
    wit::get(key).map_err(Error)
}

/// The value under a key, parsed as JSON; none when the key does not exist.
///
/// # Errors
/// A retry when the state is unavailable or its value does not parse as a `T`.
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>, Failure> {
    let Some(entry) = get(key)? else {
        return Ok(None);
    };
    entry.json().map(Some).map_err(|error| {
        Failure::retry(format!(
            "the state under `{key}` is not the expected JSON: {error}"
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
/// A retry when the state is unavailable or `value` cannot be serialized as JSON.
pub fn set_json(key: &str, value: &impl Serialize) -> Result<u64, Failure> {
    Ok(set(key, &serde_json::to_vec(value)?)?)
}

/// Deletes a key. Returns false when the key did not exist.
///
/// # Errors
/// See [`ErrorKind`].
pub fn delete(key: &str) -> Result<bool, Error> {
    wit::delete(key).map_err(Error)
}

/// Sets a value only if the key still has the `expected` version (none: only if the key does not
/// exist), and returns the new version.
///
/// This is optimistic locking for a value that was read in an earlier delivery. Within one delivery
/// the transaction already protects values that were read.
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
/// [`ErrorKind::VersionMismatch`] when the key has another version; otherwise see [`ErrorKind`].
pub fn compare_and_set(key: &str, expected: Option<u64>, value: &[u8]) -> Result<u64, Error> {
    wit::compare_and_set(key, expected, value).map_err(Error)
}

impl Entry {
    /// Parses the value as JSON.
    ///
    /// # Errors
    /// When the value does not parse as a `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.value)
    }
}

/// Why an operation on the state was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    /// The kind of refusal.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// Whether [`compare_and_set`] found another version than the expected one.
    pub fn is_version_mismatch(&self) -> bool {
        matches!(self.0, ErrorKind::VersionMismatch(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::VersionMismatch(Some(found)) => {
                write!(f, "version mismatch: the key is at version {found}")
            }
            ErrorKind::VersionMismatch(None) => {
                f.write_str("version mismatch: the key does not exist")
            }
            ErrorKind::InvalidKey(reason)
            | ErrorKind::TooLarge(reason)
            | ErrorKind::TransactionFailed(reason)
            | ErrorKind::Other(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}
