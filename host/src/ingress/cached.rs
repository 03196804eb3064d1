//! Cached reads: one load for all equal requests.
//!
//! A cached response is served until it expires or a writer invalidates one of its tags.

use std::sync::Arc;

use anyhow::Context as _;
use axum::body::{Body, HttpBody as _};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::incoming::read_body;
use super::key::LabelledDigest;
use super::problem::Problem;
use super::response::respond;
use super::{Ingress, Target};
use crate::cache::{CacheKey, Cached, Layer, Loaded, Policy};
use crate::config::manifest::{CachePolicy, CacheScope};
use crate::model::message::{Headers, header};
use crate::model::request::HttpResponse;

const IF_NONE_MATCH: &str = "if-none-match";

/// Headers that make a request conditional or partial.
const CONDITIONAL_HEADERS: [&str; 6] = [
    IF_NONE_MATCH,
    "if-modified-since",
    "if-match",
    "if-unmodified-since",
    "if-range",
    "range",
];

/// Request headers that may affect a response, besides those that identify the caller.
const KEYED_HEADERS: [&str; 3] = ["accept", "accept-language", "host"];

/// Request headers that may identify the caller, besides the configured one.
const CALLER_HEADERS: [&str; 2] = ["authorization", "cookie"];

/// The part of a cached value before the body.
#[derive(Serialize, Deserialize)]
struct CachedHead {
    status: u16,
    headers: Headers,
}

impl Ingress {
    /// Responds from the cache, or loads the response once for all equal requests.
    pub(super) async fn respond_from_cache(
        self: Arc<Self>,
        target: Arc<Target>,
        cache_policy: &CachePolicy,
        mut parts: Parts,
        body: Body,
    ) -> Response {
        // Refuse a body, and remove the conditional headers.
        if let Err(problem) = reject_body(body).await {
            return respond(problem.response(), false);
        }
        // The cached response is complete: other clients have no ETag to compare with.
        let if_none_match: Vec<HeaderValue> = parts
            .headers
            .get_all(IF_NONE_MATCH)
            .iter()
            .cloned()
            .collect();
        CONDITIONAL_HEADERS
            .iter()
            .for_each(|name| drop(parts.headers.remove(*name)));

        // The key, the policy and the tags of the response.
        let keyed = self.keyed_headers(cache_policy);
        let cache_key = CacheKey::response(target.key_owner(), &cache_key(&target, &keyed, &parts));
        let (policy, tags) = (
            Policy {
                ttl: cache_policy.ttl,
                stale: cache_policy.stale,
            },
            target.cache_tags(cache_policy),
        );
        let is_for_all = cache_policy.cache_scope == CacheScope::Shared;

        // Load the response, or wait for the request that loads it.
        let ingress = Arc::clone(&self);
        let load = move || async move {
            let response = match ingress.read(&target, parts, Body::empty()).await {
                Ok(incoming) => ingress
                    .handle_request(&target, &Arc::new(incoming))
                    .await
                    .map(|(response, _)| response),
                Err(problem) => Err(problem),
            };
            let response = response.unwrap_or_else(|problem| problem.response());
            let keep = is_cacheable(&response, is_for_all, &keyed).then_some(policy);
            anyhow::Ok(Loaded {
                value: encode(&response)?,
                tags,
                policy: keep,
            })
        };
        let cached = match self.cache.get_or_load(&cache_key, load).await {
            Ok(cached) => cached,
            Err(error) => {
                tracing::warn!(
                    error = format!("{:#}", error.cause()),
                    "failed to load a response"
                );
                return respond(Problem::unavailable().response(), false);
            }
        };

        // Respond.
        match decode(&cached.value) {
            Ok(response) => not_modified_if_matched(
                with_cache_headers(respond(response, false), &cached),
                &if_none_match,
            ),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "failed to decode a cached response"
                );
                respond(Problem::unavailable().response(), false)
            }
        }
    }

    /// The request headers that are part of the cache key, in lower case.
    fn keyed_headers(&self, cache_policy: &CachePolicy) -> Vec<String> {
        let callers = match cache_policy.cache_scope {
            CacheScope::Shared => Vec::new(),
            CacheScope::Caller => CALLER_HEADERS
                .into_iter()
                .chain(self.admission.caller.as_deref())
                .collect(),
        };
        KEYED_HEADERS
            .into_iter()
            .chain(callers)
            .map(str::to_owned)
            .collect()
    }
}

/// The cache key as a digest: version, path, and all values of the keyed headers, byte by byte.
fn cache_key(target: &Target, keyed: &[String], parts: &Parts) -> String {
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut digest = LabelledDigest::default();
    digest.add(":version", [target.version().to_be_bytes().as_slice()]);
    digest.add(":path", [path.as_bytes()]);
    keyed
        .iter()
        .for_each(|name| digest.header(&parts.headers, name));
    digest.hex()
}

/// Refuses a body: it could affect the response, but is not part of the key.
async fn reject_body(body: Body) -> Result<(), Problem> {
    if body.size_hint().lower() > 0 {
        return Err(Problem::body_refused());
    }
    match read_body(body, 0).await {
        Ok(_) => Ok(()),
        Err(problem) if problem.status == 413 => Err(Problem::body_refused()),
        Err(problem) => Err(problem),
    }
}

/// Whether a response may be served to other requests.
///
/// It has status 200, sets no cookie, and `Cache-Control` permits caching. It may vary by keyed
/// headers only.
fn is_cacheable(response: &HttpResponse, is_for_all: bool, keyed: &[String]) -> bool {
    let control = header_list(&response.headers, "cache-control");
    // A directive with an argument counts as well, as in `private="set-cookie"`.
    let says = |word: &str| {
        control
            .iter()
            .any(|part| part.split('=').next() == Some(word))
    };
    let sets_cookie = header(&response.headers, "set-cookie").is_some();
    let is_private = is_for_all && says("private");
    let is_keyed = header_list(&response.headers, "vary")
        .iter()
        .all(|name| keyed.contains(name));
    response.status == 200
        && !sets_cookie
        && !is_private
        && !says("no-store")
        && !says("no-cache")
        && is_keyed
}

/// The items of a list header over all its lines, in lower case and without quotes.
///
/// A quoted comma splits, too: an extra item can only prevent caching.
fn header_list(headers: &Headers, name: &str) -> Vec<String> {
    let lines = headers
        .iter()
        .filter(|(key, _)| key.eq_ignore_ascii_case(name));
    let members = lines.flat_map(|(_, line)| line.split(','));
    let members = members.map(|member| member.trim().trim_matches('"').trim().to_ascii_lowercase());
    members.filter(|member| !member.is_empty()).collect()
}

/// Encodes the length of the head, the head as JSON, and the unchanged body.
fn encode(response: &HttpResponse) -> anyhow::Result<Bytes> {
    let head = CachedHead {
        status: response.status,
        headers: response.headers.clone(),
    };
    let head = serde_json::to_vec(&head).context("encode the head of a response")?;
    let mut encoded = BytesMut::with_capacity(4 + head.len() + response.body.len());
    encoded.put_u32(u32::try_from(head.len()).context("encode the length of the head")?);
    encoded.put_slice(&head);
    encoded.put_slice(&response.body);
    Ok(encoded.freeze())
}

/// Decodes a value of [`encode`] without copying the body.
fn decode(value: &Bytes) -> anyhow::Result<HttpResponse> {
    let (length, rest) = value
        .split_first_chunk::<4>()
        .context("read the length of the head")?;
    let length =
        usize::try_from(u32::from_be_bytes(*length)).context("read the length of the head")?;
    let head = rest.get(..length).context("find the head of a response")?;
    let CachedHead { status, headers } =
        serde_json::from_slice(head).context("read the head of a response")?;
    Ok(HttpResponse {
        status,
        headers,
        body: value.slice(4 + length..),
    })
}

/// Converts the response to 304 Not Modified if the client already has it (RFC 9110
/// section 13.1.2).
fn not_modified_if_matched(mut response: Response, if_none_match: &[HeaderValue]) -> Response {
    let tag = response
        .headers()
        .get("etag")
        .and_then(|tag| tag.to_str().ok())
        .map(opaque_tag);
    let names = |value: &HeaderValue| {
        let value = value.to_str().unwrap_or_default();
        value
            .split(',')
            .any(|one| one.trim() == "*" || tag.is_some_and(|tag| opaque_tag(one.trim()) == tag))
    };
    if tag.is_some() && response.status() == StatusCode::OK && if_none_match.iter().any(names) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = Body::empty();
    }
    response
}

/// An entity tag without the weak prefix: the comparison is weak (RFC 9110 section 8.8.3.2).
fn opaque_tag(tag: &str) -> &str {
    tag.strip_prefix("W/").unwrap_or(tag)
}

/// Adds the age (RFC 9111) and the source (RFC 9211) of a response.
fn with_cache_headers(mut response: Response, cached: &Cached) -> Response {
    let status = match (cached.layer, cached.is_stale) {
        (Layer::Loaded, _) => "oncely; fwd=miss",
        (Layer::Local, false) => "oncely; hit; detail=local",
        (Layer::Shared, false) => "oncely; hit; detail=shared",
        (_, true) => "oncely; hit; detail=stale",
    };
    let headers = response.headers_mut();
    headers.insert("cache-status", HeaderValue::from_static(status));
    if cached.layer != Layer::Loaded {
        headers.insert("age", HeaderValue::from(cached.age.as_secs()));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)]) -> HttpResponse {
        let headers = headers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        HttpResponse {
            status,
            headers,
            body: Bytes::from_static(b"\x00body"),
        }
    }

    #[test]
    fn a_decoded_response_equals_the_encoded_one() {
        let response = response(200, &[("x", "caf\u{e9}"), ("x", "2")]);
        assert_eq!(decode(&encode(&response).unwrap()).unwrap(), response);
        assert!(decode(&Bytes::from_static(b"\x00\x00\x00\x09{}")).is_err());
    }

    fn keyed() -> Vec<String> {
        KEYED_HEADERS
            .into_iter()
            .chain(CALLER_HEADERS)
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn only_shareable_responses_are_cacheable() {
        let kept = |status, headers: &[(&str, &str)], is_for_all| {
            is_cacheable(&response(status, headers), is_for_all, &keyed())
        };
        assert!(kept(200, &[("cache-control", "max-age=3")], true));
        assert!(kept(200, &[("cache-control", "private")], false));
        assert!(!kept(404, &[], true));
        for line in [
            "max-age=3, Private",
            "private=\"x-user\"",
            "no-store",
            "NO-STORE=1",
            "no-cache",
            "\"no-store\"",
            "a,,no-store",
        ] {
            assert!(!kept(200, &[("cache-control", line)], true), "{line}");
        }
        // All lines of a header count.
        assert!(!kept(
            200,
            &[
                ("cache-control", "max-age=60"),
                ("Cache-Control", "no-store")
            ],
            false
        ));
        assert!(!kept(
            200,
            &[
                ("cache-control", "max-age=60"),
                ("cache-control", "private")
            ],
            true
        ));
        assert!(!kept(200, &[("x", "y"), ("Set-Cookie", "a=b")], false));
    }

    #[test]
    fn responses_with_an_unkeyed_vary_are_not_cacheable() {
        let kept = |lines: &[&str]| {
            let headers: Vec<(&str, &str)> = lines.iter().map(|line| ("Vary", *line)).collect();
            is_cacheable(&response(200, &headers), false, &keyed())
        };
        assert!(kept(&["Accept, Accept-Language", "cookie", ""]));
        for lines in [
            &["*"][..],
            &["X-Tenant"],
            &["accept, x-tenant"],
            &["accept", "origin"],
            &["accept,*"],
        ] {
            assert!(!kept(lines), "{lines:?}");
        }
        // A shared response must not vary by caller.
        let for_all: Vec<String> = KEYED_HEADERS.into_iter().map(str::to_owned).collect();
        assert!(!is_cacheable(
            &response(200, &[("vary", "authorization")]),
            true,
            &for_all
        ));
    }
}
