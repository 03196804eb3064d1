//! The replication slot and its requirements on the server. A slot belongs to the whole server, so
//! its name contains the database's id.

use anyhow::{anyhow, ensure};
use sqlx::Row;

use super::super::session::{Purpose, Session, Sessions};
use crate::model::hint::WithHint;
use crate::store::Result;
use crate::store::error::Doing as _;

/// The name of the publication, which belongs to the database.
pub(super) const PUBLICATION: &str = "oncely_outbox";

/// Checks the most common requirements.
///
/// # Errors
/// The first unmet requirement, with a hint.
pub(super) async fn check(session: &mut Session) -> anyhow::Result<()> {
    let query = session.query(
        "select current_setting('wal_level') as wal_level, current_user::text as role,
             (select rolreplication or rolsuper from pg_roles where rolname = current_user) as may_replicate,
             current_setting('max_replication_slots')::int as slots_max,
             (select pg_catalog.count(*) from pg_replication_slots
              where slot_name <> 'oncely_' || (select oid from pg_database where datname = current_database()))::int
                 as slots,
             current_setting('max_wal_senders')::int as senders_max,
             pg_is_in_recovery() as is_standby",
    );
    let row = query.fetch_one(session.connection()).await?;
    let (wal_level, role): (String, String) = (row.try_get("wal_level")?, row.try_get("role")?);
    let refuse = |what: String, hint: String| {
        Err(anyhow!("relay = \"wal\" cannot be used: {what}").hint(hint))
    };
    if row.try_get::<bool, _>("is_standby")? {
        return refuse(
            "the server is a standby".to_owned(),
            "use the primary server's URL in `database`".to_owned(),
        );
    }
    if wal_level != "logical" {
        return refuse(
            format!("the server runs with wal_level = {wal_level}"),
            "as a superuser: alter system set wal_level = 'logical', then restart the server; \
             or relay = \"poll\""
                .into(),
        );
    }
    if !row.try_get::<bool, _>("may_replicate")? {
        let hint =
            format!("as a superuser: alter role \"{role}\" replication; or relay = \"poll\"");
        return refuse(
            format!("the role {role} has no replication attribute"),
            hint,
        );
    }
    let (slots, slots_max): (i32, i32) = (row.try_get("slots")?, row.try_get("slots_max")?);
    if slots >= slots_max {
        return refuse(
            format!("all {slots_max} replication slots of the server are taken"),
            "raise max_replication_slots, or drop an unused slot (select * from pg_replication_slots)"
                .into(),
        );
    }
    ensure!(
        row.try_get::<i32, _>("senders_max")? > 0,
        "relay = \"wal\" cannot be used: max_wal_senders is 0"
    );
    Ok(())
}

/// Creates the publication of WAL outputs. It must exist before the slot: the WAL is decoded with
/// the catalog as of the time when it was written.
pub(super) async fn create_publication(session: &mut Session) -> Result<()> {
    let query = session.query(
        "select exists (
             select from pg_publication_rel join pg_publication on pg_publication.oid = prpubid
             where pubname = 'oncely_outbox' and prrelid = 'oncely.outbox'::regclass)",
    );
    let row = query
        .fetch_one(session.connection())
        .await
        .doing("find the publication of the outbox")?;
    if row.try_get(0).doing("find the publication of the outbox")? {
        return Ok(());
    }
    let statements = format!(
        "drop publication if exists {PUBLICATION};
         create publication {PUBLICATION}
             for table oncely.outbox (seq, id, worker, subject, headers, body, ordering_key, first_attempt_at)
             where (via = 'wal') with (publish = 'insert', publish_via_partition_root = true)"
    );
    session
        .run(statements, "create the publication of the outbox")
        .await
}

/// Creates the slot if it does not exist. Waits for all transactions that are open now. PostgreSQL
/// requires a transaction without writes, and a statement without reads. Returns false while
/// another host is creating it: commits before its completion are not decoded.
pub(super) async fn create(sessions: &Sessions) -> Result<bool> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let found = find(&mut session).await?;
    if !found.exists {
        let query =
            session.query("select pg_create_logical_replication_slot($1::text::name, 'pgoutput')");
        let made = query.bind(found.name).execute(session.connection()).await;
        made.doing("create the replication slot")?;
    }
    session.commit().await?;
    Ok(!found.exists || found.is_ready)
}

/// Drops the slot if it exists, is not being read, and polling is used. Another host may be
/// creating it at this moment. Returns whether it does not exist any longer.
pub(super) async fn drop(sessions: &Sessions) -> Result<bool> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let query = session.query("select from oncely.relay where mode = 'poll' for update");
    let is_unused = query.fetch_optional(session.connection()).await;
    if is_unused.doing("lock the relay mode")?.is_none() {
        session.commit().await?;
        return Ok(false);
    }
    let query = session.query(
        "select pg_drop_replication_slot(slot_name) from pg_replication_slots
         where slot_name = 'oncely_' || (select oid from pg_database where datname = current_database())
             and not active",
    );
    let dropped = query.execute(session.connection()).await;
    dropped.doing("drop the replication slot")?;
    let found = find(&mut session).await?;
    session.commit().await?;
    Ok(!found.exists)
}

struct SlotLookup {
    name: String,
    exists: bool,
    /// Whether its start position is set, from which all commits can be decoded.
    is_ready: bool,
}

async fn find(session: &mut Session) -> Result<SlotLookup> {
    let query = session.query(
        "select 'oncely_' || oid, slot_name is not null, confirmed_flush_lsn is not null
         from pg_database left join pg_replication_slots on slot_name = 'oncely_' || oid
         where datname = current_database()",
    );
    let row = query
        .fetch_one(session.connection())
        .await
        .doing("find the replication slot")?;
    Ok(SlotLookup {
        name: row.try_get(0).doing("find the replication slot")?,
        exists: row.try_get(1).doing("find the replication slot")?,
        is_ready: row.try_get(2).doing("find the replication slot")?,
    })
}
