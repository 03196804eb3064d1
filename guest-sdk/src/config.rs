//! The `[worker.config]` table of the manifest.

use std::fmt;

use crate::bindings::wasi::config::store as wit;
use crate::failure::Failure;

/// The value under `key`; none when the manifest does not set it.
///
/// # Errors
/// When the host fails to read the configuration.
pub fn get(key: &str) -> Result<Option<String>, Error> {
    wit::get(key).map_err(Error::from_wit)
}

/// The value under `key`, for a value that the worker requires.
///
/// # Errors
/// A retry with the code `config-missing` when the key is not set. The message names the missing
/// line: deploying a manifest with that line lets the retried message succeed.
pub fn require(key: &str) -> Result<String, Failure> {
    get(key)?.ok_or_else(|| {
        Failure::retry(format!(
            "the config value `{key}` is not set; add `{key} = \"...\"` under [worker.config]"
        ))
        .code("config-missing")
    })
}

/// All keys with their values.
///
/// # Errors
/// When the host fails to read the configuration.
pub fn all() -> Result<Vec<(String, String)>, Error> {
    wit::get_all().map_err(Error::from_wit)
}

/// Why a value could not be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    fn from_wit(error: wit::Error) -> Self {
        match error {
            wit::Error::Upstream(reason) | wit::Error::Io(reason) => Error(reason),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read the configuration: {}", self.0)
    }
}

impl std::error::Error for Error {}
