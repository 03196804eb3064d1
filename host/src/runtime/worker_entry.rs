//! The slot of one worker in a host: lanes for messages, or routes for requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{RunState, WorkerState};
use crate::bus::{ConsumerState, Probe};
use crate::config::manifest::Worker;
use crate::consumer::{LaneReport, PausedWorker, RunningWorker, WorkerCounters};
use crate::ingress::HttpWorker;
use crate::model::units;
use crate::store::Pause;

/// The slot of one worker in a host.
#[derive(Default)]
pub(super) struct Slot {
    pub running: Option<WorkerRuntime>,
    /// The active version if it cannot run here, with the reason.
    pub broken: Option<(u32, String)>,
    /// The last known state of its consumer.
    pub consumer_state: ConsumerState,
    /// The pause that is applied here.
    pub pause: Option<Pause>,
    /// Earlier versions of a worker for requests, while requests hold them.
    pub earlier: Vec<Arc<HttpWorker>>,
}

/// The running part of a worker.
pub(super) enum WorkerRuntime {
    Messages(Box<RunningWorker>),
    /// A worker for messages that pulls none. A paused worker for requests refuses them itself.
    Paused(Box<PausedWorker>),
    Requests(Arc<HttpWorker>),
}

impl WorkerRuntime {
    pub(super) fn worker(&self) -> &Worker {
        match self {
            WorkerRuntime::Messages(running) => &running.worker,
            WorkerRuntime::Paused(paused) => &paused.delivery.worker,
            WorkerRuntime::Requests(worker) => &worker.delivery.worker,
        }
    }

    pub(super) fn version(&self) -> u32 {
        match self {
            WorkerRuntime::Messages(running) => running.version,
            WorkerRuntime::Paused(paused) => paused.delivery.version,
            WorkerRuntime::Requests(worker) => worker.delivery.version,
        }
    }

    fn digest(&self) -> &str {
        match self {
            WorkerRuntime::Messages(running) => &running.digest,
            WorkerRuntime::Paused(paused) => &paused.digest,
            WorkerRuntime::Requests(worker) => &worker.digest,
        }
    }

    /// Whether it is ready for work.
    fn is_subscribed(&self) -> bool {
        match self {
            WorkerRuntime::Messages(running) => running.is_subscribed(),
            WorkerRuntime::Paused(_) => false,
            WorkerRuntime::Requests(_) => true,
        }
    }

    /// A probe of its consumer; none without a stream.
    pub(super) fn probe(&self) -> Option<Probe> {
        match self {
            WorkerRuntime::Messages(running) => Some(running.probe()),
            WorkerRuntime::Paused(paused) => Some(paused.probe()),
            WorkerRuntime::Requests(_) => None,
        }
    }

    /// Messages or requests in flight on this host.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            WorkerRuntime::Messages(running) => running.in_flight(),
            WorkerRuntime::Paused(paused) => paused.in_flight(),
            WorkerRuntime::Requests(worker) => worker.in_flight(),
        }
    }

    /// The lanes of a worker that pulls messages.
    fn lanes(&self) -> Option<LaneReport> {
        match self {
            WorkerRuntime::Messages(running) => Some(running.lanes()),
            WorkerRuntime::Paused(_) | WorkerRuntime::Requests(_) => None,
        }
    }

    /// Whether a paused worker has nothing in flight here.
    fn is_drained(&self) -> bool {
        match self {
            WorkerRuntime::Messages(_) => false,
            WorkerRuntime::Paused(paused) => paused.is_drained(),
            WorkerRuntime::Requests(worker) => worker.is_paused() && worker.in_flight() == 0,
        }
    }

    /// Drains the work in flight.
    pub(super) async fn drain(self) {
        match self {
            WorkerRuntime::Messages(running) => running.drain().await,
            WorkerRuntime::Paused(paused) => paused.drain().await,
            WorkerRuntime::Requests(worker) => worker.drain().await,
        }
    }

    pub(super) fn requests(&self) -> Option<Arc<HttpWorker>> {
        match self {
            WorkerRuntime::Requests(worker) => Some(Arc::clone(worker)),
            WorkerRuntime::Messages(_) | WorkerRuntime::Paused(_) => None,
        }
    }

    fn counters(&self) -> Option<&WorkerCounters> {
        match self {
            WorkerRuntime::Messages(running) => Some(&running.counters),
            WorkerRuntime::Paused(paused) => Some(&paused.counters),
            WorkerRuntime::Requests(_) => None,
        }
    }
}

impl Slot {
    /// Messages or requests in flight on this host, those of earlier versions included.
    fn in_flight(&self) -> usize {
        let running = self.running.as_ref().map_or(0, WorkerRuntime::in_flight);
        let earlier: usize = self.earlier.iter().map(|worker| worker.in_flight()).sum();
        running + earlier
    }

    /// Whether it is paused with nothing in flight here.
    fn is_drained(&self) -> bool {
        let mut running = self.running.iter();
        self.pause.is_some()
            && running.all(WorkerRuntime::is_drained)
            && self.earlier.iter().all(|worker| worker.in_flight() == 0)
    }

    /// The reason that it does not work here.
    fn error(&self) -> Option<String> {
        if let Some((version, error)) = &self.broken {
            return Some(format!("version {version}: {error}"));
        }
        if let Some(pause) = &self.pause {
            return Some(pause.to_string());
        }
        if let WorkerRuntime::Paused(_) = self.running.as_ref()? {
            return Some("resuming, once its messages in flight are settled".to_owned());
        }
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
            (_, Some(_), _) => RunState::Broken,
            (Some(WorkerRuntime::Paused(_)), None, _) => RunState::Paused,
            (Some(_), None, _) if self.pause.is_some() => RunState::Paused,
            (Some(_), None, ConsumerState::Missing(_)) => RunState::Broken,
            (Some(_), None, ConsumerState::Paused(_)) => RunState::Paused,
            (Some(running), None, ConsumerState::Active) if running.is_subscribed() => {
                RunState::Running
            }
            (None, None, _) if is_held => RunState::Held,
            _ => RunState::Starting,
        };
        let counters = running.and_then(WorkerRuntime::counters);
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
            pause: self.pause.clone(),
            in_flight: self.in_flight(),
            lanes: running.and_then(WorkerRuntime::lanes),
            is_drained: self.is_drained(),
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
