//! The checks: the name of each, its subject, and the reason for it. `docs/doctor.md` has the
//! same table.

use super::{Finding, Level};

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// The stable name.
    pub name: &'static str,
    /// The settings or the state that it compares.
    pub subject: &'static str,
    /// The reason for it, as a sentence.
    pub reason: &'static str,
}

/// Defines the checks, and the list of all.
macro_rules! checks {
    ($($constant:ident: $name:literal, $subject:literal, $reason:literal;)+) => {
        $(
            #[doc = $subject]
            pub const $constant: Check = Check { name: $name, subject: $subject, reason: $reason };
        )+

        /// All checks, in the order of the reference.
        pub const ALL: &[Check] = &[$($constant),+];
    };
}

checks! {
    NATS_REACHABLE: "nats-reachable",
        "NATS answers, accepts the login, and has JetStream.",
        "Without JetStream a host cannot start, and workers receive and publish nothing.";
    NATS_VERSION: "nats-version",
        "The version of the NATS server, 2.11 or newer.",
        "Hosts use features of JetStream that older servers lack.";
    NATS_STORAGE: "nats-storage",
        "The storage of the JetStream account against its limit.",
        "When the storage is used up, streams refuse messages and outputs stay in the outbox.";
    NATS_OWNER: "nats-owner",
        "The owner of the platform's streams.",
        "Two installations on one NATS account would take messages from each other.";
    STREAM_EXISTS: "stream-exists",
        "Each stream that a worker consumes, and a stream for each subject that it publishes to.",
        "A worker without its stream does not run, and an output without a stream waits forever.";
    STREAM_REPLICAS: "stream-replicas",
        "The replicas of consumed, produced and own streams, and whether all are up to date.",
        "In a cluster, a stream on one server is lost or unavailable together with that server.";
    STREAM_STORAGE: "stream-storage",
        "Whether streams are stored in files, and written before they are acknowledged.",
        "A stream in memory, or one that acknowledges before it writes, loses accepted messages.";
    STREAM_SYNC: "stream-sync",
        "Streams on a single server, whose `sync_interval` no client can read.",
        "By default nats-server flushes to disk every two minutes; a power cut loses the rest.";
    STREAM_DEDUPE_WINDOW: "stream-dedupe-window",
        "The dedupe window of streams that workers publish to.",
        "An output that is sent again within the window must not be stored twice.";
    STREAM_RETENTION: "stream-retention",
        "The maximum age of consumed streams against the inbox and the retries.",
        "An inbox record that expires before its message lets the message take effect twice.";
    STREAM_LIMITS: "stream-limits",
        "The limits of streams on size and count, and what a full stream does.",
        "A full stream either drops messages that no worker has handled, or refuses new ones.";
    CONSUMER_SETTINGS: "consumer-settings",
        "The settings of the workers' consumers against those that hosts set.",
        "A changed consumer can skip, repeat or drop messages behind the host's back.";
    POSTGRES_REACHABLE: "postgres-reachable",
        "PostgreSQL answers, accepts the login, and takes writes.",
        "Without the database a host cannot start, and handles nothing.";
    POSTGRES_VERSION: "postgres-version",
        "The version of PostgreSQL, 15 or newer.",
        "Older servers lack statements that the platform uses.";
    POSTGRES_DURABILITY: "postgres-durability",
        "`fsync` and `full_page_writes`.",
        "Without them a crash of the machine can corrupt the database, inbox included.";
    POSTGRES_COMMIT: "postgres-commit",
        "`synchronous_commit` as new sessions get it.",
        "Hosts set it to `on` in their transactions; sessions of others can lose commits.";
    POSTGRES_STANDBYS: "postgres-standbys",
        "Connected standbys, and whether commits wait for one.",
        "A failover to a standby that commits do not wait for loses the latest commits.";
    POSTGRES_CONNECTIONS: "postgres-connections",
        "`max_connections` against the pools of the live hosts.",
        "A host that gets no connection treats the database as unavailable.";
    POSTGRES_IDLE: "postgres-idle",
        "Transactions that are idle for long, and `transaction_timeout`.",
        "An open transaction holds back vacuum and the rotation of partitions.";
    POSTGRES_WAL: "postgres-wal",
        "The requirements of WAL mode, if it is used or requested.",
        "If they are not met, hosts fall back to polling, or do not start.";
    POSTGRES_SLOTS: "postgres-slots",
        "Replication slots that are inactive or far behind.",
        "The server keeps WAL for a slot until its disk is full, and then stops.";
    POSTGRES_ROLES: "postgres-roles",
        "The roles of guests' SQL and their grants.",
        "A missing grant fails handlers; an extra privilege lets guests out of their sandbox.";
    POSTGRES_VACUUM: "postgres-vacuum",
        "Autovacuum, and dead rows in the tables of the platform and the workers.",
        "Dead rows slow down every claim and every poll.";
    POSTGRES_TRANSACTION_AGE: "postgres-transaction-age",
        "The age of the oldest transaction id that is not frozen.",
        "At two billion PostgreSQL refuses all writes.";
    POSTGRES_ENCODING: "postgres-encoding",
        "The encoding of the database, and the version of its collation.",
        "Other encodings reject messages; indexes of an older collation can miss event ids.";
    SQLITE_FILE: "sqlite-file",
        "The SQLite file can be read, and uses a write-ahead log.",
        "Without the log readers block the writer, and a host cannot start on a broken file.";
    SQLITE_PERMISSIONS: "sqlite-permissions",
        "The permissions of the SQLite file.",
        "The file contains messages and the key of output ids.";
    SQLITE_FILE_SYSTEM: "sqlite-file-system",
        "The file system of the SQLite file.",
        "Locks and the shared memory of SQLite do not work on a network file system.";
    SCHEMA: "schema",
        "The version of the platform's schema.",
        "A host of another version refuses the database.";
    CLOCKS: "clocks",
        "The clocks of this machine, the database and NATS.",
        "Searches for outputs and the expiry of rows compare times of all three.";
    DISK: "disk",
        "Free space of the data folder, the SQLite file and the archive.",
        "On a full disk nothing commits.";
    OPEN_FILES: "open-files",
        "The limit on open files against the configured connections.",
        "A host lowers its limit of connections to what the limit on open files allows.";
    SECRET_FILES: "secret-files",
        "The permissions of token, credentials, keys and the configuration file.",
        "Other users of the machine could act as this host.";
    OIDC_PROVIDER: "oidc-provider",
        "The discovery document and the keys of the login provider of the console, if one is set.",
        "Without its provider no person can log in with it; tokens still work.";
    HOST_SETTINGS: "host-settings",
        "Settings of the live hosts on one database that should be equal.",
        "The host that prunes or publishes decides for all of them.";
    HOST_READY: "host-ready",
        "Whether the running host is ready, and each of its workers runs.",
        "A host that is not ready handles nothing.";
}

impl Check {
    /// All is as it should be.
    pub fn ok(self, found: impl Into<String>) -> Finding {
        self.finding(Level::Ok, found, None)
    }

    /// Something could be better.
    pub fn advice(self, found: impl Into<String>, fix: impl Into<String>) -> Finding {
        self.finding(Level::Advice, found, Some(fix.into()))
    }

    /// Something is wrong.
    pub fn problem(self, found: impl Into<String>, fix: impl Into<String>) -> Finding {
        self.finding(Level::Problem, found, Some(fix.into()))
    }

    fn finding(self, level: Level, found: impl Into<String>, fix: Option<String>) -> Finding {
        Finding {
            check: self.name.to_owned(),
            level,
            found: found.into(),
            reason: self.reason.to_owned(),
            fix,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_of_checks_is_complete() {
        let reference = include_str!("../../../docs/doctor.md");
        for check in ALL {
            let Check {
                name,
                subject,
                reason,
            } = check;
            let row = format!("| `{name}` | {subject} | {reason} |");
            assert!(reference.contains(&row), "docs/doctor.md lacks: {row}");
        }
        let section = reference.split("## Checks").nth(1).unwrap();
        let section = section.split("## ").next().unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        assert_eq!(rows.count(), ALL.len(), "docs/doctor.md has another check");
    }

    #[test]
    fn no_two_checks_have_the_same_name() {
        let names: std::collections::BTreeSet<&str> = ALL.iter().map(|check| check.name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
