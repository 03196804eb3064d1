//! The last audits, with their results.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::db::{Db, Param, Row, Sql, read_row, read_rows};
use super::rows::Columns as _;
use super::{Actor, Result, Store, shared};
use crate::model::schema::Time;

/// An audit that is about to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAuditRun {
    /// Only this worker's messages; `None` for all workers.
    pub worker: Option<String>,
    /// The beginning of the window.
    pub since: Timestamp,
    /// Whether it repairs.
    pub is_repair: bool,
    /// The host that runs it, as in its reports.
    pub host: String,
}

/// An audit, without its report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct AuditRun {
    /// Increases with time, apart from concurrent audits.
    pub id: i64,
    /// Only this worker's messages; `None` for all workers.
    pub worker: Option<String>,
    /// The beginning of the window.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// Whether it repairs.
    pub is_repair: bool,
    /// The host that runs it.
    pub host: String,
    /// The name of the token.
    pub actor: String,
    /// The name that the client states.
    pub stated_name: Option<String>,
    /// When it began.
    #[schemars(with = "Time")]
    pub started_at: Timestamp,
    /// `None` while it runs, or if the host ended meanwhile.
    #[schemars(with = "Option<Time>")]
    pub ended_at: Option<Timestamp>,
    /// The number of differences, and of those repaired; `None` without a report.
    pub differences: Option<u64>,
    /// See `differences`.
    pub repaired: Option<u64>,
    /// The reason of a failure.
    pub error: Option<String>,
}

/// The result of an audit: its report as JSON with the number of differences and of repairs, or the
/// reason of its failure.
pub type AuditRunResult = std::result::Result<(String, u64, u64), String>;

impl Store {
    /// Records that an audit begins. The last 100 audits are kept.
    pub async fn begin_audit_run(&self, run: &NewAuditRun, actor: &Actor) -> Result<i64> {
        let stated_name = actor.stated_name.as_deref().map(shared::printable);
        let worker = run.worker.as_deref().map(shared::printable);
        let params = [
            Param::OptionalText(worker.as_deref()),
            Param::Int(run.since.as_microsecond()),
            Param::Bool(run.is_repair),
            Param::Text(&run.host),
            Param::Text(&actor.name),
            Param::OptionalText(stated_name.as_deref()),
        ];
        let mut db = self.write().await?;
        let row = db.fetch_one(BEGIN, &params).await?;
        let id = read_row(&row, BEGIN.doing, |row| row.get("id"))?;
        db.execute(DELETE_OLD, &[Param::Int(id)]).await?;
        db.commit().await?;
        Ok(id)
    }

    /// Records the result of an audit.
    pub async fn end_audit_run(&self, id: i64, result: &AuditRunResult) -> Result<()> {
        let (report, differences, repaired, error) = match result {
            Ok((report, differences, repaired)) => {
                let numbers = (shared::signed(*differences)?, shared::signed(*repaired)?);
                (
                    Some(report.as_str()),
                    Some(numbers.0),
                    Some(numbers.1),
                    None,
                )
            }
            Err(error) => (None, None, None, Some(shared::printable(error))),
        };
        let params = [
            Param::Int(id),
            Param::OptionalText(report),
            Param::OptionalInt(differences),
            Param::OptionalInt(repaired),
            Param::OptionalText(error.as_deref()),
        ];
        let mut db = self.write().await?;
        db.execute(END, &params).await?;
        db.commit().await
    }

    /// The newest audits.
    pub async fn audit_runs(&self, limit: u32) -> Result<Vec<AuditRun>> {
        let mut db = self.read().await?;
        let params = [Param::OptionalInt(None), Param::Int(limit.into())];
        let rows = db.fetch_all(LIST, &params).await?;
        db.commit().await?;
        read_rows(&rows, LIST.doing, read)
    }

    /// One audit, with its report as JSON once it has one.
    pub async fn audit_run(&self, id: i64) -> Result<Option<(AuditRun, Option<String>)>> {
        let mut db = self.read().await?;
        let found = find(&mut db, id).await?;
        db.commit().await?;
        Ok(found)
    }
}

async fn find(db: &mut Db, id: i64) -> Result<Option<(AuditRun, Option<String>)>> {
    let params = [Param::OptionalInt(Some(id)), Param::Int(1)];
    let Some(row) = db.fetch_optional(LIST, &params).await? else {
        return Ok(None);
    };
    let run = read_row(&row, LIST.doing, read)?;
    let report = db.fetch_optional(REPORT, &[Param::Int(id)]).await?;
    let report = report.map(|row| read_row(&row, REPORT.doing, |row| row.get("report")));
    Ok(Some((run, report.transpose()?.flatten())))
}

fn read(row: &Row) -> sqlx::Result<AuditRun> {
    Ok(AuditRun {
        id: row.get("id")?,
        worker: row.get("worker")?,
        since: row.time("since")?,
        is_repair: row.get("is_repair")?,
        host: row.text("host")?,
        actor: row.text("actor")?,
        stated_name: row.get("stated_name")?,
        started_at: row.time("started_at")?,
        ended_at: row.optional_time("ended_at")?,
        differences: row.optional_number("differences")?,
        repaired: row.optional_number("repaired")?,
        error: row.get("error")?,
    })
}

const BEGIN: Sql = Sql {
    postgres: "insert into oncely.audit_run (worker, since, is_repair, host, actor, stated_name)
         values ($1, timestamptz 'epoch' + $2 * interval '1 microsecond', $3, $4, $5, $6) returning id",
    sqlite: "insert into oncely_audit_run (worker, since, is_repair, host, actor, stated_name)
         values ($1, $2, $3, $4, $5, $6) returning id",
    doing: "record an audit",
};

const DELETE_OLD: Sql = Sql {
    postgres: "delete from oncely.audit_run where id <= $1 - 100",
    sqlite: "delete from oncely_audit_run where id <= $1 - 100",
    doing: "delete old audits",
};

const END: Sql = Sql {
    postgres: "update oncely.audit_run set ended_at = pg_catalog.clock_timestamp(), report = $2, differences = $3,
             repaired = $4, error = $5
         where id = $1 and ended_at is null",
    sqlite: "update oncely_audit_run set ended_at = cast(unixepoch('subsec') * 1000000 as integer), report = $2,
             differences = $3, repaired = $4, error = $5
         where id = $1 and ended_at is null",
    doing: "record the result of an audit",
};

const LIST: Sql = Sql {
    postgres: "select id, worker, (extract(epoch from since) * 1000000)::bigint as since, is_repair, host, actor,
             stated_name, (extract(epoch from started_at) * 1000000)::bigint as started_at,
             (extract(epoch from ended_at) * 1000000)::bigint as ended_at, differences, repaired, error
         from oncely.audit_run where $1::bigint is null or id = $1 order by id desc limit $2",
    sqlite: "select id, worker, since, is_repair, host, actor, stated_name, started_at, ended_at, differences,
             repaired, error
         from oncely_audit_run where $1 is null or id = $1 order by id desc limit $2",
    doing: "read the audits",
};

const REPORT: Sql = Sql {
    postgres: "select report from oncely.audit_run where id = $1",
    sqlite: "select report from oncely_audit_run where id = $1",
    doing: "read the report of an audit",
};
