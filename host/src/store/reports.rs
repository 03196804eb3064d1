//! The report of each host on its workers.

use anyhow::Context as _;

use super::db::{Db, Param, Sql};
use super::rows::Columns as _;
use super::{Result, StoreError, StoredReport};

/// Replaces the report of a host. SQLite has one host, which needs no instance.
pub(super) async fn write(db: &mut Db, instance: Option<i64>, report: &str) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.host_report (instance, report) values ($2, $1)
         on conflict (instance) do update set report = excluded.report, written_at = pg_catalog.now(),
             number = host_report.number + 1",
        sqlite: "insert into oncely_host_report (row, report) values (1, $1)
         on conflict (row) do update
         set report = excluded.report, number = oncely_host_report.number + 1, written_at = cast(unixepoch('subsec') * 1000000 as integer)",
        doing: "write the host's report",
    };
    let mut params = vec![Param::Text(report)];
    params.extend(instance.map(Param::Int));
    db.execute(sql, &params).await.map(drop)
}

/// The reports of all live hosts.
pub(super) async fn read(db: &mut Db) -> Result<Vec<StoredReport>> {
    let sql = Sql {
        postgres: "select pg_catalog.lpad(pg_catalog.to_hex(id), 16, '0') as instance, coalesce(number, 0) as number, report
         from oncely.host_instance left join oncely.host_report on instance = id
         where lease_until > pg_catalog.clock_timestamp() order by id",
        sqlite: "select 'the host' as instance, number, report from oncely_host_report",
        doing: "read the reports of hosts",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    let reports: sqlx::Result<Vec<StoredReport>> = rows
        .iter()
        .map(|row| {
            Ok(StoredReport {
                instance: row.text("instance")?,
                number: row.number("number")?,
                text: row.get("report")?,
            })
        })
        .collect();
    let reports = reports.context("read the report of a host");
    reports.map_err(StoreError::Unavailable)
}
