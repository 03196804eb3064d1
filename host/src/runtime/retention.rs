//! How long rows are kept, and whether that is long enough.
//!
//! An inbox record must stay for as long as its message may come again: for as long as the stream keeps it. A dead letter's
//! record stays for as long as the letter may be put back, whatever is said here.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::Host;
use crate::config::KeepInbox;
use crate::config::manifest::Worker;
use crate::drain::Stopping;
use crate::fault;
use crate::ingress::PUBLISH_WINDOW;
use crate::model::hint::WithHint;
use crate::model::units;
use crate::store::{RetentionPolicy, StoreError};

/// How much longer than the stream keeps a message its record stays: for publishers that retry, and for clocks.
const INBOX_MARGIN: Duration = Duration::from_secs(24 * 60 * 60);

/// How many rows leave at a time, where they do so one by one.
const BATCH_SIZE: u32 = 10_000;

/// How long removing waits for transactions under way at first, and at most when they are long.
const WAIT_TIMEOUT: Duration = Duration::from_secs(2);
const WAIT_TIMEOUT_MAX: Duration = Duration::from_secs(20);

/// After how many failures in a row somebody is told.
const WARN_AFTER_FAILURES: u32 = 10;

/// For how long rows are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Published outputs.
    pub outputs: Duration,
    pub inbox: KeepInbox,
    /// The folder where rows are kept that leave.
    pub archive: Option<PathBuf>,
}

impl Retention {
    /// Whether what a worker handled stays known for as long as its stream may bring it again, and messages stay on the
    /// stream for as long as they are tried. `max_age` is for how long the stream keeps them, none for ever.
    pub fn check(&self, worker: &Worker, max_age: Option<Duration>) -> Result<()> {
        let (name, stream) = (&worker.name, worker.stream.as_deref().unwrap_or_default());
        let tried_for = worker.retry.max_duration();
        if let Some(max_age) = max_age.filter(|age| *age < tried_for) {
            let (age, tried_for) = (
                units::format_duration(max_age),
                units::format_duration(tried_for),
            );
            return Err(anyhow!(
                "the stream {stream} keeps messages for {age}, and worker {name} tries them for up to {tried_for}: they may \
                 be gone before they are dead letters"
            ))
            .hint("nats stream edit --max-age, or fewer attempts or a lower backoff_max in [worker.retry]".to_owned());
        }
        let KeepInbox::For(kept) = self.inbox else {
            return Ok(());
        };
        if max_age.is_some_and(|age| age <= kept) {
            return Ok(());
        }
        let age = max_age.map_or("ever".to_owned(), units::format_duration);
        let kept = units::format_duration(kept);
        Err(anyhow!(
            "the stream {stream} keeps messages for {age}, and inbox records are kept for {kept}: worker {name} could handle \
             a message again that it has forgotten"
        ))
        .hint(format!("keep_inbox = \"auto\", or: nats stream edit {stream} --max-age {kept}"))
    }

    /// For how long inbox records are kept when workers read streams that keep messages for so long: at least for as long
    /// as was asked for, and longer where a stream takes longer; none for ever.
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
    /// Refuses a worker whose stream outlasts the inbox; see [`Retention::check`].
    pub async fn check_retention(&self, worker: &Worker) -> Result<()> {
        let Some(stream) = &worker.stream else {
            return Ok(());
        };
        match self.services.bus.stream(stream).await? {
            Some(stream) => self.retention.check(worker, stream.max_age),
            None => Ok(()),
        }
    }

    /// For how long inbox records are kept now; none for ever.
    async fn inbox_retention(&self) -> Result<Option<Duration>> {
        let mut ages = Vec::new();
        // Also of retired ones: deployed again, they meet what their streams still have.
        for deployment in self.services.store.newest_deployments().await? {
            let worker: Worker = serde_json::from_str(&deployment.manifest)
                .context("read the deployment's manifest")?;
            let Some(stream) = &worker.stream else {
                continue;
            };
            // Nobody knows how long a stream that is gone for now will keep messages.
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
    /// The longest time for which an answer to a request is kept.
    async fn longest_window(&self) -> Duration {
        let workers = self.services.deployed_workers().await.unwrap_or_default();
        let windows = workers
            .iter()
            .flat_map(|worker| worker.routes.iter().map(|route| route.window));
        windows.max().unwrap_or_default().max(PUBLISH_WINDOW)
    }
}

/// Removes what had its time.
#[derive(Debug, Default)]
pub(super) struct Pruner {
    failures: u32,
}

impl Pruner {
    /// Removes until nothing is left to remove for now.
    pub(super) async fn run(&mut self, host: &Host, stopping: &Stopping) {
        match self.prune(host, stopping).await {
            Ok(()) => self.failures = 0,
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                // Many hosts may be at it, and it comes again in a minute: once is no news.
                match self.failures {
                    WARN_AFTER_FAILURES => tracing::warn!(
                        "old rows could not be removed {WARN_AFTER_FAILURES} times: {error:#}"
                    ),
                    _ => tracing::debug!("removing old rows again later: {error:#}"),
                }
            }
        }
    }

    async fn prune(&self, host: &Host, stopping: &Stopping) -> Result<()> {
        // Outputs leave even while nobody can say how long messages stay.
        let inbox = host.inbox_retention().await.unwrap_or_else(|error| {
            tracing::debug!("keeping inbox records for now: {error:#}");
            None
        });
        let limits = RetentionPolicy {
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
            let retired = host.services.store.delete_expired(&limits).await;
            fault::point(fault::AFTER_PRUNE);
            match retired {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error @ StoreError::Conflict(_)) => {
                    return Err(anyhow::Error::from(error)
                        .context("wait for transactions that are under way"));
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
                .contains("for ever")
        );
        worker.retry.attempts = 50;
        let gone = retention(KeepInbox::Auto)
            .check(&worker, Some(HOUR))
            .unwrap_err()
            .to_string();
        assert!(gone.contains("gone before they are dead letters"), "{gone}");
    }
}
