//! One way to run a statement on either database.
//!
//! A function of a table holds the SQL of both dialects, side by side. [`Db`] hides the two kinds
//! of sqlx: sessions, parameters and rows.

use anyhow::Context;
use sqlx::postgres::{PgArguments, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::raw_sql;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};

use super::error::Doing as _;
use super::postgres::session::Session as PostgresSession;
use super::rows::{Columns, CommonType};
use super::sqlite::session::Session as SqliteSession;
use super::{Result, StoreError};

/// The place where statements of the platform run: a transaction, or connections that only read.
pub(super) enum Db {
    Postgres(PostgresSession),
    Sqlite(SqliteSession),
    /// Connections of SQLite that only read, outside of a transaction.
    SqliteReaders(SqlitePool),
}

/// The transaction of a [`Db`], for statements that differ in more than their dialect.
pub(super) enum Session<'s> {
    Postgres(&'s mut PostgresSession),
    Sqlite(&'s mut SqliteSession),
}

/// A statement in both dialects. Parameters have the same numbers in both.
#[derive(Clone, Copy)]
pub(super) struct Sql {
    pub postgres: &'static str,
    pub sqlite: &'static str,
    /// The action in the present tense, for errors, such as `read the outbox`.
    pub doing: &'static str,
}

impl Sql {
    /// A statement on tables that only PostgreSQL has.
    pub(super) const fn on_postgres(postgres: &'static str, doing: &'static str) -> Self {
        Sql {
            postgres,
            sqlite: "",
            doing,
        }
    }
}

/// A parameter of a statement.
#[derive(Clone, Copy)]
pub(super) enum Param<'p> {
    Text(&'p str),
    OptionalText(Option<&'p str>),
    Int(i64),
    OptionalInt(Option<i64>),
    Bool(bool),
    Bytes(&'p [u8]),
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

impl Db {
    /// The transaction.
    ///
    /// # Errors
    /// `Unavailable` outside of one, where nothing can be written.
    pub(super) fn session(&mut self) -> Result<Session<'_>> {
        match self {
            Db::Postgres(session) => Ok(Session::Postgres(session)),
            Db::Sqlite(session) => Ok(Session::Sqlite(session)),
            Db::SqliteReaders(_) => Err(StoreError::Unavailable(anyhow::anyhow!(
                "the connection only reads"
            ))),
        }
    }

    /// Runs a statement that returns no rows. Returns the number of changed ones.
    pub(super) async fn execute(&mut self, sql: Sql, params: &[Param<'_>]) -> Result<u64> {
        match self.session()? {
            Session::Postgres(session) => {
                let query = bind_postgres(session.query(sql.postgres), params);
                let result = query.execute(session.connection()).await;
                result.map(|result| result.rows_affected()).doing(sql.doing)
            }
            Session::Sqlite(session) => {
                let connection = session.connection().doing(sql.doing)?;
                let result = bind_sqlite(sql.sqlite, params).execute(connection).await;
                result.map(|result| result.rows_affected()).doing(sql.doing)
            }
        }
    }

    /// Runs several statements without parameters or results, in one dialect.
    pub(super) async fn run_script(
        &mut self,
        script: &'static str,
        doing: &'static str,
    ) -> Result<()> {
        match self.session()? {
            Session::Postgres(session) => {
                let ran = raw_sql(script).execute(session.connection()).await;
                ran.map(drop).doing(doing)
            }
            Session::Sqlite(session) => {
                let connection = session.connection().doing(doing)?;
                let ran = raw_sql(script).execute(connection).await;
                ran.map(drop).doing(doing)
            }
        }
    }

    /// All rows of a query.
    pub(super) async fn fetch_all(&mut self, sql: Sql, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let rows = match self {
            Db::Postgres(session) => {
                let query = bind_postgres(session.query(sql.postgres), params);
                let rows = query.fetch_all(session.connection()).await;
                return rows
                    .map(|rows| rows.into_iter().map(Row::Postgres).collect())
                    .doing(sql.doing);
            }
            Db::Sqlite(session) => {
                let connection = session.connection().doing(sql.doing)?;
                bind_sqlite(sql.sqlite, params).fetch_all(connection).await
            }
            Db::SqliteReaders(readers) => {
                bind_sqlite(sql.sqlite, params).fetch_all(&*readers).await
            }
        };
        rows.map(|rows| rows.into_iter().map(Row::Sqlite).collect())
            .doing(sql.doing)
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

    /// Ends the transaction. Its writes are durable unless it was begun without that.
    pub(super) async fn commit(self) -> Result<()> {
        match self {
            Db::Postgres(session) => session.commit().await,
            Db::Sqlite(session) => session.commit().await,
            Db::SqliteReaders(_) => Ok(()),
        }
    }
}

/// Converts rows, and names the action in the error of an unexpected column.
pub(super) fn read_rows<R, T>(
    rows: &[R],
    doing: &'static str,
    read: impl Fn(&R) -> sqlx::Result<T>,
) -> Result<Vec<T>> {
    let values: sqlx::Result<Vec<T>> = rows.iter().map(read).collect();
    values.context(doing).map_err(StoreError::Unavailable)
}

/// Like [`read_rows`], for one row.
pub(super) fn read_row<R, T>(
    row: &R,
    doing: &'static str,
    read: impl Fn(&R) -> sqlx::Result<T>,
) -> Result<T> {
    read(row).context(doing).map_err(StoreError::Unavailable)
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
        Param::Bool(flag) => query.bind(flag),
        Param::Bytes(bytes) => query.bind(bytes),
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
            Param::Bool(flag) => query.bind(flag),
            Param::Bytes(bytes) => query.bind(bytes),
            Param::Ints(numbers) => query.bind(serde_json::json!(numbers).to_string()),
            Param::Texts(texts) => query.bind(serde_json::json!(texts).to_string()),
        })
}
