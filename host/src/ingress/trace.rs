//! The span of a request, from its head to its response.

use axum::http::request::Parts;

use super::Target;
use crate::delivery::RequestTrace;
use crate::guest::header_to_text;
use crate::traces::{Attribute, Span, SpanKind, Stopwatch, Traces, new_span_id};

/// A request on its way to its response.
pub(super) struct RunningRequest {
    pub trace: RequestTrace,
    method: String,
    stopwatch: Stopwatch,
}

impl RunningRequest {
    /// Begins the span of a request, in the trace of its caller if it names one.
    pub(super) fn start(traces: &Traces, parts: &Parts) -> Option<Self> {
        let stopwatch = traces.stopwatch()?;
        let traceparent = parts.headers.get("traceparent");
        let headers = traceparent.map(|value| {
            let value = header_to_text(value.as_bytes());
            ("traceparent".to_owned(), value)
        });
        let trace = traces.of_request(&Vec::from_iter(headers))?;
        Some(RunningRequest {
            trace: RequestTrace {
                trace,
                span_id: new_span_id(),
            },
            method: parts.method.as_str().to_owned(),
            stopwatch,
        })
    }

    /// Records the span. Of the request it shows the method and the route, never its path, its
    /// headers or its key.
    pub(super) fn finish(self, traces: &Traces, target: &Target, status: u16, replayed: bool) {
        let RequestTrace { trace, span_id } = self.trace;
        if !trace.is_sampled {
            return;
        }
        let name = format!("{} {}", self.method, target.route());
        let attributes: Vec<(&'static str, Attribute)> = vec![
            ("http.request.method", self.method.into()),
            ("http.route", target.route().into()),
            ("http.response.status_code", u32::from(status).into()),
            ("oncely.worker", target.key_owner().into()),
            ("oncely.version", target.version().into()),
            ("oncely.replayed", replayed.into()),
        ];
        traces.record(Span {
            trace_id: trace.trace_id,
            span_id,
            parent: trace.parent,
            name,
            kind: SpanKind::Server,
            interval: self.stopwatch.stop(),
            attributes,
            error: (status >= 500).then(|| status.to_string()),
        });
    }
}
