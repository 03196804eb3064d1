//! Published outputs, for repairs after a stream has lost messages.

use std::time::Duration;

use super::errors::Doing;
use super::session::Session;
use crate::store::{PublishedOutput, Result, rows, shared};

/// The last output on each stream that was published `within` this time.
pub(super) async fn last_published(
    session: &mut Session,
    within: Duration,
) -> Result<Vec<PublishedOutput>> {
    // A maximum instead of a sort: under load, there are hundreds of thousands of rows per minute.
    let query = session.query(
        "with polled as (
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
             from record join oncely.outbox on outbox.via = 'wal'
                 and outbox.seq = seqs[pg_catalog.array_position(sequences, last_sequence)]
         )
         select distinct on (stream) seq, id, stream, stream_sequence,
             (extract(epoch from published_at) * 1000000)::bigint as published_at
         from published order by stream, stream_sequence desc",
    );
    let rows = query
        .bind(shared::micros(within))
        .fetch_all(session.connection())
        .await;
    rows.doing("find the last published outputs")?
        .iter()
        .map(rows::published_output)
        .collect()
}

/// All outputs in the outbox that were published to a stream, in publishing order.
pub(super) async fn published_to(
    session: &mut Session,
    stream: &str,
) -> Result<Vec<PublishedOutput>> {
    let query = session.query(
        "select seq, id, stream, stream_sequence, (extract(epoch from published_at) * 1000000)::bigint as published_at
         from (
             select seq, id, stream, stream_sequence, published_at from oncely.outbox where stream = $1
             union all
             select outbox.seq, outbox.id, record.stream, published.sequence, record.published_at
             from oncely.relay_record as record
                 cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
                 join oncely.outbox on outbox.seq = published.seq and outbox.via = 'wal'
             where record.stream = $1
         ) as published
         order by published_at, stream_sequence",
    );
    let rows = query.bind(stream).fetch_all(session.connection()).await;
    rows.doing("find published outputs")?
        .iter()
        .map(rows::published_output)
        .collect()
}

/// Makes published outputs unpublished if they are still recorded at the lost place.
pub(super) async fn republish(session: &mut Session, lost: &[PublishedOutput]) -> Result<u64> {
    let sequences: Vec<i64> = lost
        .iter()
        .map(|place| shared::signed(place.stream_sequence))
        .collect::<Result<_>>()?;
    let query = session.query(
        "update oncely.outbox
         set published_at = null, stream = null, stream_sequence = null, leased_until = pg_catalog.now(), failures = 0
         from unnest($1::bigint[], $2::text[], $3::bigint[]) as given (seq, stream, stream_sequence)
         where outbox.seq = given.seq and outbox.stream = given.stream
             and outbox.stream_sequence = given.stream_sequence",
    );
    let result = query
        .bind(lost.iter().map(|place| place.seq).collect::<Vec<_>>())
        .bind(
            lost.iter()
                .map(|place| place.stream.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(&sequences)
        .execute(session.connection())
        .await
        .doing("republish outputs")?;
    Ok(result.rows_affected() + move_to_polling(session, lost, &sequences).await?)
}

/// Leaves lost outputs that were published from the WAL to the poller.
async fn move_to_polling(
    session: &mut Session,
    lost: &[PublishedOutput],
    sequences: &[i64],
) -> Result<u64> {
    let query = session.query(
        "update oncely.outbox set via = 'poll', leased_until = pg_catalog.now()
         from unnest($1::bigint[], $2::text[], $3::bigint[]) as given (seq, stream, stream_sequence)
         where outbox.seq = given.seq and outbox.via = 'wal' and (given.seq, given.stream, given.stream_sequence) in (
             select published.seq, record.stream, published.sequence from oncely.relay_record as record
                 cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
             where record.stream = any($2::text[]))",
    );
    let result = query
        .bind(lost.iter().map(|place| place.seq).collect::<Vec<_>>())
        .bind(
            lost.iter()
                .map(|place| place.stream.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(sequences)
        .execute(session.connection())
        .await
        .doing("republish outputs of the WAL")?;
    Ok(result.rows_affected())
}
