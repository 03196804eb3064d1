//! The host's report on its workers.

use sqlx::Row;
use sqlx::sqlite::SqlitePool;

use super::errors::Doing;
use super::session::Session;
use crate::store::{Result, StoredReport, shared};

/// Replaces the report of the host.
pub(super) async fn write(session: &mut Session, report: &str) -> Result<()> {
    sqlx::query(
        "insert into oncely_host_report (row, report) values (1, $1)
         on conflict (row) do update
         set report = excluded.report, number = oncely_host_report.number + 1, written_at = cast(unixepoch('subsec') * 1000000 as integer)",
    )
    .bind(report)
    .execute(session.connection().doing("write the report of the host")?)
    .await
    .map(|_| ())
    .doing("write the report of the host")
}

/// The report of the host, if it has written one.
pub(super) async fn read(readers: &SqlitePool) -> Result<Vec<StoredReport>> {
    let rows = sqlx::query("select number, report from oncely_host_report")
        .fetch_all(readers)
        .await
        .doing("read the reports of hosts")?;
    let report = |row: &sqlx::sqlite::SqliteRow| {
        let number = shared::unsigned(row.try_get("number")?);
        Ok(StoredReport {
            instance: "the host".to_owned(),
            number,
            text: row.try_get("report")?,
        })
    };
    rows.iter()
        .map(report)
        .collect::<sqlx::Result<_>>()
        .doing("read the reports of hosts")
}
