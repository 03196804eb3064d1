//! Shared by both databases: stored forms of plain values, and decisions on rows that were read.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::{
    Claim, Claimed, OutboxRow, Output, Result, StateEntry, StateSlot, StoreError, Unpublished,
    WorkerMigration,
};
use crate::model::alarm::{self, Kind};
use crate::model::failure_group::FailureGroup;
use crate::model::message::Headers;
use crate::model::output_ids::OutputIds;
use crate::model::request::HttpResponse;
use crate::model::verdict::{DeadLetter, Settled};

/// The statement timeout of platform transactions, which run no guest code.
pub(super) const PLATFORM_STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long dead-letter notices are leased to the host that wrote them, before a poller may lease
/// them.
pub(super) const NOTICE_LEASE: Duration = Duration::from_secs(30);

/// How long the row of a deleted key of keyed state is kept for its version.
pub(super) const DELETED_STATE_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The precision of the time at which a failure was last seen. It limits the writes of that time.
pub(super) const LAST_SEEN_PRECISION: Duration = Duration::from_secs(60);

/// The savepoint of a transaction. Its name is random, so that no guest can guess it.
pub(super) struct Savepoint {
    name: String,
    is_set: bool,
}

impl Savepoint {
    pub(super) fn new() -> Self {
        Savepoint {
            name: format!("oncely_{:016x}", rand::random::<u64>()),
            is_set: false,
        }
    }

    /// The statements that set it, in place of an earlier one.
    pub(super) fn create_sql(&mut self) -> String {
        let name = &self.name;
        match std::mem::replace(&mut self.is_set, true) {
            true => format!("release savepoint {name}; savepoint {name}"),
            false => format!("savepoint {name}"),
        }
    }

    /// The statement that rolls back to it.
    pub(super) fn rollback_sql(&self) -> Result<String> {
        match self.is_set {
            true => Ok(format!("rollback to savepoint {}", self.name)),
            false => Err(StoreError::Refused(anyhow!("no savepoint to roll back to"))),
        }
    }
}

/// A response from its columns.
pub(super) fn stored_response(status: i64, headers: &str, body: Vec<u8>) -> Result<HttpResponse> {
    let status = u16::try_from(status)
        .context("read a status")
        .map_err(StoreError::Unavailable)?;
    Ok(HttpResponse {
        status,
        headers: headers_from_text(headers)?,
        body: body.into(),
    })
}

/// Headers as column text: `[["name","value"],...]`.
pub(super) fn headers_to_text(headers: &Headers) -> Result<String> {
    serde_json::to_string(headers)
        .context("write headers as JSON")
        .map_err(StoreError::Unavailable)
}

pub(super) fn headers_from_text(text: &str) -> Result<Headers> {
    serde_json::from_str(text)
        .context("read headers from JSON")
        .map_err(StoreError::Unavailable)
}

pub(super) fn timestamp(micros: i64) -> Result<Timestamp> {
    Timestamp::from_microsecond(micros)
        .context("read a time from the database")
        .map_err(StoreError::Unavailable)
}

/// A duration in whole microseconds.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

/// A key of keyed state from its columns. `last` is the version of its row. For a key without a
/// row, it is the version that the key's next version must exceed.
pub(super) fn state_slot(value: Option<Vec<u8>>, last: i64, has_row: bool) -> StateSlot {
    let version = unsigned(last);
    StateSlot {
        entry: value.map(|value| StateEntry {
            value: value.into(),
            version,
        }),
        version,
        has_row,
    }
}

/// A number as a signed 64-bit column.
pub(super) fn signed(number: u64) -> Result<i64> {
    i64::try_from(number)
        .with_context(|| format!("{number} is too large for the database"))
        .map_err(StoreError::Unavailable)
}

/// A count or version from the database; never negative.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

pub(super) fn narrow(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Text for display, without NUL characters, which PostgreSQL rejects.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        text.replace('\0', "\u{fffd}").into()
    } else {
        text.into()
    }
}

/// Stream and sequence from two columns that are both set or both null.
pub(super) fn origin(stream: Option<String>, sequence: Option<i64>) -> Option<(String, u64)> {
    stream.zip(sequence.map(unsigned))
}

/// The result of a claim. `existing_payload` is the payload of an earlier record; `None` if the
/// claim created the record.
pub(super) fn claimed(claim: &Claim, existing_payload: Option<&[u8]>, attempts: i64) -> Claimed {
    match existing_payload {
        None => Claimed::Fresh {
            attempts: narrow(attempts),
        },
        Some(payload) if payload == claim.payload_sha256 => {
            Claimed::Settled(Settled::seen_by_store())
        }
        Some(_) => Claimed::OtherPayload,
    }
}

/// A dead letter that is about to be written, with its derived values.
pub(super) struct NewDeadLetter<'a> {
    pub dead_letter: &'a DeadLetter,
    pub notice: &'a Output,
    pub payload_sha256: [u8; 32],
    pub group: FailureGroup,
}

/// The failures of new dead letters with their workers, each once, in lock order.
pub(super) type WorkerFailureGroups = Vec<(String, FailureGroup)>;

/// The failures of these dead letters.
pub(super) fn worker_failure_groups(
    new_dead_letters: &[&NewDeadLetter<'_>],
) -> WorkerFailureGroups {
    let mut groups: WorkerFailureGroups = new_dead_letters
        .iter()
        .map(|new_dead_letter| {
            (
                new_dead_letter.dead_letter.worker.clone(),
                new_dead_letter.group.clone(),
            )
        })
        .collect();
    groups.sort_by(|(_, one), (_, other)| one.cmp(other));
    groups.dedup_by(|(_, one), (_, other)| one.id == other.id);
    groups
}

/// The alarm on the first dead letter of a failure.
pub(super) fn new_failure(worker: &str, group: &FailureGroup) -> alarm::AlarmUpdate {
    let (worker, group) = (worker.to_owned(), Some(group.clone()));
    let step = alarm::AlarmStep::Raise;
    alarm::AlarmUpdate {
        worker,
        kind: Kind::NewFailure,
        group,
        times: 0,
        step,
        value: 1,
        threshold: 1,
        why: None,
    }
}

pub(super) fn is_longer(ms: i64, than: Duration) -> bool {
    u128::from(unsigned(ms)) > than.as_millis()
}

/// Alarm updates in lock order.
pub(super) fn in_lock_order(updates: &[alarm::AlarmUpdate]) -> Vec<&alarm::AlarmUpdate> {
    let mut updates: Vec<_> = updates.iter().collect();
    updates.sort_by_key(|step| {
        (
            step.worker.as_str(),
            step.kind.as_str(),
            group_id(step.group.as_ref()),
        )
    });
    updates
}

/// The value of the group column; empty for no group.
pub(super) fn group_id(group: Option<&FailureGroup>) -> &str {
    group.map_or("", |group| group.id.as_str())
}

/// A group from columns that are all set or all null.
pub(super) fn failure_group(
    id: Option<String>,
    reason: Option<String>,
    code: Option<String>,
    shape: Option<String>,
    place: Option<String>,
) -> Option<FailureGroup> {
    let (id, reason, shape) = (id?, reason?, shape?);
    Some(FailureGroup {
        id,
        reason,
        code,
        shape,
        place,
    })
}

impl<'a> NewDeadLetter<'a> {
    pub fn all(dead_letters: &'a [(DeadLetter, Output)]) -> Vec<Self> {
        let new_dead_letter = |(dead_letter, notice): &'a (DeadLetter, Output)| {
            let payload_sha256 = dead_letter.message.payload_sha256();
            NewDeadLetter {
                dead_letter,
                notice,
                payload_sha256,
                group: FailureGroup::of(dead_letter),
            }
        };
        dead_letters.iter().map(new_dead_letter).collect()
    }

    /// Worker and event id.
    pub fn key(&self) -> (&'a str, &'a str) {
        (&self.dead_letter.worker, &self.dead_letter.message.event_id)
    }

    /// Worker, event id and payload digest.
    pub fn full_key(&self) -> (String, String, Vec<u8>) {
        let (worker, event_id) = self.key();
        let payload = self.payload_sha256.to_vec();
        (worker.to_owned(), event_id.to_owned(), payload)
    }

    pub fn origin(&self) -> Option<(&'a str, u64)> {
        self.dead_letter
            .message
            .origin
            .as_ref()
            .map(|origin| (origin.stream.as_str(), origin.sequence))
    }

    /// When the stream stored the message, in microseconds since the epoch.
    pub fn stored_at(&self) -> Option<i64> {
        self.dead_letter
            .message
            .origin
            .as_ref()
            .map(|origin| origin.stored_at.as_microsecond())
    }

    /// The notice with the dead letter's id, which is new. Each generation has a notice of its own.
    pub fn notice_for(&self, dead_letter: i64, generation: u32) -> Output {
        let mut notice = self.notice.clone();
        notice
            .headers
            .push(("Oncely-Dead-Letter".to_owned(), dead_letter.to_string()));
        notice
            .headers
            .push(("Oncely-Group".to_owned(), self.group.id.clone()));
        if generation > 0 {
            notice.id = format!("{}:r{generation}", notice.id);
            notice
                .headers
                .push(("Oncely-Redriven".to_owned(), generation.to_string()));
        }
        notice
    }
}

/// The inbox record of an event: its payload, and whether the event is dead.
pub(super) struct InboxRecord {
    pub payload_sha256: Vec<u8>,
    pub is_dead: bool,
}

/// The dead letters to write:
/// - those whose inbox row this transaction inserted,
/// - redriven ones that are still dead,
/// - those whose event id belongs to another payload.
///
/// `inserted` are the new keys in the inbox, `inbox_records` the records of all keys.
pub(super) fn to_dead_letter<'b, 'a>(
    new_dead_letters: &'b [NewDeadLetter<'a>],
    inserted: &HashSet<(String, String)>,
    inbox_records: &HashMap<(String, String), InboxRecord>,
) -> Vec<&'b NewDeadLetter<'a>> {
    let mut seen = HashSet::new();
    let is_new = |new_dead_letter: &&NewDeadLetter<'a>| {
        let (worker, event_id) = new_dead_letter.key();
        let key = (worker.to_owned(), event_id.to_owned());
        let is_redriven = new_dead_letter.dead_letter.message.redriven.is_some();
        let dies = inbox_records.get(&key).is_some_and(|record| {
            match record.payload_sha256 == new_dead_letter.payload_sha256 {
                true => is_redriven && record.is_dead,
                false => true,
            }
        });
        (dies || inserted.contains(&key)) && seen.insert((key, new_dead_letter.payload_sha256))
    };
    new_dead_letters.iter().filter(is_new).collect()
}

/// An output that was just appended under `seq`, to hand over from memory.
pub(super) fn appended_row(
    seq: i64,
    worker: &str,
    output: &Output,
    first_attempt_at: Timestamp,
    blocked_by: Vec<i64>,
    group: Option<i64>,
) -> OutboxRow {
    OutboxRow {
        seq,
        id: output.id.clone(),
        worker: worker.to_owned(),
        subject: output.subject.clone(),
        headers: output.headers.clone(),
        body: output.body.clone(),
        ordering_key: output.ordering_key.clone(),
        blocked_by,
        group,
        first_attempt_at,
        failures: 0,
    }
}

/// How many earlier outputs of its key an output handed over from memory may list. With more, it is
/// left to the poller.
pub(super) const KEY_QUEUE_MAX: usize = 256;

/// An [`Unpublished`] as columns.
pub(super) struct ReleaseColumns<'a> {
    pub seq: i64,
    /// Delay in microseconds; `None` while it waits for something else.
    pub after: Option<i64>,
    pub failed: bool,
    pub blocked_by: Option<i64>,
    pub parked: bool,
    pub error: Option<Cow<'a, str>>,
    /// The id that was found taken, and the one after it.
    pub taken: Option<&'a str>,
    pub next: Option<String>,
}

impl<'a> ReleaseColumns<'a> {
    pub fn of((seq, outcome): &'a (i64, Unpublished), ids: &OutputIds) -> Self {
        let nothing = ReleaseColumns {
            seq: *seq,
            after: None,
            failed: false,
            blocked_by: None,
            parked: false,
            error: None,
            taken: None,
            next: None,
        };
        match outcome {
            Unpublished::Later { after, error } => ReleaseColumns {
                after: Some(micros(*after)),
                failed: error.is_some(),
                error: error.as_deref().map(printable),
                ..nothing
            },
            Unpublished::BlockedBy(blocked_by) => ReleaseColumns {
                blocked_by: Some(*blocked_by),
                ..nothing
            },
            Unpublished::Parked { reason } => ReleaseColumns {
                failed: true,
                parked: true,
                error: Some(printable(reason)),
                ..nothing
            },
            Unpublished::IdTaken { taken, error } => ReleaseColumns {
                after: Some(0),
                failed: true,
                error: Some(printable(error)),
                taken: Some(taken.as_str()),
                next: Some(ids.next_id(taken)),
                ..nothing
            },
        }
    }
}

/// A worker's migrations that have not run, by name, each with its SHA-256.
///
/// # Errors
/// `Refused` if a migration changed since it ran.
pub(super) fn due_worker_migrations<'m>(
    worker: &str,
    migrations: &'m [WorkerMigration],
    applied: &HashMap<String, Vec<u8>>,
) -> Result<Vec<(&'m WorkerMigration, Vec<u8>)>> {
    let mut sorted: Vec<_> = migrations.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut due = Vec::new();
    for migration in sorted {
        let sha256 = migration_checksum(&migration.sql);
        match applied.get(&migration.name) {
            None => due.push((migration, sha256)),
            Some(ran) if *ran == sha256 => {}
            Some(_) => {
                return Err(StoreError::Refused(anyhow!(
                    "the migration {} of worker {worker} changed since it ran; \
                     restore it, and put the change into a new file that sorts after it",
                    migration.name
                )));
            }
        }
    }
    Ok(due)
}

/// The names of those migrations; see [`due_worker_migrations`].
pub(super) fn due_migration_names(
    worker: &str,
    migrations: &[WorkerMigration],
    applied: &HashMap<String, Vec<u8>>,
) -> Result<Vec<String>> {
    let due = due_worker_migrations(worker, migrations, applied)?;
    Ok(due
        .into_iter()
        .map(|(migration, _)| migration.name.clone())
        .collect())
}

/// The SHA-256 of a migration, independent of the line endings of the checkout.
fn migration_checksum(sql: &str) -> Vec<u8> {
    Sha256::digest(sql.replace("\r\n", "\n").replace('\r', "\n")).to_vec()
}

pub(super) fn migration_failed(migration: &WorkerMigration, cause: anyhow::Error) -> StoreError {
    StoreError::Refused(cause.context(format!("run the migration {}", migration.name)))
}

pub(super) fn migration_ends_transaction(migration: &WorkerMigration) -> StoreError {
    let why = "it ends its transaction; remove the `commit` or `rollback`: \
               all migrations run in one transaction";
    migration_failed(migration, anyhow!(why))
}

pub(super) fn component_missing(digest: &str) -> StoreError {
    StoreError::Refused(anyhow!(
        "there is no component {digest}; store it before it is deployed"
    ))
}

/// The error of every operation after a failed statement of the transaction.
pub(super) fn transaction_failed(why: &str) -> StoreError {
    StoreError::Refused(anyhow!(
        "an earlier statement of this transaction failed: {why}"
    ))
}

/// Checks that a statement recorded exactly the outputs that it named.
pub(super) fn check_all_recorded(met: u64, named: usize) -> Result<()> {
    if usize::try_from(met).is_ok_and(|met| met == named) {
        return Ok(());
    }
    Err(StoreError::Unavailable(anyhow!(
        "{named} outputs to record as published, but {met} found"
    )))
}
