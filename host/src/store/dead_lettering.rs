//! Writing of dead letters: the original headers and bodies of messages that could not be handled.

use std::collections::{HashMap, HashSet};

use super::db::{Db, Session};
use super::shared::{self, InboxRecord, NewDeadLetter};
use super::{AlarmNotices, OutboxRow, Output, Result, alarms, outputs, postgres, sqlite};
use crate::model::verdict::DeadLetter;

/// Worker, event id and payload digest of a dead letter.
pub(super) type Key = (String, String, Vec<u8>);

/// Writes dead letters, their inbox records and their notices, and raises alarms for new failures.
/// Events that are settled already add nothing.
pub(super) async fn dead_letter(
    db: &mut Db,
    dead_letters: &[(DeadLetter, Output)],
    new_failures: u32,
) -> Result<(Vec<OutboxRow>, AlarmNotices)> {
    // The inbox: settle the events as dead, and lock their records.
    let new_dead_letters = NewDeadLetter::all(dead_letters);
    let (inserted, inbox_records) = settle(db, &new_dead_letters).await?;

    // Failures first: they are new only while their dead letters are not written.
    let new = shared::to_dead_letter(&new_dead_letters, &inserted, &inbox_records);
    let groups = shared::worker_failure_groups(&new);
    let alarms = alarms::record_failures(db, &groups, new_failures).await?;
    let written = insert(db, &new).await?;

    // The notices, with the ids of the written dead letters.
    let notice = |new_dead_letter: &&NewDeadLetter<'_>| {
        let (id, generation) = written.get(&new_dead_letter.full_key())?;
        let (worker, _) = new_dead_letter.key();
        Some((
            worker.to_owned(),
            new_dead_letter.notice_for(*id, *generation),
        ))
    };
    let notices: Vec<(String, Output)> = new.iter().filter_map(notice).collect();
    let notices = outputs::append(db, &notices).await?;
    Ok((notices, alarms::append_notices(db, alarms).await?))
}

/// Settles as dead the events that are not settled yet. Returns their keys, and the records of all
/// events, locked against a reclaim of a redriven event.
async fn settle(
    db: &mut Db,
    new_dead_letters: &[NewDeadLetter<'_>],
) -> Result<(
    HashSet<(String, String)>,
    HashMap<(String, String), InboxRecord>,
)> {
    match db.session()? {
        Session::Postgres(session) => Ok((
            postgres::dead_lettering::settle(session, new_dead_letters).await?,
            postgres::dead_lettering::inbox_records(session, new_dead_letters).await?,
        )),
        Session::Sqlite(session) => Ok((
            sqlite::dead_lettering::settle(session, new_dead_letters).await?,
            sqlite::dead_lettering::inbox_records(session, new_dead_letters).await?,
        )),
    }
}

/// Inserts new dead letters and reopens redriven ones. Returns id and generation of both.
async fn insert(db: &mut Db, new: &[&NewDeadLetter<'_>]) -> Result<HashMap<Key, (i64, u32)>> {
    match db.session()? {
        Session::Postgres(session) => postgres::dead_lettering::insert(session, new).await,
        Session::Sqlite(session) => sqlite::dead_lettering::insert(session, new).await,
    }
}
