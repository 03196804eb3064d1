//! `oncely run`: a host for production, on your database and NATS.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::client::make_data_dir;
use super::lock::Lock;
use super::serve::{HostProcess, StopReason, init_logging, listen, listen_for_http};
use super::signals::Signals;
use crate::config::{HostConfig, HostFlags};

/// How long the subscriptions of the workers may take. The host keeps trying after that.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Run a host on your database and NATS.
///
/// The host runs all deployed workers, including those that are deployed while it runs.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    flags: HostFlags,
}

impl Run {
    pub async fn run(self) -> Result<()> {
        let mut config = HostConfig::load(&self.flags)?;
        init_logging(&config, None)?;
        config.data_dir = make_data_dir(&config.data_dir)?;
        let _folder = Lock::folder(&config.data_dir).await?;
        let _database = Lock::database(&config.database).await?;
        let mut signals = Signals::listen()?;
        while serve(&config, &mut signals).await? == StopReason::NatsClientEnded {}
        Ok(())
    }
}

async fn serve(config: &HostConfig, signals: &mut Signals) -> Result<StopReason> {
    let listener = listen(config).await?;
    let requests = listen_for_http(config).await?;
    let host_process = tokio::select! {
        biased;
        signal = signals.received() => {
            tracing::info!(signal, "start cancelled");
            return Ok(StopReason::Signal);
        }
        host_process = HostProcess::start(config, listener, requests) => host_process?,
    };
    tracing::info!(
        control_api = format!("http://{}", host_process.address),
        ingress = host_process.http.map(|address| format!("http://{address}")),
        nats = config.nats.redacted(),
        database = config.database.redacted(),
        "host started"
    );
    tokio::select! {
        biased;
        _ = signals.received() => {}
        ready = host_process.ready(READY_TIMEOUT) => match ready {
            // The reason was logged before.
            Ok(()) if host_process.host.hold().is_some() => {
                tracing::error!("not ready, workers and relay are held");
            }
            Ok(()) => tracing::info!("ready"),
            Err(error) => tracing::error!(error = format!("{error:#}"), "not ready"),
        },
    }
    host_process.run_until_stopped(signals).await
}
