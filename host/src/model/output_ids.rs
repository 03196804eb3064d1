//! The published ids of outputs: keyed hashes that no publisher and no worker can compute.
//!
//! A stream stores only one message per `Nats-Msg-Id`. If ids were predictable, a message published
//! under the id of a later output would keep that output from its stream. The id is therefore an
//! HMAC-SHA256 over the identity of the output. Only the hosts of this database hold its key. The
//! readable id is sent in a separate header.

use ring::hmac;

use crate::model::message::{Headers, Output, OutputKind, header};

/// The header with the readable id of an output, such as `settle:p-1:0`.
pub const OUTPUT_ID_HEADER: &str = "Oncely-Output-Id";

/// The bytes of the hash that are published, in hex.
const LENGTH: usize = 16;

/// The most ids of one output that [`OutputIds::is_id_of`] checks. More were never found taken.
const TAKEN_MAX: usize = 8;

/// Derives the ids of one installation. `Debug` does not show the key.
#[derive(Debug)]
pub struct OutputIds {
    key: hmac::Key,
}

impl OutputIds {
    /// Ids under the key of an installation.
    pub fn new(key: &[u8]) -> Self {
        OutputIds {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
        }
    }

    /// Ids under a random key, for use until the installation's own key is read.
    pub fn with_random_key() -> Self {
        OutputIds::new(&rand::random::<[u8; 32]>())
    }

    /// The published id of an output of `worker`: stable for this output, different for any other.
    pub fn id_of(&self, worker: &str, output: &Output) -> String {
        let Output {
            id,
            event_id,
            ordinal,
            ..
        } = output;
        let ordinal = ordinal.to_string();
        match output.kind {
            // The host chose it at random and returned it to the publisher.
            OutputKind::Published => id.clone(),
            // The same id of the same worker is the same message, regardless of the event.
            OutputKind::Chosen => self.hash(&["chosen", worker, id]),
            OutputKind::Derived => self.hash(&["derived", worker, event_id, &ordinal]),
            OutputKind::DeadLetter => self.hash(&["dead letter", worker, event_id, id]),
            OutputKind::Pointer => self.hash(&["pointer", worker, event_id, id]),
            OutputKind::Invalidation => self.hash(&["invalidation", worker, event_id, id]),
            OutputKind::Alarm => self.hash(&["alarm", worker, id]),
            OutputKind::Checkpoint => self.hash(&["checkpoint", worker, id]),
        }
    }

    /// The next id of an output whose stream holds another message under the id `taken`.
    pub fn next_id(&self, taken: &str) -> String {
        self.hash(&["after", taken])
    }

    /// Whether `id` is the first or a later id of the derived output `ordinal` of an event.
    pub fn is_id_of(&self, id: &str, worker: &str, event_id: &str, ordinal: &str) -> bool {
        let first = self.hash(&["derived", worker, event_id, ordinal]);
        std::iter::successors(Some(first), |taken| Some(self.next_id(taken)))
            .take(TAKEN_MAX)
            .any(|own| own == id)
    }

    /// An output as stored and published: under its published id, with the readable one in a
    /// header.
    pub fn seal(&self, worker: &str, output: &Output) -> Output {
        let mut headers = output.headers.clone();
        headers.push((OUTPUT_ID_HEADER.to_owned(), one_line(&output.id)));
        Output {
            id: self.id_of(worker, output),
            headers,
            ..output.clone()
        }
    }

    /// The salt of a receipt's leaf, which follows from its text. Others cannot compute it, so they
    /// cannot guess a leaf from its hash.
    pub fn receipt_salt(&self, leaf: &str) -> String {
        self.hash(&["receipt salt", leaf])
    }

    /// The subject of the installation's watermarks. It cannot be guessed.
    pub fn watermark_subject(&self) -> String {
        format!("oncely.watermark.{}", self.hash(&["watermark subject"]))
    }

    /// The text of a watermark on the broker: its name, and the proof that it is the
    /// installation's.
    pub fn seal_watermark(&self, name: &str) -> String {
        format!("{name} {}", self.hash(&["watermark", name]))
    }

    /// The name of a watermark on the broker; none if the text is not from this installation.
    pub fn open_watermark<'t>(&self, text: &'t str) -> Option<&'t str> {
        let (name, proof) = text.split_once(' ')?;
        (proof == self.hash(&["watermark", name])).then_some(name)
    }

    /// Each part is hashed after its length, so that no two lists of parts are the same text.
    fn hash(&self, parts: &[&str]) -> String {
        let mut context = hmac::Context::with_key(&self.key);
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        let hash = context.sign();
        hex::encode(hash.as_ref().get(..LENGTH).unwrap_or(hash.as_ref()))
    }
}

/// The readable id of a published output: the one in its headers, else `id`.
pub fn readable_id<'o>(headers: &'o Headers, id: &'o str) -> &'o str {
    header(headers, OUTPUT_ID_HEADER).unwrap_or(id)
}

/// Makes a text fit for a header. An event id may contain control characters.
pub fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;

    fn output(kind: OutputKind, id: &str, event_id: &str, ordinal: u32) -> Output {
        Output {
            kind,
            id: id.to_owned(),
            event_id: event_id.to_owned(),
            ordinal,
            subject: "out.x".to_owned(),
            headers: Vec::new(),
            body: Bytes::new(),
            ordering_key: None,
            delay: Duration::ZERO,
        }
    }

    #[test]
    fn output_ids_depend_on_the_output_and_the_key_only() {
        let ids = OutputIds::new(&[7; 32]);
        let one = output(OutputKind::Derived, "victim:EVT-9:0", "EVT-9", 0);
        assert_eq!(
            ids.id_of("victim", &one),
            OutputIds::new(&[7; 32]).id_of("victim", &one)
        );
        assert_ne!(
            ids.id_of("victim", &one),
            OutputIds::new(&[8; 32]).id_of("victim", &one)
        );
        assert_ne!(
            OutputIds::with_random_key().id_of("w", &one),
            OutputIds::with_random_key().id_of("w", &one)
        );
        assert_eq!(ids.id_of("victim", &one).len(), 32);
    }

    #[test]
    fn equal_readable_ids_differ_by_worker_and_kind() {
        use OutputKind::{Alarm, Chosen, DeadLetter, Derived, Invalidation, Pointer};
        let ids = OutputIds::new(&[7; 32]);
        let readable = "victim:EVT-9:0";
        let of_kinds = [Chosen, Derived, DeadLetter, Pointer, Invalidation, Alarm]
            .map(|kind| ids.id_of("victim", &output(kind, readable, "EVT-9", 0)));
        let others = [
            ids.id_of("other", &output(Chosen, readable, "EVT-9", 0)),
            ids.id_of("other", &output(Derived, "other:EVT-9:0", "EVT-9", 0)),
            ids.id_of("victim", &output(Derived, "victim:EVT-9:1", "EVT-9", 1)),
            // Shortened long event ids, and parts that are joined elsewhere.
            ids.id_of("victim", &output(Derived, readable, "EVT-9:0", 0)),
            ids.id_of("victimEVT", &output(Derived, readable, "-9", 0)),
            ids.id_of("victim:EVT-9", &output(Derived, readable, "", 0)),
            ids.next_id(&ids.id_of("victim", &output(Derived, readable, "EVT-9", 0))),
        ];
        let all: BTreeSet<String> = of_kinds.into_iter().chain(others).collect();
        assert_eq!(all.len(), 13);
        // A chosen id belongs to the worker, regardless of the event.
        let chosen =
            |event_id, ordinal| ids.id_of("victim", &output(Chosen, "order-1", event_id, ordinal));
        assert_eq!(chosen("a", 0), chosen("b", 3));
    }

    #[test]
    fn a_sealed_output_keeps_its_readable_id_in_a_header() {
        let ids = OutputIds::new(&[7; 32]);
        let plain = output(OutputKind::Derived, "pay:a\nb:0", "a\nb", 0);
        let sealed = ids.seal("pay", &plain);
        assert_eq!(sealed.id, ids.id_of("pay", &plain));
        assert_eq!(readable_id(&sealed.headers, &sealed.id), "pay:a b:0");
        assert_eq!(readable_id(&Vec::new(), "x"), "x");
    }

    #[test]
    fn a_watermark_opens_only_under_the_key_that_sealed_it() {
        let ids = OutputIds::new(&[7; 32]);
        let text = ids.seal_watermark("a1");
        assert_eq!(ids.open_watermark(&text), Some("a1"));
        for forged in [
            text.replace("a1", "a2"),
            "a1".to_owned(),
            "a1 ".to_owned(),
            String::new(),
        ] {
            assert_eq!(ids.open_watermark(&forged), None, "{forged}");
        }
        assert_eq!(OutputIds::new(&[8; 32]).open_watermark(&text), None);
    }

    #[test]
    fn later_ids_of_an_output_are_recognised() {
        let ids = OutputIds::new(&[7; 32]);
        let first = ids.id_of("pay", &output(OutputKind::Derived, "pay:e1:0", "e1", 0));
        for own in [
            &first,
            &ids.next_id(&first),
            &ids.next_id(&ids.next_id(&first)),
        ] {
            assert!(ids.is_id_of(own, "pay", "e1", "0"));
        }
        for other in ["pay:e1:0", "", &ids.next_id("pay:e1:0")] {
            assert!(!ids.is_id_of(other, "pay", "e1", "0"));
        }
        assert!(!ids.is_id_of(&first, "pay", "e1", "1"));
    }
}
