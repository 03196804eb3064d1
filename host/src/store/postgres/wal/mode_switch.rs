//! The switch between polling and WAL mode, in steps that any host may run. Each step is one
//! transaction without effect if another host has run it already. After a crash between two steps,
//! the next host continues.

use std::time::Duration;

use anyhow::{Context, anyhow};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::session::{Purpose, Session, Sessions};
use super::slot;
use crate::fault;
use crate::store::error::Doing as _;
use crate::store::{RelayMode, Result, SlotState, StoreError, SwitchProgress, WalState, shared};

/// How many outputs are moved from the WAL to polling per step.
const MOVE_BATCH_MAX: i64 = 5_000;

/// The relay mode with the conditions of the next step.
pub(super) struct ModeState {
    pub state: WalState,
    is_wal_requested: bool,
    /// In mode `leaving`: whether the last transactions that may append to the WAL are recorded.
    has_horizon: bool,
    /// In mode `leaving`: whether those transactions have ended.
    is_drained: bool,
}

pub(super) async fn request_mode(session: &mut Session, use_wal: bool) -> Result<()> {
    let query = session.query(
        "update oncely.relay set requested_mode = $1, reason = null, changed_at = pg_catalog.now()
         where requested_mode <> $1 or reason is not null",
    );
    let wanted = query
        .bind(if use_wal { "wal" } else { "poll" })
        .execute(session.connection())
        .await;
    wanted.map(drop).doing("request a relay mode")
}

pub(super) async fn inspect(session: &mut Session, retained_max: u64) -> Result<ModeState> {
    let query = session.query(
        "select mode, requested_mode = 'wal' as is_wanted, reason, leave_horizon is not null as has_horizon,
             coalesce(leave_horizon <= pg_snapshot_xmin(pg_current_snapshot()), false) as is_over,
             case when mode = 'wal' then (
                 select (extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.min(due_at)) * 1000000)::bigint
                 from oncely.wal_backlog()) end as lag,
             slot_name is not null as has_slot, coalesce(active, false) as active,
             coalesce(wal_status = 'lost', false) as lost,
             coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint as retained
         from oncely.relay cross join oncely.relay_position left join pg_replication_slots
             on slot_name = 'oncely_' || (select oid from pg_database where datname = current_database())",
    );
    let row = query
        .fetch_one(session.connection())
        .await
        .doing("read the relay mode")?;
    read(&row, retained_max)
        .context("decode the relay mode")
        .map_err(StoreError::Unavailable)
}

fn read(row: &PgRow, retained_max: u64) -> anyhow::Result<ModeState> {
    let mode = match row.try_get("mode")? {
        "poll" => RelayMode::Poll,
        "entering" => RelayMode::Entering,
        "wal" => RelayMode::Wal,
        "leaving" => RelayMode::Leaving,
        other => return Err(anyhow!("`{other}` is not a relay mode")),
    };
    let lag: Option<i64> = row.try_get("lag")?;
    let slot = SlotState {
        active: row.try_get("active")?,
        retained: shared::unsigned(row.try_get("retained")?),
        retained_max,
        lost: row.try_get("lost")?,
    };
    let state = WalState {
        mode,
        fallback_reason: row.try_get("reason")?,
        lag: Duration::from_micros(lag.map(shared::unsigned).unwrap_or_default()),
        slot: row.try_get::<bool, _>("has_slot")?.then_some(slot),
    };
    Ok(ModeState {
        state,
        is_wal_requested: row.try_get("is_wanted")?,
        has_horizon: row.try_get("has_horizon")?,
        is_drained: row.try_get("is_over")?,
    })
}

pub(super) async fn step(sessions: &Sessions, retained_max: u64) -> Result<SwitchProgress> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let found = inspect(&mut session, retained_max).await?;
    session.commit().await?;
    match (found.state.mode, found.is_wal_requested) {
        (RelayMode::Poll, true) => enter(sessions).await,
        (RelayMode::Poll, false) if found.state.slot.is_some() => {
            Ok(if slot::drop(sessions).await? {
                SwitchProgress::Done
            } else {
                SwitchProgress::Wait
            })
        }
        (RelayMode::Poll, false) => Ok(SwitchProgress::Done),
        (RelayMode::Entering, true) => create_slot(sessions).await,
        (RelayMode::Entering, false) => cancel_entering(sessions).await,
        (RelayMode::Wal, true) => match found.reason_to_leave() {
            Some(why) => fall_back(sessions, &why)
                .await
                .map(|_| SwitchProgress::More),
            None => Ok(SwitchProgress::Done),
        },
        (RelayMode::Wal, false) => leave(sessions).await,
        (RelayMode::Leaving, _) if !found.has_horizon => record_horizon(sessions).await,
        (RelayMode::Leaving, _) if !found.is_drained => Ok(SwitchProgress::Wait),
        (RelayMode::Leaving, _) => move_to_polling(sessions).await,
    }
}

impl ModeState {
    fn reason_to_leave(&self) -> Option<String> {
        match &self.state.slot {
            None => Some("the replication slot does not exist".to_owned()),
            Some(slot) if slot.lost => Some(
                "the server removed WAL that was not read yet (max_slot_wal_keep_size), \
                 and with it the replication slot"
                    .to_owned(),
            ),
            Some(slot) if slot.retained > slot.retained_max => Some(format!(
                "the replication slot retains {} MiB of WAL, more than relay_slot_max",
                slot.retained >> 20
            )),
            Some(_) => None,
        }
    }
}

/// Runs `relay`, an update of the mode. If it matched its expected mode, also updates the position.
/// Returns whether it matched.
async fn transition(
    session: &mut Session,
    relay: &'static str,
    position: Option<&'static str>,
) -> Result<bool> {
    let moved = session
        .query(relay)
        .execute(session.connection())
        .await
        .doing("change the relay mode")?
        .rows_affected()
        > 0;
    if let (true, Some(position)) = (moved, position) {
        session
            .query(position)
            .execute(session.connection())
            .await
            .doing("change the relay mode")?;
    }
    Ok(moved)
}

async fn enter(sessions: &Sessions) -> Result<SwitchProgress> {
    // The outputs of an old slot were moved to polling when WAL mode was left.
    if !slot::drop(sessions).await? {
        return Ok(SwitchProgress::Wait);
    }
    let mut session = sessions.begin(Purpose::Platform).await?;
    slot::create_publication(&mut session).await?;
    transition(
        &mut session,
        "update oncely.relay set mode = 'entering', changed_at = pg_catalog.now(), leave_horizon = null
         where mode = 'poll' and requested_mode = 'wal'",
        Some(
            "update oncely.relay_position set reader_epoch = reader_epoch + 1, lsn = pg_current_wal_insert_lsn(),
                 published_until = pg_catalog.clock_timestamp(), recorded_at = pg_catalog.clock_timestamp()",
        ),
    )
    .await?;
    session.commit().await?;
    Ok(SwitchProgress::More)
}

async fn create_slot(sessions: &Sessions) -> Result<SwitchProgress> {
    if !slot::create(sessions).await? {
        return Ok(SwitchProgress::Wait);
    }
    fault::point(fault::SLOT_CREATED);
    let mut session = sessions.begin(Purpose::Platform).await?;
    // No outputs were appended to the WAL before this transition.
    transition(
        &mut session,
        "update oncely.relay set mode = 'wal', changed_at = pg_catalog.now() where mode = 'entering' and requested_mode = 'wal'",
        Some(
            "update oncely.relay_position set published_seq = oncely.last_outbox_seq(),
                 published_until = pg_catalog.clock_timestamp(), recorded_at = pg_catalog.clock_timestamp()",
        ),
    )
    .await?;
    session.commit().await?;
    Ok(SwitchProgress::More)
}

/// All outputs in the WAL are published or moved to polling.
const WAL_DRAINED: &str =
    "update oncely.relay_position set reader_epoch = reader_epoch + 1, lsn = 'FFFFFFFF/FFFFFFFF',
    published_seq = 9223372036854775807, recorded_at = pg_catalog.clock_timestamp()";

async fn cancel_entering(sessions: &Sessions) -> Result<SwitchProgress> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let back = "update oncely.relay set mode = 'poll', changed_at = pg_catalog.now()
                where mode = 'entering' and requested_mode = 'poll'";
    transition(&mut session, back, Some(WAL_DRAINED)).await?;
    session.commit().await?;
    Ok(SwitchProgress::More)
}

async fn leave(sessions: &Sessions) -> Result<SwitchProgress> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let leave = "update oncely.relay set mode = 'leaving', leave_horizon = null, changed_at = pg_catalog.now()
                 where mode = 'wal' and requested_mode = 'poll'";
    transition(&mut session, leave, None).await?;
    session.commit().await?;
    fault::point(fault::WAL_LEFT);
    Ok(SwitchProgress::More)
}

pub(super) async fn fall_back(sessions: &Sessions, why: &str) -> Result<bool> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let query = session.query(
        "update oncely.relay set mode = 'leaving', requested_mode = 'poll', reason = $1, leave_horizon = null, changed_at = pg_catalog.now()
         where mode in ('wal', 'entering')",
    );
    let fallen = query.bind(why).execute(session.connection()).await;
    let fallen = fallen.doing("leave WAL mode")?.rows_affected() > 0;
    session.commit().await?;
    Ok(fallen)
}

/// Records the last transactions that may append to the WAL. All of them have begun by now: later
/// ones see that WAL mode was left.
async fn record_horizon(sessions: &Sessions) -> Result<SwitchProgress> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let note = "update oncely.relay set leave_horizon = pg_snapshot_xmax(pg_current_snapshot())
                where mode = 'leaving' and leave_horizon is null";
    transition(&mut session, note, None).await?;
    session.commit().await?;
    Ok(SwitchProgress::More)
}

/// Moves unpublished outputs from the WAL to polling, once no transaction can append to the WAL.
/// The first step also ends the reader's permission to record. Outputs that it published without a
/// record are sent a second time and deduplicated by their streams.
async fn move_to_polling(sessions: &Sessions) -> Result<SwitchProgress> {
    let mut session = sessions.begin(Purpose::Platform).await?;

    // Fence off the reader.
    let query = session
        .query("update oncely.relay_position set reader_epoch = reader_epoch + 1 from oncely.relay where relay.mode = 'leaving'");
    if query
        .execute(session.connection())
        .await
        .doing("move outputs from the WAL to polling")?
        .rows_affected()
        == 0
    {
        session.commit().await?;
        return Ok(SwitchProgress::More);
    }

    // Move a batch.
    let query = session.query(
        "with picked as materialized (
             select seq from oncely.wal_backlog() order by seq limit $1
         ), brought as (
             update oncely.outbox set via = 'poll', leased_until = pg_catalog.now()
             from picked where outbox.seq = picked.seq and via = 'wal' returning outbox.seq
         )
         select pg_catalog.count(*), pg_catalog.max(seq) from brought",
    );
    let row = query
        .bind(MOVE_BATCH_MAX)
        .fetch_one(session.connection())
        .await
        .doing("move outputs from the WAL to polling")?;
    let count: i64 = row
        .try_get(0)
        .doing("move outputs from the WAL to polling")?;
    if count > 0 {
        let through: i64 = row
            .try_get(1)
            .doing("move outputs from the WAL to polling")?;
        let query = session
            .query("update oncely.relay_position set published_seq = greatest(published_seq, $1)");
        query
            .bind(through)
            .execute(session.connection())
            .await
            .doing("move outputs from the WAL to polling")?;
        session.commit().await?;
        fault::point(fault::WAL_OUTPUTS_MOVED);
        return Ok(SwitchProgress::More);
    }

    // None are left: polling is reached.
    let over = "update oncely.relay set mode = 'poll', changed_at = pg_catalog.now() where mode = 'leaving'";
    transition(&mut session, over, Some(WAL_DRAINED)).await?;
    session.commit().await?;
    Ok(SwitchProgress::More)
}
