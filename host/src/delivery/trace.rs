//! Spans of deliveries and requests: the claim, the handler, its statements and the commit.

use std::sync::{Arc, Mutex, PoisonError};

use super::batch::CallInputs;
use super::{BatchItem, Delivery};
use crate::guest::{CallFailure, FailureKind};
use crate::model::message::Message;
use crate::model::sql::{Dialect, SqlError};
use crate::model::trace_context::{OutputTrace, SpanId};
use crate::model::verdict::Verdict;
use crate::traces::{Attribute, Interval, Span, SpanKind, Stopwatch, Trace, Traces, new_span_id};

/// Maximum number of statements of one call that have a span.
const STATEMENTS_MAX: usize = 64;

/// Maximum size of the text of a statement in a span, in bytes.
const STATEMENT_TEXT_MAX: usize = 2 << 10;

/// The span of a request, whose children the delivery records.
#[derive(Debug, Clone)]
pub struct RequestTrace {
    /// The trace of the request.
    pub trace: Trace,
    /// The span of the request.
    pub span_id: SpanId,
}

/// What one transaction did for a message or a request.
pub(super) struct ItemTrace {
    trace: Trace,
    /// The span of the delivery or the request.
    span_id: SpanId,
    /// The span that the outputs are children of.
    handler_id: SpanId,
    claim: Interval,
    handler: Option<HandlerRun>,
    commit: Option<Interval>,
    /// The code of the counted failure.
    failure: Option<String>,
    /// The same for all items of a transaction.
    transaction: Arc<str>,
    /// The number of items of the transaction.
    items: usize,
}

/// One run of a handler.
struct HandlerRun {
    interval: Interval,
    statements: Statements,
    error: Option<String>,
}

/// The statements that a handler ran, in order.
#[derive(Default)]
pub(crate) struct Statements {
    kept: Vec<Statement>,
    /// Number of statements above [`STATEMENTS_MAX`].
    omitted: u32,
}

struct Statement {
    /// With placeholders, never with parameters.
    text: String,
    interval: Interval,
    error: Option<&'static str>,
}

/// The statements of the running handler, shared with the operations that may outlive it.
pub(crate) type StatementLog = Arc<Mutex<Statements>>;

/// A running statement. Its end is recorded also when its handler is stopped.
pub(crate) struct RunningStatement {
    log: StatementLog,
    text: String,
    stopwatch: Stopwatch,
    error: Option<&'static str>,
}

/// The claims of a transaction, for the traces of its items.
pub(super) struct ClaimTrace {
    interval: Interval,
    transaction: Arc<str>,
    items: usize,
}

impl ClaimTrace {
    /// A transaction with this number of items, whose claims began with `stopwatch` and end now.
    pub(super) fn new(stopwatch: Stopwatch, items: usize) -> Self {
        ClaimTrace {
            interval: stopwatch.stop(),
            transaction: hex::encode(new_span_id()).into(),
            items,
        }
    }
}

impl ItemTrace {
    fn new(trace: Trace, span_id: SpanId, claim: &ClaimTrace) -> Box<Self> {
        Box::new(ItemTrace {
            trace,
            span_id,
            handler_id: new_span_id(),
            claim: claim.interval,
            handler: None,
            commit: None,
            failure: None,
            transaction: Arc::clone(&claim.transaction),
            items: claim.items,
        })
    }

    /// The trace of a request in a transaction.
    pub(super) fn of_request(request: &RequestTrace, claim: &ClaimTrace) -> Box<Self> {
        ItemTrace::new(request.trace, request.span_id, claim)
    }

    /// The trace that the outputs of the handler carry.
    pub(super) fn of_outputs(&self, traces: &Traces) -> Option<OutputTrace> {
        traces.of_outputs(&self.trace, self.handler_id)
    }

    /// Takes in a run of the handler.
    pub(super) fn handled(
        &mut self,
        interval: Interval,
        statements: Statements,
        failure: Option<&CallFailure>,
    ) {
        self.handler = Some(HandlerRun {
            interval,
            statements,
            error: failure.map(failure_code),
        });
    }

    /// Takes in the commit: from the first write of effects to its confirmation.
    pub(super) fn committed(&mut self, interval: Interval) {
        self.commit = Some(interval);
    }

    /// Takes in the failure that counts as an attempt. It is not always that of the handler.
    pub(super) fn failed(&mut self, failure: &CallFailure) {
        self.failure = Some(failure_code(failure));
    }

    /// The time of the transaction as far as it concerns this item.
    fn interval(&self) -> Interval {
        let handler = self.handler.as_ref().map(|handler| handler.interval.end);
        let commit = self.commit.map(|commit| commit.end);
        Interval {
            start: self.claim.start,
            end: commit.or(handler).unwrap_or(self.claim.end),
        }
    }

    /// Records the claim, the handler, its statements and the commit.
    pub(super) fn record_parts(&self, traces: &Traces, dialect: Dialect) {
        if !self.trace.is_sampled {
            return;
        }
        self.record_part(traces, "claim", self.claim);
        if let Some(handler) = &self.handler {
            self.record_handler(traces, handler, dialect);
        }
        if let Some(commit) = self.commit {
            self.record_part(traces, "commit", commit);
        }
    }

    fn record_part(&self, traces: &Traces, name: &str, interval: Interval) {
        traces.record(Span {
            trace_id: self.trace.trace_id,
            span_id: new_span_id(),
            parent: Some(self.span_id),
            name: name.to_owned(),
            kind: SpanKind::Internal,
            interval,
            attributes: self.transaction_attributes(),
            error: None,
        });
    }

    fn record_handler(&self, traces: &Traces, handler: &HandlerRun, dialect: Dialect) {
        let statements = &handler.statements;
        let mut attributes = self.transaction_attributes();
        if statements.omitted > 0 {
            attributes.push(("oncely.statements_omitted", statements.omitted.into()));
        }
        traces.record(Span {
            trace_id: self.trace.trace_id,
            span_id: self.handler_id,
            parent: Some(self.span_id),
            name: "handler".to_owned(),
            kind: SpanKind::Internal,
            interval: handler.interval,
            attributes,
            error: handler.error.clone(),
        });
        for statement in &statements.kept {
            traces.record(Span {
                trace_id: self.trace.trace_id,
                span_id: new_span_id(),
                parent: Some(self.handler_id),
                name: "sql".to_owned(),
                kind: SpanKind::Client,
                interval: statement.interval,
                attributes: vec![
                    ("db.system.name", system_name(dialect).into()),
                    ("db.query.text", statement.text.as_str().into()),
                ],
                error: statement.error.map(str::to_owned),
            });
        }
    }

    fn transaction_attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("oncely.transaction", (&*self.transaction).into())]
    }
}

impl Delivery {
    /// Begins the traces of the items that a transaction claimed.
    pub(super) fn trace_claims(&self, stopwatch: Option<Stopwatch>, group: &mut [BatchItem]) {
        let Some(stopwatch) = stopwatch else { return };
        let claim = ClaimTrace::new(stopwatch, group.len());
        for item in group {
            let trace = self.traces.of_message(&self.worker.name, &item.message);
            item.trace = trace.map(|trace| ItemTrace::new(trace, new_span_id(), &claim));
        }
    }

    /// The inputs of a call for these items, with the traces of their outputs.
    pub(super) fn inputs_of(&self, items: &[&mut BatchItem]) -> CallInputs {
        let traces = items.iter().filter_map(|item| item.trace.as_ref());
        CallInputs {
            messages: items.iter().map(|item| Arc::clone(&item.message)).collect(),
            traces: traces
                .filter_map(|trace| trace.of_outputs(&self.traces))
                .collect(),
            request: None,
        }
    }

    /// Records the spans of a message that has its verdict. Waiting messages did nothing.
    pub(super) fn record_delivery(&self, item: &BatchItem, verdict: &Verdict) {
        let Some(trace) = item.trace.as_ref().filter(|trace| trace.trace.is_sampled) else {
            return;
        };
        let error = match verdict {
            Verdict::Wait { .. } | Verdict::Blocked => return,
            Verdict::Done(_) | Verdict::Duplicate(_) => None,
            Verdict::Retry { .. } => trace.failure.clone(),
            Verdict::Dead(dead_letter) => {
                let reason = || dead_letter.reason.as_str().to_owned();
                trace.failure.clone().or_else(|| Some(reason()))
            }
        };
        self.record_message(item, trace, verdict.as_str(), error);
    }

    /// Records the spans of the messages whose transaction failed with the database. Each runs
    /// again, without a spent attempt.
    pub(super) fn record_lost_runs(&self, group: &[BatchItem]) {
        for item in group {
            let trace = item.trace.as_ref().filter(|trace| trace.trace.is_sampled);
            if let Some(trace) = trace.filter(|trace| trace.handler.is_some()) {
                let error = Some("database-unavailable".to_owned());
                self.record_message(item, trace, "interrupted", error);
            }
        }
    }

    fn record_message(
        &self,
        item: &BatchItem,
        trace: &ItemTrace,
        verdict: &str,
        error: Option<String>,
    ) {
        let mut attributes = message_attributes(&item.message);
        attributes.extend([
            ("oncely.worker", self.worker.name.as_str().into()),
            ("oncely.version", self.version.into()),
            ("oncely.verdict", verdict.into()),
            ("oncely.attempt", (item.attempts + 1).into()),
            ("messaging.batch.message_count", trace.items.into()),
        ]);
        attributes.extend(trace.transaction_attributes());
        self.traces.record(Span {
            trace_id: trace.trace.trace_id,
            span_id: trace.span_id,
            parent: trace.trace.parent,
            name: format!("deliver {}", self.worker.name),
            kind: SpanKind::Consumer,
            interval: trace.interval(),
            attributes,
            error,
        });
        trace.record_parts(&self.traces, self.store.dialect());
    }
}

impl RunningStatement {
    /// Starts to measure a statement.
    pub(super) fn start(log: &StatementLog, text: &str) -> Self {
        let mut end = text.len().min(STATEMENT_TEXT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        RunningStatement {
            log: Arc::clone(log),
            text: text.get(..end).unwrap_or_default().to_owned(),
            stopwatch: Stopwatch::start(),
            error: Some("stopped"),
        }
    }

    /// Ends a statement that has a result.
    pub(super) fn finish<T>(mut self, result: &anyhow::Result<Result<T, SqlError>>) {
        self.error = match result {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error_code(error)),
            Err(_) => Some("database-unavailable"),
        };
    }
}

impl Drop for RunningStatement {
    fn drop(&mut self) {
        let mut statements = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if statements.kept.len() >= STATEMENTS_MAX {
            statements.omitted = statements.omitted.saturating_add(1);
            return;
        }
        statements.kept.push(Statement {
            text: std::mem::take(&mut self.text),
            interval: self.stopwatch.stop(),
            error: self.error,
        });
    }
}

/// The attributes of a message by OpenTelemetry's conventions, without headers and body.
fn message_attributes(message: &Message) -> Vec<(&'static str, Attribute)> {
    let mut attributes: Vec<(&'static str, Attribute)> = vec![
        ("messaging.system", "nats".into()),
        ("messaging.operation.type", "process".into()),
        ("messaging.operation.name", "deliver".into()),
        (
            "messaging.destination.name",
            message.subject.as_str().into(),
        ),
        ("messaging.message.id", message.event_id.as_str().into()),
        ("messaging.message.body.size", message.body.len().into()),
    ];
    if let Some(origin) = &message.origin {
        attributes.push(("oncely.stream", origin.stream.as_str().into()));
        attributes.push(("oncely.stream_sequence", origin.sequence.into()));
    }
    if message.redriven.is_some() {
        attributes.push(("oncely.redriven", true.into()));
    }
    attributes
}

/// The code of a failure. Its text may quote values of a row, so it is not exported.
fn failure_code(failure: &CallFailure) -> String {
    let kind = match failure.kind {
        FailureKind::Retry | FailureKind::RetryAfter(_) => "retry",
        FailureKind::Trap => "trap",
        FailureKind::Reject => "reject",
        FailureKind::OutputRefused => "output-refused",
        FailureKind::Conflict => "conflict",
    };
    failure.code.clone().unwrap_or_else(|| kind.to_owned())
}

fn error_code(error: &SqlError) -> &'static str {
    match error {
        SqlError::ConstraintViolation(_) => "constraint-violation",
        SqlError::Conflict(_) => "conflict",
        SqlError::QueryFailed(_) => "query-failed",
        SqlError::NotAllowed(_) => "not-allowed",
        SqlError::InvalidParameter(_) => "invalid-parameter",
        SqlError::UnsupportedType(_) => "unsupported-type",
        SqlError::TooLarge(_) => "too-large",
        SqlError::Timeout => "timeout",
        SqlError::TransactionFailed(_) => "transaction-failed",
    }
}

fn system_name(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Postgres => "postgresql",
        Dialect::Sqlite => "sqlite",
    }
}
