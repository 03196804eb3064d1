//! Migration of the platform's own schema.

use std::collections::HashMap;

use anyhow::Context;
use sqlx::{Row, raw_sql};

use super::errors::Doing;
use super::session::{Purpose, Session, Sessions};
use crate::fault;
use crate::model::output_ids::OutputIds;
use crate::store::Result;
use crate::store::migrations::{self, Migration, migrations};

/// The files of `migrations/postgres`, in order.
pub(in crate::store) const MIGRATIONS: &[Migration] = migrations![
    "postgres":
    "0001_baseline",
];

/// Runs the migrations that have not run, in one transaction. Hosts that start together wait for
/// each other on a lock of the transaction: a session lock would outlive it behind a pooler.
pub(super) async fn run(sessions: &Sessions) -> anyhow::Result<()> {
    let mut session = sessions.begin(Purpose::Deploy).await?;
    prepare(&mut session)
        .await
        .context("create the table of migrations")?;
    let applied = applied(&mut session)
        .await
        .context("read applied migrations")?;
    for migration in migrations::due(MIGRATIONS, &applied)? {
        apply(&mut session, migration)
            .await
            .with_context(|| format!("run the migration {}", migration.version()))?;
    }
    fault::point(fault::MIGRATING);
    session.commit().await.context("commit the migrations")
}

/// Reads the key for definer functions. `exposed` records that workers' statements can read it,
/// too, from now on.
pub(super) async fn load_definer_key(sessions: &Sessions, exposed: bool) -> Result<()> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let key = definer_key(&mut session, exposed).await;
    let key = key.doing("read the key for definer functions")?;
    session.commit().await?;
    sessions.set_definer_key(key);
    Ok(())
}

async fn definer_key(session: &mut Session, exposed: bool) -> sqlx::Result<Vec<u8>> {
    if exposed {
        let query = session.query("update oncely.definer_key set exposed = true where not exposed");
        query.execute(session.connection()).await?;
    }
    session
        .query("select key from oncely.definer_key")
        .fetch_one(session.connection())
        .await?
        .try_get(0)
}

/// The generator of this installation's output ids.
pub(super) async fn output_ids(sessions: &Sessions) -> anyhow::Result<OutputIds> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let row = session
        .query("select key from oncely.output_key")
        .fetch_one(session.connection())
        .await?;
    session.commit().await?;
    Ok(OutputIds::new(row.try_get(0)?))
}

/// The id of this installation.
pub(super) async fn installation(sessions: &Sessions) -> anyhow::Result<String> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let row = session
        .query("select id from oncely.installation")
        .fetch_one(session.connection())
        .await?;
    session.commit().await?;
    Ok(row.try_get(0)?)
}

async fn prepare(session: &mut Session) -> sqlx::Result<()> {
    raw_sql(
        "select pg_advisory_xact_lock(hashtextextended('oncely migrates', 0));
         create schema if not exists oncely;
         create table if not exists oncely.migration (
             version    bigint      constraint migration_pk primary key,
             name       text        not null,
             checksum   bytea       not null,
             applied_at timestamptz not null default now()
         )",
    )
    .execute(session.connection())
    .await?;
    Ok(())
}

async fn applied(session: &mut Session) -> sqlx::Result<HashMap<i64, Vec<u8>>> {
    let query = session.query("select version, checksum from oncely.migration");
    let rows = query.fetch_all(session.connection()).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect()
}

async fn apply(session: &mut Session, migration: &Migration) -> sqlx::Result<()> {
    raw_sql(migration.sql).execute(session.connection()).await?;
    let query =
        session.query("insert into oncely.migration (version, name, checksum) values ($1, $2, $3)");
    query
        .bind(migration.version())
        .bind(migration.name())
        .bind(migration.checksum())
        .execute(session.connection())
        .await?;
    Ok(())
}
