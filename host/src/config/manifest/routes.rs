//! `[[worker.route]]`: which requests over HTTP a worker answers, and on what terms.

use std::time::Duration;

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

/// What may stand in `methods`.
const METHODS: [&str; 7] = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"];

const PATH_EXAMPLE: &str = "\"/accounts/{id}/transfers\"";

/// One path with its terms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Such as `/accounts/{id}/transfers`; `{*rest}` at the end takes everything below.
    pub path: String,
    /// Empty for all.
    #[serde(default)]
    pub methods: Vec<String>,
    #[serde(default)]
    pub idempotency_key: KeyRule,
    /// For how long the same key gets the same answer.
    #[serde(with = "units::duration")]
    pub window: Duration,
    /// How long a request waits for another one with its key that is being handled.
    #[serde(with = "units::duration")]
    pub wait: Duration,
    #[serde(default)]
    pub store_failures: StoreFailures,
    /// The largest body of a request, in bytes.
    pub body_size: u64,
    /// How answers to GET are cached; none for not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
}

/// How answers of a route are cached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePolicy {
    /// How long an answer is as good as new.
    #[serde(with = "units::duration")]
    pub ttl: Duration,
    /// For how long after that it is still setting, while it is loaded anew.
    #[serde(with = "units::duration")]
    pub stale: Duration,
    /// Whoever invalidates one of them makes it be loaded anew. `{name}` stands for a part of the path.
    pub tags: Vec<String>,
    pub cache_scope: CacheScope,
}

/// For whom an answer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheScope {
    /// For the caller that asked.
    #[default]
    Caller,
    /// For everyone who asks the same.
    Shared,
}

/// Whether requests that change something need an idempotency key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyRule {
    /// POST and PATCH do. PUT and DELETE are idempotent by what they mean, and may have one.
    #[default]
    Required,
    Optional,
}

/// Which failures are kept, and setting again to who asks again with the same key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreFailures {
    /// Those that the handler answered. What a trap or a timeout cut off took no effect, and is run again.
    #[default]
    Answered,
    /// Also those.
    All,
}

impl Route {
    /// Whether it takes requests with this method.
    pub fn accepts_method(&self, method: &str) -> bool {
        let all = if self.methods.is_empty() {
            METHODS.as_slice()
        } else {
            &[]
        };
        all.contains(&method) || self.methods.iter().any(|one| one == method)
    }

    /// The methods that it takes.
    pub fn allowed_methods(&self) -> Vec<String> {
        match self.methods.is_empty() {
            true => METHODS.map(str::to_owned).to_vec(),
            false => self.methods.clone(),
        }
    }

    /// Whether such a request must bring a key.
    pub fn requires_key(&self, method: &str) -> bool {
        self.idempotency_key == KeyRule::Required && matches!(method, "POST" | "PATCH")
    }
}

/// Reads the routes of a worker.
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

/// What is said of caching, if `cache` says for how long.
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
                let what = format!("`{key}` says how something is cached, and nothing is");
                Err(text.refuse(
                    &section.span_of(key),
                    what,
                    "say for how long: cache = \"10s\"",
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

/// Not shorter than clients go on trying: what is forgotten too early is done twice.
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
        let what = format!("is shorter than clients try: {retried} (`clients_retry_for`)");
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
        return Err("paths below `/publish/` publish to a subject".to_owned());
    }
    matchit::Router::new()
        .insert(path, ())
        .map_err(|error| format!("`{}`: {error}", path.escape_debug()))
}
