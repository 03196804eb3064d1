//! The span of a publish, which consumers of the output see as their parent.

use crate::bus::{PublishError, PublishResult};
use crate::model::trace_context::PublishTrace;
use crate::store::OutboxRow;
use crate::traces::{Attribute, Span, SpanKind, Stopwatch, Traces, new_span_id};

/// A publish on its way to the stream.
pub(super) struct RunningPublish {
    trace: PublishTrace,
    stopwatch: Stopwatch,
}

impl RunningPublish {
    /// Begins the span of an output whose trace is recorded.
    pub(super) fn start(traces: &Traces, row: &OutboxRow) -> Option<Self> {
        let stopwatch = traces.stopwatch()?;
        let trace = traces.of_publish(&row.headers, &row.worker, row.output_id())?;
        Some(RunningPublish { trace, stopwatch })
    }

    /// Records the span. A failed publish has an id of its own, because the output is sent again.
    pub(super) fn finish(self, traces: &Traces, row: &OutboxRow, result: &PublishResult) {
        let mut attributes: Vec<(&'static str, Attribute)> = vec![
            ("messaging.system", "nats".into()),
            ("messaging.operation.type", "send".into()),
            ("messaging.operation.name", "publish".into()),
            ("messaging.destination.name", row.subject.as_str().into()),
            ("messaging.message.id", row.id.as_str().into()),
            ("messaging.message.body.size", row.body.len().into()),
            ("oncely.worker", row.worker.as_str().into()),
            ("oncely.output", row.output_id().into()),
            ("oncely.publish_failures", row.failures.into()),
        ];
        let (span_id, error) = match result {
            Ok(ack) => {
                attributes.push(("oncely.stream", ack.stream.as_str().into()));
                attributes.push(("oncely.stream_sequence", ack.sequence.into()));
                attributes.push(("oncely.duplicate", ack.duplicate.into()));
                (self.trace.span_id, None)
            }
            Err(error) => (None, Some(code(error).to_owned())),
        };
        traces.record(Span {
            trace_id: self.trace.trace_id,
            span_id: span_id.unwrap_or_else(new_span_id),
            parent: Some(self.trace.parent),
            name: format!("publish {}", row.worker),
            kind: SpanKind::Producer,
            interval: self.stopwatch.stop(),
            attributes,
            error,
        });
    }
}

fn code(error: &PublishError) -> &'static str {
    match error {
        PublishError::Refused(_) => "refused",
        PublishError::RetryLater(_) => "retry-later",
        PublishError::SubjectFull(_) => "subject-full",
        PublishError::Unroutable(_) => "no-stream",
        PublishError::Unavailable(_) => "unavailable",
        PublishError::NoConnection(_) => "no-connection",
        PublishError::IdTaken(_) => "id-taken",
    }
}
