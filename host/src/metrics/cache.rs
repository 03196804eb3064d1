//! What is counted and measured of the cache.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{Buckets, Registrar, WorkerLabels, worker_labels};

/// Ages of what is cached, in seconds.
const AGES: [f64; 13] = [
    0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0, 86_400.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HitLabels {
    worker: String,
    layer: &'static str,
}

#[derive(Clone)]
struct Ages;

impl MetricConstructor<Histogram> for Ages {
    fn new_metric(&self) -> Histogram {
        Histogram::new(AGES)
    }
}

/// What is measured of the cache when somebody asks.
#[derive(Debug, Clone, Default)]
pub struct MeasuredCache {
    /// Values in this process.
    pub entries: u64,
    /// What they take, in bytes.
    pub size: u64,
    /// Whether there is a shared cache and it is in use.
    pub is_shared_up: bool,
}

/// What is counted of the cache.
pub struct CacheMetrics {
    hits: Family<HitLabels, Counter>,
    misses: Family<WorkerLabels, Counter>,
    loads: Family<WorkerLabels, Counter>,
    waits: Family<WorkerLabels, Counter>,
    stale: Family<WorkerLabels, Counter>,
    age: Family<WorkerLabels, Histogram, Ages>,
    invalidations: Family<WorkerLabels, Counter>,
    invalidation_delay: Family<WorkerLabels, Histogram, Buckets>,
    shared_failures: Counter,
    is_shared_up: Gauge,
    entries: Gauge,
    size: Gauge,
}

impl CacheMetrics {
    pub(super) fn new(registrar: &mut Registrar) -> Self {
        CacheMetrics {
            hits: registrar.add(
                "oncely_cache_hits",
                "Reads that the cache answered, by layer",
            ),
            misses: registrar.add("oncely_cache_misses", "Reads that it could not answer"),
            loads: registrar.add(
                "oncely_cache_loads",
                "Values that were loaded because they were missing or stale",
            ),
            waits: registrar.add(
                "oncely_cache_waits",
                "Reads that waited for somebody else's load",
            ),
            stale: registrar.add(
                "oncely_cache_stale_hits",
                "Hits beyond their time to live, while they were loaded anew",
            ),
            age: registrar.add_seconds(
                "oncely_cache_age",
                "How old values were that the cache answered with",
                Family::new_with_constructor(Ages),
            ),
            invalidations: registrar.add(
                "oncely_cache_invalidations",
                "Tags that were invalidated here",
            ),
            invalidation_delay: registrar.add_seconds(
                "oncely_cache_invalidation_delay",
                "How long after a commit its invalidations were heard of and applied here",
                Family::new_with_constructor(Buckets),
            ),
            shared_failures: registrar.add(
                "oncely_cache_shared_failures",
                "Operations of the shared cache that failed or took too long",
            ),
            is_shared_up: registrar.add(
                "oncely_cache_shared_up",
                "Whether there is a shared cache and it is in use",
            ),
            entries: registrar.add("oncely_cache_entries", "Values in this process"),
            size: registrar.add_with_unit(
                "oncely_cache_size",
                "What they take",
                Some(Unit::Bytes),
                Gauge::default(),
            ),
        }
    }

    /// The layer of this name answered, with a value of this age.
    pub fn hit(&self, worker: &str, layer: &'static str, age: Duration) {
        self.hits
            .get_or_create(&HitLabels {
                worker: worker.to_owned(),
                layer,
            })
            .inc();
        self.age
            .get_or_create(&worker_labels(worker))
            .observe(age.as_secs_f64());
    }

    /// Such an answer was beyond its time to live.
    pub fn stale(&self, worker: &str) {
        self.stale.get_or_create(&worker_labels(worker)).inc();
    }

    pub fn miss(&self, worker: &str) {
        self.misses.get_or_create(&worker_labels(worker)).inc();
    }

    pub fn load(&self, worker: &str) {
        self.loads.get_or_create(&worker_labels(worker)).inc();
    }

    pub fn wait(&self, worker: &str) {
        self.waits.get_or_create(&worker_labels(worker)).inc();
    }

    pub fn invalidated(&self, worker: &str, tags: usize) {
        self.invalidations
            .get_or_create(&worker_labels(worker))
            .inc_by(tags as u64);
    }

    /// What a host committed so long ago is invalid here now.
    pub fn invalidation_applied(&self, worker: &str, delay: Duration) {
        self.invalidation_delay
            .get_or_create(&worker_labels(worker))
            .observe(delay.as_secs_f64());
    }

    pub fn shared_failed(&self) {
        self.shared_failures.inc();
    }

    pub(super) fn measure(&self, measured: &MeasuredCache) {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.entries.set(number(measured.entries));
        self.size.set(number(measured.size));
        self.is_shared_up.set(measured.is_shared_up.into());
    }
}
