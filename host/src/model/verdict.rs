//! The verdict on a delivery, and the proof that allows a message to be acknowledged.

use std::time::Duration;

use crate::model::explanation::codes;
use crate::model::message::Message;

/// The prefix of a panic's message in the detail of a failure.
pub const PANIC_PREFIX: &str = "the handler panicked: ";

/// The outcome of one delivery of one message.
#[derive(Debug)]
pub enum Verdict {
    /// The effects are committed.
    Done(Settled),
    /// The effects were committed, or the message was dead-lettered, before.
    Duplicate(Settled),
    /// The attempt failed and is counted. The message is redelivered after this long.
    Retry {
        /// The number of the failed attempt, from 1.
        attempt: u32,
        /// The wait before the redelivery.
        after: Duration,
    },
    /// Another delivery has the same event id in flight. The message is redelivered after this
    /// long. No attempt is spent.
    Wait {
        /// The wait before the redelivery.
        after: Duration,
    },
    /// An earlier message of its key failed and blocks the later ones. This one did not run, or its
    /// effects were rolled back. No attempt is spent.
    Blocked,
    /// The message goes to the dead-letter queue.
    Dead(Box<DeadLetter>),
}

impl Verdict {
    /// Whether the message is not delivered again.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Verdict::Done(_) | Verdict::Duplicate(_) | Verdict::Dead(_)
        )
    }

    /// The name of the verdict in metrics and logs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Verdict::Done(_) => "done",
            Verdict::Duplicate(_) => "duplicate",
            Verdict::Retry { .. } => "retry",
            Verdict::Wait { .. } => "wait",
            Verdict::Blocked => "blocked",
            Verdict::Dead(_) => "dead",
        }
    }
}

/// Proof that this delivery needs no further handling: its outcome is committed, or its pointer is
/// out of date. Without it, no message can be acknowledged.
#[derive(Debug, Clone, Copy)]
pub struct Settled(());

impl Settled {
    /// For the store alone: after a commit, for a committed record, or for an outdated pointer. A
    /// test guards that.
    pub(crate) fn seen_by_store() -> Self {
        Settled(())
    }
}

codes! {
    /// The reason why a message is dead-lettered. [`Reason::as_str`] is its public name.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Reason {
        Rejected: "rejected",
            "The handler rejected it: retries are useless. Or it does not fit its schema.",
            "Correct the publisher or the handler, then redrive, or drop it.";
        AttemptsExhausted: "attempts-exhausted",
            "The handler failed, trapped, or ran out of time or memory in every attempt.",
            "Find the cause in the failure history of `oncely dlq show`, fix it, and redrive.";
        DeterministicFailure: "deterministic-failure",
            "The handler trapped twice in the same way, after the same host calls and results.",
            "Fix the handler (`oncely replay` runs the attempt again), deploy it, and redrive.";
        OutputRefused: "output-refused",
            "The handler sent an output that it may not send.",
            "Add the subject to `outputs`, or fix the handler, then redrive.";
        IdReuse: "id-reuse",
            "The event id was used before with another subject or body.",
            "Publish the body under a new id, and resolve the dead letter.";
        InvalidId: "invalid-id",
            "The publisher's event id cannot be used, or the message is a batch of CloudEvents.",
            "Correct the publisher. A redrive uses the position on the stream as the id.";
        Unreadable: "unreadable",
            "The headers or the subject cannot be read.",
            "Publish the body under a new id with valid headers, and resolve the dead letter.";
        CrashedHost: "crashed-host",
            "Hosts crashed repeatedly while they handled it.",
            "Read the logs of the hosts, fix the handler or the host, and redrive.";
    }
}

/// A message that goes to the dead-letter queue.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The name of the worker.
    pub worker: String,
    /// The version of the worker that dead-lettered it.
    pub version: u32,
    /// Why the message is not retried.
    pub reason: Reason,
    /// The handler's own code for the failure, if any.
    pub code: Option<String>,
    /// The failure in words, for display.
    pub detail: String,
    /// The functions where the handler trapped, innermost first. Empty if it did not trap, or if
    /// the component has no names.
    pub frames: Vec<String>,
    /// Failed attempts at the event so far, also those before a redrive; 0 if it was not handled.
    pub attempts: u32,
    /// The message as it was delivered.
    pub message: Message,
}
