//! Facts about the database, for `oncely doctor`. Nothing here changes anything: the schema is not
//! migrated, no role is created and no lease is taken.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::db::Db;
use super::{DeploymentRecord, StoredReport, deployments, migrations, reports};
use crate::model::clock_reading::ClockReading;

pub use super::migrations::NoSchema;
pub use super::postgres::inspection::{PostgresOptions, inspect as inspect_postgres};
pub use super::sqlite::inspection::inspect as inspect_sqlite;

/// A PostgreSQL server and the platform's database on it.
#[derive(Debug, Default)]
pub struct PostgresFacts {
    /// The version as a number, such as 150004.
    pub version: u32,
    /// The name of the database.
    pub database: String,
    /// The role of the host.
    pub user: String,
    /// Whether the server is a standby, which takes no writes.
    pub is_standby: bool,
    /// The values that new sessions of the host's role get, by name, in the server's base units.
    pub settings: BTreeMap<String, String>,
    /// The encoding, such as `UTF8`.
    pub encoding: String,
    /// The version of the collation when the database was created, and that of the library now;
    /// `None` for a collation without versions.
    pub collation_versions: Option<(String, String)>,
    /// The number of transactions since the oldest one that is not frozen.
    pub transaction_age: u64,
    /// The open connections of clients to the server.
    pub connections: u64,
    /// How long the oldest visible transaction has been idle; `None` if there is none.
    pub idle_in_transaction: Option<Duration>,
    /// The replication slots of the server.
    pub slots: Vec<SlotFacts>,
    /// The connected standbys.
    pub standbys: StandbyFacts,
    /// The first unmet requirement of WAL mode; `None` if all are met.
    pub wal_obstacle: Option<anyhow::Error>,
    /// The clock of the server.
    pub clock: ClockReading,
    /// The relay mode; `None` before the schema is created.
    pub relay_mode: Option<String>,
    /// The roles of guests' SQL; `None` before the schema is created, or if guests' SQL is trusted.
    pub roles: Option<anyhow::Result<RoleFacts>>,
    /// The platform's tables with the most dead rows, partitions on their own.
    pub tables: Vec<TableFacts>,
    /// The platform's own rows.
    pub platform: PlatformFacts,
}

/// A replication slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotFacts {
    /// The name, unique on the server.
    pub name: String,
    /// Whether it belongs to the relay of this database.
    pub is_own: bool,
    /// Whether a client reads it.
    pub is_active: bool,
    /// The WAL that the server keeps for it, in bytes.
    pub retained: u64,
    /// Whether the server has removed WAL that was not read.
    pub is_lost: bool,
}

/// The standbys of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StandbyFacts {
    /// The connected ones.
    pub connected: u64,
    /// Those of them that commits wait for.
    pub synchronous: u64,
    /// Whether the host's role may see which ones are synchronous.
    pub is_visible: bool,
}

/// The roles of guests' SQL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoleFacts {
    /// The login role.
    pub login: String,
    /// Whether both roles exist.
    pub exist: bool,
    /// Whether the login role has attributes or memberships.
    pub has_attributes: bool,
    /// The grants that the roles lack, as statements.
    pub missing: Vec<String>,
    /// The privileges that the login role has through PUBLIC.
    pub excess: Vec<String>,
}

/// A table's dead rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableFacts {
    /// The name with its schema.
    pub name: String,
    /// The estimated number of live rows.
    pub live: u64,
    /// The estimated number of dead rows.
    pub dead: u64,
    /// Whether autovacuum is turned off for this table.
    pub is_autovacuum_off: bool,
}

/// A SQLite file.
#[derive(Debug, Default)]
pub struct SqliteFacts {
    /// Whether the file exists.
    pub exists: bool,
    /// Whether it uses a write-ahead log; `None` for a file without content.
    pub has_wal: Option<bool>,
    /// The size of the write-ahead log, in bytes.
    pub wal_size: u64,
    /// The platform's own rows.
    pub platform: PlatformFacts,
}

/// The platform's rows in either database.
#[derive(Debug, Default)]
pub struct PlatformFacts {
    /// The id of the installation; `None` before the schema is created.
    pub installation: Option<String>,
    /// The reason why this program cannot use the schema, if there is one.
    pub schema_error: Option<anyhow::Error>,
    /// The active deployments.
    pub deployments: Vec<DeploymentRecord>,
    /// The reports of live hosts.
    pub reports: Vec<StoredReport>,
}

/// Reads the platform's rows, through a connection that only reads. `open` gives one connection per
/// call.
pub(super) async fn platform<F>(mut open: impl FnMut() -> F) -> anyhow::Result<PlatformFacts>
where
    F: Future<Output = super::Result<Db>>,
{
    if let Err(error) = migrations::check(open().await?).await {
        return Ok(PlatformFacts {
            schema_error: Some(error),
            ..PlatformFacts::default()
        });
    }
    let installation = migrations::installation(open().await?).await?;
    let mut db = open().await?;
    let facts = PlatformFacts {
        installation: Some(installation),
        schema_error: None,
        deployments: deployments::active(&mut db).await?,
        reports: reports::read(&mut db).await?,
    };
    db.commit().await?;
    Ok(facts)
}

/// The path of a file beside a SQLite database, such as `x.db-wal` for `-wal`.
pub(super) fn beside(path: &Path, suffix: &str) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
