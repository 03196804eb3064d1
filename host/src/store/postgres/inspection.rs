//! The settings and the state of a PostgreSQL server.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use sqlx::postgres::PgRow;

use super::session::{Purpose, Session, Sessions};
use super::wal::{PostgresWal, Replication};
use super::{Db, Instance, options, pool, privileges};
use crate::model::clock_reading::ClockReading;
use crate::store::inspection::{PostgresFacts, SlotFacts, StandbyFacts, TableFacts, platform};
use crate::store::rows::Columns as _;
use crate::store::wal::OutputWal as _;

/// The settings that are judged.
const SETTINGS: [&str; 12] = [
    "autovacuum",
    "fsync",
    "full_page_writes",
    "idle_in_transaction_session_timeout",
    "max_connections",
    "max_slot_wal_keep_size",
    "superuser_reserved_connections",
    "synchronous_commit",
    "synchronous_standby_names",
    "track_counts",
    "transaction_timeout",
    "wal_level",
];

/// The most tables that are returned.
const TABLES_MAX: i64 = 20;

/// What to inspect, besides the server itself.
#[derive(Debug, Clone, Default)]
pub struct PostgresOptions {
    /// Whether guests' SQL has roles of its own.
    pub has_roles: bool,
    /// Whether the configuration requests WAL mode.
    pub requests_wal: bool,
    /// The URL of the server itself, for the WAL.
    pub wal_url: String,
}

/// Inspects the server and the database of this URL, through one connection.
///
/// # Errors
/// The server is unreachable or refuses the login.
pub async fn inspect(url: &str, wanted: &PostgresOptions) -> anyhow::Result<PostgresFacts> {
    let instance = Instance::new();
    let options = options(url, instance)?.application_name("oncely doctor");
    let sessions = Sessions::new(pool(options, 1), false, instance);
    let facts = gather(&sessions, wanted, instance).await;
    sessions.close().await;
    facts
}

async fn gather(
    sessions: &Sessions,
    wanted: &PostgresOptions,
    instance: Instance,
) -> anyhow::Result<PostgresFacts> {
    // The server.
    let mut session = sessions.begin(Purpose::Read).await?;
    let mut facts = server(&mut session).await.context("read the server")?;
    facts.settings = settings(&mut session).await.context("read the settings")?;
    facts.slots = slots(&mut session).await.context("read the slots")?;
    facts.standbys = standbys(&mut session).await.context("read the standbys")?;
    facts.clock = clock(&mut session).await.context("read the clock")?;
    facts.tables = tables(&mut session).await.context("read the tables")?;
    session.rollback().await;

    // The platform's own rows and roles.
    let open = || async { sessions.begin(Purpose::Read).await.map(Db::Postgres) };
    facts.platform = platform(open).await.context("read the platform's tables")?;
    if facts.platform.installation.is_some() {
        let mut session = sessions.begin(Purpose::Read).await?;
        let mode = relay_mode(&mut session).await;
        facts.relay_mode = Some(mode.context("read the relay mode")?);
        session.rollback().await;
        if wanted.has_roles {
            let mut session = sessions.begin(Purpose::Read).await?;
            facts.roles = Some(privileges::inspect(&mut session).await);
            session.rollback().await;
        }
    }

    // The requirements of WAL mode.
    let uses_wal = facts.relay_mode.as_ref().is_some_and(|mode| mode != "poll");
    if uses_wal || wanted.requests_wal {
        let replication = Replication::new(&wanted.wal_url, instance)?;
        let wal = PostgresWal::new(sessions.clone(), replication, 0);
        facts.wal_obstacle = wal.check().await.err();
    }
    Ok(facts)
}

async fn server(session: &mut Session) -> sqlx::Result<PostgresFacts> {
    let row = one(
        session,
        "select current_setting('server_version_num')::bigint as version,
             current_database()::text as database, current_user::text as role,
             pg_is_in_recovery() as is_standby, pg_encoding_to_char(encoding)::text as encoding,
             datcollversion::text as created, pg_database_collation_actual_version(oid)::text as actual,
             age(datfrozenxid)::bigint as transaction_age,
             (select count(*) from pg_stat_activity where backend_type = 'client backend') as connections,
             (select (extract(epoch from max(clock_timestamp() - state_change)) * 1000000)::bigint
              from pg_stat_activity
              where datname = current_database() and state like 'idle in transaction%') as idle
         from pg_database where datname = current_database()",
    )
    .await?;
    let idle: Option<u64> = row.optional_number("idle")?;
    let created: Option<String> = row.get("created")?;
    let actual: Option<String> = row.get("actual")?;
    Ok(PostgresFacts {
        version: u32::try_from(row.number("version")?).unwrap_or_default(),
        database: row.text("database")?,
        user: row.text("role")?,
        is_standby: row.get("is_standby")?,
        encoding: row.text("encoding")?,
        collation_versions: created.zip(actual),
        transaction_age: row.number("transaction_age")?,
        connections: row.number("connections")?,
        idle_in_transaction: idle.map(Duration::from_micros),
        ..PostgresFacts::default()
    })
}

/// The values for new sessions. The host's own transactions override some of them.
async fn settings(session: &mut Session) -> sqlx::Result<BTreeMap<String, String>> {
    let query = session.query(
        "select name::text as name, reset_val::text as value from pg_settings where name = any($1)",
    );
    let names = SETTINGS.map(str::to_owned).to_vec();
    let rows = query.bind(names).fetch_all(session.connection()).await?;
    rows.iter()
        .map(|row| Ok((row.text("name")?, row.text("value")?)))
        .collect()
}

async fn slots(session: &mut Session) -> sqlx::Result<Vec<SlotFacts>> {
    let query = session.query(
        "select slot_name::text as name, active,
             slot_name = 'oncely_' || (select oid from pg_database where datname = current_database()) as is_own,
             coalesce(wal_status = 'lost', false) as is_lost,
             coalesce(pg_wal_lsn_diff(
                 case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                 restart_lsn), 0)::bigint as retained
         from pg_replication_slots where not temporary order by slot_name",
    );
    let rows = query.fetch_all(session.connection()).await?;
    let slot = |row: &PgRow| {
        Ok(SlotFacts {
            name: row.text("name")?,
            is_own: row.get("is_own")?,
            is_active: row.get("active")?,
            retained: row.number("retained")?,
            is_lost: row.get("is_lost")?,
        })
    };
    rows.iter().map(slot).collect()
}

async fn standbys(session: &mut Session) -> sqlx::Result<StandbyFacts> {
    let row = one(
        session,
        "select count(*) as connected,
             count(*) filter (where sync_state in ('sync', 'quorum')) as synchronous,
             coalesce(bool_and(sync_state is not null), true) as is_visible
         from pg_stat_replication",
    )
    .await?;
    Ok(StandbyFacts {
        connected: row.number("connected")?,
        synchronous: row.number("synchronous")?,
        is_visible: row.get("is_visible")?,
    })
}

async fn clock(session: &mut Session) -> sqlx::Result<ClockReading> {
    let before = Timestamp::now();
    let row = one(
        session,
        "select (extract(epoch from clock_timestamp()) * 1000000)::bigint as server",
    )
    .await?;
    let after = Timestamp::now();
    Ok(ClockReading::new(before, row.time("server")?, after))
}

async fn tables(session: &mut Session) -> sqlx::Result<Vec<TableFacts>> {
    let query = session.query(
        "select format('%I.%I', schemaname, pg_class.relname) as name, n_live_tup as live, n_dead_tup as dead,
             coalesce('autovacuum_enabled=false' = any (reloptions)
                 or 'autovacuum_enabled=off' = any (reloptions), false) as is_off
         from pg_stat_user_tables join pg_class on pg_class.oid = relid
         where schemaname in ('oncely', 'app_default')
         order by n_dead_tup desc, name limit $1",
    );
    let rows = query
        .bind(TABLES_MAX)
        .fetch_all(session.connection())
        .await?;
    let table = |row: &PgRow| {
        Ok(TableFacts {
            name: row.text("name")?,
            live: row.number("live")?,
            dead: row.number("dead")?,
            is_autovacuum_off: row.get("is_off")?,
        })
    };
    rows.iter().map(table).collect()
}

async fn relay_mode(session: &mut Session) -> sqlx::Result<String> {
    one(session, "select mode from oncely.relay")
        .await?
        .text("mode")
}

async fn one(session: &mut Session, statement: &'static str) -> sqlx::Result<PgRow> {
    let query = session.query(statement);
    query.fetch_one(session.connection()).await
}
