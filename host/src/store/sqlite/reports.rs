//! What the host runs, as it says itself.

use sqlx::Row;
use sqlx::sqlite::SqlitePool;

use super::errors;
use super::session::Session;
use crate::store::Result;

pub(super) async fn write(session: &mut Session, report: &str) -> Result<()> {
    let doing = |error| errors::of_statement(error, "note what the host runs");
    sqlx::query(
        "insert into oncely_host_report (row, report) values (1, $1)
         on conflict (row) do update
         set report = excluded.report, written_at = cast(unixepoch('subsec') * 1000000 as integer)",
    )
    .bind(report)
    .execute(session.connection().map_err(doing)?)
    .await
    .map(|_| ())
    .map_err(doing)
}

pub(super) async fn read(readers: &SqlitePool) -> Result<Vec<String>> {
    let doing = |error| errors::of_statement(error, "read what hosts run");
    let rows = sqlx::query("select report from oncely_host_report").fetch_all(readers).await.map_err(doing)?;
    rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>().map_err(doing)
}
