//! OpenTelemetry traces: spans of deliveries, requests and publishes, exported over OTLP.
//!
//! Spans are built after the fact from measured intervals, because the messages of a batch share a
//! transaction and any of them may run again. Recording never waits: a span that does not fit into
//! the queue is dropped and counted.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::{mpsc, oneshot};

use crate::config::TraceSettings;
use crate::metrics::{Metrics, SpanOutcome};
use crate::model::message::{Headers, Message};
use crate::model::trace_context::{
    OutputTrace, PublishTrace, SpanId, TraceContext, TraceId, derived_trace_id,
};

mod export;
mod otlp;
mod span;

use export::Exporter;
use otlp::Resource;
pub(crate) use span::{Attribute, Interval, Span, SpanKind, Stopwatch};

/// Maximum number of spans that wait for their export. The largest have a statement of 2 KiB.
const QUEUE_MAX: usize = 8_192;

/// Records spans; does nothing when traces are off. Cheap to clone.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Recording>>);

struct Recording {
    installation: Arc<str>,
    /// A new trace is sampled if the last 8 bytes of its id, without the highest bit, are below.
    sample_below: u64,
    spans: mpsc::Sender<Span>,
    flushes: mpsc::Sender<oneshot::Sender<()>>,
    metrics: Arc<Metrics>,
}

/// The trace that a message or a request belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Trace {
    /// Shared by all of its spans.
    pub trace_id: TraceId,
    /// The span that caused it; `None` for the first span of a trace.
    pub parent: Option<SpanId>,
    /// Whether its spans are exported.
    pub is_sampled: bool,
}

impl Traces {
    /// Starts the export, if an endpoint is configured.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn start(
        settings: &TraceSettings,
        installation: &str,
        metrics: Arc<Metrics>,
    ) -> Result<Traces> {
        let Some(endpoint) = &settings.endpoint else {
            return Ok(Traces::default());
        };
        let (spans, recorded) = mpsc::channel(QUEUE_MAX);
        let (flushes, flush_requests) = mpsc::channel(1);
        let resource = Resource::new(&settings.service, installation);
        let exporter = Exporter::new(endpoint.clone(), resource, Arc::clone(&metrics))?;
        tokio::spawn(export::run(exporter, recorded, flush_requests));
        Ok(Traces(Some(Arc::new(Recording {
            installation: Arc::from(installation),
            sample_below: settings.sample_below(),
            spans,
            flushes,
            metrics,
        }))))
    }

    /// Starts to measure, if traces are on.
    pub fn stopwatch(&self) -> Option<Stopwatch> {
        self.0.as_ref().map(|_| Stopwatch::start())
    }

    /// Whether traces are on.
    pub fn are_on(&self) -> bool {
        self.0.is_some()
    }

    /// The trace of a message for a worker: that of its `traceparent`, else one that follows from
    /// its event id. `None` when traces are off.
    pub fn of_message(&self, worker: &str, message: &Message) -> Option<Trace> {
        let recording = self.0.as_ref()?;
        let derived = || derived_trace_id(&recording.installation, worker, &message.event_id);
        Some(recording.trace(&message.headers, derived))
    }

    /// The trace of a request: that of its `traceparent`, else a new one. `None` when traces are
    /// off.
    pub fn of_request(&self, headers: &Headers) -> Option<Trace> {
        let recording = self.0.as_ref()?;
        Some(recording.trace(headers, || *uuid::Uuid::new_v4().as_bytes()))
    }

    /// The trace of the outputs that the span `parent` sends.
    pub fn of_outputs(&self, trace: &Trace, parent: SpanId) -> Option<OutputTrace> {
        let recording = self.0.as_ref()?;
        Some(OutputTrace {
            installation: Arc::clone(&recording.installation),
            trace_id: trace.trace_id,
            parent,
            is_sampled: trace.is_sampled,
        })
    }

    /// The trace of a publish, if it is recorded.
    pub fn of_publish(
        &self,
        headers: &Headers,
        worker: &str,
        output_id: &str,
    ) -> Option<PublishTrace> {
        let recording = self.0.as_ref()?;
        PublishTrace::of(&recording.installation, headers, worker, output_id)
            .filter(|trace| trace.is_sampled)
    }

    /// Queues a span for export. A span that does not fit is dropped.
    pub fn record(&self, span: Span) {
        let Some(recording) = &self.0 else { return };
        if recording.spans.try_send(span).is_err() {
            recording.metrics.trace_spans(SpanOutcome::Dropped, 1);
        }
    }

    /// Exports the recorded spans, for at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(recording) = &self.0 else { return };
        let flushed = async {
            let (done, is_done) = oneshot::channel();
            if recording.flushes.send(done).await.is_ok() {
                let _ = is_done.await;
            }
        };
        if tokio::time::timeout(limit, flushed).await.is_err() {
            tracing::warn!(?limit, "spans not exported in time, dropping them");
        }
    }
}

impl Recording {
    fn trace(&self, headers: &Headers, new: impl FnOnce() -> TraceId) -> Trace {
        if let Some(context) = TraceContext::of_headers(headers) {
            return Trace {
                trace_id: context.trace_id,
                parent: Some(context.span_id),
                is_sampled: context.is_sampled,
            };
        }
        let trace_id = new();
        Trace {
            trace_id,
            parent: None,
            is_sampled: sampled_share(trace_id) < self.sample_below,
        }
    }
}

/// A random id for a span.
pub fn new_span_id() -> SpanId {
    rand::random::<u64>().max(1).to_be_bytes()
}

/// The place of a trace between 0 and 2^63, from the random part of its id, as OpenTelemetry's
/// sampler by ratio derives it.
fn sampled_share(trace_id: TraceId) -> u64 {
    let low = trace_id.last_chunk().copied().unwrap_or_default();
    u64::from_be_bytes(low) >> 1
}
