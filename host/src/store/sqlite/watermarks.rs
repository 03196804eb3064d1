//! Watermarks and recovered outputs; see [`crate::store::watermarks`].

use std::collections::HashMap;

use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::errors::Doing;
use super::session::Session;
use crate::store::watermarks::{
    self, BrokerState, RECOVERED_KEPT_DAYS, RecoveredOutput, WATERMARKS_KEPT, Watermark, Watermarks,
};
use crate::store::{Result, shared};

/// The watermarks of the database, and the time of the one that is named `on_broker`.
pub(super) async fn read(readers: &SqlitePool, on_broker: Option<&str>) -> Result<Watermarks> {
    // One statement reads one state of the database.
    let row = sqlx::query(
        "select last.name, last.broker_state, last.written_at, acknowledged.stream_sequence,
             acknowledged.written_at as acknowledged_at,
             (select written_at from oncely_watermark where name = $1) as known,
             exists (select 1 from oncely_recovered_output) as has_recovered
         from (select 1)
             left join oncely_watermark as last on last.number = (select max(number) from oncely_watermark)
             left join oncely_watermark as acknowledged on acknowledged.number = (
                 select max(number) from oncely_watermark where stream_sequence is not null)",
    )
    .bind(on_broker.unwrap_or_default())
    .fetch_one(readers)
    .await
    .doing("read the watermarks")?;
    let sequence: Option<i64> = row
        .try_get("stream_sequence")
        .doing("read the watermarks")?;
    let acknowledged = match sequence {
        Some(sequence) => {
            let written_at = shared::timestamp(
                row.try_get("acknowledged_at")
                    .doing("read the watermarks")?,
            )?;
            Some((written_at, shared::unsigned(sequence)))
        }
        None => None,
    };
    Ok(Watermarks {
        last: read_watermark(&row)?,
        acknowledged,
        requested_written_at: row
            .try_get::<Option<i64>, _>("known")
            .doing("read the watermarks")?
            .map(shared::timestamp)
            .transpose()?,
        has_recovered: row.try_get("has_recovered").doing("read the watermarks")?,
    })
}

fn read_watermark(row: &SqliteRow) -> Result<Option<Watermark>> {
    let Some(name) = row
        .try_get::<Option<String>, _>("name")
        .doing("read a watermark")?
    else {
        return Ok(None);
    };
    let written_at = shared::timestamp(row.try_get("written_at").doing("read a watermark")?)?;
    let seen =
        watermarks::broker_state_from_text(row.try_get("broker_state").doing("read a watermark")?)?;
    Ok(Some(Watermark {
        name,
        written_at,
        seen,
    }))
}

/// Writes a watermark, and deletes expired ones.
pub(super) async fn write(session: &mut Session, name: &str, seen: &BrokerState) -> Result<()> {
    sqlx::query("insert into oncely_watermark (name, broker_state) values ($1, $2)")
        .bind(name)
        .bind(watermarks::broker_state_to_text(seen)?)
        .execute(session.connection().doing("write a watermark")?)
        .await
        .doing("write a watermark")?;

    // Keep the newest watermarks, and the last one that the broker acknowledged.
    sqlx::query(
        "delete from oncely_watermark where number <= (
             select number from oncely_watermark order by number desc limit 1 offset $1)
             and number < (select max(number) from oncely_watermark where stream_sequence is not null)",
    )
    .bind(WATERMARKS_KEPT)
    .execute(session.connection().doing("write a watermark")?)
    .await
    .doing("write a watermark")?;

    // Recovered outputs expire after some days, in batches.
    sqlx::query(
        "delete from oncely_recovered_output where id in (
             select id from oncely_recovered_output
             where recovered_at < cast(unixepoch('subsec') * 1000000 as integer) - $1 * 86400000000 limit 1000)",
    )
    .bind(RECOVERED_KEPT_DAYS)
    .execute(session.connection().doing("write a watermark")?)
    .await
    .doing("write a watermark")?;
    Ok(())
}

/// Records the sequence under which the broker holds a watermark.
pub(super) async fn acknowledge(session: &mut Session, name: &str, sequence: u64) -> Result<()> {
    sqlx::query("update oncely_watermark set stream_sequence = $2 where name = $1")
        .bind(name)
        .bind(shared::signed(sequence)?)
        .execute(session.connection().doing("acknowledge a watermark")?)
        .await
        .map(drop)
        .doing("acknowledge a watermark")
}

/// Records where outputs were found: the first place of each id, by the latest recovery.
pub(super) async fn save_recovered(
    session: &mut Session,
    outputs: &[RecoveredOutput],
) -> Result<()> {
    let given = outputs.iter().map(
        |output| serde_json::json!({ "id": output.id, "stream": output.stream, "sequence": output.stream_sequence }),
    );
    sqlx::query(
        "insert into oncely_recovered_output (id, stream, stream_sequence)
         select value ->> 'id', value ->> 'stream', min(value ->> 'sequence') from json_each($1)
         where true group by value ->> 'id'
         on conflict (id) do update set stream = excluded.stream, stream_sequence = excluded.stream_sequence,
             recovered_at = excluded.recovered_at",
    )
    .bind(serde_json::Value::Array(given.collect()).to_string())
    .execute(session.connection().doing("record recovered outputs")?)
    .await
    .map(drop)
    .doing("record recovered outputs")
}

/// Deletes the recovered places of these ids.
pub(super) async fn delete_recovered(session: &mut Session, ids: &[&str]) -> Result<()> {
    sqlx::query("delete from oncely_recovered_output where id in (select value from json_each($1))")
        .bind(serde_json::json!(ids).to_string())
        .execute(session.connection().doing("delete recovered outputs")?)
        .await
        .map(drop)
        .doing("delete recovered outputs")
}

/// The recovered stream and sequence of these ids.
pub(super) async fn find_recovered(
    readers: &SqlitePool,
    ids: &[&str],
) -> Result<HashMap<String, (String, u64)>> {
    let rows = sqlx::query(
        "select id, stream, stream_sequence from oncely_recovered_output
         where id in (select value from json_each($1))",
    )
    .bind(serde_json::json!(ids).to_string())
    .fetch_all(readers)
    .await
    .doing("look up recovered outputs")?;
    let place = |row: &SqliteRow| {
        Ok((
            row.try_get(0)?,
            (row.try_get(1)?, shared::unsigned(row.try_get(2)?)),
        ))
    };
    rows.iter()
        .map(place)
        .collect::<sqlx::Result<_>>()
        .doing("look up recovered outputs")
}

/// The events among these that are in the worker's inbox.
pub(super) async fn known_events(
    readers: &SqlitePool,
    worker: &str,
    event_ids: &[&str],
) -> Result<Vec<String>> {
    let rows = sqlx::query(
        "select event_id from oncely_inbox where worker = $1 and event_id in (select value from json_each($2))",
    )
    .bind(worker)
    .bind(serde_json::json!(event_ids).to_string())
    .fetch_all(readers)
    .await
    .doing("look up events")?;
    rows.iter()
        .map(|row| row.try_get(0))
        .collect::<sqlx::Result<_>>()
        .doing("look up events")
}
