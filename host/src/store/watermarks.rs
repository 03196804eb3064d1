//! Watermarks: the state of the broker, written to the database first and then to the watermark
//! stream. A comparison of the two detects a restore of the database or of the broker to an earlier
//! time.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::db::{Db, Param, Row, Sql};
use super::rows::Columns as _;
use super::{Result, StoreError, shared};

/// How many watermarks are kept, in addition to all since the newest acknowledged one. A host that
/// is delayed by more than this many watermarks of other hosts skips its own.
const WATERMARKS_KEPT: i64 = 100;

/// How long recovered outputs are kept, in days. Their events, dead letters included, may be
/// handled again during that time.
const RECOVERED_KEPT_DAYS: i64 = 30;

/// The state of the broker at some moment. Every message acknowledged by then is settled in the
/// database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerState {
    /// The streams that workers consume, by name.
    pub streams: BTreeMap<String, StreamEnd>,
    /// The ack floors, by worker.
    pub consumers: BTreeMap<String, AckFloor>,
}

/// The end of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// When the stream was created.
    pub created: Timestamp,
    /// The sequence of the last message, even if it was removed since.
    pub last_sequence: u64,
    /// When the last message was stored; `None` if it was removed already.
    pub stored_at: Option<Timestamp>,
}

/// The sequence up to which a consumer has acknowledged all messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AckFloor {
    /// The stream that the consumer reads.
    pub stream: String,
    /// The sequence on that stream; 0 if nothing was acknowledged.
    pub sequence: u64,
    /// The subjects that the consumer was filtered by; empty for the whole stream.
    pub subjects: Vec<String>,
    /// Messages up to this sequence may have been skipped while the filter was different; 0 for
    /// none.
    #[serde(default)]
    pub skipped_up_to: u64,
}

/// A watermark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watermark {
    /// The random name under which both sides store it: 32 hex digits.
    pub name: String,
    /// When it was written, on the database's clock.
    pub written_at: Timestamp,
    /// The state of the broker just before that.
    pub seen: BrokerState,
}

/// The watermarks of a database, for the comparison with the watermark stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// The newest one.
    pub last: Option<Watermark>,
    /// The newest acknowledged one: when it was written, and its sequence on the watermark stream.
    pub acknowledged: Option<(Timestamp, u64)>,
    /// When the requested watermark was written; `None` if the database does not have it.
    pub requested_written_at: Option<Timestamp>,
    /// Whether the database has recovered outputs.
    pub has_recovered: bool,
}

/// The place where a recovery found an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredOutput {
    /// The value of `Nats-Msg-Id`.
    pub id: String,
    /// The name of the stream that holds it.
    pub stream: String,
    /// The sequence on that stream.
    pub stream_sequence: u64,
}

/// The watermarks of the database, and the time of the one that is named `on_broker`.
pub(super) async fn read(db: &mut Db, on_broker: Option<&str>) -> Result<Watermarks> {
    // One statement reads one state of the database.
    let sql = Sql {
        postgres: "select last.name, last.broker_state, acknowledged.stream_sequence,
             (extract(epoch from last.written_at) * 1000000)::bigint as written_at,
             (extract(epoch from acknowledged.written_at) * 1000000)::bigint as acknowledged_at,
             (select (extract(epoch from written_at) * 1000000)::bigint from oncely.watermark where name = $1) as known,
             exists (select from oncely.recovered_output) as has_recovered
         from (select) as one
             left join oncely.watermark as last on last.number = (select pg_catalog.max(number) from oncely.watermark)
             left join oncely.watermark as acknowledged on acknowledged.number = (
                 select pg_catalog.max(number) from oncely.watermark where stream_sequence is not null)",
        sqlite: "select last.name, last.broker_state, last.written_at, acknowledged.stream_sequence,
             acknowledged.written_at as acknowledged_at,
             (select written_at from oncely_watermark where name = $1) as known,
             exists (select 1 from oncely_recovered_output) as has_recovered
         from (select 1)
             left join oncely_watermark as last on last.number = (select max(number) from oncely_watermark)
             left join oncely_watermark as acknowledged on acknowledged.number = (
                 select max(number) from oncely_watermark where stream_sequence is not null)",
        doing: "read the watermarks",
    };
    let row = db
        .fetch_one(sql, &[Param::Text(on_broker.unwrap_or_default())])
        .await?;
    decode(&row).map_err(StoreError::Unavailable)
}

fn decode(row: &Row) -> anyhow::Result<Watermarks> {
    let name: Option<String> = row.get("name")?;
    let last = match name {
        Some(name) => Some(Watermark {
            name,
            written_at: row.time("written_at")?,
            seen: broker_state_from_text(&row.text("broker_state")?)?,
        }),
        None => None,
    };
    let acknowledged = match row.optional_number("stream_sequence")? {
        Some(sequence) => Some((row.time("acknowledged_at")?, sequence)),
        None => None,
    };
    Ok(Watermarks {
        last,
        acknowledged,
        requested_written_at: row.optional_time("known")?,
        has_recovered: row.get("has_recovered")?,
    })
}

/// Writes a watermark, and deletes expired ones.
pub(super) async fn write(db: &mut Db, name: &str, seen: &BrokerState) -> Result<()> {
    let insert = Sql {
        postgres: "insert into oncely.watermark (name, broker_state) values ($1, $2)",
        sqlite: "insert into oncely_watermark (name, broker_state) values ($1, $2)",
        doing: "write a watermark",
    };
    let state = broker_state_to_text(seen)?;
    db.execute(insert, &[Param::Text(name), Param::Text(&state)])
        .await?;

    // Keep the newest watermarks, and the last one that the broker acknowledged.
    let expire = Sql {
        postgres: "delete from oncely.watermark where number <= (
             select number from oncely.watermark order by number desc offset $1 limit 1)
             and number < (select pg_catalog.max(number) from oncely.watermark where stream_sequence is not null)",
        sqlite: "delete from oncely_watermark where number <= (
             select number from oncely_watermark order by number desc limit 1 offset $1)
             and number < (select max(number) from oncely_watermark where stream_sequence is not null)",
        doing: "delete old watermarks",
    };
    db.execute(expire, &[Param::Int(WATERMARKS_KEPT)]).await?;

    // Recovered outputs expire after some days, in batches.
    let forget = Sql {
        postgres: "delete from oncely.recovered_output where id in (
             select id from oncely.recovered_output
             where recovered_at < pg_catalog.now() - $1 * interval '1 day' limit 1000)",
        sqlite: "delete from oncely_recovered_output where id in (
             select id from oncely_recovered_output
             where recovered_at < cast(unixepoch('subsec') * 1000000 as integer) - $1 * 86400000000 limit 1000)",
        doing: "delete old recovered outputs",
    };
    db.execute(forget, &[Param::Int(RECOVERED_KEPT_DAYS)])
        .await
        .map(drop)
}

/// Records the sequence under which the broker holds a watermark.
pub(super) async fn acknowledge(db: &mut Db, name: &str, sequence: u64) -> Result<()> {
    let sql = Sql {
        postgres: "update oncely.watermark set stream_sequence = $2 where name = $1",
        sqlite: "update oncely_watermark set stream_sequence = $2 where name = $1",
        doing: "acknowledge a watermark",
    };
    let params = [Param::Text(name), Param::Int(shared::signed(sequence)?)];
    db.execute(sql, &params).await.map(drop)
}

/// Records where outputs were found: the first place of each id, in place of an earlier recovery's.
pub(super) async fn save_recovered(db: &mut Db, outputs: &[RecoveredOutput]) -> Result<()> {
    let sql = Sql {
        postgres: "insert into oncely.recovered_output (id, stream, stream_sequence)
         select distinct on (value ->> 'id') value ->> 'id', value ->> 'stream', (value ->> 'sequence')::bigint
         from pg_catalog.jsonb_array_elements($1::jsonb) as given (value)
         order by value ->> 'id', (value ->> 'sequence')::bigint
         on conflict (id) do update set stream = excluded.stream, stream_sequence = excluded.stream_sequence,
             recovered_at = excluded.recovered_at",
        sqlite: "insert into oncely_recovered_output (id, stream, stream_sequence)
         select value ->> 'id', value ->> 'stream', min(value ->> 'sequence') from json_each($1)
         where true group by value ->> 'id'
         on conflict (id) do update set stream = excluded.stream, stream_sequence = excluded.stream_sequence,
             recovered_at = excluded.recovered_at",
        doing: "save recovered outputs",
    };
    let given = outputs.iter().map(|output| {
        serde_json::json!({
            "id": output.id,
            "stream": output.stream,
            "sequence": output.stream_sequence,
        })
    });
    let given = serde_json::Value::Array(given.collect()).to_string();
    db.execute(sql, &[Param::Text(&given)]).await.map(drop)
}

/// Deletes the recovered places of these ids.
pub(super) async fn delete_recovered(db: &mut Db, ids: &[&str]) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.recovered_output where id = any($1)",
        sqlite: "delete from oncely_recovered_output where id in (select value from json_each($1))",
        doing: "delete recovered outputs",
    };
    db.execute(sql, &[Param::Texts(ids)]).await.map(drop)
}

/// The stream and sequence at which a recovery found these ids.
pub(super) async fn find_recovered(
    db: &mut Db,
    ids: &[&str],
) -> Result<HashMap<String, (String, u64)>> {
    let sql = Sql {
        postgres: "select id, stream, stream_sequence from oncely.recovered_output where id = any($1)",
        sqlite: "select id, stream, stream_sequence from oncely_recovered_output
         where id in (select value from json_each($1))",
        doing: "find recovered outputs",
    };
    let rows = db.fetch_all(sql, &[Param::Texts(ids)]).await?;
    let place = |row: &Row| {
        let place = (row.text("stream")?, row.number("stream_sequence")?);
        Ok((row.text("id")?, place))
    };
    let places: sqlx::Result<_> = rows.iter().map(place).collect();
    places.map_err(|error| StoreError::Unavailable(error.into()))
}

fn broker_state_to_text(seen: &BrokerState) -> Result<String> {
    serde_json::to_string(seen).map_err(|error| StoreError::Unavailable(error.into()))
}

fn broker_state_from_text(text: &str) -> Result<BrokerState> {
    let seen = serde_json::from_str(text);
    seen.map_err(|error| {
        StoreError::Unavailable(anyhow::Error::new(error).context("read a watermark"))
    })
}
