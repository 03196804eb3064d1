//! Requests over HTTP and answers to them, as plain values.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::model::message::Headers;

/// One request, whole. Header values are bytes, each of them one character from U+0000 to U+00FF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpRequest {
    /// Upper case for all that is standard.
    pub method: String,
    /// As it was sent, such as `/accounts/7?at=now`.
    pub path_and_query: String,
    /// Host and port that the caller named.
    pub authority: String,
    pub headers: Headers,
    pub body: Bytes,
}

/// One answer, whole: as it is kept and given again. Header values are as those of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResponse {
    pub status: u16,
    pub headers: Headers,
    pub body: Bytes,
}

/// Whose requests they are, and what may be published without a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    /// The header that says who asks; none for `Authorization`.
    pub caller: Option<String>,
    /// Patterns of subjects that may be published to.
    pub publish: Vec<String>,
}

/// What makes a request the same request when it comes again to the same worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// Of the manifest, such as `/accounts/{id}/transfers`.
    pub route: String,
    /// Who asked, as a digest; empty for one that nobody vouches for.
    pub caller: String,
    pub key: String,
    /// SHA-256 of everything that must be the same, too; see [`HttpRequest::fingerprint`].
    pub fingerprint: [u8; 32],
}

impl HttpRequest {
    /// Whether its method promises to change nothing ("safe", RFC 9110 section 9.2.1).
    pub fn is_safe(&self) -> bool {
        matches!(self.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "TRACE")
    }

    /// SHA-256 over method, path, query, all lines of the content type, and body.
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
    /// The same for every attempt at this request to `worker`, and for no other.
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
