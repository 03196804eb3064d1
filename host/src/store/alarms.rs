//! Alarms, and the failure groups that raise one when they are new.

use super::db::{Db, Param, Sql, read_row, read_rows};
use super::rows::Columns as _;
use super::shared::WorkerFailureGroups;
use super::{AlarmNotices, DeadLetterDepth, Result, outputs, rows, shared};
use crate::model::alarm::{
    Alarm, AlarmStep, AlarmUpdate, NEW_FAILURE_RESET_AFTER, NEW_FAILURES_WINDOW, Notice,
};
use crate::model::failure_group::FailureGroup;

/// The raised alarms, and all alarms on depth and age that were ever raised.
pub(super) async fn list(db: &mut Db) -> Result<Vec<Alarm>> {
    let sql = Sql {
        postgres: "select alarm.worker, kind, times, value, threshold,
             (extract(epoch from raised_at) * 1000000)::bigint as raised_at,
             (extract(epoch from cleared_at) * 1000000)::bigint as cleared_at,
             (extract(epoch from pg_catalog.now() - below_since) * 1000)::bigint as recovering_ms,
             dead_letter_group.id, reason, code, shape, place,
             case when kind = 'new-failure' then (select pg_catalog.count(*) from oncely.dead_letter
                 where dead_letter.group_id = alarm.group_id and state in ('open', 'redriven')) end as open_dead_letters
         from oncely.alarm left join oncely.dead_letter_group on dead_letter_group.id = alarm.group_id
         where cleared_at is null or kind <> 'new-failure'
         order by alarm.worker, kind, alarm.group_id",
        sqlite: "select alarm.worker, kind, times, value, threshold, raised_at, cleared_at,
             (cast(unixepoch('subsec') * 1000000 as integer) - below_since) / 1000 as recovering_ms,
             dead_letter_group.id, reason, code, shape, place,
             case when kind = 'new-failure' then (select count(*) from oncely_dead_letter as dead_letter
                 where dead_letter.group_id = alarm.group_id and dead_letter.state in ('open', 'redriven')) end as open_dead_letters
         from oncely_alarm as alarm left join oncely_dead_letter_group as dead_letter_group on dead_letter_group.id = alarm.group_id
         where cleared_at is null or kind <> 'new-failure'
         order by alarm.worker, kind, alarm.group_id",
        doing: "read the alarms",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::alarm).collect()
}

/// Count and age of open dead letters, by worker.
pub(super) async fn depths(db: &mut Db) -> Result<Vec<DeadLetterDepth>> {
    let sql = Sql {
        postgres: "select worker, pg_catalog.count(*) as open,
             (extract(epoch from pg_catalog.now() - pg_catalog.min(died_at)) * 1000)::bigint as oldest_ms
         from oncely.dead_letter where state = 'open' group by worker order by worker",
        sqlite: "select worker, count(*) as open,
             (cast(unixepoch('subsec') * 1000000 as integer) - min(died_at)) / 1000 as oldest_ms
         from oncely_dead_letter where state = 'open' group by worker order by worker",
        doing: "count open dead letters",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    read_rows(&rows, sql.doing, |row| {
        Ok(DeadLetterDepth {
            worker: row.text("worker")?,
            open: row.number("open")?,
            oldest_ms: row.number("oldest_ms")?,
        })
    })
}

/// Applies the updates of alarms that have not changed since they were read, in lock order, and
/// appends their messages.
pub(super) async fn apply(db: &mut Db, updates: &[AlarmUpdate]) -> Result<AlarmNotices> {
    let mut notices = Vec::new();
    for step in shared::in_lock_order(updates) {
        notices.extend(match step.step {
            AlarmStep::Raise => raise(db, step).await?,
            AlarmStep::Clear => clear(db, step).await?,
            AlarmStep::Recover => set_calm(db, step, true).await?,
            AlarmStep::Relapse => set_calm(db, step, false).await?,
        });
    }
    append_notices(db, notices).await
}

/// Appends the messages of alarms.
pub(super) async fn append_notices(db: &mut Db, notices: Vec<Notice>) -> Result<AlarmNotices> {
    let outputs: Vec<_> = notices
        .iter()
        .map(|notice| (notice.worker.clone(), notice.output()))
        .collect();
    let rows = outputs::append(db, &outputs).await?;
    Ok(AlarmNotices { notices, rows })
}

async fn raise(db: &mut Db, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let sql = Sql {
        postgres: "insert into oncely.alarm as alarm (worker, kind, group_id, times, value, threshold)
         values ($1, $2, $3, 1, $4, $5)
         on conflict (worker, kind, group_id) do update
             set times = alarm.times + 1, value = excluded.value, threshold = excluded.threshold,
                 raised_at = pg_catalog.now(), cleared_at = null
             where alarm.cleared_at is not null and alarm.times = $6
         returning times, (extract(epoch from raised_at) * 1000000)::bigint as raised_at, null::bigint as cleared_at",
        sqlite: "insert into oncely_alarm (worker, kind, group_id, times, value, threshold) values ($1, $2, $3, 1, $4, $5)
         on conflict (worker, kind, group_id) do update
             set times = times + 1, value = excluded.value, threshold = excluded.threshold,
                 raised_at = excluded.raised_at, cleared_at = null
             where cleared_at is not null and times = $6
         returning times, raised_at, cleared_at",
        doing: "raise an alarm",
    };
    let [worker, kind, group] = key_of(step);
    let (value, threshold) = (shared::signed(step.value)?, shared::signed(step.threshold)?);
    let params = [
        worker,
        kind,
        group,
        Param::Int(value),
        Param::Int(threshold),
        Param::Int(step.times.into()),
    ];
    let row = db.fetch_optional(sql, &params).await?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

async fn clear(db: &mut Db, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let sql = Sql {
        postgres: "update oncely.alarm set cleared_at = pg_catalog.now(), below_since = null
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4
         returning times, (extract(epoch from raised_at) * 1000000)::bigint as raised_at,
             (extract(epoch from cleared_at) * 1000000)::bigint as cleared_at",
        sqlite: "update oncely_alarm set cleared_at = cast(unixepoch('subsec') * 1000000 as integer), below_since = null
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4
         returning times, raised_at, cleared_at",
        doing: "clear an alarm",
    };
    let [worker, kind, group] = key_of(step);
    let params = [worker, kind, group, Param::Int(step.times.into())];
    let row = db.fetch_optional(sql, &params).await?;
    row.map(|row| rows::notice(&row, step)).transpose()
}

/// Records since when the value is below the threshold, or that it no longer is. This has no
/// notice.
async fn set_calm(db: &mut Db, step: &AlarmUpdate, is_calm: bool) -> Result<Option<Notice>> {
    let sql = Sql {
        postgres: "update oncely.alarm set below_since = case when $5 then coalesce(below_since, pg_catalog.now()) end
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4",
        sqlite: "update oncely_alarm
         set below_since = iif($5, coalesce(below_since, cast(unixepoch('subsec') * 1000000 as integer)), null)
         where worker = $1 and kind = $2 and group_id = $3 and cleared_at is null and times = $4",
        doing: "record the recovery of an alarm",
    };
    let [worker, kind, group] = key_of(step);
    let params = [
        worker,
        kind,
        group,
        Param::Int(step.times.into()),
        Param::Bool(is_calm),
    ];
    db.execute(sql, &params).await?;
    Ok(None)
}

/// Records the failures of dead letters that are about to be written. Raises an alarm for each
/// failure that is new or new again, unless the worker had `raised_max` such alarms within an hour.
/// Must be called before the dead letters are written.
pub(super) async fn record_failures(
    db: &mut Db,
    groups: &WorkerFailureGroups,
    raised_max: u32,
) -> Result<Vec<Notice>> {
    let mut new = Vec::new();
    for (worker, group) in groups {
        if is_new(db, worker, group).await? {
            new.push((worker, group));
        }
    }
    let mut notices = Vec::new();
    for (worker, group) in new {
        if recently_raised(db, worker).await? < u64::from(raised_max) {
            notices.extend(raise_again(db, &shared::new_failure(worker, group)).await?);
        }
    }
    Ok(notices)
}

/// Whether a failure was never seen before, or returns after a while without open dead letters.
/// Records when it was last seen, unless the recorded time is recent.
async fn is_new(db: &mut Db, worker: &str, group: &FailureGroup) -> Result<bool> {
    let sql = Sql {
        postgres:
            "select (extract(epoch from pg_catalog.now() - last_seen) * 1000)::bigint as away_ms
         from oncely.dead_letter_group where id = $1",
        sqlite:
            "select (cast(unixepoch('subsec') * 1000000 as integer) - last_seen) / 1000 as away_ms
         from oncely_dead_letter_group where id = $1",
        doing: "look up a failure",
    };
    let known = db.fetch_optional(sql, &[Param::Text(&group.id)]).await?;
    let Some(known) = known else {
        return insert(db, worker, group).await;
    };
    let away_ms = read_row(&known, sql.doing, |row| row.get("away_ms"))?;

    // Avoid a write per message: the recorded time need not be exact.
    if !shared::is_longer(away_ms, shared::LAST_SEEN_PRECISION) {
        return Ok(false);
    }
    let had_none_open = refresh(db, group).await?;
    Ok(had_none_open && shared::is_longer(away_ms, NEW_FAILURE_RESET_AFTER))
}

/// Inserts a group. Of two concurrent transactions with the same failure, one waits and then finds
/// the group. Returns whether this one inserted it.
async fn insert(db: &mut Db, worker: &str, group: &FailureGroup) -> Result<bool> {
    let sql = Sql {
        postgres: "insert into oncely.dead_letter_group (id, worker, reason, code, shape, place)
         values ($1, $2, $3, $4, $5, $6) on conflict do nothing",
        sqlite: "insert into oncely_dead_letter_group (id, worker, reason, code, shape, place)
         values ($1, $2, $3, $4, $5, $6) on conflict do nothing",
        doing: "record a failure",
    };
    let code = group.code.as_deref().map(shared::printable);
    let shape = shared::printable(&group.shape);
    let place = group.place.as_deref().map(shared::printable);
    let params = [
        Param::Text(&group.id),
        Param::Text(worker),
        Param::Text(&group.reason),
        Param::OptionalText(code.as_deref()),
        Param::Text(&shape),
        Param::OptionalText(place.as_deref()),
    ];
    Ok(db.execute(sql, &params).await? == 1)
}

/// Updates the time at which a group was last seen. Returns whether this transaction updated it,
/// and the group has no open dead letters. The condition makes sure that only one of several
/// concurrent transactions does.
async fn refresh(db: &mut Db, group: &FailureGroup) -> Result<bool> {
    let sql = Sql {
        postgres: "update oncely.dead_letter_group set last_seen = pg_catalog.now()
         where id = $1 and last_seen < pg_catalog.now() - $2 * interval '1 microsecond'
         returning not exists (select from oncely.dead_letter
             where group_id = dead_letter_group.id and state in ('open', 'redriven')) as has_none_open",
        sqlite: "update oncely_dead_letter_group as dead_letter_group
         set last_seen = cast(unixepoch('subsec') * 1000000 as integer)
         where id = $1 and last_seen < cast(unixepoch('subsec') * 1000000 as integer) - $2
         returning not exists (select 1 from oncely_dead_letter
             where group_id = $1 and state in ('open', 'redriven')) as has_none_open",
        doing: "record the last occurrence of a failure",
    };
    let precision = shared::micros(shared::LAST_SEEN_PRECISION);
    let params = [Param::Text(&group.id), Param::Int(precision)];
    match db.fetch_optional(sql, &params).await? {
        Some(row) => read_row(&row, sql.doing, |row| row.get("has_none_open")),
        None => Ok(false),
    }
}

async fn recently_raised(db: &mut Db, worker: &str) -> Result<u64> {
    let sql = Sql {
        postgres: "select pg_catalog.count(*) as raised from oncely.alarm where worker = $1 and kind = 'new-failure'
             and raised_at > pg_catalog.now() - $2 * interval '1 microsecond'",
        sqlite: "select count(*) as raised from oncely_alarm where worker = $1 and kind = 'new-failure'
             and raised_at > cast(unixepoch('subsec') * 1000000 as integer) - $2",
        doing: "count new failures",
    };
    let window = shared::micros(NEW_FAILURES_WINDOW);
    let params = [Param::Text(worker), Param::Int(window)];
    let row = db.fetch_one(sql, &params).await?;
    read_row(&row, sql.doing, |row| row.number("raised"))
}

/// Raises an alarm regardless of how often it was raised before, unless it is raised now.
async fn raise_again(db: &mut Db, step: &AlarmUpdate) -> Result<Option<Notice>> {
    let sql = Sql {
        postgres: "select times from oncely.alarm where worker = $1 and kind = $2 and group_id = $3 for update",
        sqlite: "select times from oncely_alarm where worker = $1 and kind = $2 and group_id = $3",
        doing: "find an alarm",
    };
    let times = match db.fetch_optional(sql, &key_of(step)).await? {
        Some(row) => read_row(&row, sql.doing, |row| row.small_number("times"))?,
        None => 0,
    };
    let step = AlarmUpdate {
        times,
        ..step.clone()
    };
    raise(db, &step).await
}

/// The key of an alarm: worker, kind and group.
fn key_of(step: &AlarmUpdate) -> [Param<'_>; 3] {
    [
        Param::Text(&step.worker),
        Param::Text(step.kind.as_str()),
        Param::Text(shared::group_id(step.group.as_ref())),
    ]
}
