//! Reads a request to its end, with its idempotency key.

use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use bytes::Bytes;

use super::key;
use super::problem::Problem;
use crate::config::manifest::Route;
use crate::delivery::request::IncomingRequest;
use crate::guest::header_to_text;
use crate::http_server::BodyError;
use crate::model::request::{HttpRequest, RequestKey};

/// The maximum size of all header names and values of a request together, in bytes.
const HEADERS_MAX: usize = 32 << 10;

/// How a request is read.
pub(super) struct ReadRules<'r> {
    /// The path of the route, as part of the key.
    pub route: &'r str,
    pub requires_key: bool,
    /// How long the response is kept.
    pub window: Duration,
    /// The maximum size of the body, in bytes.
    pub body_max: u64,
    /// The method that the handler sees.
    pub method: String,
}

impl<'r> ReadRules<'r> {
    /// The rules for a request to a route.
    pub fn of_route(route: &'r Route, parts: &Parts) -> Self {
        let method = parts.method.as_str();
        // HEAD is GET without a body, unless the route lists HEAD itself (RFC 9110 section 9.3.2).
        let is_get = method == "HEAD" && (route.cache.is_some() || !route.accepts_method("HEAD"));
        ReadRules {
            route: &route.path,
            requires_key: route.requires_key(method),
            window: route.window,
            body_max: route.body_size,
            method: if is_get { "GET" } else { method }.to_owned(),
        }
    }
}

/// Reads the whole request, and derives its idempotency key and fingerprint.
///
/// `caller` is the configured header that identifies the caller.
pub(super) async fn read(
    rules: ReadRules<'_>,
    caller: Option<&str>,
    parts: Parts,
    body: Body,
) -> Result<IncomingRequest, Problem> {
    // Safe methods need no key, and a key they carry is ignored.
    let key = if parts.method.is_safe() {
        None
    } else {
        key::key(&parts.headers)?
    };
    if key.is_none() && rules.requires_key {
        return Err(Problem::key_missing());
    }

    // The size limits.
    let size = parts
        .headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum::<usize>();
    if size > HEADERS_MAX {
        return Err(Problem::headers_too_large(size, HEADERS_MAX));
    }
    let body = read_body(body, usize::try_from(rules.body_max).unwrap_or(usize::MAX)).await?;
    let caller = key::caller(&parts.headers, caller);
    let request = into_http_request(rules.method, parts, body);
    // The request may differ from its head: HEAD can become GET.
    let key = key.filter(|_| !request.is_safe()).map(|key| {
        let key = RequestKey {
            route: rules.route.to_owned(),
            caller,
            key,
            fingerprint: request.fingerprint(),
        };
        (key, rules.window)
    });
    Ok(IncomingRequest {
        request,
        key,
        trace: None,
    })
}

pub(super) async fn read_body(body: Body, max: usize) -> Result<Bytes, Problem> {
    axum::body::to_bytes(body, max).await.map_err(|error| {
        if cause::<http_body_util::LengthLimitError>(&error).is_some() {
            return Problem::body_too_large(max);
        }
        match cause(&error) {
            Some(BodyError::TooSlow) => Problem::too_slow(),
            Some(BodyError::NoMemory) => Problem::no_memory(),
            Some(BodyError::Incomplete(_)) | None => Problem::body_incomplete(),
        }
    })
}

/// The cause of type `E` of an error.
fn cause<E: std::error::Error + 'static>(error: &axum::Error) -> Option<&E> {
    let causes = std::iter::successors(std::error::Error::source(error), |error| error.source());
    causes.into_iter().find_map(|error| error.downcast_ref())
}

fn into_http_request(method: String, parts: Parts, body: Bytes) -> HttpRequest {
    let authority = parts
        .headers
        .get("host")
        .map(|host| header_to_text(host.as_bytes()))
        .unwrap_or_default();
    let headers = parts
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), header_to_text(value.as_bytes())));
    HttpRequest {
        method,
        path_and_query: parts
            .uri
            .path_and_query()
            .map_or_else(|| "/".to_owned(), ToString::to_string),
        authority,
        headers: headers.collect(),
        body,
    }
}
