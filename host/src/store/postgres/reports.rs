//! What each host runs, as it says itself.

use sqlx::Row;

use super::errors;
use super::session::Session;
use crate::store::Result;

pub(super) async fn write(session: &mut Session, instance: i64, report: &str) -> Result<()> {
    let query = session.query(
        "insert into oncely.host_report (instance, report) values ($1, $2)
         on conflict (instance) do update set report = excluded.report, written_at = pg_catalog.now()",
    );
    query
        .bind(instance)
        .bind(report)
        .execute(session.connection())
        .await
        .map(|_| ())
        .map_err(|error| errors::of_statement(error, "note what the host runs"))
}

pub(super) async fn read(session: &mut Session) -> Result<Vec<String>> {
    let doing = |error| errors::of_statement(error, "read what hosts run");
    let query = session.query(
        "select report from oncely.host_report join oncely.host_instance on id = instance
         where lease_until > pg_catalog.clock_timestamp() order by instance",
    );
    let rows = query.fetch_all(session.connection()).await.map_err(doing)?;
    rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>().map_err(doing)
}
