//! The message that tells all hosts which tags of the cache a transaction invalidated.
//!
//! It is an output like any other: a row of that very transaction, published by whichever host comes to it. Who hears it
//! twice or late forgets a little more than necessary, and nothing else.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::cache_writes::EVERYTHING;
use crate::model::message::{Output, OutputKind};

/// The stream of what is to be forgotten.
pub const CACHE_STREAM: &str = "ONCELY_CACHE";

/// What that stream holds.
pub const CACHE_SUBJECTS: &str = "oncely.cache.>";

/// How long that stream keeps a message, unless somebody made it otherwise; whoever was away for longer forgets everything.
pub const CACHE_STREAM_MAX_AGE: Duration = Duration::from_secs(60 * 60);

/// How much the headers of such a message may take of what the broker lets through, in bytes.
const HEADERS_SIZE: usize = 1024;

/// Which tags of a worker are invalid. Written as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invalidation {
    /// The same on every host. Random, so that a forged message cannot have the id of one to come.
    pub id: String,
    pub worker: String,
    pub tags: BTreeSet<String>,
    /// Just before the commit, by the clock of the host that commits.
    pub at: Timestamp,
}

impl Invalidation {
    /// The tags that one transaction invalidates.
    pub fn new(worker: &str, tags: BTreeSet<String>, at: Timestamp) -> Self {
        let id = format!("cache:{worker}:{}", Uuid::new_v4());
        Invalidation {
            id,
            worker: worker.to_owned(),
            tags,
            at,
        }
    }

    /// The message to `oncely.cache.{worker}`. Where the broker takes no message of that size it says to forget everything.
    pub fn output(&self, event_id: &str, payload_max: usize) -> serde_json::Result<Output> {
        let mut body = serde_json::to_vec(self)?;
        if body.len() + HEADERS_SIZE > payload_max {
            body = serde_json::to_vec(&Invalidation {
                tags: [EVERYTHING.to_owned()].into(),
                ..self.clone()
            })?;
        }
        Ok(Output {
            kind: OutputKind::Invalidation,
            id: self.id.clone(),
            event_id: event_id.to_owned(),
            ordinal: 0,
            subject: format!("oncely.cache.{}", self.worker),
            headers: vec![("Content-Type".to_owned(), "application/json".to_owned())],
            body: Bytes::from(body),
            ordering_key: None,
            delay: Duration::ZERO,
        })
    }

    /// Reads the body of such a message.
    pub fn read(body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oversized_invalidation_covers_everything() {
        let tags: BTreeSet<String> = (0..100).map(|n| format!("tag {n}")).collect();
        let invalidation = Invalidation::new("shop", tags, Timestamp::UNIX_EPOCH);
        let output = invalidation.output("e1", 1 << 20).unwrap();
        assert_eq!(
            (output.id.as_str(), output.subject.as_str()),
            (invalidation.id.as_str(), "oncely.cache.shop")
        );
        assert_ne!(
            Invalidation::new("shop", invalidation.tags.clone(), invalidation.at).id,
            invalidation.id
        );
        assert_eq!(Invalidation::read(&output.body).unwrap(), invalidation);
        let cut = Invalidation::read(&invalidation.output("e1", 1_500).unwrap().body).unwrap();
        assert_eq!(cut.tags, BTreeSet::from([EVERYTHING.to_owned()]));
    }
}
