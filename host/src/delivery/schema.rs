//! Messages that do not fit the schema of their subject. No handler sees them.

use super::{BatchItem, Delivery, Fate};
use crate::config::manifest::Worker;
use crate::guest::{CallFailure, FailureKind};
use crate::model::failure_code::FailureCode;
use crate::model::message::Message;
use crate::model::verdict::{DeadLetter, Reason, Verdict};

/// The failure of a message that does not fit the schema of its subject.
pub(crate) fn schema_mismatch(worker: &Worker, message: &Message) -> Option<CallFailure> {
    let checked = worker.check_schema(&message.subject, &message.headers, &message.body);
    let why = checked.err()?;
    Some(CallFailure::new(
        FailureKind::Reject,
        FailureCode::Schema,
        why,
    ))
}

impl Delivery {
    /// Checks all items before their transaction begins, once for all of their runs.
    pub(super) fn check_schemas(&self, items: &mut [BatchItem]) {
        for item in items {
            item.mismatch = schema_mismatch(&self.worker, &item.message);
        }
    }

    /// Gives a fresh message that does not fit its schema its verdict. Its claim is released with
    /// those of failed items. It has no attempt, so it costs other messages nothing.
    pub(super) fn reject_mismatch(&self, item: &mut BatchItem) {
        let Some(failure) = item.mismatch.take() else {
            return;
        };
        let dead_letter = DeadLetter {
            worker: self.worker.name.clone(),
            version: self.version,
            reason: Reason::Rejected,
            code: failure.code,
            detail: failure.message,
            frames: Vec::new(),
            attempts: item.attempts,
            message: Message::clone(&item.message),
        };
        item.fate = Fate::Judged(Verdict::Dead(Box::new(dead_letter)));
    }
}
