//! A database per test, inspected with plain SQL past the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::sync::Mutex;

use crate::{pgbouncer, postgres};

/// The database a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
    /// PostgreSQL behind PgBouncer in transaction pooling mode.
    Pgbouncer,
}

/// A fresh database.
#[derive(Debug, Clone)]
pub enum Database {
    Sqlite(PathBuf),
    /// Two URLs: the host's and the test's own.
    Postgres {
        host: String,
        direct: String,
        /// A connection for the next query; a new one costs the server ten times a short query.
        kept: Arc<Mutex<Option<PgConnection>>>,
    },
}

impl Database {
    /// A PostgreSQL database by the host's URL and the test's own.
    pub fn postgres(host: String, direct: String) -> Self {
        let kept = Arc::default();
        Database::Postgres { host, direct, kept }
    }

    pub async fn fresh(kind: Kind, folder: &Path) -> Result<Self> {
        Ok(match kind {
            Kind::Sqlite => Database::Sqlite(folder.join("test.db")),
            Kind::Postgres => Database::on(postgres::shared()).await?,
            Kind::Pgbouncer => {
                let name = postgres::shared().create_database().await?;
                Database::postgres(
                    pgbouncer::shared().url(&name),
                    postgres::shared().url(&name),
                )
            }
        })
    }

    /// A fresh database of this cluster.
    pub async fn on(cluster: &postgres::Cluster) -> Result<Self> {
        let direct = cluster.url(&cluster.create_database().await?);
        Ok(Database::postgres(direct.clone(), direct))
    }

    /// The query that counts unpublished outputs.
    pub fn unpublished(&self) -> &'static str {
        match self {
            Database::Sqlite(_) => "select count(*) from oncely.outbox where published_at is null",
            Database::Postgres { .. } => {
                "select (select count(*) from oncely.outbox where published_at is null and via = 'poll') \
                 + (select count(*) from oncely.unrecorded_output)"
            }
        }
    }

    /// The query that counts published outputs with a property, a condition on the outbox.
    pub fn published(&self, property: &str) -> String {
        let is_published = match self {
            Database::Sqlite(_) => "published_at is not null",
            Database::Postgres { .. } => {
                "(published_at is not null
                    or via <> 'poll' and seq not in (select seq from oncely.unrecorded_output))"
            }
        };
        format!("select count(*) from oncely.outbox where {is_published} and {property}")
    }

    /// Like [`Database::unpublished`], without alarm notices.
    pub fn unpublished_except_alarms(&self) -> &'static str {
        match self {
            Database::Sqlite(_) => {
                "select count(*) from oncely.outbox where published_at is null and subject not like 'oncely.alarm.%'"
            }
            Database::Postgres { .. } => {
                "select (select count(*) from oncely.outbox
                         where published_at is null and via = 'poll' and subject not like 'oncely.alarm.%')
                      + (select count(*) from oncely.unrecorded_output join oncely.outbox using (seq) where subject not like 'oncely.alarm.%')"
            }
        }
    }

    /// The value for `--database`.
    pub fn url(&self) -> String {
        match self {
            Database::Sqlite(path) => path.display().to_string(),
            Database::Postgres { host, .. } => host.clone(),
        }
    }

    /// The URL that bypasses any pooler or proxy in front of the database.
    pub fn direct_url(&self) -> String {
        match self {
            Database::Sqlite(path) => path.display().to_string(),
            Database::Postgres { direct, .. } => direct.clone(),
        }
    }

    /// Copies the database; a file copy goes to `folder`. No host may run on it meanwhile.
    pub async fn copy(&self, folder: &Path) -> Result<Database> {
        match self {
            Database::Sqlite(path) => {
                let copy = folder.join(format!("copy-{}.db", uuid::Uuid::new_v4()));
                self.execute(&format!("vacuum into '{}'", copy.display()))
                    .await
                    .context("copy the database")?;
                anyhow::ensure!(copy.exists(), "no copy of {} was made", path.display());
                Ok(Database::Sqlite(copy))
            }
            Database::Postgres { direct, .. } => {
                let (server, name) = direct
                    .rsplit_once('/')
                    .context("find the database's name")?;
                let copy = format!("copy_{}", uuid::Uuid::new_v4().simple());
                let mut connection = PgConnection::connect(&format!("{server}/postgres")).await?;
                // The server may not have noticed yet that a killed host's connections are gone.
                let end = format!(
                    "select pg_terminate_backend(pid, 10000) from pg_stat_activity
                     where datname = '{name}' and backend_type = 'client backend'"
                );
                sqlx::raw_sql(AssertSqlSafe(end))
                    .execute(&mut connection)
                    .await
                    .context("end remaining connections")?;
                let make = format!("create database {copy} template {name}");
                sqlx::raw_sql(AssertSqlSafe(make))
                    .execute(&mut connection)
                    .await
                    .context("copy the database")?;
                let url = format!("{server}/{copy}");
                Ok(Database::postgres(url.clone(), url))
            }
        }
    }

    /// Runs a query and returns its rows as text, an empty string for null. For both databases,
    /// platform tables are written `oncely.x` and workers' tables `app.x`.
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
            Database::Postgres { direct, kept, .. } => {
                let sql = sql.replace("app.", "app_default.");
                let rows = postgres_rows(direct, kept, &sql).await?;
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

    /// Executes a statement past the host.
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
                let mut connection = PgConnection::connect(direct).await.context("connect")?;
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(&mut connection)
                    .await?;
            }
        }
        Ok(())
    }

    /// The number that a query returns.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let rows = self.rows(sql).await?;
        let value = rows
            .first()
            .and_then(|row| row.first())
            .context("query returned no row")?;
        value
            .parse()
            .with_context(|| format!("`{value}` is not a number"))
    }
}

/// Runs a query on the kept connection, or on a new one if that is in use or was lost.
async fn postgres_rows(
    url: &str,
    kept: &Mutex<Option<PgConnection>>,
    sql: &str,
) -> Result<Vec<sqlx::postgres::PgRow>> {
    let mut place = kept.try_lock();
    let earlier = place.as_deref_mut().ok().and_then(Option::take);
    if let Some(mut connection) = earlier
        && let Ok(rows) = fetch(&mut connection, sql).await
    {
        if let Ok(place) = &mut place {
            **place = Some(connection);
        }
        return Ok(rows);
    }
    let mut connection = PgConnection::connect(url).await.context("connect")?;
    let rows = fetch(&mut connection, sql).await?;
    if let Ok(place) = &mut place {
        **place = Some(connection);
    }
    Ok(rows)
}

/// The simple protocol returns every value as text.
async fn fetch(
    connection: &mut PgConnection,
    sql: &str,
) -> sqlx::Result<Vec<sqlx::postgres::PgRow>> {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .fetch_all(connection)
        .await
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
