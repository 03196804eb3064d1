//! Row changes of a transaction: SQLite reports each touched row, and a reader supplies the old
//! one.

use crate::store::error::Doing as _;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value as Json};
use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{AssertSqlSafe, Column, Row};

use super::guest_values;
use super::session::Session;
use crate::model::sql::Value;
use crate::store::changes::check_row_count;
use crate::store::{Changes, Result, RowChange, TableRows};

/// The most rows that are tracked.
const TOUCHED_MAX: usize = 10_000;

/// The rows that SQLite reported since tracking began.
pub(in crate::store) struct ChangeTracker {
    touched: Arc<Mutex<TouchedRows>>,
    /// The number of rows that the connection had changed before.
    changes_before: i64,
}

#[derive(Default)]
struct TouchedRows {
    /// Table and row, in the order they were first touched.
    rows: Vec<(String, i64)>,
    known: HashSet<(String, i64)>,
    /// The number of reports, repeated rows included.
    reported: i64,
}

/// Starts tracking row changes.
pub(in crate::store) async fn track(session: &mut Session) -> Result<ChangeTracker> {
    let changes_before = total_changes(session).await?;
    let touched = Arc::new(Mutex::new(TouchedRows::default()));
    let shared = Arc::clone(&touched);
    let mut handle = session
        .connection()
        .doing("track row changes")?
        .lock_handle()
        .await
        .doing("track row changes")?;
    handle.set_update_hook(move |change| {
        let mut touched = shared.lock().unwrap_or_else(PoisonError::into_inner);
        touched.reported += 1;
        let row = (change.table.to_owned(), change.rowid);
        if touched.rows.len() < TOUCHED_MAX && touched.known.insert(row.clone()) {
            touched.rows.push(row);
        }
    });
    Ok(ChangeTracker {
        touched,
        changes_before,
    })
}

/// Stops tracking row changes.
pub(in crate::store) async fn stop_tracking(session: &mut Session) -> Result<()> {
    session
        .connection()
        .doing("stop tracking row changes")?
        .lock_handle()
        .await
        .doing("stop tracking row changes")?
        .remove_update_hook();
    Ok(())
}

/// The changes since tracking began, at most `limit` rows.
pub(in crate::store) async fn changes(
    session: &mut Session,
    readers: &SqlitePool,
    tracker: &ChangeTracker,
    limit: usize,
) -> Result<Changes> {
    let made = total_changes(session).await? - tracker.changes_before;
    let (rows, reported) = {
        let mut touched = tracker
            .touched
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut touched.rows), touched.reported)
    };

    // Compare each touched row with its committed version.
    let mut changes = Changes::default();
    let mut reader = readers.acquire().await.doing("compare rows")?;
    for (table, rowid) in rows.iter().take(limit) {
        let select = format!(
            "select * from \"{}\" where _rowid_ = $1",
            table.replace('"', "\"\"")
        );
        let before = sqlx::query(AssertSqlSafe(select.clone()))
            .bind(rowid)
            .fetch_optional(&mut *reader)
            .await;
        let after = sqlx::query(AssertSqlSafe(select)).bind(rowid);
        let after = after
            .fetch_optional(session.connection().doing("compare rows")?)
            .await
            .doing("compare rows")?;
        let (before, after) = (
            before.doing("compare rows")?.as_ref().map(row_as_json),
            after.as_ref().map(row_as_json),
        );
        if before != after {
            changes.rows.push(RowChange {
                table: table.clone(),
                before,
                after,
            });
        }
    }

    // Report the changes that were not compared.
    if rows.len() > limit {
        changes
            .omitted
            .push(format!("{} more rows", rows.len() - limit));
    }
    if made != reported {
        let why =
            "rows of tables without rowid, and rows deleted without `where`, are only counted";
        changes.omitted.push(format!(
            "{} row changes that SQLite does not report ({why})",
            made.abs_diff(reported)
        ));
    }
    Ok(changes)
}

/// All rows of the worker's tables, at most `limit` of each.
///
/// # Errors
/// `Refused` if a table has more.
pub(in crate::store) async fn table_rows(
    session: &mut Session,
    limit: usize,
) -> Result<Vec<TableRows>> {
    let context = "read the tables";
    let tables: Vec<String> = sqlx::query_scalar(
        "select name from sqlite_schema where type = 'table'
             and name not like 'oncely\\_%' escape '\\' and name not like 'sqlite\\_%' escape '\\'
         order by name",
    )
    .fetch_all(session.connection().doing(context)?)
    .await
    .doing(context)?;
    let mut found = Vec::new();
    for table in tables {
        let key: Vec<String> =
            sqlx::query_scalar("select name from pragma_table_info($1) where pk > 0")
                .bind(&table)
                .fetch_all(session.connection().doing(context)?)
                .await
                .doing(context)?;
        let name = table.replace('"', "\"\"");
        let select = format!("select * from \"{name}\" limit {}", limit + 1);
        let rows = sqlx::query(AssertSqlSafe(select))
            .fetch_all(session.connection().doing(context)?)
            .await
            .doing(context)?;
        check_row_count(&table, rows.len(), limit)?;
        found.push(TableRows {
            table,
            key: key.into_iter().collect(),
            rows: rows.iter().map(row_as_json).collect(),
        });
    }
    Ok(found)
}

async fn total_changes(session: &mut Session) -> Result<i64> {
    sqlx::query_scalar("select total_changes()")
        .fetch_one(session.connection().doing("count changes")?)
        .await
        .doing("count changes")
}

fn row_as_json(row: &SqliteRow) -> Json {
    let value = |at: usize| match guest_values::decode(row, at) {
        Ok(Value::Null) => Json::Null,
        Ok(Value::Int64(number)) => Json::from(number),
        Ok(Value::Float64(number)) => Json::from(number),
        Ok(Value::Bytes(bytes)) => Json::from(format!("\\x{}", hex::encode(bytes))),
        Ok(Value::Text(text)) => Json::from(text),
        Ok(other) => Json::from(format!("{other:?}")),
        Err(error) => Json::from(error.to_string()),
    };
    let columns = row
        .columns()
        .iter()
        .enumerate()
        .map(|(at, column)| (column.name().to_owned(), value(at)));
    Json::Object(columns.collect::<Map<_, _>>())
}
