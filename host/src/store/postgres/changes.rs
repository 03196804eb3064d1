//! What a transaction changed, row by row: rows that it wrote carry its number (`xmin`), and in everybody else's eyes the
//! rows as they were carry it too (`xmax`).

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context;
use serde_json::Value as Json;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{Arguments, Row};

use super::errors;
use super::session::{Purpose, Session, Sessions};
use crate::store::changes::pair;
use crate::store::{Changes, Result, StoreError};

/// By table: how many rows were inserted, updated and deleted.
pub(super) type CountsByTable = HashMap<String, TableCounts>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableCounts {
    /// Its number, for looking up its key.
    table: i64,
    written: [i64; 3],
}

/// One row as a JSON object of texts, which keeps every digit.
const ROW: &str = "(select pg_catalog.jsonb_object_agg(key, value)
    from pg_catalog.jsonb_each_text(pg_catalog.to_jsonb(t)))::text as shown, t.ctid::text as place";

/// What this session has written so far; the server may not have taken note yet of transactions before.
pub(super) async fn counts(session: &mut Session) -> Result<CountsByTable> {
    let query = session.query(
        "select relid::bigint, relname::text, n_tup_ins, n_tup_upd, n_tup_del
         from pg_catalog.pg_stat_xact_user_tables
         where schemaname = 'app_default' and n_tup_ins + n_tup_upd + n_tup_del > 0",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .map_err(|error| errors::from_statement(error, "count what was written"))?;
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
    counts.map_err(|error| errors::from_statement(error, "read what was written"))
}

/// What changed since `before`, at most `limit` rows of each table. `others` sees the rows as they were. A table that takes
/// longer to look through than the session's statements may is only counted, and nothing more can be done in the session.
pub(super) async fn changes(
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
                    "rows of {table} not compared: {:#}",
                    anyhow::Error::from(error)
                );
                changes.omitted.push(format!(
                    "{table}: {inserted} rows inserted, {updated} updated, {deleted} deleted (it took too long to look \
                     through the table)"
                ));
                return Ok(changes);
            }
        }
    }
    changes.refused = refused(session).await;
    Ok(changes)
}

/// The rows of one table before and after; false when there are more.
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
    // What was only locked is still there.
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

/// The columns of a table's primary key.
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
        .map_err(|error| errors::from_statement(error, "look up a primary key"))?;
    let key: sqlx::Result<_> = rows.iter().map(|row| row.try_get(0)).collect();
    key.map_err(|error| errors::from_statement(error, "read a primary key"))
}

/// What a commit would be refused for: deferred constraints.
async fn refused(session: &mut Session) -> Option<String> {
    session
        .check_constraints()
        .await
        .err()
        .map(|error| match error {
            sqlx::Error::Database(error) => error.message().to_owned(),
            error => error.to_string(),
        })
}
