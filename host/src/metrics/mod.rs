//! What a host counts and measures, for `/metrics`: names follow OpenTelemetry's conventions for messaging where there are
//! any, and begin with `oncely_` where there are none. `docs/metrics.md` lists them; a test compares.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::model::alarm;
use crate::model::breaker;

mod cache;
pub mod health;

pub use cache::{CacheMetrics, MeasuredCache};

/// Of OpenTelemetry's conventions, in seconds.
const BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Worker {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stream {
    stream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verdict {
    worker: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    worker: String,
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    worker: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    worker: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Alarm {
    worker: String,
    alarm: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PostOutcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Process {
    messaging_system: &'static str,
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    worker: String,
    http_route: String,
    http_response_status_code: u16,
}

type Age = Gauge<f64, AtomicU64>;

#[derive(Clone)]
struct Buckets;

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

/// What is measured when somebody asks, not counted as it happens.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    pub nats_connected: bool,
    /// None when the database is out of reach.
    pub outbox: Option<Vec<MeasuredOutbox>>,
    /// Whether the database answers and commits what the host writes.
    pub takes_writes: bool,
    pub workers: Vec<MeasuredWorker>,
    pub breakers: Vec<(String, breaker::State)>,
    /// None where outputs can go by polling alone.
    pub log: Option<MeasuredLog>,
    /// Alarms that are raised, and those that are not and may be, by worker.
    pub alarms: Vec<(String, alarm::Kind, bool)>,
    pub cache: MeasuredCache,
}

/// The database's log as a way for outputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct MeasuredLog {
    pub is_used: bool,
    /// Whether this host reads it.
    pub reads: bool,
    /// How far publishing is behind the commits.
    pub behind: Duration,
    /// How much of it the server keeps for the slot, in bytes.
    pub retained: u64,
}

/// One worker of this host.
#[derive(Debug, Clone, Default)]
pub struct MeasuredWorker {
    pub worker: String,
    /// Messages this host holds.
    pub in_flight: usize,
    /// Messages on the stream that wait or are being handled; none when the server does not answer.
    pub unhandled: Option<u64>,
    /// Age of the oldest of them; zero when there is none.
    pub oldest: Option<Duration>,
}

/// What one worker has in the outbox, of all hosts.
#[derive(Debug, Clone, Default)]
pub struct MeasuredOutbox {
    pub worker: String,
    pub unpublished: u64,
    /// Age of the oldest of them, but for what waits for a person.
    pub oldest: Option<Duration>,
    pub set_aside: u64,
    pub held: u64,
}

/// Everything a host counts. Labels are workers, streams and words from short lists, never subjects or ids.
pub struct Metrics {
    registry: Registry,
    names: Vec<String>,
    consumed: Family<Worker, Counter>,
    sent: Family<Worker, Counter>,
    process: Family<Process, Histogram, Buckets>,
    messages: Family<Verdict, Counter>,
    attempts_failed: Family<Class, Counter>,
    dead_letters: Family<Reason, Counter>,
    batches: Family<Worker, Counter>,
    reruns: Family<Worker, Counter>,
    conflicts: Family<Worker, Counter>,
    commits_unclear: Family<Worker, Counter>,
    outputs: Family<Outcome, Counter>,
    regressions: Family<Stream, Counter>,
    published_again: Family<Stream, Counter>,
    nats_connected: Gauge,
    database_answers: Gauge,
    in_flight: Family<Worker, Gauge>,
    unhandled: Family<Worker, Gauge>,
    unhandled_age: Family<Worker, Age>,
    unhandled_age_max: Age,
    unpublished: Family<Worker, Gauge>,
    unpublished_age: Family<Worker, Age>,
    unpublished_age_max: Age,
    set_aside: Family<Worker, Gauge>,
    held: Family<Worker, Gauge>,
    breaker: Family<Stream, Gauge>,
    log_used: Gauge,
    log_reads: Gauge,
    log_behind: Age,
    log_retained: Gauge,
    alarms: Family<Alarm, Gauge>,
    webhook_posts: Family<PostOutcome, Counter>,
    pub cache: CacheMetrics,
    requests: Family<Request, Histogram, Buckets>,
    requests_replayed: Family<Worker, Counter>,
}

/// What became of a POST to the webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Post {
    Taken,
    /// It is tried again.
    Failed,
    GivenUp,
}

impl Post {
    fn as_str(self) -> &'static str {
        match self {
            Post::Taken => "taken",
            Post::Failed => "failed",
            Post::GivenUp => "given-up",
        }
    }
}

/// What became of the publication of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputOutcome {
    Published,
    /// The broker knew it already.
    Duplicate,
    /// It was looked up, and stood on its stream already.
    Found,
    Failed,
    SetAside,
    /// Its stream holds another message under its id; it is published under another one.
    IdTaken,
}

impl OutputOutcome {
    fn as_str(self) -> &'static str {
        match self {
            OutputOutcome::Published => "published",
            OutputOutcome::Duplicate => "duplicate",
            OutputOutcome::Found => "found",
            OutputOutcome::Failed => "failed",
            OutputOutcome::SetAside => "set-aside",
            OutputOutcome::IdTaken => "id-taken",
        }
    }
}

/// The codes of failures that the host itself gives; all others are the handlers' own, of which there may be any number.
const CLASSES: [&str; 11] = [
    "trap",
    "timeout",
    "out-of-memory",
    "stack-overflow",
    "output-refused",
    "constraint-violation",
    "conflict",
    "sql",
    "wrong-answer",
    "commit-refused",
    "handler",
];

/// Registers metrics and remembers their names.
struct Book {
    registry: Registry,
    names: Vec<String>,
}

impl Book {
    fn add<M: Metric + Clone + Default>(&mut self, name: &str, help: &str) -> M {
        self.add_as(name, help, None, M::default())
    }

    fn add_seconds<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.add_as(name, help, Some(Unit::Seconds), metric)
    }

    fn add_as<M: Metric + Clone>(&mut self, name: &str, help: &str, unit: Option<Unit>, metric: M) -> M {
        let ending = if matches!(metric.metric_type(), MetricType::Counter) { "_total" } else { "" };
        match unit {
            Some(unit) => {
                self.names.push(format!("{name}_{}{ending}", unit.as_str()));
                self.registry.register_with_unit(name, help, unit, metric.clone());
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
        let mut book = Book { registry: Registry::default(), names: Vec::new() };
        Metrics {
            consumed: book.add("messaging_client_consumed_messages", "Messages taken from streams"),
            sent: book.add(
                "messaging_client_sent_messages",
                "Outputs, and notices of dead letters and alarms, stored on their streams",
            ),
            process: book.add_seconds(
                "messaging_process_duration",
                "Time in the handler for one call",
                Family::new_with_constructor(Buckets),
            ),
            messages: book.add("oncely_messages", "Deliveries by what they came to"),
            attempts_failed: book.add("oncely_attempts_failed", "Failed attempts by class"),
            dead_letters: book.add("oncely_dead_letters", "Dead letters written, by reason"),
            batches: book.add("oncely_batches", "Batches delivered"),
            reruns: book.add("oncely_reruns", "Transactions that were run again because of a member or a conflict"),
            conflicts: book.add("oncely_conflicts", "Transactions that another one stood in the way of"),
            commits_unclear: book.add("oncely_commits_unclear", "Commits whose answer was lost"),
            outputs: book.add("oncely_outputs", "Attempts to publish an output by what they came to"),
            regressions: book
                .add("oncely_stream_regressions", "How often a stream came back without what it had stored"),
            published_again: book.add("oncely_outputs_published_again", "Outputs that a stream had lost"),
            nats_connected: book.add("oncely_nats_connected", "Whether there is a connection to NATS"),
            database_answers: book.add("oncely_database_answers", "Whether the database answers and takes writes"),
            in_flight: book.add("oncely_in_flight_messages", "Messages this host holds"),
            unhandled: book.add("oncely_unhandled_messages", "Messages on the stream that wait or are being handled"),
            unhandled_age: book.add_seconds("oncely_unhandled_age", "Age of the oldest of them", Family::default()),
            unhandled_age_max: book.add_seconds(
                "oncely_unhandled_age_max",
                "Age of the oldest unhandled message of all workers here",
                Age::default(),
            ),
            unpublished: book.add("oncely_unpublished_outputs", "Outputs that are committed, due and not published"),
            unpublished_age: book.add_seconds(
                "oncely_unpublished_age",
                "Age of the oldest of them, but for what waits for a person",
                Family::default(),
            ),
            unpublished_age_max: book.add_seconds(
                "oncely_unpublished_age_max",
                "Age of the oldest unpublished output of all workers",
                Age::default(),
            ),
            set_aside: book.add("oncely_set_aside_outputs", "Outputs that wait for a person to retry or drop them"),
            held: book.add("oncely_held_outputs", "Outputs that wait for one that is set aside"),
            breaker: book.add("oncely_breaker_state", "Of a stream: 0 closed, 1 half-open, 2 open"),
            log_used: book.add("oncely_log_used", "Whether outputs are published from the database's log"),
            log_reads: book.add("oncely_log_reads", "Whether this host is the one that reads it"),
            log_behind: book.add_seconds(
                "oncely_log_behind",
                "How far publishing from the log is behind the commits",
                Age::default(),
            ),
            log_retained: book
                .add("oncely_log_retained_bytes", "How much of its log the server keeps for the replication slot"),
            alarms: book.add("oncely_alarms", "Alarms that are raised"),
            webhook_posts: book.add("oncely_webhook_posts", "Attempts to tell the webhook of an alarm, by outcome"),
            cache: CacheMetrics::new(&mut book),
            requests: book.add_seconds(
                "http_server_request_duration",
                "Time from a request's first byte to its answer",
                Family::new_with_constructor(Buckets),
            ),
            requests_replayed: book
                .add("oncely_requests_replayed", "Requests that were given the answer of an earlier one"),
            names: book.names,
            registry: book.registry,
        }
    }
}

impl Metrics {
    /// The names of all metrics, as they are shown. One that has counted nothing yet is not.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn consumed(&self, worker: &str) {
        self.consumed.get_or_create(&of_worker(worker)).inc();
    }

    pub fn processed(&self, worker: &str, time: Duration) {
        let labels = Process { messaging_system: "nats", worker: worker.to_owned() };
        self.process.get_or_create(&labels).observe(time.as_secs_f64());
    }

    pub fn verdict(&self, worker: &str, verdict: &'static str) {
        self.messages.get_or_create(&Verdict { worker: worker.to_owned(), verdict }).inc();
    }

    /// A failed attempt with the code it was given.
    pub fn attempt_failed(&self, worker: &str, code: Option<&str>) {
        let class = CLASSES.into_iter().find(|class| Some(*class) == code).unwrap_or("handler");
        self.attempts_failed.get_or_create(&Class { worker: worker.to_owned(), class }).inc();
    }

    pub fn dead_letter(&self, worker: &str, reason: &'static str) {
        self.dead_letters.get_or_create(&Reason { worker: worker.to_owned(), reason }).inc();
    }

    pub fn batch(&self, worker: &str, reruns: u32) {
        self.batches.get_or_create(&of_worker(worker)).inc();
        self.reruns.get_or_create(&of_worker(worker)).inc_by(reruns.into());
    }

    pub fn conflict(&self, worker: &str) {
        self.conflicts.get_or_create(&of_worker(worker)).inc();
    }

    /// A request and its answer, `replayed` if it was given before.
    pub fn request(&self, worker: &str, route: &str, status: u16, replayed: bool, time: Duration) {
        let labels =
            Request { worker: worker.to_owned(), http_route: route.to_owned(), http_response_status_code: status };
        self.requests.get_or_create(&labels).observe(time.as_secs_f64());
        if replayed {
            self.requests_replayed.get_or_create(&of_worker(worker)).inc();
        }
    }

    pub fn commit_unclear(&self, worker: &str) {
        self.commits_unclear.get_or_create(&of_worker(worker)).inc();
    }

    pub fn output(&self, worker: &str, outcome: OutputOutcome) {
        if outcome == OutputOutcome::Published {
            self.sent.get_or_create(&of_worker(worker)).inc();
        }
        self.outputs.get_or_create(&Outcome { worker: worker.to_owned(), outcome: outcome.as_str() }).inc();
    }

    pub fn regression(&self, stream: &str, outputs: u64) {
        let labels = Stream { stream: stream.to_owned() };
        self.regressions.get_or_create(&labels).inc();
        self.published_again.get_or_create(&labels).inc_by(outputs);
    }

    pub fn webhook_post(&self, post: Post) {
        self.webhook_posts.get_or_create(&PostOutcome { outcome: post.as_str() }).inc();
    }

    /// Everything as text in the OpenMetrics form that Prometheus reads, with what was measured just now.
    pub fn text(&self, measured: &Measured) -> Result<String, std::fmt::Error> {
        self.nats_connected.set(measured.nats_connected.into());
        self.database_answers.set(measured.takes_writes.into());
        self.measure_workers(&measured.workers);
        self.measure_outbox(measured.outbox.as_deref().unwrap_or_default());
        self.breaker.clear();
        for (stream, state) in &measured.breakers {
            let state = match state {
                breaker::State::Closed => 0,
                breaker::State::HalfOpen => 1,
                breaker::State::Open => 2,
            };
            self.breaker.get_or_create(&Stream { stream: stream.clone() }).set(state);
        }
        let log = measured.log.unwrap_or_default();
        self.log_used.set(log.is_used.into());
        self.log_reads.set(log.reads.into());
        self.log_behind.set(log.behind.as_secs_f64());
        self.log_retained.set(i64::try_from(log.retained).unwrap_or(i64::MAX));
        self.alarms.clear();
        for (worker, kind, is_raised) in &measured.alarms {
            let labels = Alarm { worker: worker.clone(), alarm: kind.as_str() };
            self.alarms.get_or_create(&labels).inc_by(i64::from(*is_raised));
        }
        self.cache.measure(&measured.cache);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn measure_workers(&self, workers: &[MeasuredWorker]) {
        self.in_flight.clear();
        self.unhandled.clear();
        self.unhandled_age.clear();
        for worker in workers {
            let labels = of_worker(&worker.worker);
            self.in_flight.get_or_create(&labels).set(i64::try_from(worker.in_flight).unwrap_or(i64::MAX));
            if let Some(unhandled) = worker.unhandled {
                self.unhandled.get_or_create(&labels).set(i64::try_from(unhandled).unwrap_or(i64::MAX));
            }
            if let Some(oldest) = worker.oldest {
                self.unhandled_age.get_or_create(&labels).set(oldest.as_secs_f64());
            }
        }
        let oldest = workers.iter().filter_map(|worker| worker.oldest).max().unwrap_or_default();
        self.unhandled_age_max.set(oldest.as_secs_f64());
    }

    fn measure_outbox(&self, lags: &[MeasuredOutbox]) {
        self.unpublished.clear();
        self.unpublished_age.clear();
        self.set_aside.clear();
        self.held.clear();
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let seconds = |lag: &MeasuredOutbox| lag.oldest.unwrap_or_default().as_secs_f64();
        for lag in lags {
            let labels = of_worker(&lag.worker);
            self.unpublished.get_or_create(&labels).set(number(lag.unpublished));
            self.unpublished_age.get_or_create(&labels).set(seconds(lag));
            self.set_aside.get_or_create(&labels).set(number(lag.set_aside));
            self.held.get_or_create(&labels).set(number(lag.held));
        }
        self.unpublished_age_max.set(lags.iter().map(seconds).fold(0.0, f64::max));
    }
}

fn of_worker(worker: &str) -> Worker {
    Worker { worker: worker.to_owned() }
}
