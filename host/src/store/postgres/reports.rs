//! The report of each host.

use sqlx::Row;

use super::errors::Doing;
use super::session::Session;
use crate::store::{Result, StoredReport, shared};

pub(super) async fn write(session: &mut Session, instance: i64, report: &str) -> Result<()> {
    let query = session.query(
        "insert into oncely.host_report (instance, report) values ($1, $2)
         on conflict (instance) do update set report = excluded.report, written_at = pg_catalog.now(),
             number = host_report.number + 1",
    );
    query
        .bind(instance)
        .bind(report)
        .execute(session.connection())
        .await
        .map(|_| ())
        .doing("write the host's report")
}

pub(super) async fn read(session: &mut Session) -> Result<Vec<StoredReport>> {
    let query = session.query(
        "select pg_catalog.lpad(pg_catalog.to_hex(id), 16, '0') as instance, coalesce(number, 0) as number, report
         from oncely.host_instance left join oncely.host_report on instance = id
         where lease_until > pg_catalog.clock_timestamp() order by id",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("read the reports of hosts")?;
    let report = |row: &sqlx::postgres::PgRow| {
        let number = shared::unsigned(row.try_get("number")?);
        Ok(StoredReport {
            instance: row.try_get("instance")?,
            number,
            text: row.try_get("report")?,
        })
    };
    rows.iter()
        .map(report)
        .collect::<sqlx::Result<_>>()
        .doing("read the reports of hosts")
}
