//! The differences that an audit reports.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::explanation::codes;

codes! {
    /// The kind of a difference. [`Kind::as_str`] is its public name.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Kind {
        MessageWithoutOutcome: "message-without-outcome",
            "A message is acknowledged, but its event is not in the inbox of the worker.",
            "Publish it again under the same event id. Find out who removed the inbox row, or moved the consumer.";
        SettledTwice: "settled-twice",
            "The inbox has two rows for one event: its effects may be there twice.",
            "Compare the effects of the event, and delete one of the rows.";
        DoneAndDead: "done-and-dead",
            "An event is done, and has an open dead letter.",
            "If the effects are there, resolve the dead letter.";
        DeadWithoutLetter: "dead-without-letter",
            "An event is dead in the inbox, and has no dead letter.",
            "Find out who removed the dead letter. Delete the inbox row, and publish the message again.";
        LetterWithoutOutcome: "letter-without-outcome",
            "A dead letter waits for an operator, but its event is not in the inbox: another copy of the message would take effect.",
            "Redrive the dead letter, or resolve it.";
        OutputLost: "output-lost",
            "An output is recorded as published, but its stream holds another message there, or ends before.",
            "`oncely audit --repair` publishes it again, under the same id.";
        OutputTwice: "output-twice",
            "An output is on its stream more than once.",
            "Consumers that deduplicate by its id are not affected. Delete the later copy.";
        OutputStreamMissing: "output-stream-missing",
            "Outputs are recorded on a stream that does not exist.",
            "Create the stream again. Hosts then publish the outputs of the last `keep_outputs` again.";
        NoticeMissing: "notice-missing",
            "The notice of a dead letter is not on the stream of dead letters.",
            "`oncely audit --repair` sends it again.";
        CheckpointChanged: "checkpoint-changed",
            "A checkpoint, or a leaf of it, is not as it was when it was closed: its hash, its root or the chain is broken.",
            "Compare the database with a backup, and with the published checkpoints. Find out who changed it.";
        CheckpointDiffers: "checkpoint-differs",
            "The published checkpoint of a number is another one than that in the database, or the database has none.",
            "If the database was restored, its events since then have new checkpoints. Otherwise find out who changed it.";
        RowChanged: "row-changed",
            "A row is not as it was when a checkpoint was closed over it.",
            "Compare the row with its leaf, which is in the finding. Find out who changed it.";
        RowMissing: "row-missing",
            "A checkpoint contains a row that is gone before its retention ended.",
            "Restore the row from its leaf, which is in the finding. Find out who deleted it.";
        RowWithoutCheckpoint: "row-without-checkpoint",
            "A row is in no checkpoint, although a later one was closed: it was inserted afterwards, or its transaction was open for more than 15 minutes.",
            "Find out who wrote the row.";
        NoticeWithoutLetter: "notice-without-letter",
            "The stream of dead letters has a notice without its dead letter.",
            "Find out who removed the dead letter, or published the notice.";
    }
}

/// A difference between the database and the streams, or within the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// The name of a [`Kind`].
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub worker: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub event_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stream: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stream_sequence: Option<u64>,
    /// The number of the output.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dead_letter: Option<i64>,
    /// The finding, in words.
    pub found: String,
    /// What to do.
    pub action: String,
    /// Whether this audit has repaired it.
    pub repaired: bool,
}

impl Kind {
    /// A difference of this kind, without its place.
    pub fn found(self, found: impl Into<String>) -> Difference {
        Difference {
            kind: self.as_str().to_owned(),
            worker: None,
            event_id: None,
            stream: None,
            stream_sequence: None,
            output: None,
            dead_letter: None,
            found: found.into(),
            action: self.explanation().action.to_owned(),
            repaired: false,
        }
    }
}

impl Difference {
    /// The same, at an event of a worker.
    pub fn of_event(self, worker: &str, event_id: &str) -> Self {
        Difference {
            worker: Some(worker.to_owned()),
            event_id: Some(event_id.to_owned()),
            ..self
        }
    }

    /// The same, at a position of a stream.
    pub fn at(self, stream: &str, sequence: u64) -> Self {
        Difference {
            stream: Some(stream.to_owned()),
            stream_sequence: Some(sequence),
            ..self
        }
    }
}
