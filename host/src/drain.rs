//! Stopping: every loop is given a [`Stopping`] and ends in good order when it is told to.

use std::time::Duration;

use tokio::sync::watch;

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
