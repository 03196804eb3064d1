//! Everything that the database knows of one event, and the search for an event id.

use jiff::Timestamp;
use serde::Serialize;

use super::db::{Db, Param, Sql};
use super::{
    AttemptRecord, DeadLetterSummary, OutputRecord, Result, dead_letter_queries, outputs, rows,
};

/// The most outputs of an event that are read.
pub const EVENT_OUTPUTS_MAX: u32 = 200;

/// All rows of one event of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Its row in the inbox; `None` while nothing took effect.
    pub inbox: Option<InboxRecord>,
    /// Every failed attempt, oldest first.
    pub attempts: Vec<AttemptRecord>,
    /// The dead letters with this event id, oldest first. Several have different payloads.
    pub dead_letters: Vec<DeadLetterSummary>,
    /// Its outputs in the outbox, those of the platform included, in the order of writing; at most
    /// [`EVENT_OUTPUTS_MAX`].
    pub outputs: Vec<OutputRecord>,
}

impl EventRecord {
    /// Whether the database knows the event.
    pub fn is_known(&self) -> bool {
        self.inbox.is_some()
            || !self.attempts.is_empty()
            || !self.dead_letters.is_empty()
            || !self.outputs.is_empty()
    }
}

/// The row of an event in the inbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InboxRecord {
    /// `done` or `dead`.
    pub state: String,
    /// When its transaction was committed.
    pub settled_at: Timestamp,
    /// SHA-256 over subject and body, lower-case hex.
    pub payload_sha256: String,
    /// The stream of the message; `None` if it came from no stream.
    pub stream: Option<String>,
    /// The sequence on that stream.
    pub stream_sequence: Option<u64>,
}

/// All rows of an event.
pub(super) async fn find(db: &mut Db, worker: &str, event_id: &str) -> Result<EventRecord> {
    Ok(EventRecord {
        inbox: inbox(db, worker, event_id).await?,
        attempts: dead_letter_queries::attempts(db, worker, event_id).await?,
        dead_letters: dead_letter_queries::of_event(db, worker, event_id).await?,
        outputs: outputs::of_event(db, worker, event_id, EVENT_OUTPUTS_MAX).await?,
    })
}

async fn inbox(db: &mut Db, worker: &str, event_id: &str) -> Result<Option<InboxRecord>> {
    let sql = Sql {
        postgres: "select state, payload_sha256, stream, stream_sequence,
             (extract(epoch from settled_at) * 1000000)::bigint as settled_at
         from oncely.inbox where worker = $1 and event_id = $2",
        sqlite: "select state, payload_sha256, stream, stream_sequence, settled_at
         from oncely_inbox where worker = $1 and event_id = $2",
        doing: "find an event",
    };
    let params = [Param::Text(worker), Param::Text(event_id)];
    let row = db.fetch_optional(sql, &params).await?;
    row.as_ref().map(rows::inbox).transpose()
}

/// The workers that know an event id, by name. Searches each deployed worker by its key, so the
/// size of the tables does not matter.
pub(super) async fn workers_with(db: &mut Db, event_id: &str) -> Result<Vec<String>> {
    let sql = Sql {
        postgres: "with names as (select distinct worker from oncely.deployment)
         select worker from oncely.inbox join names using (worker) where event_id = $1
         union select worker from oncely.dead_letter join names using (worker) where event_id = $1
         union select worker from oncely.attempt join names using (worker) where event_id = $1
         order by 1",
        sqlite: "with names as (select distinct worker from oncely_deployment)
         select inbox.worker from names cross join oncely_inbox as inbox
             on inbox.worker = names.worker and inbox.event_id = $1
         union select dead_letter.worker from names cross join oncely_dead_letter as dead_letter
             on dead_letter.worker = names.worker and dead_letter.event_id = $1
         union select attempt.worker from names cross join oncely_attempt as attempt
             on attempt.worker = names.worker and attempt.event_id = $1
         order by 1",
        doing: "search for an event id",
    };
    let rows = db.fetch_all(sql, &[Param::Text(event_id)]).await?;
    Ok(rows::list(&rows, rows::worker_name))
}
