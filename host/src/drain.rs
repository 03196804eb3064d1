//! Stopping: every loop is given a [`Stopping`] and ends in good order when it is told to.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Tells the loops that hold its [`Stopping`]s to stop.
#[derive(Debug)]
pub struct Stop(watch::Sender<bool>);

/// Whether to stop, and a way to wait for it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stopping(watch::Receiver<bool>);

impl Stop {
    pub fn new() -> Self {
        Stop(watch::Sender::new(false))
    }

    pub fn stopping(&self) -> Stopping {
        Stopping(self.0.subscribe())
    }

    /// Tells all to stop; telling twice is telling once.
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
    pub fn is_stopping(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it is time to stop, also when whoever could say so is gone.
    pub async fn stopped(&mut self) {
        let _ = self.0.wait_for(|stopping| *stopping).await;
    }

    /// Waits for `time`, but no longer than until it is time to stop; true if it is.
    pub async fn wait(&self, time: Duration) -> bool {
        let mut stopping = self.clone();
        tokio::time::timeout(time, stopping.stopped()).await.is_ok()
    }
}

/// Tasks that end together: one signal stops them, and each is awaited in the order it was spawned.
#[derive(Debug, Default)]
pub struct TaskGroup {
    stop: Stop,
    tasks: Vec<JoinHandle<()>>,
}

impl TaskGroup {
    pub fn stopping(&self) -> Stopping {
        self.stop.stopping()
    }

    /// Spawns a task that ends when `stopping` says so: of this group, or of one that ends earlier.
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }

    /// Signals the tasks to stop, without waiting for them.
    pub fn stop(&self) {
        self.stop.now();
    }

    /// Stops the tasks and waits until they have ended. One that panicked has ended, too.
    pub async fn drain(self) {
        self.stop();
        for task in self.tasks {
            let _ = task.await;
        }
    }
}
