//! What a delivery came to, and the proof that lets a message be acknowledged.

use std::time::Duration;

use crate::model::message::Message;

/// What a panic's own words stand behind in the detail of a failure.
pub const PANIC_PREFIX: &str = "the handler panicked: ";

/// What one delivery of one message came to.
#[derive(Debug)]
pub enum Verdict {
    /// The effects are committed.
    Done(Settled),
    /// They were committed, or the message was buried, before.
    Duplicate(Settled),
    /// The attempt failed and is counted; deliver again after this long.
    Retry { attempt: u32, after: Duration },
    /// The same event id is being handled right now; deliver again after this long. No attempt is spent.
    Wait { after: Duration },
    /// An earlier message of its key failed, and the worker's later ones wait for that. It did not run, or what it did was
    /// rolled back. No attempt is spent.
    Blocked,
    /// It goes to the dead-letter queue.
    Dead(Box<DeadLetter>),
}

impl Verdict {
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

/// The proof that the database holds a final word on a message: only with it can a message be acknowledged.
#[derive(Debug, Clone, Copy)]
pub struct Settled(());

impl Settled {
    /// For the store alone, once it saw the commit or the committed record (a test guards that).
    pub(crate) fn seen_by_store() -> Self {
        Settled(())
    }
}

/// Why a message is dead; `as_str` is what people see and filter by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The handler rejected it.
    Rejected,
    /// The handler failed, trapped, ran out of time or memory as often as the manifest allows.
    AttemptsExhausted,
    /// The handler trapped twice in the same way, after it had asked and seen the very same.
    DeterministicFailure,
    /// The handler sent something it may not send.
    OutputRefused,
    /// The event id was used before with another subject or body.
    IdReuse,
    /// The publisher's event id cannot be used.
    InvalidId,
    /// The headers cannot be read.
    Unreadable,
    /// Hosts died while they handled it, again and again.
    CrashedHost,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Rejected => "rejected",
            Reason::AttemptsExhausted => "attempts-exhausted",
            Reason::DeterministicFailure => "deterministic-failure",
            Reason::OutputRefused => "output-refused",
            Reason::IdReuse => "id-reuse",
            Reason::InvalidId => "invalid-id",
            Reason::Unreadable => "unreadable",
            Reason::CrashedHost => "crashed-host",
        }
    }
}

/// A message on its way to the dead-letter queue.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub worker: String,
    pub version: u32,
    pub reason: Reason,
    /// The handler's own name for the failure, if it gave one.
    pub code: Option<String>,
    /// What went wrong, for a person.
    pub detail: String,
    /// Where the handler trapped: names of functions, innermost first; none if it did not, or if the component has no names.
    pub frames: Vec<String>,
    pub attempts: u32,
    pub message: Message,
}
