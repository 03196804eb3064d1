//! Published outputs, for the repair of a stream that has lost them.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;

use super::errors::Doing;
use super::session::Session;
use crate::store::{PublishedOutput, Result, rows, shared};

/// The last output on each stream, of those published `within` this time.
pub(super) async fn last_published(
    readers: &SqlitePool,
    within: Duration,
) -> Result<Vec<PublishedOutput>> {
    // With a bare maximum, SQLite reads the other columns from the row that holds it.
    let query = sqlx::query(
        "select seq, id, stream, max(stream_sequence) as stream_sequence, published_at from oncely_outbox
         where published_at > cast(unixepoch('subsec') * 1000000 as integer) - $1 group by stream",
    );
    let rows = query.bind(shared::micros(within)).fetch_all(readers).await;
    rows.doing("read the last published outputs")?
        .iter()
        .map(rows::published_output)
        .collect()
}

/// All outputs published to a stream that are still in the outbox, in the order of publication.
pub(super) async fn published_to(
    readers: &SqlitePool,
    stream: &str,
) -> Result<Vec<PublishedOutput>> {
    let query = sqlx::query(
        "select seq, id, stream, stream_sequence, published_at from oncely_outbox where stream = $1 order by published_at, stream_sequence",
    );
    let rows = query.bind(stream).fetch_all(readers).await;
    rows.doing("read published outputs")?
        .iter()
        .map(rows::published_output)
        .collect()
}

/// Resets outputs that a stream has lost, so that they are published again. Returns their number.
pub(super) async fn republish(session: &mut Session, lost: &[PublishedOutput]) -> Result<u64> {
    let given = lost
        .iter()
        .map(|place| serde_json::json!({"seq": place.seq, "stream": place.stream, "sequence": place.stream_sequence}));
    let result = sqlx::query(
        "update oncely_outbox
         set published_at = null, stream = null, stream_sequence = null, failures = 0,
             leased_until = cast(unixepoch('subsec') * 1000000 as integer)
         from json_each($1) as given
         where oncely_outbox.seq = given.value ->> 'seq' and stream = given.value ->> 'stream'
             and stream_sequence = given.value ->> 'sequence'",
    )
    .bind(serde_json::Value::Array(given.collect()).to_string())
    .execute(session.connection().doing("reset lost outputs")?)
    .await
    .doing("reset lost outputs")?;
    Ok(result.rows_affected())
}
