//! The history of this host's workers, for the charts of the console.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Host, WorkerState};
use crate::drain::Stopping;
use crate::store::HistoryCounts;

/// How often the counts are written. A chart is that late.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counters of a worker when they were last written: handled events, retries, dead letters.
type Written = BTreeMap<String, (u64, u64, u64)>;

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
        let counts = counts_since(&written, &states);
        if counts.is_empty() {
            continue;
        }
        match host.services.store.add_history(&counts).await {
            Ok(()) => written = states.iter().map(counters).collect(),
            // The counts are written later. Health checks report the database.
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::from(error));
                tracing::debug!(error, "history of workers not written, retrying");
            }
        }
    }
}

fn counters(state: &WorkerState) -> (String, (u64, u64, u64)) {
    (
        state.worker.clone(),
        (state.done, state.retries, state.dead),
    )
}

/// The counts of each worker since they were written. Counters that fell belong to a worker that
/// started again.
fn counts_since(written: &Written, states: &[WorkerState]) -> Vec<HistoryCounts> {
    let counts = |state: &WorkerState| {
        let (worker, now) = counters(state);
        let before = written.get(&worker).copied().unwrap_or_default();
        let is_new = now.0 < before.0 || now.1 < before.1 || now.2 < before.2;
        let before = if is_new { (0, 0, 0) } else { before };
        HistoryCounts {
            worker,
            done: now.0 - before.0,
            retries: now.1 - before.1,
            dead: now.2 - before.2,
            lag_ms: state.oldest_pending_ms.unwrap_or_default(),
        }
    };
    states.iter().map(counts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::RunState;

    #[test]
    fn counts_are_those_since_the_last_write() {
        let state = |done| WorkerState {
            worker: "a".to_owned(),
            version: None,
            digest: None,
            stream: None,
            subjects: Vec::new(),
            routes: Vec::new(),
            state: RunState::Running,
            error: None,
            pause: None,
            in_flight: 0,
            is_drained: false,
            broken_version: None,
            pending: None,
            oldest_pending_ms: Some(7),
            done,
            duplicates: 0,
            retries: 2,
            dead: 0,
        };
        let written = Written::from([("a".to_owned(), (3, 2, 0))]);
        let since = |done| {
            let counts = counts_since(&written, &[state(done)]);
            (counts[0].done, counts[0].retries, counts[0].lag_ms)
        };
        assert_eq!(since(5), (2, 0, 7));
        assert_eq!(since(1), (1, 2, 7), "the worker started again");
    }
}
