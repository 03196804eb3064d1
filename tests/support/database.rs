//! A database of a test's own, looked at from outside the host with plain SQL.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, Row};

use crate::{pgbouncer, postgres};

/// Which database a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
    /// PostgreSQL behind a pooler that gives each transaction another connection.
    Pgbouncer,
}

/// A fresh database.
#[derive(Debug, Clone)]
pub enum Database {
    Sqlite(PathBuf),
    /// By URL: the one the host uses, and the one the test looks through.
    Postgres {
        host: String,
        direct: String,
    },
}

impl Database {
    pub async fn fresh(kind: Kind, folder: &Path) -> Result<Self> {
        Ok(match kind {
            Kind::Sqlite => Database::Sqlite(folder.join("test.db")),
            Kind::Postgres => Database::on(postgres::shared()).await?,
            Kind::Pgbouncer => {
                let name = postgres::shared().create_database().await?;
                Database::Postgres {
                    host: pgbouncer::shared().url(&name),
                    direct: postgres::shared().url(&name),
                }
            }
        })
    }

    /// A fresh database of this cluster.
    pub async fn on(cluster: &postgres::Cluster) -> Result<Self> {
        let direct = cluster.url(&cluster.create_database().await?);
        Ok(Database::Postgres {
            host: direct.clone(),
            direct,
        })
    }

    /// The query for how many outputs are not published.
    pub fn unpublished(&self) -> &'static str {
        match self {
            Database::Sqlite(_) => "select count(*) from oncely.outbox where published_at is null",
            Database::Postgres { .. } => {
                "select (select count(*) from oncely.outbox where published_at is null and via = 'poll') \
                 + (select count(*) from oncely.wal_backlog())"
            }
        }
    }

    /// The same without messages that tell of alarms.
    pub fn unpublished_except_alarms(&self) -> &'static str {
        match self {
            Database::Sqlite(_) => {
                "select count(*) from oncely.outbox where published_at is null and subject not like 'oncely.alarm.%'"
            }
            Database::Postgres { .. } => {
                "select (select count(*) from oncely.outbox
                         where published_at is null and via = 'poll' and subject not like 'oncely.alarm.%')
                      + (select count(*) from oncely.wal_backlog() join oncely.outbox using (seq) where subject not like 'oncely.alarm.%')"
            }
        }
    }

    /// What `--database` takes.
    pub fn url(&self) -> String {
        match self {
            Database::Sqlite(path) => path.display().to_string(),
            Database::Postgres { host, .. } => host.clone(),
        }
    }

    /// The same, past whatever stands before the database for the host.
    pub fn direct_url(&self) -> String {
        match self {
            Database::Sqlite(path) => path.display().to_string(),
            Database::Postgres { direct, .. } => direct.clone(),
        }
    }

    /// A copy of the database as it is now, in `folder` if it is a file. No host may run on it meanwhile.
    pub async fn copy(&self, folder: &Path) -> Result<Database> {
        match self {
            Database::Sqlite(path) => {
                let copy = folder.join(format!("copy-{}.db", uuid::Uuid::new_v4()));
                self.execute(&format!("vacuum into '{}'", copy.display()))
                    .await
                    .context("copy the database")?;
                anyhow::ensure!(copy.exists(), "there is no copy of {}", path.display());
                Ok(Database::Sqlite(copy))
            }
            Database::Postgres { direct, .. } => {
                let (server, name) = direct
                    .rsplit_once('/')
                    .context("find the database's name")?;
                let copy = format!("copy_{}", uuid::Uuid::new_v4().simple());
                let mut connection =
                    sqlx::PgConnection::connect(&format!("{server}/postgres")).await?;
                // Of a host that was killed the server may not know yet.
                let end = format!(
                    "select pg_terminate_backend(pid, 10000) from pg_stat_activity
                     where datname = '{name}' and backend_type = 'client backend'"
                );
                sqlx::raw_sql(AssertSqlSafe(end))
                    .execute(&mut connection)
                    .await
                    .context("end what is left")?;
                let make = format!("create database {copy} template {name}");
                sqlx::raw_sql(AssertSqlSafe(make))
                    .execute(&mut connection)
                    .await
                    .context("copy the database")?;
                let url = format!("{server}/{copy}");
                Ok(Database::Postgres {
                    host: url.clone(),
                    direct: url,
                })
            }
        }
    }

    /// Runs a query and returns its rows as text, an empty string for null. Platform tables are written `oncely.x` and
    /// workers' tables `app.x`, whichever database it is.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Vec<String>>> {
        match self {
            Database::Sqlite(path) => {
                let sql = sql.replace("oncely.", "oncely_").replace("app.", "");
                let options = sqlx::sqlite::SqliteConnectOptions::new()
                    .filename(path)
                    .read_only(true);
                let mut connection = sqlx::SqliteConnection::connect_with(&options)
                    .await
                    .context("open the database")?;
                let rows = sqlx::query(AssertSqlSafe(sql))
                    .fetch_all(&mut connection)
                    .await?;
                rows.iter()
                    .map(|row| {
                        (0..row.len())
                            .map(|column| sqlite_text(row, column))
                            .collect()
                    })
                    .collect()
            }
            Database::Postgres { direct, .. } => {
                let sql = sql.replace("app.", "app_default.");
                let mut connection = sqlx::PgConnection::connect(direct)
                    .await
                    .context("connect")?;
                // The simple protocol brings every value as text.
                let rows = sqlx::raw_sql(AssertSqlSafe(sql))
                    .fetch_all(&mut connection)
                    .await?;
                let text = |row: &sqlx::postgres::PgRow, column: usize| -> Result<String> {
                    let value = row.try_get_raw(column)?;
                    Ok(value.as_str().unwrap_or_default().to_owned())
                };
                rows.iter()
                    .map(|row| (0..row.len()).map(|column| text(row, column)).collect())
                    .collect()
            }
        }
    }

    /// Changes something behind the host's back.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        match self {
            Database::Sqlite(path) => {
                let sql = sql.replace("oncely.", "oncely_").replace("app.", "");
                let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
                let mut connection = sqlx::SqliteConnection::connect_with(&options)
                    .await
                    .context("open the database")?;
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&mut connection)
                    .await?;
            }
            Database::Postgres { direct, .. } => {
                let sql = sql.replace("app.", "app_default.");
                let mut connection = sqlx::PgConnection::connect(direct)
                    .await
                    .context("connect")?;
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&mut connection)
                    .await?;
            }
        }
        Ok(())
    }

    /// The one number a query yields.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let rows = self.rows(sql).await?;
        let value = rows
            .first()
            .and_then(|row| row.first())
            .context("the query has no row")?;
        value
            .parse()
            .with_context(|| format!("`{value}` is not a number"))
    }
}

fn sqlite_text(row: &sqlx::sqlite::SqliteRow, column: usize) -> Result<String> {
    use sqlx::{TypeInfo, ValueRef};
    let value = row.try_get_raw(column)?;
    if value.is_null() {
        return Ok(String::new());
    }
    Ok(match value.type_info().name() {
        "INTEGER" => row.try_get_unchecked::<i64, _>(column)?.to_string(),
        "REAL" => row.try_get_unchecked::<f64, _>(column)?.to_string(),
        _ => row.try_get_unchecked::<String, _>(column)?,
    })
}
