//! Activities: changes that were requested of the control API, with their actors and results.
//!
//! An activity is written before its change begins, and its outcome afterwards. So no change is
//! without a record, even if the host dies meanwhile.

use anyhow::Context as _;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::db::{Db, Param, Row, Sql};
use super::rows::Columns as _;
use super::{Result, Store, StoreError, shared};
use crate::model::schema::Time;

/// The caller of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// The name of the token.
    pub name: String,
    /// The id of the token; `None` for the host's own.
    pub token: Option<i64>,
    /// The name that the client states. Nothing vouches for it.
    pub stated_name: Option<String>,
}

/// A change that is about to begin.
#[derive(Debug, Clone, PartialEq)]
pub struct NewActivity {
    /// The name of the command, such as `rollback`.
    pub verb: &'static str,
    /// The worker concerned, if it is one.
    pub worker: Option<String>,
    /// The changed thing, for display, such as `dead letter 7`; empty for the worker itself.
    pub object: String,
    /// The parameters.
    pub details: Value,
}

/// The result of a change.
#[derive(Debug, Clone, PartialEq)]
pub enum ActivityOutcome {
    /// It was made, with this result.
    Done(Value),
    /// It failed, for this reason.
    Failed(String),
}

/// An activity with its outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ActivityRecord {
    /// Increases with time, apart from concurrent changes.
    pub id: i64,
    /// When the change was requested.
    #[schemars(with = "Time")]
    pub at: Timestamp,
    /// The name of the token.
    pub actor: String,
    /// The id of the token; `None` for the host's own.
    pub token_id: Option<i64>,
    /// The name that the client states.
    pub stated_name: Option<String>,
    /// The name of the command.
    pub verb: String,
    /// The worker concerned, if it is one.
    pub worker: Option<String>,
    /// The changed thing; empty for the worker itself.
    pub object: String,
    /// The parameters.
    pub details: Value,
    /// `done` or `failed`; `None` while it runs, or if the host ended meanwhile.
    pub outcome: Option<String>,
    /// The end of the change.
    #[schemars(with = "Option<Time>")]
    pub ended_at: Option<Timestamp>,
    /// The reason of a failure.
    pub error: Option<String>,
    /// The result; `None` without an outcome.
    pub result: Option<Value>,
}

/// A filter for activities. Results are sorted newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ActivityFilter {
    /// The name of a worker; `None` for all.
    pub worker: Option<String>,
    /// The name of a token; `None` for all.
    pub actor: Option<String>,
    /// The name of a command; `None` for all.
    pub verb: Option<String>,
    /// Requested at this time or later.
    #[schemars(with = "Option<Time>")]
    pub since: Option<Timestamp>,
    /// Only ids below this one.
    pub below: Option<i64>,
    /// The maximum number of results.
    pub limit: u32,
}

impl Store {
    /// Records a change that is about to begin. Durable once this returns. Returns its id.
    pub async fn begin_activity(&self, actor: &Actor, activity: &NewActivity) -> Result<i64> {
        let mut db = self.write().await?;
        let id = begin(&mut db, actor, activity).await?;
        db.commit().await?;
        Ok(id)
    }

    /// Records the result of a change.
    pub async fn end_activity(&self, id: i64, outcome: &ActivityOutcome) -> Result<()> {
        let mut db = self.write().await?;
        end(&mut db, id, outcome).await?;
        db.commit().await
    }

    /// The matching activities, newest first.
    pub async fn activities(&self, filter: &ActivityFilter) -> Result<Vec<ActivityRecord>> {
        let mut db = self.read().await?;
        let found = list(&mut db, filter).await?;
        db.commit().await?;
        Ok(found)
    }
}

async fn begin(db: &mut Db, actor: &Actor, activity: &NewActivity) -> Result<i64> {
    let sql = Sql {
        postgres: "insert into oncely.activity (actor, token_id, stated_name, verb, worker, object, details)
         values ($1, $2, $3, $4, $5, $6, $7) returning id",
        sqlite: "insert into oncely_activity (actor, token_id, stated_name, verb, worker, object, details)
         values ($1, $2, $3, $4, $5, $6, $7) returning id",
        doing: "write an activity",
    };
    let stated_name = actor.stated_name.as_deref().map(shared::printable);
    let worker = activity.worker.as_deref().map(shared::printable);
    let object = shared::printable(&activity.object);
    let details = activity.details.to_string();
    let params = [
        Param::Text(&actor.name),
        Param::OptionalInt(actor.token),
        Param::OptionalText(stated_name.as_deref()),
        Param::Text(activity.verb),
        Param::OptionalText(worker.as_deref()),
        Param::Text(&object),
        Param::Text(&details),
    ];
    let row = db.fetch_one(sql, &params).await?;
    row.get("id")
        .context("read the id of an activity")
        .map_err(StoreError::Unavailable)
}

/// Writes the result of a change, once.
pub(super) async fn end(db: &mut Db, id: i64, outcome: &ActivityOutcome) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.activity_outcome (activity_id, outcome, error, details)
         values ($1, $2, $3, $4) on conflict do nothing",
        sqlite: "insert into oncely_activity_outcome (activity_id, outcome, error, details)
         values ($1, $2, $3, $4) on conflict do nothing",
        doing: "write the outcome of an activity",
    };
    let (name, error, details) = match outcome {
        ActivityOutcome::Done(result) => ("done", None, result.to_string()),
        ActivityOutcome::Failed(why) => ("failed", Some(shared::printable(why)), "{}".to_owned()),
    };
    let params = [
        Param::Int(id),
        Param::Text(name),
        Param::OptionalText(error.as_deref()),
        Param::Text(&details),
    ];
    db.execute(sql, &params).await.map(drop)
}

async fn list(db: &mut Db, filter: &ActivityFilter) -> Result<Vec<ActivityRecord>> {
    let sql = Sql {
        postgres: "select id, (extract(epoch from activity.at) * 1000000)::bigint as at, actor, token_id, stated_name,
             verb, worker, object, activity.details, outcome, error, activity_outcome.details as result,
             (extract(epoch from activity_outcome.at) * 1000000)::bigint as ended_at
         from oncely.activity left join oncely.activity_outcome on activity_id = id
         where ($1::text is null or worker = $1) and ($2::text is null or actor = $2)
             and ($3::text is null or verb = $3)
             and ($4::bigint is null or activity.at >= timestamptz 'epoch' + $4 * interval '1 microsecond')
             and ($5::bigint is null or id < $5)
         order by id desc limit $6",
        sqlite: "select id, activity.at, actor, token_id, stated_name,
             verb, worker, object, activity.details, outcome, error, ended.details as result, ended.at as ended_at
         from oncely_activity as activity left join oncely_activity_outcome as ended on activity_id = id
         where ($1 is null or worker = $1) and ($2 is null or actor = $2) and ($3 is null or verb = $3)
             and ($4 is null or activity.at >= $4) and ($5 is null or id < $5)
         order by id desc limit $6",
        doing: "read the activities",
    };
    let params = [
        Param::OptionalText(filter.worker.as_deref()),
        Param::OptionalText(filter.actor.as_deref()),
        Param::OptionalText(filter.verb.as_deref()),
        Param::OptionalInt(filter.since.map(Timestamp::as_microsecond)),
        Param::OptionalInt(filter.below),
        Param::Int(filter.limit.into()),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    let read = |row: &Row| -> anyhow::Result<ActivityRecord> {
        let result: Option<String> = row.get("result")?;
        Ok(ActivityRecord {
            id: row.get("id")?,
            at: row.time("at")?,
            actor: row.text("actor")?,
            token_id: row.get("token_id")?,
            stated_name: row.get("stated_name")?,
            verb: row.text("verb")?,
            worker: row.get("worker")?,
            object: row.text("object")?,
            details: serde_json::from_str(&row.text("details")?)?,
            outcome: row.get("outcome")?,
            ended_at: row.optional_time("ended_at")?,
            error: row.get("error")?,
            result: result.map(|text| serde_json::from_str(&text)).transpose()?,
        })
    };
    let records: anyhow::Result<Vec<_>> = rows.iter().map(read).collect();
    records
        .context("read an activity")
        .map_err(StoreError::Unavailable)
}
