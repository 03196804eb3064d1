//! The history of this host's workers, for the charts of the console.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Host, WorkerState};
use crate::drain::Stopping;
use crate::store::HistoryCounts;

/// How often the counts are written. A chart is that late.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counters of a worker when they were last written.
#[derive(Debug, Clone, Default)]
struct Counters {
    done: u64,
    retries: u64,
    dead: u64,
    /// Calls by their time.
    calls: Vec<u64>,
}

type Written = BTreeMap<String, Counters>;

/// Writes the counts until the host stops.
pub(super) async fn watch(host: Arc<Host>, mut stopping: Stopping) {
    let mut written = Written::new();
    loop {
        tokio::select! {
            biased;
            () = stopping.stopped() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let states = host.workers_with_backlog().await;
        let metrics = &host.services.metrics;
        let now: Vec<(Counters, u64)> = states
            .iter()
            .map(|state| {
                let calls = metrics.call_times(&state.worker);
                let lag_ms = state.oldest_pending_ms.unwrap_or_default();
                (Counters::of(state, calls), lag_ms)
            })
            .collect();
        let now: BTreeMap<String, (Counters, u64)> = states
            .into_iter()
            .map(|state| state.worker)
            .zip(now)
            .collect();
        let counts = counts_since(&written, &now);
        if counts.is_empty() {
            continue;
        }
        match host.services.store.add_history(&counts).await {
            Ok(()) => {
                let counters = now.into_iter();
                written = counters
                    .map(|(worker, (counters, _))| (worker, counters))
                    .collect();
            }
            // The counts are written later. Health checks report the database.
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::debug!(error, "history of workers not written, retrying");
            }
        }
    }
}

impl Counters {
    fn of(state: &WorkerState, calls: Vec<u64>) -> Self {
        Counters {
            done: state.done,
            retries: state.retries,
            dead: state.dead,
            calls,
        }
    }
}

/// The counts of each worker since they were written, with its lag. Counters that fell belong to a
/// worker that started again.
fn counts_since(written: &Written, now: &BTreeMap<String, (Counters, u64)>) -> Vec<HistoryCounts> {
    let none = Counters::default();
    let counts = |(worker, (now, lag_ms)): (&String, &(Counters, u64))| {
        let before = written.get(worker).unwrap_or(&none);
        let is_new =
            now.done < before.done || now.retries < before.retries || now.dead < before.dead;
        // Calls are counted by the host, for all starts of the worker.
        let calls = now.calls.iter().enumerate().map(|(bucket, count)| {
            count.saturating_sub(before.calls.get(bucket).copied().unwrap_or_default())
        });
        let calls: Vec<u64> = calls.collect();
        let before = if is_new { &none } else { before };
        HistoryCounts {
            worker: worker.clone(),
            done: now.done - before.done,
            retries: now.retries - before.retries,
            dead: now.dead - before.dead,
            lag_ms: *lag_ms,
            calls,
        }
    };
    now.iter().map(counts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_since_the_last_write() {
        let counters = |done, calls: &[u64]| Counters {
            done,
            retries: 2,
            dead: 0,
            calls: calls.to_vec(),
        };
        let written = Written::from([("a".to_owned(), counters(3, &[1, 4]))]);
        let since = |done, calls: &[u64]| {
            let now = BTreeMap::from([("a".to_owned(), (counters(done, calls), 7))]);
            counts_since(&written, &now).remove(0)
        };
        let counts = since(5, &[1, 5, 1]);
        assert_eq!((counts.done, counts.retries, counts.lag_ms), (2, 0, 7));
        assert_eq!(counts.calls, [0, 1, 1]);
        let again = since(1, &[1, 4]);
        assert_eq!(
            (again.done, again.retries),
            (1, 2),
            "the worker started again"
        );
        assert_eq!(again.calls, [0, 0]);
    }
}
