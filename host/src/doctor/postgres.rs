//! The judgement of a PostgreSQL server.

use std::time::Duration;

use super::checks::{
    POSTGRES_COMMIT, POSTGRES_CONNECTIONS, POSTGRES_DURABILITY, POSTGRES_ENCODING, POSTGRES_IDLE,
    POSTGRES_REACHABLE, POSTGRES_ROLES, POSTGRES_SLOTS, POSTGRES_STANDBYS,
    POSTGRES_TRANSACTION_AGE, POSTGRES_VACUUM, POSTGRES_VERSION, POSTGRES_WAL,
};
use super::{Finding, failed};
use crate::model::units::{format_duration, format_size};
use crate::store::inspection::{PostgresFacts, RoleFacts, SlotFacts};

/// The oldest supported version.
const VERSION_MIN: u32 = 15;

/// An idle transaction older than this is reported.
const IDLE_MAX: Duration = Duration::from_secs(5 * 60);

/// WAL kept for a slot: an inactive slot with more is a problem, any slot with four times as much.
const RETAINED_MAX: u64 = 1 << 30;

/// Dead rows of a table count from this number and this share of its live rows on.
const DEAD_ROWS_MIN: u64 = 100_000;

/// The ages at which transaction ids are reported. Autovacuum freezes from 200 million on.
const AGE_ADVICE: u64 = 500_000_000;
const AGE_PROBLEM: u64 = 1_500_000_000;

/// How the hosts use the server.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// The pool of each host.
    pub pool_size: u32,
    /// The number of live hosts, this one included.
    pub hosts: u64,
    /// Whether the configuration requests WAL mode.
    pub requests_wal: bool,
}

/// Judges a server.
pub fn judge(facts: &PostgresFacts, usage: Usage) -> Vec<Finding> {
    let mut findings = vec![
        reachable(facts),
        version(facts),
        durability(facts),
        commit(facts),
        standbys(facts),
        connections(facts, usage),
        idle(facts),
        wal(facts, usage),
    ];
    findings.extend(slots(facts));
    findings.extend(roles(facts));
    findings.extend(vacuum(facts));
    findings.push(transaction_age(facts));
    findings.push(encoding(facts));
    findings
}

/// A quoted identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn setting<'f>(facts: &'f PostgresFacts, name: &str) -> &'f str {
    facts.settings.get(name).map_or("", String::as_str)
}

fn reachable(facts: &PostgresFacts) -> Finding {
    let (database, user) = (&facts.database, &facts.user);
    if facts.is_standby {
        return POSTGRES_REACHABLE.problem(
            format!("the server of the database {database} is a standby and takes no writes"),
            "set `database` to the URL of the primary server",
        );
    }
    POSTGRES_REACHABLE.ok(format!(
        "the database {database} answers, and the host logs in as {user}"
    ))
}

fn version(facts: &PostgresFacts) -> Finding {
    let (major, minor) = (facts.version / 10_000, facts.version % 10_000);
    let found = format!("PostgreSQL {major}.{minor}");
    if major < VERSION_MIN {
        return POSTGRES_VERSION.problem(found, "upgrade to PostgreSQL 15 or newer: pg_upgrade");
    }
    POSTGRES_VERSION.ok(found)
}

fn durability(facts: &PostgresFacts) -> Finding {
    let off: Vec<&str> = ["fsync", "full_page_writes"]
        .into_iter()
        .filter(|name| setting(facts, name) == "off")
        .collect();
    if off.is_empty() {
        return POSTGRES_DURABILITY.ok("fsync and full_page_writes are on");
    }
    let statements: Vec<String> = off
        .iter()
        .map(|name| format!("alter system set {name} = on;"))
        .collect();
    POSTGRES_DURABILITY.problem(
        format!("{} is off", off.join(" and ")),
        format!("{} select pg_reload_conf()", statements.join(" ")),
    )
}

fn commit(facts: &PostgresFacts) -> Finding {
    let value = setting(facts, "synchronous_commit");
    if value == "off" {
        return POSTGRES_COMMIT.advice(
            "synchronous_commit is off for new sessions",
            "alter system set synchronous_commit = on; select pg_reload_conf()",
        );
    }
    POSTGRES_COMMIT.ok(format!("synchronous_commit is {value}"))
}

fn standbys(facts: &PostgresFacts) -> Finding {
    let standbys = &facts.standbys;
    let names = setting(facts, "synchronous_standby_names");
    if !standbys.is_visible {
        return POSTGRES_STANDBYS.advice(
            format!(
                "{} standbys are connected, and {} may not see their state",
                standbys.connected, facts.user
            ),
            format!("grant pg_monitor to {}", quoted(&facts.user)),
        );
    }
    if !names.is_empty() && standbys.synchronous == 0 {
        return POSTGRES_STANDBYS.problem(
            format!("synchronous_standby_names is `{names}`, and no such standby is connected"),
            "start the standby, or as a superuser: \
             alter system reset synchronous_standby_names; select pg_reload_conf()",
        );
    }
    if names.is_empty() && standbys.connected > 0 {
        return POSTGRES_STANDBYS.advice(
            format!(
                "{} standbys are connected, and commits wait for none",
                standbys.connected
            ),
            "alter system set synchronous_standby_names = 'any 1 (*)'; select pg_reload_conf()",
        );
    }
    POSTGRES_STANDBYS.ok(format!(
        "{} standbys are connected, and commits wait for {}",
        standbys.connected, standbys.synchronous
    ))
}

fn connections(facts: &PostgresFacts, usage: Usage) -> Finding {
    let number = |name| setting(facts, name).parse::<u64>().unwrap_or_default();
    let available =
        number("max_connections").saturating_sub(number("superuser_reserved_connections"));
    // A host has its pool, a connection for its lease, and one for the WAL.
    let wanted = usage.hosts * (u64::from(usage.pool_size) + 2);
    let found = format!(
        "{} hosts open up to {wanted} connections of {available}, and {} are open now",
        usage.hosts, facts.connections
    );
    if wanted > available {
        return POSTGRES_CONNECTIONS.problem(
            found,
            format!(
                "alter system set max_connections = {}, then restart the server; \
                 or lower pool_size",
                (wanted + 20).next_multiple_of(50)
            ),
        );
    }
    if facts.connections * 10 > available * 9 {
        return POSTGRES_CONNECTIONS.advice(
            found,
            "find the clients: select usename, application_name, count(*) from pg_stat_activity \
             group by 1, 2; or raise max_connections",
        );
    }
    POSTGRES_CONNECTIONS.ok(found)
}

fn idle(facts: &PostgresFacts) -> Finding {
    if let Some(idle) = facts.idle_in_transaction.filter(|idle| *idle > IDLE_MAX) {
        return POSTGRES_IDLE.advice(
            format!(
                "a transaction has been idle for {}",
                format_duration(Duration::from_secs(idle.as_secs()))
            ),
            "find it: select pid, usename, application_name from pg_stat_activity \
             where state like 'idle in transaction%'; end it: select pg_terminate_backend(PID); \
             and set idle_in_transaction_session_timeout",
        );
    }
    let timeout = setting(facts, "transaction_timeout");
    if !["", "0"].contains(&timeout) {
        return POSTGRES_IDLE.advice(
            format!("transaction_timeout is {timeout} ms and ends transactions of hosts"),
            format!(
                "alter role {} set transaction_timeout = 0, then restart the hosts",
                quoted(&facts.user)
            ),
        );
    }
    POSTGRES_IDLE.ok("no visible transaction has been idle for more than 5 minutes")
}

fn wal(facts: &PostgresFacts, usage: Usage) -> Finding {
    if let Some(error) = &facts.wal_obstacle {
        return failed(POSTGRES_WAL, error, "relay = \"poll\"");
    }
    let mode = facts.relay_mode.as_deref().unwrap_or("poll");
    let requested = if usage.requests_wal {
        ", and its requirements are met"
    } else {
        ""
    };
    POSTGRES_WAL.ok(format!("the relay mode is {mode}{requested}"))
}

fn slots(facts: &PostgresFacts) -> Vec<Finding> {
    let mode = facts.relay_mode.as_deref().unwrap_or("poll");
    let mut findings: Vec<Finding> = facts
        .slots
        .iter()
        .filter_map(|slot| slot_finding(slot, mode))
        .collect();
    if findings.is_empty() {
        findings.push(POSTGRES_SLOTS.ok(format!(
            "{} replication slots, all active and up to date",
            facts.slots.len()
        )));
    }
    findings
}

fn slot_finding(slot: &SlotFacts, mode: &str) -> Option<Finding> {
    let SlotFacts { name, retained, .. } = slot;
    let kept = format_size(retained & !((1 << 20) - 1));
    let drop = format!(
        "select pg_drop_replication_slot('{}')",
        name.replace('\'', "''")
    );
    let fix = if slot.is_own && mode != "poll" {
        "start a host, which reads it; or: oncely run --relay poll".to_owned()
    } else {
        format!("start its reader, or if it has none: {drop}")
    };
    if slot.is_lost {
        return Some(POSTGRES_SLOTS.problem(
            format!("the server has removed WAL that the slot {name} had not read"),
            drop,
        ));
    }
    if !slot.is_active && *retained > RETAINED_MAX {
        return Some(POSTGRES_SLOTS.problem(
            format!("the slot {name} is inactive and keeps {kept} of WAL"),
            fix,
        ));
    }
    if !slot.is_active {
        return Some(POSTGRES_SLOTS.advice(
            format!("the slot {name} is inactive and keeps {kept} of WAL"),
            fix,
        ));
    }
    (*retained > 4 * RETAINED_MAX).then(|| {
        POSTGRES_SLOTS.problem(
            format!("the slot {name} is far behind and keeps {kept} of WAL"),
            "find out why its reader is slow: select * from pg_stat_replication",
        )
    })
}

fn roles(facts: &PostgresFacts) -> Vec<Finding> {
    match &facts.roles {
        None => Vec::new(),
        Some(Err(error)) => vec![failed(
            POSTGRES_ROLES,
            error,
            "start a host, which sets them up",
        )],
        Some(Ok(roles)) => role_findings(roles),
    }
}

fn role_findings(roles: &RoleFacts) -> Vec<Finding> {
    let login = &roles.login;
    if !roles.exist {
        return vec![POSTGRES_ROLES.problem(
            format!("the role {login} or its owner role does not exist"),
            "start a host, which creates both",
        )];
    }
    let mut findings = Vec::new();
    if roles.has_attributes {
        findings.push(POSTGRES_ROLES.problem(
            format!("the role {login} has attributes or memberships"),
            format!(
                "alter role {} nosuperuser nocreatedb nocreaterole noreplication \
                 nobypassrls, and revoke its memberships",
                quoted(login)
            ),
        ));
    }
    if let [first, rest @ ..] = roles.missing.as_slice() {
        let more = match rest.len() {
            0 => String::new(),
            more => format!(", and {more} more grants"),
        };
        findings.push(POSTGRES_ROLES.problem(
            format!("the roles of guests' SQL lack a grant: {first}{more}"),
            format!(
                "restart a host, which grants them again; or run: {}",
                roles.missing.join("; ")
            ),
        ));
    }
    if !roles.excess.is_empty() {
        findings.push(POSTGRES_ROLES.advice(
            format!("guests have through PUBLIC: {}", roles.excess.join(", ")),
            "as a superuser, revoke these from public, see SECURITY.md",
        ));
    }
    if findings.is_empty() {
        findings.push(POSTGRES_ROLES.ok(format!("the role {login} has its grants and no others")));
    }
    findings
}

fn vacuum(facts: &PostgresFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ["autovacuum", "track_counts"] {
        if setting(facts, name) == "off" {
            findings.push(POSTGRES_VACUUM.problem(
                format!("{name} is off"),
                format!("alter system set {name} = on; select pg_reload_conf()"),
            ));
        }
    }
    for table in &facts.tables {
        let name = &table.name;
        if table.is_autovacuum_off {
            findings.push(POSTGRES_VACUUM.problem(
                format!("autovacuum is off for the table {name}"),
                format!("alter table {name} reset (autovacuum_enabled)"),
            ));
        }
        if table.dead >= DEAD_ROWS_MIN && table.dead > table.live {
            findings.push(POSTGRES_VACUUM.advice(
                format!(
                    "the table {name} has {} dead rows and {} live ones",
                    table.dead, table.live
                ),
                format!("vacuum {name}; if they remain, end the oldest transaction"),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(POSTGRES_VACUUM.ok("autovacuum is on, and no table has many dead rows"));
    }
    findings
}

fn transaction_age(facts: &PostgresFacts) -> Finding {
    let age = facts.transaction_age;
    let found = format!(
        "the oldest transaction id is {} million transactions old",
        age / 1_000_000
    );
    let fix = "find what holds it back (old transactions, prepared transactions, slots), \
               then: vacuum (freeze)";
    match age {
        AGE_PROBLEM.. => POSTGRES_TRANSACTION_AGE.problem(found, fix),
        AGE_ADVICE.. => POSTGRES_TRANSACTION_AGE.advice(found, fix),
        _ => POSTGRES_TRANSACTION_AGE.ok(found),
    }
}

fn encoding(facts: &PostgresFacts) -> Finding {
    let (database, encoding) = (&facts.database, &facts.encoding);
    if encoding != "UTF8" {
        return POSTGRES_ENCODING.problem(
            format!("the encoding of the database {database} is {encoding}"),
            "create a new one: create database NAME encoding 'UTF8' template template0",
        );
    }
    if let Some((created, actual)) = &facts.collation_versions
        && created != actual
    {
        return POSTGRES_ENCODING.problem(
            format!(
                "the collation of the database {database} changed from version {created} to {actual}"
            ),
            format!(
                "stop the hosts, then: reindex database {name}; \
                 alter database {name} refresh collation version",
                name = quoted(database)
            ),
        );
    }
    POSTGRES_ENCODING.ok("the encoding is UTF8, and the collation is unchanged")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::doctor::Level;

    /// A healthy server.
    fn healthy() -> PostgresFacts {
        let settings = [
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "on"),
            ("synchronous_standby_names", ""),
            ("max_connections", "100"),
            ("superuser_reserved_connections", "3"),
            ("autovacuum", "on"),
            ("track_counts", "on"),
        ];
        PostgresFacts {
            version: 150_004,
            database: "oncely".to_owned(),
            user: "oncely".to_owned(),
            settings: settings
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            encoding: "UTF8".to_owned(),
            relay_mode: Some("poll".to_owned()),
            standbys: crate::store::inspection::StandbyFacts {
                is_visible: true,
                ..Default::default()
            },
            ..PostgresFacts::default()
        }
    }

    const USAGE: Usage = Usage {
        pool_size: 16,
        hosts: 2,
        requests_wal: false,
    };

    /// The levels of the findings that are not ok, by check.
    fn trouble(facts: &PostgresFacts) -> BTreeMap<String, Level> {
        judge(facts, USAGE)
            .into_iter()
            .filter(|finding| finding.level != Level::Ok)
            .map(|finding| (finding.check, finding.level))
            .collect()
    }

    #[test]
    fn a_healthy_server_has_no_advice() {
        assert_eq!(trouble(&healthy()), BTreeMap::new());
    }

    #[test]
    fn each_fault_of_a_server_is_found() {
        type Fault = fn(&mut PostgresFacts);
        fn set(facts: &mut PostgresFacts, name: &str, value: &str) {
            facts.settings.insert(name.to_owned(), value.to_owned());
        }
        let faults: [(&str, Level, Fault); 19] = [
            ("postgres-version", Level::Problem, |facts| {
                facts.version = 140_011
            }),
            ("postgres-durability", Level::Problem, |facts| {
                set(facts, "fsync", "off");
            }),
            ("postgres-durability", Level::Problem, |facts| {
                set(facts, "full_page_writes", "off");
            }),
            ("postgres-commit", Level::Advice, |facts| {
                set(facts, "synchronous_commit", "off");
            }),
            ("postgres-standbys", Level::Advice, |facts| {
                facts.standbys.connected = 1
            }),
            ("postgres-standbys", Level::Problem, |facts| {
                set(facts, "synchronous_standby_names", "s1");
            }),
            ("postgres-connections", Level::Problem, |facts| {
                set(facts, "max_connections", "30");
            }),
            ("postgres-connections", Level::Advice, |facts| {
                facts.connections = 95
            }),
            ("postgres-idle", Level::Advice, |facts| {
                facts.idle_in_transaction = Some(Duration::from_secs(3600));
            }),
            ("postgres-idle", Level::Advice, |facts| {
                set(facts, "transaction_timeout", "5000");
            }),
            ("postgres-wal", Level::Problem, |facts| {
                facts.wal_obstacle = Some(anyhow::anyhow!("wal_level is replica"));
            }),
            ("postgres-slots", Level::Advice, |facts| {
                facts.slots.push(SlotFacts::default())
            }),
            ("postgres-slots", Level::Problem, |facts| {
                let retained = 2 << 30;
                facts.slots.push(SlotFacts {
                    retained,
                    ..SlotFacts::default()
                });
            }),
            ("postgres-slots", Level::Problem, |facts| {
                let (is_active, retained) = (true, 5 << 30);
                facts.slots.push(SlotFacts {
                    is_active,
                    retained,
                    ..SlotFacts::default()
                });
            }),
            ("postgres-roles", Level::Problem, |facts| {
                let roles = RoleFacts {
                    exist: true,
                    missing: vec!["grant usage".to_owned()],
                    ..RoleFacts::default()
                };
                facts.roles = Some(Ok(roles));
            }),
            ("postgres-roles", Level::Problem, |facts| {
                facts.roles = Some(Ok(RoleFacts::default()));
            }),
            ("postgres-vacuum", Level::Problem, |facts| {
                set(facts, "autovacuum", "off");
            }),
            ("postgres-transaction-age", Level::Problem, |facts| {
                facts.transaction_age = 1_600_000_000;
            }),
            ("postgres-encoding", Level::Problem, |facts| {
                facts.collation_versions = Some(("2.31".to_owned(), "2.36".to_owned()));
            }),
        ];
        for (check, level, plant) in faults {
            let mut facts = healthy();
            plant(&mut facts);
            let expected = BTreeMap::from([(check.to_owned(), level)]);
            assert_eq!(trouble(&facts), expected, "{check}");
        }
    }

    #[test]
    fn every_trouble_has_a_fix() {
        let mut facts = healthy();
        facts.slots.push(SlotFacts::default());
        facts.is_standby = true;
        for finding in judge(&facts, USAGE) {
            assert_eq!(
                finding.fix.is_some(),
                finding.level != Level::Ok,
                "{finding:?}"
            );
        }
    }
}
