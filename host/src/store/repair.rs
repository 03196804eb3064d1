//! Published outputs, for repairs after a stream has lost messages.

use std::time::Duration;

use super::db::{Db, Param, Sql};
use super::{PublishedOutput, Result, rows, shared};

/// The last output on each stream that was published `within` this time.
pub(super) async fn last_published(db: &mut Db, within: Duration) -> Result<Vec<PublishedOutput>> {
    let sql = Sql {
        // A maximum instead of a sort: under load, a minute has hundreds of thousands of rows.
        postgres: "with polled as (
             select stream, pg_catalog.max(array[stream_sequence, seq]) as last from oncely.outbox
             where published_at > pg_catalog.now() - $1 * interval '1 microsecond' group by stream
         ), record as (
             select distinct on (stream) stream, seqs, sequences, last_sequence, published_at from oncely.relay_record
             where published_at > pg_catalog.now() - $1 * interval '1 microsecond'
             order by stream, last_sequence desc
         ), published as (
             select outbox.seq, outbox.id, polled.stream, last[1] as stream_sequence, outbox.published_at
             from polled join oncely.outbox on outbox.seq = last[2]
             union all
             select outbox.seq, outbox.id, record.stream, last_sequence, record.published_at
             from record join oncely.outbox on outbox.via <> 'poll'
                 and outbox.seq = seqs[pg_catalog.array_position(sequences, last_sequence)]
         )
         select distinct on (stream) seq, id, stream, stream_sequence,
             (extract(epoch from published_at) * 1000000)::bigint as published_at
         from published order by stream, stream_sequence desc",
        // With a bare maximum, SQLite reads the other columns from the row that holds it.
        sqlite: "select seq, id, stream, max(stream_sequence) as stream_sequence, published_at from oncely_outbox
         where published_at > cast(unixepoch('subsec') * 1000000 as integer) - $1 group by stream",
        doing: "find the last published outputs",
    };
    let rows = db
        .fetch_all(sql, &[Param::Int(shared::micros(within))])
        .await?;
    rows.iter().map(rows::published_output).collect()
}

/// All outputs in the outbox that were published to a stream, in publishing order.
pub(super) async fn published_to(db: &mut Db, stream: &str) -> Result<Vec<PublishedOutput>> {
    let sql = Sql {
        postgres: "select seq, id, stream, stream_sequence, (extract(epoch from published_at) * 1000000)::bigint as published_at
         from (
             select seq, id, stream, stream_sequence, published_at from oncely.outbox where stream = $1
             union all
             select outbox.seq, outbox.id, record.stream, published.sequence, record.published_at
             from oncely.relay_record as record
                 cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
                 join oncely.outbox on outbox.seq = published.seq and outbox.via <> 'poll'
             where record.stream = $1
         ) as published
         order by published_at, stream_sequence",
        sqlite: "select seq, id, stream, stream_sequence, published_at from oncely_outbox
         where stream = $1 order by published_at, stream_sequence",
        doing: "find published outputs",
    };
    let rows = db.fetch_all(sql, &[Param::Text(stream)]).await?;
    rows.iter().map(rows::published_output).collect()
}

/// Makes published outputs unpublished if they are still recorded at the lost place. Returns their
/// number.
pub(super) async fn republish(db: &mut Db, lost: &[PublishedOutput]) -> Result<u64> {
    let sql = Sql {
        postgres: "update oncely.outbox
         set published_at = null, stream = null, stream_sequence = null, leased_until = pg_catalog.now(), failures = 0
         from jsonb_to_recordset($1::jsonb) as given (seq bigint, stream text, sequence bigint)
         where outbox.seq = given.seq and outbox.stream = given.stream and outbox.stream_sequence = given.sequence",
        sqlite: "update oncely_outbox
         set published_at = null, stream = null, stream_sequence = null, failures = 0,
             leased_until = cast(unixepoch('subsec') * 1000000 as integer)
         from json_each($1) as given
         where oncely_outbox.seq = given.value ->> 'seq' and stream = given.value ->> 'stream'
             and stream_sequence = given.value ->> 'sequence'",
        doing: "republish outputs",
    };
    let given = lost.iter().map(|place| {
        serde_json::json!({
            "seq": place.seq,
            "stream": place.stream,
            "sequence": place.stream_sequence,
        })
    });
    let given = serde_json::Value::Array(given.collect()).to_string();
    let polled = db.execute(sql, &[Param::Text(&given)]).await?;
    Ok(polled + move_to_polling(db, &given).await?)
}

/// Leaves lost outputs of groups or from the WAL to the poller.
async fn move_to_polling(db: &mut Db, given: &str) -> Result<u64> {
    let Db::Postgres(_) = db else { return Ok(0) };
    let sql = Sql::on_postgres(
        "update oncely.outbox set via = 'poll', leased_until = pg_catalog.now()
         from jsonb_to_recordset($1::jsonb) as given (seq bigint, stream text, sequence bigint)
         where outbox.seq = given.seq and outbox.via <> 'poll' and (given.seq, given.stream, given.sequence) in (
             select published.seq, record.stream, published.sequence from oncely.relay_record as record
                 cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
             where record.stream in (
                 select stream from jsonb_to_recordset($1::jsonb) as lost (stream text)))",
        "republish outputs of groups and of the WAL",
    );
    db.execute(sql, &[Param::Text(given)]).await
}
