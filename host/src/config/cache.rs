//! The cache: the memory limit in this process, and the address of the shared cache.

use std::fmt;

use super::sources::{Setting, Sources};
use super::without_password;
use crate::model::units;

/// The default memory limit of the cache, in bytes.
const SIZE_DEFAULT: u64 = 64 << 20;

/// The largest memory limit, in bytes.
const SIZE_MAX: u64 = 1 << 40;

const EXAMPLE: &str = "redis://cache.internal:6379/0";

/// The cache settings of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSettings {
    /// The memory limit of the cache in this process, in bytes; zero for none.
    pub size: u64,
    /// Redis or Valkey, shared by all hosts.
    pub shared: Option<CacheUrl>,
}

/// The URL of Redis, password included. It must not be shown unredacted.
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

/// Parses the URL. It may contain a password, so errors do not repeat it.
fn url(setting: &Setting) -> anyhow::Result<CacheUrl> {
    let Some((scheme, rest)) = setting.value.split_once("://") else {
        return Err(setting.refuse("it is not a URL", EXAMPLE));
    };
    if !["redis", "rediss", "valkey", "valkeys"].contains(&scheme) {
        return Err(setting.refuse(
            format!("`{scheme}://` is not a supported scheme; use redis or rediss"),
            EXAMPLE,
        ));
    }
    let (place, database) = rest.split_once('/').unwrap_or((rest, ""));
    let server = place.rsplit_once('@').map_or(place, |(_, server)| server);
    if server.is_empty() || setting.value.contains(char::is_whitespace) {
        return Err(setting.refuse("it names no server", EXAMPLE));
    }
    if !database.is_empty() && database.parse::<u16>().is_err() {
        return Err(setting.refuse("the path can only be the number of a database", EXAMPLE));
    }
    Ok(CacheUrl(setting.value.clone()))
}

impl CacheUrl {
    /// The URL itself, for the connection.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The URL without its password, for display.
    pub fn redacted(&self) -> String {
        without_password(&self.0)
    }
}

impl fmt::Debug for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}
