//! One message of a batch: its key, its attempts and its fate.

use std::collections::HashMap;
use std::sync::Arc;

use super::DUPLICATE_WAIT;
use super::trace::ItemTrace;
use crate::config::manifest::Worker;
use crate::guest::{CallFailure, FailureKind, Record};
use crate::model::failure_code::FailureCode;
use crate::model::message::Message;
use crate::model::verdict::{DeadLetter, Reason, Verdict};
use crate::store::{Claim, Claimed, StoredRecording};

/// Maximum size of the recordings of one batch's failed attempts together, in bytes as they are
/// stored. A recording that does not fit is not kept.
const RECORDINGS_MAX: usize = 8 << 20;

/// One message of a batch.
pub(super) struct BatchItem {
    pub message: Arc<Message>,
    /// Its position in the batch, from 0.
    pub position: usize,
    /// The key whose later messages wait when this one fails.
    pub key: Option<String>,
    /// Failed attempts before this delivery, as the claim read them.
    pub attempts: u32,
    pub fate: Fate,
    /// The failure of a message that does not fit its schema.
    pub mismatch: Option<CallFailure>,
    /// The last run, if traces are on.
    pub trace: Option<Box<ItemTrace>>,
    /// Other messages of the batch with the same event id.
    duplicates: Vec<Duplicate>,
}

/// An in-batch duplicate.
struct Duplicate {
    message: Arc<Message>,
    position: usize,
}

/// The state of an item. `Judged` survives any rollback; `Failed` survives a rerun of the others.
#[derive(Default)]
pub(super) enum Fate {
    /// It is to run.
    #[default]
    Pending,
    /// It ran, and takes effect with the commit.
    Succeeded,
    /// It ran, and its attempt is to be counted.
    Failed(FailedCall),
    /// It did not run, because an earlier item of its key failed in the same transaction.
    Blocked,
    /// It has a verdict.
    Judged(Verdict),
}

/// A failed attempt.
pub(super) struct FailedCall {
    pub failure: CallFailure,
    pub logs: String,
    /// The call with its host calls and their results; none if it did not fit.
    pub recording: Option<StoredRecording>,
}

/// The items of a batch, one per event id, in order.
pub(super) fn distinct(batch: &[Arc<Message>], worker: &Worker) -> Vec<BatchItem> {
    let mut items: Vec<BatchItem> = Vec::with_capacity(batch.len());
    let mut by_event_id: HashMap<&str, usize> = HashMap::with_capacity(batch.len());
    for (position, message) in batch.iter().enumerate() {
        let first = *by_event_id
            .entry(message.event_id.as_str())
            .or_insert(items.len());
        match items.get_mut(first) {
            Some(item) => item.add_duplicate(message, position, worker),
            None => items.push(BatchItem::new(message, position, worker)),
        }
    }
    items.sort_by_key(|item| item.position);
    items
}

/// Resets the fates that a rolled-back transaction led to.
pub(super) fn reset(group: &mut [BatchItem]) {
    for item in group {
        if !matches!(item.fate, Fate::Judged(_)) {
            item.fate = Fate::Pending;
        }
    }
}

impl BatchItem {
    fn new(message: &Arc<Message>, position: usize, worker: &Worker) -> Self {
        BatchItem {
            key: worker.held_key(message),
            message: Arc::clone(message),
            position,
            attempts: 0,
            fate: Fate::Pending,
            mismatch: None,
            trace: None,
            duplicates: Vec::new(),
        }
    }

    /// Takes in another message with the same event id. A redriven message stands for the others:
    /// it may be claimed although its event is dead, and its body may be a corrected one.
    fn add_duplicate(&mut self, message: &Arc<Message>, position: usize, worker: &Worker) {
        let mut duplicate = Duplicate {
            message: Arc::clone(message),
            position,
        };
        if message.redriven.is_some() && self.message.redriven.is_none() {
            std::mem::swap(&mut self.message, &mut duplicate.message);
            std::mem::swap(&mut self.position, &mut duplicate.position);
            self.key = worker.held_key(&self.message);
        }
        self.duplicates.push(duplicate);
    }

    pub(super) fn is_pending(&self) -> bool {
        matches!(self.fate, Fate::Pending)
    }

    pub(super) fn has_succeeded(&self) -> bool {
        matches!(self.fate, Fate::Succeeded)
    }

    pub(super) fn claim(&self) -> Claim {
        let origin = self.message.origin.as_ref();
        Claim {
            event_id: self.message.event_id.clone(),
            payload_sha256: self.message.payload_sha256(),
            origin: origin.map(|origin| (origin.stream.clone(), origin.sequence)),
            redriven: self.message.redriven.is_some(),
        }
    }

    /// Settles the item if the inbox knows its event id; otherwise takes in its failed attempts.
    pub(super) fn apply_claim(&mut self, claimed: Claimed, worker: &str, version: u32) {
        match claimed {
            Claimed::Fresh { attempts } => self.attempts = attempts,
            Claimed::Settled(settled) => self.fate = Fate::Judged(Verdict::Duplicate(settled)),
            Claimed::OtherPayload => {
                let dead_letter = reused_id(&self.message, worker, version);
                self.fate = Fate::Judged(Verdict::Dead(Box::new(dead_letter)));
            }
        }
    }

    /// The verdicts of the in-batch duplicates, each with its position in the batch, when the
    /// item itself has `verdict`.
    pub(super) fn duplicate_verdicts(
        &self,
        verdict: &Verdict,
        worker: &str,
        version: u32,
    ) -> Vec<(usize, Verdict)> {
        let wait = |after| Verdict::Wait { after };
        // The event id is that of the item only once the item is settled. A dead letter for another
        // body before that would settle the event, and the item could not be retried.
        let verdict_of = |duplicate: &Duplicate| match verdict {
            Verdict::Done(settled) | Verdict::Duplicate(settled) => {
                if duplicate.message.payload_sha256() == self.message.payload_sha256() {
                    return Verdict::Duplicate(*settled);
                }
                let dead_letter = reused_id(&duplicate.message, worker, version);
                Verdict::Dead(Box::new(dead_letter))
            }
            Verdict::Retry { after, .. } => wait(*after),
            Verdict::Wait { .. } | Verdict::Blocked | Verdict::Dead(_) => wait(DUPLICATE_WAIT),
        };
        let duplicates = self.duplicates.iter();
        duplicates
            .map(|duplicate| (duplicate.position, verdict_of(duplicate)))
            .collect()
    }
}

impl FailedCall {
    /// A failed attempt with its recording, if that fits beside the `used` bytes of other
    /// recordings.
    pub(super) fn new(
        failure: CallFailure,
        record: Option<&Record>,
        logs: &str,
        used: usize,
    ) -> Self {
        let recording = record.and_then(|record| stored_recording(record, &failure));
        FailedCall {
            recording: recording.filter(|recording| used + recording.json.len() <= RECORDINGS_MAX),
            failure,
            logs: logs.to_owned(),
        }
    }

    /// A failure outside the handler, without logs or a recording.
    pub(super) fn without_call(failure: CallFailure) -> Self {
        FailedCall {
            failure,
            logs: String::new(),
            recording: None,
        }
    }

    pub(super) fn commit_refused(cause: &anyhow::Error) -> Self {
        let why = format!("{cause:#}");
        FailedCall::without_call(CallFailure::new(
            FailureKind::Retry,
            FailureCode::CommitRefused,
            why.as_str(),
        ))
    }

    /// The size of the stored recording, in bytes.
    pub(super) fn recording_size(&self) -> usize {
        self.recording
            .as_ref()
            .map_or(0, |recording| recording.json.len())
    }
}

/// The recording of a call and its failure, as it is stored.
fn stored_recording(record: &Record, failure: &CallFailure) -> Option<StoredRecording> {
    let record = Record {
        failure: Some(failure.clone()),
        ..record.clone()
    };
    match record.json() {
        Ok(json) => Some(StoredRecording {
            json,
            digest: record.trap_digest(),
        }),
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "recording of a failed attempt not kept"
            );
            None
        }
    }
}

/// The dead letter of a message whose event id belongs to another one.
fn reused_id(message: &Message, worker: &str, version: u32) -> DeadLetter {
    DeadLetter {
        worker: worker.to_owned(),
        version,
        reason: Reason::IdReuse,
        code: None,
        detail: format!(
            "the event id `{}` was already used for a message with another subject or body",
            message.event_id
        ),
        frames: Vec::new(),
        attempts: 0,
        message: message.clone(),
    }
}
