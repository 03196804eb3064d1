//! The write-ahead log (WAL) as a source of outputs, read through a logical replication slot.

mod connection;
mod mode_switch;
mod pgoutput;
mod reader;
mod slot;
mod snapshot;

use anyhow::Context;
use async_trait::async_trait;
use sqlx::Row;

pub(super) use self::connection::Replication;
use self::snapshot::Snapshot;
use super::session::{Purpose, Session, Sessions};
use crate::store::error::Doing as _;
use crate::store::{
    Lsn, OutboxRow, OutputWal, Result, StoreError, SwitchProgress, WalReader, WalState,
};

/// The WAL of one database.
#[derive(Clone)]
pub(super) struct PostgresWal {
    sessions: Sessions,
    replication: Replication,
    /// The most WAL that the server may retain for the slot, in bytes. Above it, hosts fall back to
    /// polling.
    retained_max: u64,
}

impl PostgresWal {
    pub(super) fn new(sessions: Sessions, replication: Replication, retained_max: u64) -> Self {
        PostgresWal {
            sessions,
            replication,
            retained_max,
        }
    }
}

#[async_trait]
impl OutputWal for PostgresWal {
    async fn check(&self) -> anyhow::Result<()> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let checked = slot::check(&mut session).await;
        session.commit().await?;
        checked?;
        self.replication.check().await
    }

    async fn request_mode(&self, use_wal: bool) -> Result<()> {
        let mut session = self.sessions.begin(Purpose::Platform).await?;
        mode_switch::request_mode(&mut session, use_wal).await?;
        session.commit().await
    }

    async fn state(&self) -> Result<WalState> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let found = mode_switch::inspect(&mut session, self.retained_max).await?;
        session.commit().await?;
        Ok(found.state)
    }

    async fn step(&self) -> Result<SwitchProgress> {
        mode_switch::step(&self.sessions, self.retained_max).await
    }

    async fn fall_back(&self, why: &str) -> Result<bool> {
        mode_switch::fall_back(&self.sessions, why).await
    }

    async fn become_reader(&self) -> Result<Option<Box<dyn WalReader>>> {
        let reader = reader::Reader::begin(&self.sessions, &self.replication).await?;
        Ok(reader.map(|reader| Box::new(reader) as Box<dyn WalReader>))
    }

    async fn blocked_by(
        &self,
        rows: &[OutboxRow],
        transactions: &[u32],
    ) -> Result<Option<Vec<Option<i64>>>> {
        let mut session = self.sessions.begin(Purpose::Platform).await?;
        let (found, snapshot) = blocked_by(&mut session, rows).await?;
        session.commit().await?;
        let is_seen = transactions
            .iter()
            .all(|transaction| snapshot.sees(*transaction));
        Ok(is_seen.then_some(found))
    }
}

/// The blocker of each output, and the snapshot of the query. The blocker is the last polled output
/// before it in its per-key queue, or the output that blocks that one. Outputs with the same
/// blocker are unblocked together.
async fn blocked_by(
    session: &mut Session,
    rows: &[OutboxRow],
) -> Result<(Vec<Option<i64>>, Snapshot)> {
    let query = session.query(
        "select array(
             select (
                 select coalesce(blocked_by, seq) from oncely.outbox as before
                 where before.worker = given.worker and before.ordering_key = given.ordering_key
                     and before.ordering_key is not null and before.published_at is null and before.via = 'poll'
                     and before.seq + 0 < given.seq and before.due_at <= pg_catalog.clock_timestamp()
                 order by before.seq + 0 desc limit 1)
             from unnest($1::bigint[], $2::text[], $3::text[]) with ordinality
                 as given (seq, worker, ordering_key, place)
             order by place), pg_catalog.pg_current_snapshot()::text",
    );
    let found = query
        .bind(rows.iter().map(|row| row.seq).collect::<Vec<_>>())
        .bind(
            rows.iter()
                .map(|row| row.worker.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.ordering_key.as_deref())
                .collect::<Vec<_>>(),
        )
        .fetch_one(session.connection())
        .await
        .doing("find the blockers of WAL outputs")?;
    let snapshot = Snapshot::parse(found.try_get(1).doing("find the blockers of WAL outputs")?)
        .map_err(StoreError::Unavailable)?;
    Ok((
        found.try_get(0).doing("find the blockers of WAL outputs")?,
        snapshot,
    ))
}

/// A WAL position in PostgreSQL's notation, such as `16/B374D848`.
fn lsn_text(lsn: Lsn) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff)
}

fn read_lsn(text: &str) -> Result<Lsn> {
    let read = || {
        let (high, low) = text.split_once('/')?;
        Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
    };
    read()
        .with_context(|| format!("parse the WAL position `{text}`"))
        .map_err(StoreError::Unavailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsns_are_formatted_and_parsed_as_postgres_does() {
        assert_eq!(lsn_text(0x16_B374_D848), "16/B374D848");
        assert_eq!(read_lsn("FFFFFFFF/FFFFFFFF").unwrap(), u64::MAX);
        assert!(read_lsn("12").is_err() && read_lsn("x/1").is_err());
    }
}
