//! The signals that stop a host.

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens for SIGTERM and SIGINT, from before the start of a host on.
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

    /// Waits for the first signal and returns its name.
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
