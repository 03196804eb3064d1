//! The verdict on a response: done, refused, or worth another try.

use reqwest::StatusCode;

use crate::key::Key;
use crate::{Failure, Response};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The operation was carried out.
    Done,
    /// The server returns the same response to every try.
    Refused,
    /// The key was used before, with another request.
    KeyReused,
    /// Another try may succeed, if it is safe.
    Retry,
}

/// The verdict on a response to a request with `key`.
pub(crate) fn verdict(response: &Response, key: Option<&Key>) -> Verdict {
    use StatusCode as S;
    match response.status {
        status if status.is_success() || status == S::NOT_MODIFIED => Verdict::Done,
        // The response is stored: every try gets it again, also a 500 or a 503.
        _ if response.replayed => Verdict::Refused,
        S::UNPROCESSABLE_ENTITY if key_reused(response, key) => Verdict::KeyReused,
        // Another request with this key is in progress. Any other 409 comes from the handler and is
        // final.
        S::CONFLICT if response.retry_after().is_some() => Verdict::Retry,
        // A server error that is not marked as a replay. If the server stored nothing, the next try
        // runs the handler. If it stored this response, the next try gets it as a replay and ends
        // there. With a key both are safe.
        S::INTERNAL_SERVER_ERROR => Verdict::Retry,
        S::REQUEST_TIMEOUT | S::TOO_EARLY | S::TOO_MANY_REQUESTS => Verdict::Retry,
        S::BAD_GATEWAY | S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT => Verdict::Retry,
        _ => Verdict::Refused,
    }
}

/// Whether a 422 is about the key. Handlers also use 422 for invalid bodies. So it is not about the
/// key if the key was generated, or if the problem details describe another problem.
fn key_reused(response: &Response, key: Option<&Key>) -> bool {
    matches!(key, Some(Key::Provided(_)))
        && response
            .problem()
            .is_none_or(|problem| problem.is_about_keys())
}

/// Whether the server may have carried the operation out without confirming it.
pub(crate) fn may_have_run(failure: &Failure) -> bool {
    match failure {
        Failure::TimedOut(_) => true,
        Failure::Connection(error) => !error.is_connect(),
        // These refuse a request before it is handled.
        Failure::Response(response) => !matches!(
            response.status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
        ),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

    use super::*;

    fn verdict_of(
        status: u16,
        headers: &[(&'static str, &'static str)],
        body: &'static str,
    ) -> Verdict {
        verdict_under(&Key::Provided("order-1".to_owned()), status, headers, body)
    }

    fn verdict_under(
        key: &Key,
        status: u16,
        headers: &[(&'static str, &'static str)],
        body: &'static str,
    ) -> Verdict {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect();
        verdict(
            &Response::new(
                StatusCode::from_u16(status).unwrap(),
                headers,
                Bytes::from_static(body.as_bytes()),
            ),
            Some(key),
        )
    }

    #[test]
    fn each_status_has_its_verdict() {
        let again = [408, 425, 429, 500, 502, 503, 504];
        for status in 200..600 {
            let expected = match status {
                200..300 | 304 => Verdict::Done,
                422 => Verdict::KeyReused,
                _ if again.contains(&status) => Verdict::Retry,
                _ => Verdict::Refused,
            };
            assert_eq!(verdict_of(status, &[], ""), expected, "{status}");
        }
    }

    #[test]
    fn a_409_with_retry_after_is_retried() {
        assert_eq!(verdict_of(409, &[("retry-after", "1")], ""), Verdict::Retry);
        assert_eq!(verdict_of(409, &[], ""), Verdict::Refused);
        assert_eq!(
            verdict_of(404, &[("retry-after", "1")], ""),
            Verdict::Refused
        );
    }

    #[test]
    fn a_replayed_response_is_not_retried() {
        for status in [400, 409, 422, 429, 500, 503] {
            let headers = [("idempotency-replayed", "true"), ("retry-after", "1")];
            assert_eq!(
                verdict_of(status, &headers, ""),
                Verdict::Refused,
                "{status}"
            );
        }
        assert_eq!(
            verdict_of(200, &[("idempotency-replayed", "true")], ""),
            Verdict::Done
        );
    }

    #[test]
    fn a_422_means_key_reuse_only_for_a_caller_provided_key() {
        let problem = [("content-type", "application/problem+json")];
        let draft = r#"{"type":"https://developer.example.com/idempotency","title":"Idempotency-Key is already used"}"#;
        assert_eq!(verdict_of(422, &problem, draft), Verdict::KeyReused);
        assert_eq!(
            verdict_of(422, &problem, r#"{"title":"Account closed"}"#),
            Verdict::Refused
        );
        assert_eq!(
            verdict_under(&Key::Generated("1".to_owned()), 422, &problem, draft),
            Verdict::Refused
        );
    }
}
