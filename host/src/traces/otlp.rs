//! Spans as an OTLP request.

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource as OtlpResource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind as OtlpKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as OtlpSpan, Status};
use prost::Message as _;
use uuid::Uuid;

use super::{Attribute, Span, SpanKind};

/// The flag of a span that is sampled.
const SAMPLED: u32 = 1;

/// The host, as the sender of spans.
pub(super) struct Resource(OtlpResource);

impl Resource {
    pub fn new(service: &str, installation: &str) -> Self {
        let attributes = [
            ("service.name", service.to_owned()),
            ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("service.instance.id", Uuid::new_v4().to_string()),
            ("oncely.installation", installation.to_owned()),
        ];
        let attributes = attributes.map(|(name, value)| key_value(name, value.into()));
        Resource(OtlpResource {
            attributes: attributes.into(),
            ..OtlpResource::default()
        })
    }
}

/// The body of a request to the collector.
pub(super) fn body(resource: &Resource, spans: Vec<Span>) -> Vec<u8> {
    let scope = InstrumentationScope {
        name: "oncely".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let spans = ScopeSpans {
        scope: Some(scope),
        spans: spans.into_iter().map(otlp_span).collect(),
        ..ScopeSpans::default()
    };
    let spans = ResourceSpans {
        resource: Some(resource.0.clone()),
        scope_spans: vec![spans],
        ..ResourceSpans::default()
    };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![spans],
    };
    request.encode_to_vec()
}

fn otlp_span(span: Span) -> OtlpSpan {
    let kind = match span.kind {
        SpanKind::Internal => OtlpKind::Internal,
        SpanKind::Server => OtlpKind::Server,
        SpanKind::Client => OtlpKind::Client,
        SpanKind::Producer => OtlpKind::Producer,
        SpanKind::Consumer => OtlpKind::Consumer,
    };
    let status = |message| Status {
        code: StatusCode::Error.into(),
        message,
    };
    OtlpSpan {
        trace_id: span.trace_id.to_vec(),
        span_id: span.span_id.to_vec(),
        parent_span_id: span.parent.map(Vec::from).unwrap_or_default(),
        flags: SAMPLED,
        name: span.name,
        kind: kind.into(),
        start_time_unix_nano: span.interval.start,
        end_time_unix_nano: span.interval.end,
        attributes: span
            .attributes
            .into_iter()
            .map(|(name, value)| key_value(name, value))
            .collect(),
        status: span.error.map(status),
        ..OtlpSpan::default()
    }
}

fn key_value(name: &str, value: Attribute) -> KeyValue {
    let value = match value {
        Attribute::Text(text) => Value::StringValue(text),
        Attribute::Number(number) => Value::IntValue(number),
        Attribute::Flag(flag) => Value::BoolValue(flag),
    };
    KeyValue {
        key: name.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}
