//! Alarms, and the failure groups that raise one when they are new.

use super::errors::Doing;
use anyhow::Context;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::outbox;
use super::session::Session;
use crate::model::alarm::{
    Alarm, AlarmStep, AlarmUpdate, NEW_FAILURE_RESET_AFTER, NEW_FAILURES_WINDOW, Notice,
};
use crate::store::shared::{self, WorkerFailureGroups};
use crate::store::{AlarmNotices, DeadLetterDepth, Result, StoreError, rows};

/// The raised alarms, and all alarms on depth and age that were ever raised.
pub(super) async fn list(session: &mut Session) -> Result<Vec<Alarm>> {
    let query = session.query(
        "select alarm.worker, kind, times, value, threshold,
             (extract(epoch from raised_at) * 1000000)::bigint as raised_at,
             (extract(epoch from cleared_at) * 1000000)::bigint as cleared_at,
             (extract(epoch from pg_catalog.now() - below_since) * 1000)::bigint as recovering_ms,
             dead_letter_group.id, reason, code, shape, place,
             case when kind = 'new-failure' then (select pg_catalog.count(*) from oncely.dead_letter
                 where dead_letter.group_id = alarm.group_id and state in ('open', 'redriven')) end as open_dead_letters
         from oncely.alarm left join oncely.dead_letter_group on dead_letter_group.id = alarm.group_id
         where cleared_at is null or kind <> 'new-failure'
         order by alarm.worker, kind, alarm.group_id",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("read the alarms")?;
    rows.iter().map(rows::alarm).collect()
}

/// Count and age of open dead letters, by worker.
pub(super) async fn depths(session: &mut Session) -> Result<Vec<DeadLetterDepth>> {
    let query = session.query(
        "select worker, pg_catalog.count(*),
             (extract(epoch from pg_catalog.now() - pg_catalog.min(died_at)) * 1000)::bigint
         from oncely.dead_letter where state = 'open' group by worker order by worker",
    );
    let rows = query
        .fetch_all(session.connection())
        .await
        .doing("count open dead letters")?;
    let read = |row: &PgRow| -> sqlx::Result<DeadLetterDepth> {
        Ok(DeadLetterDepth {
            worker: row.try_get(0)?,
            open: shared::unsigned(row.try_get(1)?),
            oldest_ms: shared::unsigned(row.try_get(2)?),
        })
    };
    let depths: sqlx::Result<_> = rows.iter().map(read).collect();
    depths
        .context("read the counts of open dead letters")
        .map_err(StoreError::Unavailable)
}

/// Applies the updates of alarms that have not changed since they were read, in lock order, and
/// appends their messages.
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

/// Appends the messages of alarms.
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
    let query = session.query(
        "insert into oncely.alarm as alarm (worker, kind, group_id, times, value, threshold)
         values ($1, $2, $3, 1, $4, $5)
         on conflict (worker, kind, group_id) do update
             set times = alarm.times + 1, value = excluded.value, threshold = excluded.threshold,
                 raised_at = pg_catalog.now(), cleared_at = null
             where alarm.cleared_at is not null and alarm.times = $6
         returning times, (extract(epoch from raised_at) * 1000000)::bigint as raised_at, null::bigint as cleared_at",
    );
    let row = query
        .bind(&step.worker)
        .bind(step.kind.as_str())
        .bind(shared::group_id(step.group.as_ref()))
        .bind(shared::signed(step.value)?)
        .bind(shared::signed(step.threshold)?)
        .bind(step.times.cast_signed())
        .fetch_optional(session.connection())
        .await
        .doing("raise an alarm")?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

async fn clear(session: &mut Session, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let query = session.query(
        "update oncely.alarm set cleared_at = pg_catalog.now(), below_since = null
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4
         returning times, (extract(epoch from raised_at) * 1000000)::bigint as raised_at,
             (extract(epoch from cleared_at) * 1000000)::bigint as cleared_at",
    );
    let row = query
        .bind(&step.worker)
        .bind(step.kind.as_str())
        .bind(shared::group_id(step.group.as_ref()))
        .bind(step.times.cast_signed())
        .fetch_optional(session.connection())
        .await
        .doing("clear an alarm")?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

/// Records since when the value is below the threshold, or that it no longer is. This has no
/// notice.
async fn set_calm(
    session: &mut Session,
    step: &AlarmUpdate,
    is_calm: bool,
) -> Result<Option<Notice>> {
    let query = session.query(
        "update oncely.alarm set below_since = case when $5 then coalesce(below_since, pg_catalog.now()) end
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4",
    );
    query
        .bind(&step.worker)
        .bind(step.kind.as_str())
        .bind(shared::group_id(step.group.as_ref()))
        .bind(step.times.cast_signed())
        .bind(is_calm)
        .execute(session.connection())
        .await
        .doing("record the recovery of an alarm")?;
    Ok(None)
}

/// Records the failures of dead letters that are about to be written. Raises an alarm for each
/// failure that is new or new again, unless the worker had `raised_max` such alarms within an hour.
/// Must be called before the dead letters are written.
pub(super) async fn record_failures(
    session: &mut Session,
    groups: &WorkerFailureGroups,
    raised_max: u32,
) -> Result<Vec<Notice>> {
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let known = known(session, groups).await?;
    let mut new = insert(session, groups, &known).await?;
    new.extend(refresh_known(session, &known).await?);
    let mut notices = Vec::new();
    for (worker, group) in groups.iter().filter(|(_, group)| new.contains(&group.id)) {
        if recently_raised(session, worker).await? < u64::from(raised_max) {
            notices.extend(raise_again(session, &shared::new_failure(worker, group)).await?);
        }
    }
    Ok(notices)
}

/// Known groups, each with the time since it was last seen, in milliseconds.
type KnownGroups = Vec<(String, i64)>;

async fn known(session: &mut Session, groups: &WorkerFailureGroups) -> Result<KnownGroups> {
    let query = session.query(
        "select id, (extract(epoch from pg_catalog.now() - last_seen) * 1000)::bigint
         from oncely.dead_letter_group where id = any($1)",
    );
    let rows = query
        .bind(
            groups
                .iter()
                .map(|(_, group)| group.id.as_str())
                .collect::<Vec<_>>(),
        )
        .fetch_all(session.connection())
        .await
        .doing("find known failures")?;
    let known: sqlx::Result<_> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    known.doing("read failures")
}

/// Inserts unknown groups. Of two concurrent transactions with the same failure, one waits and then
/// finds the group.
async fn insert(
    session: &mut Session,
    groups: &WorkerFailureGroups,
    known: &KnownGroups,
) -> Result<Vec<String>> {
    let new: Vec<_> = groups
        .iter()
        .filter(|(_, group)| known.iter().all(|(id, _)| *id != group.id))
        .collect();
    if new.is_empty() {
        return Ok(Vec::new());
    }
    let query = session.query(
        "insert into oncely.dead_letter_group (id, worker, reason, code, shape, place)
         select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
             as given (id, worker, reason, code, shape, place)
         order by id on conflict do nothing returning id",
    );
    let rows = query
        .bind(
            new.iter()
                .map(|(_, group)| group.id.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|(worker, _)| worker.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|(_, group)| group.reason.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|(_, group)| group.code.as_deref().map(shared::printable))
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|(_, group)| shared::printable(&group.shape))
                .collect::<Vec<_>>(),
        )
        .bind(
            new.iter()
                .map(|(_, group)| group.place.as_deref().map(shared::printable))
                .collect::<Vec<_>>(),
        )
        .fetch_all(session.connection())
        .await
        .doing("record failures")?;
    let ids: sqlx::Result<_> = rows.iter().map(|row| row.try_get(0)).collect();
    ids.doing("read failures")
}

/// Updates the time at which groups were last seen, unless it is recent, and returns the groups
/// that are new again. The condition makes sure that only one of several concurrent transactions
/// returns a group.
async fn refresh_known(session: &mut Session, known: &KnownGroups) -> Result<Vec<String>> {
    let stale: Vec<&str> = shared::stale(known);
    if stale.is_empty() {
        return Ok(Vec::new());
    }
    let query = session.query(
        "with stale as (
             select id from oncely.dead_letter_group
             where id = any($1) and last_seen < pg_catalog.now() - $2 * interval '1 microsecond' order by id for update
         )
         update oncely.dead_letter_group set last_seen = pg_catalog.now() from stale where dead_letter_group.id = stale.id
         returning dead_letter_group.id, exists (select from oncely.dead_letter
             where group_id = dead_letter_group.id and state in ('open', 'redriven'))",
    );
    let rows = query
        .bind(&stale)
        .bind(shared::micros(shared::LAST_SEEN_PRECISION))
        .fetch_all(session.connection())
        .await
        .doing("record the last occurrence of failures")?;
    let seen: sqlx::Result<Vec<(String, bool)>> = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect();
    let seen = seen.doing("read failures")?;
    let was_away = |id: &str| {
        known
            .iter()
            .any(|(known, ms)| known == id && shared::is_longer(*ms, NEW_FAILURE_RESET_AFTER))
    };
    Ok(seen
        .into_iter()
        .filter(|(id, is_open)| !is_open && was_away(id))
        .map(|(id, _)| id)
        .collect())
}

async fn recently_raised(session: &mut Session, worker: &str) -> Result<u64> {
    let query = session.query(
        "select pg_catalog.count(*) from oncely.alarm
         where worker = $1 and kind = 'new-failure' and raised_at > pg_catalog.now() - $2 * interval '1 microsecond'",
    );
    let row = query
        .bind(worker)
        .bind(shared::micros(NEW_FAILURES_WINDOW))
        .fetch_one(session.connection())
        .await
        .doing("count new failures")?;
    row.try_get(0)
        .map(shared::unsigned)
        .doing("count new failures")
}

/// Raises an alarm regardless of how often it was raised before, unless it is raised now.
async fn raise_again(session: &mut Session, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let query =
        session.query("select times from oncely.alarm where worker = $1 and kind = $2 and group_id = $3 for update");
    let row = query
        .bind(&step.worker)
        .bind(step.kind.as_str())
        .bind(shared::group_id(step.group.as_ref()))
        .fetch_optional(session.connection())
        .await
        .doing("find an alarm")?;
    let times: sqlx::Result<Option<i32>> = row.map(|row| row.try_get(0)).transpose();
    let times = times.doing("find an alarm")?;
    raise(
        session,
        &AlarmUpdate {
            times: times.unwrap_or_default().cast_unsigned(),
            ..step.clone()
        },
    )
    .await
}
