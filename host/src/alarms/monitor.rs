//! Looks at depths and ages every few seconds, and raises and clears alarms. It needs the database alone: without a broker the
//! log, the metrics and the rows still tell, and the messages follow.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::config::manifest::Worker;
use crate::drain::Stopping;
use crate::model::alarm::{self, Alarm, Kind, Move, Step, judge};
use crate::model::units;
use crate::services::Services;
use crate::store::{LetterDepth, OutboxLag};

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long it waits for the relay to take the messages that tell of alarms.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(1);

/// The state of a host that alarms are about, beside what the database knows.
pub struct HostState {
    /// Whether database and broker disagree.
    pub is_restored: bool,
    /// The workers that do not run on this host although they should, each with the reason.
    pub broken: HashMap<String, String>,
}

/// Checks until the host stops. `state` reads the state of this host.
pub async fn watch<F>(services: Arc<Services>, state: impl Fn() -> F, stopping: Stopping)
where
    F: Future<Output = HostState>,
{
    while !stopping.wait(LOOK_EVERY).await {
        if let Err(error) = look(&services, state().await).await {
            tracing::debug!("looking for what needs an alarm again soon: {error:#}");
        }
    }
}

/// Measures everything once, and raises and clears what follows from it.
async fn look(services: &Services, host: HostState) -> Result<()> {
    let workers = services.deployed_workers().await?;
    let measured = Measured {
        standing: services.store.alarms().await?,
        letters: services.store.letter_depths().await?,
        outputs: services.store.outbox_lag().await?,
        taken: services.store.taken_ids().await?,
        is_restored: host.is_restored,
        broken: host.broken,
    };
    let ages = futures::future::join_all(workers.iter().map(|worker| services.unhandled_age(worker))).await;
    let of_workers = workers.iter().zip(ages).flat_map(|(worker, unhandled)| measured.moves(worker, unhandled));
    let moves: Vec<Move> = of_workers.chain(measured.of_retired(&workers)).collect();
    if moves.is_empty() {
        return Ok(());
    }
    let since = Instant::now();
    let told = services.store.move_alarms(&moves).await?;
    told.notices.iter().for_each(alarm::log);
    // A relay that has its hands full does not hold up the next look: what it does not take now, a sweep finds.
    let _ = tokio::time::timeout(HAND_OVER_WITHIN, services.publish_soon(told.rows, since)).await;
    Ok(())
}

/// What the database says.
struct Measured {
    standing: Vec<Alarm>,
    letters: Vec<LetterDepth>,
    outputs: Vec<OutboxLag>,
    /// By worker, how many outputs had to change their id.
    taken: BTreeMap<String, u64>,
    /// Whether database and broker disagree.
    is_restored: bool,
    /// The workers that do not run here, with why.
    broken: HashMap<String, String>,
}

impl Measured {
    /// A worker that is retired neither runs nor waits: alarms about that are over.
    fn of_retired(&self, workers: &[Worker]) -> Vec<Move> {
        let is_over = |alarm: &&Alarm| {
            matches!(alarm.kind, Kind::CannotRun | Kind::UnhandledAge | Kind::Restored)
                && alarm.is_raised()
                && !workers.iter().any(|worker| worker.name == alarm.worker)
        };
        let clear = |alarm: &Alarm| Move {
            worker: alarm.worker.clone(),
            kind: alarm.kind,
            group: None,
            times: alarm.times,
            step: Step::Clear,
            value: 0,
            threshold: alarm.threshold,
            why: None,
        };
        self.standing.iter().filter(is_over).map(clear).collect()
    }

    /// What follows for the alarms of a worker. `unhandled` is the age of the oldest message that waits for it, if that could
    /// be asked.
    fn moves(&self, worker: &Worker, unhandled: Option<Duration>) -> Vec<Move> {
        let letters = self.letters.iter().find(|depth| depth.worker == worker.name);
        let outputs = self.outputs.iter().find(|lag| lag.worker == worker.name);
        let of_kind = |kind| match kind {
            Kind::Letters => Some(letters.map_or(0, |depth| depth.open)),
            Kind::LetterAge => Some(letters.map_or(0, |depth| depth.oldest_ms)),
            Kind::UnhandledAge => unhandled.map(units::milliseconds),
            Kind::UnpublishedAge => Some(outputs.and_then(|lag| lag.oldest_ms).unwrap_or_default()),
            Kind::SetAside => Some(outputs.map_or(0, |lag| lag.set_aside)),
            Kind::IdTaken => Some(self.taken.get(&worker.name).copied().unwrap_or_default()),
            Kind::Restored => Some(self.is_restored.into()),
            Kind::CannotRun => Some(self.broken.contains_key(&worker.name).into()),
            Kind::Database | Kind::NewFailure => None,
        };
        let by_value = Kind::ALL.into_iter().filter(|kind| *kind != Kind::NewFailure).filter_map(|kind| {
            let standing = self.standing.iter().find(|alarm| alarm.worker == worker.name && alarm.kind == kind);
            let why = self.broken.get(&worker.name).filter(|_| kind == Kind::CannotRun);
            let step = step(worker, kind, standing, of_kind(kind))?;
            Some(Move { why: why.cloned(), ..step })
        });
        // Raised by the first letter of a failure, over once none of its letters is left to do.
        let failures =
            self.standing.iter().filter(|alarm| alarm.worker == worker.name && alarm.kind == Kind::NewFailure);
        let by_failure = failures.filter_map(|alarm| step(worker, alarm.kind, Some(alarm), Some(alarm.to_do)));
        by_value.chain(by_failure).collect()
    }
}

fn step(worker: &Worker, kind: Kind, standing: Option<&Alarm>, value: Option<u64>) -> Option<Move> {
    let threshold = worker.alarm.of(kind);
    let step = judge(standing, value, threshold, worker.alarm.clear_after)?;
    Some(Move {
        worker: worker.name.clone(),
        kind,
        group: standing.and_then(|alarm| alarm.group.clone()),
        times: standing.map_or(0, |alarm| alarm.times),
        step,
        value: value.unwrap_or_default(),
        threshold,
        why: None,
    })
}
