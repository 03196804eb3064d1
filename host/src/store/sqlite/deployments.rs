//! Workers' migrations.

use anyhow::anyhow;
use sqlx::{AssertSqlSafe, raw_sql};

use super::errors;
use super::session::Session;
use crate::model::sql::SqlError;
use crate::store::{Result, StoreError, WorkerMigration, shared};

/// Runs a migration and records it.
pub(in crate::store) async fn run_migration(
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
