//! Recordings of failed attempts, and crash markers. The attempts themselves are counted by
//! `postgres/attempts.rs` and `sqlite/attempts.rs`.

use bytes::Bytes;
use serde::Serialize;

use super::db::{Db, Param, Session, Sql, read_row, read_rows};
use super::rows::Columns as _;
use super::{CountedAttempt, FailedAttempt, Result, postgres, sqlite};

/// The last failed attempt at an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LastAttempt {
    /// The deduplication key of the message.
    pub event_id: String,
    /// The handler's own code, or a code of the host; `None` for no code.
    pub code: Option<String>,
    /// The failure in words.
    pub error: String,
}

/// Counts attempts that failed and stores their recordings. Returns the number of each attempt at
/// its event.
///
/// # Errors
/// `Conflict` if two hosts count the same event at the same moment.
pub(super) async fn count(
    db: &mut Db,
    worker: &str,
    failed: &[FailedAttempt],
) -> Result<Vec<CountedAttempt>> {
    match db.session()? {
        Session::Postgres(session) => postgres::attempts::count(session, worker, failed).await,
        Session::Sqlite(session) => sqlite::attempts::count(session, worker, failed).await,
    }
}

/// Deletes the recordings of attempts at these events.
pub(super) async fn delete_recordings(
    db: &mut Db,
    worker: &str,
    event_ids: &[String],
) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.recording where worker = $1 and event_id = any($2)",
        sqlite: "delete from oncely_recording where worker = $1 and event_id in (select value from json_each($2))",
        doing: "delete the recordings of attempts",
    };
    let event_ids: Vec<&str> = event_ids.iter().map(String::as_str).collect();
    let params = [Param::Text(worker), Param::Texts(&event_ids)];
    db.execute(sql, &params).await.map(drop)
}

/// Deletes the recordings of the events of these dead letters.
pub(super) async fn delete_recordings_of_dead_letters(
    db: &mut Db,
    dead_letters: &[i64],
) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.recording using oncely.dead_letter
         where dead_letter.id = any($1) and dead_letter.reason <> 'id-reuse'
             and recording.worker = dead_letter.worker and recording.event_id = dead_letter.event_id",
        sqlite: "delete from oncely_recording where (worker, event_id) in (
             select worker, event_id from oncely_dead_letter
             where id in (select value from json_each($1)) and reason <> 'id-reuse')",
        doing: "delete the recordings of attempts",
    };
    db.execute(sql, &[Param::Ints(dead_letters)])
        .await
        .map(drop)
}

/// The recording of an event's last failed attempt.
pub(super) async fn recording(db: &mut Db, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
    let sql = Sql {
        postgres: "select recording from oncely.recording where worker = $1 and event_id = $2",
        sqlite: "select recording from oncely_recording where worker = $1 and event_id = $2",
        doing: "read the recording of an attempt",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let row = db.fetch_optional(sql, &params).await?;
    row.map(|row| read_row(&row, sql.doing, |row| row.bytes("recording")).map(Bytes::from))
        .transpose()
}

/// The last failed attempts at these events, in any order.
pub(super) async fn last(
    db: &mut Db,
    worker: &str,
    event_ids: &[String],
) -> Result<Vec<LastAttempt>> {
    let sql = Sql {
        postgres: "select distinct on (event_id) event_id, code, error from oncely.attempt
         where worker = $1 and event_id = any($2) order by event_id, attempt desc",
        // With a bare maximum, SQLite reads the other columns from the row that holds it.
        sqlite: "select event_id, code, error, max(attempt) as attempt from oncely_attempt
         where worker = $1 and event_id in (select value from json_each($2)) group by event_id",
        doing: "read the last attempts",
    };
    let event_ids: Vec<&str> = event_ids.iter().map(String::as_str).collect();
    let params = [Param::Text(worker), Param::Texts(&event_ids)];
    let rows = db.fetch_all(sql, &params).await?;
    read_rows(&rows, sql.doing, |row| {
        Ok(LastAttempt {
            event_id: row.text("event_id")?,
            code: row.get("code")?,
            error: row.text("error")?,
        })
    })
}

/// Writes a crash marker before a message is handled alone. Returns how many markers were written
/// before and not cleared.
pub(super) async fn write_crash_marker(db: &mut Db, worker: &str, event_id: &str) -> Result<u32> {
    let sql = Sql {
        postgres: "insert into oncely.crash_marker (worker, event_id, starts) values ($1, $2, 1)
         on conflict (worker, event_id) do update set starts = crash_marker.starts + 1
         returning starts - 1 as before",
        sqlite: "insert into oncely_crash_marker (worker, event_id, starts) values ($1, $2, 1)
         on conflict (worker, event_id) do update set starts = starts + 1
         returning starts - 1 as before",
        doing: "write a crash marker",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let row = db.fetch_one(sql, &params).await?;
    read_row(&row, sql.doing, |row| row.small_number("before"))
}

/// Clears the crash marker.
pub(super) async fn clear_crash_marker(db: &mut Db, worker: &str, event_id: &str) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.crash_marker where worker = $1 and event_id = $2",
        sqlite: "delete from oncely_crash_marker where worker = $1 and event_id = $2",
        doing: "clear a crash marker",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    db.execute(sql, &params).await.map(drop)
}

/// Clears the crash markers of the events of dead letters, so that messages during which hosts
/// crashed are tried again.
pub(super) async fn clear_crash_markers_of_dead_letters(
    db: &mut Db,
    dead_letters: &[i64],
) -> Result<()> {
    let sql = Sql {
        postgres: "delete from oncely.crash_marker using oncely.dead_letter
         where dead_letter.id = any($1)
             and crash_marker.worker = dead_letter.worker and crash_marker.event_id = dead_letter.event_id",
        sqlite: "delete from oncely_crash_marker where (worker, event_id) in (
             select worker, event_id from oncely_dead_letter where id in (select value from json_each($1)))",
        doing: "clear the crash markers of dead letters",
    };
    db.execute(sql, &[Param::Ints(dead_letters)])
        .await
        .map(drop)
}
