//! What an answer means for the operation: done, refused, or worth another try.

use reqwest::StatusCode;

use crate::key::Key;
use crate::{Answer, Failure};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It was carried out.
    Done,
    /// The server will answer the same however often it is asked.
    Refused,
    /// The key was used before, with another request.
    KeyReused,
    /// It may go better next time, if trying again is safe.
    Again,
}

/// Judges an answer to a request that went under `key`.
pub(crate) fn verdict(answer: &Answer, key: Option<&Key>) -> Verdict {
    use StatusCode as S;
    match answer.status {
        status if status.is_success() || status == S::NOT_MODIFIED => Verdict::Done,
        // It is stored: whoever asks again gets it again, a 500 or a 503 too.
        _ if answer.replayed => Verdict::Refused,
        S::UNPROCESSABLE_ENTITY if key_reused(answer, key) => Verdict::KeyReused,
        // Another request with this key is under way. Any other conflict is the handler's own, and stays.
        S::CONFLICT if answer.retry_after().is_some() => Verdict::Again,
        // An error of the server that is not marked as a replay: either nothing was stored, and the next try runs, or
        // this very answer was, and the next try is told so and ends there. With a key both are safe.
        S::INTERNAL_SERVER_ERROR => Verdict::Again,
        S::REQUEST_TIMEOUT | S::TOO_EARLY | S::TOO_MANY_REQUESTS => Verdict::Again,
        S::BAD_GATEWAY | S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT => Verdict::Again,
        _ => Verdict::Refused,
    }
}

/// Whether a 422 is about the key. Handlers say 422 to bodies they cannot use, too: so not if the key was made for
/// this operation, nor if problem details are there and speak of something else.
fn key_reused(answer: &Answer, key: Option<&Key>) -> bool {
    matches!(key, Some(Key::Brought(_))) && answer.problem().is_none_or(|problem| problem.is_about_keys())
}

/// Whether the server may have carried the operation out although it did not say so.
pub(crate) fn may_have_run(failure: &Failure) -> bool {
    match failure {
        Failure::TimedOut(_) => true,
        Failure::Broken(error) => !error.is_connect(),
        // These refuse a request before it is looked at.
        Failure::Answer(answer) => !matches!(
            answer.status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
        ),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

    use super::*;

    fn judged(status: u16, headers: &[(&'static str, &'static str)], body: &'static str) -> Verdict {
        judged_under(&Key::Brought("order-1".to_owned()), status, headers, body)
    }

    fn judged_under(key: &Key, status: u16, headers: &[(&'static str, &'static str)], body: &'static str) -> Verdict {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        verdict(
            &Answer::new(StatusCode::from_u16(status).unwrap(), headers, Bytes::from_static(body.as_bytes())),
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
                _ if again.contains(&status) => Verdict::Again,
                _ => Verdict::Refused,
            };
            assert_eq!(judged(status, &[], ""), expected, "{status}");
        }
    }

    #[test]
    fn a_conflict_is_tried_again_if_the_server_says_when() {
        assert_eq!(judged(409, &[("retry-after", "1")], ""), Verdict::Again);
        assert_eq!(judged(409, &[], ""), Verdict::Refused);
        assert_eq!(judged(404, &[("retry-after", "1")], ""), Verdict::Refused);
    }

    #[test]
    fn what_is_replayed_stays_as_it_is() {
        for status in [400, 409, 422, 429, 500, 503] {
            let headers = [("idempotency-replayed", "true"), ("retry-after", "1")];
            assert_eq!(judged(status, &headers, ""), Verdict::Refused, "{status}");
        }
        assert_eq!(judged(200, &[("idempotency-replayed", "true")], ""), Verdict::Done);
    }

    #[test]
    fn a_422_is_about_the_key_unless_it_cannot_be() {
        let problem = [("content-type", "application/problem+json")];
        let draft = r#"{"type":"https://developer.example.com/idempotency","title":"Idempotency-Key is already used"}"#;
        assert_eq!(judged(422, &problem, draft), Verdict::KeyReused);
        assert_eq!(judged(422, &problem, r#"{"title":"Account closed"}"#), Verdict::Refused);
        assert_eq!(judged_under(&Key::Made("1".to_owned()), 422, &problem, draft), Verdict::Refused);
    }
}
