//! Trace context (W3C): the header `traceparent`, and the trace that outputs carry to their
//! consumers.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::model::message::{self, Headers};
use crate::model::output_ids::one_line;

/// The id of a trace. Never all zeros.
pub type TraceId = [u8; 16];

/// The id of a span. Never all zeros.
pub type SpanId = [u8; 8];

/// The longest `tracestate`, in bytes; entries of other systems are dropped from its end.
const TRACESTATE_MAX: usize = 512;

/// The bit of the flags that says that the trace is recorded.
const SAMPLED: u8 = 1;

/// A place in a trace, as `traceparent` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: TraceId,
    /// The span that caused the message.
    pub span_id: SpanId,
    /// Whether the trace is recorded.
    pub is_sampled: bool,
}

/// The trace of the outputs that one run of a handler sends.
#[derive(Debug, Clone)]
pub struct OutputTrace {
    /// The installation of the host: two of them may handle the same message.
    pub installation: Arc<str>,
    /// The trace of the message or the request.
    pub trace_id: TraceId,
    /// The span that the outputs are children of.
    pub parent: SpanId,
    /// Whether the trace is recorded.
    pub is_sampled: bool,
}

/// The trace of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishTrace {
    /// The trace that the headers of the output name.
    pub trace_id: TraceId,
    /// The span that consumers see as their parent; none if the headers name a span of the handler.
    pub span_id: Option<SpanId>,
    /// The span that sent the output.
    pub parent: SpanId,
    /// Whether the trace is recorded.
    pub is_sampled: bool,
}

impl TraceContext {
    /// The context of a valid `traceparent`.
    pub fn parse(text: &str) -> Option<Self> {
        if !message::is_traceparent(text) {
            return None;
        }
        let mut parts = text.split('-').skip(1);
        let (mut trace_id, mut span_id, mut flags) = ([0; 16], [0; 8], [0]);
        hex::decode_to_slice(parts.next()?, &mut trace_id).ok()?;
        hex::decode_to_slice(parts.next()?, &mut span_id).ok()?;
        hex::decode_to_slice(parts.next()?, &mut flags).ok()?;
        Some(TraceContext {
            trace_id,
            span_id,
            is_sampled: flags.iter().all(|flags| flags & SAMPLED != 0),
        })
    }

    /// The context in the headers of a message or a request.
    pub fn of_headers(headers: &Headers) -> Option<Self> {
        TraceContext::parse(message::header(headers, "traceparent")?)
    }

    /// The value of the header `traceparent`.
    pub fn traceparent(&self) -> String {
        let flags = u8::from(self.is_sampled);
        format!(
            "00-{}-{}-{flags:02x}",
            hex::encode(self.trace_id),
            hex::encode(self.span_id)
        )
    }
}

impl OutputTrace {
    /// Names the publish span of an output in its headers, in place of the forwarded context. The
    /// entry `oncely` of `tracestate` keeps the parent of that span, so that any host can export it
    /// after the publish. The context of a trace that is not recorded is forwarded unchanged.
    pub fn set(&self, headers: &mut Headers, worker: &str, output_id: &str) {
        let is_forwarded = message::header(headers, "traceparent").is_some();
        if is_forwarded && !self.is_sampled {
            return;
        }
        let context = TraceContext {
            trace_id: self.trace_id,
            span_id: publish_span_id(&self.installation, self.trace_id, worker, output_id),
            is_sampled: self.is_sampled,
        };
        let others = message::header(headers, "tracestate").map(str::to_owned);
        headers.retain(|(name, _)| !is_trace_header(name));
        headers.push(("traceparent".to_owned(), context.traceparent()));
        if self.is_sampled {
            let state = tracestate(self.parent, others.as_deref());
            headers.push(("tracestate".to_owned(), state));
        }
    }
}

impl PublishTrace {
    /// The trace of an output with these headers; none if they name no trace.
    pub fn of(
        installation: &str,
        headers: &Headers,
        worker: &str,
        output_id: &str,
    ) -> Option<PublishTrace> {
        let context = TraceContext::of_headers(headers)?;
        let own = publish_span_id(installation, context.trace_id, worker, output_id);
        // The notice of a dead letter has the entry of its message, and a handler can copy headers.
        let parent = message::header(headers, "tracestate")
            .filter(|_| context.span_id == own)
            .and_then(parent_in);
        Some(PublishTrace {
            trace_id: context.trace_id,
            span_id: parent.map(|_| own),
            parent: parent.unwrap_or(context.span_id),
            is_sampled: context.is_sampled,
        })
    }
}

/// Whether headers name a trace.
pub fn has_trace(headers: &Headers) -> bool {
    headers.iter().any(|(name, _)| is_trace_header(name))
}

/// The trace of a message without a `traceparent`. Its retries and redrives are in the same trace.
pub fn derived_trace_id(installation: &str, worker: &str, event_id: &str) -> TraceId {
    let hash = hash(&[
        b"trace",
        installation.as_bytes(),
        worker.as_bytes(),
        event_id.as_bytes(),
    ]);
    first_bytes(&hash)
}

/// The span of the publish of an output: the same on each host that may publish it.
fn publish_span_id(installation: &str, trace_id: TraceId, worker: &str, output_id: &str) -> SpanId {
    let output_id = one_line(output_id);
    let hash = hash(&[
        b"publish",
        installation.as_bytes(),
        &trace_id,
        worker.as_bytes(),
        output_id.as_bytes(),
    ]);
    first_bytes(&hash)
}

/// Each part is hashed after its length, so that no two lists of parts are the same text.
fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// The first bytes of a hash as an id, which must not be all zeros.
fn first_bytes<const N: usize>(hash: &[u8; 32]) -> [u8; N] {
    let mut id = [1; N];
    if let Some(first) = hash.first_chunk::<N>().filter(|first| **first != [0; N]) {
        id = *first;
    }
    id
}

fn is_trace_header(name: &str) -> bool {
    name.eq_ignore_ascii_case("traceparent") || name.eq_ignore_ascii_case("tracestate")
}

/// The `tracestate` of an output: the parent of its publish, then the entries of other systems.
fn tracestate(parent: SpanId, others: Option<&str>) -> String {
    let mut state = format!("oncely={}", hex::encode(parent));
    let others = others.unwrap_or_default().split(',').map(str::trim);
    for entry in others.filter(|entry| !entry.is_empty() && !entry.starts_with("oncely=")) {
        if state.len() + 1 + entry.len() > TRACESTATE_MAX {
            break;
        }
        state.push(',');
        state.push_str(entry);
    }
    state
}

fn parent_in(state: &str) -> Option<SpanId> {
    let mut entries = state.split(',').map(str::trim);
    let value = entries.find_map(|entry| entry.strip_prefix("oncely="))?;
    let mut parent = [0; 8];
    hex::decode_to_slice(value, &mut parent).ok()?;
    (parent != [0; 8]).then_some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn output_trace(is_sampled: bool) -> OutputTrace {
        OutputTrace {
            installation: Arc::from("i"),
            trace_id: TraceContext::parse(PARENT).unwrap().trace_id,
            parent: [7; 8],
            is_sampled,
        }
    }

    fn headers(lines: &[(&str, &str)]) -> Headers {
        let lines = lines.iter();
        lines
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_traceparent_is_parsed_and_written() {
        let context = TraceContext::parse(PARENT).unwrap();
        assert!(context.is_sampled);
        assert_eq!(context.traceparent(), PARENT);
        let off = PARENT.replace("-01", "-00");
        assert!(!TraceContext::parse(&off).unwrap().is_sampled);
        // The flag of level 2 for random ids says nothing about sampling.
        assert!(
            !TraceContext::parse(&PARENT.replace("-01", "-02"))
                .unwrap()
                .is_sampled
        );
        assert_eq!(TraceContext::parse("00-1-2-01"), None);
    }

    #[test]
    fn an_output_names_its_publish_and_keeps_the_parent_of_it() {
        let mut sent = headers(&[
            ("Traceparent", PARENT),
            ("TraceState", "a=1, oncely=0000000000000001,b=2"),
            ("x", "y"),
        ]);
        output_trace(true).set(&mut sent, "w", "w:e:0");
        let trace = PublishTrace::of("i", &sent, "w", "w:e:0").unwrap();
        assert_eq!(trace.parent, [7; 8]);
        assert_eq!(
            TraceContext::of_headers(&sent).map(|context| context.span_id),
            trace.span_id
        );
        assert_eq!(
            message::header(&sent, "tracestate"),
            Some("oncely=0707070707070707,a=1,b=2")
        );
        assert_eq!(sent.len(), 3);

        // Copied to another output, it is a context like that of any other system.
        for (installation, worker, id) in [
            ("i", "w", "w:e:1"),
            ("i", "v", "w:e:0"),
            ("j", "w", "w:e:0"),
        ] {
            let copied = PublishTrace::of(installation, &sent, worker, id).unwrap();
            assert_eq!((copied.span_id, Some(copied.parent)), (None, trace.span_id));
        }
    }

    #[test]
    fn the_context_of_a_trace_that_is_not_recorded_is_forwarded() {
        let mut forwarded = headers(&[("traceparent", PARENT), ("tracestate", "a=1")]);
        let before = forwarded.clone();
        output_trace(false).set(&mut forwarded, "w", "w:e:0");
        assert_eq!(forwarded, before);

        // Without one, the output says that its trace is not recorded.
        let mut new = Headers::new();
        output_trace(false).set(&mut new, "w", "w:e:0");
        assert!(!TraceContext::of_headers(&new).unwrap().is_sampled);
        assert_eq!(new.len(), 1);
    }

    #[test]
    fn a_tracestate_stays_within_its_limit() {
        let long = format!("a={},b={}", "x".repeat(400), "y".repeat(200));
        let state = tracestate([7; 8], Some(&long));
        assert!(state.len() <= TRACESTATE_MAX && state.contains(",a=x"));
        assert_eq!(parent_in(&state), Some([7; 8]));
        for broken in ["oncely=1", "oncely=0000000000000000", "oncely=zz", ""] {
            assert_eq!(parent_in(broken), None, "{broken}");
        }
    }
}
