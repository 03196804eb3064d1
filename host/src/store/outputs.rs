//! The outbox: appending, leasing and releasing outputs; lists, retries and drops for operators,
//! and the publishing lag.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::db::{Db, Param, Session, Sql};
use super::{
    GroupOutcome, OutboxLag, OutboxRow, Output, OutputFilter, OutputRecord, OutputSummary,
    Published, Result, Unpublished, postgres, rows, shared, sqlite,
};
use crate::model::subject;

/// Appends messages of the platform to the outbox, each with its worker. Those that are due at once
/// are leased to this host for [`shared::NOTICE_LEASE`] and returned.
pub(super) async fn append(db: &mut Db, outputs: &[(String, Output)]) -> Result<Vec<OutboxRow>> {
    let outputs: Vec<(&str, &Output)> = outputs
        .iter()
        .map(|(worker, output)| (worker.as_str(), output))
        .collect();
    append_for(db.session()?, &outputs, shared::NOTICE_LEASE).await
}

/// Appends outputs, each with its worker, in order. Those that are due at once are leased to this
/// host for `lease` and returned, each after the earlier ones of its key.
pub(super) async fn append_for(
    session: Session<'_>,
    outputs: &[(&str, &Output)],
    lease: Duration,
) -> Result<Vec<OutboxRow>> {
    let mut appended = match session {
        Session::Postgres(session) => postgres::outbox::append(session, outputs, lease).await?,
        Session::Sqlite(session) => sqlite::outbox::append(session, outputs, lease).await?,
    };
    OutboxRow::chain(&mut appended);
    Ok(appended)
}

/// Leases outputs that are due; see [`super::Store::lease_outputs`].
pub(super) async fn lease(db: &mut Db, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
    let (leased, not_leased) = match db.session()? {
        Session::Postgres(session) => {
            let (mut leased, mut not_leased) =
                postgres::outbox::lease_groups(session, limit, lease).await?;
            postgres::outbox::take_out_of_group(session, &not_leased).await?;
            postgres::outbox::unblock(session).await?;
            let left = limit.saturating_sub(leased.len() as u32);
            let singly = postgres::outbox::lease(session, left, lease).await?;
            leased.extend(singly.0);
            not_leased.extend(singly.1);
            (leased, not_leased)
        }
        Session::Sqlite(session) => {
            sqlite::outbox::unblock(session).await?;
            sqlite::outbox::lease(session, limit, lease).await?
        }
    };
    release(db, &not_leased).await?;
    Ok(leased)
}

/// Records that exactly these outputs are on their streams.
pub(super) async fn mark_published(db: &mut Db, published: &[Published]) -> Result<()> {
    match db.session()? {
        Session::Postgres(session) => postgres::outbox::mark_published(session, published).await,
        Session::Sqlite(session) => sqlite::outbox::mark_published(session, published).await,
    }
}

/// Records the outcomes of groups; see [`super::Store::record_groups`].
pub(super) async fn record_groups(db: &mut Db, groups: &[GroupOutcome]) -> Result<()> {
    // SQLite has no groups.
    let closed = match db.session()? {
        Session::Postgres(session) => postgres::outbox::close_groups(session, groups).await?,
        Session::Sqlite(_) => HashSet::new(),
    };
    let (closed, others): (Vec<_>, Vec<_>) = groups
        .iter()
        .partition(|group| closed.contains(&group.number));
    let published: Vec<Published> = others
        .iter()
        .flat_map(|group| group.published.iter().cloned())
        .collect();
    if !published.is_empty() {
        mark_published(db, &published).await?;
    }
    let unpublished: Vec<(i64, Unpublished)> = closed
        .iter()
        .flat_map(|group| group.unpublished.iter().cloned())
        .collect();
    release(db, &unpublished).await
}

/// Releases leased outputs; see [`super::Store::release_outputs`].
pub(super) async fn release(db: &mut Db, rows: &[(i64, Unpublished)]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    match db.session()? {
        Session::Postgres(session) => postgres::outbox::release(session, rows).await,
        Session::Sqlite(session) => sqlite::outbox::release(session, rows).await,
    }
}

/// The columns of a summary, from the outbox and the dropped outputs. Times are in microseconds.
/// Lists leave the body out.
macro_rules! postgres_summaries {
    ($body:literal, $rest:expr) => {
        concat!(
            "with rows as (
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, ",
            $body,
            " as body, coalesce(outbox.stream, recorded.stream) as stream,
                     coalesce(outbox.stream_sequence, recorded.stream_sequence) as stream_sequence, blocked_by,
                     null::timestamptz as dropped_at, null as note,
                     case
                         when via <> 'poll' then case
                             when seq not in (select seq from oncely.unrecorded_output) then 'published'
                             when via = 'wal' then 'in-wal' else 'leased' end
                         when outbox.published_at is not null then 'published'
                         when parked_at is not null then 'parked'
                         when blocked_by is not null then 'blocked'
                         when due_at > pg_catalog.now() then 'delayed'
                         when leased_until > pg_catalog.now() then 'leased'
                         else 'due'
                     end as state
                 from oncely.outbox left join lateral oncely.find_relay_record(seq) as recorded on via <> 'poll'
                 union all
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, ",
            $body,
            ", null, null, null, dropped_at, note, 'dropped'
                 from oncely.dropped_output
             )
             select rows.*, (extract(epoch from created_at) * 1000000)::bigint as created,
                 (extract(epoch from due_at) * 1000000)::bigint as due,
                 (extract(epoch from parked_at) * 1000000)::bigint as parked,
                 (extract(epoch from dropped_at) * 1000000)::bigint as dropped,
                 (select pg_catalog.count(*) from oncely.outbox as other where other.blocked_by = rows.seq) as waiting
             from rows ",
            $rest
        )
    };
}

/// Like [`postgres_summaries`].
macro_rules! sqlite_summaries {
    ($body:literal, $rest:expr) => {
        concat!(
            "with clock as (
                 select cast(unixepoch('subsec') * 1000000 as integer) as now
             ), rows as (
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, ",
            $body,
            " as body, stream, stream_sequence, blocked_by, null as dropped_at, null as note,
                     case
                         when published_at is not null then 'published'
                         when parked_at is not null then 'parked'
                         when blocked_by is not null then 'blocked'
                         when due_at > now then 'delayed'
                         when leased_until > now then 'leased'
                         else 'due'
                     end as state
                 from oncely_outbox, clock
                 union all
                 select seq, id, worker, event_id, subject, ordering_key, failures, last_error, created_at, due_at,
                     parked_at, headers, ",
            $body,
            ", null, null, null, dropped_at, note, 'dropped'
                 from oncely_dropped_output
             )
             select rows.*, created_at as created, due_at as due, parked_at as parked, dropped_at as dropped,
                 (select count(*) from oncely_outbox as other where other.blocked_by = rows.seq) as waiting
             from rows ",
            $rest
        )
    };
}

/// The conditions that all lists share: worker and subjects; see [`likely`].
macro_rules! postgres_list {
    ($which:literal, $order:literal) => {
        postgres_summaries!(
            "null::bytea",
            concat!(
                "where ",
                $which,
                " and ($1::text is null or worker = $1)
                 and (cardinality($3::text[]) = 0 or subject like any($3)) order by ",
                $order,
                " limit $2"
            )
        )
    };
}

/// Like [`postgres_list`].
macro_rules! sqlite_list {
    ($which:literal, $order:literal) => {
        sqlite_summaries!(
            "null",
            concat!(
                "where ",
                $which,
                " and ($1 is null or worker = $1)
                 and ($3 = '[]' or exists (select 1 from json_each($3) as pattern
                     where rows.subject like pattern.value escape '\\')) order by ",
                $order,
                " limit $2"
            )
        )
    };
}

/// Parked or all unpublished outputs, oldest first; or dropped ones, newest first.
pub(super) async fn list(db: &mut Db, filter: &OutputFilter) -> Result<Vec<OutputSummary>> {
    let (postgres, sqlite) = match (filter.dropped, filter.unpublished) {
        (true, _) => (
            postgres_list!("dropped_at is not null", "dropped_at desc, seq"),
            sqlite_list!("dropped_at is not null", "dropped_at desc, seq"),
        ),
        (false, true) => (
            postgres_list!("state not in ('published', 'dropped')", "seq"),
            sqlite_list!("state not in ('published', 'dropped')", "seq"),
        ),
        (false, false) => (
            postgres_list!("state = 'parked' and parked_at is not null", "seq"),
            sqlite_list!("state = 'parked' and parked_at is not null", "seq"),
        ),
    };
    let sql = Sql {
        postgres,
        sqlite,
        doing: "list outputs",
    };
    let likely: Vec<String> = filter.subjects.iter().map(|one| likely(one)).collect();
    let likely: Vec<&str> = likely.iter().map(String::as_str).collect();
    let params = [
        Param::OptionalText(filter.worker.as_deref()),
        Param::Int(filter.limit.into()),
        Param::Texts(&likely),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    let mut outputs = rows::list(&rows, rows::output_summary);
    if !filter.subjects.is_empty() {
        let fits =
            |pattern: &String, output: &OutputSummary| subject::matches(pattern, &output.subject);
        outputs.retain(|output| filter.subjects.iter().any(|pattern| fits(pattern, output)));
    }
    Ok(outputs)
}

/// A pattern of subjects as one of `like`. It also fits subjects with more tokens.
fn likely(pattern: &str) -> String {
    let mut like = String::with_capacity(pattern.len());
    for c in pattern.chars() {
        match c {
            '*' | '>' => like.push('%'),
            '%' | '_' | '\\' => like.extend(['\\', c]),
            c => like.push(c),
        }
    }
    like
}

/// One output by its number.
pub(super) async fn find(db: &mut Db, number: i64) -> Result<Option<OutputRecord>> {
    let sql = Sql {
        postgres: postgres_summaries!("body", "where seq = $1"),
        sqlite: sqlite_summaries!("body", "where seq = $1"),
        doing: "read an output",
    };
    let row = db.fetch_optional(sql, &[Param::Int(number)]).await?;
    row.as_ref().map(rows::output).transpose()
}

/// At most `limit` outputs of an event, in the order of writing, dropped ones included.
pub(super) async fn of_event(
    db: &mut Db,
    worker: &str,
    event_id: &str,
    limit: u32,
) -> Result<Vec<OutputRecord>> {
    let sql = Sql {
        postgres: postgres_summaries!(
            "body",
            "where worker = $1 and event_id = $2 order by seq limit $3"
        ),
        sqlite: sqlite_summaries!(
            "body",
            "where worker = $1 and event_id = $2 order by seq limit $3"
        ),
        doing: "find the outputs of an event",
    };
    let params = [
        Param::Text(worker),
        Param::Text(event_id),
        Param::Int(limit.into()),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::output))
}

/// Makes parked outputs due. Returns their number.
pub(super) async fn retry(db: &mut Db, numbers: &[i64]) -> Result<u64> {
    let sql = Sql {
        postgres: "update oncely.outbox set parked_at = null, leased_until = pg_catalog.now()
         where seq = any($1::bigint[]) and parked_at is not null",
        sqlite: "update oncely_outbox
         set parked_at = null, leased_until = cast(unixepoch('subsec') * 1000000 as integer)
         where seq in (select value from json_each($1)) and parked_at is not null",
        doing: "retry outputs",
    };
    db.execute(sql, &[Param::Ints(numbers)]).await
}

/// Moves parked outputs to the dropped ones. Returns their number.
pub(super) async fn drop(db: &mut Db, numbers: &[i64], note: &str) -> Result<u64> {
    let sql = Sql {
        postgres: "with gone as (
             delete from oncely.outbox where seq = any($1::bigint[]) and parked_at is not null
             returning seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key, created_at, due_at,
                 failures, last_error, parked_at
         )
         insert into oncely.dropped_output (seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key,
             created_at, due_at, failures, last_error, parked_at, note)
         select gone.*, $2 from gone",
        sqlite: "insert into oncely_dropped_output (seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key,
             created_at, due_at, failures, last_error, parked_at, note)
         select seq, id, worker, event_id, ordinal, subject, headers, body, ordering_key, created_at, due_at, failures,
             last_error, parked_at, $2
         from oncely_outbox where seq in (select value from json_each($1)) and parked_at is not null",
        doing: "drop outputs",
    };
    let note = shared::printable(note);
    let dropped = db
        .execute(sql, &[Param::Ints(numbers), Param::Text(&note)])
        .await?;

    // SQLite copies and deletes in two statements.
    if let Db::Sqlite(_) = db {
        let delete = Sql {
            postgres: "",
            sqlite: "delete from oncely_outbox where seq in (select value from json_each($1)) and parked_at is not null",
            doing: "drop outputs",
        };
        db.execute(delete, &[Param::Ints(numbers)]).await?;
    }
    Ok(dropped)
}

/// The publishing lag, by worker.
pub(super) async fn lag(db: &mut Db) -> Result<Vec<OutboxLag>> {
    let sql = Sql {
        postgres: "with unpublished as (
             select outbox.worker, outbox.due_at, outbox.parked_at is not null as is_parked,
                 before.parked_at is not null as is_blocked
             from oncely.outbox left join oncely.outbox as before on before.seq = outbox.blocked_by
             where outbox.published_at is null and outbox.via = 'poll'
             union all
             select worker, due_at, false, false from oncely.unrecorded_output
         )
         select worker, pg_catalog.count(*) filter (where due_at <= pg_catalog.now()) as unpublished,
             (extract(epoch from pg_catalog.now() - pg_catalog.min(due_at) filter (
                 where due_at <= pg_catalog.now() and not is_parked and not is_blocked)) * 1000)::bigint as oldest_ms,
             pg_catalog.count(*) filter (where is_parked) as parked, pg_catalog.count(*) filter (where is_blocked) as blocked
         from unpublished group by worker order by worker",
        sqlite: "with clock as (
             select cast(unixepoch('subsec') * 1000000 as integer) as now
         ), unpublished as (
             select outbox.worker, outbox.due_at, outbox.parked_at is not null as is_parked,
                 before.parked_at is not null as is_blocked
             from oncely_outbox as outbox left join oncely_outbox as before on before.seq = outbox.blocked_by
             where outbox.published_at is null
         )
         select worker, count(*) filter (where due_at <= now) as unpublished,
             (max(now) - min(due_at) filter (where due_at <= now and not is_parked and not is_blocked)) / 1000 as oldest_ms,
             count(*) filter (where is_parked) as parked, count(*) filter (where is_blocked) as blocked
         from unpublished, clock group by worker order by worker",
        doing: "measure the publishing lag",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::lag).collect()
}

/// How many outputs changed their id because it was taken, by worker.
pub(super) async fn taken_ids(db: &mut Db) -> Result<BTreeMap<String, u64>> {
    let sql = Sql {
        postgres: "select worker, pg_catalog.count(*) as taken from oncely.outbox where ids_taken > 0 group by worker",
        sqlite: "select worker, count(*) as taken from oncely_outbox where ids_taken > 0 group by worker",
        doing: "count taken ids",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    rows.iter().map(rows::taken_ids).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_of_subjects_becomes_one_of_like() {
        assert_eq!(likely("a_b.*.100%.>"), "a\\_b.%.100\\%.%");
    }
}
