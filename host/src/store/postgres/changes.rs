//! The row changes of a transaction. Rows that it wrote have its id in `xmin`. The old versions,
//! which other transactions still see, have it in `xmax`.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context;
use serde_json::Value as Json;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{Arguments, Row};

use super::errors;
use super::session::{Purpose, Session, Sessions};
use crate::store::changes::{check_row_count, pair};
use crate::store::error::Doing as _;
use crate::store::{Changes, Result, StoreError, TableRows};

/// Counts of inserted, updated and deleted rows, by table.
pub(in crate::store) type CountsByTable = HashMap<String, TableCounts>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct TableCounts {
    /// The table's object id, for finding its primary key.
    table: i64,
    written: [i64; 3],
}

/// A row as a JSON object with text values, which keep every digit.
const ROW: &str = "(select pg_catalog.jsonb_object_agg(key, value)
    from pg_catalog.jsonb_each_text(pg_catalog.to_jsonb(t)))::text as shown, t.ctid::text as place";

/// The rows written by this session. Counts may include earlier transactions that the server has
/// not flushed to its statistics yet.
pub(in crate::store) async fn counts(session: &mut Session) -> Result<CountsByTable> {
    let query = session.query(
        "select relid::bigint, relname::text, n_tup_ins, n_tup_upd, n_tup_del
         from pg_catalog.pg_stat_xact_user_tables
         where schemaname = 'app_default' and n_tup_ins + n_tup_upd + n_tup_del > 0",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("count written rows")?;
    let read = |row: &PgRow| {
        let written = [row.try_get(2)?, row.try_get(3)?, row.try_get(4)?];
        Ok((
            row.try_get(1)?,
            TableCounts {
                table: row.try_get(0)?,
                written,
            },
        ))
    };
    let counts: sqlx::Result<_> = rows.iter().map(read).collect();
    counts.doing("read the counts of written rows")
}

/// The changes since `before`, at most `limit` rows of each table. `others` begins the transaction
/// that sees the old rows. If comparing a table exceeds the statement timeout, only its counts are
/// returned, and the session is unusable afterwards.
pub(in crate::store) async fn changes(
    session: &mut Session,
    others: &Sessions,
    before: &CountsByTable,
    limit: usize,
) -> Result<Changes> {
    let mut touched: Vec<(String, TableCounts)> = counts(session)
        .await?
        .into_iter()
        .filter(|(table, counted)| before.get(table) != Some(counted))
        .collect();
    touched.sort_by(|(one, _), (other, _)| one.cmp(other));
    let mut changes = Changes::default();
    for (table, counted) in touched {
        match compare(session, others, &table, counted.table, limit).await {
            Ok((rows, is_all)) => {
                changes.rows.extend(rows);
                if !is_all {
                    changes.omitted.push(format!("more rows of {table}"));
                }
            }
            Err(error) => {
                let base = before.get(&table).map_or([0; 3], |counted| counted.written);
                let [inserted, updated, deleted] = [0, 1, 2].map(|at: usize| {
                    counted.written.get(at).copied().unwrap_or_default()
                        - base.get(at).copied().unwrap_or_default()
                });
                tracing::debug!(
                    table,
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "rows of a table not compared"
                );
                changes.omitted.push(format!(
                    "{table}: {inserted} rows inserted, {updated} updated, {deleted} deleted \
                     (scanning the table took too long)"
                ));
                return Ok(changes);
            }
        }
    }
    changes.refused = refused(session).await;
    Ok(changes)
}

/// A row as a JSON object. Numbers that are no integers are text, which keeps every digit.
const TYPED_ROW: &str = "(select pg_catalog.jsonb_object_agg(key, case
        when pg_catalog.jsonb_typeof(value) = 'number' and value::text !~ '^-?[0-9]{1,18}$'
        then pg_catalog.to_jsonb(value::text) else value end)
    from pg_catalog.jsonb_each(pg_catalog.to_jsonb(t)))::text";

/// All rows of the worker's tables, at most `limit` of each.
///
/// # Errors
/// `Refused` if a table has more.
pub(in crate::store) async fn table_rows(
    session: &mut Session,
    limit: usize,
) -> Result<Vec<TableRows>> {
    let context = "read the tables";
    let query = session.query(
        "select c.oid::bigint, c.relname::text from pg_catalog.pg_class as c
             join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
         where n.nspname = 'app_default' and c.relkind in ('r', 'p') and not c.relispartition
         order by c.relname",
    );
    let tables = query.fetch_all(session.connection()).await.doing(context)?;
    let mut found = Vec::new();
    for row in &tables {
        let number: i64 = row.try_get(0).doing(context)?;
        let table: String = row.try_get(1).doing(context)?;
        let key = key(session, number).await?;
        let name = table.replace('"', "\"\"");
        let select = format!(
            "select {TYPED_ROW} from app_default.\"{name}\" as t limit {}",
            limit + 1
        );
        let rows = session
            .guest_query(select, PgArguments::default())
            .fetch_all(session.connection())
            .await
            .doing(context)?;
        check_row_count(&table, rows.len(), limit)?;
        let parse =
            |row: &PgRow| -> anyhow::Result<Json> { Ok(serde_json::from_str(row.try_get(0)?)?) };
        let rows: anyhow::Result<Vec<Json>> = rows.iter().map(parse).collect();
        let rows = rows.context(context).map_err(StoreError::Unavailable)?;
        found.push(TableRows { table, key, rows });
    }
    Ok(found)
}

/// The rows of one table before and after, and whether these are all.
async fn compare(
    session: &mut Session,
    others: &Sessions,
    table: &str,
    number: i64,
    limit: usize,
) -> Result<(Vec<crate::store::RowChange>, bool)> {
    let from = format!("from app_default.\"{}\" as t", table.replace('"', "\"\""));
    let own = session.id().to_owned();
    let fetched_max = limit + 1;
    let written = format!(
        "select {ROW} {from} where t.xmin = $1::pg_catalog.xid8::pg_catalog.xid limit {fetched_max}"
    );
    let locked = format!(
        "select null as shown, t.ctid::text as place {from} where t.xmax = $1::pg_catalog.xid8::pg_catalog.xid"
    );
    let as_it_was = format!(
        "select {ROW} {from} where t.xmax = $1::pg_catalog.xid8::pg_catalog.xid limit {fetched_max}"
    );
    let key = key(session, number).await?;
    let after = rows(session, &own, written).await?;
    let locked: HashSet<String> = rows(session, &own, locked)
        .await?
        .into_iter()
        .map(|(_, place)| place)
        .collect();
    let mut other = others.begin(Purpose::Read).await?;
    let before = rows(&mut other, &own, as_it_was).await;
    other.rollback().await;

    // Rows that were only locked have the id in `xmax`, too, but are still there.
    let before: Vec<Json> = before?
        .into_iter()
        .filter(|(_, place)| !locked.contains(place))
        .map(|(row, _)| row)
        .collect();
    let is_all = before.len() <= limit && after.len() <= limit;
    let after = after.into_iter().map(|(row, _)| row).collect();
    Ok((pair(table, &key, before, after), is_all))
}

async fn rows(session: &mut Session, own: &str, statement: String) -> Result<Vec<(Json, String)>> {
    let context = |error| errors::from_statement(error, "compare rows");
    let mut arguments = PgArguments::default();
    arguments
        .add(own)
        .map_err(|error| context(sqlx::Error::Encode(error)))?;
    let rows = session
        .guest_query(statement, arguments)
        .fetch_all(session.connection())
        .await
        .map_err(context)?;
    let read = |row: &PgRow| -> anyhow::Result<_> {
        let shown: Option<String> = row.try_get("shown")?;
        let shown = shown.map_or(Ok(Json::Null), |shown| serde_json::from_str(&shown))?;
        Ok((shown, row.try_get("place")?))
    };
    rows.iter()
        .map(|row| {
            read(row)
                .context("read a row")
                .map_err(StoreError::Unavailable)
        })
        .collect()
}

/// The primary-key columns of a table.
async fn key(session: &mut Session, table: i64) -> Result<BTreeSet<String>> {
    let query = session.query(
        "select attname::text from pg_catalog.pg_index
             join pg_catalog.pg_attribute on attrelid = indrelid and attnum = any(indkey)
         where indrelid = $1::pg_catalog.oid and indisprimary",
    );
    let rows = query
        .bind(table)
        .fetch_all(session.connection())
        .await
        .doing("find a primary key")?;
    let key: sqlx::Result<_> = rows.iter().map(|row| row.try_get(0)).collect();
    key.doing("read a primary key")
}

/// The reason why a commit would be refused: a violated deferred constraint.
pub(in crate::store) async fn refused(session: &mut Session) -> Option<String> {
    session
        .check_constraints()
        .await
        .err()
        .map(|error| match error {
            sqlx::Error::Database(error) => error.message().to_owned(),
            error => error.to_string(),
        })
}
