//! Redriving a dead letter: the pointer that is published to its worker.
//!
//! A pointer holds no copy of the dead letter, only its number and its generation. The worker reads
//! the dead letter from the database, so one of any size can be redriven. A pointer that is out of
//! date has no effect. A forged pointer can only make a worker read a dead letter of its own.

use std::time::Duration;

use bytes::Bytes;

use crate::model::message::{Message, Output, OutputKind, output_id};

/// The stream of pointers: a work queue, from which acknowledged messages are removed.
pub const REDRIVE_STREAM: &str = "ONCELY_REDRIVE";

/// The subjects of [`REDRIVE_STREAM`].
pub const REDRIVE_SUBJECTS: &str = "oncely.redrive.>";

const DEAD_LETTER_HEADER: &str = "Oncely-Dead-Letter";
const GENERATION_HEADER: &str = "Oncely-Generation";

/// A reference to a redriven dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pointer {
    /// The id of the dead letter.
    pub dead_letter: i64,
    /// Number of redrives, this one included.
    pub generation: u32,
}

/// The subject of a worker's pointers.
pub fn subject_of(worker: &str) -> String {
    format!("oncely.redrive.{worker}")
}

/// Whether a subject is one of those. A message that is published there twice does no harm.
pub fn is_pointer(subject: &str) -> bool {
    subject.starts_with("oncely.redrive.")
}

impl Pointer {
    /// The message that points `worker` to the dead letter of `event_id`.
    pub fn output(self, worker: &str, event_id: &str) -> Output {
        let id = output_id(worker, event_id, 0);
        Output {
            kind: OutputKind::Pointer,
            id: format!(
                "{}:r{}",
                id.strip_suffix(":0").unwrap_or(&id),
                self.generation
            ),
            event_id: event_id.to_owned(),
            ordinal: 0,
            subject: subject_of(worker),
            headers: vec![
                (DEAD_LETTER_HEADER.to_owned(), self.dead_letter.to_string()),
                (GENERATION_HEADER.to_owned(), self.generation.to_string()),
            ],
            body: Bytes::new(),
            ordering_key: None,
            delay: Duration::ZERO,
        }
    }

    /// Parses a message of the redrive stream; none if it is not a pointer.
    pub fn parse(message: &Message) -> Option<Pointer> {
        Some(Pointer {
            dead_letter: message.header(DEAD_LETTER_HEADER)?.parse().ok()?,
            generation: message.header(GENERATION_HEADER)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_round_trips_and_each_generation_has_its_own_id() {
        let pointer = Pointer {
            dead_letter: 17,
            generation: 2,
        };
        let output = pointer.output("settle", "p-1");
        assert_eq!(
            (output.id.as_str(), output.subject.as_str()),
            ("settle:p-1:r2", "oncely.redrive.settle")
        );
        let message = Message {
            event_id: output.id,
            subject: output.subject,
            headers: output.headers,
            body: output.body,
            origin: None,
            redriven: None,
        };
        assert_eq!(Pointer::parse(&message), Some(pointer));
        assert_eq!(
            Pointer::parse(&Message {
                headers: Vec::new(),
                ..message
            }),
            None
        );
        assert!(
            pointer
                .output("settle", &"e".repeat(255))
                .id
                .ends_with(":r2")
        );
    }
}
