//! Health checks, run every second.
//!
//! They check that the database commits, and that the host's own streams and the consumers of its
//! workers exist. So a host is never ready while no message can get through.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::worker_entry::WorkerRuntime;
use super::{Host, RunState, WorkerState};
use crate::bus::{
    Bus, ConsumerState, OtherInstallation, OutgoingMessage, Probe, StreamSpec, is_permanent_error,
    watermark_stream,
};
use crate::consumer::LaneReport;
use crate::drain::Stopping;
use crate::metrics::health::HealthCheck;
use crate::model::alarm::{self, ALARM_MAX_AGE, ALARM_STREAM, ALARM_SUBJECTS, Notice};
use crate::model::dead_letter::{DLQ_STREAM, DLQ_SUBJECTS};
use crate::model::hint;
use crate::model::invalidation::{CACHE_STREAM, CACHE_STREAM_MAX_AGE, CACHE_SUBJECTS};
use crate::model::message::Output;
use crate::model::receipt::{CHECKPOINT_STREAM, CHECKPOINT_SUBJECTS};
use crate::model::redrive::{REDRIVE_STREAM, REDRIVE_SUBJECTS};
use crate::model::retry::LastError;
use crate::relay::RelayReport;
use crate::store::{Pause, Store, StoredReport, is_busy};

/// How often the checks run.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a commit may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(4);

/// How long one round waits for the commit probe before the other checks run.
const COMMIT_PROBE_WAIT: Duration = Duration::from_secs(1);

/// How long NATS may take to respond to one check.
const BROKER_TIMEOUT: Duration = Duration::from_secs(4);

/// How many consumers are inspected concurrently.
pub(super) const PROBE_CONCURRENCY: usize = 16;

/// How long the database may fail before an alarm is raised.
const ALARM_AFTER: Duration = Duration::from_secs(2);

/// Delay before the start tries again to create its own streams.
const STREAM_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The workers that a host runs, as the host reports them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Host name and process id, such as `web-1:4711`.
    pub host: String,
    pub workers: BTreeMap<String, WorkerReport>,
    #[serde(default)]
    pub relay: RelayReport,
    /// The settings that all hosts of the database should share.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

/// The state of a worker on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerReport {
    /// The running version.
    pub version: Option<u32>,
    pub state: RunState,
    /// The reason that it does not work, and the version concerned.
    pub error: Option<String>,
    pub broken_version: Option<u32>,
    /// The pause by an operator that is applied there.
    #[serde(default)]
    pub pause: Option<Pause>,
    /// Messages or requests in flight there.
    #[serde(default)]
    pub in_flight: usize,
    /// Its lanes there; none while it pulls no messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<LaneReport>,
    /// Whether it is paused by an operator, with nothing in flight there.
    #[serde(default)]
    pub is_drained: bool,
}

/// The streams that belong to the installation itself. That of checkpoints exists with receipts.
pub fn own_streams(with_receipts: bool) -> Vec<StreamSpec> {
    let mut streams = vec![
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
    ];
    if with_receipts {
        streams.push(StreamSpec::new(CHECKPOINT_STREAM, &[CHECKPOINT_SUBJECTS]));
    }
    streams
}

impl HostReport {
    /// Reads a stored report; none when the host has written none yet.
    pub fn parse(stored: &StoredReport) -> Result<Option<HostReport>> {
        stored
            .text
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .context("parse the report of a host")
    }
}

/// Creates the installation's own streams. Temporary failures, such as a missing server of the
/// cluster, are retried.
///
/// # Errors
/// A stream belongs to another installation, or the failure is permanent.
pub(super) async fn create_own_streams(bus: &Bus, with_receipts: bool) -> Result<()> {
    for spec in own_streams(with_receipts) {
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
                    error = why,
                    "failed to create a stream of the host, retrying"
                );
            }
            tokio::time::sleep(STREAM_RETRY_DELAY).await;
        }
    }
    Ok(())
}

impl Host {
    /// The report of this host.
    pub(super) async fn report(&self) -> HostReport {
        let runs = |state: WorkerState| {
            let runs = WorkerReport {
                version: state.version,
                state: state.state,
                error: state.error,
                broken_version: state.broken_version,
                pause: state.pause,
                in_flight: state.in_flight,
                lanes: state.lanes,
                is_drained: state.is_drained,
            };
            (state.worker, runs)
        };
        HostReport {
            host: host_name(),
            workers: self.workers().await.into_iter().map(runs).collect(),
            relay: self.services.relay_state.report(),
            settings: self.config.shared_settings(),
        }
    }

    /// The reports of all live hosts.
    pub async fn reports(&self) -> Result<Vec<HostReport>> {
        let reports = self.services.store.reports().await?;
        let read = |report: &StoredReport| {
            let starting = || HostReport {
                host: format!("a host that is starting ({})", report.instance),
                workers: BTreeMap::new(),
                relay: RelayReport::default(),
                settings: BTreeMap::new(),
            };
            Ok(HostReport::parse(report)?.unwrap_or_else(starting))
        };
        reports.iter().map(read).collect()
    }

    /// Creates missing streams of the host again.
    async fn check_own_streams(&self) -> Result<()> {
        for spec in own_streams(self.config.receipts.is_some()) {
            if self.services.bus.stream(&spec.name).await?.is_none() {
                tracing::error!(
                    stream = spec.name,
                    "stream of the host missing, creating it again"
                );
                self.services.bus.ensure_own_stream(&spec).await?;
            }
        }
        Ok(())
    }

    /// Records the state of the workers' consumers. A late or failed response changes nothing.
    async fn check_consumers(&self) {
        // Probe the consumers without the lock of the workers.
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
            let consumer_state = tokio::time::timeout(BROKER_TIMEOUT, probe.consumer_state()).await;
            (name, version, consumer_state)
        });
        let consumer_states: Vec<_> = futures::stream::iter(checks)
            .buffer_unordered(PROBE_CONCURRENCY)
            .collect()
            .await;
        let mut workers = self.workers.lock().await;
        for (name, version, consumer_state) in consumer_states {
            let Some(slot) = workers.get_mut(&name) else {
                continue;
            };
            let consumer_state = match consumer_state {
                Ok(Ok(consumer_state)) => consumer_state,
                Ok(Err(error)) => {
                    tracing::debug!(
                        worker = name,
                        error = format!("{error:#}"),
                        "consumer not readable"
                    );
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
            if consumer_state != slot.consumer_state {
                match &consumer_state {
                    ConsumerState::Active => {
                        tracing::info!(worker = name, "consumer active again")
                    }
                    ConsumerState::Paused(_)
                        if matches!(slot.consumer_state, ConsumerState::Paused(_)) => {}
                    ConsumerState::Paused(_) => {
                        tracing::warn!(worker = name, "consumer paused")
                    }
                    ConsumerState::Missing(why) => {
                        tracing::error!(worker = name, error = why, "worker receives no messages")
                    }
                }
            }
            slot.consumer_state = consumer_state;
        }
    }

    /// Publishes the alarm that the database fails, or its end, directly to NATS.
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
            // NATS may have been unavailable as well.
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

    /// Publishes a notice. Returns whether its stream has stored it.
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
        let acks =
            tokio::time::timeout(BROKER_TIMEOUT, self.services.bus.publish(vec![message])).await;
        matches!(acks.ok().and_then(|mut acks| acks.pop()), Some(Ok(_)))
    }
}

/// The alarm that the database takes no writes, and whether its stream has stored it.
struct DatabaseAlarm {
    notice: Notice,
    is_published: bool,
}

/// Runs the checks until the host stops.
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

/// Probes commits: a small transaction writes the report of the host.
///
/// One probe runs at a time. A server that delays one commit delays a second one as well.
#[derive(Default)]
struct CommitProbe {
    running: Option<ReportWrite>,
}

struct ReportWrite {
    /// Set when its transaction begins.
    began: Arc<OnceLock<Instant>>,
    /// Returns the time since `began`.
    task: JoinHandle<Result<Duration>>,
}

impl CommitProbe {
    /// Starts a probe unless one runs, waits for it briefly, and records the result.
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
        // The wait for one of the host's own connections does not count.
        let lasted = began.get().map(Instant::elapsed).unwrap_or_default();
        let outcome = match &written {
            // All connections of this host are in use: no result.
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
    store: Arc<Store>,
    report: HostReport,
    began: Arc<OnceLock<Instant>>,
) -> Result<Duration> {
    let text = serde_json::to_string(&report).context("encode the report of the host")?;
    store.write_report(&text, &began).await?;
    Ok(began.get().map(Instant::elapsed).unwrap_or_default())
}

fn slow_commit_message(since: Duration) -> String {
    format!(
        "the database does not confirm commits (one has waited for {} s); \
         check for a missing synchronous standby or a blocking lock",
        since.as_secs()
    )
}

/// Host name and process id.
pub(super) fn host_name() -> String {
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let machine = machine.trim();
    format!(
        "{}:{}",
        if machine.is_empty() { "host" } else { machine },
        std::process::id()
    )
}
