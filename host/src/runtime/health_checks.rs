//! What the host looks at every second or two, so that it never calls itself ready while nothing can get through: whether the
//! database takes a commit, whether its own streams are there, and whether its workers' consumers are.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::worker_entry::WorkerRuntime;
use super::{Host, WorkerState};
use crate::bus::{
    Bus, ConsumerState, OtherInstallation, OutgoingMessage, Probe, StreamSpec, is_permanent_error,
    watermark_stream,
};
use crate::drain::Stopping;
use crate::metrics::health::HealthCheck;
use crate::model::alarm::{self, ALARM_MAX_AGE, ALARM_STREAM, ALARM_SUBJECTS, Notice};
use crate::model::dead_letter::{DLQ_STREAM, DLQ_SUBJECTS};
use crate::model::hint;
use crate::model::invalidation::{CACHE_STREAM, CACHE_STREAM_MAX_AGE, CACHE_SUBJECTS};
use crate::model::message::Output;
use crate::model::redrive::{REDRIVE_STREAM, REDRIVE_SUBJECTS};
use crate::model::retry::LastError;
use crate::store::{Store, StoredReport, is_busy};

/// How often it looks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a commit may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a look waits for the trial before it looks at the rest.
const COMMIT_PROBE_WAIT: Duration = Duration::from_secs(1);

/// How long the broker may take to answer all that is asked in one look.
const BROKER_TIMEOUT: Duration = Duration::from_secs(4);

/// How many consumers are asked for at the same time.
const PROBE_CONCURRENCY: usize = 16;

/// How long the database may fail before an alarm tells.
const ALARM_AFTER: Duration = Duration::from_secs(2);

/// How often a start looks again for the streams that it cannot make.
const STREAM_RETRY_DELAY: Duration = Duration::from_secs(1);

/// What a host says that it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// The machine's name and the process.
    pub host: String,
    pub workers: BTreeMap<String, WorkerReport>,
}

/// How a worker stands on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// The version that runs.
    pub version: Option<u32>,
    pub state: String,
    /// Why it does not work, and which version that is about.
    pub error: Option<String>,
    pub broken_version: Option<u32>,
}

/// The streams that are the installation's own.
fn own_streams() -> [StreamSpec; 5] {
    [
        StreamSpec::new(DLQ_STREAM, &[DLQ_SUBJECTS]),
        StreamSpec {
            is_queue: true,
            ..StreamSpec::new(REDRIVE_STREAM, &[REDRIVE_SUBJECTS])
        },
        StreamSpec {
            max_age: Some(ALARM_MAX_AGE),
            ..StreamSpec::new(ALARM_STREAM, &[ALARM_SUBJECTS])
        },
        StreamSpec {
            max_age: Some(CACHE_STREAM_MAX_AGE),
            ..StreamSpec::new(CACHE_STREAM, &[CACHE_SUBJECTS])
        },
        watermark_stream(),
    ]
}

impl StoredReport {
    /// The report itself; none when the host has written none yet.
    pub(super) fn read(&self) -> Result<Option<HostReport>> {
        self.text
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .context("read what a host runs")
    }
}

/// Makes the installation's own streams. What keeps them away, such as a server of the cluster that is gone, is waited for.
///
/// # Errors
/// When a stream belongs to another installation.
pub(super) async fn create_own_streams(bus: &Bus) -> Result<()> {
    for spec in own_streams() {
        let mut trouble = LastError::default();
        while let Err(error) = bus.ensure_own_stream(&spec).await {
            if hint::find_cause::<OtherInstallation>(&error).is_some() || is_permanent_error(&error)
            {
                return Err(error);
            }
            let why = format!("{error:#}");
            if trouble.is_new(&why) {
                tracing::warn!(
                    stream = spec.name,
                    "the start waits for a stream of the host's own: {why}"
                );
            }
            tokio::time::sleep(STREAM_RETRY_DELAY).await;
        }
    }
    Ok(())
}

impl Host {
    /// What this host runs.
    pub(super) async fn report(&self) -> HostReport {
        let runs = |state: WorkerState| {
            let runs = WorkerReport {
                version: state.version,
                state: state.state,
                error: state.error,
                broken_version: state.broken_version,
            };
            (state.worker, runs)
        };
        HostReport {
            host: host_name(),
            workers: self.workers().await.into_iter().map(runs).collect(),
        }
    }

    /// What all hosts that are alive say that they run.
    pub async fn reports(&self) -> Result<Vec<HostReport>> {
        let reports = self.services.store.reports().await?;
        let read = |report: &StoredReport| {
            let starting = || HostReport {
                host: format!("a host that is starting ({})", report.instance),
                workers: BTreeMap::new(),
            };
            Ok(report.read()?.unwrap_or_else(starting))
        };
        reports.iter().map(read).collect()
    }

    /// Makes own streams that are gone.
    async fn check_own_streams(&self) -> Result<()> {
        for spec in own_streams() {
            if self.services.bus.stream(&spec.name).await?.is_none() {
                tracing::error!(
                    stream = spec.name,
                    "a stream of the host's own is gone; making it again"
                );
                self.services.bus.ensure_own_stream(&spec).await?;
            }
        }
        Ok(())
    }

    /// Notes how the consumers of the workers stand. What the server does not say in time changes nothing.
    async fn check_consumers(&self) {
        let probes: Vec<(String, u32, Probe)> = {
            let workers = self.workers.lock().await;
            let running = workers
                .iter()
                .filter_map(|(name, slot)| match &slot.running {
                    Some(WorkerRuntime::Messages(running)) => {
                        Some((name.clone(), running.version, running.probe()))
                    }
                    _ => None,
                });
            running.collect()
        };
        let checks = probes.into_iter().map(|(name, version, probe)| async move {
            let standing = tokio::time::timeout(BROKER_TIMEOUT, probe.consumer_state()).await;
            (name, version, standing)
        });
        let standings: Vec<_> = futures::stream::iter(checks)
            .buffer_unordered(PROBE_CONCURRENCY)
            .collect()
            .await;
        let mut workers = self.workers.lock().await;
        for (name, version, standing) in standings {
            let Some(slot) = workers.get_mut(&name) else {
                continue;
            };
            let standing = match standing {
                Ok(Ok(standing)) => standing,
                Ok(Err(error)) => {
                    tracing::debug!("worker {name} is not looked at: {error:#}");
                    continue;
                }
                Err(_) => continue,
            };
            if slot
                .running
                .as_ref()
                .is_none_or(|running| running.version() != version)
            {
                continue;
            }
            if standing != slot.standing {
                match &standing {
                    ConsumerState::Active => {
                        tracing::info!(worker = name, "its consumer serves it again")
                    }
                    ConsumerState::Paused(_)
                        if matches!(slot.standing, ConsumerState::Paused(_)) => {}
                    ConsumerState::Paused(_) => {
                        tracing::warn!(worker = name, "its consumer is paused")
                    }
                    ConsumerState::Missing(why) => {
                        tracing::error!(worker = name, "it gets no messages: {why}")
                    }
                }
            }
            slot.standing = standing;
        }
    }

    /// Publishes that the database fails, or works again, without the database.
    async fn publish_database_alarm(&self, alarm: &mut Option<DatabaseAlarm>) {
        let is_due = || {
            self.services
                .health
                .database_failing_since()
                .is_some_and(|since| since.elapsed() >= ALARM_AFTER)
        };
        match (alarm.take(), self.services.health.database_error()) {
            (None, Some(why)) if is_due() => {
                let notice = Notice::database_unavailable(&host_name(), &why);
                alarm::log(&notice);
                *alarm = Some(DatabaseAlarm {
                    is_published: self.publish_notice(&notice).await,
                    notice,
                });
            }
            // The broker may have been away, too.
            (
                Some(DatabaseAlarm {
                    notice,
                    is_published: false,
                }),
                Some(_),
            ) => {
                *alarm = Some(DatabaseAlarm {
                    is_published: self.publish_notice(&notice).await,
                    notice,
                });
            }
            (
                Some(DatabaseAlarm {
                    notice,
                    is_published,
                }),
                None,
            ) => {
                let over = notice.clone().cleared();
                if notice.is_raised() {
                    alarm::log(&over);
                }
                if is_published && !self.publish_notice(&over).await {
                    *alarm = Some(DatabaseAlarm {
                        notice: over,
                        is_published,
                    });
                }
            }
            (before, _) => *alarm = before,
        }
    }

    /// Returns whether the broker has it.
    async fn publish_notice(&self, notice: &Notice) -> bool {
        let Output {
            id,
            subject,
            headers,
            body,
            ..
        } = self
            .services
            .store
            .output_ids()
            .seal(&notice.worker, &notice.output());
        let message = OutgoingMessage {
            subject,
            headers,
            id,
            body,
        };
        let answers =
            tokio::time::timeout(BROKER_TIMEOUT, self.services.bus.publish(vec![message])).await;
        matches!(
            answers.ok().and_then(|mut answers| answers.pop()),
            Some(Ok(_))
        )
    }
}

/// The alarm that the database takes no writes, and whether the broker has it.
struct DatabaseAlarm {
    notice: Notice,
    is_published: bool,
}

/// Looks until the host stops.
pub(super) async fn watch(host: Arc<Host>, mut stopping: Stopping) {
    let mut commit_probe = CommitProbe::default();
    let mut alarm = None;
    loop {
        commit_probe.run(&host).await;
        host.check_consumers().await;
        match tokio::time::timeout(BROKER_TIMEOUT, host.check_own_streams()).await {
            Ok(checked) => host.services.health.record(
                HealthCheck::OwnStreams,
                checked.map_err(|error| format!("{error:#}")),
            ),
            Err(_) => host.services.health.record(
                HealthCheck::OwnStreams,
                Err("JetStream does not answer".to_owned()),
            ),
        }
        host.publish_database_alarm(&mut alarm).await;
        tokio::select! {
            biased;
            () = stopping.stopped() => return,
            () = host.workers_changed.notified() => {}
            () = tokio::time::sleep(CHECK_INTERVAL) => {}
        }
    }
}

/// The small transaction in which a host writes its report. One at a time: a server that lets a commit wait lets a second one
/// wait, too.
#[derive(Default)]
struct CommitProbe {
    running: Option<ReportWrite>,
}

struct ReportWrite {
    /// When it had its turn.
    began: Arc<OnceLock<Instant>>,
    /// Ends with how long it took from its turn on.
    task: JoinHandle<Result<Duration>>,
}

impl CommitProbe {
    /// Hears of the one that runs, and begins the next one if that is over.
    async fn run(&mut self, host: &Host) {
        if self.running.is_none() {
            let (report, began) = (host.report().await, Arc::<OnceLock<Instant>>::default());
            let write = write_report(Arc::clone(&host.services.store), report, Arc::clone(&began));
            self.running = Some(ReportWrite {
                began,
                task: tokio::spawn(write),
            });
        }
        let Some(ReportWrite { began, task }) = &mut self.running else {
            return;
        };
        let written = tokio::time::timeout(COMMIT_PROBE_WAIT, &mut *task).await;
        // Not while it waits for its turn among the host's own transactions.
        let lasted = began.get().map(Instant::elapsed).unwrap_or_default();
        let outcome = match &written {
            // All connections of this host are in use: that says nothing.
            Ok(Ok(Err(error))) if is_busy(error) => None,
            Ok(Ok(Err(error))) => Some(Err(format!("{error:#}"))),
            Ok(Err(error)) => Some(Err(format!("{error:#}"))),
            Ok(Ok(Ok(lasted))) if *lasted >= COMMIT_TIMEOUT => {
                Some(Err(slow_commit_message(*lasted)))
            }
            Ok(Ok(Ok(_))) => Some(Ok(())),
            Err(_) => (lasted >= COMMIT_TIMEOUT).then(|| Err(slow_commit_message(lasted))),
        };
        if written.is_ok() {
            self.running = None;
        }
        if let Some(outcome) = outcome {
            host.services
                .health
                .record(HealthCheck::WriteProbe, outcome);
        }
    }
}

async fn write_report(
    store: Arc<dyn Store>,
    report: HostReport,
    began: Arc<OnceLock<Instant>>,
) -> Result<Duration> {
    let text = serde_json::to_string(&report).context("write what the host runs")?;
    store.write_report(&text, &began).await?;
    Ok(began.get().map(Instant::elapsed).unwrap_or_default())
}

fn slow_commit_message(since: Duration) -> String {
    format!(
        "the database does not confirm commits (one has waited for {} s): is a synchronous standby away, or a lock in the way?",
        since.as_secs()
    )
}

/// The machine and the process.
fn host_name() -> String {
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let machine = machine.trim();
    format!(
        "{}:{}",
        if machine.is_empty() { "host" } else { machine },
        std::process::id()
    )
}
