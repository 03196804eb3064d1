//! `[[worker.route]]`: the HTTP requests that a worker answers, with their settings.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parse::one_of;
use crate::config::toml_text::{Section, Text};
use crate::model::cache_writes::{TTL_MAX, check_name};
use crate::model::units;

pub(super) const ROUTE_KEYS: [&str; 12] = [
    "path",
    "methods",
    "idempotency_key",
    "window",
    "clients_retry_for",
    "wait",
    "store_failures",
    "body_size",
    "cache",
    "cache_stale",
    "cache_tags",
    "cache_scope",
];

/// The allowed values of `methods`.
pub(super) const METHODS: [&str; 7] = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"];

const PATH_EXAMPLE: &str = "\"/accounts/{id}/transfers\"";

/// One path with its settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Route {
    /// A path such as `/accounts/{id}/transfers`; a final `{*rest}` matches everything below.
    pub path: String,
    /// The allowed methods; empty for all.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Whether POST and PATCH require an idempotency key.
    #[serde(default)]
    pub idempotency_key: KeyRule,
    /// How long a key gets the stored response.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub window: Duration,
    /// How long a request waits for another request in progress with its key.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub wait: Duration,
    /// The failures that are stored and returned to later requests with the same key.
    #[serde(default)]
    pub store_failures: StoreFailures,
    /// The maximum size of a request body, in bytes.
    pub body_size: u64,
    /// How responses to GET are cached; `None` for no caching.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
}

/// How responses of a route are cached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CachePolicy {
    /// How long a response is fresh.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub ttl: Duration,
    /// How long after that it is still served, while it is reloaded.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub stale: Duration,
    /// Invalidating one of these tags invalidates the response. `{name}` stands for a part of the
    /// path.
    pub tags: Vec<String>,
    /// The callers that may receive a cached response.
    pub cache_scope: CacheScope,
}

/// The callers that may receive a cached response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheScope {
    /// Only the caller for which it was loaded.
    #[default]
    Caller,
    /// Every caller with the same request.
    Shared,
}

/// Whether requests with effects need an idempotency key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeyRule {
    /// Required for POST and PATCH. PUT and DELETE are idempotent by definition, so their key is
    /// optional.
    #[default]
    Required,
    /// Never required. A request without a key runs each time it is sent.
    Optional,
}

/// The failures that are stored and returned to later requests with the same key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StoreFailures {
    /// Failures in the handler's responses. A trap or a timeout has no effect, and the request runs
    /// again.
    #[default]
    Answered,
    /// Traps and timeouts too.
    All,
}

impl Route {
    /// Whether it accepts requests with this method.
    pub fn accepts_method(&self, method: &str) -> bool {
        let all = if self.methods.is_empty() {
            METHODS.as_slice()
        } else {
            &[]
        };
        all.contains(&method) || self.methods.iter().any(|one| one == method)
    }

    /// The methods that it accepts.
    pub fn allowed_methods(&self) -> Vec<String> {
        match self.methods.is_empty() {
            true => METHODS.map(str::to_owned).to_vec(),
            false => self.methods.clone(),
        }
    }

    /// Whether a request with this method must have a key.
    pub fn requires_key(&self, method: &str) -> bool {
        self.idempotency_key == KeyRule::Required && matches!(method, "POST" | "PATCH")
    }
}

/// Parses the routes of a worker.
pub(super) fn routes(text: Text<'_>, worker: &Section<'_>) -> anyhow::Result<Vec<Route>> {
    let mut routes: Vec<Route> = Vec::new();
    for section in worker.tables("route", "[[worker.route]]", &ROUTE_KEYS)? {
        let path = section.text("path", PATH_EXAMPLE, check_path)?;
        let path = path.ok_or_else(|| section.missing("path", PATH_EXAMPLE))?;
        let methods = section.texts("methods", "[\"POST\"]", one_of(&METHODS))?;
        let route = Route {
            path: path.value,
            methods: methods.into_iter().map(|method| method.value).collect(),
            idempotency_key: match section.text(
                "idempotency_key",
                "\"optional\"",
                one_of(&["required", "optional"]),
            )? {
                Some(found) if found.value == "optional" => KeyRule::Optional,
                _ => KeyRule::Required,
            },
            window: window(&section)?,
            wait: section
                .duration("wait", "\"1s\"", Duration::ZERO..=Duration::from_secs(30))?
                .unwrap_or(Duration::from_secs(1)),
            store_failures: match section.text(
                "store_failures",
                "\"all\"",
                one_of(&["answered", "all"]),
            )? {
                Some(found) if found.value == "all" => StoreFailures::All,
                _ => StoreFailures::Answered,
            },
            body_size: section
                .size("body_size", "\"1MiB\"", 0..=64 << 20)?
                .unwrap_or(1 << 20),
            cache: cache(text, &section)?,
        };
        let meets = |other: &&Route| {
            other.path == route.path
                && (other.methods.is_empty()
                    || route.methods.is_empty()
                    || other
                        .methods
                        .iter()
                        .any(|method| route.methods.contains(method)))
        };
        if let Some(other) = routes.iter().find(meets) {
            let what = format!(
                "the path `{}` has two routes for the same method",
                other.path
            );
            return Err(text.refuse(
                &path.span,
                what,
                "name the methods of each: methods = [\"GET\"]",
            ));
        }
        routes.push(route);
    }
    Ok(routes)
}

/// The cache policy, if `cache` is set.
fn cache(text: Text<'_>, section: &Section<'_>) -> anyhow::Result<Option<CachePolicy>> {
    let ttl = section.duration("cache", "\"10s\"", Duration::from_millis(1)..=TTL_MAX)?;
    let stale = section.duration("cache_stale", "\"1m\"", Duration::ZERO..=TTL_MAX)?;
    let tags = section.texts("cache_tags", "[\"account:{id}\"]", |tag| {
        check_name("tag", tag)
    })?;
    let cache_scope = section.text("cache_scope", "\"shared\"", one_of(&["caller", "shared"]))?;
    let Some(ttl) = ttl else {
        let orphan = ["cache_stale", "cache_tags", "cache_scope"]
            .into_iter()
            .find(|key| section.has(key));
        return match orphan {
            Some(key) => {
                let what = format!("`{key}` has no effect without `cache`");
                Err(text.refuse(
                    &section.span_of(key),
                    what,
                    "set the time to live: cache = \"10s\"",
                ))
            }
            None => Ok(None),
        };
    };
    Ok(Some(CachePolicy {
        ttl,
        stale: stale.unwrap_or_default(),
        tags: tags.into_iter().map(|tag| tag.value).collect(),
        cache_scope: match cache_scope {
            Some(found) if found.value == "shared" => CacheScope::Shared,
            _ => CacheScope::Caller,
        },
    }))
}

/// The time for which keys are kept. It must cover the clients' retries: a key that expires earlier
/// lets an effect happen twice.
fn window(section: &Section<'_>) -> anyhow::Result<Duration> {
    let (least, most) = (
        Duration::from_secs(60),
        Duration::from_secs(366 * 24 * 60 * 60),
    );
    let window = section
        .duration("window", "\"24h\"", least..=most)?
        .unwrap_or(Duration::from_secs(24 * 60 * 60));
    let retried = section
        .duration("clients_retry_for", "\"1h\"", Duration::ZERO..=most)?
        .unwrap_or_default();
    if retried > window {
        let retried = units::format_duration(retried);
        let what = format!("is shorter than `clients_retry_for` ({retried})");
        return Err(section.invalid(
            &section.span_of("window"),
            "window",
            &what,
            &format!("{retried:?}"),
        ));
    }
    Ok(window)
}

fn check_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') {
        return Err(format!(
            "`{}` does not begin with a slash",
            path.escape_debug()
        ));
    }
    if path.starts_with("/publish/") {
        return Err("paths below `/publish/` are reserved for publishing to a subject".to_owned());
    }
    matchit::Router::new()
        .insert(path, ())
        .map_err(|error| format!("`{}`: {error}", path.escape_debug()))
}
