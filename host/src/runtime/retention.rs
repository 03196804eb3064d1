//! How long rows are kept, and whether that is long enough.
//!
//! An inbox record must outlast the redelivery of its message: it stays as long as the stream keeps
//! the message. The inbox record of a dead letter stays as long as the dead letter can be redriven,
//! regardless of these settings.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::Host;
use crate::config::manifest::Worker;
use crate::config::{HostConfig, KeepInbox};
use crate::drain::Stopping;
use crate::fault;
use crate::ingress::PUBLISH_WINDOW;
use crate::model::hint::WithHint;
use crate::model::units;
use crate::store::{RetentionPolicy, StoreError};

/// How much longer than the stream an inbox record is kept: a margin for retrying publishers and
/// for clocks.
const INBOX_MARGIN: Duration = Duration::from_secs(24 * 60 * 60);

/// Maximum number of rows that are deleted at a time, where they are deleted row by row.
const BATCH_SIZE: u32 = 10_000;

/// How long the deletion waits for concurrent transactions: at first, and at most after failures.
const WAIT_TIMEOUT: Duration = Duration::from_secs(2);
const WAIT_TIMEOUT_MAX: Duration = Duration::from_secs(20);

/// After how many failures in a row a warning is logged.
const WARN_AFTER_FAILURES: u32 = 10;

/// How long rows are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Published outputs.
    pub outputs: Duration,
    pub inbox: KeepInbox,
    /// The folder to which expired rows are archived.
    pub archive: Option<PathBuf>,
}

impl Retention {
    /// The retention that a configuration requests.
    pub fn of(config: &HostConfig) -> Self {
        Retention {
            outputs: config.keep_outputs,
            inbox: config.keep_inbox,
            archive: config.archive.clone(),
        }
    }

    /// Checks that inbox records outlast the stream, and that the stream outlasts the retries.
    ///
    /// `max_age` is how long the stream keeps messages; none means forever.
    ///
    /// # Errors
    /// One of the two is too short.
    pub fn check(&self, worker: &Worker, max_age: Option<Duration>) -> Result<()> {
        let (name, stream) = (&worker.name, worker.stream.as_deref().unwrap_or_default());
        let tried_for = worker.retry.max_duration();
        if let Some(max_age) = max_age.filter(|age| *age < tried_for) {
            let (age, tried_for) = (
                units::format_duration(max_age),
                units::format_duration(tried_for),
            );
            return Err(anyhow!(
                "the stream {stream} keeps messages for {age}, but worker {name} retries them \
                 for up to {tried_for}: they may expire before they become dead letters"
            ))
            .hint(format!(
                "nats stream edit {stream} --max-age {tried_for}, \
                 or lower `attempts` or `backoff_max` in [worker.retry]"
            ));
        }
        let KeepInbox::For(kept) = self.inbox else {
            return Ok(());
        };
        if max_age.is_some_and(|age| age <= kept) {
            return Ok(());
        }
        let age = max_age.map_or_else(
            || "forever".to_owned(),
            |age| format!("for {}", units::format_duration(age)),
        );
        let kept = units::format_duration(kept);
        Err(anyhow!(
            "the stream {stream} keeps messages {age}, but inbox records are kept for {kept} only: \
             worker {name} could handle a message twice"
        ))
        .hint(format!(
            "set keep_inbox = \"auto\", or run: nats stream edit {stream} --max-age {kept}"
        ))
    }

    /// How long inbox records are kept for streams with these max ages; none means forever.
    ///
    /// It is at least the configured time, and longer where a stream keeps messages longer.
    pub fn inbox(&self, ages: &[Option<Duration>]) -> Option<Duration> {
        let longest = ages
            .iter()
            .copied()
            .try_fold(Duration::ZERO, |longest, age| Some(longest.max(age?)))?;
        Some(match self.inbox {
            KeepInbox::Auto => longest + INBOX_MARGIN,
            KeepInbox::For(kept) => kept.max(longest),
        })
    }
}

impl Host {
    /// Checks that the inbox outlasts the stream of a worker; see [`Retention::check`].
    pub async fn check_retention(&self, worker: &Worker) -> Result<()> {
        let Some(stream) = &worker.stream else {
            return Ok(());
        };
        match self.services.bus.stream(stream).await? {
            Some(stream) => self.retention.check(worker, stream.max_age),
            None => Ok(()),
        }
    }

    /// How long inbox records are kept now; none means forever.
    pub async fn inbox_retention(&self) -> Result<Option<Duration>> {
        let mut ages = Vec::new();
        // Retired workers count: deployed again, they receive the messages still on their streams.
        for deployment in self.services.store.newest_deployments().await? {
            let worker: Worker = serde_json::from_str(&deployment.manifest)
                .context("read the deployment's manifest")?;
            let Some(stream) = &worker.stream else {
                continue;
            };
            // A missing stream counts as one that keeps messages forever: its settings are unknown.
            ages.push(
                self.services
                    .bus
                    .stream(stream)
                    .await?
                    .and_then(|stream| stream.max_age),
            );
        }
        Ok(self.retention.inbox(&ages))
    }
}

impl Host {
    /// The longest time that a response to a request is kept.
    async fn longest_window(&self) -> Duration {
        let workers = self.services.deployed_workers().await.unwrap_or_default();
        let windows = workers
            .iter()
            .flat_map(|worker| worker.routes.iter().map(|route| route.window));
        windows.max().unwrap_or_default().max(PUBLISH_WINDOW)
    }
}

/// Deletes expired rows.
#[derive(Debug, Default)]
pub(super) struct Pruner {
    failures: u32,
}

impl Pruner {
    /// Deletes until no expired rows are left.
    pub(super) async fn run(&mut self, host: &Host, stopping: &Stopping) {
        match self.prune(host, stopping).await {
            Ok(()) => self.failures = 0,
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                // A single failure is normal: other hosts delete as well, and the next try is a
                // minute away.
                match self.failures {
                    WARN_AFTER_FAILURES => tracing::warn!(
                        failures = self.failures,
                        error = format!("{error:#}"),
                        "failed repeatedly to delete expired rows, retrying"
                    ),
                    _ => tracing::debug!(
                        error = format!("{error:#}"),
                        "failed to delete expired rows, retrying"
                    ),
                }
            }
        }
    }

    async fn prune(&self, host: &Host, stopping: &Stopping) -> Result<()> {
        // Outputs are deleted even if the settings of the streams cannot be read.
        let inbox = host.inbox_retention().await.unwrap_or_else(|error| {
            tracing::debug!(
                error = format!("{error:#}"),
                "failed to read stream settings, keeping inbox records"
            );
            None
        });
        let policy = RetentionPolicy {
            outputs: host.retention.outputs,
            inbox,
            requests: host.longest_window().await,
            limit: BATCH_SIZE,
            lock_timeout: WAIT_TIMEOUT
                .saturating_mul(1 << self.failures.min(8))
                .min(WAIT_TIMEOUT_MAX),
            archive: host.retention.archive.clone(),
        };
        while !stopping.is_stopping() {
            let deleted = host.services.store.delete_expired(&policy).await;
            fault::point(fault::AFTER_PRUNE);
            match deleted {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error @ StoreError::Conflict(_)) => {
                    return Err(
                        anyhow::Error::from(error).context("wait for concurrent transactions")
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn retention(inbox: KeepInbox) -> Retention {
        Retention {
            outputs: HOUR,
            inbox,
            archive: None,
        }
    }

    #[test]
    fn inbox_records_outlast_the_longest_kept_stream() {
        let auto = retention(KeepInbox::Auto);
        assert_eq!(
            auto.inbox(&[Some(HOUR), Some(3 * HOUR)]),
            Some(3 * HOUR + INBOX_MARGIN)
        );
        assert_eq!(auto.inbox(&[Some(HOUR), None]), None);
        assert_eq!(auto.inbox(&[]), Some(INBOX_MARGIN));
        assert_eq!(
            retention(KeepInbox::For(2 * HOUR)).inbox(&[Some(HOUR)]),
            Some(2 * HOUR)
        );
        assert_eq!(
            retention(KeepInbox::For(2 * HOUR)).inbox(&[Some(3 * HOUR)]),
            Some(3 * HOUR)
        );
    }

    #[test]
    fn a_worker_whose_stream_outlasts_the_inbox_is_refused() {
        let mut worker: Worker = serde_json::from_value(serde_json::json!({
            "name": "payments", "stream": "PAYMENTS", "concurrency": 1, "batch": 1, "ack_wait": "30s"
        }))
        .unwrap();
        assert!(retention(KeepInbox::Auto).check(&worker, None).is_ok());
        assert!(
            retention(KeepInbox::For(HOUR))
                .check(&worker, Some(HOUR))
                .is_ok()
        );
        let refused = retention(KeepInbox::For(HOUR))
            .check(&worker, Some(2 * HOUR))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("for 2h") && refused.contains("for 1h"),
            "{refused}"
        );
        assert!(
            retention(KeepInbox::For(HOUR))
                .check(&worker, None)
                .unwrap_err()
                .to_string()
                .contains("forever")
        );
        worker.retry.attempts = 50;
        let gone = retention(KeepInbox::Auto)
            .check(&worker, Some(HOUR))
            .unwrap_err()
            .to_string();
        assert!(
            gone.contains("expire before they become dead letters"),
            "{gone}"
        );
    }
}
