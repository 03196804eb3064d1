//! Reads for `oncely audit`, in pages. Each uses an index: none reads a whole table.

use std::collections::{BTreeSet, HashMap};

use jiff::Timestamp;

use super::db::{Db, Param, Sql, read_rows};
use super::rows::Columns as _;
use super::{OutboxRow, PublishedOutput, Result, outputs, rows, shared};
use crate::model::message::Output;
use crate::model::verdict::DeadLetter;

/// The record of an event in the inbox of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How many rows the event has: more than one is a fault.
    pub rows: u64,
    /// Whether one of them is `dead`.
    pub is_dead: bool,
    /// Whether one of them is `done`.
    pub is_done: bool,
    /// The position of the message that was handled; the highest of several.
    pub stream_sequence: Option<u64>,
    /// The states of its dead letters, those for a reused id omitted. Only read for a dead event.
    pub dead_letters: Vec<String>,
}

/// A dead letter, as far as an audit compares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditedDeadLetter {
    /// The number that operators pass to the commands.
    pub id: i64,
    /// The name of the worker.
    pub worker: String,
    /// The deduplication key of the message.
    pub event_id: String,
    /// The name of its state, such as `open`.
    pub state: String,
    /// The name of its reason, such as `rejected`.
    pub reason: String,
    /// How many times it was redriven.
    pub generation: u32,
    /// The last time it was dead-lettered, on the database's clock.
    pub died_at: Timestamp,
    /// The state of its event in the inbox; `None` for no row.
    pub inbox: Option<String>,
}

/// The place after which a page begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// Rows of this time are included if their number is higher.
    pub at: Timestamp,
    /// The number of the last row.
    pub number: i64,
}

impl Cursor {
    /// The place before all rows of a time.
    pub fn at(time: Timestamp) -> Self {
        Cursor {
            at: time,
            number: i64::MIN,
        }
    }

    fn params<'p>(&self) -> [Param<'p>; 2] {
        [
            Param::Int(self.at.as_microsecond()),
            Param::Int(self.number),
        ]
    }
}

/// The outcomes of those events that a worker has settled.
pub(super) async fn outcomes(
    db: &mut Db,
    worker: &str,
    event_ids: &[&str],
) -> Result<HashMap<String, Outcome>> {
    let sql = Sql {
        postgres:
            "select event_id, pg_catalog.count(*) as row_count, bool_or(state = 'dead') as is_dead,
             bool_or(state = 'done') as is_done, pg_catalog.max(stream_sequence) as stream_sequence
         from oncely.inbox where worker = $1 and event_id = any($2) group by event_id",
        sqlite:
            "select inbox.event_id, count(*) as row_count, max(inbox.state = 'dead') as is_dead,
             max(inbox.state = 'done') as is_done, max(inbox.stream_sequence) as stream_sequence
         from json_each($2) as given
             cross join oncely_inbox as inbox on inbox.worker = $1 and inbox.event_id = given.value
         group by inbox.event_id",
        doing: "find the outcomes of events",
    };
    let params = [Param::Text(worker), Param::Texts(event_ids)];
    let rows = db.fetch_all(sql, &params).await?;
    let found = read_rows(&rows, sql.doing, |row| {
        let outcome = Outcome {
            rows: row.number("row_count")?,
            is_dead: row.get("is_dead")?,
            is_done: row.get("is_done")?,
            stream_sequence: row.optional_number("stream_sequence")?,
            dead_letters: Vec::new(),
        };
        Ok((row.text("event_id")?, outcome))
    })?;
    let mut found: HashMap<String, Outcome> = found.into_iter().collect();
    let dead: Vec<&str> = event_ids
        .iter()
        .copied()
        .filter(|event| found.get(*event).is_some_and(|outcome| outcome.is_dead))
        .collect();
    // Written in the transaction of the inbox row, so this later statement finds them.
    for (event, state) in dead_letters_of(db, worker, &dead).await? {
        if let Some(outcome) = found.get_mut(&event) {
            outcome.dead_letters.push(state);
        }
    }
    Ok(found)
}

async fn dead_letters_of(
    db: &mut Db,
    worker: &str,
    event_ids: &[&str],
) -> Result<Vec<(String, String)>> {
    if event_ids.is_empty() {
        return Ok(Vec::new());
    }
    let sql = Sql {
        postgres: "select event_id, state from oncely.dead_letter
         where worker = $1 and event_id = any($2) and reason <> 'id-reuse'",
        sqlite: "select dead_letter.event_id, dead_letter.state from json_each($2) as given
             cross join oncely_dead_letter as dead_letter
             on dead_letter.worker = $1 and dead_letter.event_id = given.value
         where dead_letter.reason <> 'id-reuse'",
        doing: "find the dead letters of events",
    };
    let params = [Param::Text(worker), Param::Texts(event_ids)];
    let rows = db.fetch_all(sql, &params).await?;
    read_rows(&rows, sql.doing, |row| {
        Ok((row.text("event_id")?, row.text("state")?))
    })
}

/// A page of the dead letters that died after the cursor and before a time, oldest first.
pub(super) async fn dead_letters(
    db: &mut Db,
    after: Cursor,
    before: Timestamp,
    limit: u32,
) -> Result<Vec<AuditedDeadLetter>> {
    let sql = Sql {
        postgres: "select id, worker, event_id, state, reason, generation,
             (extract(epoch from died_at) * 1000000)::bigint as died_at,
             (select pg_catalog.min(inbox.state) from oncely.inbox
              where inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id) as inbox
         from oncely.dead_letter
         where (died_at, id) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
             and died_at < timestamptz 'epoch' + $3 * interval '1 microsecond'
         order by died_at, id limit $4",
        sqlite: "select id, worker, event_id, state, reason, generation, died_at,
             (select min(inbox.state) from oncely_inbox as inbox
              where inbox.worker = dead_letter.worker and inbox.event_id = dead_letter.event_id) as inbox
         from oncely_dead_letter as dead_letter
         where (died_at, id) > ($1, $2) and died_at < $3 order by died_at, id limit $4",
        doing: "read dead letters by age",
    };
    let [at, number] = after.params();
    let params = [
        at,
        number,
        Param::Int(before.as_microsecond()),
        Param::Int(limit.into()),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    read_rows(&rows, sql.doing, |row| {
        Ok(AuditedDeadLetter {
            id: row.get("id")?,
            worker: row.text("worker")?,
            event_id: row.text("event_id")?,
            state: row.text("state")?,
            reason: row.text("reason")?,
            generation: row.small_number("generation")?,
            died_at: row.time("died_at")?,
            inbox: row.get("inbox")?,
        })
    })
}

/// The numbers among these that a dead letter has.
pub(super) async fn existing_dead_letters(db: &mut Db, ids: &[i64]) -> Result<BTreeSet<i64>> {
    let sql = Sql {
        postgres: "select id from oncely.dead_letter where id = any($1)",
        sqlite: "select id from oncely_dead_letter where id in (select value from json_each($1))",
        doing: "find dead letters",
    };
    let rows = db.fetch_all(sql, &[Param::Ints(ids)]).await?;
    let ids = read_rows(&rows, sql.doing, |row| row.get("id"))?;
    Ok(ids.into_iter().collect())
}

/// The workers and events of notices of dead letters that are unpublished or were dropped.
pub(super) async fn unpublished_notices(db: &mut Db) -> Result<BTreeSet<(String, String)>> {
    let sql = Sql {
        postgres: "select worker, event_id from oncely.outbox
         where published_at is null and via = 'poll' and subject like 'oncely.dlq.%'
         union select outbox.worker, event_id from oncely.unrecorded_output join oncely.outbox using (seq)
         where subject like 'oncely.dlq.%'
         union select worker, event_id from oncely.dropped_output where subject like 'oncely.dlq.%'",
        sqlite: "select worker, event_id from oncely_outbox
         where published_at is null and subject like 'oncely.dlq.%'
         union select worker, event_id from oncely_dropped_output where subject like 'oncely.dlq.%'",
        doing: "find unpublished notices",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    let found = read_rows(&rows, sql.doing, |row| {
        Ok((row.text("worker")?, row.text("event_id")?))
    })?;
    Ok(found.into_iter().collect())
}

/// A page of the outputs that were published after the cursor, oldest first, and the cursor of the
/// next page; `None` after the last one. The only place where an audit reads outputs.
pub(super) async fn published(
    db: &mut Db,
    after: Cursor,
    limit: u32,
) -> Result<(Vec<PublishedOutput>, Option<Cursor>)> {
    let sql = Sql {
        postgres: "select seq, id, stream, stream_sequence,
             (extract(epoch from published_at) * 1000000)::bigint as published_at
         from oncely.outbox
         where published_at is not null
             and (published_at, seq) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
         order by published_at, seq limit $3",
        sqlite: "select seq, id, stream, stream_sequence, published_at from oncely_outbox
         where published_at is not null and (published_at, seq) > ($1, $2)
         order by published_at, seq limit $3",
        doing: "read published outputs by age",
    };
    let [at, number] = after.params();
    let params = [at, number, Param::Int(limit.into())];
    let rows = db.fetch_all(sql, &params).await?;
    let found: Vec<PublishedOutput> = rows
        .iter()
        .map(rows::published_output)
        .collect::<Result<_>>()?;
    let next = found.last().filter(|_| found.len() >= limit as usize);
    let next = next.map(|last| Cursor {
        at: last.published_at,
        number: last.seq,
    });
    Ok((found, next))
}

/// Like [`published`], for outputs of groups or from the WAL. A page has up to `limit` records,
/// each of several outputs.
pub(super) async fn published_in_records(
    db: &mut Db,
    after: Cursor,
    limit: u32,
) -> Result<(Vec<PublishedOutput>, Option<Cursor>)> {
    let Db::Postgres(_) = db else {
        return Ok((Vec::new(), None));
    };
    let sql = Sql::on_postgres(
        "with record as (
             select number, stream, seqs, sequences, published_at from oncely.relay_record
             where (published_at, number) > (timestamptz 'epoch' + $1 * interval '1 microsecond', $2)
             order by published_at, number limit $3
         )
         select outbox.seq, outbox.id, record.stream, published.sequence as stream_sequence, record.number,
             (extract(epoch from record.published_at) * 1000000)::bigint as published_at
         from record cross join unnest(record.seqs, record.sequences) as published (seq, sequence)
             left join oncely.outbox on outbox.seq = published.seq and outbox.via <> 'poll'
         order by record.published_at, record.number",
        "read the records of published outputs by age",
    );
    let [at, number] = after.params();
    let params = [at, number, Param::Int(limit.into())];
    let rows = db.fetch_all(sql, &params).await?;
    let next = read_rows(&rows, sql.doing, |row| {
        Ok(Cursor {
            at: row.time("published_at")?,
            number: row.get("number")?,
        })
    })?;
    // A record outlasts its outputs.
    let is_kept = |row: &&super::db::Row| matches!(row.get::<Option<i64>>("seq"), Ok(Some(_)));
    let kept = rows.iter().filter(is_kept);
    let found = kept.map(rows::published_output).collect::<Result<_>>()?;
    Ok((found, next.last().copied()))
}

/// Appends the notice of a dead letter again, with the id that it had. Returns its row.
pub(super) async fn resend_notice(
    db: &mut Db,
    dead_letter: &DeadLetter,
    notice: Output,
    (id, generation): (i64, u32),
) -> Result<Vec<OutboxRow>> {
    let pair = [(dead_letter.clone(), notice)];
    let new = shared::NewDeadLetter::all(&pair);
    let notices: Vec<(String, Output)> = new
        .iter()
        .map(|new| (dead_letter.worker.clone(), new.notice_for(id, generation)))
        .collect();
    outputs::append(db, &notices).await
}

/// Those of these outputs that are recorded on a stream now, by number.
pub(super) async fn recorded(
    db: &mut Db,
    stream: &str,
    numbers: &[i64],
) -> Result<HashMap<i64, PublishedOutput>> {
    let sql = Sql {
        postgres: "select seq, id, stream, stream_sequence,
             (extract(epoch from published_at) * 1000000)::bigint as published_at
         from oncely.outbox where seq = any($2) and stream = $1
         union all
         select outbox.seq, outbox.id, record.stream, record.stream_sequence,
             (extract(epoch from record.published_at) * 1000000)::bigint
         from oncely.outbox cross join lateral oncely.find_relay_record(outbox.seq) as record
         where outbox.seq = any($2) and outbox.via <> 'poll' and record.stream = $1",
        sqlite: "select seq, id, stream, stream_sequence, published_at from oncely_outbox
         where seq in (select value from json_each($2)) and stream = $1",
        doing: "read published outputs again",
    };
    let params = [Param::Text(stream), Param::Ints(numbers)];
    let rows = db.fetch_all(sql, &params).await?;
    rows.iter()
        .map(|row| rows::published_output(row).map(|output| (output.seq, output)))
        .collect()
}
