//! Redrives of many dead letters, as jobs that run on the hosts.
//!
//! A chunk of a job is one transaction: it redrives dead letters and records their results. The row
//! of the job is locked first, so two hosts never process one chunk, and a pause or a cancellation
//! waits for the current one.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::db::{Db, Param, Row, Sql, read_row, read_rows};
use super::dead_letters::action_result;
use super::rows::Columns as _;
use super::{
    Actor, Attribution, DeadLetterActionResult, OutboxRow, Redrive, Result, Store, StoreError,
    redrive, shared,
};
use crate::fault;
use crate::model::schema::Time;

/// How many dead letters of a new job one statement writes.
const ITEMS_PER_STATEMENT: usize = 10_000;

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// A host processes it, or will do so within seconds.
    Running,
    /// An operator paused it.
    Paused,
    /// An operator cancelled it. Dead letters that were redriven by then stay redriven.
    Cancelled,
    /// All its dead letters are processed.
    Done,
}

impl JobState {
    /// The name in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Running => "running",
            JobState::Paused => "paused",
            JobState::Cancelled => "cancelled",
            JobState::Done => "done",
        }
    }

    /// Whether nothing changes any more.
    pub fn is_final(self) -> bool {
        matches!(self, JobState::Cancelled | JobState::Done)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let all = [
            JobState::Running,
            JobState::Paused,
            JobState::Cancelled,
            JobState::Done,
        ];
        all.into_iter()
            .find(|state| state.as_str() == text)
            .with_context(|| format!("`{text}` is not a state of a job"))
    }
}

/// A job that is about to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRedriveJob {
    /// In the order of their redrives, each dead letter once.
    pub dead_letters: Vec<NewJobItem>,
    /// Dead letters per second; 0 for no limit.
    pub rate: u32,
    /// Redrive also dead letters that are in progress or closed.
    pub again: bool,
    /// The reason, as the operator wrote it.
    pub note: Option<String>,
}

/// A dead letter of a new job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJobItem {
    /// The id of the dead letter.
    pub id: i64,
    /// Refuse it unless this is its number of redrives; `None` for the number at the creation.
    pub generation: Option<u32>,
    /// The preconditions of a plan, as JSON.
    pub preconditions: Option<String>,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RedriveJob {
    /// The number that operators pass to the commands.
    pub id: i64,
    /// Whether it runs, is paused or has ended.
    pub state: JobState,
    /// Dead letters per second; 0 for no limit.
    pub rate: u32,
    /// Whether dead letters that are in progress or closed are redriven, too.
    pub again: bool,
    /// The number of its dead letters.
    pub total: u64,
    /// How many were redriven so far.
    pub redriven: u64,
    /// How many were refused so far.
    pub refused: u64,
    /// The name of the token that created it.
    pub actor: String,
    /// The name that the client stated.
    pub stated_name: Option<String>,
    /// The reason, as the operator wrote it.
    pub note: Option<String>,
    /// When it was created.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// When it was done or cancelled.
    #[schemars(with = "Option<Time>")]
    pub ended_at: Option<Timestamp>,
    /// The last failure of a host that ran it; `None` after a success.
    pub error: Option<String>,
}

/// A dead letter of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobItem {
    /// Its position in the job, from 0 on.
    pub position: u64,
    /// The id of the dead letter.
    pub id: i64,
    /// The result; `None` until it is processed.
    pub result: Option<DeadLetterActionResult>,
    /// The preconditions of a plan, as JSON.
    #[serde(skip)]
    pub preconditions: Option<String>,
}

/// A change of a job's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobAction {
    /// Stop after the current chunk.
    Pause,
    /// Continue.
    Resume,
    /// Stop after the current chunk and end the job.
    Cancel,
}

impl Store {
    /// Creates a job, which runs at once. Deletes jobs that ended 30 days ago.
    pub async fn create_redrive_job(
        &self,
        job: &NewRedriveJob,
        actor: &Actor,
    ) -> Result<RedriveJob> {
        let mut db = self.write().await?;
        db.execute(DELETE_OLD, &[]).await?;
        let created = create(&mut db, job, actor).await?;
        db.commit().await?;
        Ok(created)
    }

    /// The newest jobs.
    pub async fn redrive_jobs(&self, limit: u32) -> Result<Vec<RedriveJob>> {
        let mut db = self.read().await?;
        let params = [Param::OptionalInt(None), Param::Int(limit.into())];
        let rows = db.fetch_all(LIST, &params).await?;
        db.commit().await?;
        rows.iter().map(job).collect()
    }

    /// One job.
    pub async fn redrive_job(&self, id: i64) -> Result<Option<RedriveJob>> {
        let mut db = self.read().await?;
        let params = [Param::OptionalInt(Some(id)), Param::Int(1)];
        let row = db.fetch_optional(LIST, &params).await?;
        db.commit().await?;
        row.as_ref().map(job).transpose()
    }

    /// The dead letters of a job from a position on, in order.
    pub async fn redrive_job_items(&self, id: i64, from: u64, limit: u32) -> Result<Vec<JobItem>> {
        let mut db = self.read().await?;
        let params = [
            Param::Int(id),
            Param::Int(shared::signed(from)?),
            Param::Int(limit.into()),
        ];
        let rows = db.fetch_all(ITEMS, &params).await?;
        db.commit().await?;
        items(&rows)
    }

    /// The first dead letters of a job that were refused, in order.
    pub async fn refused_redrive_job_items(&self, id: i64, limit: u32) -> Result<Vec<JobItem>> {
        let mut db = self.read().await?;
        let params = [Param::Int(id), Param::Int(limit.into())];
        let rows = db.fetch_all(REFUSED_ITEMS, &params).await?;
        db.commit().await?;
        items(&rows)
    }

    /// Pauses, resumes or cancels a job. `None` if there is none.
    ///
    /// # Errors
    /// `Refused` if its state does not permit that.
    pub async fn change_redrive_job(
        &self,
        id: i64,
        action: JobAction,
    ) -> Result<Option<RedriveJob>> {
        let mut db = self.write().await?;
        let changed = change(&mut db, id, action).await?;
        db.commit().await?;
        Ok(changed)
    }

    /// Leases a running job to `runner`, a number that stands for this start of the host, until 10
    /// seconds after its last chunk. `None` if no job waits for a host.
    pub async fn lease_redrive_job(&self, runner: i64) -> Result<Option<RedriveJob>> {
        let mut db = self.write().await?;
        let row = db.fetch_optional(LEASE, &[Param::Int(runner)]).await?;
        db.commit().await?;
        row.as_ref().map(job).transpose()
    }

    /// Extends the lease of a job, if `runner` has it.
    pub async fn renew_redrive_job(&self, id: i64, runner: i64) -> Result<()> {
        let mut db = self.write().await?;
        db.execute(RENEW, &[Param::Int(id), Param::Int(runner)])
            .await?;
        db.commit().await
    }

    /// The next dead letters of a job that are not processed.
    pub async fn open_redrive_job_items(&self, id: i64, limit: u32) -> Result<Vec<JobItem>> {
        let mut db = self.read().await?;
        let params = [Param::Int(id), Param::Int(limit.into())];
        let rows = db.fetch_all(OPEN_ITEMS, &params).await?;
        db.commit().await?;
        items(&rows)
    }

    /// Redrives these dead letters of a job, except those with a reason in `refusals`, and records
    /// the results, in one transaction. The job is done after its last dead letter. Returns the
    /// outputs that are due for publishing now. `None` if the job is not leased to `runner` any
    /// more or does not run.
    pub async fn run_redrive_job(
        &self,
        id: i64,
        runner: i64,
        positions: &[u64],
        refusals: &HashMap<i64, String>,
    ) -> Result<Option<Vec<OutboxRow>>> {
        let mut db = self.write().await?;
        let Some(rows) = run(&mut db, id, runner, positions, refusals).await? else {
            return Ok(None);
        };
        fault::point(fault::BEFORE_REDRIVE);
        db.commit().await?;
        fault::point(fault::AFTER_REDRIVE);
        Ok(Some(rows))
    }

    /// Records the failure of a host that runs a job.
    pub async fn record_redrive_job_error(&self, id: i64, why: &str) -> Result<()> {
        let sql = Sql {
            postgres: "update oncely.redrive_job set error = $2 where id = $1 and state = 'running'",
            sqlite: "update oncely_redrive_job set error = $2 where id = $1 and state = 'running'",
            doing: "record the failure of a job",
        };
        let why = shared::printable(why);
        let mut db = self.write().await?;
        db.execute(sql, &[Param::Int(id), Param::Text(&why)])
            .await?;
        db.commit().await
    }
}

async fn create(db: &mut Db, new: &NewRedriveJob, actor: &Actor) -> Result<RedriveJob> {
    // The job.
    let sql = Sql {
        postgres: "insert into oncely.redrive_job (rate, again, total, actor, stated_name, note)
         values ($1, $2, $3, $4, $5, $6) returning id",
        sqlite: "insert into oncely_redrive_job (rate, again, total, actor, stated_name, note)
         values ($1, $2, $3, $4, $5, $6) returning id",
        doing: "create a job",
    };
    let (stated_name, note) = (actor.stated_name.as_deref(), new.note.as_deref());
    let (stated_name, note) = (
        stated_name.map(shared::printable),
        note.map(shared::printable),
    );
    let params = [
        Param::Int(i64::from(new.rate.min(i32::MAX as u32))),
        Param::Bool(new.again),
        Param::Int(shared::signed(new.dead_letters.len() as u64)?),
        Param::Text(&actor.name),
        Param::OptionalText(stated_name.as_deref()),
        Param::OptionalText(note.as_deref()),
    ];
    let row = db.fetch_one(sql, &params).await?;
    let id: i64 = read_row(&row, sql.doing, |row| row.get("id"))?;

    // Its dead letters.
    let mut position = 0;
    for chunk in new.dead_letters.chunks(ITEMS_PER_STATEMENT) {
        let given: Vec<_> = chunk
            .iter()
            .zip(position..)
            .map(|(item, position): (&NewJobItem, i64)| {
                serde_json::json!({ "position": position, "id": item.id,
                    "generation": item.generation, "preconditions": item.preconditions })
            })
            .collect();
        position += shared::signed(chunk.len() as u64)?;
        let given = serde_json::Value::Array(given).to_string();
        let params = [Param::Int(id), Param::Text(&given), Param::Bool(new.again)];
        db.execute(INSERT_ITEMS, &params).await?;
    }
    if new.dead_letters.is_empty() {
        finish(db, id).await?;
    }
    find(db, id)
        .await?
        .ok_or_else(|| StoreError::Unavailable(anyhow!("the new job {id} is missing")))
}

async fn find(db: &mut Db, id: i64) -> Result<Option<RedriveJob>> {
    let params = [Param::OptionalInt(Some(id)), Param::Int(1)];
    let row = db.fetch_optional(LIST, &params).await?;
    row.as_ref().map(job).transpose()
}

async fn change(db: &mut Db, id: i64, action: JobAction) -> Result<Option<RedriveJob>> {
    let sql = Sql {
        postgres: "update oncely.redrive_job set state = $2, leased_until = null,
             ended_at = case when $2 = 'cancelled' then pg_catalog.now() end
         where id = $1 and state = any($3)",
        sqlite: "update oncely_redrive_job set state = $2, leased_until = null,
             ended_at = case when $2 = 'cancelled' then cast(unixepoch('subsec') * 1000000 as integer) end
         where id = $1 and state in (select value from json_each($3))",
        doing: "change the state of a job",
    };
    let (state, from): (JobState, &[&str]) = match action {
        JobAction::Pause => (JobState::Paused, &["running", "paused"]),
        JobAction::Resume => (JobState::Running, &["running", "paused"]),
        JobAction::Cancel => (JobState::Cancelled, &["running", "paused"]),
    };
    let params = [
        Param::Int(id),
        Param::Text(state.as_str()),
        Param::Texts(from),
    ];
    let changed = db.execute(sql, &params).await?;
    match find(db, id).await? {
        Some(job) if changed == 0 && job.state != state => Err(StoreError::Refused(anyhow!(
            "job {id} has ended: it is {}",
            job.state.as_str()
        ))),
        found => Ok(found),
    }
}

async fn run(
    db: &mut Db,
    id: i64,
    runner: i64,
    positions: &[u64],
    refusals: &HashMap<i64, String>,
) -> Result<Option<Vec<OutboxRow>>> {
    // Lock the job.
    let params = [Param::Int(id), Param::Int(runner)];
    let Some(row) = db.fetch_optional(RENEW, &params).await? else {
        return Ok(None);
    };
    let (again, by) = read_row(&row, RENEW.doing, |row| {
        let by = Attribution {
            actor: row.text("actor")?,
            stated_name: row.get("stated_name")?,
            note: row.get("note")?,
        };
        Ok((row.get::<bool>("again")?, by))
    })?;

    // Redrive the dead letters that are not processed.
    let positions: Vec<i64> = positions
        .iter()
        .map(|position| shared::signed(*position))
        .collect::<Result<_>>()?;
    let params = [Param::Int(id), Param::Ints(&positions)];
    let rows = db.fetch_all(UNPROCESSED, &params).await?;
    let unprocessed = read_rows(&rows, UNPROCESSED.doing, |row| {
        let generation: Option<i64> = row.get("generation")?;
        let redrive = Redrive {
            id: row.get("dead_letter_id")?,
            generation: generation.map(shared::narrow),
            again,
        };
        Ok((row.get::<i64>("position")?, redrive))
    })?;
    let wanted: Vec<Redrive> = unprocessed
        .iter()
        .map(|(_, redrive)| *redrive)
        .filter(|redrive| !refusals.contains_key(&redrive.id))
        .collect();
    let (results, outputs) = redrive::redrive(db, &wanted, &by).await?;

    // Record the results.
    let mut refused: Vec<serde_json::Value> = Vec::new();
    let mut redriven: Vec<i64> = Vec::new();
    let done: HashSet<i64> = results
        .iter()
        .filter(|result| result.refused.is_none())
        .map(|result| result.id)
        .collect();
    for (position, redrive) in &unprocessed {
        if done.contains(&redrive.id) {
            redriven.push(*position);
            continue;
        }
        let result = results.iter().find(|result| result.id == redrive.id);
        let why = result.and_then(|result| result.refused.as_deref());
        let why = why.or(refusals.get(&redrive.id).map(String::as_str));
        let why = shared::printable(why.unwrap_or("no such dead letter"));
        refused.push(serde_json::json!({ "position": position, "why": why }));
    }
    let counts = [redriven.len(), refused.len()];
    let params = [Param::Int(id), Param::Ints(&redriven)];
    db.execute(SET_REDRIVEN, &params).await?;
    let refused = serde_json::Value::Array(refused).to_string();
    db.execute(SET_REFUSED, &[Param::Int(id), Param::Text(&refused)])
        .await?;
    let [redriven, refused] = counts.map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let params = [Param::Int(id), Param::Int(redriven), Param::Int(refused)];
    db.execute(COUNT, &params).await?;
    finish(db, id).await?;
    Ok(Some(outputs))
}

/// Ends a job without unprocessed dead letters.
async fn finish(db: &mut Db, id: i64) -> Result<()> {
    db.execute(FINISH, &[Param::Int(id)]).await.map(drop)
}

fn job(row: &Row) -> Result<RedriveJob> {
    let read = || -> anyhow::Result<RedriveJob> {
        Ok(RedriveJob {
            id: row.get("id")?,
            state: JobState::parse(&row.text("state")?)?,
            rate: shared::narrow(row.get("rate")?),
            again: row.get("again")?,
            total: row.number("total")?,
            redriven: row.number("redriven")?,
            refused: row.number("refused")?,
            actor: row.text("actor")?,
            stated_name: row.get("stated_name")?,
            note: row.get("note")?,
            created_at: row.time("created_at")?,
            ended_at: row.optional_time("ended_at")?,
            error: row.get("error")?,
        })
    };
    read()
        .context("read a job")
        .map_err(StoreError::Unavailable)
}

fn items(rows: &[Row]) -> Result<Vec<JobItem>> {
    read_rows(rows, "read the dead letters of a job", |row| {
        let id = row.get("dead_letter_id")?;
        let (result, why): (Option<String>, Option<String>) = (row.get("result")?, row.get("why")?);
        Ok(JobItem {
            position: row.number("position")?,
            id,
            result: result.map(|_| action_result(id, why)),
            preconditions: row.get("preconditions")?,
        })
    })
}

const LIST: Sql = Sql {
    postgres: "select id, state, rate::bigint as rate, again, total, redriven, refused, actor, stated_name, note, error,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from ended_at) * 1000000)::bigint as ended_at
         from oncely.redrive_job where $1::bigint is null or id = $1 order by id desc limit $2",
    sqlite: "select id, state, rate, again, total, redriven, refused, actor, stated_name, note, error,
             created_at, ended_at
         from oncely_redrive_job where $1 is null or id = $1 order by id desc limit $2",
    doing: "read the jobs",
};

const LEASE: Sql = Sql {
    postgres: "update oncely.redrive_job
         set leased_by = $1, leased_until = pg_catalog.clock_timestamp() + interval '10 seconds'
         where id = (
             select id from oncely.redrive_job where state = 'running'
                 and (leased_by = $1 or leased_until is null or leased_until < pg_catalog.clock_timestamp())
             order by id limit 1 for update skip locked)
         returning id, state, rate::bigint as rate, again, total, redriven, refused, actor, stated_name, note, error,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from ended_at) * 1000000)::bigint as ended_at",
    // There is one host.
    sqlite: "update oncely_redrive_job set leased_by = $1
         where id = (select min(id) from oncely_redrive_job where state = 'running')
         returning id, state, rate, again, total, redriven, refused, actor, stated_name, note, error,
             created_at, ended_at",
    doing: "lease a job",
};

const RENEW: Sql = Sql {
    postgres: "update oncely.redrive_job
         set leased_until = pg_catalog.clock_timestamp() + interval '10 seconds', error = null
         where id = $1 and leased_by = $2 and state = 'running'
         returning again, actor, stated_name, note",
    sqlite: "update oncely_redrive_job set error = null
         where id = $1 and leased_by = $2 and state = 'running'
         returning again, actor, stated_name, note",
    doing: "lock a job",
};

const INSERT_ITEMS: Sql = Sql {
    postgres: "insert into oncely.redrive_job_item (job_id, position, dead_letter_id, generation, preconditions)
         select $1, position, given.id, case when not $3 then coalesce(given.generation, dead_letter.generation) end,
             preconditions
         from jsonb_to_recordset($2::jsonb)
                 as given (position bigint, id bigint, generation integer, preconditions text)
             left join oncely.dead_letter on dead_letter.id = given.id",
    sqlite: "insert into oncely_redrive_job_item (job_id, position, dead_letter_id, generation, preconditions)
         select $1, value ->> 'position', value ->> 'id',
             case when not $3 then coalesce(value ->> 'generation', (
                 select generation from oncely_dead_letter as dead_letter
                 where dead_letter.id = value ->> 'id')) end,
             value ->> 'preconditions'
         from json_each($2)",
    doing: "write the dead letters of a job",
};

const ITEMS: Sql = Sql {
    postgres:
        "select position, dead_letter_id, result, why, preconditions from oncely.redrive_job_item
         where job_id = $1 and position >= $2 order by position limit $3",
    sqlite:
        "select position, dead_letter_id, result, why, preconditions from oncely_redrive_job_item
         where job_id = $1 and position >= $2 order by position limit $3",
    doing: "read the dead letters of a job",
};

const REFUSED_ITEMS: Sql = Sql {
    postgres:
        "select position, dead_letter_id, result, why, preconditions from oncely.redrive_job_item
         where job_id = $1 and result = 'refused' order by position limit $2",
    sqlite:
        "select position, dead_letter_id, result, why, preconditions from oncely_redrive_job_item
         where job_id = $1 and result = 'refused' order by position limit $2",
    doing: "read the refused dead letters of a job",
};

const OPEN_ITEMS: Sql = Sql {
    postgres:
        "select position, dead_letter_id, result, why, preconditions from oncely.redrive_job_item
         where job_id = $1 and result is null order by position limit $2",
    sqlite:
        "select position, dead_letter_id, result, why, preconditions from oncely_redrive_job_item
         where job_id = $1 and result is null order by position limit $2",
    doing: "read the next dead letters of a job",
};

const UNPROCESSED: Sql = Sql {
    postgres: "select position, dead_letter_id, generation::bigint as generation from oncely.redrive_job_item
         where job_id = $1 and position = any($2) and result is null order by position",
    sqlite: "select position, dead_letter_id, generation from oncely_redrive_job_item
         where job_id = $1 and position in (select value from json_each($2)) and result is null
         order by position",
    doing: "read the next dead letters of a job",
};

const SET_REDRIVEN: Sql = Sql {
    postgres: "update oncely.redrive_job_item set result = 'redriven' where job_id = $1 and position = any($2)",
    sqlite: "update oncely_redrive_job_item set result = 'redriven'
         where job_id = $1 and position in (select value from json_each($2))",
    doing: "record redriven dead letters of a job",
};

const SET_REFUSED: Sql = Sql {
    postgres: "update oncely.redrive_job_item as item set result = 'refused', why = given.why
         from jsonb_to_recordset($2::jsonb) as given (position bigint, why text)
         where job_id = $1 and item.position = given.position",
    sqlite:
        "update oncely_redrive_job_item as item set result = 'refused', why = given.value ->> 'why'
         from json_each($2) as given
         where job_id = $1 and item.position = given.value ->> 'position'",
    doing: "record refused dead letters of a job",
};

const COUNT: Sql = Sql {
    postgres: "update oncely.redrive_job set redriven = redriven + $2, refused = refused + $3 where id = $1",
    sqlite: "update oncely_redrive_job set redriven = redriven + $2, refused = refused + $3 where id = $1",
    doing: "count the results of a job",
};

const FINISH: Sql = Sql {
    postgres: "update oncely.redrive_job
         set state = 'done', ended_at = pg_catalog.now(), leased_until = null
         where id = $1 and state = 'running' and not exists (
             select from oncely.redrive_job_item where job_id = $1 and result is null)",
    sqlite: "update oncely_redrive_job
         set state = 'done', ended_at = cast(unixepoch('subsec') * 1000000 as integer), leased_until = null
         where id = $1 and state = 'running' and not exists (
             select 1 from oncely_redrive_job_item where job_id = $1 and result is null)",
    doing: "end a job",
};

const DELETE_OLD: Sql = Sql {
    postgres: "delete from oncely.redrive_job where ended_at < pg_catalog.now() - interval '30 days'",
    sqlite: "delete from oncely_redrive_job
         where ended_at < cast(unixepoch('subsec', '-30 days') * 1000000 as integer)",
    doing: "delete old jobs",
};
