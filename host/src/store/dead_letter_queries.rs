//! Reading of dead letters: the original messages, their failure history, and later events.

use jiff::Timestamp;

use super::db::{Db, Param, Sql, read_row};
use super::rows::Columns as _;
use super::{
    AttemptRecord, AuditRecord, DeadLetterFilter, DeadLetterGroup, DeadLetterOutput,
    DeadLetterRecord, DeadLetterSummary, EditRecord, Result, rows,
};

/// The columns of a dead letter in a list. The inbox shows whether a redriven one took effect.
macro_rules! postgres_summaries {
    ($also:literal, $($which:tt)+) => {
        concat!(
            "select * from (
                 select id, worker, event_id, reason, code, detail, subject, attempts, version, generation, stream,
                     stream_sequence, group_id, case when state = 'redriven' and exists (
                         select from oncely.inbox where inbox.worker = dead_letter.worker
                             and inbox.event_id = dead_letter.event_id and inbox.state = 'done')
                     then 'done' else state end as state,
                     (extract(epoch from died_at) * 1000000)::bigint as died_at,
                     (extract(epoch from last_action_at) * 1000000)::bigint as last_action_at",
            $also,
            " from oncely.dead_letter where ",
            $($which)+,
            ") as dead_letter"
        )
    };
}

/// Like [`postgres_summaries`].
macro_rules! sqlite_summaries {
    ($also:literal, $($which:tt)+) => {
        concat!(
            "select * from (
                 select id, worker, event_id, reason, code, detail, subject, attempts, version, generation, stream,
                     stream_sequence, group_id, case when state = 'redriven' and exists (
                         select 1 from oncely_inbox as inbox where inbox.worker = dead_letter.worker
                             and inbox.event_id = dead_letter.event_id and inbox.state = 'done')
                     then 'done' else state end as state,
                     died_at,
                     last_action_at",
            $also,
            " from oncely_dead_letter as dead_letter where ",
            $($which)+,
            ")"
        )
    };
}

/// The conditions of a filter, except for subjects with wildcards; see [`params`].
macro_rules! postgres_fits {
    () => {
        "($1::text is null or worker = $1) and ($2::text is null or reason = $2)
         and ($3::text is null or code = $3) and (cardinality($4::bigint[]) = 0 or id = any($4))
         and ($5::bigint is null or id < $5)
         and ($6::bigint is null or died_at >= timestamptz 'epoch' + $6 * interval '1 microsecond')
         and ($7::bigint is null or died_at < timestamptz 'epoch' + $7 * interval '1 microsecond')
         and ($8::text is null or group_id = $8)
         and ($9::text is null or subject = $9)
         and ($10::text is null or pg_catalog.starts_with(subject, $10))"
    };
}

/// Like [`postgres_fits`].
macro_rules! sqlite_fits {
    () => {
        "($1 is null or worker = $1) and ($2 is null or reason = $2)
         and ($3 is null or code = $3) and ($4 = '[]' or id in (select value from json_each($4)))
         and ($5 is null or id < $5)
         and ($6 is null or died_at >= $6)
         and ($7 is null or died_at < $7)
         and ($8 is null or group_id = $8)
         and ($9 is null or subject = $9)
         and ($10 is null or substr(subject, 1, length($10)) = $10)"
    };
}

/// Open and redriven dead letters that match a filter. The query has to exclude those that took
/// effect.
macro_rules! open_only {
    ($fits:ident) => {
        concat!("state in ('open', 'redriven') and ", $fits!())
    };
}

/// The values of a filter.
fn params(filter: &DeadLetterFilter) -> [Param<'_>; 10] {
    [
        Param::OptionalText(filter.worker.as_deref()),
        Param::OptionalText(filter.reason.as_deref()),
        Param::OptionalText(filter.code.as_deref()),
        Param::Ints(&filter.ids),
        Param::OptionalInt(filter.below),
        Param::OptionalInt(filter.since.map(Timestamp::as_microsecond)),
        Param::OptionalInt(filter.until.map(Timestamp::as_microsecond)),
        Param::OptionalText(filter.group.as_deref()),
        Param::OptionalText(filter.exact_subject()),
        Param::OptionalText(filter.subject_prefix()),
    ]
}

/// One page of dead letters, newest first.
pub(super) async fn list(db: &mut Db, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>> {
    macro_rules! listed {
        ($summaries:ident, $fits:ident) => {
            if filter.closed {
                concat!($summaries!("", $fits!()), " order by id desc limit $11")
            } else {
                concat!(
                    $summaries!("", open_only!($fits)),
                    " where state <> 'done' order by id desc limit $11"
                )
            }
        };
    }
    let sql = Sql {
        postgres: listed!(postgres_summaries, postgres_fits),
        sqlite: listed!(sqlite_summaries, sqlite_fits),
        doing: "list dead letters",
    };
    let mut params = params(filter).to_vec();
    params.push(Param::Int(filter.limit.into()));
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::dead_letter_summary))
}

/// How many dead letters match, and the id of the newest one.
pub(super) async fn count(db: &mut Db, filter: &DeadLetterFilter) -> Result<(u64, Option<i64>)> {
    macro_rules! counted {
        ($summaries:ident, $fits:ident) => {
            if filter.closed {
                concat!(
                    "select count(*) as number, max(id) as newest from (",
                    $summaries!("", $fits!()),
                    ") as found"
                )
            } else {
                concat!(
                    "select count(*) as number, max(id) as newest from (",
                    $summaries!("", open_only!($fits)),
                    " where state <> 'done') as found"
                )
            }
        };
    }
    let sql = Sql {
        postgres: counted!(postgres_summaries, postgres_fits),
        sqlite: counted!(sqlite_summaries, sqlite_fits),
        doing: "count dead letters",
    };
    let row = db.fetch_one(sql, &params(filter)).await?;
    read_row(&row, sql.doing, |row| {
        Ok((row.number("number")?, row.get("newest")?))
    })
}

/// The most groups by subject that a filter with wildcards reads, largest first.
const SUBJECTS_MAX: i64 = 100_000;

/// Counts and times of matching dead letters, by group, largest first. If the filter has a subject
/// with wildcards, groups by their subject, at most [`SUBJECTS_MAX`].
pub(super) async fn groups(db: &mut Db, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterGroup>> {
    macro_rules! grouped {
        ($dead_letters:expr, $which:literal, $joined:expr) => {
            concat!(
                "with found as (",
                $dead_letters,
                $which,
                "), grouped as (
                     select group_id, worker, case when $11 then subject else '' end as subject,
                         count(*) as dead_letters, min(died_at) as first, max(died_at) as last,
                         max(id) as last_dead_letter
                     from found group by 1, 2, 3
                     order by count(*) desc, max(id) limit $12
                 )
                 select grouped.*, dead_letter_group.id, reason, code, shape, place, owner, note,
                     actor as noted_by, stated_name as noted_by_stated, ",
                $joined,
                " order by dead_letters desc, last_dead_letter"
            )
        };
    }
    macro_rules! matching {
        ($summaries:ident, $fits:ident, $joined:literal) => {
            if filter.closed {
                grouped!($summaries!("", $fits!()), "", $joined)
            } else {
                grouped!(
                    $summaries!("", open_only!($fits)),
                    " where state <> 'done'",
                    $joined
                )
            }
        };
    }
    let sql = Sql {
        postgres: matching!(
            postgres_summaries,
            postgres_fits,
            "(extract(epoch from written_at) * 1000000)::bigint as noted_at
                 from grouped left join oncely.dead_letter_group on dead_letter_group.id = grouped.group_id
                     left join oncely.dead_letter_group_note as noted on noted.group_id = grouped.group_id"
        ),
        sqlite: matching!(
            sqlite_summaries,
            sqlite_fits,
            "written_at as noted_at
                 from grouped left join oncely_dead_letter_group as dead_letter_group
                         on dead_letter_group.id = grouped.group_id
                     left join oncely_dead_letter_group_note as noted on noted.group_id = grouped.group_id"
        ),
        doing: "group dead letters",
    };
    let is_by_subject = filter.has_wildcard();
    let limit = if is_by_subject {
        SUBJECTS_MAX
    } else {
        filter.limit.into()
    };
    let mut params = params(filter).to_vec();
    params.extend([Param::Bool(is_by_subject), Param::Int(limit)]);
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::dead_letter_group))
}

/// One dead letter with all its details.
pub(super) async fn find(db: &mut Db, id: i64) -> Result<Option<DeadLetterRecord>> {
    let sql = Sql {
        postgres: postgres_summaries!(
            ", headers, body, (extract(epoch from first_died_at) * 1000000)::bigint as first_died_at,
               (extract(epoch from coalesce(stored_at, first_died_at, died_at)) * 1000000)::bigint as stored_at",
            "id = $1"
        ),
        sqlite: sqlite_summaries!(
            ", headers, body, first_died_at, coalesce(stored_at, first_died_at, died_at) as stored_at",
            "id = $1"
        ),
        doing: "read a dead letter",
    };
    let Some(row) = db.fetch_optional(sql, &[Param::Int(id)]).await? else {
        return Ok(None);
    };
    let mut dead_letter = rows::dead_letter(&row)?;
    let (worker, event_id) = (
        dead_letter.summary.worker.clone(),
        dead_letter.summary.event_id.clone(),
    );
    dead_letter.attempts = attempts(db, &worker, &event_id).await?;
    dead_letter.edits = edits(db, id).await?;
    dead_letter.audit = audit(db, id).await?;
    dead_letter.inbox = inbox_state(db, &worker, &event_id).await?;
    dead_letter.outputs = outputs(db, &worker, &event_id).await?;
    Ok(Some(dead_letter))
}

/// The dead letters with an event id, oldest first.
pub(super) async fn of_event(
    db: &mut Db,
    worker: &str,
    event_id: &str,
) -> Result<Vec<DeadLetterSummary>> {
    let sql = Sql {
        postgres: concat!(
            postgres_summaries!("", "worker = $1 and event_id = $2"),
            " order by id"
        ),
        sqlite: concat!(
            sqlite_summaries!("", "worker = $1 and event_id = $2"),
            " order by id"
        ),
        doing: "find the dead letters of an event",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::dead_letter_summary))
}

/// All failed attempts at an event, oldest first.
pub(super) async fn attempts(
    db: &mut Db,
    worker: &str,
    event_id: &str,
) -> Result<Vec<AttemptRecord>> {
    let sql = Sql {
        postgres: "select attempt, version, code, error, logs, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.attempt where worker = $1 and event_id = $2 order by attempt",
        sqlite: "select attempt, version, code, error, logs, at
         from oncely_attempt where worker = $1 and event_id = $2 order by attempt",
        doing: "read attempts",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::attempt))
}

/// The corrected bodies of a dead letter, oldest first.
async fn edits(db: &mut Db, id: i64) -> Result<Vec<EditRecord>> {
    let sql = Sql {
        postgres: "select actor, note, body, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.dead_letter_edit where dead_letter_id = $1 order by edit",
        sqlite: "select actor, note, body, at
         from oncely_dead_letter_edit where dead_letter_id = $1 order by edit",
        doing: "read corrected bodies",
    };
    let rows = db.fetch_all(sql, &[Param::Int(id)]).await?;
    Ok(rows::list(&rows, rows::dead_letter_edit))
}

/// The actions on a dead letter, oldest first.
async fn audit(db: &mut Db, id: i64) -> Result<Vec<AuditRecord>> {
    let sql = Sql {
        postgres: "select action, generation, actor, stated_name, note, (extract(epoch from at) * 1000000)::bigint as at
         from oncely.dead_letter_audit where dead_letter_id = $1 order by seq",
        sqlite: "select action, generation, actor, stated_name, note, at
         from oncely_dead_letter_audit where dead_letter_id = $1 order by seq",
        doing: "read the audit of a dead letter",
    };
    let rows = db.fetch_all(sql, &[Param::Int(id)]).await?;
    Ok(rows::list(&rows, rows::dead_letter_audit))
}

/// The state of an event in the inbox, and when it was settled.
async fn inbox_state(
    db: &mut Db,
    worker: &str,
    event_id: &str,
) -> Result<Option<(String, Timestamp)>> {
    let sql = Sql {
        postgres: "select state, (extract(epoch from settled_at) * 1000000)::bigint as settled_at
         from oncely.inbox where worker = $1 and event_id = $2",
        sqlite: "select state, settled_at from oncely_inbox where worker = $1 and event_id = $2",
        doing: "find an event",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let row = db.fetch_optional(sql, &params).await?;
    row.as_ref().map(rows::inbox_state).transpose()
}

/// The outputs of an event, without those of the platform.
async fn outputs(db: &mut Db, worker: &str, event_id: &str) -> Result<Vec<DeadLetterOutput>> {
    let sql = Sql {
        postgres: "select id, headers, subject, coalesce(outbox.stream, recorded.stream) as stream,
             coalesce(outbox.stream_sequence, recorded.stream_sequence) as stream_sequence
         from oncely.outbox left join lateral oncely.find_relay_record(seq) as recorded on via <> 'poll'
         where worker = $1 and event_id = $2 and subject not like 'oncely.%' order by seq",
        sqlite: "select id, headers, subject, stream, stream_sequence from oncely_outbox
         where worker = $1 and event_id = $2 and subject not like 'oncely.%' order by seq",
        doing: "find the outputs of an event",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::dead_letter_output))
}
