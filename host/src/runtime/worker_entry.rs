//! The slot of one worker in a host: lanes for messages, or routes for requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{RunState, WorkerState};
use crate::bus::{ConsumerState, UnhandledMessages};
use crate::config::manifest::Worker;
use crate::consumer::RunningWorker;
use crate::ingress::HttpWorker;
use crate::model::units;

/// The slot of one worker in a host.
#[derive(Default)]
pub(super) struct Slot {
    pub running: Option<WorkerRuntime>,
    /// The active version if it cannot run here, with the reason.
    pub broken: Option<(u32, String)>,
    /// The last known state of its consumer.
    pub consumer_state: ConsumerState,
}

/// The running part of a worker.
pub(super) enum WorkerRuntime {
    Messages(Box<RunningWorker>),
    Requests(Arc<HttpWorker>),
}

impl WorkerRuntime {
    pub(super) fn worker(&self) -> &Worker {
        match self {
            WorkerRuntime::Messages(running) => &running.worker,
            WorkerRuntime::Requests(worker) => &worker.delivery.worker,
        }
    }

    pub(super) fn version(&self) -> u32 {
        match self {
            WorkerRuntime::Messages(running) => running.version,
            WorkerRuntime::Requests(worker) => worker.delivery.version,
        }
    }

    fn digest(&self) -> &str {
        match self {
            WorkerRuntime::Messages(running) => &running.digest,
            WorkerRuntime::Requests(worker) => &worker.digest,
        }
    }

    /// Whether it is ready for work.
    fn is_subscribed(&self) -> bool {
        match self {
            WorkerRuntime::Messages(running) => running.is_subscribed(),
            WorkerRuntime::Requests(_) => true,
        }
    }

    /// The unhandled messages on its stream; none when unknown, or without a stream.
    pub(super) async fn unhandled(&self) -> Option<UnhandledMessages> {
        match self {
            WorkerRuntime::Messages(running) => running.unhandled().await,
            WorkerRuntime::Requests(_) => None,
        }
    }

    /// Messages or requests in flight on this host.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            WorkerRuntime::Messages(running) => running.in_flight(),
            WorkerRuntime::Requests(worker) => worker.in_flight(),
        }
    }

    /// Drains the work in flight.
    pub(super) async fn drain(self) {
        match self {
            WorkerRuntime::Messages(running) => running.drain().await,
            WorkerRuntime::Requests(worker) => worker.drain().await,
        }
    }

    pub(super) fn requests(&self) -> Option<Arc<HttpWorker>> {
        match self {
            WorkerRuntime::Requests(worker) => Some(Arc::clone(worker)),
            WorkerRuntime::Messages(_) => None,
        }
    }
}

impl Slot {
    /// The reason that it does not work here.
    fn error(&self) -> Option<String> {
        if let Some((version, error)) = &self.broken {
            return Some(format!("version {version}: {error}"));
        }
        self.running.as_ref()?;
        match &self.consumer_state {
            ConsumerState::Active => None,
            ConsumerState::Missing(why) => Some(why.clone()),
            ConsumerState::Paused(None) => Some("its consumer is paused".to_owned()),
            ConsumerState::Paused(Some(left)) => {
                let left = units::format_duration(Duration::from_secs(left.as_secs()));
                Some(format!("its consumer is paused for another {left}"))
            }
        }
    }

    pub(super) fn state(&self, name: &str, is_held: bool) -> WorkerState {
        let running = self.running.as_ref();
        let state = match (running, &self.broken, &self.consumer_state) {
            (_, Some(_), _) | (Some(_), None, ConsumerState::Missing(_)) => RunState::Broken,
            (Some(_), None, ConsumerState::Paused(_)) => RunState::Paused,
            (Some(running), None, ConsumerState::Active) if running.is_subscribed() => {
                RunState::Running
            }
            (None, None, _) if is_held => RunState::Held,
            _ => RunState::Starting,
        };
        let counters = running.and_then(|running| match running {
            WorkerRuntime::Messages(running) => Some(&running.counters),
            WorkerRuntime::Requests(_) => None,
        });
        let count = |counter: Option<&AtomicU64>| {
            counter.map_or(0, |counter| counter.load(Ordering::Relaxed))
        };
        WorkerState {
            worker: name.to_owned(),
            version: running.map(WorkerRuntime::version),
            digest: running.map(|running| running.digest().to_owned()),
            stream: running.and_then(|running| running.worker().stream.clone()),
            subjects: running
                .map(|running| running.worker().subjects.clone())
                .unwrap_or_default(),
            routes: running
                .map(|running| routes(running.worker()))
                .unwrap_or_default(),
            state,
            pending: None,
            oldest_pending_ms: None,
            error: self.error(),
            broken_version: self.broken.as_ref().map(|(version, _)| *version),
            done: count(counters.map(|counters| &counters.done)),
            duplicates: count(counters.map(|counters| &counters.duplicates)),
            retries: count(counters.map(|counters| &counters.retries)),
            dead: count(counters.map(|counters| &counters.dead)),
        }
    }
}

/// The routes of a worker, such as `POST /accounts/{id}/transfers`.
fn routes(worker: &Worker) -> Vec<String> {
    let shown = |route: &crate::config::manifest::Route| match route.methods.as_slice() {
        [] => route.path.clone(),
        methods => format!("{} {}", methods.join(","), route.path),
    };
    worker.routes.iter().map(shown).collect()
}
