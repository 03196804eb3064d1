//! The metrics of a host for `/metrics`. Names follow OpenTelemetry's conventions for messaging
//! where such conventions exist; all others begin with `oncely_`. `docs/metrics.md` lists them; a
//! test compares.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::model::alarm;
use crate::model::breaker;
use crate::model::call_times;

mod cache;
pub mod health;

pub use cache::{CacheMetrics, MeasuredCache};

/// Histogram buckets from OpenTelemetry's conventions, in seconds.
const BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StreamLabels {
    stream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    worker: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabels {
    worker: String,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    worker: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutputLabels {
    worker: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AlarmLabels {
    worker: String,
    alarm: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PostLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProcessLabels {
    messaging_system: &'static str,
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    worker: String,
    http_route: String,
    http_response_status_code: u16,
}

type Age = Gauge<f64, AtomicU64>;

#[derive(Clone)]
struct Buckets;

/// The times of a worker's calls: the exposed histogram, and finer counts for the charts.
#[derive(Debug, Clone)]
struct CallTimes {
    histogram: Histogram,
    counts: Arc<[AtomicU64; call_times::BUCKETS]>,
}

impl MetricConstructor<CallTimes> for Buckets {
    fn new_metric(&self) -> CallTimes {
        CallTimes {
            histogram: Histogram::new(BUCKETS),
            counts: Arc::new([const { AtomicU64::new(0) }; call_times::BUCKETS]),
        }
    }
}

impl EncodeMetric for CallTimes {
    fn encode(&self, encoder: MetricEncoder<'_>) -> std::fmt::Result {
        self.histogram.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        Histogram::TYPE
    }
}

impl TypedMetric for CallTimes {
    const TYPE: MetricType = Histogram::TYPE;
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

/// Measurements taken when `/metrics` is read.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Whether this host is connected to NATS.
    pub nats_connected: bool,
    /// `None` if the database is unreachable.
    pub outbox: Option<Vec<MeasuredOutbox>>,
    /// Whether the database answers and commits writes of the host.
    pub is_database_writable: bool,
    /// The workers that run on this host.
    pub workers: Vec<MeasuredWorker>,
    /// The state of the circuit breaker of each stream, by its name.
    pub breakers: Vec<(String, breaker::State)>,
    /// `None` if only polling is supported.
    pub wal: Option<MeasuredWal>,
    /// Raised alarms and those that can be raised, by worker.
    pub alarms: Vec<(String, alarm::Kind, bool)>,
    /// The size of the cache of this host, and the state of the shared cache.
    pub cache: MeasuredCache,
}

/// The state of WAL mode.
#[derive(Debug, Clone, Copy, Default)]
pub struct MeasuredWal {
    /// Whether outputs are published from the WAL now.
    pub is_active: bool,
    /// Whether this host reads the WAL.
    pub is_reader: bool,
    /// How far publishing lags behind the commits.
    pub lag: Duration,
    /// The size of the WAL that the server retains for the slot, in bytes.
    pub retained: u64,
}

/// One worker of this host.
#[derive(Debug, Clone, Default)]
pub struct MeasuredWorker {
    /// The name of the worker.
    pub worker: String,
    /// Messages in progress on this host.
    pub in_flight: usize,
    /// Whether an operator paused it.
    pub is_paused: bool,
    /// Messages on the stream that wait or are being handled; `None` if the server does not answer.
    pub unhandled: Option<u64>,
    /// Age of the oldest of them; zero if there are none.
    pub oldest: Option<Duration>,
}

/// The outputs of one worker in the outbox, over all hosts.
#[derive(Debug, Clone, Default)]
pub struct MeasuredOutbox {
    /// The name of the worker.
    pub worker: String,
    /// Outputs that are committed, due and not published.
    pub unpublished: u64,
    /// Age of the oldest of them, except parked and blocked ones.
    pub oldest: Option<Duration>,
    /// Outputs parked until an operator retries or drops them.
    pub parked: u64,
    /// Outputs blocked by a parked output of their key.
    pub blocked: u64,
}

/// All metrics of a host. Labels are workers, streams and words from short lists, never subjects or
/// ids.
pub struct Metrics {
    registry: Registry,
    names: Vec<String>,
    consumed: Family<WorkerLabels, Counter>,
    sent: Family<WorkerLabels, Counter>,
    process: Family<ProcessLabels, CallTimes, Buckets>,
    messages: Family<VerdictLabels, Counter>,
    attempts_failed: Family<ClassLabels, Counter>,
    dead_letters: Family<ReasonLabels, Counter>,
    batches: Family<WorkerLabels, Counter>,
    reruns: Family<WorkerLabels, Counter>,
    conflicts: Family<WorkerLabels, Counter>,
    commits_unclear: Family<WorkerLabels, Counter>,
    outputs: Family<OutputLabels, Counter>,
    regressions: Family<StreamLabels, Counter>,
    republished: Family<StreamLabels, Counter>,
    nats_connected: Gauge,
    database_writable: Gauge,
    in_flight: Family<WorkerLabels, Gauge>,
    paused: Family<WorkerLabels, Gauge>,
    unhandled: Family<WorkerLabels, Gauge>,
    unhandled_age: Family<WorkerLabels, Age>,
    unhandled_age_max: Age,
    unpublished: Family<WorkerLabels, Gauge>,
    unpublished_age: Family<WorkerLabels, Age>,
    unpublished_age_max: Age,
    parked: Family<WorkerLabels, Gauge>,
    blocked: Family<WorkerLabels, Gauge>,
    breaker: Family<StreamLabels, Gauge>,
    wal_active: Gauge,
    wal_reader: Gauge,
    wal_lag: Age,
    wal_retained: Gauge,
    alarms: Family<AlarmLabels, Gauge>,
    webhook_posts: Family<PostLabels, Counter>,
    trace_spans: Family<PostLabels, Counter>,
    /// The metrics of the read cache.
    pub cache: CacheMetrics,
    requests: Family<RequestLabels, Histogram, Buckets>,
    requests_replayed: Family<WorkerLabels, Counter>,
}

/// The outcome of a POST to the webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostOutcome {
    /// The server accepted the alarm.
    Delivered,
    /// It will be retried.
    Failed,
    /// It will not be retried.
    Abandoned,
}

impl PostOutcome {
    fn as_str(self) -> &'static str {
        match self {
            PostOutcome::Delivered => "delivered",
            PostOutcome::Failed => "failed",
            PostOutcome::Abandoned => "abandoned",
        }
    }
}

/// The outcome of the export of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanOutcome {
    /// The collector accepted it.
    Exported,
    /// The queue was full, or the collector did not accept it.
    Dropped,
}

impl SpanOutcome {
    fn as_str(self) -> &'static str {
        match self {
            SpanOutcome::Exported => "exported",
            SpanOutcome::Dropped => "dropped",
        }
    }
}

/// The outcome of an attempt to publish an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputOutcome {
    /// It was stored on its stream now.
    Published,
    /// The broker already had it.
    Duplicate,
    /// A lookup found it already stored on its stream.
    AlreadyStored,
    /// It is not known to be stored, and will be retried.
    Failed,
    /// It is not retried until an operator decides.
    Parked,
    /// Its stream holds another message under its id; it is published under a new id.
    IdTaken,
}

impl OutputOutcome {
    fn as_str(self) -> &'static str {
        match self {
            OutputOutcome::Published => "published",
            OutputOutcome::Duplicate => "duplicate",
            OutputOutcome::AlreadyStored => "already-stored",
            OutputOutcome::Failed => "failed",
            OutputOutcome::Parked => "parked",
            OutputOutcome::IdTaken => "id-taken",
        }
    }
}

/// The failure codes that the host itself assigns. All others come from handlers, and their number
/// is unlimited.
const CLASSES: [&str; 11] = [
    "trap",
    "timeout",
    "out-of-memory",
    "stack-overflow",
    "output-refused",
    "constraint-violation",
    "conflict",
    "sql",
    "wrong-result-count",
    "commit-refused",
    "handler",
];

/// Registers metrics and keeps their names.
struct Registrar {
    registry: Registry,
    names: Vec<String>,
}

impl Registrar {
    fn add<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add_with_unit(name, help, None, M::default())
    }

    fn add_seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.add_with_unit(name, help, Some(Unit::Seconds), metric)
    }

    fn add_with_unit<M: Metric + Clone>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        metric: M,
    ) -> M {
        let ending = if matches!(metric.metric_type(), MetricType::Counter) {
            "_total"
        } else {
            ""
        };
        match unit {
            Some(unit) => {
                self.names.push(format!("{name}_{}{ending}", unit.as_str()));
                self.registry
                    .register_with_unit(name, help, unit, metric.clone());
            }
            None => {
                self.names.push(format!("{name}{ending}"));
                self.registry.register(name, help, metric.clone());
            }
        }
        metric
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registrar = Registrar {
            registry: Registry::default(),
            names: Vec::new(),
        };
        Metrics {
            consumed: registrar.add(
                "messaging_client_consumed_messages",
                "Messages received from streams",
            ),
            sent: registrar.add(
                "messaging_client_sent_messages",
                "Outputs, dead-letter notices and alarms stored on their streams",
            ),
            process: registrar.add_seconds(
                "messaging_process_duration",
                "Time in the handler for one call",
                Family::new_with_constructor(Buckets),
            ),
            messages: registrar.add("oncely_messages", "Deliveries, by verdict"),
            attempts_failed: registrar.add("oncely_attempts_failed", "Failed attempts, by class"),
            dead_letters: registrar.add("oncely_dead_letters", "Dead letters written, by reason"),
            batches: registrar.add("oncely_batches", "Batches delivered"),
            reruns: registrar.add(
                "oncely_reruns",
                "Transactions run again because of a failed item or a conflict",
            ),
            conflicts: registrar.add(
                "oncely_conflicts",
                "Transactions that conflicted with another one",
            ),
            commits_unclear: registrar.add("oncely_commits_unclear", "Commits without an answer"),
            outputs: registrar.add(
                "oncely_outputs",
                "Attempts to publish an output, by outcome",
            ),
            regressions: registrar.add(
                "oncely_stream_regressions",
                "Times a stream was found without outputs it had stored",
            ),
            republished: registrar.add(
                "oncely_outputs_republished",
                "Outputs published again after a stream had lost them",
            ),
            nats_connected: registrar.add(
                "oncely_nats_connected",
                "Whether the host is connected to NATS",
            ),
            database_writable: registrar.add(
                "oncely_database_writable",
                "Whether the database answers and accepts writes",
            ),
            paused: registrar.add(
                "oncely_worker_paused",
                "1 while an operator paused the worker, else 0",
            ),
            in_flight: registrar.add(
                "oncely_in_flight_messages",
                "Messages in progress on this host",
            ),
            unhandled: registrar.add(
                "oncely_unhandled_messages",
                "Messages on the stream that wait or are being handled",
            ),
            unhandled_age: registrar.add_seconds(
                "oncely_unhandled_age",
                "Age of the oldest unhandled message",
                Family::default(),
            ),
            unhandled_age_max: registrar.add_seconds(
                "oncely_unhandled_age_max",
                "Age of the oldest unhandled message of all workers here",
                Age::default(),
            ),
            unpublished: registrar.add(
                "oncely_unpublished_outputs",
                "Outputs that are committed, due and not published",
            ),
            unpublished_age: registrar.add_seconds(
                "oncely_unpublished_age",
                "Age of the oldest unpublished output, except parked and blocked ones",
                Family::default(),
            ),
            unpublished_age_max: registrar.add_seconds(
                "oncely_unpublished_age_max",
                "Age of the oldest unpublished output of all workers",
                Age::default(),
            ),
            parked: registrar.add(
                "oncely_parked_outputs",
                "Outputs parked until an operator retries or drops them",
            ),
            blocked: registrar.add(
                "oncely_blocked_outputs",
                "Outputs blocked by a parked output of their key",
            ),
            breaker: registrar.add(
                "oncely_breaker_state",
                "State of a stream's circuit breaker: 0 closed, 1 half-open, 2 open",
            ),
            wal_active: registrar.add(
                "oncely_wal_active",
                "Whether outputs are published from the database's WAL",
            ),
            wal_reader: registrar.add("oncely_wal_reader", "Whether this host reads the WAL"),
            wal_lag: registrar.add_seconds(
                "oncely_wal_lag",
                "Lag of publishing from the WAL behind the commits",
                Age::default(),
            ),
            wal_retained: registrar.add(
                "oncely_wal_retained_bytes",
                "Size of the WAL that the server retains for the replication slot",
            ),
            alarms: registrar.add("oncely_alarms", "Raised alarms"),
            webhook_posts: registrar.add(
                "oncely_webhook_posts",
                "Attempts to post an alarm to the webhook, by outcome",
            ),
            trace_spans: registrar.add(
                "oncely_trace_spans",
                "Spans sent to the collector or dropped, by outcome",
            ),
            cache: CacheMetrics::new(&mut registrar),
            requests: registrar.add_seconds(
                "http_server_request_duration",
                "Time from a request's first byte to its response",
                Family::new_with_constructor(Buckets),
            ),
            requests_replayed: registrar.add(
                "oncely_requests_replayed",
                "Requests answered with a stored response",
            ),
            names: registrar.names,
            registry: registrar.registry,
        }
    }
}

impl Metrics {
    /// The names of all metrics as exposed. A metric without values is not shown.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Counts a message received from a stream.
    pub fn consumed(&self, worker: &str) {
        self.consumed.get_or_create(&worker_labels(worker)).inc();
    }

    /// Records the time that one call spent in the handler.
    pub fn processed(&self, worker: &str, time: Duration) {
        let times = self.process.get_or_create(&process_labels(worker));
        times.histogram.observe(time.as_secs_f64());
        if let Some(count) = times.counts.get(call_times::bucket(time)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The calls of a worker since the start of this host by their time, see [`call_times`]; empty
    /// before its first call.
    pub fn call_times(&self, worker: &str) -> Vec<u64> {
        let Some(times) = self.process.get(&process_labels(worker)) else {
            return Vec::new();
        };
        let counts = times.counts.iter();
        counts.map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Counts a delivery by its verdict.
    pub fn verdict(&self, worker: &str, verdict: &'static str) {
        self.messages
            .get_or_create(&VerdictLabels {
                worker: worker.to_owned(),
                verdict,
            })
            .inc();
    }

    /// Counts a failed attempt with its code.
    pub fn attempt_failed(&self, worker: &str, code: Option<&str>) {
        let class = CLASSES
            .into_iter()
            .find(|class| Some(*class) == code)
            .unwrap_or("handler");
        self.attempts_failed
            .get_or_create(&ClassLabels {
                worker: worker.to_owned(),
                class,
            })
            .inc();
    }

    /// Counts a written dead letter by its reason.
    pub fn dead_letter(&self, worker: &str, reason: &'static str) {
        self.dead_letters
            .get_or_create(&ReasonLabels {
                worker: worker.to_owned(),
                reason,
            })
            .inc();
    }

    /// Counts a delivered batch, and the reruns of its transactions.
    pub fn batch(&self, worker: &str, reruns: u32) {
        self.batches.get_or_create(&worker_labels(worker)).inc();
        self.reruns
            .get_or_create(&worker_labels(worker))
            .inc_by(reruns.into());
    }

    /// Counts a transaction that conflicted with another one.
    pub fn conflict(&self, worker: &str) {
        self.conflicts.get_or_create(&worker_labels(worker)).inc();
    }

    /// Records a request with its response. `replayed` means that the response was stored before.
    pub fn request(&self, worker: &str, route: &str, status: u16, replayed: bool, time: Duration) {
        let labels = RequestLabels {
            worker: worker.to_owned(),
            http_route: route.to_owned(),
            http_response_status_code: status,
        };
        self.requests
            .get_or_create(&labels)
            .observe(time.as_secs_f64());
        if replayed {
            self.requests_replayed
                .get_or_create(&worker_labels(worker))
                .inc();
        }
    }

    /// Counts a commit without an answer from the database.
    pub fn commit_unclear(&self, worker: &str) {
        self.commits_unclear
            .get_or_create(&worker_labels(worker))
            .inc();
    }

    /// Counts an attempt to publish an output.
    pub fn output(&self, worker: &str, outcome: OutputOutcome) {
        if outcome == OutputOutcome::Published {
            self.sent.get_or_create(&worker_labels(worker)).inc();
        }
        self.outputs
            .get_or_create(&OutputLabels {
                worker: worker.to_owned(),
                outcome: outcome.as_str(),
            })
            .inc();
    }

    /// Counts a loss of stored messages on a stream, and the outputs that were published again.
    pub fn regression(&self, stream: &str, outputs: u64) {
        let labels = StreamLabels {
            stream: stream.to_owned(),
        };
        self.regressions.get_or_create(&labels).inc();
        self.republished.get_or_create(&labels).inc_by(outputs);
    }

    /// Counts a POST to the webhook.
    pub fn webhook_post(&self, post: PostOutcome) {
        self.webhook_posts
            .get_or_create(&PostLabels {
                outcome: post.as_str(),
            })
            .inc();
    }

    /// Counts spans of traces.
    pub fn trace_spans(&self, outcome: SpanOutcome, count: u64) {
        self.trace_spans
            .get_or_create(&PostLabels {
                outcome: outcome.as_str(),
            })
            .inc_by(count);
    }

    /// Everything as text in the OpenMetrics format that Prometheus reads, with the current
    /// measurements.
    pub fn text(&self, measured: &Measured) -> Result<String, std::fmt::Error> {
        self.nats_connected.set(measured.nats_connected.into());
        self.database_writable
            .set(measured.is_database_writable.into());
        self.measure_workers(&measured.workers);
        self.measure_outbox(measured.outbox.as_deref().unwrap_or_default());
        self.breaker.clear();
        for (stream, state) in &measured.breakers {
            let state = match state {
                breaker::State::Closed => 0,
                breaker::State::HalfOpen => 1,
                breaker::State::Open => 2,
            };
            self.breaker
                .get_or_create(&StreamLabels {
                    stream: stream.clone(),
                })
                .set(state);
        }
        let wal = measured.wal.unwrap_or_default();
        self.wal_active.set(wal.is_active.into());
        self.wal_reader.set(wal.is_reader.into());
        self.wal_lag.set(wal.lag.as_secs_f64());
        self.wal_retained
            .set(i64::try_from(wal.retained).unwrap_or(i64::MAX));
        self.alarms.clear();
        for (worker, kind, is_raised) in &measured.alarms {
            let labels = AlarmLabels {
                worker: worker.clone(),
                alarm: kind.as_str(),
            };
            self.alarms
                .get_or_create(&labels)
                .inc_by(i64::from(*is_raised));
        }
        self.cache.measure(&measured.cache);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn measure_workers(&self, workers: &[MeasuredWorker]) {
        self.in_flight.clear();
        self.paused.clear();
        self.unhandled.clear();
        self.unhandled_age.clear();
        for worker in workers {
            let labels = worker_labels(&worker.worker);
            self.in_flight
                .get_or_create(&labels)
                .set(i64::try_from(worker.in_flight).unwrap_or(i64::MAX));
            self.paused
                .get_or_create(&labels)
                .set(worker.is_paused.into());
            if let Some(unhandled) = worker.unhandled {
                self.unhandled
                    .get_or_create(&labels)
                    .set(i64::try_from(unhandled).unwrap_or(i64::MAX));
            }
            if let Some(oldest) = worker.oldest {
                self.unhandled_age
                    .get_or_create(&labels)
                    .set(oldest.as_secs_f64());
            }
        }
        let oldest = workers
            .iter()
            .filter_map(|worker| worker.oldest)
            .max()
            .unwrap_or_default();
        self.unhandled_age_max.set(oldest.as_secs_f64());
    }

    fn measure_outbox(&self, outboxes: &[MeasuredOutbox]) {
        self.unpublished.clear();
        self.unpublished_age.clear();
        self.parked.clear();
        self.blocked.clear();
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let seconds = |outbox: &MeasuredOutbox| outbox.oldest.unwrap_or_default().as_secs_f64();
        for outbox in outboxes {
            let labels = worker_labels(&outbox.worker);
            self.unpublished
                .get_or_create(&labels)
                .set(number(outbox.unpublished));
            self.unpublished_age
                .get_or_create(&labels)
                .set(seconds(outbox));
            self.parked
                .get_or_create(&labels)
                .set(number(outbox.parked));
            self.blocked
                .get_or_create(&labels)
                .set(number(outbox.blocked));
        }
        self.unpublished_age_max
            .set(outboxes.iter().map(seconds).fold(0.0, f64::max));
    }
}

fn process_labels(worker: &str) -> ProcessLabels {
    ProcessLabels {
        messaging_system: "nats",
        worker: worker.to_owned(),
    }
}

fn worker_labels(worker: &str) -> WorkerLabels {
    WorkerLabels {
        worker: worker.to_owned(),
    }
}
