//! Measures depths and ages every few seconds, and raises and clears alarms.
//!
//! Only the database is needed. Without a broker the log, the metrics and the rows still show an
//! alarm; its message is published later.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::config::manifest::Worker;
use crate::drain::Stopping;
use crate::model::alarm::{self, Alarm, AlarmStep, AlarmUpdate, Kind, next_step};
use crate::model::units;
use crate::services::Services;
use crate::store::{DeadLetterDepth, OutboxLag};

/// How often the values are measured.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How long to wait for the relay to accept the messages of alarms.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);

/// The state of a host that alarms depend on, beside the database.
pub struct HostState {
    /// Whether the database and NATS disagree.
    pub is_restored: bool,
    /// The workers that cannot run on this host, each with the reason.
    pub broken: HashMap<String, String>,
    /// The workers that an operator paused, each with the actor and the note.
    pub paused: HashMap<String, String>,
}

/// Checks until the host stops. `state` reads the state of this host.
pub async fn watch<F>(services: Arc<Services>, state: impl Fn() -> F, stopping: Stopping)
where
    F: Future<Output = HostState>,
{
    while !stopping.wait(CHECK_INTERVAL).await {
        if let Err(error) = check(&services, state().await).await {
            tracing::debug!(
                error = format!("{error:#}"),
                "failed to check for alarms, retrying"
            );
        }
    }
}

/// Measures once, and applies the updates of alarms that follow.
async fn check(services: &Services, host: HostState) -> Result<()> {
    let workers = services.deployed_workers().await?;
    let measurements = Measurements {
        existing: services.store.alarms().await?,
        dead_letters: services.store.dead_letter_depths().await?,
        outputs: services.store.outbox_lag().await?,
        taken_ids: services.store.taken_ids().await?,
        is_restored: host.is_restored,
        broken: host.broken,
        paused: host.paused,
    };
    let ages =
        futures::future::join_all(workers.iter().map(|worker| services.unhandled_age(worker)))
            .await;
    let for_workers = workers
        .iter()
        .zip(ages)
        .flat_map(|(worker, unhandled)| measurements.updates(worker, unhandled));
    let updates: Vec<AlarmUpdate> = for_workers
        .chain(measurements.clear_for_retired(&workers))
        .collect();
    if updates.is_empty() {
        return Ok(());
    }

    // Apply, log and publish the updates.
    let since = Instant::now();
    let changes = services.store.apply_alarm_updates(&updates).await?;
    changes.notices.iter().for_each(alarm::log);
    // A busy relay does not delay the next check: the poller publishes outputs that were not handed
    // over.
    let _ = tokio::time::timeout(
        HAND_OVER_TIMEOUT,
        services.publish_outputs(changes.rows, since),
    )
    .await;
    Ok(())
}

/// The measured values.
struct Measurements {
    existing: Vec<Alarm>,
    dead_letters: Vec<DeadLetterDepth>,
    outputs: Vec<OutboxLag>,
    /// Number of outputs that had to change their id, by worker.
    taken_ids: BTreeMap<String, u64>,
    /// Whether the database and NATS disagree.
    is_restored: bool,
    /// The workers that cannot run here, with the reason.
    broken: HashMap<String, String>,
    /// The workers that are paused here, with the actor and the note.
    paused: HashMap<String, String>,
}

impl Measurements {
    /// Clears alarms of retired workers: `cannot-run`, `paused`, `unhandled-age` and `restored` do
    /// not apply to them.
    fn clear_for_retired(&self, workers: &[Worker]) -> Vec<AlarmUpdate> {
        let is_over = |alarm: &&Alarm| {
            matches!(
                alarm.kind,
                Kind::CannotRun | Kind::Paused | Kind::UnhandledAge | Kind::Restored
            ) && alarm.is_raised()
                && !workers.iter().any(|worker| worker.name == alarm.worker)
        };
        let clear = |alarm: &Alarm| AlarmUpdate {
            worker: alarm.worker.clone(),
            kind: alarm.kind,
            group: None,
            times: alarm.times,
            step: AlarmStep::Clear,
            value: 0,
            threshold: alarm.threshold,
            why: None,
        };
        self.existing.iter().filter(is_over).map(clear).collect()
    }

    /// The updates for the alarms of a worker.
    ///
    /// `unhandled` is the age of its oldest unhandled message, if it could be read.
    fn updates(&self, worker: &Worker, unhandled: Option<Duration>) -> Vec<AlarmUpdate> {
        let dead_letters = self
            .dead_letters
            .iter()
            .find(|depth| depth.worker == worker.name);
        let outputs = self.outputs.iter().find(|lag| lag.worker == worker.name);
        let value_of = |kind| match kind {
            Kind::DeadLetters => Some(dead_letters.map_or(0, |depth| depth.open)),
            Kind::DeadLetterAge => Some(dead_letters.map_or(0, |depth| depth.oldest_ms)),
            Kind::UnhandledAge => unhandled.map(units::milliseconds),
            Kind::UnpublishedAge => Some(outputs.and_then(|lag| lag.oldest_ms).unwrap_or_default()),
            Kind::Parked => Some(outputs.map_or(0, |lag| lag.parked)),
            Kind::IdTaken => Some(
                self.taken_ids
                    .get(&worker.name)
                    .copied()
                    .unwrap_or_default(),
            ),
            Kind::Restored => Some(self.is_restored.into()),
            Kind::CannotRun => Some(self.broken.contains_key(&worker.name).into()),
            Kind::Paused => Some(self.paused.contains_key(&worker.name).into()),
            Kind::Database | Kind::NewFailure => None,
        };
        let by_value = Kind::ALL
            .into_iter()
            .filter(|kind| *kind != Kind::NewFailure)
            .filter_map(|kind| {
                let existing = self
                    .existing
                    .iter()
                    .find(|alarm| alarm.worker == worker.name && alarm.kind == kind);
                let why = match kind {
                    Kind::CannotRun => self.broken.get(&worker.name),
                    Kind::Paused => self.paused.get(&worker.name),
                    _ => None,
                };
                let step = alarm_update(worker, kind, existing, value_of(kind))?;
                Some(AlarmUpdate {
                    why: why.cloned(),
                    ..step
                })
            });
        // Raised by the first dead letter of a failure group, cleared once none of the group is
        // open.
        let failures = self
            .existing
            .iter()
            .filter(|alarm| alarm.worker == worker.name && alarm.kind == Kind::NewFailure);
        let by_failure = failures.filter_map(|alarm| {
            alarm_update(
                worker,
                alarm.kind,
                Some(alarm),
                Some(alarm.open_dead_letters),
            )
        });
        by_value.chain(by_failure).collect()
    }
}

fn alarm_update(
    worker: &Worker,
    kind: Kind,
    existing: Option<&Alarm>,
    value: Option<u64>,
) -> Option<AlarmUpdate> {
    let threshold = worker.alarm.threshold(kind);
    let step = next_step(existing, value, threshold, worker.alarm.clear_after)?;
    Some(AlarmUpdate {
        worker: worker.name.clone(),
        kind,
        group: existing.and_then(|alarm| alarm.group.clone()),
        times: existing.map_or(0, |alarm| alarm.times),
        step,
        value: value.unwrap_or_default(),
        threshold,
        why: None,
    })
}
