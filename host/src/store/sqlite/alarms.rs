//! Alarms, and the groups of dead letters that raise one when they are new.

use super::errors::Doing;
use anyhow::Context;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::outbox;
use super::session::Session;
use crate::model::alarm::{
    Alarm, AlarmStep, AlarmUpdate, NEW_FAILURE_RESET_AFTER, NEW_FAILURES_WINDOW, Notice,
};
use crate::model::failure_group::FailureGroup;
use crate::store::shared::{self, WorkerFailureGroups};
use crate::store::{AlarmNotices, DeadLetterDepth, Result, StoreError, rows};

/// Raised alarms, and cleared ones except those of new failures.
pub(super) async fn list(readers: &SqlitePool) -> Result<Vec<Alarm>> {
    let rows = sqlx::query(
        "select alarm.worker, kind, times, value, threshold, raised_at, cleared_at,
             (cast(unixepoch('subsec') * 1000000 as integer) - below_since) / 1000 as recovering_ms,
             dead_letter_group.id, reason, code, shape, place,
             case when kind = 'new-failure' then (select count(*) from oncely_dead_letter as dead_letter
                 where dead_letter.group_id = alarm.group_id and dead_letter.state in ('open', 'redriven')) end as open_dead_letters
         from oncely_alarm as alarm left join oncely_dead_letter_group as dead_letter_group on dead_letter_group.id = alarm.group_id
         where cleared_at is null or kind <> 'new-failure'
         order by alarm.worker, kind, alarm.group_id",
    )
    .fetch_all(readers)
    .await
    .doing("read the alarms")?;
    rows.iter().map(rows::alarm).collect()
}

/// The number of open dead letters and the age of the oldest, by worker.
pub(super) async fn depths(readers: &SqlitePool) -> Result<Vec<DeadLetterDepth>> {
    let rows = sqlx::query(
        "select worker, count(*), (cast(unixepoch('subsec') * 1000000 as integer) - min(died_at)) / 1000
         from oncely_dead_letter where state = 'open' group by worker order by worker",
    )
    .fetch_all(readers)
    .await
    .doing("count open dead letters")?;
    let read = |row: &SqliteRow| -> sqlx::Result<DeadLetterDepth> {
        Ok(DeadLetterDepth {
            worker: row.try_get(0)?,
            open: shared::unsigned(row.try_get(1)?),
            oldest_ms: shared::unsigned(row.try_get(2)?),
        })
    };
    let depths: sqlx::Result<_> = rows.iter().map(read).collect();
    depths
        .context("read how many dead letters are open")
        .map_err(StoreError::Unavailable)
}

/// Applies the steps of alarms that are unchanged since they were read, in the order of their keys.
/// Appends their notices to the outbox.
pub(super) async fn apply(session: &mut Session, updates: &[AlarmUpdate]) -> Result<AlarmNotices> {
    let mut notices = Vec::new();
    for step in shared::in_lock_order(updates) {
        notices.extend(match step.step {
            AlarmStep::Raise => raise(session, step).await?,
            AlarmStep::Clear => clear(session, step).await?,
            AlarmStep::Recover => set_calm(session, step, true).await?,
            AlarmStep::Relapse => set_calm(session, step, false).await?,
        });
    }
    append_notices(session, notices).await
}

/// Appends the notices of alarms to the outbox.
pub(super) async fn append_notices(
    session: &mut Session,
    notices: Vec<Notice>,
) -> Result<AlarmNotices> {
    let outputs: Vec<_> = notices
        .iter()
        .map(|notice| (notice.worker.as_str(), notice.output()))
        .collect();
    let outputs: Vec<_> = outputs
        .iter()
        .map(|(worker, output)| (*worker, output))
        .collect();
    let rows = outbox::append_for(session, &outputs, shared::NOTICE_LEASE).await?;
    Ok(AlarmNotices { notices, rows })
}

async fn raise(session: &mut Session, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let row = sqlx::query(
        "insert into oncely_alarm (worker, kind, group_id, times, value, threshold) values ($1, $2, $3, 1, $4, $5)
         on conflict (worker, kind, group_id) do update
             set times = times + 1, value = excluded.value, threshold = excluded.threshold,
                 raised_at = excluded.raised_at, cleared_at = null
             where cleared_at is not null and times = $6
         returning times, raised_at, cleared_at",
    )
    .bind(&step.worker)
    .bind(step.kind.as_str())
    .bind(shared::group_id(step.group.as_ref()))
    .bind(shared::signed(step.value)?)
    .bind(shared::signed(step.threshold)?)
    .bind(step.times)
    .fetch_optional(session.connection().doing("raise an alarm")?)
    .await
    .doing("raise an alarm")?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

async fn clear(session: &mut Session, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let row = sqlx::query(
        "update oncely_alarm set cleared_at = cast(unixepoch('subsec') * 1000000 as integer), below_since = null
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4
         returning times, raised_at, cleared_at",
    )
    .bind(&step.worker)
    .bind(step.kind.as_str())
    .bind(shared::group_id(step.group.as_ref()))
    .bind(step.times)
    .fetch_optional(session.connection().doing("clear an alarm")?)
    .await
    .doing("clear an alarm")?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

/// Records the time at which the value became low enough, or clears it. There is no notice of that.
async fn set_calm(
    session: &mut Session,
    step: &AlarmUpdate,
    is_calm: bool,
) -> Result<Option<Notice>> {
    sqlx::query(
        "update oncely_alarm
         set below_since = iif($5, coalesce(below_since, cast(unixepoch('subsec') * 1000000 as integer)), null)
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4",
    )
    .bind(&step.worker)
    .bind(step.kind.as_str())
    .bind(shared::group_id(step.group.as_ref()))
    .bind(step.times)
    .bind(is_calm)
    .execute(session.connection().doing("record the recovery of an alarm")?)
    .await
    .doing("record the recovery of an alarm")?;
    Ok(None)
}

/// Records the failures of dead letters, and raises an alarm for each that is new, or new again. At
/// most `raised_max` alarms are raised within an hour. Called before the dead letters are written.
pub(super) async fn record_failures(
    session: &mut Session,
    groups: &WorkerFailureGroups,
    raised_max: u32,
) -> Result<Vec<Notice>> {
    let mut notices = Vec::new();
    for (worker, group) in groups {
        if is_new(session, worker, group).await?
            && recently_raised(session, worker).await? < u64::from(raised_max)
        {
            notices.extend(raise_again(session, &shared::new_failure(worker, group)).await?);
        }
    }
    Ok(notices)
}

/// Whether a failure was never seen before, or returns after a while without open dead letters.
/// Records when it was last seen, unless the recorded time is recent.
async fn is_new(session: &mut Session, worker: &str, group: &FailureGroup) -> Result<bool> {
    let known = sqlx::query(
        "select (cast(unixepoch('subsec') * 1000000 as integer) - last_seen) / 1000,
             exists (select 1 from oncely_dead_letter where group_id = $1 and state in ('open', 'redriven'))
         from oncely_dead_letter_group where id = $1",
    )
    .bind(&group.id)
    .fetch_optional(session.connection().doing("look up a failure")?)
    .await
    .doing("look up a failure")?;
    let Some(known) = known else {
        return insert(session, worker, group).await.map(|()| true);
    };
    let (away_ms, is_open): (i64, bool) = (
        known.try_get(0).doing("look up a failure")?,
        known.try_get(1).doing("look up a failure")?,
    );

    // Avoid a write per message: the recorded time need not be exact.
    if shared::is_longer(away_ms, shared::LAST_SEEN_PRECISION) {
        sqlx::query(
            "update oncely_dead_letter_group set last_seen = cast(unixepoch('subsec') * 1000000 as integer) where id = $1",
        )
        .bind(&group.id)
        .execute(session.connection().doing("look up a failure")?)
        .await
        .doing("look up a failure")?;
    }
    Ok(!is_open && shared::is_longer(away_ms, NEW_FAILURE_RESET_AFTER))
}

async fn insert(session: &mut Session, worker: &str, group: &FailureGroup) -> Result<()> {
    sqlx::query(
        "insert into oncely_dead_letter_group (id, worker, reason, code, shape, place) values ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&group.id)
    .bind(worker)
    .bind(&group.reason)
    .bind(group.code.as_deref().map(shared::printable))
    .bind(shared::printable(&group.shape))
    .bind(group.place.as_deref().map(shared::printable))
    .execute(session.connection().doing("record a failure")?)
    .await
    .doing("record a failure")?;
    Ok(())
}

async fn recently_raised(session: &mut Session, worker: &str) -> Result<u64> {
    let row = sqlx::query(
        "select count(*) from oncely_alarm where worker = $1 and kind = 'new-failure'
             and raised_at > cast(unixepoch('subsec') * 1000000 as integer) - $2",
    )
    .bind(worker)
    .bind(shared::micros(NEW_FAILURES_WINDOW))
    .fetch_one(session.connection().doing("count new failures")?)
    .await
    .doing("count new failures")?;
    row.try_get(0)
        .map(shared::unsigned)
        .doing("count new failures")
}

/// Raises an alarm regardless of how often it was raised before, unless it is still raised.
async fn raise_again(session: &mut Session, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let row = sqlx::query(
        "select times from oncely_alarm where worker = $1 and kind = $2 and group_id = $3",
    )
    .bind(&step.worker)
    .bind(step.kind.as_str())
    .bind(shared::group_id(step.group.as_ref()))
    .fetch_optional(session.connection().doing("look up an alarm")?)
    .await
    .doing("look up an alarm")?;
    let times: Option<u32> = row
        .map(|row| row.try_get(0))
        .transpose()
        .doing("look up an alarm")?;
    raise(
        session,
        &AlarmUpdate {
            times: times.unwrap_or_default(),
            ..step.clone()
        },
    )
    .await
}
