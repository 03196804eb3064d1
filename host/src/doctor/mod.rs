//! `oncely doctor`: checks the servers, the machine and the settings that a host needs.
//!
//! `bus` and `store` read facts; the functions here judge them, without IO. A check never changes
//! anything, and an unreachable server is a finding like any other. So the checks run inside of a
//! host as well as without one.

use std::time::Duration;

use anyhow::{Result, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bus::{Bus, NO_SERVER_HINT, OtherInstallation, StreamFacts};
use crate::config::manifest::Worker;
use crate::config::{Database, GuestSql, HostConfig, RelayMode};
use crate::consumer;
use crate::model::clock_reading::ClockReading;
use crate::model::hint::{self, WithHint as _};
use crate::runtime::{HostReport, Retention, own_streams};
use crate::store::inspection::{
    self, NoSchema, PlatformFacts, PostgresFacts, PostgresOptions, SqliteFacts,
};

mod checks;
mod clocks;
mod hosts;
mod machine;
mod nats;
mod oidc;
mod postgres;

pub use checks::ALL as CHECKS;
use checks::{Check, NATS_OWNER, NATS_REACHABLE, POSTGRES_REACHABLE, SCHEMA, SQLITE_FILE};
use nats::{Deployed, WorkerConsumer};

/// How long NATS may take to accept a connection, and then to answer all questions. The database
/// has one limit for both. Together they are below ten seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
const READ_TIMEOUT: Duration = Duration::from_secs(4);
const DATABASE_TIMEOUT: Duration = Duration::from_secs(5);

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// The name of the check.
    pub check: String,
    pub level: Level,
    /// The observation, in words.
    pub found: String,
    /// Why it matters.
    pub reason: String,
    /// A command or a setting; none if all is well.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fix: Option<String>,
}

/// The weight of a finding.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "FindingLevel")]
pub enum Level {
    Ok,
    /// It could be better.
    Advice,
    /// It is wrong, or will be soon.
    Problem,
}

/// All findings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DoctorReport")]
pub struct Report {
    pub findings: Vec<Finding>,
}

/// The running host that is examined.
pub struct Running {
    /// The name in its reports, such as `web-1:4711`.
    pub name: String,
    /// The broken workers, or the reason that it is not ready.
    pub readiness: std::result::Result<Vec<String>, String>,
}

impl Report {
    /// The number of findings at a level.
    pub fn count(&self, level: Level) -> usize {
        let findings = self.findings.iter();
        findings.filter(|finding| finding.level == level).count()
    }
}

/// The facts about the database that the other checks need.
#[derive(Default)]
struct DatabaseFindings {
    findings: Vec<Finding>,
    /// The deployed workers.
    workers: Vec<Worker>,
    /// The id of the installation.
    installation: Option<String>,
    reports: Vec<HostReport>,
    clock: Option<ClockReading>,
}

/// Examines the servers and this machine for a configuration. `running` is the host of this
/// process, if there is one.
pub async fn examine(config: &HostConfig, running: Option<&Running>) -> Report {
    let mut findings = Vec::new();
    if let Some(running) = running {
        findings.extend(hosts::judge_readiness(&running.readiness));
    }

    // Both servers at the same time, as each may take until its timeout.
    let (database, bus, provider) = tokio::join!(
        examine_database(config),
        connect(config),
        oidc::judge(config)
    );
    let mut clocks: Vec<(&str, ClockReading)> = Vec::new();
    clocks.extend(database.clock.map(|reading| ("PostgreSQL", reading)));

    match bus {
        Err(error) => findings.push(failed(NATS_REACHABLE, &error, NO_SERVER_HINT)),
        Ok(bus) => {
            findings.push(NATS_REACHABLE.ok(format!("NATS answers at {}", config.nats.redacted())));
            let read = examine_nats(config, bus, &database);
            match tokio::time::timeout(READ_TIMEOUT, read).await {
                Ok((found, clock)) => {
                    findings.extend(found);
                    clocks.extend(clock.map(|reading| ("NATS", reading)));
                }
                Err(_) => findings.push(NATS_REACHABLE.problem(
                    format!("JetStream does not answer within {READ_TIMEOUT:?}"),
                    "check the servers of the cluster: nats server report jetstream",
                )),
            }
        }
    }
    findings.extend(database.findings);
    findings.extend(clocks::judge(&clocks));
    findings.extend(machine::judge(config));
    findings.extend(provider);
    let this = running.map_or("this configuration", |running| running.name.as_str());
    findings.extend(hosts::judge_settings(
        this,
        &config.shared_settings(),
        &database.reports,
    ));
    Report { findings }
}

/// Judges the streams of a running host: those of its workers, and the platform's own. Returns the
/// facts of all streams as well.
///
/// # Errors
/// NATS failed, or did not answer in time.
pub async fn examine_streams(
    config: &HostConfig,
    bus: &Bus,
    workers: &[Worker],
) -> Result<(Vec<StreamFacts>, Vec<Finding>)> {
    let facts = tokio::time::timeout(READ_TIMEOUT, bus.stream_facts()).await;
    let streams =
        facts.map_err(|_| anyhow!("JetStream does not answer within {READ_TIMEOUT:?}"))??;
    let own: Vec<String> = own_streams(true)
        .into_iter()
        .map(|spec| spec.name)
        .collect();
    let deployed = Deployed {
        streams: &streams,
        workers,
        own: &own,
    };
    let findings = nats::judge_streams(&deployed, &Retention::of(config));
    Ok((streams, findings))
}

/// The finding of a check that failed with an error, with the error's own hint as the fix.
fn failed(check: Check, error: &anyhow::Error, fix: &str) -> Finding {
    let hint = hint::hints(error).first().map(|hint| (*hint).to_owned());
    check.problem(format!("{error:#}"), hint.unwrap_or_else(|| fix.to_owned()))
}

async fn connect(config: &HostConfig) -> Result<Bus> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, Bus::connect(&config.nats)).await;
    connected.unwrap_or_else(|_| {
        let server = config.nats.redacted();
        Err(
            anyhow!("NATS at {server} does not answer within {CONNECT_TIMEOUT:?}")
                .hint(NO_SERVER_HINT),
        )
    })
}

/// Judges NATS for the deployed workers; without a database none are known. Returns the clock of
/// the server as well.
async fn examine_nats(
    config: &HostConfig,
    bus: Bus,
    database: &DatabaseFindings,
) -> (Vec<Finding>, Option<ClockReading>) {
    let mut findings = Vec::new();
    let bus = match &database.installation {
        Some(id) => bus.for_installation(id, config.take_over.clone()),
        None => bus,
    };
    let fix = "nats server report jetstream";
    let (server, streams) = match (bus.server_facts().await, bus.stream_facts().await) {
        (Ok(server), Ok(streams)) => (server, streams),
        (Err(error), _) | (_, Err(error)) => {
            return (vec![failed(NATS_REACHABLE, &error, fix)], None);
        }
    };
    findings.extend(nats::judge_server(&server));

    // The owner of the platform's streams.
    let own: Vec<String> = own_streams(true)
        .into_iter()
        .map(|spec| spec.name)
        .collect();
    let existing: Vec<&String> = own
        .iter()
        .filter(|name| streams.iter().any(|facts| facts.stream.name == **name))
        .collect();
    let mut clock = None;
    if database.installation.is_some() {
        findings.push(owner(&bus, &existing).await);
    }
    if let Some(name) = streams.first().map(|facts| &facts.stream.name) {
        clock = bus.clock(name).await.ok().flatten();
    }

    // The streams and consumers of the workers.
    let deployed = Deployed {
        streams: &streams,
        workers: &database.workers,
        own: &own,
    };
    findings.extend(nats::judge_streams(&deployed, &Retention::of(config)));
    let mut consumers = Vec::new();
    for worker in &database.workers {
        let Some(stream) = &worker.stream else {
            continue;
        };
        for subscription in consumer::subscriptions(worker, stream) {
            if !streams
                .iter()
                .any(|facts| facts.stream.name == subscription.stream)
            {
                continue;
            }
            match bus.consumer_facts(&subscription).await {
                Ok(facts) => consumers.push(WorkerConsumer {
                    durable: subscription.durable,
                    stream: subscription.stream,
                    facts,
                }),
                Err(error) => findings.push(failed(checks::CONSUMER_SETTINGS, &error, fix)),
            }
        }
    }
    findings.extend(nats::judge_consumers(&consumers));
    (findings, clock)
}

async fn owner(bus: &Bus, own: &[&String]) -> Finding {
    for name in own {
        if let Err(error) = bus.check_owner(name).await
            && hint::find_cause::<OtherInstallation>(&error).is_some()
        {
            return failed(
                NATS_OWNER,
                &error,
                "use a NATS account for each installation",
            );
        }
    }
    NATS_OWNER.ok("the platform's streams belong to this installation, or to none yet")
}

async fn examine_database(config: &HostConfig) -> DatabaseFindings {
    let limit = DATABASE_TIMEOUT;
    let (check, inspected) = match &config.database {
        Database::Postgres(url) => {
            let options = postgres_options(config, url);
            let read = inspection::inspect_postgres(url, &options);
            let read = tokio::time::timeout(limit, read).await;
            let read = read.unwrap_or_else(|_| Err(anyhow!("no answer within {limit:?}")));
            (
                POSTGRES_REACHABLE,
                read.map(|facts| judge_postgres(config, facts)),
            )
        }
        Database::Sqlite(path) => {
            let read = tokio::time::timeout(limit, inspection::inspect_sqlite(path)).await;
            let read = read.unwrap_or_else(|_| Err(anyhow!("no answer within {limit:?}")));
            (SQLITE_FILE, read.map(|facts| judge_sqlite(config, &facts)))
        }
    };
    inspected.unwrap_or_else(|error| {
        let database = config.database.redacted();
        let error = error.context(format!("read the database {database}"));
        let fix = "start the server, or set the database with --database URL or ONCELY_DATABASE";
        DatabaseFindings {
            findings: vec![failed(check, &error, fix)],
            ..DatabaseFindings::default()
        }
    })
}

fn postgres_options(config: &HostConfig, url: &str) -> PostgresOptions {
    let wal_url = match &config.relay_database {
        Some(Database::Postgres(url)) => url,
        _ => url,
    };
    PostgresOptions {
        has_roles: config.guest_sql == GuestSql::Restricted,
        requests_wal: config.relay == Some(RelayMode::Wal),
        wal_url: wal_url.to_owned(),
    }
}

fn judge_postgres(config: &HostConfig, facts: PostgresFacts) -> DatabaseFindings {
    // A configuration without a host will be one more host.
    let hosts = (facts.platform.reports.len() as u64).max(1);
    let usage = postgres::Usage {
        pool_size: config.pool_size,
        hosts,
        requests_wal: config.relay == Some(RelayMode::Wal),
    };
    let mut judged = judge_platform(&facts.platform);
    let mut findings = postgres::judge(&facts, usage);
    findings.append(&mut judged.findings);
    DatabaseFindings {
        findings,
        clock: Some(facts.clock),
        ..judged
    }
}

fn judge_sqlite(config: &HostConfig, facts: &SqliteFacts) -> DatabaseFindings {
    let shown = config.database.redacted();
    let file = match facts.has_wal {
        None => SQLITE_FILE.ok(format!("{shown} does not exist yet; a host creates it")),
        Some(true) => SQLITE_FILE.ok(format!(
            "{shown} uses a write-ahead log, and hosts write with synchronous = full"
        )),
        Some(false) => SQLITE_FILE.advice(
            format!("{shown} uses no write-ahead log"),
            "start a host, which sets it; or: sqlite3 FILE 'pragma journal_mode = wal'",
        ),
    };
    let mut judged = if facts.exists {
        judge_platform(&facts.platform)
    } else {
        DatabaseFindings::default()
    };
    judged.findings.insert(0, file);
    judged
}

fn judge_platform(facts: &PlatformFacts) -> DatabaseFindings {
    let schema = match &facts.schema_error {
        None => SCHEMA.ok("the schema is that of this version"),
        Some(error) if hint::find_cause::<NoSchema>(error).is_some() => SCHEMA.advice(
            format!("{error:#}"),
            "start a host, which creates it: oncely run",
        ),
        Some(error) => failed(SCHEMA, error, "use the program that created the schema"),
    };
    let workers = facts.deployments.iter();
    let workers = workers.filter_map(|record| serde_json::from_str(&record.manifest).ok());
    let reports = facts.reports.iter();
    let reports = reports.filter_map(|report| HostReport::parse(report).ok().flatten());
    DatabaseFindings {
        findings: vec![schema],
        workers: workers.collect(),
        installation: facts.installation.clone(),
        reports: reports.collect(),
        clock: None,
    }
}
