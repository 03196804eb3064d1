//! Error responses of the ingress itself, as problem details (RFC 9457).

use bytes::Bytes;
use serde_json::json;

use super::problem_code::ProblemCode;
use crate::model::failure_code::FailureCode;
use crate::model::request::HttpResponse;

/// When requests to a paused worker may be retried, in seconds. Pauses last longer than other
/// reasons of a refusal.
const PAUSED_RETRY_AFTER: u32 = 10;

/// An error response that does not come from a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub status: u16,
    /// Stable; the last part of the problem's type.
    code: ProblemCode,
    title: &'static str,
    /// For people. It reveals nothing about the database or the internals of the handler.
    pub detail: String,
    /// After how many seconds the request may be retried, with the same key if it had one.
    retry_after: Option<u32>,
    allow: Option<String>,
}

impl Problem {
    fn new(status: u16, code: ProblemCode, title: &'static str, detail: impl Into<String>) -> Self {
        Problem {
            status,
            code,
            title,
            detail: detail.into(),
            retry_after: None,
            allow: None,
        }
    }

    fn retry_after(self, seconds: u32) -> Self {
        Problem {
            retry_after: Some(seconds),
            ..self
        }
    }

    pub(super) fn key_missing() -> Self {
        let detail = "this operation needs an Idempotency-Key header: \
                      one key for each operation, the same for each retry";
        Problem::new(
            400,
            ProblemCode::KeyMissing,
            "Idempotency-Key is missing",
            detail,
        )
    }

    pub(super) fn key_invalid(why: &str) -> Self {
        let detail = format!("the Idempotency-Key cannot be used: {why}");
        Problem::new(
            400,
            ProblemCode::KeyInvalid,
            "Idempotency-Key is invalid",
            detail,
        )
    }

    pub(super) fn key_reused() -> Self {
        let detail = "this Idempotency-Key was used for a request \
                      with another method, path, query, content type or body";
        Problem::new(
            422,
            ProblemCode::KeyReused,
            "Idempotency-Key is already used",
            detail,
        )
    }

    pub(super) fn in_progress() -> Self {
        let detail = "a request with this Idempotency-Key is in progress; retry with the same key";
        Problem::new(
            409,
            ProblemCode::InProgress,
            "A request is outstanding for this Idempotency-Key",
            detail,
        )
        .retry_after(1)
    }

    pub(super) fn not_found() -> Self {
        Problem::new(
            404,
            ProblemCode::NoSuchRoute,
            "Not found",
            "no route matches this path",
        )
    }

    pub(super) fn starting() -> Self {
        Problem::new(
            503,
            ProblemCode::Starting,
            "Starting",
            "the host and its workers are starting; retry soon",
        )
        .retry_after(1)
    }

    pub(super) fn method_not_allowed(allowed: &[String]) -> Self {
        let allowed = allowed.join(", ");
        let detail = format!("this path allows {allowed}");
        Problem {
            allow: Some(allowed),
            ..Problem::new(
                405,
                ProblemCode::MethodNotAllowed,
                "Method not allowed",
                detail,
            )
        }
    }

    pub(super) fn subject_refused(status: u16, why: impl Into<String>) -> Self {
        Problem::new(
            status,
            ProblemCode::SubjectRefused,
            "The subject cannot be published to",
            why,
        )
    }

    /// A request whose authority is missing, doubled or contradictory.
    pub(super) fn host_refused(why: &str) -> Self {
        Problem::new(
            400,
            ProblemCode::HostRefused,
            "The request does not name exactly one host",
            why,
        )
    }

    pub(super) fn caller_ambiguous(header: &str) -> Self {
        let detail =
            format!("the header `{header}` identifies the caller and occurs twice; send it once");
        Problem::new(
            400,
            ProblemCode::CallerAmbiguous,
            "The caller is ambiguous",
            detail,
        )
    }

    /// `header` cannot be a header of the message.
    pub(super) fn header_refused(header: &str, why: &str) -> Self {
        let detail = format!("the header `{header}` cannot be published: {why}");
        Problem::new(
            400,
            ProblemCode::HeaderRefused,
            "A header cannot be published",
            detail,
        )
    }

    pub(super) fn body_refused() -> Self {
        let detail = "responses of this path are cached by path, query and headers; \
                      send the request without a body";
        Problem::new(
            400,
            ProblemCode::BodyRefused,
            "This path takes no body",
            detail,
        )
    }

    pub(super) fn body_too_large(max: usize) -> Self {
        let detail = format!("the body has more than {max} bytes");
        Problem::new(
            413,
            ProblemCode::BodyTooLarge,
            "The body is too large",
            detail,
        )
    }

    /// A message above the limit of the NATS server.
    pub(super) fn message_too_large(size: usize, max: usize) -> Self {
        let detail = format!(
            "the message has {size} bytes with its headers; \
             the limit of the NATS server is {max} (max_payload)"
        );
        Problem::new(
            413,
            ProblemCode::BodyTooLarge,
            "The message is too large",
            detail,
        )
    }

    pub(super) fn no_stream(subject: &str) -> Self {
        let detail =
            format!("no stream accepts the subject `{subject}`, so the message cannot be stored");
        Problem::new(
            404,
            ProblemCode::NoStream,
            "No stream accepts this subject",
            detail,
        )
    }

    pub(super) fn headers_too_large(size: usize, max: usize) -> Self {
        let detail = format!("the headers have {size} bytes together; the limit is {max}");
        Problem::new(
            431,
            ProblemCode::HeadersTooLarge,
            "The headers are too large",
            detail,
        )
    }

    pub(super) fn body_incomplete() -> Self {
        Problem::new(
            400,
            ProblemCode::RequestTorn,
            "The request is incomplete",
            "the body ended early",
        )
    }

    pub(super) fn too_slow() -> Self {
        let detail = "the body arrived too slowly; nothing was done";
        Problem::new(
            408,
            ProblemCode::RequestTimeout,
            "The request took too long",
            detail,
        )
    }

    /// The memory for request bodies is exhausted.
    pub(super) fn no_memory() -> Self {
        let detail = "the memory for request bodies is exhausted; nothing was done";
        Problem::new(503, ProblemCode::Busy, "Too busy", detail).retry_after(1)
    }

    pub(super) fn paused() -> Self {
        let detail = "this operation is paused; nothing was done, retry later";
        Problem::new(503, ProblemCode::Paused, "Paused", detail).retry_after(PAUSED_RETRY_AFTER)
    }

    pub(super) fn busy() -> Self {
        let detail = "too many requests wait for this worker; nothing was done";
        Problem::new(503, ProblemCode::Busy, "Too busy", detail).retry_after(1)
    }

    pub(super) fn unavailable() -> Self {
        let detail =
            "the database is unavailable, or too many transactions conflicted; nothing was done";
        Problem::new(503, ProblemCode::Unavailable, "Unavailable", detail).retry_after(1)
    }

    /// It is unknown whether the request took effect.
    pub(super) fn outcome_unknown(has_key: bool) -> Self {
        let (code, title) = (ProblemCode::OutcomeUnknown, "The outcome is unknown");
        match has_key {
            true => {
                let detail = "retry with the same Idempotency-Key to get the final response";
                Problem::new(503, code, title, detail).retry_after(1)
            }
            false => Problem::new(
                500,
                code,
                title,
                "without an Idempotency-Key it is not safe to retry",
            ),
        }
    }

    /// The handler was cut off, or violated the protocol.
    pub(super) fn failed(code: Option<&str>) -> Self {
        let (status, code) = match code {
            Some(code) if code == FailureCode::Timeout.as_str() => {
                (504, ProblemCode::HandlerTimeout)
            }
            _ => (500, ProblemCode::HandlerFailed),
        };
        let detail = "the handler of this request failed and had no effect; \
                      the same request may be retried";
        Problem::new(status, code, "The handler failed", detail)
    }

    /// The same problem, for a response stored under its key: a retry gets it again.
    pub(super) fn as_permanent(&self) -> Self {
        let detail = "the handler of this request failed and had no effect; \
                      this response is stored under the key";
        Problem {
            detail: detail.to_owned(),
            ..self.clone()
        }
    }

    /// The problem as a response.
    pub(super) fn response(&self) -> HttpResponse {
        let body = json!({
            "type": format!("urn:oncely:problem:{}", self.code.as_str()),
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code.as_str(),
        });
        let mut headers = vec![
            (
                "content-type".to_owned(),
                "application/problem+json".to_owned(),
            ),
            ("cache-control".to_owned(), "no-store".to_owned()),
        ];
        headers.extend(
            self.retry_after
                .map(|seconds| ("retry-after".to_owned(), seconds.to_string())),
        );
        headers.extend(self.allow.clone().map(|allow| ("allow".to_owned(), allow)));
        HttpResponse {
            status: self.status,
            headers,
            body: Bytes::from(body.to_string()),
        }
    }
}
