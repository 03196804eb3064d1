//! Inbox and outbox in parts, by time: what had its time goes with a whole part, by `truncate`, never row by row.
//!
//! A part is turned away from after half the time that rows are kept, and emptied once its last row had all of it. So there
//! are two earlier parts as a rule and three while one is emptied, and rows leave after once to one and a half times as long.
//! See the migration `parts` for why event ids stay unique meanwhile.

use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row, raw_sql};

use super::errors;
use super::session::Session;
use super::totals;
use crate::store::{Result, StoreError, shared};

/// How many parts there are.
const PARTS: i16 = 4;

/// Which table turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Inbox,
    Outbox,
}

impl Of {
    fn name(self) -> &'static str {
        match self {
            Of::Inbox => "inbox",
            Of::Outbox => "outbox",
        }
    }
}

/// What stands in `oncely.turn`.
#[derive(Debug)]
struct Turn {
    now: Timestamp,
    part: i16,
    opened_at: Timestamp,
    /// Oldest first, each with the time when it was closed.
    earlier: Vec<(i16, Timestamp)>,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Empty the oldest of the earlier parts.
    Empty(i16),
    /// Write to this part from now on.
    TurnTo(i16),
    Nothing,
}

impl Turn {
    fn next(&self, keep: Duration) -> Step {
        let has_passed = |since: Timestamp, time: Duration| {
            Duration::try_from(self.now.duration_since(since)).is_ok_and(|passed| passed >= time)
        };
        if let Some((oldest, closed_at)) = self.earlier.first()
            && has_passed(*closed_at, keep)
        {
            return Step::Empty(*oldest);
        }
        let is_empty = |part: &i16| *part != self.part && self.earlier.iter().all(|(earlier, _)| earlier != part);
        match (1..PARTS).map(|ahead| (self.part + ahead) % PARTS).find(is_empty) {
            Some(next) if has_passed(self.opened_at, keep / 2) => Step::TurnTo(next),
            _ => Step::Nothing,
        }
    }
}

/// Does what is due next with one table whose rows are kept for `keep`; says whether something was done. Nothing is while
/// another host is at it, or while more than `limit` rows would have to move on to the current part. Transactions under way
/// that do not end within `patience` are a conflict.
pub(super) async fn step(
    session: &mut Session,
    of: Of,
    keep: Duration,
    limit: u32,
    patience: Duration,
) -> Result<bool> {
    let Some(turn) = read(session, of).await? else { return Ok(false) };
    let step = turn.next(keep);
    if step == Step::Nothing {
        return Ok(false);
    }
    session.run(format!("set local lock_timeout = {}", patience.as_millis()), "be patient").await?;
    match step {
        Step::TurnTo(part) => turn_to(session, of, part).await?,
        Step::Empty(part) => {
            if !empty(session, of, &turn, part, keep, limit).await? {
                return Ok(false);
            }
        }
        Step::Nothing => {}
    }
    Ok(true)
}

/// Where a table stands; none when another host is at it.
async fn read(session: &mut Session, of: Of) -> Result<Option<Turn>> {
    let query = session.query(
        "select part, earlier, (extract(epoch from opened_at) * 1000000)::bigint as opened_at,
             array(select (extract(epoch from closed) * 1000000)::bigint
                   from unnest(closed_at) with ordinality as at (closed, place) order by place) as closed_at,
             (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::bigint as now
         from oncely.turn where of = $1 for update skip locked",
    );
    let row = query
        .bind(of.name())
        .fetch_optional(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "look which part is written to"))?;
    let read = |row: PgRow| -> anyhow::Result<Turn> {
        let earlier: Vec<i16> = row.try_get("earlier")?;
        let closed_at: Vec<i64> = row.try_get("closed_at")?;
        let closed_at: Result<Vec<_>> = closed_at.into_iter().map(shared::timestamp).collect();
        Ok(Turn {
            now: shared::timestamp(row.try_get("now")?)?,
            part: row.try_get("part")?,
            opened_at: shared::timestamp(row.try_get("opened_at")?)?,
            earlier: earlier.into_iter().zip(closed_at?).collect(),
        })
    };
    row.map(|row| read(row).context("read which part is written to").map_err(StoreError::Unavailable)).transpose()
}

/// Writes to another part from now on. That of the inbox waits for all who asked which one it is, and who may be claiming.
async fn turn_to(session: &mut Session, of: Of, part: i16) -> Result<()> {
    if of == Of::Inbox {
        session.run("lock table oncely.turn in exclusive mode".to_owned(), "turn to another part").await?;
    }
    let query = session.query(
        "update oncely.turn set part = $2, opened_at = pg_catalog.clock_timestamp(), earlier = earlier || part,
             closed_at = closed_at || pg_catalog.clock_timestamp()
         where of = $1",
    );
    query
        .bind(of.name())
        .bind(part)
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "turn to another part"))?;
    Ok(())
}

/// Empties the oldest part; what has not had its time moves on to the current one. Says whether it was done.
async fn empty(session: &mut Session, of: Of, turn: &Turn, part: i16, keep: Duration, limit: u32) -> Result<bool> {
    let (name, current) = (of.name(), turn.part);
    session.run(format!("lock table oncely.{name}_{part} in access exclusive mode"), "empty a part").await?;
    let moves_on = match of {
        Of::Inbox => {
            totals::write_done(session).await?;
            // What is dead stays settled for as long as somebody may put it back.
            "inbox.state = 'dead' and exists (
                 select from oncely.dead_letter as letter where letter.worker = inbox.worker
                     and letter.event_id = inbox.event_id and letter.state in ('open', 'redriven'))"
                .to_owned()
        }
        Of::Outbox => {
            let kept_since = format!("pg_catalog.now() - {} * interval '1 microsecond'", shared::micros(keep));
            let by_polling = format!("via = 'poll' and (published_at is null or published_at > {kept_since})");
            let from_log = format!("oncely.relay_record where published_at > {kept_since}");
            let by_log = format!("via = 'wal' and seq in (select unnest(seqs) from {from_log})");
            if has_more_than(session, part, &format!("({by_polling} or {by_log})"), limit).await?
                || is_in_log(session, part).await?
            {
                return Ok(false);
            }
            settle_in_log(session, part, current, &from_log).await?;
            by_polling
        }
    };
    let emptied = format!(
        "update oncely.{name} set part = {current} where part = {part} and {moves_on};
         truncate oncely.{name}_{part};
         update oncely.turn set earlier = earlier[2:], closed_at = closed_at[2:] where of = '{name}'"
    );
    session.run(emptied, "empty a part").await?;
    Ok(true)
}

/// Whether more rows of a part of the outbox than `limit` would have to move on.
async fn has_more_than(session: &mut Session, part: i16, moves_on: &str, limit: u32) -> Result<bool> {
    let count = format!(
        "select pg_catalog.count(*) from (
             select from oncely.outbox_{part} where {moves_on} limit {limit} + 1) as moving_on"
    );
    let counted = raw_sql(AssertSqlSafe(count)).fetch_one(session.connection()).await.and_then(|row| row.try_get(0));
    let count: i64 = counted.map_err(|error| errors::of_statement(error, "count what is left in a part"))?;
    Ok(count > i64::from(limit))
}

/// Whether something in a part of the outbox is yet to be published from the log.
async fn is_in_log(session: &mut Session, part: i16) -> Result<bool> {
    let query = session.query(
        "select exists (select from oncely.in_log() as unpublished where exists (
             select from oncely.outbox where outbox.seq = unpublished.seq and outbox.part = $1))",
    );
    let row = query.bind(part).fetch_one(session.connection()).await.and_then(|row| row.try_get(0));
    row.map_err(|error| errors::of_statement(error, "look for what is in the log"))
}

/// Moves on what was published from the log a short while ago. As rows that went by polling: as others they would be in the
/// log a second time.
async fn settle_in_log(session: &mut Session, part: i16, current: i16, from_log: &str) -> Result<()> {
    let settled = format!(
        "update oncely.outbox
         set part = {current}, via = 'poll', published_at = published.published_at, stream = published.stream,
             stream_sequence = published.sequence
         from (select seq, stream, sequence, published_at from (select * from {from_log}) as record
                   cross join unnest(record.seqs, record.sequences) as one (seq, sequence)) as published
         where outbox.part = {part} and outbox.via = 'wal' and outbox.seq = published.seq"
    );
    session.run(settled, "move outputs of the log on").await
}

/// Deletes records of what was published from the log once the outputs have left, at most `limit`. Returns whether there may
/// be more.
pub(super) async fn remove_log_records(session: &mut Session, keep: Duration, limit: u32) -> Result<bool> {
    let query = session.query(
        "delete from oncely.relay_record where number in (
             select number from oncely.relay_record
             where published_at < pg_catalog.now() - $1 * interval '1 microsecond'
                 and last_seq <= (select through from oncely.relay_position)
             order by published_at limit $2 for update skip locked)",
    );
    let result = query
        .bind(shared::micros(keep.saturating_mul(2)))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "delete old records of the log"))?;
    Ok(result.rows_affected() == u64::from(limit))
}

/// Deletes attempts that are older than `keep` and belong to no dead letter, at most `limit`. Returns whether there may be
/// more.
pub(super) async fn remove_attempts(session: &mut Session, keep: Duration, limit: u32) -> Result<bool> {
    let query = session.query(
        "delete from oncely.attempt where (worker, event_id, attempt) in (
             select worker, event_id, attempt from oncely.attempt
             where at < pg_catalog.now() - $1 * interval '1 microsecond' and not exists (
                 select from oncely.dead_letter as letter
                 where letter.worker = attempt.worker and letter.event_id = attempt.event_id)
             order by at limit $2 for update skip locked)",
    );
    let result = query
        .bind(shared::micros(keep))
        .bind(i64::from(limit))
        .execute(session.connection())
        .await
        .map_err(|error| errors::of_statement(error, "delete old attempts"))?;
    Ok(result.rows_affected() == u64::from(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(100);

    fn turn(part: i16, opened_at: i64, earlier: &[(i16, i64)]) -> Turn {
        let at = |second| Timestamp::from_second(second).unwrap();
        Turn {
            now: at(1_000),
            part,
            opened_at: at(opened_at),
            earlier: earlier.iter().map(|(part, closed)| (*part, at(*closed))).collect(),
        }
    }

    #[test]
    fn a_part_is_written_to_for_half_the_time_and_kept_for_all_of_it() {
        assert_eq!(turn(0, 951, &[]).next(KEEP), Step::Nothing);
        assert_eq!(turn(0, 950, &[]).next(KEEP), Step::TurnTo(1));
        assert_eq!(turn(2, 960, &[(0, 910), (1, 960)]).next(KEEP), Step::Nothing);
        assert_eq!(turn(2, 950, &[(0, 901), (1, 950)]).next(KEEP), Step::TurnTo(3));
        assert_eq!(turn(2, 950, &[(0, 900), (1, 950)]).next(KEEP), Step::Empty(0));
        assert_eq!(turn(1, 940, &[(2, 901), (3, 905), (0, 940)]).next(KEEP), Step::Nothing, "none is empty");
        assert_eq!(turn(3, 900, &[(2, 950)]).next(KEEP), Step::TurnTo(0));
    }
}
