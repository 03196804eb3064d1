//! One way to run a statement on either database.
//!
//! A function of a table holds the SQL of both dialects, side by side. [`Db`] hides the two kinds
//! of sqlx: sessions, parameters and rows.

use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};

use super::postgres::errors as postgres_errors;
use super::postgres::session::Session as PostgresSession;
use super::rows::{Columns, CommonType};
use super::sqlite::errors as sqlite_errors;
use super::sqlite::session::Session as SqliteSession;
use super::{Result, StoreError};

/// The place where a statement runs.
pub(super) enum Db<'s> {
    Postgres(&'s mut PostgresSession),
    Sqlite(&'s mut SqliteSession),
    /// Connections of SQLite that only read, outside of a transaction.
    SqliteReaders(&'s SqlitePool),
}

/// A statement in both dialects. Parameters have the same numbers in both.
#[derive(Clone, Copy)]
pub(super) struct Sql {
    pub postgres: &'static str,
    pub sqlite: &'static str,
    /// The action in the present tense, for errors, such as `read the outbox`.
    pub doing: &'static str,
}

/// A parameter of a statement.
#[derive(Clone, Copy)]
pub(super) enum Param<'p> {
    Text(&'p str),
    OptionalText(Option<&'p str>),
    Int(i64),
    OptionalInt(Option<i64>),
    /// An array in PostgreSQL, a JSON array in SQLite.
    Ints(&'p [i64]),
    /// Like [`Param::Ints`].
    Texts(&'p [&'p str]),
}

/// A row of either database.
pub(super) enum Row {
    Postgres(PgRow),
    Sqlite(SqliteRow),
}

impl Columns for Row {
    fn get<T: CommonType>(&self, column: &str) -> sqlx::Result<T> {
        match self {
            Row::Postgres(row) => row.get(column),
            Row::Sqlite(row) => row.get(column),
        }
    }
}

impl Db<'_> {
    /// Runs a statement that returns no rows. Returns the number of changed ones.
    pub(super) async fn execute(&mut self, sql: Sql, params: &[Param<'_>]) -> Result<u64> {
        match self {
            Db::Postgres(session) => {
                let query = bind_postgres(session.query(sql.postgres), params);
                let result = query.execute(session.connection()).await;
                result
                    .map(|result| result.rows_affected())
                    .map_err(|error| postgres_errors::from_statement(error, sql.doing))
            }
            Db::Sqlite(session) => {
                let result = match session.connection() {
                    Ok(connection) => bind_sqlite(sql.sqlite, params).execute(connection).await,
                    Err(error) => Err(error),
                };
                result
                    .map(|result| result.rows_affected())
                    .map_err(|error| sqlite_errors::from_statement(error, sql.doing))
            }
            Db::SqliteReaders(pool) => {
                let result = bind_sqlite(sql.sqlite, params).execute(*pool).await;
                result
                    .map(|result| result.rows_affected())
                    .map_err(|error| sqlite_errors::from_statement(error, sql.doing))
            }
        }
    }

    /// All rows of a query.
    pub(super) async fn fetch_all(&mut self, sql: Sql, params: &[Param<'_>]) -> Result<Vec<Row>> {
        match self {
            Db::Postgres(session) => {
                let query = bind_postgres(session.query(sql.postgres), params);
                let rows = query.fetch_all(session.connection()).await;
                rows.map(|rows| rows.into_iter().map(Row::Postgres).collect())
                    .map_err(|error| postgres_errors::from_statement(error, sql.doing))
            }
            Db::Sqlite(session) => {
                let rows = match session.connection() {
                    Ok(connection) => bind_sqlite(sql.sqlite, params).fetch_all(connection).await,
                    Err(error) => Err(error),
                };
                sqlite_rows(rows, sql)
            }
            Db::SqliteReaders(pool) => {
                let rows = bind_sqlite(sql.sqlite, params).fetch_all(*pool).await;
                sqlite_rows(rows, sql)
            }
        }
    }

    /// The row of a query that has exactly one.
    pub(super) async fn fetch_one(&mut self, sql: Sql, params: &[Param<'_>]) -> Result<Row> {
        let row = self.fetch_optional(sql, params).await?;
        let missing = || anyhow::anyhow!("the query returned no row").context(sql.doing);
        row.ok_or_else(|| StoreError::Unavailable(missing()))
    }

    /// The row of a query that has one at most.
    pub(super) async fn fetch_optional(
        &mut self,
        sql: Sql,
        params: &[Param<'_>],
    ) -> Result<Option<Row>> {
        let rows = self.fetch_all(sql, params).await?;
        Ok(rows.into_iter().next())
    }
}

fn sqlite_rows(rows: sqlx::Result<Vec<SqliteRow>>, sql: Sql) -> Result<Vec<Row>> {
    rows.map(|rows| rows.into_iter().map(Row::Sqlite).collect())
        .map_err(|error| sqlite_errors::from_statement(error, sql.doing))
}

fn bind_postgres<'q>(
    query: Query<'q, Postgres, PgArguments>,
    params: &[Param<'q>],
) -> Query<'q, Postgres, PgArguments> {
    params.iter().fold(query, |query, param| match *param {
        Param::Text(text) => query.bind(text),
        Param::OptionalText(text) => query.bind(text),
        Param::Int(number) => query.bind(number),
        Param::OptionalInt(number) => query.bind(number),
        Param::Ints(numbers) => query.bind(numbers),
        Param::Texts(texts) => query.bind(texts),
    })
}

fn bind_sqlite<'q>(sql: &'static str, params: &[Param<'q>]) -> Query<'q, Sqlite, SqliteArguments> {
    params
        .iter()
        .fold(sqlx::query(sql), |query, param| match *param {
            Param::Text(text) => query.bind(text),
            Param::OptionalText(text) => query.bind(text),
            Param::Int(number) => query.bind(number),
            Param::OptionalInt(number) => query.bind(number),
            Param::Ints(numbers) => query.bind(serde_json::json!(numbers).to_string()),
            Param::Texts(texts) => query.bind(serde_json::json!(texts).to_string()),
        })
}
