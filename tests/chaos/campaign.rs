//! One campaign: a host on one database under load, all faults of a plan, and then the checks.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use oncely::fault;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use support::database::{Database, Kind};
use support::guests;
use support::metrics::unpublished_age;
use support::postgres::Cluster;
use support::proxy::{Cut, Proxy};
use support::world::{World, manifest, signal};

use crate::checker::{self, Counted, Violation};
use crate::exposure::Exposure;
use crate::observed::{self, Observed};
use crate::proxied_database::{HostBuild, ProxiedDatabase};
use crate::publisher::{self, Progress};
use crate::redriver::{self, Redriver};
use crate::stranger::{self, AttackCounts};
use crate::watcher::{self, WatcherReport};
use crate::workload::{Often, Workload, passes_until_death};

/// The broker redelivers a message that is unacknowledged for this long.
const ACK_WAIT: Duration = Duration::from_secs(2);

/// Starts of a host before a failed start is an error; a cut may break one.
const STARTS: u32 = 3;

/// Timeout for a host to reach a fault point, and for an opportunity to cut.
const CHANCE: Duration = Duration::from_secs(12);

/// Alarms with thresholds so low that they are raised and cleared all the time.
const ALARM: &str = "[worker.alarm]\ndead_letters = 10\nunpublished_age = \"1s\"\nunhandled_age = \"2s\"\nclear_after = \"1s\"";

/// The dead-letter stream.
const DLQ: &str = "ONCELY_DLQ";

/// The streams that are rolled back to an older copy.
const ROLLED_BACK: [&str; 2] = ["OUT", DLQ];

/// Points that a host rarely passes in WAL mode.
const POLL_MODE_POINTS: [&str; 4] = [
    fault::RELAY_LEASED,
    fault::BEFORE_MARK,
    fault::AFTER_MARK,
    fault::BEFORE_RELEASE,
];

/// Limit for the catch-up after an outage: outputs are published within a second again, in several
/// checks in a row.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(60);
const CAUGHT_UP_SAMPLES: u32 = 10;

/// The plan of a campaign.
#[derive(Debug, Clone)]
pub struct Plan {
    pub kind: Kind,
    pub seed: u64,
    pub inputs: u64,
    /// Maximum messages per transaction. None alternates 32 and 1 between versions of the worker.
    pub batch: Option<u32>,
    pub lanes: u32,
    /// Time limit for the faults of the plan.
    pub harm_max: Duration,
    pub harm: Harm,
    pub mutant: Option<String>,
    /// Events that must happen before the mutant may count as not caught.
    pub exposure: Exposure,
    /// Additional environment of the host.
    pub env: Vec<(String, String)>,
}

/// Number of faults of each kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct Harm {
    /// Aborts at each fault point.
    pub each_point: u32,
    pub kills: u32,
    pub pauses: u32,
    /// Database connections of the host that are terminated.
    pub terminations: u32,
    pub database_stops: u32,
    pub broker_kills: u32,
    /// Rollbacks of the output streams to an older copy.
    pub rollbacks: u32,
    /// Cuts of commits, for each kind.
    pub commit_cuts: u32,
    /// Cuts of publications, for each kind.
    pub output_cuts: u32,
    pub deployments: u32,
    /// Switches of the relay mode.
    pub relay_changes: u32,
    /// Broker outages of length `outage`, and outages of the dead-letter stream (full or deleted).
    pub outages: u32,
    pub outage: Duration,
    /// Length of an outage of the dead-letter stream.
    pub dlq_outage: Duration,
    /// Freezes of the host of length `frozen`, and network partitions of the same length.
    pub freezes: u32,
    pub frozen: Duration,
    /// Attempts of a host of another installation to join.
    pub joins: u32,
    /// Deaths of a host with leased outputs, followed by an immediate restart.
    pub leases: u32,
}

impl Harm {
    /// Tier T1.
    pub const FULL: Harm = Harm {
        each_point: 2,
        kills: 10,
        pauses: 5,
        terminations: 50,
        database_stops: 5,
        broker_kills: 5,
        rollbacks: 3,
        commit_cuts: 10,
        output_cuts: 10,
        deployments: 3,
        relay_changes: 6,
        outages: 1,
        outage: Duration::from_secs(120),
        dlq_outage: Duration::from_secs(40),
        freezes: 2,
        frozen: Duration::from_secs(20),
        joins: 2,
        leases: 2,
    };

    /// Fits into two minutes.
    pub const SHORT: Harm = Harm {
        each_point: 0,
        kills: 3,
        pauses: 1,
        terminations: 4,
        database_stops: 1,
        broker_kills: 1,
        rollbacks: 1,
        commit_cuts: 2,
        output_cuts: 2,
        deployments: 1,
        relay_changes: 2,
        outages: 1,
        outage: Duration::from_secs(4),
        dlq_outage: Duration::from_secs(4),
        freezes: 1,
        frozen: Duration::from_secs(5),
        joins: 1,
        leases: 1,
    };

    /// Applied to the unchanged host that runs beside the mutants, in addition to its exposure. A
    /// mutant gets its exposure alone.
    pub const OF_ALL_MUTANTS: Harm = Harm {
        each_point: 0,
        kills: 2,
        pauses: 1,
        terminations: 2,
        database_stops: 1,
        broker_kills: 1,
        rollbacks: 1,
        commit_cuts: 0,
        output_cuts: 1,
        deployments: 1,
        relay_changes: 2,
        outages: 0,
        outage: Duration::ZERO,
        dlq_outage: Duration::ZERO,
        freezes: 0,
        frozen: Duration::ZERO,
        joins: 0,
        leases: 0,
    };
}

/// Maximum wait of outputs that a dead host had leased, after its restart.
const LEASE_TAKEOVER_MAX: Duration = Duration::from_secs(12);

/// Time limit for repeating faults that had no opportunity.
const REPEATED_WITHIN: Duration = Duration::from_secs(90);

/// Time limit for exposing a mutant.
const EXPOSED_WITHIN: Duration = Duration::from_secs(240);

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    DieAt(&'static str),
    Kill,
    Pause,
    Terminate,
    StopDatabase,
    /// Crashes the database so that it loses commits, which it must not be able to.
    LoseCommits,
    KillBroker,
    RollBack,
    Cut(Cut),
    Deploy,
    ChangeRelay,
    BrokerAway,
    DlqFull,
    DlqGone,
    Freeze,
    Vanish,
    Join,
    DieWithLeases,
}

impl Act {
    /// The label under which the fault is counted.
    fn label(self) -> String {
        let name = match self {
            Act::DieAt(point) => return format!("died at {point}"),
            Act::Kill => "host killed",
            Act::Pause => "host paused",
            Act::Terminate => "database connection terminated",
            Act::StopDatabase => "database stopped",
            Act::LoseCommits => "database crashed and lost commits",
            Act::KillBroker => "broker killed",
            Act::RollBack => "streams rolled back",
            Act::Cut(Cut::CommitNotForwarded) => "commit cut before it arrived",
            Act::Cut(Cut::CommitAnswerLost) => "commit cut after it took effect",
            Act::Cut(Cut::CommitDelayed) => "commit cut, delivered later",
            Act::Cut(Cut::CommitAnswerHeld) => "host killed between commit and answer",
            Act::Cut(Cut::OutputsNotForwarded) => "outputs cut before they arrived",
            Act::Cut(Cut::OutputAnswersLost) => "outputs cut after they were stored",
            Act::Cut(Cut::HttpAnswerLost | Cut::HttpAnswerTorn | Cut::HttpFirstAnswerLost) => {
                "answer to a request lost"
            }
            Act::Deploy => "deployed under load",
            Act::ChangeRelay => "relay changed",
            Act::BrokerAway => "long broker outage",
            Act::DlqFull => "dead-letter stream full",
            Act::DlqGone => "dead-letter stream deleted",
            Act::Freeze => "host frozen",
            Act::Vanish => "host vanished from the network",
            Act::Join => "second installation refused",
            Act::DieWithLeases => "host died with leased outputs, restarted",
        };
        name.to_owned()
    }
}

/// The result of a campaign.
#[derive(Debug)]
pub struct CampaignReport {
    pub plan: Plan,
    /// Injected faults by label.
    pub injected: BTreeMap<String, u64>,
    /// Observed events by name.
    pub seen: BTreeMap<String, u64>,
    pub counted: Counted,
    pub violations: Vec<Violation>,
    /// Missing events that the exposure of a mutant requires.
    pub unexposed: Vec<String>,
    pub seconds: u64,
    /// Folder with the host's log and data, kept after a violation.
    pub kept: Option<std::path::PathBuf>,
}

/// Runs a campaign.
pub async fn run(plan: Plan) -> Result<CampaignReport> {
    let began = Instant::now();
    let mut campaign = Campaign::start(plan).await?;
    match campaign.run_load().await {
        Ok(stuck) => campaign.conclude(stuck, began).await,
        Err(error) => {
            let (kind, log) = (campaign.plan.kind, tail(&campaign.world.host_log()));
            Err(error.context(format!("run a campaign on {kind:?}; host log:\n{log}")))
        }
    }
}

struct Campaign {
    plan: Plan,
    world: World,
    cluster: Option<Cluster>,
    to_nats: Proxy,
    to_database: Option<Proxy>,
    random: StdRng,
    progress: Arc<Progress>,
    watcher_report: Arc<WatcherReport>,
    attack_counts: Arc<AttackCounts>,
    injected: BTreeMap<String, u64>,
    /// Number of worker versions written so far.
    versions: u32,
    /// Milliseconds of catch-up after each kind of outage.
    caught_up: BTreeMap<&'static str, u64>,
    lagging: Vec<Violation>,
    /// Whether a rival host may run; several hosts need a shared database.
    rivals: bool,
}

/// Each transaction with effects leaves a session setting. A transaction that finds one fails.
const LEAVE_TRACE: &str = "
    create function app_default.leave_trace() returns trigger language plpgsql as $$
    declare
        left_by text := pg_catalog.current_setting('trace.left_by', true);
        own text := pg_catalog.pg_current_xact_id()::text;
    begin
        if left_by not in ('', own) then
            raise exception 'the session is as transaction % left it', left_by;
        end if;
        execute pg_catalog.format('set trace.left_by = %L', own);
        return null;
    end $$;
    create trigger leave_trace before insert on app_default.effect
        for each statement execute function app_default.leave_trace()";

impl Campaign {
    async fn start(plan: Plan) -> Result<Self> {
        let mut world = World::without_host(Kind::Sqlite, "").await?;
        let to_nats = Proxy::start(world.nats.port()).await?;
        world.nats_url = format!("nats://127.0.0.1:{}", to_nats.port());
        let build = match plan.mutant {
            Some(_) => HostBuild::Mutants,
            None => HostBuild::CrashPoints,
        };
        let proxied_database = ProxiedDatabase::install(&mut world, plan.kind, build).await?;
        let ProxiedDatabase {
            cluster,
            to_database,
        } = proxied_database;
        if let (Some(_), Some(proxy)) = (&plan.mutant, &to_database) {
            // Other commits contain nothing that a mutant of commits could lose or repeat.
            proxy.cut_guests_only();
        }
        let rivals = plan.kind == Kind::Postgres;
        let mut campaign = Campaign {
            random: StdRng::seed_from_u64(plan.seed ^ 0x0ddb_a115),
            plan,
            world,
            cluster,
            to_nats,
            to_database,
            progress: Arc::default(),
            watcher_report: Arc::default(),
            attack_counts: Arc::default(),
            injected: BTreeMap::new(),
            caught_up: BTreeMap::new(),
            lagging: Vec::new(),
            versions: 0,
            rivals,
        };
        campaign.new_version()?;
        campaign.arm(None);
        campaign.world.start_host().await?;
        if campaign.plan.kind == Kind::Postgres {
            campaign
                .world
                .database
                .execute(LEAVE_TRACE)
                .await
                .context("create the session-trace trigger")?;
        }
        Ok(campaign)
    }

    /// Redrives dead letters during the whole campaign.
    fn redriver(&self) -> Result<Redriver> {
        Ok(Redriver {
            program: self.world.program.clone().context("find the program")?,
            folder: self.world.folder.path().to_owned(),
            database: self.world.database.clone(),
        })
    }

    fn watch(&self) -> Vec<tokio::task::JoinHandle<()>> {
        let (url, database) = (self.world.nats.url(), self.world.database.clone());
        let (outputs, backlog) = (
            watcher::watch_outputs(
                url.clone(),
                database.clone(),
                Arc::clone(&self.watcher_report),
            ),
            watcher::watch_backlog(url, Arc::clone(&self.progress)),
        );
        vec![
            tokio::spawn(async { drop(outputs.await) }),
            tokio::spawn(async { drop(backlog.await) }),
            tokio::spawn(watcher::watch_ledger(
                database,
                Arc::clone(&self.watcher_report),
            )),
        ]
    }

    /// Writes a manifest that differs from the previous one.
    fn new_version(&mut self) -> Result<()> {
        self.versions += 1;
        let lanes = self.plan.lanes;
        let batch = self
            .plan
            .batch
            .unwrap_or(if self.versions.is_multiple_of(2) {
                1
            } else {
                32
            });
        let settings = format!(
            "batch = {batch}\nconcurrency = {lanes}\nordering_key = \"header:key\"\nack_wait = \"{}s\"\n\
             [worker.retry]\nattempts = {}\nbackoff = \"50ms\"\nbackoff_max = \"200ms\"\n\
             [worker.limits]\ntime = \"1500ms\"\n{ALARM}\n[worker.config]\nlabel = \"{}\"",
            ACK_WAIT.as_secs(),
            checker::ATTEMPTS,
            self.versions
        );
        let component = guests::component()?;

        // Its subject gets no message, so no dead letter belongs to it. The stranger sends it
        // pointers to dead letters of another worker.
        let bystander = format!(
            "\n[[worker]]\nname = \"{}\"\ncomponent = \"{}\"\nstream = \"IN\"\nsubjects = [\"in.never\"]\n\
             outputs = [\"out.>\"]\nconcurrency = 1\n[worker.config]\nlabel = \"{}\"\n",
            stranger::BYSTANDER,
            component.display(),
            self.versions
        );
        self.world
            .write_manifest(&(manifest(&settings)? + &bystander))
    }

    /// Configures the fault of the next host.
    fn arm(&mut self, fault: Option<String>) {
        let log = self
            .world
            .folder
            .path()
            .join("faults.log")
            .display()
            .to_string();
        self.world.host_env = vec![("ONCELY_FAULT_LOG".to_owned(), log)];
        self.world.host_env.extend(self.plan.env.iter().cloned());
        self.world
            .host_env
            .extend(fault.map(|fault| ("ONCELY_FAULT".to_owned(), fault)));
        self.world.host_env.extend(
            self.plan
                .mutant
                .clone()
                .map(|mutant| ("ONCELY_MUTANT".to_owned(), mutant)),
        );
    }

    fn record(&mut self, what: impl Into<String>) {
        *self.injected.entry(what.into()).or_default() += 1;
    }

    /// All faults of the plan in an order that depends on the seed.
    fn acts(&mut self) -> Vec<Act> {
        let Harm {
            each_point,
            kills,
            pauses,
            terminations,
            database_stops,
            ..
        } = self.plan.harm;
        let Harm {
            broker_kills,
            rollbacks,
            commit_cuts,
            output_cuts,
            deployments,
            relay_changes,
            outages,
            ..
        } = self.plan.harm;
        let Harm {
            freezes,
            joins,
            leases,
            ..
        } = self.plan.harm;
        let mut acts = Vec::new();
        let mut add = |act, times: u32| acts.extend((0..times).map(|_| act));
        fault::POINTS
            .iter()
            .for_each(|point| add(Act::DieAt(point), each_point));
        add(Act::Kill, kills);
        add(Act::Pause, pauses);
        add(Act::KillBroker, broker_kills);
        add(Act::RollBack, rollbacks);
        add(Act::Cut(Cut::OutputsNotForwarded), output_cuts);
        add(Act::Cut(Cut::OutputAnswersLost), output_cuts);
        add(Act::Deploy, deployments);
        add(Act::BrokerAway, outages);
        add(Act::DlqFull, outages);
        add(Act::DlqGone, outages);
        add(Act::Freeze, freezes);
        add(Act::Vanish, freezes);
        add(Act::Join, joins);
        add(Act::DieWithLeases, leases);

        // Faults that need a server database
        if self.plan.kind == Kind::Postgres {
            fault::WAL_POINTS
                .iter()
                .for_each(|point| add(Act::DieAt(point), each_point));
            add(Act::ChangeRelay, relay_changes);
            add(Act::Terminate, terminations);
            add(Act::StopDatabase, database_stops);
            add(Act::Cut(Cut::CommitNotForwarded), commit_cuts);
            add(Act::Cut(Cut::CommitAnswerLost), commit_cuts);
            add(Act::Cut(Cut::CommitDelayed), commit_cuts);
            add(Act::Cut(Cut::CommitAnswerHeld), commit_cuts.div_ceil(4));
        }
        acts.shuffle(&mut self.random);
        acts
    }

    /// Runs from the first message to the last settled one. Returns the reason if work remains.
    async fn run_load(&mut self) -> Result<Option<String>> {
        // Watchers and load
        let url = self.world.nats.url();
        let watchers = self.watch();
        let workload = Workload::new(
            self.plan.seed,
            self.plan.exposure.often.map(|(often, _)| often),
        );

        // Slow enough that messages remain for the last faults.
        let rate = (self.plan.inputs as f64 / self.plan.harm_max.as_secs_f64() * 1.5).max(40.0);
        let publishing = tokio::spawn(publisher::publish(
            url,
            workload,
            self.plan.inputs,
            rate,
            Arc::clone(&self.progress),
        ));
        let redriving = tokio::spawn(redriver::redrive(self.redriver()?));
        let attacking = tokio::spawn(stranger::attack(
            self.world.nats.url(),
            self.world.database.clone(),
            Arc::clone(&self.progress),
            Arc::clone(&self.attack_counts),
        ));

        // Faults
        self.inject_faults().await?;
        self.progress.enough.store(true, Ordering::Relaxed);
        self.stay_alive_until(|| publishing.is_finished()).await?;
        let workload = publishing.await.context("publish")??;

        // Recovery
        redriving.abort();
        attacking.abort();
        let stuck = self.heal(workload).await?;
        watchers.iter().for_each(tokio::task::JoinHandle::abort);
        Ok(stuck)
    }

    async fn inject_faults(&mut self) -> Result<()> {
        self.expose().await?;
        let mut end = Instant::now() + self.plan.harm_max;
        let acts = self.acts();
        for act in &acts {
            if Instant::now() > end {
                break;
            }
            let began = Instant::now();
            self.act(*act).await.with_context(|| format!("{act:?}"))?;
            // An outage does not count against the time limit of the other faults.
            if matches!(
                act,
                Act::BrokerAway
                    | Act::DlqFull
                    | Act::DlqGone
                    | Act::Freeze
                    | Act::Vanish
                    | Act::Join
                    | Act::DieWithLeases
            ) {
                end += began.elapsed();
            }
        }
        if self.plan.mutant.is_none() {
            self.repeat_missing(&acts).await?;
        }
        self.kill()
    }

    /// Repeats faults that had no opportunity or no time left.
    async fn repeat_missing(&mut self, acts: &[Act]) -> Result<()> {
        let end = Instant::now() + REPEATED_WITHIN;
        loop {
            let wanted = |act: &Act| acts.iter().filter(|other| *other == act).count() as u64;
            let times = |act: &Act| self.injected.get(&act.label()).copied().unwrap_or_default();
            let Some(act) = acts.iter().copied().find(|act| times(act) < wanted(act)) else {
                return Ok(());
            };
            if Instant::now() > end {
                return Ok(());
            }
            self.act(act).await.with_context(|| format!("{act:?}"))?;
        }
    }

    /// Injects the faults that expose a mutant until each has happened often enough.
    async fn expose(&mut self) -> Result<()> {
        let end = Instant::now() + EXPOSED_WITHIN;
        while let Some(act) = self.next_missing()
            && Instant::now() < end
        {
            self.act(act).await.with_context(|| format!("{act:?}"))?;
        }
        Ok(())
    }

    /// A fault that is still missing to expose a mutant.
    fn next_missing(&mut self) -> Option<Act> {
        let times = |act: Act| self.injected.get(&act.label()).copied().unwrap_or_default();
        let acts = &self.plan.exposure.acts;
        let missing: Vec<Act> = acts
            .iter()
            .filter(|(act, least)| times(*act) < *least)
            .map(|(act, _)| *act)
            .collect();
        if missing.is_empty() && self.passes(fault::MUTANT_ACTED) < self.plan.exposure.harm {
            return acts.first().map(|(act, _)| *act);
        }
        missing.choose(&mut self.random).copied()
    }

    /// Describes the events that are missing to expose a mutant.
    fn unexposed(&mut self, observed: &Observed) -> Vec<String> {
        let mut unexposed: Vec<String> = Vec::new();
        if let Some(act) = self.next_missing() {
            let acted = self.passes(fault::MUTANT_ACTED);
            unexposed.push(format!(
                "{} not injected often enough, or too little harm done ({acted} times)",
                act.label()
            ));
        }
        let taken = self.attack_counts.ids.load(Ordering::Relaxed);
        if taken < self.plan.exposure.taken_ids {
            let least = self.plan.exposure.taken_ids;
            unexposed.push(format!(
                "the stranger took {taken} output ids, expected at least {least}"
            ));
        }
        if let Some((often, least)) = self.plan.exposure.often {
            let published = match often {
                Often::Nature(nature) => observed.published_as(&format!("{nature:?}")),
                Often::IdReuse => observed.id_reuses(),
            };
            if published < least {
                unexposed.push(format!(
                    "{often:?} was published {published} times, expected at least {least}"
                ));
            }
        }
        unexposed
    }

    async fn act(&mut self, act: Act) -> Result<()> {
        match act {
            Act::DieAt(point) => return self.die_at(point).await,
            Act::Kill => {
                self.running().await?;
                self.sleep_randomly(20, 600).await;
                self.world.kill_host()?;
                self.record("host killed");
            }
            Act::Pause => self.pause().await?,
            Act::Terminate => {
                self.running().await?;
                let end_one = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'oncely%' \
                               and application_name not like 'oncely guests%' and datname = current_database() order by random() limit 1";
                if self
                    .world
                    .database
                    .rows(end_one)
                    .await
                    .is_ok_and(|rows| !rows.is_empty())
                {
                    self.record("database connection terminated");
                }
                self.sleep_randomly(20, 150).await;
            }
            Act::StopDatabase => {
                self.running().await?;
                // Its last stop may have interrupted everything.
                let acked = self.passes(fault::AFTER_ACK);
                self.until_acked(acked).await;
                self.sleep_randomly(50, 300).await;
                let time = Duration::from_millis(self.random.random_range(0..800));
                let cluster = self.cluster.as_mut().context("find the cluster")?;
                cluster.stop()?;
                tokio::time::sleep(time).await;
                cluster.start_again()?;
                self.record("database stopped");
            }
            Act::LoseCommits => {
                self.running().await?;
                if self.crash_database().await? {
                    self.record(act.label());
                }
            }
            Act::KillBroker => {
                self.running().await?;
                self.world.nats.kill()?;
                self.sleep_randomly(0, 1_000).await;
                self.world.nats.restart().await?;
                self.record("broker killed");
            }
            Act::RollBack => self.roll_back().await?,
            Act::ChangeRelay => self.change_relay().await?,
            Act::BrokerAway => self.broker_away().await?,
            Act::DlqFull => self.dlq_full().await?,
            Act::DlqGone => self.dlq_gone().await?,
            Act::Freeze => self.freeze().await?,
            Act::Vanish => self.vanish().await?,
            Act::Join => self.join().await?,
            Act::DieWithLeases => self.die_with_leases().await?,
            Act::Cut(cut) => self.cut(cut).await?,
            Act::Deploy => {
                self.running().await?;
                self.new_version()?;
                // The host may be unreachable now; its next start deploys the version.
                if self.world.oncely(&["deploy", "oncely.toml"]).await.is_ok() {
                    self.record("deployed under load");
                }
            }
        }
        Ok(())
    }

    /// Crashes the database between commits of the host, and starts it again. Returns whether
    /// events that were settled before are unknown afterwards.
    async fn crash_database(&mut self) -> Result<bool> {
        let settled =
            "select worker, event_id from oncely.inbox order by settled_at desc limit 500";
        let acked = self.passes(fault::AFTER_ACK);
        self.until_acked(acked).await;
        let before = self.world.database.rows(settled).await?;
        // Settled events are acknowledged meanwhile.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let time = Duration::from_millis(self.random.random_range(0..800));
        let cluster = self.cluster.as_mut().context("find the cluster")?;
        cluster.crash()?;
        tokio::time::sleep(time).await;
        cluster.start_again()?;
        let after = "select worker, event_id from oncely.inbox";
        let after: HashSet<_> = self.world.database.rows(after).await?.into_iter().collect();
        Ok(before.iter().any(|event| !after.contains(event)))
    }

    /// Switches the relay mode under load.
    async fn change_relay(&mut self) -> Result<()> {
        self.running().await?;
        let is_wal = self.is_relay_mode("wal").await?;
        let wanted = if is_wal { "poll" } else { "wal" };
        self.request_relay_mode(wanted).await?;
        let end = Instant::now() + CHANCE;
        while !self.is_relay_mode(wanted).await.unwrap_or_default() {
            if Instant::now() > end {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.sleep_randomly(100, 900).await;
        self.record("relay changed");
        Ok(())
    }

    async fn is_relay_mode(&self, mode: &str) -> Result<bool> {
        let sql = format!("select count(*) from oncely.relay where mode = '{mode}'");
        Ok(self.world.database.number(&sql).await? == 1)
    }

    /// Requests a relay mode the way a host with this setting does at its start.
    async fn request_relay_mode(&self, wanted: &str) -> Result<()> {
        let sql = format!("update oncely.relay set requested_mode = '{wanted}', reason = null");
        self.world.database.execute(&sql).await
    }

    /// Brings the host into the state that leads to a point. Points of WAL mode are passed while
    /// entering it, in it, or while leaving it. Outputs are republished only after a stream lost
    /// them.
    async fn prepare_point(&mut self, point: &'static str) -> Result<()> {
        if point == fault::REPUBLISH {
            self.copy_streams().await?;
            self.kill()?;
            return self.lose_tails().await;
        }
        let needs_poll_mode = self.plan.kind == Kind::Postgres && POLL_MODE_POINTS.contains(&point);
        if !needs_poll_mode && !fault::WAL_POINTS.contains(&point) {
            return Ok(());
        }
        let leaves = point == fault::WAL_LEFT || point == fault::WAL_OUTPUTS_MOVED;
        let first = if needs_poll_mode || point == fault::SLOT_CREATED {
            "poll"
        } else {
            "wal"
        };
        self.running().await?;
        self.request_relay_mode(first).await?;
        let end = Instant::now() + CHANCE;
        while !self.is_relay_mode(first).await.unwrap_or_default() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if needs_poll_mode {
            return Ok(());
        }
        if leaves {
            // Leave unread changes in the WAL.
            self.sleep_randomly(100, 400).await;
        }
        self.kill()?;
        self.request_relay_mode(if leaves { "poll" } else { "wal" })
            .await
    }

    /// Starts hosts with a fault point until one dies there.
    async fn die_at(&mut self, point: &'static str) -> Result<()> {
        for attempt in 0..3 {
            self.prepare_point(point).await?;
            let nth = if attempt == 0 {
                self.random.random_range(1..=passes_until_death(point))
            } else {
                1
            };
            self.kill()?;
            if point == fault::DEPLOY_SWAP {
                self.new_version()?;
            }
            self.arm(Some(format!("{point}:{nth}")));
            self.world.spawn_host()?;
            let end = Instant::now() + CHANCE;
            while Instant::now() < end && self.world.is_host_running() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            self.arm(None);
            if !self.world.is_host_running() {
                self.record(format!("died at {point}"));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Pauses the host for longer than the broker waits. Where possible, another host takes over.
    async fn pause(&mut self) -> Result<()> {
        self.running().await?;
        let rival = if self.rivals {
            Some(self.world.spawn_rival()?)
        } else {
            None
        };
        self.sleep_randomly(300, 900).await;
        let pid = self.world.host_pid().context("find the host")?;
        signal(pid, "STOP")?;
        tokio::time::sleep(ACK_WAIT + Duration::from_millis(1_500)).await;
        signal(pid, "CONT")?;
        self.record("host paused");
        if let Some(mut rival) = rival {
            self.sleep_randomly(200, 600).await;
            rival.kill().context("kill the rival")?;
            rival.wait().context("wait for the rival")?;
            self.record("rival host killed");
        }
        Ok(())
    }

    /// Suspends the host for a long time and resumes it. Where possible, another host runs
    /// meanwhile.
    async fn freeze(&mut self) -> Result<()> {
        self.running().await?;
        let rival = self.rival().await?;
        let pid = self.world.host_pid().context("find the host")?;
        signal(pid, "STOP")?;
        tokio::time::sleep(self.plan.harm.frozen).await;
        signal(pid, "CONT")?;
        self.record(Act::Freeze.label());
        self.end_rival(rival).await
    }

    /// Holds all traffic of the host for a long time, without closing a connection.
    async fn vanish(&mut self) -> Result<()> {
        self.running().await?;
        let rival = self.rival().await?;
        self.set_blackhole(true);
        tokio::time::sleep(self.plan.harm.frozen).await;
        self.set_blackhole(false);
        self.record(Act::Vanish.label());
        self.end_rival(rival).await
    }

    fn set_blackhole(&self, is_blackhole: bool) {
        self.to_nats.set_blackhole(is_blackhole);
        self.to_database
            .iter()
            .for_each(|proxy| proxy.set_blackhole(is_blackhole));
    }

    /// A second host with direct connections to its servers, on a shared database only.
    async fn rival(&mut self) -> Result<Option<std::process::Child>> {
        let rival = if self.rivals {
            Some(self.world.spawn_rival_directly()?)
        } else {
            None
        };
        self.sleep_randomly(1_500, 3_000).await;
        Ok(rival)
    }

    async fn end_rival(&mut self, rival: Option<std::process::Child>) -> Result<()> {
        self.sleep_randomly(200, 600).await;
        let Some(mut rival) = rival else {
            return Ok(());
        };
        rival.kill().context("kill the rival")?;
        rival.wait().context("wait for the rival")?;
        self.record("rival host killed");
        Ok(())
    }

    /// The host dies with leased outputs and restarts at once. The outputs must not wait for their
    /// leases to run out.
    async fn die_with_leases(&mut self) -> Result<()> {
        self.die_at(fault::BEFORE_PUBLISH).await?;
        if self.world.is_host_running() {
            return Ok(());
        }
        let last = self
            .world
            .database
            .number("select coalesce(max(seq), 0) from oncely.outbox")
            .await?;
        let poll_condition = if self.plan.kind == Kind::Postgres {
            " and (via = 'poll' or seq in (select seq from oncely.group_backlog))"
        } else {
            ""
        };
        let waiting = format!(
            "select count(*) from oncely.outbox where seq <= {last} and published_at is null and failures = 0
             and blocked_by is null and parked_at is null{poll_condition}"
        );
        let left = self.world.database.number(&waiting).await?;
        self.ready().await?;
        let back = Instant::now();
        while self.world.database.number(&waiting).await.unwrap_or(left) > 0 {
            if back.elapsed() > LEASE_TAKEOVER_MAX {
                let what = format!(
                    "{left} outputs of a dead host still wait {LEASE_TAKEOVER_MAX:?} after its restart"
                );
                self.lagging.push(Violation {
                    rule: "takeover",
                    what,
                });
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if left > 0 {
            self.record(Act::DieWithLeases.label());
        }
        Ok(())
    }

    /// A host of another installation connects to the same NATS server. It must not take a message.
    async fn join(&mut self) -> Result<()> {
        self.running().await?;
        let file = self.world.folder.path().join("other.db");
        let mut other = self.world.spawn_other_installation(&file)?;
        let end = Instant::now() + CHANCE;
        while Instant::now() < end && other.try_wait().context("poll the other host")?.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let is_refused = other
            .try_wait()
            .context("poll the other host")?
            .is_some_and(|status| !status.success());
        other.kill().context("kill the other host")?;
        other.wait().context("wait for the other host")?;
        let taken = Database::Sqlite(file)
            .number("select count(*) from oncely.inbox")
            .await
            .unwrap_or_default();
        if is_refused && taken == 0 {
            self.record(Act::Join.label());
        } else {
            let ending = if is_refused {
                "was refused"
            } else {
                "was not refused"
            };
            let what = format!("a second installation {ending} and settled {taken} messages");
            self.lagging.push(Violation {
                rule: "one installation",
                what,
            });
        }
        Ok(())
    }

    /// Restarts the broker with an older copy of the host's streams.
    async fn roll_back(&mut self) -> Result<()> {
        self.copy_streams().await?;
        self.lose_tails().await
    }

    /// Copies the streams and lets the host publish more.
    async fn copy_streams(&mut self) -> Result<()> {
        self.running().await?;
        self.world.nats.kill()?;
        ROLLED_BACK
            .iter()
            .try_for_each(|stream| self.world.nats.copy_stream(stream))?;
        self.world.nats.restart().await?;
        self.sleep_randomly(500, 3_000).await;
        Ok(())
    }

    async fn lose_tails(&mut self) -> Result<()> {
        self.world.nats.kill()?;
        ROLLED_BACK
            .iter()
            .try_for_each(|stream| self.world.nats.roll_back_stream(stream))?;
        self.world.nats.restart().await?;
        self.record("streams rolled back");
        Ok(())
    }

    /// Stops the broker for a long time and restarts it with the same data.
    async fn broker_away(&mut self) -> Result<()> {
        self.working().await?;
        self.world.nats.kill()?;
        tokio::time::sleep(self.plan.harm.outage).await;
        ensure!(
            self.world.is_host_running(),
            "the host exited without a broker:\n{}",
            tail(&self.world.host_log())
        );
        self.world.nats.restart().await?;
        self.record("long broker outage");
        self.catch_up("the broker outage").await
    }

    /// The dead-letter stream is full while messages die.
    async fn dlq_full(&mut self) -> Result<()> {
        self.working().await?;
        self.world.nats.fill_stream(DLQ, true).await?;
        tokio::time::sleep(self.plan.harm.dlq_outage).await;
        self.world.nats.fill_stream(DLQ, false).await?;
        self.record("dead-letter stream full");
        self.catch_up("the full dead-letter stream").await
    }

    /// The dead-letter stream is deleted while messages die, and recreated. Outputs parked
    /// meanwhile are requeued with a command.
    async fn dlq_gone(&mut self) -> Result<()> {
        self.working().await?;
        let config = self.world.nats.delete_stream(DLQ).await?;
        tokio::time::sleep(self.plan.harm.dlq_outage).await;
        self.world.nats.recreate_stream(config).await?;
        self.record("dead-letter stream deleted");
        self.world.oncely(&["outbox", "retry", "--all"]).await?;
        // One more output may have been parked just as the stream was recreated.
        tokio::time::sleep(Duration::from_secs(2)).await;
        self.world.oncely(&["outbox", "retry", "--all"]).await?;
        self.catch_up("the deletion of the dead-letter stream")
            .await
    }

    /// Waits until the host answers and messages flow.
    async fn working(&mut self) -> Result<()> {
        self.ready().await?;
        // Leases of dead hosts must not count against this outage.
        let end = Instant::now() + CATCH_UP_WITHIN;
        while Instant::now() < end
            && unpublished_age(&self.world)
                .await
                .is_none_or(|age| age >= 1.0)
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.sleep_randomly(500, 1_500).await;
        Ok(())
    }

    /// Checks that outputs are published within a second again, under load, in time after an
    /// outage.
    async fn catch_up(&mut self, after: &'static str) -> Result<()> {
        let (began, mut last, mut below) = (Instant::now(), None, 0);
        while below < CAUGHT_UP_SAMPLES {
            if began.elapsed() > CATCH_UP_WITHIN {
                let what = format!(
                    "{CATCH_UP_WITHIN:?} after {after} the oldest unpublished output is {last:?} s old"
                );
                self.lagging.push(Violation { rule: "lag", what });
                return Ok(());
            }
            last = unpublished_age(&self.world).await;
            below = if last.is_some_and(|age| age < 1.0) {
                below + 1
            } else {
                0
            };
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let took = began.elapsed().as_millis();
        self.caught_up.insert(after, u64::try_from(took)?);
        Ok(())
    }

    async fn cut(&mut self, cut: Cut) -> Result<()> {
        self.running().await?;
        let proxy = match cut {
            Cut::OutputsNotForwarded | Cut::OutputAnswersLost => &self.to_nats,
            _ => self
                .to_database
                .as_ref()
                .context("find the proxy to the database")?,
        };
        if !proxy.cut(cut, CHANCE).await {
            return Ok(());
        }
        if cut == Cut::CommitAnswerHeld {
            self.world.kill_host()?;
        }
        self.record(Act::Cut(cut).label());
        Ok(())
    }

    /// Waits until a host is ready. A start that a cut broke is repeated, like a supervisor does.
    async fn ready(&mut self) -> Result<()> {
        for _ in 0..STARTS {
            self.running().await?;
            match self.world.ready().await {
                Err(_) if !self.world.is_host_running() => {}
                ready => return ready,
            }
        }
        self.world.ready().await
    }

    /// Waits until a running host has settled a message since the last check.
    async fn running(&mut self) -> Result<()> {
        if self.world.is_host_running() {
            return Ok(());
        }
        let acked = self.passes(fault::AFTER_ACK);
        self.arm(None);
        self.world.spawn_host()?;
        self.until_acked(acked).await;
        Ok(())
    }

    /// Waits until the host has acknowledged more messages than `acked`, while it runs.
    async fn until_acked(&mut self, acked: u64) {
        let end = Instant::now() + CHANCE;
        while Instant::now() < end
            && self.world.is_host_running()
            && self.passes(fault::AFTER_ACK) == acked
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn kill(&mut self) -> Result<()> {
        if self.world.is_host_running() {
            self.record("host killed between faults");
        }
        self.world.kill_host()
    }

    async fn sleep_randomly(&mut self, from_ms: u64, to_ms: u64) {
        let time = self.random.random_range(from_ms..=to_ms);
        tokio::time::sleep(Duration::from_millis(time)).await;
    }

    /// The counts of the fault log so far, by `pass name` and `abort name`.
    fn fault_log_counts(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        let log = std::fs::read_to_string(self.world.folder.path().join("faults.log"))
            .unwrap_or_default();
        for line in log.lines() {
            *counts.entry(line.to_owned()).or_default() += 1;
        }
        counts
    }

    fn passes(&self, name: &str) -> u64 {
        self.fault_log_counts()
            .get(&format!("pass {name}"))
            .copied()
            .unwrap_or_default()
    }

    async fn stay_alive_until(&mut self, done: impl Fn() -> bool) -> Result<()> {
        while !done() {
            self.running().await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Waits until no work remains, publishes a few more messages, and waits again. Returns the
    /// reason if work remains.
    async fn heal(&mut self, mut workload: Workload) -> Result<Option<String>> {
        self.running().await?;
        if let Some(stuck) = self.until_quiet().await? {
            return Ok(Some(stuck));
        }
        self.redriver()?.redrive_the_rest().await?;
        if let Some(stuck) = self.until_quiet().await? {
            return Ok(Some(format!("after the redrive: {stuck}")));
        }

        // The host must still settle new messages.
        let settled = self
            .world
            .database
            .number("select count(*) from oncely.inbox")
            .await?;
        let more = (0..10).map(|_| workload.next_message()).collect();
        let context = async_nats::jetstream::new(self.world.nats.client().await?);
        publisher::publish_until_acked(&context, more, &self.progress).await?;
        if let Some(stuck) = self.until_quiet().await? {
            return Ok(Some(format!("after the last messages: {stuck}")));
        }

        // The last messages may have died, too.
        self.redriver()?.redrive_the_rest().await?;
        if let Some(stuck) = self.until_quiet().await? {
            return Ok(Some(format!("after the last redrive: {stuck}")));
        }
        let after = self
            .world
            .database
            .number("select count(*) from oncely.inbox")
            .await?;
        Ok((after <= settled).then(|| "none of the last messages was settled".to_owned()))
    }

    /// Waits until no work remains, as long as there is progress. Leases of a dead host run for
    /// half a minute.
    async fn until_quiet(&mut self) -> Result<Option<String>> {
        let patience = Duration::from_secs(if self.plan.mutant.is_some() { 38 } else { 60 });
        let mut last = (Instant::now(), String::new());
        loop {
            if !self.world.is_host_running() {
                return Ok(Some(format!(
                    "the host exited:\n{}",
                    tail(&self.world.host_log())
                )));
            }
            let unsettled = match observed::unsettled(&self.world.database, &self.world.nats).await
            {
                Ok(unsettled) if unsettled.is_empty() => return Ok(None),
                Ok(unsettled) => unsettled.join(", "),
                Err(error) => format!("{error:#}"),
            };
            if unsettled != last.1 {
                last = (Instant::now(), unsettled);
            } else if last.0.elapsed() > patience {
                return Ok(Some(format!("no progress for {patience:?}: {}", last.1)));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn conclude(mut self, stuck: Option<String>, began: Instant) -> Result<CampaignReport> {
        // Facts
        let mut observed = Observed::read(&self.world.database, &self.world.nats).await?;
        observed.unsettled.extend(stuck);
        observed.acked = std::mem::take(&mut *self.progress.acked.lock().unwrap());
        observed.too_early = std::mem::take(&mut *self.watcher_report.too_early.lock().unwrap());
        observed.deaths = self
            .injected
            .iter()
            .filter(|(what, _)| is_death(what))
            .map(|(_, count)| count)
            .sum();
        observed.lanes = self.plan.lanes.into();

        // Rules
        let (counted, mut violations) = checker::check(&observed);
        let unexposed = self.unexposed(&observed);
        let seen = self.seen();
        if self.plan.mutant.is_none() {
            violations.extend(self.missing_coverage(&seen, &counted));
        }
        violations.append(&mut self.lagging);
        let kept = if violations.is_empty() {
            None
        } else {
            Some(self.keep(&violations).await?)
        };

        // Report
        let seconds = began.elapsed().as_secs();
        Ok(CampaignReport {
            plan: self.plan.clone(),
            injected: self.injected.clone(),
            seen,
            counted,
            violations,
            unexposed,
            seconds,
            kept,
        })
    }

    fn seen(&self) -> BTreeMap<String, u64> {
        let counts = self.fault_log_counts();
        let passes = |name: &str| {
            counts
                .get(&format!("pass {name}"))
                .copied()
                .unwrap_or_default()
        };
        let caught_up = self.caught_up.iter();
        let caught_up = caught_up.map(|(after, ms)| (format!("ms to catch up after {after}"), *ms));
        let mut seen = BTreeMap::from([
            (
                "duplicates skipped".to_owned(),
                passes(fault::DUPLICATE_SKIPPED),
            ),
            (
                "outputs already stored by the broker".to_owned(),
                passes(fault::DUPLICATE_OUTPUT),
            ),
            ("batches rerun".to_owned(), passes(fault::BEFORE_RERUN)),
            (
                "outputs compared with their effect".to_owned(),
                self.watcher_report.outputs.load(Ordering::Relaxed),
            ),
            (
                "ledger snapshots".to_owned(),
                self.watcher_report.snapshots.load(Ordering::Relaxed),
            ),
            (
                "ids guessed by the stranger".to_owned(),
                self.attack_counts.guesses.load(Ordering::Relaxed),
            ),
            (
                "ids taken by the stranger".to_owned(),
                self.attack_counts.ids.load(Ordering::Relaxed),
            ),
            (
                "pointers forged by the stranger".to_owned(),
                self.attack_counts.pointers.load(Ordering::Relaxed),
            ),
            (
                "aborts".to_owned(),
                counts
                    .iter()
                    .filter(|(line, _)| line.starts_with("abort"))
                    .map(|(_, n)| n)
                    .sum(),
            ),
        ]);
        seen.extend(caught_up);
        seen
    }

    /// Faults and events that should have happened and did not: a run without them proves little.
    fn missing_coverage(
        &mut self,
        seen: &BTreeMap<String, u64>,
        counted: &Counted,
    ) -> Vec<Violation> {
        // Faults of the plan
        let mut floors: BTreeMap<String, u64> = BTreeMap::new();
        for act in self.acts() {
            *floors.entry(act.label()).or_default() += 1;
        }
        let mut found = self.injected.clone();

        // Some attempts may find no connection to terminate.
        floors
            .entry("database connection terminated".to_owned())
            .and_modify(|floor| *floor = floor.div_ceil(2));

        // Observed events
        for name in [
            "duplicates skipped",
            "outputs already stored by the broker",
            "batches rerun",
        ] {
            floors.insert(name.to_owned(), 1);
            found.insert(name.to_owned(), seen.get(name).copied().unwrap_or_default());
        }
        for (what, least) in [
            ("ids guessed by the stranger", 1_000),
            ("ids taken by the stranger", 20),
        ] {
            floors.insert(what.to_owned(), least);
            found.insert(what.to_owned(), seen.get(what).copied().unwrap_or_default());
        }
        let forged = "pointers forged by the stranger";
        floors.insert(forged.to_owned(), 100);
        found.insert(
            forged.to_owned(),
            seen.get(forged).copied().unwrap_or_default(),
        );
        floors.insert("redriven dead letters with an effect".to_owned(), 1);
        found.insert(
            "redriven dead letters with an effect".to_owned(),
            counted.redriven as u64,
        );

        // Messages and effects
        floors.insert("inputs".to_owned(), self.plan.inputs);
        found.insert("inputs".to_owned(), counted.inputs as u64);
        floors.insert("percentage of events with an effect".to_owned(), 95);
        let share = counted.effects * 100 / counted.events.max(1);
        found.insert(
            "percentage of events with an effect".to_owned(),
            share as u64,
        );

        let short = |(name, floor): (String, u64)| {
            let found = found.get(&name).copied().unwrap_or_default();
            let what = format!("{name}: {found}, expected at least {floor}");
            (found < floor).then_some(Violation {
                rule: "not vacuous",
                what,
            })
        };
        floors.into_iter().filter_map(short).collect()
    }

    /// Copies evidence out of the folder that is about to be removed.
    async fn keep(&self, violations: &[Violation]) -> Result<std::path::PathBuf> {
        let target = guests::target_dir()?
            .parent()
            .context("find the target folder")?
            .join("chaos");
        let name = format!(
            "{:?}-{}{}",
            self.plan.kind,
            self.plan.seed,
            self.plan.mutant.clone().unwrap_or_default()
        );
        let folder = target.join("kept").join(name.to_lowercase());
        std::fs::create_dir_all(&folder).context("create the folder for evidence")?;
        let list: Vec<String> = violations
            .iter()
            .map(|found| format!("{}: {}\n", found.rule, found.what))
            .collect();
        std::fs::write(folder.join("violations.txt"), list.concat())
            .context("write the violations")?;
        let rows =
            "select seq, id, subject, ordering_key, due_at, leased_until, blocked_by, parked_at, failures, last_error
            from oncely.outbox where published_at is null order by seq";
        let unpublished = self.world.database.rows(rows).await.unwrap_or_default();
        let unpublished: String = unpublished
            .iter()
            .map(|row| row.join(" | ") + "\n")
            .collect();
        std::fs::write(folder.join("unpublished.txt"), unpublished)
            .context("write the unpublished outputs")?;
        for file in [
            "host.log",
            "faults.log",
            "oncely.toml",
            "test.db",
            "test.db-wal",
        ] {
            // Some files exist on one database only.
            let _ = std::fs::copy(self.world.folder.path().join(file), folder.join(file));
        }
        Ok(folder)
    }
}

fn is_death(what: &str) -> bool {
    what.starts_with("died at") || what.contains("host killed")
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
