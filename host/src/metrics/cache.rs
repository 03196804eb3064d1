//! The metrics of the cache.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Unit;

use super::{Buckets, Registrar, WorkerLabels, worker_labels};

/// Histogram buckets for ages of cached values, in seconds.
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

/// Cache measurements taken when `/metrics` is read.
#[derive(Debug, Clone, Default)]
pub struct MeasuredCache {
    /// Values in this process.
    pub entries: u64,
    /// Their size in bytes.
    pub size: u64,
    /// Whether there is a shared cache and it is in use.
    pub is_shared_up: bool,
}

/// The counters and gauges of the cache.
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
            hits: registrar.add("oncely_cache_hits", "Cache hits, by layer"),
            misses: registrar.add("oncely_cache_misses", "Cache misses"),
            loads: registrar.add(
                "oncely_cache_loads",
                "Values loaded because they were missing or stale",
            ),
            waits: registrar.add(
                "oncely_cache_waits",
                "Reads that waited for the load of another caller",
            ),
            stale: registrar.add(
                "oncely_cache_stale_hits",
                "Hits past their time to live, while being reloaded",
            ),
            age: registrar.add_seconds(
                "oncely_cache_age",
                "Age of the values returned by cache hits",
                Family::new_with_constructor(Ages),
            ),
            invalidations: registrar.add(
                "oncely_cache_invalidations",
                "Tags invalidated on this host",
            ),
            invalidation_delay: registrar.add_seconds(
                "oncely_cache_invalidation_delay",
                "Time from a commit to the application of its invalidations on this host",
                Family::new_with_constructor(Buckets),
            ),
            shared_failures: registrar.add(
                "oncely_cache_shared_failures",
                "Operations of the shared cache that failed or timed out",
            ),
            is_shared_up: registrar.add(
                "oncely_cache_shared_up",
                "Whether a shared cache is configured and in use",
            ),
            entries: registrar.add("oncely_cache_entries", "Values in this process"),
            size: registrar.add_with_unit(
                "oncely_cache_size",
                "Size of the values in this process",
                Some(Unit::Bytes),
                Gauge::default(),
            ),
        }
    }

    /// Counts a hit in this layer, with the age of its value.
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

    /// Counts a hit past its time to live.
    pub fn stale(&self, worker: &str) {
        self.stale.get_or_create(&worker_labels(worker)).inc();
    }

    /// Counts a read that found no value.
    pub fn miss(&self, worker: &str) {
        self.misses.get_or_create(&worker_labels(worker)).inc();
    }

    /// Counts the load of a missing or stale value.
    pub fn load(&self, worker: &str) {
        self.loads.get_or_create(&worker_labels(worker)).inc();
    }

    /// Counts a read that waited for the load of another caller.
    pub fn wait(&self, worker: &str) {
        self.waits.get_or_create(&worker_labels(worker)).inc();
    }

    /// Counts tags that were invalidated on this host.
    pub fn invalidated(&self, worker: &str, tags: usize) {
        self.invalidations
            .get_or_create(&worker_labels(worker))
            .inc_by(tags as u64);
    }

    /// Records that an invalidation of another host was applied, `delay` after its commit.
    pub fn invalidation_applied(&self, worker: &str, delay: Duration) {
        self.invalidation_delay
            .get_or_create(&worker_labels(worker))
            .observe(delay.as_secs_f64());
    }

    /// Counts an operation of the shared cache that failed or timed out.
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
