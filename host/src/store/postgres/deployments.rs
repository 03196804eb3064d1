//! Components, deployments, the active version of each worker, and workers' migrations.

use std::collections::HashMap;

use anyhow::anyhow;
use sqlx::{AssertSqlSafe, Row, raw_sql};

use super::errors::{self, Doing};
use super::privileges::Login;
use super::session::Session;
use crate::model::sql::SqlError;
use crate::store::{DeploymentRecord, Result, StoreError, WorkerMigration, rows, shared};

pub(super) async fn put_component(session: &mut Session, digest: &str, wasm: &[u8]) -> Result<()> {
    let query = session.query(
        "insert into oncely.component (digest, wasm) values ($1, $2) on conflict do nothing",
    );
    query
        .bind(digest)
        .bind(wasm)
        .execute(session.connection())
        .await
        .doing("store a component")?;
    Ok(())
}

pub(super) async fn component(session: &mut Session, digest: &str) -> Result<Option<Vec<u8>>> {
    let query = session.query("select wasm from oncely.component where digest = $1");
    let row = query
        .bind(digest)
        .fetch_optional(session.connection())
        .await
        .doing("read a component")?;
    row.map(|row| row.try_get(0))
        .transpose()
        .doing("read a component")
}

/// Runs the due migrations, writes the next deployment and activates it. Concurrent deployments of
/// one worker wait for each other until the transaction ends.
pub(super) async fn deploy(
    session: &mut Session,
    login: Option<&Login>,
    worker: &str,
    digest: &str,
    manifest: &str,
    migrations: &[WorkerMigration],
) -> Result<DeploymentRecord> {
    let query =
        session.query("select pg_advisory_xact_lock(hashtextextended('oncely deploys ' || $1, 0))");
    query
        .bind(worker)
        .execute(session.connection())
        .await
        .doing("wait for other deployments")?;
    let applied = applied_migrations(session, worker).await?;
    for (migration, sha256) in shared::due_worker_migrations(worker, migrations, &applied)? {
        run_migration(session, login, worker, migration, &sha256).await?;
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
    let query = session.query("select name, sha256 from oncely.worker_migration where worker = $1");
    let rows = query
        .bind(worker)
        .fetch_all(session.connection())
        .await
        .doing("read applied migrations")?;
    let applied: sqlx::Result<_> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    applied.doing("read applied migrations")
}

/// Runs a migration in the app's schema. The objects it creates belong to the app's owner, not to
/// the host.
async fn run_migration(
    session: &mut Session,
    login: Option<&Login>,
    worker: &str,
    migration: &WorkerMigration,
    sha256: &[u8],
) -> Result<()> {
    let become_owner = login.map(Login::become_owner).unwrap_or_default();
    let in_schema = format!(
        "{become_owner} set local search_path = app_default; {}",
        migration.sql
    );
    if let Err(error) = raw_sql(AssertSqlSafe(in_schema))
        .execute(session.connection())
        .await
    {
        return Err(match errors::from_guest_statement(error)? {
            error @ SqlError::Conflict(_) => StoreError::Conflict(anyhow!("{error}")),
            error => shared::migration_failed(migration, anyhow!("{error}")),
        });
    }

    // A migration that ends the transaction would commit a part of the deployment.
    let is_same_transaction = session
        .is_same_transaction()
        .await
        .doing("check the transaction")?;
    if !is_same_transaction {
        return Err(shared::migration_ends_transaction(migration));
    }
    raw_sql("set local role none")
        .execute(session.connection())
        .await
        .doing("reset the role")?;
    let query = session
        .query("insert into oncely.worker_migration (worker, name, sha256) values ($1, $2, $3)");
    query
        .bind(worker)
        .bind(&migration.name)
        .bind(sha256)
        .execute(session.connection())
        .await
        .doing("record a migration")?;
    Ok(())
}

async fn insert(
    session: &mut Session,
    worker: &str,
    digest: &str,
    manifest: &str,
) -> Result<DeploymentRecord> {
    let query = session.query(
        "insert into oncely.deployment (worker, version, digest, manifest)
         select $1, coalesce(pg_catalog.max(version), 0) + 1, $2, $3 from oncely.deployment where worker = $1
         returning worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at",
    );
    let row = query
        .bind(worker)
        .bind(digest)
        .bind(manifest)
        .fetch_one(session.connection())
        .await
        .map_err(|error| match errors::is_foreign_key_violation(&error) {
            true => shared::component_missing(digest),
            false => errors::from_statement(error, "write a deployment"),
        })?;
    rows::deployment(&row)
}

async fn activate_version(session: &mut Session, worker: &str, version: u32) -> Result<()> {
    let query = session.query(
        "insert into oncely.worker (name, version) values ($1, $2)
         on conflict (name) do update set version = excluded.version, activated_at = pg_catalog.now()",
    );
    query
        .bind(worker)
        .bind(version.cast_signed())
        .execute(session.connection())
        .await
        .doing("activate a deployment")?;
    Ok(())
}

/// Deactivates the active version of a worker.
pub(super) async fn retire(session: &mut Session, worker: &str) -> Result<()> {
    let query = session.query("delete from oncely.worker where name = $1");
    let retired = query.bind(worker).execute(session.connection()).await;
    retired.map(|_| ()).doing("retire a worker")
}

pub(super) async fn activate(
    session: &mut Session,
    worker: &str,
    version: u32,
) -> Result<Option<DeploymentRecord>> {
    let query = session.query(
        "select worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment where worker = $1 and version = $2",
    );
    let row = query
        .bind(worker)
        .bind(version.cast_signed())
        .fetch_optional(session.connection())
        .await
        .doing("find a deployment")?;
    let Some(row) = row else { return Ok(None) };
    activate_version(session, worker, version).await?;
    rows::deployment(&row).map(Some)
}

/// The active deployment of every worker, by name.
pub(super) async fn active(session: &mut Session) -> Result<Vec<DeploymentRecord>> {
    let query = session.query(
        "select deployment.worker, deployment.version, digest, manifest,
             (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.worker
             join oncely.deployment on deployment.worker = worker.name and deployment.version = worker.version
         order by worker.name",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("read active deployments")?;
    rows.iter().map(rows::deployment).collect()
}

/// The newest deployment of every worker, retired ones included, by name.
pub(super) async fn newest(session: &mut Session) -> Result<Vec<DeploymentRecord>> {
    let query = session.query(
        "select distinct on (worker) worker, version, digest, manifest,
             (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment order by worker, version desc",
    );
    let rows = query.fetch_all(session.connection()).await;
    rows.doing("read the newest deployments")?
        .iter()
        .map(rows::deployment)
        .collect()
}

/// All deployments of a worker, newest first.
pub(super) async fn for_worker(
    session: &mut Session,
    worker: &str,
) -> Result<Vec<DeploymentRecord>> {
    let query = session.query(
        "select worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment where worker = $1 order by version desc",
    );
    let rows = query
        .bind(worker)
        .fetch_all(session.connection())
        .await
        .doing("read deployments")?;
    rows.iter().map(rows::deployment).collect()
}
