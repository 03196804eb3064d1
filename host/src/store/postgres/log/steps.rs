//! From polling to the log and back, in steps that any host may take: each is one transaction that does nothing when somebody
//! else has taken it already, and a host that dies between two of them leaves a state that the next one goes on from.

use std::time::Duration;

use anyhow::{Context, anyhow};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::errors;
use super::super::session::{Purpose, Session, Sessions};
use super::slot;
use crate::fault;
use crate::store::{LogState, RelayMode, Result, SlotState, Step, StoreError, shared};

/// How many outputs are brought over from the log to polling at a time.
const BRING_OVER_MAX: i64 = 5_000;

/// What a look finds.
pub(super) struct Found {
    pub state: LogState,
    is_wanted: bool,
    /// Of `leaving`: whether it is known which transactions may still append to the log, and whether they have ended.
    has_horizon: bool,
    is_over: bool,
}

pub(super) async fn want(session: &mut Session, by_log: bool) -> Result<()> {
    let query = session.query(
        "update oncely.relay set wanted = $1, why = null, changed_at = pg_catalog.now()
         where wanted <> $1 or why is not null",
    );
    let wanted = query.bind(if by_log { "wal" } else { "poll" }).execute(session.connection()).await;
    wanted.map(drop).map_err(|error| errors::of_statement(error, "ask how outputs are to go"))
}

pub(super) async fn look(session: &mut Session, retained_max: u64) -> Result<Found> {
    let query = session.query(
        "select mode, wanted = 'wal' as is_wanted, why, left_at is not null as has_horizon,
             coalesce(left_at <= pg_snapshot_xmin(pg_current_snapshot()), false) as is_over,
             case when mode = 'wal' then (
                 select (extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.min(due_at)) * 1000000)::bigint
                 from oncely.in_log()) end as behind,
             slot_name is not null as has_slot, coalesce(active, false) as active,
             coalesce(wal_status = 'lost', false) as lost,
             coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint as retained
         from oncely.relay cross join oncely.relay_position left join pg_replication_slots
             on slot_name = 'oncely_' || (select oid from pg_database where datname = current_database())",
    );
    let row = query
        .fetch_one(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "look how outputs go"))?;
    read(&row, retained_max).context("read how outputs go").map_err(StoreError::Unavailable)
}

fn read(row: &PgRow, retained_max: u64) -> anyhow::Result<Found> {
    let mode = match row.try_get("mode")? {
        "poll" => RelayMode::Poll,
        "entering" => RelayMode::Entering,
        "wal" => RelayMode::Wal,
        "leaving" => RelayMode::Leaving,
        other => return Err(anyhow!("`{other}` is no way for outputs to go")),
    };
    let behind: Option<i64> = row.try_get("behind")?;
    let slot = SlotState {
        active: row.try_get("active")?,
        retained: shared::unsigned(row.try_get("retained")?),
        retained_max,
        lost: row.try_get("lost")?,
    };
    let state = LogState {
        mode,
        why: row.try_get("why")?,
        behind: Duration::from_micros(behind.map(shared::unsigned).unwrap_or_default()),
        slot: row.try_get::<bool, _>("has_slot")?.then_some(slot),
    };
    Ok(Found {
        state,
        is_wanted: row.try_get("is_wanted")?,
        has_horizon: row.try_get("has_horizon")?,
        is_over: row.try_get("is_over")?,
    })
}

pub(super) async fn step(sessions: &Sessions, retained_max: u64) -> Result<Step> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let found = look(&mut session, retained_max).await?;
    session.commit().await?;
    match (found.state.mode, found.is_wanted) {
        (RelayMode::Poll, true) => enter(sessions).await,
        (RelayMode::Poll, false) if found.state.slot.is_some() => {
            Ok(if slot::drop(sessions).await? { Step::Done } else { Step::Wait })
        }
        (RelayMode::Poll, false) => Ok(Step::Done),
        (RelayMode::Entering, true) => make_slot(sessions).await,
        (RelayMode::Entering, false) => turn_back(sessions).await,
        (RelayMode::Wal, true) => match found.reason_to_leave() {
            Some(why) => fall_back(sessions, &why).await.map(|_| Step::More),
            None => Ok(Step::Done),
        },
        (RelayMode::Wal, false) => leave(sessions).await,
        (RelayMode::Leaving, _) if !found.has_horizon => note_horizon(sessions).await,
        (RelayMode::Leaving, _) if !found.is_over => Ok(Step::Wait),
        (RelayMode::Leaving, _) => bring_over(sessions).await,
    }
}

impl Found {
    fn reason_to_leave(&self) -> Option<String> {
        match &self.state.slot {
            None => Some("its replication slot is gone".to_owned()),
            Some(slot) if slot.lost => Some(
                "the server has removed log that was not read yet (max_slot_wal_keep_size), and with it the slot"
                    .to_owned(),
            ),
            Some(slot) if slot.retained > slot.retained_max => Some(format!(
                "its replication slot keeps {} MiB of log, more than relay_slot_max allows",
                slot.retained >> 20
            )),
            Some(_) => None,
        }
    }
}

/// Sets what belongs together, if `condition` still holds. Returns whether it did.
async fn move_on(session: &mut Session, relay: &'static str, position: Option<&'static str>) -> Result<bool> {
    let doing = |error| errors::of_statement(error, "change how outputs go");
    let moved = session.query(relay).execute(session.connection()).await.map_err(doing)?.rows_affected() > 0;
    if let (true, Some(position)) = (moved, position) {
        session.query(position).execute(session.connection()).await.map_err(doing)?;
    }
    Ok(moved)
}

async fn enter(sessions: &Sessions) -> Result<Step> {
    // What an earlier one has in it was brought over when it was left.
    if !slot::drop(sessions).await? {
        return Ok(Step::Wait);
    }
    let mut session = sessions.begin(Purpose::House).await?;
    slot::publish_log(&mut session).await?;
    move_on(
        &mut session,
        "update oncely.relay set mode = 'entering', changed_at = pg_catalog.now(), left_at = null
         where mode = 'poll' and wanted = 'wal'",
        Some(
            "update oncely.relay_position set reader = reader + 1, lsn = pg_current_wal_insert_lsn(),
                 published_until = pg_catalog.clock_timestamp(), recorded_at = pg_catalog.clock_timestamp()",
        ),
    )
    .await?;
    session.commit().await?;
    Ok(Step::More)
}

async fn make_slot(sessions: &Sessions) -> Result<Step> {
    if !slot::make(sessions).await? {
        return Ok(Step::Wait);
    }
    fault::point(fault::SLOT_MADE);
    let mut session = sessions.begin(Purpose::House).await?;
    // Nobody has appended to the log yet.
    move_on(
        &mut session,
        "update oncely.relay set mode = 'wal', changed_at = pg_catalog.now() where mode = 'entering' and wanted = 'wal'",
        Some(
            "update oncely.relay_position set through = oncely.last_output(),
                 published_until = pg_catalog.clock_timestamp(), recorded_at = pg_catalog.clock_timestamp()",
        ),
    )
    .await?;
    session.commit().await?;
    Ok(Step::More)
}

/// Everything that went by the log is through.
const NOTHING_IN_LOG: &str = "update oncely.relay_position set reader = reader + 1, lsn = 'FFFFFFFF/FFFFFFFF',
    through = 9223372036854775807, recorded_at = pg_catalog.clock_timestamp()";

async fn turn_back(sessions: &Sessions) -> Result<Step> {
    let mut session = sessions.begin(Purpose::House).await?;
    let back = "update oncely.relay set mode = 'poll', changed_at = pg_catalog.now()
                where mode = 'entering' and wanted = 'poll'";
    move_on(&mut session, back, Some(NOTHING_IN_LOG)).await?;
    session.commit().await?;
    Ok(Step::More)
}

async fn leave(sessions: &Sessions) -> Result<Step> {
    let mut session = sessions.begin(Purpose::House).await?;
    let leave = "update oncely.relay set mode = 'leaving', left_at = null, changed_at = pg_catalog.now()
                 where mode = 'wal' and wanted = 'poll'";
    move_on(&mut session, leave, None).await?;
    session.commit().await?;
    fault::point(fault::LOG_LEFT);
    Ok(Step::More)
}

pub(super) async fn fall_back(sessions: &Sessions, why: &str) -> Result<bool> {
    let mut session = sessions.begin(Purpose::House).await?;
    let query = session.query(
        "update oncely.relay set mode = 'leaving', wanted = 'poll', why = $1, left_at = null, changed_at = pg_catalog.now()
         where mode in ('wal', 'entering')",
    );
    let fallen = query.bind(why).execute(session.connection()).await;
    let fallen = fallen.map_err(|error| errors::of_statement(error, "give the log up"))?.rows_affected() > 0;
    session.commit().await?;
    Ok(fallen)
}

/// Whoever may still append to the log has begun by now: everybody sees that it is left.
async fn note_horizon(sessions: &Sessions) -> Result<Step> {
    let mut session = sessions.begin(Purpose::House).await?;
    let note = "update oncely.relay set left_at = pg_snapshot_xmax(pg_current_snapshot())
                where mode = 'leaving' and left_at is null";
    move_on(&mut session, note, None).await?;
    session.commit().await?;
    Ok(Step::More)
}

/// Nobody appends to the log any more. What was published from it is recorded; the rest goes by polling. The first of these
/// steps ends the reader's right to record; what it has published since is sent a second time, which streams notice.
async fn bring_over(sessions: &Sessions) -> Result<Step> {
    let mut session = sessions.begin(Purpose::House).await?;
    let doing = |error| errors::of_statement(error, "bring outputs over from the log");
    let query = session
        .query("update oncely.relay_position set reader = reader + 1 from oncely.relay where relay.mode = 'leaving'");
    if query.execute(session.connection()).await.map_err(doing)?.rows_affected() == 0 {
        session.commit().await?;
        return Ok(Step::More);
    }
    let query = session.query(
        "with picked as materialized (
             select seq from oncely.in_log() order by seq limit $1
         ), brought as (
             update oncely.outbox set via = 'poll', leased_until = pg_catalog.now()
             from picked where outbox.seq = picked.seq and via = 'wal' returning outbox.seq
         )
         select pg_catalog.count(*), pg_catalog.max(seq) from brought",
    );
    let row = query.bind(BRING_OVER_MAX).fetch_one(session.connection()).await.map_err(doing)?;
    let count: i64 = row.try_get(0).map_err(doing)?;
    if count > 0 {
        let through: i64 = row.try_get(1).map_err(doing)?;
        let query = session.query("update oncely.relay_position set through = greatest(through, $1)");
        query.bind(through).execute(session.connection()).await.map_err(doing)?;
        session.commit().await?;
        fault::point(fault::BROUGHT_OVER);
        return Ok(Step::More);
    }
    let over = "update oncely.relay set mode = 'poll', changed_at = pg_catalog.now() where mode = 'leaving'";
    move_on(&mut session, over, Some(NOTHING_IN_LOG)).await?;
    session.commit().await?;
    Ok(Step::More)
}
