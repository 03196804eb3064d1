//! The reader: the one connection that receives the WAL.

use crate::store::error::Doing as _;
use anyhow::{Context, anyhow};
use async_trait::async_trait;
use jiff::Timestamp;
use pgwire_replication::{Lsn as WireLsn, ReplicationClient, ReplicationEvent};
use sqlx::Row;

use super::super::session::{Purpose, Session, Sessions};
use super::super::{errors, outbox};
use super::connection::{Replication, StartError};
use super::pgoutput::{Decoder, EPOCH_MICROS};
use super::{lsn_text, read_lsn};
use crate::store::{Lsn, Result, StoreError, WalEvent, WalReader, WalRecord, WalSnapshot, shared};

pub(super) struct Reader {
    sessions: Sessions,
    stream: ReplicationClient,
    decoder: Decoder,
    /// The epoch of this reader: each new reader has a higher one.
    number: i64,
    /// All transactions that ended before it are recorded.
    position: Lsn,
    /// The transaction that is being received.
    transaction: u32,
    /// Whether that transaction ended before `position`.
    is_old: bool,
}

impl Reader {
    pub(super) async fn begin(
        sessions: &Sessions,
        replication: &Replication,
    ) -> Result<Option<Self>> {
        let Some((slot, from)) = find_free_slot(sessions).await? else {
            return Ok(None);
        };
        let stream = match replication.start(slot, from).await {
            Ok(stream) => stream,
            Err(StartError::SlotInUse) => return Ok(None),
            Err(StartError::Failed(error)) => return Err(StoreError::Unavailable(error)),
        };
        // From here on no other host receives the WAL, and the previous reader can no longer
        // record.
        let Some((number, position)) = become_reader(sessions).await? else {
            return Ok(None);
        };
        let sessions = sessions.clone();
        let decoder = Decoder::default();
        Ok(Some(Reader {
            sessions,
            stream,
            decoder,
            number,
            position,
            transaction: 0,
            is_old: false,
        }))
    }

    fn decode_event(&mut self, event: ReplicationEvent) -> Result<Option<WalEvent>> {
        Ok(match event {
            ReplicationEvent::Begin { final_lsn, xid, .. } => {
                self.transaction = xid;
                self.is_old = final_lsn.as_u64() < self.position;
                None
            }
            ReplicationEvent::XLogData { data, .. } => {
                let row = self
                    .decoder
                    .decode(data)
                    .context("decode the WAL")
                    .map_err(StoreError::Unavailable)?;
                let transaction = self.transaction;
                row.filter(|_| !self.is_old).map(|row| WalEvent::Output {
                    row: Box::new(row),
                    transaction,
                })
            }
            ReplicationEvent::Commit {
                end_lsn,
                commit_time_micros,
                ..
            } => {
                let at =
                    Timestamp::from_microsecond(commit_time_micros.saturating_add(EPOCH_MICROS));
                let at = at
                    .context("read the time of a commit")
                    .map_err(StoreError::Unavailable)?;
                Some(WalEvent::Committed {
                    end: end_lsn.as_u64(),
                    at,
                })
            }
            ReplicationEvent::KeepAlive { wal_end, .. } => Some(WalEvent::Passed(wal_end.as_u64())),
            ReplicationEvent::Message { .. } | ReplicationEvent::StoppedAt { .. } => None,
        })
    }
}

#[async_trait]
impl WalReader for Reader {
    async fn next(&mut self) -> Result<WalEvent> {
        loop {
            match self.stream.recv().await {
                Ok(Some(event)) => {
                    if let Some(event) = self.decode_event(event)? {
                        return Ok(event);
                    }
                }
                Ok(None) => {
                    return Err(StoreError::Unavailable(anyhow!(
                        "the server ended the replication stream"
                    )));
                }
                Err(error) => {
                    return Err(StoreError::Unavailable(
                        anyhow::Error::new(error).context("read the WAL"),
                    ));
                }
            }
        }
    }

    async fn record(&mut self, record: &WalRecord) -> Result<Option<WalSnapshot>> {
        let mut session = self.sessions.begin(Purpose::Platform).await?;
        if !advance(&mut session, self.number, record).await? {
            session.commit().await?;
            return Ok(None);
        }
        outbox::add_relay_records(&mut session, &record.published).await?;
        outbox::move_to_polling(&mut session, &record.released).await?;
        let wal_snapshot = wal_snapshot(&mut session).await?;
        session.commit().await?;
        self.stream
            .update_applied_lsn(WireLsn::from_u64(record.position));
        Ok(Some(wal_snapshot))
    }
}

/// The slot, if no host reads it, and the position to start from.
async fn find_free_slot(sessions: &Sessions) -> Result<Option<(String, Lsn)>> {
    let mut session = sessions.begin(Purpose::Read).await?;
    let query = session.query(
        "select slot_name::text, lsn::text from pg_replication_slots cross join oncely.relay_position
         where slot_name = 'oncely_' || (select oid from pg_database where datname = current_database())
             and not active and wal_status <> 'lost' and (select mode = 'wal' from oncely.relay)",
    );
    let row = query
        .fetch_optional(session.connection())
        .await
        .doing("find a free replication slot")?;
    session.commit().await?;
    row.map(|row| {
        Ok((
            row.try_get(0).doing("find a free replication slot")?,
            read_lsn(row.try_get(1).doing("find a free replication slot")?)?,
        ))
    })
    .transpose()
}

async fn become_reader(sessions: &Sessions) -> Result<Option<(i64, Lsn)>> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let query = session.query(
        "update oncely.relay_position set reader_epoch = reader_epoch + 1
         where (select mode = 'wal' from oncely.relay) returning reader_epoch, lsn::text",
    );
    let row = query
        .fetch_optional(session.connection())
        .await
        .doing("become the WAL reader")?;
    session.commit().await?;
    row.map(|row| {
        Ok((
            row.try_get(0).doing("become the WAL reader")?,
            read_lsn(row.try_get(1).doing("become the WAL reader")?)?,
        ))
    })
    .transpose()
}

/// Advances the position, if this is still the reader.
async fn advance(session: &mut Session, number: i64, record: &WalRecord) -> Result<bool> {
    let query = session.query(
        "update oncely.relay_position
         set lsn = greatest(lsn, $2::pg_lsn), published_seq = greatest(published_seq, $3), recorded_at = clock_timestamp(),
             published_until = greatest(published_until, timestamptz 'epoch' + $4 * interval '1 microsecond')
         where reader_epoch = $1",
    );
    let moved = query
        .bind(number)
        .bind(lsn_text(record.position))
        .bind(record.through)
        .bind(record.until.map(|until| until.as_microsecond()))
        .execute(session.connection())
        .await
        .doing("advance the WAL position")?;
    Ok(moved.rows_affected() > 0)
}

async fn wal_snapshot(session: &mut Session) -> Result<WalSnapshot> {
    let context = |error| errors::from_statement(error, "take a WAL snapshot");
    let query = session.query(
        "select (extract(epoch from taken_at) * 1000000)::bigint, wal_end::text, last_seq, snapshot_xmin::text, snapshot_xmax::text
         from oncely.wal_snapshot()",
    );
    let row = query
        .fetch_one(session.connection())
        .await
        .map_err(context)?;
    let transaction = |column| -> Result<u64> {
        let text: &str = row.try_get(column).map_err(context)?;
        text.parse()
            .context("parse a transaction id")
            .map_err(StoreError::Unavailable)
    };
    Ok(WalSnapshot {
        at: shared::timestamp(row.try_get(0).map_err(context)?)?,
        end: read_lsn(row.try_get(1).map_err(context)?)?,
        last_output: row.try_get(2).map_err(context)?,
        ended: transaction(3)?,
        next: transaction(4)?,
    })
}
