//! HTTP requests: the address, the admission rules, and the limits per listener.

use std::net::SocketAddr;
use std::time::Duration;

use super::HTTP_ADDRESS;
use super::sources::{Setting, Sources};
use crate::model::request::Admission;
use crate::model::subject;
use crate::model::units;

/// The largest connection limit that can be configured.
const CONNECTIONS_MAX: usize = 1_000_000;

/// The largest memory limit for bodies, in bytes.
const MEMORY_MAX: u64 = 1 << 40;

/// The smallest memory limit for bodies, in bytes: the default size limit of one request body.
const MEMORY_MIN: u64 = 1 << 20;

/// The range of all timeouts.
const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const TIMEOUT_MAX: Duration = Duration::from_secs(60 * 60);

/// The limits of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// The maximum number of open connections.
    pub connections: usize,
    /// The maximum size of all bodies in memory, in bytes.
    pub memory: usize,
    /// The timeout for the head of a request.
    pub head_timeout: Duration,
    /// The timeout for a body, plus one second for every 16 KiB.
    pub body_timeout: Duration,
    /// How long a connection stays open between two requests.
    pub idle_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            connections: 1024,
            memory: 128 << 20,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(75),
        }
    }
}

impl HttpLimits {
    /// The limits of the control API, which serves commands, probes and scrapes. They suffice for
    /// four uploads of the largest component.
    pub const CONTROL: HttpLimits = HttpLimits {
        connections: 64,
        memory: 256 << 20,
        head_timeout: Duration::from_secs(10),
        body_timeout: Duration::from_secs(30),
        idle_timeout: Duration::from_secs(75),
    };
}

pub(super) fn limits(sources: &Sources<'_>) -> anyhow::Result<HttpLimits> {
    let default = HttpLimits::default();
    let timeout_or = |key, default| {
        sources
            .get(key)
            .map_or(Ok(default), |setting| timeout(&setting))
    };
    Ok(HttpLimits {
        connections: sources
            .get("http_connections")
            .map_or(Ok(default.connections), |setting| connections(&setting))?,
        memory: sources
            .get("http_memory")
            .map_or(Ok(default.memory), |setting| memory(&setting))?,
        head_timeout: timeout_or("http_head_timeout", default.head_timeout)?,
        body_timeout: timeout_or("http_body_timeout", default.body_timeout)?,
        idle_timeout: timeout_or("http_idle_timeout", default.idle_timeout)?,
    })
}

fn connections(setting: &Setting) -> anyhow::Result<usize> {
    match setting.value.parse() {
        Ok(connections @ 1..=CONNECTIONS_MAX) => Ok(connections),
        _ => Err(setting.refuse_value("is not a whole number between 1 and 1000000", "1024")),
    }
}

fn memory(setting: &Setting) -> anyhow::Result<usize> {
    let size = units::parse_size(&setting.value)
        .ok()
        .filter(|size| (MEMORY_MIN..=MEMORY_MAX).contains(size));
    size.and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| setting.refuse_value("is not a size between 1 MiB and 1 TiB", "128MiB"))
}

fn timeout(setting: &Setting) -> anyhow::Result<Duration> {
    match units::parse_duration(&setting.value) {
        Ok(timeout) if (TIMEOUT_MIN..=TIMEOUT_MAX).contains(&timeout) => Ok(timeout),
        _ => Err(setting.refuse_value("is not a duration between 100ms and 1h", "30s")),
    }
}

/// The address for requests; `None` if they are off.
pub(super) fn address(sources: &Sources<'_>) -> anyhow::Result<Option<SocketAddr>> {
    let setting = sources
        .get("http")
        .unwrap_or_else(|| Setting::default_of("http", HTTP_ADDRESS));
    if setting.value == "off" {
        return Ok(None);
    }
    let address = setting
        .value
        .replacen("localhost:", "127.0.0.1:", 1)
        .parse();
    address.map(Some).map_err(|_| {
        setting.refuse_value("is neither an address with a port nor `off`", HTTP_ADDRESS)
    })
}

pub(super) fn admission(sources: &Sources<'_>) -> anyhow::Result<Admission> {
    Ok(Admission {
        caller: sources
            .get("http_caller")
            .map(|setting| caller(&setting))
            .transpose()?,
        publish: sources
            .get("http_publish")
            .map_or(Ok(Vec::new()), |setting| publish(&setting))?,
    })
}

fn caller(setting: &Setting) -> anyhow::Result<String> {
    let name = setting.value.to_ascii_lowercase();
    match axum::http::HeaderName::try_from(&name) {
        Ok(_) => Ok(name),
        Err(_) => Err(setting.refuse_value("is not a valid header name", "X-Account")),
    }
}

fn publish(setting: &Setting) -> anyhow::Result<Vec<String>> {
    let patterns: Vec<String> = setting
        .value
        .split(',')
        .map(|pattern| pattern.trim().to_owned())
        .collect();
    for pattern in &patterns {
        if let Err(why) = subject::check_pattern(pattern) {
            return Err(setting.refuse(
                format!("`{}` is not a valid subject: {why}", pattern.escape_debug()),
                "payments.requested",
            ));
        }
    }
    Ok(patterns)
}
