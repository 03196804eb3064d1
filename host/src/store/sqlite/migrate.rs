//! Migrations of the platform's own schema.

use std::collections::HashMap;

use anyhow::Context;
use sqlx::{Row, raw_sql};

use super::session::{Session, Sessions};
use crate::fault;
use crate::model::output_ids::OutputIds;
use crate::store::migrations::{self, Migration, migrations};

/// A new file in `migrations/sqlite` is listed here.
pub(in crate::store) const MIGRATIONS: &[Migration] = migrations![
    "sqlite":
    "0001_baseline",
];

/// Runs the due migrations, in one transaction.
pub(super) async fn run(sessions: &Sessions) -> anyhow::Result<()> {
    let mut session = sessions.begin().await?;
    prepare(&mut session)
        .await
        .context("create the table of migrations")?;
    let applied = applied(&mut session)
        .await
        .context("read the applied migrations")?;
    for migration in migrations::due(MIGRATIONS, &applied)? {
        apply(&mut session, migration)
            .await
            .with_context(|| format!("run the migration {}", migration.version()))?;
    }
    fault::point(fault::MIGRATING);
    session.commit().await.context("commit the migrations")
}

/// The output ids of this installation.
pub(super) async fn output_ids(sessions: &Sessions) -> anyhow::Result<OutputIds> {
    let mut session = sessions.begin().await?;
    let row = sqlx::query("select key from oncely_output_key")
        .fetch_one(session.connection()?)
        .await?;
    session.commit().await?;
    Ok(OutputIds::new(row.try_get(0)?))
}

/// The id of this installation.
pub(super) async fn installation(sessions: &Sessions) -> anyhow::Result<String> {
    let mut session = sessions.begin().await?;
    let row = sqlx::query("select id from oncely_installation")
        .fetch_one(session.connection()?)
        .await?;
    session.commit().await?;
    Ok(row.try_get(0)?)
}

async fn prepare(session: &mut Session) -> sqlx::Result<()> {
    raw_sql(
        "create table if not exists oncely_migration (
             version    integer constraint migration_pk primary key,
             name       text    not null,
             checksum   blob    not null,
             applied_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
         ) strict",
    )
    .execute(session.connection()?)
    .await?;
    Ok(())
}

async fn applied(session: &mut Session) -> sqlx::Result<HashMap<i64, Vec<u8>>> {
    let query = sqlx::query("select version, checksum from oncely_migration");
    let rows = query.fetch_all(session.connection()?).await?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect()
}

async fn apply(session: &mut Session, migration: &Migration) -> sqlx::Result<()> {
    raw_sql(migration.sql)
        .execute(session.connection()?)
        .await?;
    sqlx::query("insert into oncely_migration (version, name, checksum) values ($1, $2, $3)")
        .bind(migration.version())
        .bind(migration.name())
        .bind(migration.checksum())
        .execute(session.connection()?)
        .await?;
    Ok(())
}
