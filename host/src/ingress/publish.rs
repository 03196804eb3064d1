//! `POST /publish/{subject}`: publishes a message through the outbox.
//!
//! The message is written in the transaction of its idempotency key; the relay publishes it to its
//! stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use serde_json::json;
use uuid::Uuid;

use super::problem::Problem;
use crate::bus::{Bus, stream_for_subject};
use crate::delivery::request::{IncomingRequest, RequestClaim, RequestOutcome, claim, commit};
use crate::delivery::{HAND_OVER_LEASE, RequestTrace};
use crate::http_server::original_header_names;
use crate::metrics::Metrics;
use crate::model::message::{self, Headers, Output, OutputKind};
use crate::model::request::HttpResponse;
use crate::model::subject;
use crate::model::trace_context::{TraceContext, has_trace};
use crate::store::{KeptResponse, Store, StoreError, Tx};
use crate::traces::Traces;

/// The prefix of the paths.
pub(super) const PATH: &str = "/publish/";

/// The owner of these keys and outputs. No worker can have this name.
pub const PUBLISHER: &str = "oncely:publish";

/// How long a key is kept. Within that time the same key publishes nothing again.
pub const PUBLISH_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// The timeout of one statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Request headers that are copied to the message.
const FORWARDED_HEADERS: [&str; 3] = ["content-type", "traceparent", "tracestate"];

/// The prefix of request headers that become headers of the message.
const HEADER_PREFIX: &str = "x-message-";

pub(super) struct Publisher {
    pub store: Arc<Store>,
    pub bus: Bus,
    pub metrics: Arc<Metrics>,
    pub traces: Traces,
}

/// A message to publish, without its body.
pub(super) struct Publication {
    pub subject: String,
    pub headers: Headers,
}

impl Publication {
    /// Reads the path after [`PATH`] and the headers of a request. `granted` lists the subject
    /// patterns that may be published to.
    pub(super) async fn read(
        path: &str,
        parts: &Parts,
        granted: &[String],
    ) -> Result<Self, Problem> {
        let subject = subject(path, granted)?;
        let written = original_header_names(parts, HEADER_PREFIX).await;
        Ok(Publication {
            subject,
            headers: message_headers(&parts.headers, &written)?,
        })
    }
}

/// The subject of a path, if it may be published to.
fn subject(path: &str, granted: &[String]) -> Result<String, Problem> {
    let subject = percent_encoding::percent_decode_str(path)
        .decode_utf8()
        .map_err(|_| Problem::subject_refused(400, "the subject is not UTF-8"))?
        .into_owned();
    subject::check_subject(&subject)
        .map_err(|why| Problem::subject_refused(400, why.to_string()))?;
    if subject::is_reserved(&subject)
        || !granted
            .iter()
            .any(|pattern| subject::matches(pattern, &subject))
    {
        let why = "publishing to it over HTTP is not allowed (setting `http_publish`)";
        return Err(Problem::subject_refused(403, why));
    }
    Ok(subject)
}

/// The headers of the message, in the order of the request.
///
/// `written` are the names with [`HEADER_PREFIX`] in the client's spelling.
fn message_headers(headers: &HeaderMap, written: &[String]) -> Result<Headers, Problem> {
    let mut written = written.iter();
    let mut message_headers = Headers::new();
    for (name, value) in headers {
        let name = name.as_str();
        let own = match name.strip_prefix(HEADER_PREFIX) {
            Some(own) => written
                .next()
                .and_then(|written| written.get(HEADER_PREFIX.len()..))
                .unwrap_or(own),
            None if FORWARDED_HEADERS.contains(&name) => name,
            None => continue,
        };
        message_headers.push((own.to_owned(), message_value(name, value)?));
    }
    Ok(message_headers)
}

/// The value of a header, unchanged. Headers of messages are UTF-8; other values are refused.
fn message_value(name: &str, value: &HeaderValue) -> Result<String, Problem> {
    let own = name.strip_prefix(HEADER_PREFIX).unwrap_or(name);
    if own.is_empty() || own.starts_with("nats-") || own.starts_with("oncely-") {
        return Err(Problem::header_refused(
            name,
            "names that begin with `Nats-` or `Oncely-` are reserved",
        ));
    }
    let value = std::str::from_utf8(value.as_bytes())
        .map_err(|_| Problem::header_refused(name, "its value is not UTF-8"))?;
    Ok(value.to_owned())
}

/// The maximum age of the list of streams in which a subject is searched first.
const STREAMS_MAX_AGE: Duration = Duration::from_secs(10);

impl Publisher {
    /// Refuses a message that could never be published: too large with its headers, or to a subject
    /// without a stream.
    ///
    /// Without a connection to the broker the subject is not checked.
    async fn check(
        &self,
        publication: &Publication,
        incoming: &IncomingRequest,
    ) -> Result<(), Problem> {
        let max = self.bus.max_payload();
        let id = Uuid::nil().to_string();
        let size = message::wire_size(&publication.headers, &id, incoming.request.body.len());
        if size > max {
            return Err(Problem::message_too_large(size, max));
        }
        if !self.bus.is_connected() {
            return Ok(());
        }
        match self.bus.streams(STREAMS_MAX_AGE).await {
            // The list may lack a new stream, or one without a leader for now.
            Ok(streams) if stream_for_subject(&streams, &publication.subject).is_none() => {}
            _ => return Ok(()),
        }
        match self.bus.takes_subject(&publication.subject).await {
            Ok(false) => Err(Problem::no_stream(&publication.subject)),
            _ => Ok(()),
        }
    }

    /// Publishes the body of a request, once per key.
    ///
    /// # Errors
    /// The database failed, and nothing was published.
    pub(super) async fn publish(
        &self,
        publication: &Publication,
        incoming: &IncomingRequest,
    ) -> Result<Result<RequestOutcome, Problem>, StoreError> {
        // Checked before the transaction, so that no other request waits for it. A refusal does not
        // replace the stored response of an accepted request.
        let refusal = self.check(publication, incoming).await.err();
        let tx = self.store.begin(PUBLISHER, STATEMENT_TIMEOUT).await?;
        let mut tx = match claim(tx, incoming).await? {
            RequestClaim::Acquired(tx) => tx,
            RequestClaim::HandledElsewhere(outcome) => return Ok(Ok(outcome)),
        };
        if let Some(problem) = refusal {
            tx.rollback().await;
            return Ok(Err(problem));
        }
        match self.write(publication, incoming, &mut tx).await {
            Ok(handled) => commit(tx, handled, &self.metrics, PUBLISHER).await.map(Ok),
            Err(error) => {
                tx.rollback().await;
                Err(error)
            }
        }
    }

    async fn write(
        &self,
        publication: &Publication,
        incoming: &IncomingRequest,
        tx: &mut Tx,
    ) -> Result<RequestOutcome, StoreError> {
        // Fully random: the id is public, and must not be derivable from that of another message.
        let id = Uuid::new_v4().to_string();
        let mut output = output(&id, publication, incoming);
        self.set_trace(&mut output, incoming);
        let since = Instant::now();
        let outputs = tx.append_outputs(&[output], HAND_OVER_LEASE).await?;
        let response = HttpResponse {
            status: 202,
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: json!({"id": id, "subject": publication.subject})
                .to_string()
                .into(),
        };
        if let Some((key, keep)) = &incoming.key {
            let kept = KeptResponse {
                request: key,
                response: &response,
                keep: *keep,
            };
            tx.store_responses(&[kept]).await?;
        }
        Ok(RequestOutcome::Responded {
            response,
            replayed: false,
            outputs,
            leased_at: since,
        })
    }
}

impl Publisher {
    /// Names the publish in the headers of the message, unless the client chose another trace for
    /// it than that of the request.
    fn set_trace(&self, output: &mut Output, incoming: &IncomingRequest) {
        let Some(RequestTrace { trace, span_id }) = &incoming.trace else {
            return;
        };
        let is_of_request = match TraceContext::of_headers(&output.headers) {
            Some(context) => {
                context.trace_id == trace.trace_id && Some(context.span_id) == trace.parent
            }
            None => !has_trace(&output.headers),
        };
        if let Some(trace) = self
            .traces
            .of_outputs(trace, *span_id)
            .filter(|_| is_of_request)
        {
            trace.set(&mut output.headers, PUBLISHER, &output.id);
        }
    }
}

fn output(id: &str, publication: &Publication, incoming: &IncomingRequest) -> Output {
    Output {
        kind: OutputKind::Published,
        id: id.to_owned(),
        event_id: id.to_owned(),
        ordinal: 0,
        subject: publication.subject.clone(),
        headers: publication.headers.clone(),
        body: incoming.request.body.clone(),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(name: &str, value: &[u8]) -> Result<Headers, String> {
        let mut headers = HeaderMap::new();
        headers.insert(
            axum::http::HeaderName::from_bytes(name.as_bytes()).unwrap(),
            HeaderValue::from_bytes(value).unwrap(),
        );
        message_headers(&headers, &[name.to_owned()]).map_err(|problem| problem.detail)
    }

    #[test]
    fn header_values_are_published_byte_by_byte_or_refused() {
        let customer = "J\u{fc}rgen M\u{fc}ller \u{20ac}";
        let expected = vec![("Customer".to_owned(), customer.to_owned())];
        assert_eq!(
            published("X-Message-Customer", customer.as_bytes()),
            Ok(expected)
        );
        assert!(
            published("x-message-customer", b"J\xfcrgen")
                .unwrap_err()
                .contains("UTF-8")
        );
        assert!(published("content-type", b"text/\xff").is_err());
        // Other headers are not forwarded.
        assert_eq!(published("user-agent", b"J\xfcrgen"), Ok(Vec::new()));
    }

    #[test]
    fn platform_headers_are_refused() {
        for name in [
            "x-message-nats-msg-id",
            "x-message-Nats-Expected-Stream",
            "x-message-oncely-worker",
            "x-message-",
        ] {
            assert!(published(name, b"1").is_err(), "{name}");
        }
    }

    #[test]
    fn subjects_that_are_not_utf_8_are_refused() {
        let granted = ["in.>".to_owned()];
        assert_eq!(subject("in.%61", &granted).unwrap(), "in.a");
        assert_eq!(subject("in.%C3%BC", &granted).unwrap_err().status, 400);
        assert!(
            subject("in.%FF", &granted)
                .unwrap_err()
                .detail
                .contains("not UTF-8")
        );
        assert_eq!(subject("out.a", &granted).unwrap_err().status, 403);
    }
}
