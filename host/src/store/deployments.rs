//! Components, deployments, the active version of each worker, and workers' migrations.

use std::collections::HashMap;

use super::db::{Db, Param, Session, Sql, read_row, read_rows};
use super::error::sqlx_error;
use super::postgres::{self, Login};
use super::rows::Columns as _;
use super::{DeploymentRecord, Result, StoreError, WorkerMigration, rows, shared, sqlite};

pub(super) async fn put_component(db: &mut Db, digest: &str, wasm: &[u8]) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.component (digest, wasm) values ($1, $2) on conflict do nothing",
        sqlite: "insert into oncely_component (digest, wasm) values ($1, $2) on conflict do nothing",
        doing: "store a component",
    };
    let params = [Param::Text(digest), Param::Bytes(wasm)];
    db.execute(sql, &params).await.map(drop)
}

pub(super) async fn component(db: &mut Db, digest: &str) -> Result<Option<Vec<u8>>> {
    let sql = Sql {
        postgres: "select wasm from oncely.component where digest = $1",
        sqlite: "select wasm from oncely_component where digest = $1",
        doing: "read a component",
    };
    let row = db.fetch_optional(sql, &[Param::Text(digest)]).await?;
    row.map(|row| read_row(&row, sql.doing, |row| row.bytes("wasm")))
        .transpose()
}

/// Replaces the signature of a stored component.
pub(super) async fn put_signature(db: &mut Db, digest: &str, signature: &str) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.component_signature (digest, signature) values ($1, $2)
         on conflict (digest) do update set signature = excluded.signature",
        sqlite: "insert into oncely_component_signature (digest, signature) values ($1, $2)
         on conflict (digest) do update set signature = excluded.signature",
        doing: "store a signature",
    };
    let params = [Param::Text(digest), Param::Text(signature)];
    db.execute(sql, &params).await.map(drop)
}

pub(super) async fn signature(db: &mut Db, digest: &str) -> Result<Option<String>> {
    let sql = Sql {
        postgres: "select signature from oncely.component_signature where digest = $1",
        sqlite: "select signature from oncely_component_signature where digest = $1",
        doing: "read a signature",
    };
    let row = db.fetch_optional(sql, &[Param::Text(digest)]).await?;
    row.map(|row| read_row(&row, sql.doing, |row| row.text("signature")))
        .transpose()
}

/// The migrations of a worker that ran, with their checksums.
async fn applied_migrations(db: &mut Db, worker: &str) -> Result<HashMap<String, Vec<u8>>> {
    let sql = Sql {
        postgres: "select name, sha256 from oncely.worker_migration where worker = $1",
        sqlite: "select name, sha256 from oncely_worker_migration where worker = $1",
        doing: "read the applied migrations",
    };
    let rows = db.fetch_all(sql, &[Param::Text(worker)]).await?;
    let applied = read_rows(&rows, sql.doing, |row| {
        Ok((row.text("name")?, row.bytes("sha256")?))
    })?;
    Ok(applied.into_iter().collect())
}

/// The names of the migrations that have not run.
pub(super) async fn due_migrations(
    db: &mut Db,
    worker: &str,
    migrations: &[WorkerMigration],
) -> Result<Vec<String>> {
    let applied = applied_migrations(db, worker).await?;
    shared::due_migration_names(worker, migrations, &applied)
}

/// Runs the due migrations, writes the next deployment and activates it. Concurrent deployments of
/// one worker wait for each other until the transaction ends.
pub(super) async fn deploy(
    db: &mut Db,
    login: Option<&Login>,
    worker: &str,
    digest: &str,
    manifest: &str,
    migrations: &[WorkerMigration],
) -> Result<DeploymentRecord> {
    if let Session::Postgres(session) = db.session()? {
        postgres::deployments::lock(session, worker).await?;
    }
    let applied = applied_migrations(db, worker).await?;
    for (migration, sha256) in shared::due_worker_migrations(worker, migrations, &applied)? {
        match db.session()? {
            Session::Postgres(session) => {
                let done = postgres::deployments::run_migration(
                    session, login, worker, migration, &sha256,
                );
                done.await?;
            }
            Session::Sqlite(session) => {
                sqlite::deployments::run_migration(session, worker, migration, &sha256).await?;
            }
        }
    }
    let deployment = add(db, worker, digest, manifest).await?;
    activate_version(db, worker, deployment.version).await?;
    Ok(deployment)
}

async fn add(db: &mut Db, worker: &str, digest: &str, manifest: &str) -> Result<DeploymentRecord> {
    let sql = Sql {
        postgres: "insert into oncely.deployment (worker, version, digest, manifest)
         select $1, coalesce(pg_catalog.max(version), 0) + 1, $2, $3 from oncely.deployment where worker = $1
         returning worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at",
        sqlite: "insert into oncely_deployment (worker, version, digest, manifest)
         select $1, coalesce(max(version), 0) + 1, $2, $3 from oncely_deployment where worker = $1
         returning worker, version, digest, manifest, created_at",
        doing: "write a deployment",
    };
    let params = [
        Param::Text(worker),
        Param::Text(digest),
        Param::Text(manifest),
    ];
    let row = db.fetch_one(sql, &params).await;
    let row = row.map_err(|error| match is_foreign_key_violation(&error) {
        true => shared::component_missing(digest),
        false => error,
    })?;
    rows::deployment(&row)
}

fn is_foreign_key_violation(error: &StoreError) -> bool {
    let StoreError::Unavailable(cause) = error else {
        return false;
    };
    sqlx_error(cause)
        .and_then(sqlx::Error::as_database_error)
        .is_some_and(|error| error.is_foreign_key_violation())
}

async fn activate_version(db: &mut Db, worker: &str, version: u32) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.worker (name, version) values ($1, $2)
         on conflict (name) do update set version = excluded.version, activated_at = pg_catalog.now()",
        sqlite: "insert into oncely_worker (name, version) values ($1, $2)
         on conflict (name) do update
         set version = excluded.version, activated_at = cast(unixepoch('subsec') * 1000000 as integer)",
        doing: "activate a deployment",
    };
    let params = [Param::Text(worker), Param::Int(version.into())];
    db.execute(sql, &params).await.map(drop)
}

/// Deactivates the active version of a worker.
pub(super) async fn retire(db: &mut Db, worker: &str) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.worker where name = $1",
        sqlite: "delete from oncely_worker where name = $1",
        doing: "retire a worker",
    };
    db.execute(sql, &[Param::Text(worker)]).await.map(drop)
}

/// Activates a version; `None` if it was never deployed.
pub(super) async fn activate(
    db: &mut Db,
    worker: &str,
    version: u32,
) -> Result<Option<DeploymentRecord>> {
    let sql = Sql {
        postgres: "select worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment where worker = $1 and version = $2",
        sqlite: "select worker, version, digest, manifest, created_at
         from oncely_deployment where worker = $1 and version = $2",
        doing: "find a deployment",
    };
    let params = [Param::Text(worker), Param::Int(version.into())];
    let Some(row) = db.fetch_optional(sql, &params).await? else {
        return Ok(None);
    };
    activate_version(db, worker, version).await?;
    rows::deployment(&row).map(Some)
}

/// The active deployment of every worker, by name.
pub(super) async fn active(db: &mut Db) -> Result<Vec<DeploymentRecord>> {
    let sql = Sql {
        postgres: "select deployment.worker, deployment.version, digest, manifest,
             (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.worker
             join oncely.deployment on deployment.worker = worker.name and deployment.version = worker.version
         order by worker.name",
        sqlite: "select deployment.worker, deployment.version, digest, manifest, created_at
         from oncely_worker as worker
             join oncely_deployment as deployment
             on deployment.worker = worker.name and deployment.version = worker.version
         order by worker.name",
        doing: "read active deployments",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::deployment).collect()
}

/// The active deployment of one worker.
pub(super) async fn active_of(db: &mut Db, worker: &str) -> Result<Option<DeploymentRecord>> {
    let sql = Sql {
        postgres: "select deployment.worker, deployment.version, digest, manifest,
             (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.worker
             join oncely.deployment on deployment.worker = worker.name and deployment.version = worker.version
         where worker.name = $1",
        sqlite: "select deployment.worker, deployment.version, digest, manifest, created_at
         from oncely_worker as worker
             join oncely_deployment as deployment
             on deployment.worker = worker.name and deployment.version = worker.version
         where worker.name = $1",
        doing: "read the active deployment of a worker",
    };
    let row = db.fetch_optional(sql, &[Param::Text(worker)]).await?;
    row.as_ref().map(rows::deployment).transpose()
}

/// The newest deployment of every worker, retired ones included, by name.
pub(super) async fn newest(db: &mut Db) -> Result<Vec<DeploymentRecord>> {
    let sql = Sql {
        postgres: "select distinct on (worker) worker, version, digest, manifest,
             (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment order by worker, version desc",
        sqlite: "select worker, version, digest, manifest, created_at from oncely_deployment as one
         where version = (select max(version) from oncely_deployment where worker = one.worker) order by worker",
        doing: "read the newest deployments",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::deployment).collect()
}

/// All deployments of a worker, newest first.
pub(super) async fn for_worker(
    db: &mut Db,
    worker: &str,
    limit: i64,
) -> Result<Vec<DeploymentRecord>> {
    let sql = Sql {
        postgres: "select worker, version, digest, manifest, (extract(epoch from created_at) * 1000000)::bigint as created_at
         from oncely.deployment where worker = $1 order by version desc limit $2",
        sqlite: "select worker, version, digest, manifest, created_at
         from oncely_deployment where worker = $1 order by version desc limit $2",
        doing: "read deployments",
    };
    let rows = db
        .fetch_all(sql, &[Param::Text(worker), Param::Int(limit)])
        .await?;
    rows.iter().map(rows::deployment).collect()
}
