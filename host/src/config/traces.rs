//! Traces: the collector, the name of the service, and the share of traces that are recorded.

use std::fmt;

use axum::http::Uri;

use super::sources::{Setting, Sources};

/// The variable of OpenTelemetry that is read when no source of ours names an endpoint.
const ENDPOINT_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

const EXAMPLE: &str = "http://127.0.0.1:4318";

/// The longest name of a service, in bytes.
const SERVICE_MAX: usize = 255;

/// One whole, in the unit of [`TraceSettings::sampling`].
const WHOLE: u32 = 1_000_000;

/// The settings of the export of traces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceSettings {
    /// The collector; `None` if traces are off.
    pub endpoint: Option<TraceEndpoint>,
    /// The name of the service in all spans.
    pub service: String,
    /// The share of new traces that are recorded, in millionths.
    pub sampling: u32,
}

/// The base URL of a collector that takes OTLP over HTTP. Its path is never shown, because it may
/// contain a token.
#[derive(Clone, PartialEq, Eq)]
pub struct TraceEndpoint {
    scheme: String,
    /// Host and port as configured.
    authority: String,
    /// The path without a slash at its end.
    path: String,
}

impl Default for TraceSettings {
    fn default() -> Self {
        TraceSettings {
            endpoint: None,
            service: "oncely".to_owned(),
            sampling: WHOLE,
        }
    }
}

impl TraceSettings {
    /// The share of new traces as a bound on 63 bits.
    pub fn sample_below(&self) -> u64 {
        let share = (1_u128 << 63) * u128::from(self.sampling) / u128::from(WHOLE);
        u64::try_from(share).unwrap_or(u64::MAX)
    }
}

pub(super) fn resolve(
    sources: &Sources<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<TraceSettings> {
    let default = TraceSettings::default();
    let standard = || Setting::of_variable("traces", ENDPOINT_VARIABLE, env);
    Ok(TraceSettings {
        endpoint: match sources.get("traces").or_else(standard) {
            None => None,
            Some(setting) if setting.value == "off" => None,
            Some(setting) => Some(endpoint(&setting)?),
        },
        service: sources
            .get("traces_service")
            .map_or(Ok(default.service), |setting| service(&setting))?,
        sampling: sources
            .get("traces_sampling")
            .map_or(Ok(default.sampling), |setting| sampling(&setting))?,
    })
}

fn endpoint(setting: &Setting) -> anyhow::Result<TraceEndpoint> {
    // The value may contain a secret, so it is not repeated.
    let uri: Uri = setting
        .value
        .parse()
        .map_err(|_| setting.refuse("it is neither a URL nor `off`", EXAMPLE))?;
    let Some(scheme) = uri
        .scheme_str()
        .filter(|scheme| matches!(*scheme, "http" | "https"))
    else {
        return Err(setting.refuse("it begins neither with https:// nor with http://", EXAMPLE));
    };
    let host = |uri: &Uri| uri.host().is_some_and(|host| !host.is_empty());
    let Some(authority) = uri.authority().filter(|_| host(&uri)) else {
        return Err(setting.refuse("it names no host", EXAMPLE));
    };
    if authority.as_str().contains('@') || uri.query().is_some() {
        return Err(setting.refuse(
            "it contains a login or a query; send spans to a collector that adds them",
            EXAMPLE,
        ));
    }
    Ok(TraceEndpoint {
        scheme: scheme.to_owned(),
        authority: authority.to_string(),
        path: uri.path().trim_end_matches('/').to_owned(),
    })
}

fn service(setting: &Setting) -> anyhow::Result<String> {
    let name = setting.value.as_str();
    if name.trim().is_empty() || name.len() > SERVICE_MAX || name.chars().any(char::is_control) {
        return Err(setting.refuse(
            "it is not a name of 1 to 255 bytes without control characters",
            "payments",
        ));
    }
    Ok(name.to_owned())
}

fn sampling(setting: &Setting) -> anyhow::Result<u32> {
    match setting.value.parse::<f64>() {
        // The range is checked, so the conversion loses only digits behind the sixth.
        Ok(share) if (0.0..=1.0).contains(&share) => Ok((share * f64::from(WHOLE)).round() as u32),
        _ => Err(setting.refuse_value("is not a number between 0 and 1", "0.1")),
    }
}

impl TraceEndpoint {
    /// Whether the collector is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.scheme == "https"
    }

    /// The URL for spans. It must not be shown.
    pub fn url(&self) -> String {
        format!("{}{}/v1/traces", self.redacted(), self.path)
    }

    /// The URL without its path, for display.
    pub fn redacted(&self) -> String {
        format!("{}://{}", self.scheme, self.authority)
    }
}

impl fmt::Debug for TraceEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}
