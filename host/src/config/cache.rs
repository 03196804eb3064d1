//! The cache: how much of this process it may take, and where the shared one is.

use std::fmt;

use super::sources::{Setting, Sources};
use super::without_password;
use crate::model::units;

/// What the cache of a process may take unless told otherwise, in bytes.
const SIZE_DEFAULT: u64 = 64 << 20;

/// The most it can be told, in bytes.
const SIZE_MAX: u64 = 1 << 40;

const EXAMPLE: &str = "redis://cache.internal:6379/0";

/// How a host caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSettings {
    /// What the cache of this process may take, in bytes; zero for none.
    pub size: u64,
    /// Redis or Valkey, shared by all hosts.
    pub shared: Option<CacheUrl>,
}

/// Where Redis is, password included; it is never shown whole.
#[derive(Clone, PartialEq, Eq)]
pub struct CacheUrl(String);

impl Default for CacheSettings {
    fn default() -> Self {
        CacheSettings {
            size: SIZE_DEFAULT,
            shared: None,
        }
    }
}

pub(super) fn resolve(sources: &Sources<'_>) -> anyhow::Result<CacheSettings> {
    Ok(CacheSettings {
        size: sources
            .get("cache_size")
            .map_or(Ok(SIZE_DEFAULT), |setting| size(&setting))?,
        shared: sources
            .get("cache_url")
            .map(|setting| url(&setting))
            .transpose()?,
    })
}

fn size(setting: &Setting) -> anyhow::Result<u64> {
    match units::parse_size(&setting.value) {
        Ok(size) if size <= SIZE_MAX => Ok(size),
        _ => Err(setting.refuse_value("is not a size up to 1 TiB", "64MiB")),
    }
}

/// The value may hold a password, so it is not repeated.
fn url(setting: &Setting) -> anyhow::Result<CacheUrl> {
    let Some((scheme, rest)) = setting.value.split_once("://") else {
        return Err(setting.refuse("it is no URL", EXAMPLE));
    };
    if !["redis", "rediss", "valkey", "valkeys"].contains(&scheme) {
        return Err(setting.refuse(
            format!("`{scheme}://` is no way to a cache; there are redis and rediss"),
            EXAMPLE,
        ));
    }
    let (place, database) = rest.split_once('/').unwrap_or((rest, ""));
    let server = place.rsplit_once('@').map_or(place, |(_, server)| server);
    if server.is_empty() || setting.value.contains(char::is_whitespace) {
        return Err(setting.refuse("it names no server", EXAMPLE));
    }
    if !database.is_empty() && database.parse::<u16>().is_err() {
        return Err(setting.refuse(
            "behind the server there can only be the number of a database",
            EXAMPLE,
        ));
    }
    Ok(CacheUrl(setting.value.clone()))
}

impl CacheUrl {
    /// The URL itself, for whoever connects.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// For people: without the password.
    pub fn redacted(&self) -> String {
        without_password(&self.0)
    }
}

impl fmt::Debug for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}
