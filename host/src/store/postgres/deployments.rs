//! Workers' migrations.

use anyhow::anyhow;
use sqlx::{AssertSqlSafe, raw_sql};

use super::errors;
use super::privileges::Login;
use super::session::Session;
use crate::model::sql::SqlError;
use crate::store::error::Doing as _;
use crate::store::{Result, StoreError, WorkerMigration, shared};

/// Waits for other deployments of the worker. They wait for this transaction to end.
pub(in crate::store) async fn lock(session: &mut Session, worker: &str) -> Result<()> {
    let query =
        session.query("select pg_advisory_xact_lock(hashtextextended('oncely deploys ' || $1, 0))");
    query
        .bind(worker)
        .execute(session.connection())
        .await
        .doing("wait for other deployments")?;
    Ok(())
}

/// Runs a migration in the app's schema. The objects it creates belong to the app's owner, not to
/// the host.
pub(in crate::store) async fn run_migration(
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
