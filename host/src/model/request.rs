//! HTTP requests and responses as plain values.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::model::message::Headers;

/// One complete request. Header values are bytes, each of them one character from U+0000 to U+00FF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRequest {
    /// Upper case for all standard methods.
    pub method: String,
    /// As sent, such as `/accounts/7?at=now`.
    pub path_and_query: String,
    /// Host and port, as named by the caller.
    pub authority: String,
    /// All headers, in order. A name may repeat.
    pub headers: Headers,
    /// The whole body; empty if the request has none.
    pub body: Bytes,
}

/// One complete response, as stored and replayed. Header values are as in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResponse {
    /// The status code.
    pub status: u16,
    /// All headers, in order. A name may repeat.
    pub headers: Headers,
    /// The whole body, possibly empty.
    pub body: Bytes,
}

impl HttpResponse {
    /// Whether the effects of its handler are committed: the status is below 400.
    pub fn is_success(&self) -> bool {
        self.status < 400
    }
}

/// The rules of admission: the identity of callers, and publishing without a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    /// The header that identifies the caller; none for `Authorization`.
    pub caller: Option<String>,
    /// Patterns of subjects that may be published to.
    pub publish: Vec<String>,
}

/// The identity of a request to a worker across repeats.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// As in the manifest, such as `/accounts/{id}/transfers`.
    pub route: String,
    /// A digest of the caller; empty for an unidentified one.
    pub caller: String,
    /// The value of the header `Idempotency-Key`.
    pub key: String,
    /// SHA-256 over everything else that must be the same; see [`HttpRequest::fingerprint`].
    pub fingerprint: [u8; 32],
}

impl HttpRequest {
    /// Whether the method is safe (RFC 9110, section 9.2.1).
    pub fn is_safe(&self) -> bool {
        matches!(self.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "TRACE")
    }

    /// SHA-256 over method, path, query, all content types, and body.
    pub fn fingerprint(&self) -> [u8; 32] {
        let is_content_type = |name: &str| name.eq_ignore_ascii_case("content-type");
        let content_types = self
            .headers
            .iter()
            .filter(|(name, _)| is_content_type(name))
            .map(|(_, value)| value);
        let parts: Vec<&String> = [&self.method, &self.path_and_query]
            .into_iter()
            .chain(content_types)
            .collect();
        let mut hasher = Sha256::new();
        hasher.update((parts.len() as u64).to_be_bytes());
        for part in parts {
            hasher.update((part.len() as u64).to_be_bytes());
            hasher.update(part);
        }
        hasher.update(&self.body);
        hasher.finalize().into()
    }
}

impl RequestKey {
    /// An id that is the same for every attempt at this request to `worker`, and for no other
    /// request.
    pub fn invocation_id(&self, worker: &str) -> String {
        let mut hasher = Sha256::new();
        for part in [&self.route, &self.caller, &self.key] {
            hasher.update((part.len() as u64).to_be_bytes());
            hasher.update(part);
        }
        hasher.update(self.fingerprint);
        format!("{worker}:{}", hex::encode(hasher.finalize()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(content_types: &[&str], body: &'static str) -> HttpRequest {
        HttpRequest {
            method: "POST".to_owned(),
            path_and_query: "/a".to_owned(),
            authority: "localhost".to_owned(),
            headers: content_types
                .iter()
                .map(|value| ("Content-Type".to_owned(), (*value).to_owned()))
                .collect(),
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    #[test]
    fn fingerprint_covers_all_content_types() {
        let of = |content_types: &[&str], body| request(content_types, body).fingerprint();
        assert_eq!(of(&["text/plain"], "a"), of(&["text/plain"], "a"));
        assert_ne!(
            of(&["text/plain"], "a"),
            of(&["text/plain", "text/html"], "a")
        );
        assert_ne!(
            of(&["text/plain", "text/html"], "a"),
            of(&["text/plain", "text/css"], "a")
        );
        assert_ne!(of(&[], "a"), of(&[""], "a"));
    }
}
