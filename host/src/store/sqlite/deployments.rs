//! Components, deployments, the active versions, and workers' own migrations.

use std::collections::HashMap;

use anyhow::anyhow;
use sqlx::sqlite::SqlitePool;
use sqlx::{AssertSqlSafe, Row, raw_sql};

use super::errors::{self, Doing};
use super::session::Session;
use crate::model::sql::SqlError;
use crate::store::{DeploymentRecord, Result, StoreError, WorkerMigration, rows, shared};

/// Stores a component, unless one with this digest is stored already.
pub(super) async fn put_component(session: &mut Session, digest: &str, wasm: &[u8]) -> Result<()> {
    sqlx::query(
        "insert into oncely_component (digest, wasm) values ($1, $2) on conflict do nothing",
    )
    .bind(digest)
    .bind(wasm)
    .execute(session.connection().doing("store a component")?)
    .await
    .doing("store a component")?;
    Ok(())
}

/// The component with this digest.
pub(super) async fn component(readers: &SqlitePool, digest: &str) -> Result<Option<Vec<u8>>> {
    let row = sqlx::query("select wasm from oncely_component where digest = $1")
        .bind(digest)
        .fetch_optional(readers)
        .await
        .doing("read a component")?;
    row.map(|row| row.try_get(0))
        .transpose()
        .doing("read a component")
}

/// Runs the due migrations, writes the next deployment and activates it.
pub(super) async fn deploy(
    session: &mut Session,
    worker: &str,
    digest: &str,
    manifest: &str,
    migrations: &[WorkerMigration],
) -> Result<DeploymentRecord> {
    let applied = applied_migrations(session, worker).await?;
    for (migration, sha256) in shared::due_worker_migrations(worker, migrations, &applied)? {
        run_migration(session, worker, migration, &sha256).await?;
    }
    let row = insert(session, worker, digest, manifest).await?;
    activate_version(session, worker, row.version).await?;
    Ok(row)
}

/// The names of the migrations that have not run.
pub(super) async fn due_migrations(
    session: &mut Session,
    worker: &str,
    migrations: &[WorkerMigration],
) -> Result<Vec<String>> {
    shared::due_migration_names(
        worker,
        migrations,
        &applied_migrations(session, worker).await?,
    )
}

async fn applied_migrations(
    session: &mut Session,
    worker: &str,
) -> Result<HashMap<String, Vec<u8>>> {
    let rows = sqlx::query("select name, sha256 from oncely_worker_migration where worker = $1")
        .bind(worker)
        .fetch_all(session.connection().doing("read the applied migrations")?)
        .await
        .doing("read the applied migrations")?;
    let applied: sqlx::Result<_> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    applied.doing("read the applied migrations")
}

async fn run_migration(
    session: &mut Session,
    worker: &str,
    migration: &WorkerMigration,
    sha256: &[u8],
) -> Result<()> {
    let context = |error| errors::from_statement(error, "record a migration");
    session.clear_statement_cache().await.map_err(context)?;
    let text = AssertSqlSafe(migration.sql.as_str());
    if let Err(error) = raw_sql(text)
        .execute(session.connection().map_err(context)?)
        .await
    {
        return Err(match errors::from_guest_statement(error, false)? {
            error @ SqlError::Conflict(_) => StoreError::Conflict(anyhow!("{error}")),
            error => shared::migration_failed(migration, anyhow!("{error}")),
        });
    }

    // Outside of its transaction this statement fails: the commit hook refuses every commit.
    sqlx::query("insert into oncely_worker_migration (worker, name, sha256) values ($1, $2, $3)")
        .bind(worker)
        .bind(&migration.name)
        .bind(sha256)
        .execute(session.connection().map_err(context)?)
        .await
        .map_err(|error| match errors::is_commit_hook(&error) {
            true => shared::migration_ends_transaction(migration),
            false => context(error),
        })?;
    Ok(())
}

async fn insert(
    session: &mut Session,
    worker: &str,
    digest: &str,
    manifest: &str,
) -> Result<DeploymentRecord> {
    let context = |error| errors::from_statement(error, "write a deployment");
    let row = sqlx::query(
        "insert into oncely_deployment (worker, version, digest, manifest)
         select $1, coalesce(max(version), 0) + 1, $2, $3 from oncely_deployment where worker = $1
         returning worker, version, digest, manifest, created_at",
    )
    .bind(worker)
    .bind(digest)
    .bind(manifest)
    .fetch_one(session.connection().map_err(context)?)
    .await
    .map_err(|error| match errors::is_foreign_key_violation(&error) {
        true => shared::component_missing(digest),
        false => context(error),
    })?;
    rows::deployment(&row)
}

async fn activate_version(session: &mut Session, worker: &str, version: u32) -> Result<()> {
    sqlx::query(
        "insert into oncely_worker (name, version) values ($1, $2)
         on conflict (name) do update
         set version = excluded.version, activated_at = cast(unixepoch('subsec') * 1000000 as integer)",
    )
    .bind(worker)
    .bind(version)
    .execute(session.connection().doing("activate a deployment")?)
    .await
    .doing("activate a deployment")?;
    Ok(())
}

/// Leaves a worker without an active version.
pub(super) async fn retire(session: &mut Session, worker: &str) -> Result<()> {
    let query = sqlx::query("delete from oncely_worker where name = $1").bind(worker);
    query
        .execute(session.connection().doing("retire a worker")?)
        .await
        .map(|_| ())
        .doing("retire a worker")
}

/// Activates a version; none if it was never deployed.
pub(super) async fn activate(
    session: &mut Session,
    worker: &str,
    version: u32,
) -> Result<Option<DeploymentRecord>> {
    let row = sqlx::query(
        "select worker, version, digest, manifest, created_at from oncely_deployment where worker = $1 and version = $2",
    )
    .bind(worker)
    .bind(version)
    .fetch_optional(session.connection().doing("find a deployment")?)
    .await
    .doing("find a deployment")?;
    let Some(row) = row else { return Ok(None) };
    activate_version(session, worker, version).await?;
    rows::deployment(&row).map(Some)
}

/// The active deployment of every worker, by name.
pub(super) async fn active(readers: &SqlitePool) -> Result<Vec<DeploymentRecord>> {
    let rows = sqlx::query(
        "select deployment.worker, deployment.version, digest, manifest, created_at
         from oncely_worker as worker
             join oncely_deployment as deployment
             on deployment.worker = worker.name and deployment.version = worker.version
         order by worker.name",
    )
    .fetch_all(readers)
    .await
    .doing("read active deployments")?;
    rows.iter().map(rows::deployment).collect()
}

/// The newest deployment of every worker, retired ones included, by name.
pub(super) async fn newest(readers: &SqlitePool) -> Result<Vec<DeploymentRecord>> {
    let rows = sqlx::query(
        "select worker, version, digest, manifest, created_at from oncely_deployment as one
         where version = (select max(version) from oncely_deployment where worker = one.worker) order by worker",
    )
    .fetch_all(readers)
    .await;
    rows.doing("read the newest deployments")?
        .iter()
        .map(rows::deployment)
        .collect()
}

/// All deployments of a worker, newest first.
pub(super) async fn for_worker(
    readers: &SqlitePool,
    worker: &str,
) -> Result<Vec<DeploymentRecord>> {
    let rows = sqlx::query(
        "select worker, version, digest, manifest, created_at
         from oncely_deployment where worker = $1 order by version desc",
    )
    .bind(worker)
    .fetch_all(readers)
    .await
    .doing("read deployments")?;
    rows.iter().map(rows::deployment).collect()
}
