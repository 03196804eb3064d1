//! The signals that ask a host to stop.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens to SIGTERM and SIGINT, from before the start of a host on.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    received: Option<&'static str>,
}

impl Signals {
    pub fn listen() -> Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            received: None,
        })
    }

    /// Returns the name of the first signal, once there was one.
    pub async fn received(&mut self) -> &'static str {
        if let Some(name) = self.received {
            return name;
        }
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        };
        self.received = Some(name);
        name
    }
}
