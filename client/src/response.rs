//! The response of a server, and the number of tries it took.

use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A response that was read to its end.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
    /// The number of tries, including this one.
    pub tries: u32,
    /// Whether the server flags this as the stored response of an earlier request with the same
    /// key.
    pub replayed: bool,
    /// The key of the request.
    pub key: Option<String>,
}

/// Headers that flag a replay. The draft defines none; these are the usual one and Stripe's.
const REPLAYED: [&str; 2] = ["idempotency-replayed", "idempotent-replayed"];

impl Response {
    pub(crate) fn new(status: StatusCode, headers: HeaderMap, body: Bytes) -> Self {
        let is_true = |name| {
            headers
                .get(name)
                .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"))
        };
        let replayed = REPLAYED.into_iter().any(is_true);
        Response {
            status,
            headers,
            body,
            tries: 1,
            replayed,
            key: None,
        }
    }

    /// The body as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body, parsed as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.body)
    }

    /// The problem details of the response, if it has any (RFC 9457, `application/problem+json`).
    pub fn problem(&self) -> Option<Problem> {
        let kind = self.headers.get(CONTENT_TYPE)?.to_str().ok()?;
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/problem+json") {
            return None;
        }
        Problem::read(&self.json().ok()?)
    }

    /// The wait that the server requests (`Retry-After`), in seconds or as a date. A date is
    /// compared with the `Date` of the response, if there is one, so that clock differences do not
    /// matter.
    pub fn retry_after(&self) -> Option<Duration> {
        let text = self.headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            // A number out of range means forever.
            return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
        }
        let until = httpdate::parse_http_date(text).ok()?;
        let date = self
            .headers
            .get(DATE)
            .and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        Some(
            until
                .duration_since(date.unwrap_or_else(SystemTime::now))
                .unwrap_or_default(),
        )
    }
}

/// The status, then the problem or the first line of the body.
impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        let text = match self.problem() {
            Some(problem) => problem.to_string(),
            None => self
                .text()
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(200)
                .collect(),
        };
        match text.trim() {
            "" => Ok(()),
            text => write!(f, ": {text}"),
        }
    }
}

/// Problem details (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// `type`: a URI that identifies the kind of problem; `about:blank` if only the status does.
    pub kind: String,
    /// A summary of the kind of problem, for people.
    pub title: Option<String>,
    /// The status, as the problem states it.
    pub status: Option<u16>,
    /// An explanation of this occurrence.
    pub detail: Option<String>,
}

impl Problem {
    /// Fields of an unexpected type are ignored, as the RFC requires.
    fn read(value: &Value) -> Option<Self> {
        let fields = value.as_object()?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        Some(Problem {
            kind: text("type").unwrap_or_else(|| "about:blank".to_owned()),
            title: text("title"),
            status: fields
                .get("status")
                .and_then(Value::as_u64)
                .and_then(|status| status.try_into().ok()),
            detail: text("detail"),
        })
    }

    /// Whether the problem mentions idempotency keys, as the draft's examples do.
    pub(crate) fn is_about_keys(&self) -> bool {
        let texts = [Some(&self.kind), self.title.as_ref(), self.detail.as_ref()];
        texts
            .into_iter()
            .flatten()
            .any(|text| text.to_ascii_lowercase().contains("idempoten"))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.title, &self.detail) {
            (Some(title), Some(detail)) => write!(f, "{title}: {detail}"),
            (Some(text), None) | (None, Some(text)) => write!(f, "{text}"),
            (None, None) => write!(f, "{}", self.kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn response(headers: &[(&'static str, &'static str)], body: &'static str) -> Response {
        let headers = headers.iter().map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        });
        Response::new(
            StatusCode::SERVICE_UNAVAILABLE,
            headers.collect(),
            Bytes::from_static(body.as_bytes()),
        )
    }

    fn retry_after(value: &'static str) -> Option<u64> {
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        response(&[("retry-after", value), ("date", date)], "")
            .retry_after()
            .map(|wait| wait.as_secs())
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_by_the_server_clock() {
        assert_eq!(retry_after("120"), Some(120));
        assert_eq!(retry_after(" 0 "), Some(0));
        assert_eq!(retry_after("99999999999999999999999999"), Some(u64::MAX));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(retry_after("Sunday, 06-Nov-94 08:50:07 GMT"), Some(30));
        assert_eq!(retry_after("Sun Nov  6 08:50:07 1994"), Some(30));
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:00:00 GMT"),
            Some(0),
            "a date in the past"
        );
        for nonsense in ["", "-1", "1.5", "soon", "+3"] {
            assert_eq!(retry_after(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(response(&[], "").retry_after(), None);
        // Without the server's date, the local clock is used.
        let past = response(&[("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")], "");
        assert_eq!(past.retry_after(), Some(Duration::ZERO));
    }

    #[test]
    fn problem_details_are_read_and_invalid_fields_ignored() {
        let json = r#"{"type":"https://example.com/funds","title":"Too little","status":"x","detail":7,"more":1}"#;
        let problem = response(
            &[("content-type", "application/problem+json; charset=utf-8")],
            json,
        )
        .problem()
        .unwrap();
        assert_eq!(problem.kind, "https://example.com/funds");
        assert_eq!(
            (problem.title.as_deref(), problem.status, problem.detail),
            (Some("Too little"), None, None)
        );
        assert_eq!(
            response(&[("content-type", "application/json")], json).problem(),
            None
        );
        assert_eq!(
            response(&[("content-type", "application/problem+json")], "[]").problem(),
            None
        );
        let empty = response(&[("content-type", "Application/Problem+JSON")], "{}");
        assert_eq!(empty.to_string(), "503 Service Unavailable: about:blank");
    }

    #[test]
    fn either_replay_header_marks_a_replay() {
        assert!(response(&[("idempotency-replayed", "true")], "").replayed);
        assert!(response(&[("idempotent-replayed", "True")], "").replayed);
        assert!(!response(&[("idempotency-replayed", "false")], "").replayed);
        assert!(!response(&[], "").replayed);
    }
}
