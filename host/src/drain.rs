//! Shutdown: every loop holds a [`Stopping`] and ends cleanly when its [`Stop`] is triggered.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Stops all loops that hold one of its [`Stopping`]s.
#[derive(Debug)]
pub struct Stop(watch::Sender<bool>);

/// The stop signal, to check or to wait for. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stopping(watch::Receiver<bool>);

impl Stop {
    /// Creates the signal, not yet set.
    pub fn new() -> Self {
        Stop(watch::Sender::new(false))
    }

    /// A handle for a loop to check or to wait for the signal.
    pub fn stopping(&self) -> Stopping {
        Stopping(self.0.subscribe())
    }

    /// Signals all loops to stop. Idempotent.
    pub fn now(&self) {
        self.0.send_replace(true);
    }
}

impl Default for Stop {
    fn default() -> Self {
        Stop::new()
    }
}

impl Stopping {
    /// Whether the signal is set. Does not wait.
    pub fn is_stopping(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once stopping, or once the [`Stop`] was dropped.
    pub async fn stopped(&mut self) {
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }

    /// Waits for `time`, or until stopping; true if stopping.
    pub async fn wait(&self, time: Duration) -> bool {
        let mut stopping = self.clone();
        tokio::time::timeout(time, stopping.stopped()).await.is_ok()
    }
}

/// Tasks that end together: one signal stops them, and they are awaited in the order of their
/// spawning.
#[derive(Debug, Default)]
pub struct TaskGroup {
    stop: Stop,
    tasks: Vec<JoinHandle<()>>,
}

impl TaskGroup {
    /// The stop signal of the group, for its tasks.
    pub fn stopping(&self) -> Stopping {
        self.stop.stopping()
    }

    /// Spawns a task that ends when its `stopping` is signalled: that of this group, or of one that
    /// ends earlier.
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }

    /// Signals the tasks to stop, without waiting for them.
    pub fn stop(&self) {
        self.stop.now();
    }

    /// Stops the tasks and waits for them. A panic counts as the end of a task.
    pub async fn drain(self) {
        self.stop();
        for task in self.tasks {
            let _ = task.await;
        }
    }
}
