//! Watermarks and recovered outputs; see [`crate::store::watermarks`].

use std::collections::HashMap;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::errors::Doing;
use super::session::Session;
use crate::store::watermarks::{
    self, BrokerState, RECOVERED_KEPT_DAYS, RecoveredOutput, WATERMARKS_KEPT, Watermark, Watermarks,
};
use crate::store::{Result, shared};

pub(super) async fn read(session: &mut Session, on_broker: Option<&str>) -> Result<Watermarks> {
    let query = session.query(
        "select name, broker_state, (extract(epoch from written_at) * 1000000)::bigint as written_at
         from oncely.watermark order by number desc limit 1",
    );
    let last = query
        .fetch_optional(session.connection())
        .await
        .doing("read the watermarks")?;
    let query = session.query(
        "select stream_sequence, (extract(epoch from written_at) * 1000000)::bigint as written_at
         from oncely.watermark where stream_sequence is not null order by number desc limit 1",
    );
    let acknowledged = query
        .fetch_optional(session.connection())
        .await
        .doing("read the watermarks")?;
    let query = session.query(
        "select (select (extract(epoch from written_at) * 1000000)::bigint from oncely.watermark where name = $1),
             exists (select from oncely.recovered_output)",
    );
    let row = query
        .bind(on_broker.unwrap_or_default())
        .fetch_one(session.connection())
        .await
        .doing("read the watermarks")?;
    Ok(Watermarks {
        last: last.as_ref().map(read_watermark).transpose()?,
        acknowledged: acknowledged.as_ref().map(read_acknowledged).transpose()?,
        requested_written_at: row
            .try_get::<Option<i64>, _>(0)
            .doing("read the watermarks")?
            .map(shared::timestamp)
            .transpose()?,
        has_recovered: row.try_get(1).doing("read the watermarks")?,
    })
}

fn read_watermark(row: &PgRow) -> Result<Watermark> {
    Ok(Watermark {
        name: row.try_get("name").doing("read a watermark")?,
        written_at: shared::timestamp(row.try_get("written_at").doing("read a watermark")?)?,
        seen: watermarks::broker_state_from_text(
            row.try_get("broker_state").doing("read a watermark")?,
        )?,
    })
}

fn read_acknowledged(row: &PgRow) -> Result<(jiff::Timestamp, u64)> {
    let written_at = shared::timestamp(row.try_get("written_at").doing("read a watermark")?)?;
    Ok((
        written_at,
        shared::unsigned(row.try_get("stream_sequence").doing("read a watermark")?),
    ))
}

/// Writes a watermark, and deletes old watermarks and recovered outputs.
pub(super) async fn write(session: &mut Session, name: &str, seen: &BrokerState) -> Result<()> {
    let query = session.query("insert into oncely.watermark (name, broker_state) values ($1, $2)");
    query
        .bind(name)
        .bind(watermarks::broker_state_to_text(seen)?)
        .execute(session.connection())
        .await
        .doing("write a watermark")?;

    // Old watermarks, but none that the broker may still have.
    let query = session.query(
        "delete from oncely.watermark where number <= (
             select number from oncely.watermark order by number desc offset $1 limit 1)
             and number < (select pg_catalog.max(number) from oncely.watermark where stream_sequence is not null)",
    );
    query
        .bind(i64::from(WATERMARKS_KEPT))
        .execute(session.connection())
        .await
        .doing("write a watermark")?;
    let query = session.query(
        "delete from oncely.recovered_output where id in (
             select id from oncely.recovered_output
             where recovered_at < pg_catalog.now() - $1 * interval '1 day' limit 1000)",
    );
    query
        .bind(RECOVERED_KEPT_DAYS)
        .execute(session.connection())
        .await
        .doing("write a watermark")?;
    Ok(())
}

/// Records the sequence of a watermark on the broker.
pub(super) async fn acknowledge(session: &mut Session, name: &str, sequence: u64) -> Result<()> {
    let query = session.query("update oncely.watermark set stream_sequence = $2 where name = $1");
    let done = query
        .bind(name)
        .bind(shared::signed(sequence)?)
        .execute(session.connection())
        .await;
    done.map(drop).doing("acknowledge a watermark")
}

/// Saves where outputs were found: of several places of an id the first one, in place of one saved
/// earlier.
pub(super) async fn save_recovered(
    session: &mut Session,
    outputs: &[RecoveredOutput],
) -> Result<()> {
    let sequences: Vec<i64> = outputs
        .iter()
        .map(|output| shared::signed(output.stream_sequence))
        .collect::<Result<_>>()?;
    let query = session.query(
        "insert into oncely.recovered_output (id, stream, stream_sequence)
         select distinct on (id) id, stream, sequence
         from unnest($1::text[], $2::text[], $3::bigint[]) as given (id, stream, sequence) order by id, sequence
         on conflict (id) do update set stream = excluded.stream, stream_sequence = excluded.stream_sequence,
             recovered_at = excluded.recovered_at",
    );
    let done = query
        .bind(
            outputs
                .iter()
                .map(|output| output.id.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(
            outputs
                .iter()
                .map(|output| output.stream.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(sequences)
        .execute(session.connection())
        .await;
    done.map(drop).doing("save recovered outputs")
}

/// Deletes the recovered outputs with these ids.
pub(super) async fn delete_recovered(session: &mut Session, ids: &[&str]) -> Result<()> {
    let query = session.query("delete from oncely.recovered_output where id = any($1)");
    let done = query.bind(ids).execute(session.connection()).await;
    done.map(drop).doing("delete recovered outputs")
}

/// The places of those ids that a recovery found.
pub(super) async fn find_recovered(
    session: &mut Session,
    ids: &[&str],
) -> Result<HashMap<String, (String, u64)>> {
    let query = session.query(
        "select id, stream, stream_sequence from oncely.recovered_output where id = any($1)",
    );
    let rows = query
        .bind(ids)
        .fetch_all(session.connection())
        .await
        .doing("find recovered outputs")?;
    let place = |row: &PgRow| {
        Ok((
            row.try_get(0)?,
            (row.try_get(1)?, shared::unsigned(row.try_get(2)?)),
        ))
    };
    rows.iter()
        .map(place)
        .collect::<sqlx::Result<_>>()
        .doing("find recovered outputs")
}

/// The events among these that are in the worker's inbox.
pub(super) async fn known_events(
    session: &mut Session,
    worker: &str,
    event_ids: &[&str],
) -> Result<Vec<String>> {
    let query =
        session.query("select event_id from oncely.inbox where worker = $1 and event_id = any($2)");
    let rows = query
        .bind(worker)
        .bind(event_ids)
        .fetch_all(session.connection())
        .await
        .doing("find events in the inbox")?;
    rows.iter()
        .map(|row| row.try_get(0))
        .collect::<sqlx::Result<_>>()
        .doing("find events in the inbox")
}
