//! Traces as a collector receives them: one tree from the first request to the last output.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span as OtlpSpan;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use support::books;
use support::database::Kind;
use support::guests;
use support::metrics::{scrape, value};
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, http_manifest, manifest};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// A collector on this machine, with all that it received.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    bodies: Arc<Mutex<Vec<Bytes>>>,
    /// The status of the answer; 0 for 200.
    status: Arc<AtomicU16>,
    port: u16,
}

/// A received span.
#[derive(Debug, Clone)]
struct Span {
    trace: String,
    id: String,
    /// Empty for a root.
    parent: String,
    name: String,
    kind: SpanKind,
    error: Option<String>,
    attributes: HashMap<String, String>,
    /// The process that sent it.
    process: String,
    start: u64,
    end: u64,
}

async fn receive(
    State(collector): State<Collector>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let status = collector.status.load(Ordering::Relaxed);
    if status != 0 {
        return StatusCode::from_u16(status).unwrap();
    }
    assert_eq!(uri, "/v1/traces");
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
    collector.bodies.lock().unwrap().push(body);
    for resource in request.resource_spans {
        let process = texts(resource.resource.unwrap_or_default().attributes);
        assert_eq!(process["service.name"], "oncely");
        let spans = resource
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans);
        let spans = spans.map(|span| Span::new(span, &process["service.instance.id"]));
        collector.spans.lock().unwrap().extend(spans);
    }
    StatusCode::OK
}

/// Attributes by name, with their values as text.
fn texts(attributes: Vec<KeyValue>) -> HashMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(flag)) => flag.to_string(),
        other => panic!("unexpected {other:?}"),
    };
    let attributes = attributes.into_iter();
    attributes
        .map(|pair| (pair.key, text(pair.value)))
        .collect()
}

impl Span {
    fn new(span: OtlpSpan, process: &str) -> Self {
        Span {
            trace: hex::encode(&span.trace_id),
            id: hex::encode(&span.span_id),
            parent: hex::encode(&span.parent_span_id),
            kind: span.kind(),
            name: span.name,
            error: span.status.map(|status| status.message),
            attributes: texts(span.attributes),
            process: process.to_owned(),
            start: span.start_time_unix_nano,
            end: span.end_time_unix_nano,
        }
    }

    fn attribute(&self, name: &str) -> &str {
        let value = self.attributes.get(name);
        value.unwrap_or_else(|| panic!("{name} is missing in {self:?}"))
    }
}

impl Collector {
    async fn start() -> Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .context("bind the collector")?;
        let collector = Collector {
            port: listener.local_addr()?.port(),
            ..Collector::default()
        };
        let app = axum::Router::new()
            .fallback(receive)
            .with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(collector)
    }

    /// A world whose hosts send their spans here.
    async fn world(&self, kind: Kind, manifest: &str) -> Result<World> {
        let mut world = World::without_host(kind, manifest).await?;
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        world.host_env = vec![("ONCELY_TRACES".to_owned(), endpoint)];
        world.start_host().await?;
        Ok(world)
    }

    fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    /// Waits until `count` spans of this name were received, and returns them.
    async fn until(&self, world: &World, name: &str, count: usize) -> Result<Vec<Span>> {
        let description = format!("{count} spans `{name}` are received");
        world
            .eventually(description, || async {
                let found = self.spans().into_iter().filter(|span| span.name == name);
                let found: Vec<Span> = found.collect();
                ensure!(found.len() >= count, "received {found:?}");
                Ok(Some(found))
            })
            .await
    }

    /// Each span as `parent > name [kind]`, sorted. A parent that was not received is shown by its
    /// id, and a root has `-`.
    fn tree(&self) -> Vec<String> {
        let spans = self.spans();
        let names: HashMap<&str, &str> = spans
            .iter()
            .map(|span| (span.id.as_str(), span.name.as_str()))
            .collect();
        assert_eq!(names.len(), spans.len(), "ids repeat in {spans:?}");
        let line = |span: &Span| {
            let parent = match span.parent.as_str() {
                "" => "-",
                id => names.get(id).copied().unwrap_or(id),
            };
            assert!(span.start > 0 && span.end >= span.start, "{span:?}");
            format!("{parent} > {} [{:?}]", span.name, span.kind)
        };
        let mut lines: Vec<String> = spans.iter().map(line).collect();
        lines.sort();
        lines
    }

    fn traces(&self) -> BTreeSet<String> {
        self.spans().into_iter().map(|span| span.trace).collect()
    }
}

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{CALLER}-{flags}")
}

/// A message of the caller's trace.
fn traced(event_id: &str, behaviour: &str, options: &str, flags: &str) -> NewMessage {
    let mut message = NewMessage::new("in.x", event_id, behaviour, options);
    let parent = ("traceparent".to_owned(), traceparent(flags));
    message.headers.push(parent);
    message
}

/// A second worker over the outputs of the first.
fn with_second(settings: &str) -> Result<String> {
    let component = guests::component()?;
    let second = format!(
        "[[worker]]\nname = \"second\"\ncomponent = \"{}\"\nstream = \"OUT\"\nsubjects = [\"out.next\"]\n\
         outputs = [\"out.>\"]\n",
        component.display()
    );
    Ok(format!("{}\n{second}", manifest(settings)?))
}

both!(
    a_payment_is_one_tree_to_the_last_output,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        let mut world = collector.world(kind, &with_second("")?).await?;
        let next = r#"{\"do\": \"insert\", \"subject\": \"out.last\"}"#;
        let sent = reqwest::Client::new()
        .post(format!("{}/publish/in.x", world.ingress_url()?))
        .header("Idempotency-Key", "the-key-is-not-exported")
        .header("X-Message-Do", "insert,emit")
        .header("X-Message-Secret", "the-header-is-not-exported")
        .body(format!(
            r#"{{"n": 0, "from": "the-parameter-is-not-exported", "subject": "out.next", "body": "{next}"}}"#
        ))
        .send()
        .await?;
        ensure!(sent.status() == 202, "{}", sent.text().await?);
        world.quiet(2).await?;
        // The last spans are exported before the host ends.
        world.stop_host().await?;

        let tree = [
            "- > POST /publish/ [Server]",
            "POST /publish/ > publish oncely:publish [Producer]",
            "deliver second > claim [Internal]",
            "deliver second > commit [Internal]",
            "deliver second > handler [Internal]",
            "deliver test > claim [Internal]",
            "deliver test > commit [Internal]",
            "deliver test > handler [Internal]",
            "handler > publish second [Producer]",
            "handler > publish test [Producer]",
            "handler > sql [Client]",
            "handler > sql [Client]",
            "publish oncely:publish > deliver test [Consumer]",
            "publish test > deliver second [Consumer]",
        ];
        assert_eq!(collector.tree(), tree);
        assert_eq!(collector.traces().len(), 1);

        // Attributes, without anything secret.
        let spans = collector.spans();
        let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
        let delivery = named("deliver test");
        for (name, expected) in [
            ("messaging.system", "nats"),
            ("messaging.destination.name", "in.x"),
            ("messaging.batch.message_count", "1"),
            ("oncely.stream", "IN"),
            ("oncely.stream_sequence", "1"),
            ("oncely.worker", "test"),
            ("oncely.verdict", "done"),
            ("oncely.attempt", "1"),
        ] {
            assert_eq!(delivery.attribute(name), expected);
        }
        let commit = spans
            .iter()
            .find(|span| span.name == "commit" && span.parent == delivery.id);
        assert_eq!(
            commit.unwrap().attribute("oncely.transaction"),
            delivery.attribute("oncely.transaction")
        );
        let statement = named("sql").attribute("db.query.text");
        assert!(statement.starts_with("insert into effect") && statement.contains("$1"));
        for body in collector.bodies.lock().unwrap().iter() {
            let body = String::from_utf8_lossy(body);
            assert!(!body.contains("is-not-exported"), "{body}");
        }

        // The consumers of the last output see its publish as their parent.
        let stored = world.nats.read_stream("OUT").await?;
        let last = stored.iter().find(|stored| stored.subject == "out.last");
        let parent = &last.context("find the last output")?.headers["traceparent"];
        let published = named("publish second");
        assert_eq!(
            *parent,
            format!("00-{}-{}-01", published.trace, published.id)
        );
        Ok(())
    }
);

both!(
    a_request_continues_the_trace_of_its_caller,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        let manifest = http_manifest("2s", "\n[[worker.route]]\npath = \"/do/{*what}\"\n")?;
        let mut world = collector.world(kind, &manifest).await?;
        let url = format!("{}/do/x", world.ingress_url()?);
        let send = async |key: &str, event: &str, steps: &str, status: u16| -> Result<()> {
            let body = format!(r#"{{"event": "{event}", "do": [{steps}]}}"#);
            let request = reqwest::Client::new().post(&url).body(body);
            let sent = request
                .header("Idempotency-Key", key)
                .header("traceparent", traceparent("01"))
                .send()
                .await?;
            ensure!(sent.status() == status, "{}", sent.text().await?);
            Ok(())
        };
        send("k1", "e1", r#""effect", "send""#, 200).await?;
        send("k1", "e1", r#""effect", "send""#, 200).await?;
        send("k2", "e2", r#""trap""#, 500).await?;
        world.until(world.database.unpublished(), 0).await?;
        world.stop_host().await?;

        let tree = [
            &*format!("{CALLER} > POST /do/{{*what}} [Server]"),
            &*format!("{CALLER} > POST /do/{{*what}} [Server]"),
            &*format!("{CALLER} > POST /do/{{*what}} [Server]"),
            "POST /do/{*what} > claim [Internal]",
            "POST /do/{*what} > claim [Internal]",
            "POST /do/{*what} > commit [Internal]",
            "POST /do/{*what} > handler [Internal]",
            "POST /do/{*what} > handler [Internal]",
            "handler > publish test [Producer]",
            "handler > sql [Client]",
        ];
        assert_eq!(collector.tree(), tree);
        assert_eq!(collector.traces(), BTreeSet::from([TRACE.to_owned()]));
        let spans = collector.spans();
        let requests = spans.iter().filter(|span| span.kind == SpanKind::Server);
        let mut ends: Vec<_> = requests
            .map(|span| {
                let status = span.attribute("http.response.status_code");
                (
                    status,
                    span.attribute("oncely.replayed"),
                    span.error.as_deref(),
                )
            })
            .collect();
        ends.sort_unstable();
        assert_eq!(
            ends,
            [
                ("200", "false", None),
                ("200", "true", None),
                ("500", "false", Some("500"))
            ]
        );
        assert!(
            spans
                .iter()
                .any(|span| span.name == "handler" && span.error.as_deref() == Some("trap"))
        );
        Ok(())
    }
);

both!(
    a_trace_that_is_not_sampled_is_only_forwarded,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        let mut world = collector.world(kind, &manifest(QUICK_RETRIES)?).await?;
        let unsampled = traced("e1", "insert,fail_once", r#"{"n": 1}"#, "00");
        // A handler that copies the headers chooses the trace of its output.
        let copied = traced("e2", "echo", "", "01");
        world.nats.publish_all(vec![unsampled, copied]).await?;
        world.quiet(2).await?;
        world.stop_host().await?;

        let stored = world.nats.read_stream("OUT").await?;
        let headers = |subject: &str| {
            let stored = stored.iter().find(|stored| stored.subject == subject);
            &stored.unwrap().headers
        };
        assert_eq!(headers("out.effect")["traceparent"], traceparent("00"));
        assert_eq!(headers("out.effect").get("tracestate"), None);
        assert_eq!(headers("out.echo")["traceparent"], traceparent("01"));
        assert_eq!(
            collector.tree(),
            [
                &*format!("{CALLER} > deliver test [Consumer]"),
                &*format!("{CALLER} > publish test [Producer]"),
                "deliver test > claim [Internal]",
                "deliver test > commit [Internal]",
                "deliver test > handler [Internal]",
            ]
        );
        Ok(())
    }
);

both!(
    attempts_and_redrives_are_siblings_in_one_trace,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        let retries = "[worker.retry]\nattempts = 2\nbackoff = \"10ms\"\nbackoff_max = \"50ms\"\n\
                   deterministic_failures = \"retry\"";
        let mut world = collector.world(kind, &manifest(retries)?).await?;
        let with_context = traced("e1", "insert,fail_until", r#"{"attempt": 4, "n": 0}"#, "01");
        let without = NewMessage::new("in.x", "e2", "fail_until", r#"{"attempt": 4}"#);
        world.nats.publish_all(vec![with_context, without]).await?;
        let dead = "select count(*) from oncely.dead_letter where state = 'open'";
        world.until(dead, 2).await?;
        world.oncely(&["dlq", "redrive", "--all"]).await?;
        world
            .until("select count(*) from oncely.inbox where state = 'done'", 2)
            .await?;
        world.stop_host().await?;

        let spans = collector.spans();
        let deliveries = |event_id: &str| {
            let mut found: Vec<&Span> = spans
                .iter()
                .filter(|span| span.name == "deliver test")
                .filter(|span| span.attribute("messaging.message.id") == event_id)
                .collect();
            found.sort_by_key(|span| span.start);
            found
        };
        for (event_id, parent) in [("e1", CALLER), ("e2", "")] {
            let found = deliveries(event_id);
            let ends: Vec<_> = found
                .iter()
                .map(|span| {
                    let attempt = span.attribute("oncely.attempt");
                    (
                        attempt,
                        span.attribute("oncely.verdict"),
                        span.error.as_deref(),
                    )
                })
                .collect();
            assert_eq!(
                ends,
                [
                    ("1", "retry", Some("requested-failure")),
                    ("2", "dead", Some("requested-failure")),
                    ("3", "retry", Some("requested-failure")),
                    ("4", "done", None),
                ]
            );
            let redriven = |span: &&&Span| span.attributes.contains_key("oncely.redriven");
            assert_eq!(found.iter().filter(redriven).count(), 2);
            assert!(found.iter().all(|span| span.parent == parent));
            assert!(found.iter().all(|span| span.trace == found[0].trace));
        }
        assert_eq!(deliveries("e1")[0].trace, TRACE);

        // The notice of the dead letter is in the trace.
        let notice = spans.iter().find(|span| {
            span.kind == SpanKind::Producer
                && span.trace == TRACE
                && span.attribute("oncely.stream") == "ONCELY_DLQ"
        });
        assert_eq!(notice.context("find the notice")?.parent, CALLER);
        Ok(())
    }
);

both!(
    an_output_of_a_killed_host_has_its_parent,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        let mut world = collector.world(kind, &manifest("")?).await?;
        let delayed = traced("e1", "emit", r#"{"delay_ms": 2000}"#, "01");
        world.nats.publish_all(vec![delayed]).await?;
        let handler = collector.until(&world, "handler", 1).await?.remove(0);
        world.kill_host()?;
        world.start_host().await?;

        let published = collector.until(&world, "publish test", 1).await?.remove(0);
        assert_eq!(
            (&published.parent, &published.trace),
            (&handler.id, &handler.trace)
        );
        assert_ne!(published.process, handler.process);
        let stored = world.nats.read_stream("OUT").await?;
        assert_eq!(
            stored[0].headers["traceparent"],
            format!("00-{TRACE}-{}-01", published.id)
        );
        Ok(())
    }
);

both!(
    a_collector_that_is_down_costs_only_spans,
    |kind: Kind| async move {
        let collector = Collector::start().await?;
        collector.status.store(503, Ordering::Relaxed);
        let mut world = collector.world(kind, &manifest("batch = 8")?).await?;
        world
            .nats
            .publish_all((0..300).map(NewMessage::insert).collect())
            .await?;
        world.quiet(300).await?;
        let dropped = r#"oncely_trace_spans_total{outcome="dropped"}"#;
        world
            .eventually("spans are dropped", || async {
                let count = value(&scrape(&world).await?, dropped);
                Ok(count.filter(|count| *count > 0.0))
            })
            .await?;
        let log = world.host_log();
        assert_eq!(log.matches("failed to export spans").count(), 1, "{log}");

        // It recovers.
        collector.status.store(0, Ordering::Relaxed);
        world
            .nats
            .publish_all(vec![NewMessage::insert(300)])
            .await?;
        collector.until(&world, "publish test", 1).await?;
        let exported = r#"oncely_trace_spans_total{outcome="exported"}"#;
        ensure!(value(&scrape(&world).await?, exported).is_some_and(|count| count > 0.0));
        world.quiet(301).await?;
        world.stop_host().await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.outputs), (301, 301));
        Ok(())
    }
);

both!(
    without_traces_the_context_is_forwarded_unchanged,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let mut with_state = traced("e1", "insert", r#"{"n": 1, "subject": "out.with"}"#, "01");
        let state = ("tracestate".to_owned(), "vendor=1".to_owned());
        with_state.headers.push(state);
        let without = NewMessage::new(
            "in.x",
            "e2",
            "insert",
            r#"{"n": 1, "subject": "out.without"}"#,
        );
        world.nats.publish_all(vec![with_state, without]).await?;
        world.quiet(2).await?;
        for stored in world.nats.read_stream("OUT").await? {
            let context =
                ["traceparent", "tracestate"].map(|name| stored.headers.get(name).cloned());
            let expected = match stored.subject.as_str() {
                "out.with" => [Some(traceparent("01")), Some("vendor=1".to_owned())],
                _ => [None, None],
            };
            assert_eq!(context, expected, "{}", stored.subject);
        }
        Ok(())
    }
);
